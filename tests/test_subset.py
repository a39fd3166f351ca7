import dataclasses
import math

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators.certificate import Certificate, certify, sample_queries
from llmattrib.estimators.enumeration import Enumeration
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.quadrature import BANZHAF, LEAVE_ONE_OUT, ame, beta_shapley
from llmattrib.estimators.subset import SolvedSubset, Subset
from llmattrib.games.kernel import FeatureRows, KernelGame

SHAPES = [(9, 4), (8, 8), (7, 20)]  # dual and primal solves, and a row space


def make(n, p, ridge=0.1, c=2, seed=0):
    features, responses = oracles.gradient_like_game(n, p, seed, c=c)
    return KernelGame.relative(features, responses, ridge)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_one_solve_gives_the_marginals_of_all_players(n, p, ridge):
    game = make(n, p, ridge)
    queries = oracles.random_game(5, p, 1)[0]
    rng = np.random.default_rng(0)
    forms = set()
    for q in (0.0, 0.2, 0.5, 0.9, 1.0):
        members = rng.random(n) < q
        solved = SolvedSubset(game, members)
        forms.add(solved.is_dual)
        expected = np.empty((5, n, 2))
        for player in range(n):
            others = set(np.flatnonzero(members)) - {player}
            with_it, without = (
                oracles.subset_weights(game.features, game.responses, game.ridge, sorted(chosen))
                for chosen in (others | {player}, others)
            )
            expected[:, player] = queries @ (with_it - without).T
        found = solved.effects(game.space.project(queries))[:, :, None] * solved.factors
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        representers = solved.factors[:, :, None] * game.space.lift(solved.representers())[:, None]
        np.testing.assert_allclose(representers, game.marginals(members), rtol=1e-6, atol=1e-6)
    assert forms == ({True} if p >= n else {True, False})


def test_mean_of_samples_is_the_representers_of_the_same_draws():
    game = make(9, 4)
    queries = oracles.random_game(5, 4, 1)[0]
    estimator = Subset(num_draws=40)
    moments = estimator.measure(game, queries)
    result = estimator.init(game)
    assert (moments.count, result.num_draws, result.semivalue) == (40, 40, "shapley")
    np.testing.assert_allclose(moments.mean, np.einsum("mp,ncp->mnc", queries, result.representers), rtol=1e-9)


@pytest.mark.parametrize(
    "semivalue",
    [BANZHAF, ame([0.2, 0.8]), beta_shapley(4.0, 1.0), beta_shapley(1.0, 1.0), Subset().semivalue],
    ids=lambda value: value.name,
)
def test_every_measure_is_met_within_its_standard_error(semivalue):
    game = make(6, 4, ridge=0.3, c=1)
    truth = Enumeration(semivalue).init(game).representers
    moments = Subset(semivalue, num_draws=600).measure(game, np.eye(4))
    gaps = (moments.mean - np.moveaxis(truth, 2, 0)) / moments.standard_error
    assert np.abs(gaps).max() < 4.5
    assert (moments.standard_error < 0.25 * np.abs(truth).max()).all()


@pytest.mark.parametrize(("semivalue", "members"), [(LEAVE_ONE_OUT, True), (ame([0.0]), False)])
def test_both_ends_of_the_axis_are_exact_in_one_draw(semivalue, members):
    game = make(7, 3)
    found = Subset(semivalue, num_draws=1).init(game).representers
    np.testing.assert_allclose(found, game.marginals(np.full(7, members)), rtol=1e-9, atol=1e-12)


def test_ranges_of_draws_merge_to_the_whole():
    game, queries = make(9, 4), oracles.random_game(5, 4, 1)[0]
    whole = Subset(num_draws=50, seed=3).measure(game, queries)
    parts = [Subset(num_draws=k, first_draw=at, seed=3).measure(game, queries) for at, k in ((0, 7), (7, 30), (37, 13))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == whole.count == 50
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)
    other = Subset(num_draws=50, seed=4).measure(game, queries)
    assert not np.allclose(other.mean, whole.mean)
    again = Subset(num_draws=50, seed=3).measure(game, queries)
    assert again.mean.tobytes() == whole.mean.tobytes()


def test_draws_are_stratified_over_q():
    draws = list(Subset(num_draws=32, num_strata=16).draws(3))
    for block in (draws[:16], draws[16:]):
        assert sorted(math.floor(16 * math.sqrt(draw.q)) for draw in block) == list(range(16))
    assert all(draw.weight == pytest.approx(2 * math.sqrt(draw.q)) for draw in draws)
    points = [draw.q for draw in Subset(ame([0.1, 0.5, 0.6, 0.9]), num_draws=16).draws(3)]
    assert sorted(points) == sorted([0.1, 0.5, 0.6, 0.9] * 4)


def test_memory_is_checked():
    with pytest.raises(MethodError, match=r"sampling subsets needs(.|\n)*take fewer queries at a time"):
        Subset(max_bytes=100).measure(make(9, 4), np.eye(4))
    with pytest.raises(MethodError, match="sampling subsets needs"):
        Subset(max_bytes=100).init(make(9, 4))


def test_progress_is_reported():
    seen = []
    Subset(num_draws=3).measure(make(9, 4), np.eye(4), lambda done, total: seen.append((done, total)))
    Subset(num_draws=3).init(make(9, 4), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize(
    "semivalue", [Subset().semivalue, BANZHAF, beta_shapley(4.0, 1.0)], ids=lambda value: value.name
)
def test_enumeration_equals_the_definition(semivalue):
    game = make(6, 4)
    weights = {
        "shapley": lambda s: 1 / (6 * math.comb(5, s)),
        "banzhaf": oracles.bernoulli_weight(6, 0.5),
        "beta_shapley(4,1)": lambda s: 4 * math.gamma(s + 1) * math.gamma(6 - s + 3) / math.gamma(6 + 4),
    }
    truth = oracles.enumerate_semivalue(game.features, game.responses, game.ridge, weights[semivalue.name])
    np.testing.assert_allclose(Enumeration(semivalue).init(game).representers, truth, rtol=1e-8, atol=1e-10)


def test_enumeration_of_many_players_is_refused():
    with pytest.raises(MethodError, match=r"of 17 examples(.|\n)*at most 16(.|\n)*mean field"):
        Enumeration().init(make(17, 3))


def shifted(game, by):
    """A mean field that is wrong by `by` of the exact values, in the signs of a fixed pattern."""
    result = MeanField().init(game)
    truth = Enumeration().init(game).representers
    pattern = np.where(np.arange(len(truth)) % 2, 1, -1)[:, None, None]
    return dataclasses.replace(result, representers=truth * (1 + by * pattern)), truth


@pytest.mark.parametrize("by", [0.0, 0.3])
def test_certificate_measures_a_bias_without_the_noise(by):
    """Over 40 certificates: the estimate of |bias|^2 is unbiased, its standard error safe, its limit covers."""
    game = make(8, 4, ridge=0.3)
    queries = sample_queries(FeatureRows.of(game.features), 8, 0)
    wrong, truth = shifted(game, by)
    gap = np.einsum("mp,ncp->mnc", queries, wrong.representers - truth)
    values = np.einsum("mp,ncp->mnc", queries, wrong.representers)
    true_bias = np.linalg.norm(gap) / np.linalg.norm(values)
    found = [certify(game, wrong, queries, Subset(num_draws=32, seed=seed)) for seed in range(40)]
    squares = np.array([certificate._between() / certificate.square for certificate in found])
    assert abs(squares.mean() - true_bias**2) < 4 * squares.std() / math.sqrt(40)
    assert np.mean([certificate.upper >= true_bias for certificate in found]) >= 0.9  # of 40; 95 % are meant
    plain = np.mean([np.sqrt(np.mean(c.products) / c.square) for c in found])
    assert plain > true_bias + 0.02, "a plain difference shows the noise"
    if by:
        assert np.mean([certificate.lower > 0 for certificate in found]) > 0.9
    else:
        assert np.mean([certificate.lower > 0 for certificate in found]) <= 0.1  # of 40; 5 % are meant
    spread = np.mean([c._spread() / c.square for c in found])
    assert squares.std() / 1.5 < spread < 4 * squares.std()


def test_certificate_shows_the_bias_of_the_cavity_form():
    game = make(10, 3, ridge=0.1, c=1)
    queries = sample_queries(FeatureRows.of(game.features), 16, 0)
    cavity = certify(game, MeanField(form="cavity").init(game), queries, Subset(num_draws=512))
    pairs = certify(game, MeanField(form="pairs").init(game), queries, Subset(num_draws=512))
    assert cavity.bias - 2 * cavity.standard_error > pairs.upper
    assert (cavity.num_draws, cavity.num_queries) == (512, 16)


def test_certificate_is_a_few_products():
    products = np.full((3, 3), 4.0) + 9 * np.eye(3)
    certificate = Certificate(products, 100.0, 12, 5)
    assert certificate.bias == pytest.approx(0.2)
    assert certificate.noise == pytest.approx(0.3 / math.sqrt(3))
    assert certificate.upper == pytest.approx(0.2)
    assert certificate.standard_error == pytest.approx(0)
    both = certificate.merge(Certificate(-products, 300.0, 12, 5))
    assert (both.square, both.bias) == (400.0, 0.0)
    assert dataclasses.astuple(certificate.summary()) == pytest.approx((0.2, 0, 0.2, 0.2, 0.3 / math.sqrt(3), 12, 5))
    assert str(certificate.summary()) == "bias 20.0% +- 0.0% (at most 20.0%, 12 draws)"
    assert Certificate(products * 0, 0.0, 12, 5).upper == 0


@pytest.mark.parametrize(("asked", "done"), [(8, 8), (20, 20), (33, 32), (50, 48)])
def test_draws_of_a_certificate_fill_whole_blocks(asked, done):
    game = make(8, 4)
    certificate = certify(game, MeanField().init(game), game.features, Subset(num_draws=asked))
    assert certificate.num_draws == done
    assert len(certificate.products) >= 8


def test_certificates_that_cannot_be_are_errors():
    game = make(8, 4)
    result = MeanField().init(game)
    with pytest.raises(MethodError, match=r"of 7 draws(.|\n)*at least 8"):
        certify(game, result, game.features, Subset(num_draws=7))
    with pytest.raises(MethodError, match="draws for banzhaf cannot check a mean field of shapley"):
        certify(game, result, game.features, Subset(BANZHAF, num_draws=8))
    with pytest.raises(MethodError, match=r"a certificate needs(.|\n)*reduce.certificate_draws to 0"):
        certify(game, result, game.features, Subset(num_draws=8, max_bytes=100))


def test_sampled_queries_are_rows_and_combinations_of_their_size():
    features = make(30, 50).features
    queries = sample_queries(FeatureRows.of(features), 16, 0)
    assert queries.shape == (16, 50)
    rows = {row.tobytes() for row in features}
    assert [query.tobytes() in rows for query in queries] == [True] * 8 + [False] * 8
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1)
    assert np.linalg.matrix_rank(np.concatenate([features, queries])) == 30
    assert sample_queries(FeatureRows.of(features[:3]), 16, 0).shape == (16, 50)
    assert not sample_queries(FeatureRows.of(np.zeros((4, 2))), 6, 0).any()


def test_moments_of_a_measurement_give_signs():
    game = make(8, 3, ridge=1.0, c=1)
    moments = Subset(num_draws=500).measure(game, game.features)
    assert isinstance(moments, Moments)
    signs, truth = moments.signs(), np.einsum("mp,ncp->mnc", game.features, Enumeration().init(game).representers)
    assert (signs[signs != 0] == np.sign(truth)[signs != 0]).all()
    assert (signs != 0).mean() > 0.3
