"""The streamed mean field against dense oracles: fixed point, low-rank total gradient, certificate, several ranks."""

import functools

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators import streamed
from llmattrib.estimators.certificate import certify, certify_streamed, sample_queries
from llmattrib.estimators.fixed_point import sites, solve_field
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.quadrature import BANZHAF, LEAVE_ONE_OUT, SHAPLEY, ame, beta_shapley
from llmattrib.estimators.streamed import StreamedField
from llmattrib.estimators.streamed_node import site
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import FeatureRows, KernelGame, array_blocks
from llmattrib.rng import stream
from llmattrib.scorers.gradient import unit_rows

CHUNK = 16


def make(n, p, ridge=0.1, kind=oracles.gradient_like_game):
    features, responses = kind(n, p, 0)
    return KernelGame.relative(features.astype(np.float32).astype(np.float64), responses, ridge)


def rows_of(game):
    return FeatureRows(array_blocks(game.features.astype(np.float32), CHUNK), *game.features.shape)


def run(game, semivalue=SHAPLEY, **settings):
    (result,) = StreamedField(**settings).sweep(rows_of(game), game.responses[:, 0], game.ridge, (semivalue,))
    return result, values_of(game, result)


def values_of(game, result):
    blocks = array_blocks(game.features.astype(np.float32), CHUNK)
    return np.concatenate([result.representers(start, rows) for start, rows in blocks()])


def low_rank_at(game, q, num_vectors):
    """Gain b^-1 N^-1 b U with N^-1 exact on a Krylov basis of E from the vector of ones, all of it dense. [n, p]."""
    features, n = game.features, len(game.features)
    counts = np.ones(n, int)
    field = solve_field(features, counts, game.ridge, q, np.zeros(n), tolerance=1e-12, max_iterations=200)
    found, weight = sites(field.cavity, q, counts), field.whitened
    b, residual = np.sqrt(found.variance), game.responses[:, 0] - weight @ field.weights(game.responses)[:, 0]
    scatter = (b[:, None] * (weight @ weight.T) ** 2) * b
    np.fill_diagonal(scatter, 0)
    basis, _ = np.linalg.qr(np.stack([np.linalg.matrix_power(scatter, k) @ np.ones(n) for k in range(num_vectors)]).T)
    inner = basis.T @ scatter @ basis
    inverse = np.eye(n) + basis @ (np.linalg.inv(np.eye(len(inner)) - inner) - np.eye(len(inner))) @ basis.T
    return field.unwhiten((found.gain / b)[:, None] * (inverse @ ((b * residual)[:, None] * weight)))


@pytest.mark.parametrize("q", [1e-3, 0.2, 0.95, 1.0])
def test_site_is_that_of_a_single_player(q):
    d = np.array([1e-8, 0.1, 3.0, 400.0])
    expected = sites(d, q, np.ones(4, int))
    found = site(d / (1 + expected.weight * d), q)
    for name, values in (("weight", found.weight), ("gain", found.gain), ("variance", found.b**2)):
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-8, err_msg=name)


@pytest.mark.parametrize(("n", "p"), [(90, 12), (30, 40)])
@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_values_at_one_q_are_those_of_the_dense_low_rank_inverse(n, p, q, num_vectors):
    game = make(n, p)
    _, found = run(game, ame((q,)), num_vectors=num_vectors, fixed_point_tolerance=1e-10)
    assert oracles.relative_error(found, low_rank_at(game, q, num_vectors)) < 1e-6


@pytest.mark.parametrize("semivalue", [SHAPLEY, BANZHAF, LEAVE_ONE_OUT, beta_shapley(4.0, 1.0), ame((0.2, 0.6))])
def test_without_vectors_it_is_the_cavity_form(semivalue):
    game = make(60, 8)
    expected = MeanField(semivalue, form="cavity", max_level=1, duplicate_tolerance=None).init(game)
    result, found = run(game, semivalue, num_vectors=0, max_level=1, fixed_point_tolerance=1e-10)
    if semivalue.beta is None or result.num_nodes == expected.num_nodes:
        assert oracles.relative_error(found, expected.representers[:, 0]) < 1e-6
    assert (result.num_nodes, result.semivalue) == (17 if semivalue.beta else len(semivalue.points), semivalue.name)


@pytest.mark.parametrize("kind", [oracles.gradient_like_game, oracles.random_game])
@pytest.mark.parametrize("ridge", [0.1, 0.01])
def test_four_vectors_keep_the_sum_rule_and_come_near_the_total_gradient(kind, ridge):
    game = make(300, 30, ridge, kind)
    dense = MeanField(form="total_gradient").init(game)
    cavity = MeanField(form="cavity", max_level=1).init(game)
    result, found = run(game)
    assert result.sum_rule_error <= 1e-3 < 0.1 < cavity.sum_rule_error
    assert result.num_nodes == dense.num_nodes
    full = game.weights(np.ones(300, bool))[0]
    claimed = np.linalg.norm(found.sum(axis=0) - full) / np.linalg.norm(full)
    assert result.sum_rule_error == pytest.approx(claimed, rel=1e-2, abs=1e-6)
    truth, queries = dense.representers[:, 0], game.features[:40]
    assert oracles.relative_error(found, truth) < 0.03
    assert oracles.relative_error(found, truth) < oracles.relative_error(cavity.representers[:, 0], truth)
    errors = [oracles.relative_error(queries @ v.T, queries @ truth.T) for v in (found, cavity.representers[:, 0])]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("n", "p", "ridge", "decay", "is_centered"),
    [(300, 30, 1e-3, 1, False), (40, 60, 0.01, 0, True), (2100, 20, 0.1, 0, False)],
)
def test_a_first_guess_that_is_not_positive_definite_is_replaced(n, p, ridge, decay, is_centered, monkeypatch):
    """Leverages fall steeply along q where n / (d ridge) is large, and interpolating over them overshoots."""
    features = stream(0, "rows").standard_normal((n, p)) * np.arange(1.0, p + 1) ** -decay
    features = unit_rows((features - is_centered * features.mean(axis=0)).astype(np.float32))
    game = KernelGame(features.astype(np.float64), np.ones((n, 1)), ridge)
    safe, replaced = streamed._Run._safe_guess, []
    monkeypatch.setattr(streamed._Run, "_safe_guess", lambda run, q: [replaced.append(q), safe(run, q)][1])
    monkeypatch.setitem(globals(), "CHUNK", 512)
    level, is_wide = (1, False) if n > streamed.WIDE else (2, True)
    _, found = run(game, num_vectors=0, max_level=level, fixed_point_tolerance=1e-9 if is_wide else 1e-6)
    cavity = MeanField(form="cavity", max_level=level, duplicate_tolerance=None).init(game).representers[:, 0]
    assert oracles.relative_error(found, cavity) < (1e-5 if is_wide else 1e-4)
    if is_wide:
        result, found = run(game)
        dense = MeanField(form="total_gradient", duplicate_tolerance=None).init(game).representers[:, 0]
        assert result.sum_rule_error <= 1e-3
        assert oracles.relative_error(found, dense) < 0.04
        queries = sample_queries(rows_of(game), 12, seed=0)
        assert certify_streamed(rows_of(game), ridge, result, queries, Subset(num_draws=32)).lower < 0.05
    assert replaced


def test_shapley_is_near_enumeration():
    game = make(10, 20, 1.0)
    _, found = run(game)
    truth = oracles.enumerate_shapley(game.features, game.responses, game.ridge)[:, 0]
    assert oracles.relative_error(found, truth) < 0.02


def test_many_rows_are_float32_with_the_same_values(monkeypatch):
    game = make(80, 10)
    wide, expected = run(game)
    monkeypatch.setattr(streamed, "WIDE", 50)
    monkeypatch.setattr(streamed, "_SAMPLED", 10)
    narrow, found = run(game)
    assert (wide.precision, narrow.precision) == ("float64", "float32")
    assert found.dtype == np.float32
    assert oracles.relative_error(found, expected) < 1e-5


def test_a_sweep_gives_what_each_semivalue_has_alone():
    game = make(50, 8)
    semivalues = (SHAPLEY, BANZHAF, beta_shapley(3.0, 1.0), ame((0.2, 0.5)))
    together = StreamedField().sweep(rows_of(game), game.responses[:, 0], game.ridge, semivalues)
    for semivalue, result in zip(semivalues, together, strict=True):
        alone, values = run(game, semivalue)
        np.testing.assert_array_equal(values_of(game, result), values)
        assert (result.num_nodes, result.semivalue) == (alone.num_nodes, semivalue.name)


def test_copies_have_equal_values_and_a_note():
    game = make(40, 6)
    features, responses = game.features.copy(), game.responses.copy()
    features[30:], responses[30:] = features[:10], responses[:10]
    result, found = run(KernelGame(features, responses, game.ridge))
    np.testing.assert_allclose(found[30:], found[:10], rtol=1e-9, atol=1e-12)
    assert "copies are not joined" in result.notes[0]


def test_certificate_is_that_of_the_dense_game():
    game = make(60, 8)
    features, draws = rows_of(game), Subset(num_draws=32)
    result, found = run(game)
    queries = sample_queries(features, 12, seed=0)
    dense = MeanField(form="cavity").init(game)
    like = certify(game, type(dense)(**{**vars(dense), "representers": found[:, None]}), queries, draws)
    measured = certify_streamed(features, game.ridge, result, queries, draws)
    np.testing.assert_allclose(measured.products, like.products, rtol=1e-6, atol=1e-9 * np.abs(like.products).max())
    assert measured.square == pytest.approx(like.square, rel=1e-6)
    assert measured.num_draws == like.num_draws == 32


def test_parts_of_two_processes_add_up():
    """Each pass of one process is joined with what the other one's would be: as by one to rounding."""
    game = make(100, 9)
    blocks = list(array_blocks(game.features.astype(np.float32), CHUNK)())
    _, expected = run(game)

    def total(part, own, other):
        mine = part()
        mixed.features.__dict__["blocks"] = lambda: iter(other)
        try:
            return mine + part()
        finally:
            mixed.features.__dict__["blocks"] = lambda: iter(own)

    class mixed:
        features = FeatureRows(lambda: iter(blocks[::2]), *game.features.shape)

    object.__setattr__(mixed.features, "total", functools.partial(total, own=blocks[::2], other=blocks[1::2]))
    (result,) = StreamedField().sweep(mixed.features, game.responses[:, 0], game.ridge, (SHAPLEY,))
    for start, rows in blocks:
        found = result.representers(start, rows)
        assert oracles.relative_error(found, expected[start : start + len(rows)]) < 1e-9


def test_what_cannot_be_is_named():
    game = make(60, 8, 1e-9)
    with pytest.raises(MethodError, match=r"has not converged after 2 rounds(.|\n)*take a larger reduce.ridge"):
        run(game, max_iterations=2)
    with pytest.raises(MethodError, match=r"a streamed mean field of 60 examples in 8 dimensions needs"):
        run(make(60, 8), max_bytes=1000)
