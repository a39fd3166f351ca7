import dataclasses
import itertools
import math
import time

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators import mean_field
from llmattrib.estimators.copies import group_copies
from llmattrib.estimators.fixed_point import sites, solve_field
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.quadrature import (
    BANZHAF,
    LEAVE_ONE_OUT,
    SHAPLEY,
    NestedRule,
    Semivalue,
    ame,
    beta_shapley,
    clenshaw_curtis,
    weighted_banzhaf,
)
from llmattrib.games.kernel import KernelGame
from llmattrib.rng import stream

GAMES = {"gaussian": oracles.random_game, "gradient-like": oracles.gradient_like_game}


def run(features, responses, ridge, **settings):
    game = KernelGame.relative(features, responses, ridge)
    return game, MeanField(**settings).init(game)


def total_gradient_at(features, responses, lam, q):
    """METHODS form at one q: plain iteration, then A = diag(gd) + H2 diag(cd) by a general solve. [n, p]."""
    n, p = features.shape
    a, d = 1 - q, np.ones(n)
    for _ in range(2000):
        c = q / (1 + a * d)
        inverse = np.linalg.inv(lam * np.eye(p) + features.T @ (c[:, None] * features))
        s = np.einsum("np,pk,nk->n", features, inverse, features)
        d = ((s - 1) + np.sqrt((1 - s) ** 2 + 4 * a * s)) / (2 * a)
    rows = features @ inverse
    u = (responses[:, 0] - rows @ features.T @ (c * responses[:, 0]))[:, None] * rows
    h2 = (rows @ features.T) ** 2
    cq, cd = 1 / (1 + a * d) + q * d / (1 + a * d) ** 2, -q * a / (1 + a * d) ** 2
    gd, gq = ((1 + 2 * a * d) * (1 + d) - (d + a * d**2)) / (1 + d) ** 2, -(d**2) / (1 + d)
    z = np.linalg.solve((np.diag(gd) + h2 * cd[None, :]).T, cd[:, None] * u)
    return cq[:, None] * u - (cq[:, None] * (h2 @ z) + gq[:, None] * z)


@pytest.mark.parametrize("q", [1e-3, 0.2, 0.5, 0.95])
@pytest.mark.parametrize(("n", "p"), [(12, 5), (9, 30)])
def test_one_solve_form_equals_the_general_total_gradient(n, p, q):
    features, responses = oracles.random_game(n, p, 0)
    game, result = run(features, responses, 0.1, semivalue=ame([q]), form="total_gradient", fixed_point_tolerance=1e-13)
    expected = total_gradient_at(features, responses, game.ridge, q)
    np.testing.assert_allclose(result.representers[:, 0], expected, rtol=1e-8, atol=1e-11)
    assert result.sum_rule_error is None


def pair_estimate(features, responses, lam, q):
    """E[w_S] for the vector q of probabilities: the mean field, then every pair's four cases averaged. [p]."""
    n, p = features.shape
    d = np.ones(n)
    while True:
        c = q / (1 + (1 - q) * d)
        inverse = np.linalg.inv(lam * np.eye(p) + features.T @ (c[:, None] * features))
        s = np.einsum("np,pk,nk->n", features, inverse, features)
        before, d = d, np.sqrt(d * s / (1 - c * s))
        if np.abs(d / before - 1).max() < 1e-14:
            break
    weights = inverse @ features.T @ (c * responses[:, 0])
    kernel = features @ inverse @ features.T
    scattering = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        pair, mean = np.ix_([i, j], [i, j]), np.zeros((2, 2))
        for case in itertools.product([0, 1], repeat=2):
            chance = np.prod(np.where(case, q[[i, j]], 1 - q[[i, j]]))
            mean += chance * np.linalg.inv(np.diag(1 / (case - c[[i, j]])) + kernel[pair])
        scattering[pair] += mean
    return weights + inverse @ features.T @ (scattering @ (responses[:, 0] - features @ weights))


@pytest.mark.parametrize("q", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("n", "p"), [(6, 3), (4, 7)])
def test_pair_form_is_the_derivative_of_the_pair_estimate(n, p, q):
    features, responses = oracles.random_game(n, p, 0)
    game, result = run(features, responses, 0.1, semivalue=ame([q]), form="pairs", fixed_point_tolerance=1e-13)
    step = 1e-5 * q
    for player, found in enumerate(result.representers[:, 0]):
        shift = step * (np.arange(n) == player)
        up, down = (pair_estimate(features, responses, game.ridge, q + sign * shift) for sign in (1, -1))
        np.testing.assert_allclose(found, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", GAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n", "p"), [(8, 3), (8, 20), (10, 6), (10, 20)])
def test_shapley_is_near_enumeration(n, p, seed, kind):
    features, responses = GAMES[kind](n, p, seed)
    for ridge, bounds in (
        (0.1, {"pairs": 0.02, "total_gradient": 0.06}),
        (1.0, {"pairs": 0.002, "total_gradient": 0.01}),
    ):
        truth = oracles.enumerate_shapley(features, responses, KernelGame.relative(features, responses, ridge).ridge)
        for form, bound in bounds.items():
            _, result = run(features, responses, ridge, form=form)
            assert oracles.relative_error(result.representers, truth) <= bound
            assert result.sum_rule_error <= 1e-3
            assert result.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("p", [3, 6, 20])
def test_shapley_of_twelve_is_near_enumeration(p, seed):
    features, responses = oracles.random_game(12, p, seed)
    for ridge, bound in ((0.1, 0.02), (1.0, 0.002)):
        game, result = run(features, responses, ridge, form="pairs")
        truth = oracles.enumerate_shapley(features, responses, game.ridge)
        assert oracles.relative_error(result.representers, truth) <= bound


def test_permutation_oracle_equals_refitting():
    features, responses = oracles.random_game(5, 3, 0)
    mean, _ = oracles.permutation_shapley(features, responses, 0.7, 12, seed=3, batch=5)
    draws = stream(3, "permutations")
    orders = [draws.permutation(5) for _ in range(12)]
    np.testing.assert_allclose(mean, oracles.prefix_permutation_shapley(features, responses, 0.7, orders), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("p", [20, 200])
def test_shapley_of_sixty_is_within_monte_carlo_noise(p):
    features, responses = oracles.gradient_like_game(60, p, 0)
    game = KernelGame.relative(features, responses, 0.1)
    truth, error = oracles.permutation_shapley(game.space.coordinates, responses, game.ridge, 16_000, seed=1)
    noise = np.linalg.norm(error) / np.linalg.norm(truth)
    assert noise < 0.05
    for form, bias in (("pairs", 0.002), ("total_gradient", 0.015)):
        result = MeanField(form=form).init(game)
        found = game.space.project(result.representers[:, 0])
        assert oracles.relative_error(found, truth) <= noise + bias
        assert result.sum_rule_error <= 1e-3


@pytest.mark.parametrize(("n", "p"), [(40, 8), (30, 64)])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("form", ["pairs", "total_gradient"])
def test_sum_rule_holds_and_is_measured_against_the_full_model(n, p, ridge, form):
    features, responses = oracles.gradient_like_game(n, p, 1, c=3)
    game, result = run(features, responses, ridge, form=form)
    full = oracles.subset_weights(features, responses, game.ridge, list(range(n)))
    found = oracles.relative_error(result.representers.sum(axis=0), full)
    assert found <= 1e-3
    assert result.sum_rule_error == pytest.approx(found, rel=1e-3, abs=1e-9)
    assert result.num_iterations <= 8 * result.num_nodes


def test_cavity_misses_the_sum_rule_and_says_so():
    features, responses = oracles.gradient_like_game(40, 8, 1)
    _, result = run(features, responses, 0.1, form="cavity")
    assert result.sum_rule_error > 0.05
    assert result.quadrature_error <= 1e-3
    assert any("does not keep the sum rule" in note for note in result.notes)


@pytest.mark.parametrize("form", ["pairs", "total_gradient", "cavity"])
@pytest.mark.parametrize(("n", "p"), [(9, 4), (6, 11)])
def test_leave_one_out_end_of_the_axis_is_exact(n, p, form):
    features, responses = oracles.random_game(n, p, 5, c=2)
    game, result = run(features, responses, 0.1, semivalue=LEAVE_ONE_OUT, form=form)
    np.testing.assert_allclose(result.representers, game.marginals(np.ones(n, bool)), rtol=1e-9, atol=1e-12)


def test_empty_end_of_the_axis_is_exact():
    features, responses = oracles.random_game(9, 4, 5)
    game, result = run(features, responses, 0.1, semivalue=ame([0.0]))
    np.testing.assert_allclose(result.representers, game.marginals(np.zeros(9, bool)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("semivalue", "weights"),
    [
        (BANZHAF, lambda n: oracles.bernoulli_weight(n, 0.5)),
        (ame([0.2, 0.8]), lambda n: lambda s: sum(oracles.bernoulli_weight(n, q)(s) for q in (0.2, 0.8)) / 2),
        # Beta(4, 1)-Shapley by its own formula: q has the density 4 (1-q)^3.
        (
            beta_shapley(4.0, 1.0),
            lambda n: lambda s: 4 * np.exp(math.lgamma(s + 1) + math.lgamma(n - s + 3) - math.lgamma(n + 4)),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_semivalues_are_near_enumeration(semivalue, weights):
    features, responses = oracles.random_game(9, 6, 0)
    game, result = run(features, responses, 0.3, semivalue=semivalue)
    truth = oracles.enumerate_semivalue(features, responses, game.ridge, weights(9))
    assert oracles.relative_error(result.representers, truth) <= 0.03
    assert result.sum_rule_error is None
    assert result.semivalue == semivalue.name


@pytest.mark.parametrize(("form", "bound"), [("pairs", 0.01), ("total_gradient", 0.05)])
def test_copies_are_grouped_and_remain_players_of_their_own(form, bound):
    features, responses = oracles.random_game(6, 4, 0)
    rows = np.concatenate([features, features[:3], features[:1]])
    answers = np.concatenate([responses, responses[:3], responses[:1]])
    game, result = run(rows, answers, 0.1, form=form)
    truth = oracles.enumerate_shapley(rows, answers, game.ridge)
    assert result.num_groups == 6
    assert result.sum_rule_error <= 1e-3
    assert "4 of 10 examples repeat another one" in result.notes[0]
    assert oracles.relative_error(result.representers, truth) <= bound
    np.testing.assert_array_equal(result.representers[[0, 0, 1]], result.representers[[6, 9, 7]])


@pytest.mark.parametrize(("ridge", "bound"), [(1e-3, 0.25), (1e-2, 0.08), (0.1, 0.015), (1.0, 1e-3), (10.0, 1e-6)])
def test_copies_have_equal_values_at_any_ridge_as_good_as_those_of_others(ridge, bound):
    """`bound` is about that of the six examples without the copies, whose error grows with 1/ridge like this one."""
    features, responses = oracles.random_game(6, 4, 0)
    rows, answers = np.concatenate([features, features[:3]]), np.concatenate([responses, responses[:3]])
    game, result = run(rows, answers, ridge)
    np.testing.assert_array_equal(result.representers[:3], result.representers[6:])
    assert oracles.relative_error(result.representers, oracles.enumerate_shapley(rows, answers, game.ridge)) <= bound
    assert result.sum_rule_error <= 1e-3


def test_copies_with_other_responses_are_not_grouped():
    features, responses = oracles.random_game(6, 4, 0)
    rows, answers = np.concatenate([features, features[:3]]), np.concatenate([responses, -responses[:3]])
    game, result = run(rows, answers, 0.1)
    assert result.num_groups == 9
    assert result.sum_rule_error <= 1e-3
    assert oracles.relative_error(result.representers, oracles.enumerate_shapley(rows, answers, game.ridge)) <= 0.05


def test_copies_are_found_within_the_tolerance_only():
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((50, 7))
    rows[20:40] = rows[:20] * (1 + 1e-5 * draws.standard_normal((20, 7)))
    rows[40:] = rows[:10] * (1 + 1e-2)
    groups = group_copies(rows, np.ones((50, 1)), 1e-4)
    np.testing.assert_array_equal(groups.group[:20], groups.group[20:40])
    assert len(groups.counts) == 30
    assert groups.counts.sum() == 50
    np.testing.assert_array_equal(groups.counts[groups.group[[0, 25, 45]]], [2, 2, 1])
    assert len(group_copies(rows, np.arange(50.0)[:, None], 1e-4).counts) == 50
    assert len(group_copies(rows, np.ones((50, 1)), None).counts) == 50


def test_copies_are_found_across_a_row_of_another_length():
    """Rows are sorted along a direction; a short row between two long copies must not part them."""
    direction = stream(0, "mean_field", "copies").standard_normal(3)
    direction /= np.linalg.norm(direction)
    across = np.linalg.svd(direction[None])[2][1]
    rows = np.array([direction + 100 * across, 1.0005 * direction, 1.001 * direction + 100 * across])
    assert group_copies(rows, np.ones((3, 1)), 1e-4).group.tolist() == [0, 1, 0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sites_average_over_the_copies_present(count):
    """E over m ~ Binomial(k, q) by listing all 2^k cases; derivatives by finite differences."""

    def listed(d, q):
        cases = list(itertools.product([0, 1], repeat=count))
        chance = np.array([q ** sum(case) * (1 - q) ** (count - sum(case)) for case in cases])
        m = np.array([sum(case) for case in cases])
        empty = chance @ (1 / (1 + m * d))
        weight = chance @ (m / (1 + m * d)) / empty
        leverage = d * empty
        t = (m - weight) / (1 + (m - weight) * leverage)
        assert chance @ t == pytest.approx(0, abs=1e-12)
        return weight, empty, chance @ t**2, chance @ t**3 / (chance @ t**2)

    def slope(along, field, step=1e-6):
        up, down = (listed(0.7 + sign * step * (along == "d"), 0.3 + sign * step * (along == "q")) for sign in (1, -1))
        return (up[field] - down[field]) / (2 * step)

    found = sites(np.full(2, 0.7), 0.3, np.array([count, 9]))
    weight, empty, variance, skew = listed(0.7, 0.3)
    expected = {"weight": weight, "empty": empty, "variance": variance, "skew": skew, "gain": slope("q", 0)}
    expected |= {f"variance_{along}": slope(along, 2) for along in "qd"}
    expected |= {f"skew_{along}": slope(along, 3) for along in "qd"}
    for name, value in expected.items():
        assert getattr(found, name)[0] == pytest.approx(value, rel=1e-6), name


def test_results_do_not_depend_on_the_order_of_players_or_the_basis():
    features, responses = oracles.gradient_like_game(15, 6, 0, c=2)
    _, result = run(features, responses, 0.1)
    order = np.random.default_rng(0).permutation(15)
    _, permuted = run(features[order], responses[order], 0.1)
    np.testing.assert_allclose(permuted.representers, result.representers[order], rtol=1e-5, atol=1e-7)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 6)))[0]
    _, embedded = run(features @ rotation.T, responses, 0.1)
    np.testing.assert_allclose(embedded.representers @ rotation, result.representers, rtol=1e-5, atol=1e-7)


def test_values_are_linear_in_the_responses():
    features, responses = oracles.gradient_like_game(15, 6, 0, c=2)
    _, both = run(features, responses, 0.1)
    _, sum_of_both = run(features, responses.sum(axis=1, keepdims=True), 0.1)
    np.testing.assert_allclose(sum_of_both.representers[:, 0], both.representers.sum(axis=1), rtol=1e-5, atol=1e-7)


def test_zero_rows_and_zero_responses_have_no_value():
    features, responses = oracles.random_game(8, 5, 0)
    features[2] = 0
    _, result = run(features, responses, 0.1)
    assert not result.representers[2].any()
    assert result.sum_rule_error <= 1e-3
    _, nothing = run(features, np.zeros_like(responses), 0.1)
    assert not nothing.representers.any()
    assert nothing.sum_rule_error == 0


def test_values_that_cancel_have_a_finite_sum_rule_error():
    """Centred features and equal responses: the full model is zero, the players' values are not."""
    features = oracles.random_game(20, 6, 0)[0]
    features -= features.mean(axis=0)
    _, result = run(features, np.ones((20, 1)), 0.1)
    assert np.linalg.norm(result.representers.sum(axis=0)) < 1e-2 * np.linalg.norm(result.representers)
    assert result.sum_rule_error <= 1e-3


def test_single_player_takes_all():
    features, responses = oracles.random_game(1, 4, 0)
    game, result = run(features, responses, 0.5)
    np.testing.assert_allclose(result.representers[0, 0], game.weights(np.ones(1, bool))[0], rtol=1e-3)


@pytest.mark.parametrize("form", ["pairs", "total_gradient", "cavity"])
@pytest.mark.parametrize("ridge", [0.1, 1e-4])
def test_large_systems_run_in_float32_with_the_same_result_at_any_conditioning(monkeypatch, ridge, form):
    """What a small ridge makes ill-conditioned (Gram, factor, leverages) is float64 at every size."""
    features, responses = oracles.gradient_like_game(60, 12, 0)
    _, wide = run(features, responses, ridge, form=form, max_level=2)
    monkeypatch.setattr(mean_field, "LARGE", 50)
    _, narrow = run(features, responses, ridge, form=form, max_level=2)
    assert (wide.precision, narrow.precision) == ("float64", "float32")
    assert narrow.representers.dtype == np.float32
    assert wide.response_residual is None
    if form == "cavity":
        assert narrow.response_residual is None
    else:
        assert 0 < narrow.response_residual <= 1e-4
    bound = 1e-5 if form == "cavity" else 2e-4  # the residual of the iterative solve is 1e-4
    assert oracles.relative_error(narrow.representers, wide.representers) < bound


def test_two_runs_give_the_same_bytes_and_report_progress():
    features, responses = oracles.gradient_like_game(25, 6, 0)
    seen = []
    game = KernelGame.relative(features, responses, 0.1)
    first = MeanField().init(game, lambda done, total: seen.append((done, total)))
    again = MeanField().init(KernelGame.relative(features, responses, 0.1))
    assert first.representers.tobytes() == again.representers.tobytes()
    assert seen[:9] == [(done, 9) for done in range(1, 10)]
    assert first.num_nodes == len(seen)


def test_wide_features_of_a_hundred_take_seconds():
    features, responses = oracles.gradient_like_game(100, 4096, 0)
    begin = time.process_time()
    _, result = run(features, responses, 0.1)
    assert time.process_time() - begin < 5
    assert result.sum_rule_error <= 1e-3


def test_unresolved_axis_is_noted():
    features, responses = oracles.gradient_like_game(40, 8, 1)
    _, result = run(features, responses, 0.01, max_level=0)
    assert result.sum_rule_error > 1e-3
    assert "the q-axis is not resolved" in result.notes[0]


def test_dense_system_beyond_the_memory_names_the_cavity_form():
    features, responses = oracles.random_game(300, 2, 0)
    with pytest.raises(MethodError, match=r"of 300 examples in 2 dimensions needs(.|\n)*set reduce.form=cavity"):
        run(features, responses, 0.1, max_bytes=400_000)
    _, result = run(features, responses, 0.1, max_bytes=400_000, form="cavity")
    assert result.representers.shape == (300, 1, 2)
    with pytest.raises(MethodError, match=r"use a smaller features\.sketch\.dim"):
        run(features, responses, 0.1, max_bytes=1000, form="cavity")


def test_fixed_point_that_does_not_converge_is_an_error():
    features, responses = oracles.random_game(8, 3, 0)
    with pytest.raises(MethodError, match=r"mean field at q = .* has not converged after 2 rounds"):
        run(features, responses, 0.01, max_iterations=2)


def test_leverage_lost_in_rounding_is_an_error():
    features, responses = oracles.random_game(12, 3, 0)
    with pytest.raises(MethodError, match=r"at q = .* is lost in rounding(.|\n)*take a larger reduce\.ridge"):
        run(features, responses, 1e-10)


def test_unstable_field_is_an_error():
    """A field that is no fixed point can have an indefinite response."""
    features = np.ones((2, 1))
    field = solve_field(features, np.ones(2, int), 1e-6, 0.9, np.zeros(2), tolerance=1e9, max_iterations=1)
    with pytest.raises(MethodError, match=r"not stable at q = 0\.9"):
        mean_field._Gradient(field, field.whitened * 100, "total_gradient")


@pytest.mark.parametrize("num_intervals", [8, 16])
def test_clenshaw_curtis_is_exact_on_polynomials(num_intervals):
    nodes, weights = clenshaw_curtis(num_intervals)
    assert (nodes[0], nodes[-1]) == (0, 1)
    for degree in range(num_intervals + 1):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), rel=1e-13)


@pytest.mark.parametrize("shift", [1e-4, 0.01, 3.0])
def test_nested_rules_reuse_nodes_and_integrate_the_density(shift):
    rule = NestedRule(beta_shapley(2.0, 3.0), shift)
    nodes = {level: rule.nodes(level) for level in range(4)}
    assert [len(new) for new in nodes.values()] == [9, 8, 16, 32]
    everything = [(level, index, rule.q(u)) for level, new in nodes.items() for index, u in new]
    mass = sum(rule.weight(level, index, 3) for level, index, _ in everything)
    mean = sum(rule.weight(level, index, 3) * q for level, index, q in everything)
    assert mass == pytest.approx(1, rel=1e-9)
    assert mean == pytest.approx(3 / 5, rel=1e-9)  # q ~ Beta(3, 2)
    assert rule.u(rule.q(0.3)) == pytest.approx(0.3)
    assert (rule.q(0.0), rule.q(1.0)) == (0.0, 1.0)


def test_semivalues_that_cannot_be_integrated_are_errors():
    with pytest.raises(MethodError, match="which is unbounded"):
        beta_shapley(0.5, 1.0)
    with pytest.raises(MethodError, match=r"expected: q in \[0, 1\], at least one"):
        ame([0.5, 1.5])
    with pytest.raises(MethodError, match=r"has points \(\)"):
        ame([])
    assert SHAPLEY.is_shapley
    assert beta_shapley(1.0, 1.0).is_shapley
    assert not Semivalue("half", points=((0.5, 1.0),)).is_shapley


SWEPT = (
    SHAPLEY,
    BANZHAF,
    LEAVE_ONE_OUT,
    beta_shapley(4.0, 1.0),
    beta_shapley(1.0, 16.0),
    weighted_banzhaf(0.3),
    ame([0.3, 0.5]),
)


def num_solves(monkeypatch):
    """Counts the fields that are solved from now on."""
    solved = []
    monkeypatch.setattr(mean_field, "solve_field", lambda *args, **more: solved.append(1) or solve_field(*args, **more))
    return solved


@pytest.mark.parametrize("form", ["pairs", "cavity"])
def test_a_sweep_gives_the_bytes_of_separate_runs_from_fewer_nodes(monkeypatch, form):
    game = KernelGame.relative(*oracles.gradient_like_game(25, 6, 0, c=2), 0.05)
    solved = num_solves(monkeypatch)
    alone = [MeanField(semivalue, form=form).init(game) for semivalue in SWEPT]
    num_alone = len(solved)
    solved.clear()
    together = MeanField(form=form).sweep(game, SWEPT)
    finest = max(result.num_nodes for result, semivalue in zip(alone, SWEPT, strict=True) if semivalue.beta)
    assert num_alone == sum(result.num_nodes for result in alone)
    assert len(solved) == finest + 3, "q = .3, .5, 1 beside the nodes of the finest density"
    assert len(solved) < num_alone / 1.5
    assert len({result.num_nodes for result in alone[:1] + alone[3:5]}) > 1, "densities stop at levels of their own"
    for one, other, semivalue in zip(alone, together, SWEPT, strict=True):
        assert one.representers.tobytes() == other.representers.tobytes()
        assert dataclasses.replace(one, representers=other.representers, seconds=other.seconds) == other
        assert other.semivalue == semivalue.name
    shuffled = MeanField(form=form).sweep(game, SWEPT[::-1])
    assert [result.representers.tobytes() for result in shuffled] == [r.representers.tobytes() for r in together[::-1]]


def test_memory_grows_with_the_semivalues_of_a_sweep():
    game = KernelGame.relative(*oracles.random_game(300, 40, 0), 0.1)
    estimator = MeanField()
    one, many = (estimator.num_bytes(300, 40, 1, chosen) for chosen in ((SHAPLEY,), SWEPT))
    assert one == estimator.num_bytes(300, 40, 1)
    assert many - one >= 8 * 300 * 40 * (2 * 5 + 4), "sums of two more densities and four points"
    tight = MeanField(max_bytes=(one + many) // 2)
    assert tight.init(game).num_nodes >= 9
    with pytest.raises(MethodError, match=r"shorten reduce\.methods, and lengthen it again in a second run"):
        tight.sweep(game, SWEPT)


@pytest.mark.parametrize("form", ["pairs", "total_gradient", "cavity"])
@pytest.mark.parametrize("semivalue", [SHAPLEY, beta_shapley(4.0, 1.0)], ids=lambda semivalue: semivalue.name)
def test_profile_integrates_to_the_values_and_ends_in_leave_one_out(form, semivalue):
    features, responses = oracles.gradient_like_game(12, 20, 0, c=2)
    rows, answers = np.concatenate([features, features[:2]]), np.concatenate([responses, responses[:2]])
    game = KernelGame.relative(rows, answers, 0.1)
    queries, players = oracles.random_game(3, 20, 1)[0], np.array([7, 0, 13])
    estimator = MeanField(semivalue, form=form)
    profile = estimator.profile(game, queries, players)
    values = np.einsum("mp,ncp->mnc", queries, estimator.init(game).representers[players])
    assert profile.values.shape == profile.earned.shape == (len(profile.q), 3, 3, 2)
    np.testing.assert_allclose(np.tensordot(profile.weights, profile.values, 1), values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(profile.earned[-1], values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(profile.earned[0], 0, atol=1e-12)
    np.testing.assert_allclose(profile.shares()[-1], 1)
    assert (profile.q[0], profile.q[-1]) == (0, 1)
    for end, members in ((-1, np.ones(14, bool)), (0, np.zeros(14, bool))):
        exact = np.einsum("mp,ncp->mnc", queries, game.marginals(members))[:, players]
        np.testing.assert_allclose(profile.values[end], exact, rtol=1e-8, atol=1e-11)


def test_profile_between_the_ends_is_that_of_single_q():
    """V at a node is the weighted Banzhaf value there; the part below a node is a fine sum of them."""
    game = KernelGame.relative(*oracles.gradient_like_game(12, 5, 0), 0.1)
    queries, players = oracles.random_game(2, 5, 1)[0], np.array([3, 4])
    profile = MeanField(form="pairs").profile(game, queries, players)
    node = len(profile.q) // 2
    fine, steps = np.polynomial.legendre.leggauss(24)
    q = profile.q[node] * (fine + 1) / 2

    def at(values_of):
        found = MeanField(ame(values_of)).sweep(game, [weighted_banzhaf(x) for x in values_of])
        return np.stack([np.einsum("mp,ncp->mnc", queries, result.representers[players]) for result in found])

    np.testing.assert_allclose(profile.values[node], at([profile.q[node]])[0], rtol=1e-4, atol=1e-6)
    below = profile.q[node] / 2 * np.tensordot(steps, at(list(q)), 1)
    np.testing.assert_allclose(profile.earned[node], below, atol=3e-3 * np.abs(profile.earned[-1]).max())


def test_profile_needs_a_density():
    game = KernelGame.relative(*oracles.random_game(5, 3, 0), 0.1)
    with pytest.raises(MethodError, match="banzhaf has no density over q to follow"):
        MeanField(BANZHAF).profile(game, game.features, np.array([0]))


def test_measures_have_names_of_their_own():
    assert [semivalue.name for semivalue in (ame([0.8, 0.2, 0.4, 0.6]), ame([0.5]), beta_shapley(4.0, 1.0))] == [
        "ame",
        "ame(0.5)",
        "beta_shapley(4,1)",
    ]
    with pytest.raises(MethodError, match="or a density instead"):
        Semivalue("both", points=((0.5, 1.0),), beta=(1.0, 1.0))
