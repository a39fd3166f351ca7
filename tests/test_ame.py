"""Effects from subset tables: exact in the population, right on games whose answer is known, errors bounded."""

import dataclasses
import itertools
import math

import numpy as np
import oracles
import pytest
from sklearn.linear_model import LassoCV

from llmattrib.errors import MethodError
from llmattrib.estimators import one_sample
from llmattrib.estimators.ame import (
    AmeRegression,
    Knockoffs,
    knockoff_threshold,
    p_buckets,
    player_features,
    residualize,
)
from llmattrib.estimators.one_sample import drawn_sizes, msr_banzhaf, size_weights, table_values
from llmattrib.estimators.quadrature import BANZHAF as BANZHAF_VALUE
from llmattrib.estimators.quadrature import SHAPLEY as SHAPLEY_VALUE
from llmattrib.estimators.quadrature import beta_shapley
from llmattrib.games.kernel import KernelGame
from llmattrib.games.kernel_subsets import KernelUtility
from llmattrib.games.subset_table import ATTRIBUTION, BANZHAF, SHAPLEY, SIZES, Design, SubsetRows, draw_rows
from llmattrib.rng import stream


def all_subsets(n):
    return np.array(list(itertools.product([False, True], repeat=n)))


def majority(members):
    return (members.sum(axis=1) >= 2).astype(float)[:, None]


def population_effects(design, p, chances, n, utility):
    """Regress on every subset at every p, weighted by how likely each is: what infinitely many rows give."""
    members = all_subsets(n)
    utilities = utility(members)
    above, below = 0.0, 0.0
    for q, chance in zip(p, chances, strict=True):
        weight = chance * np.prod(np.where(members, q, 1 - q), axis=1)
        features, scale = player_features(design, members, np.full(len(members), q))
        above += (weight[:, None] * features).T @ utilities
        below += (weight[:, None] * features**2).sum(axis=0)[:, None]
    return scale * above / below


def logit_nodes(eps):
    x, weights = np.polynomial.legendre.leggauss(80)
    edge = np.log(1 / eps - 1)
    return 1 / (1 + np.exp(-edge * x)), weights / 2


def kernel_game(n=12, p=4):
    features, responses = oracles.random_game(n, p, 3)
    queries = oracles.random_game(3, p, 4)[0]
    return KernelGame.relative(features, responses, 0.3), queries


def enumerated(game, queries, weight):
    values = oracles.enumerate_semivalue(game.features, game.responses, game.ridge, weight)
    return values[:, 0] @ queries.T


@pytest.mark.parametrize(("eps", "expected"), [(0.01, 0.33993), (0.1, 0.39333)])
def test_majority_of_three_has_the_known_constants(eps, expected):
    """E[2p(1-p)] over p uniform on (eps, 1 - eps): 1/3 (1 + 2 eps - 2 eps^2), up to the truncation a Shapley value."""
    design = Design("shapley", truncation=eps)
    found = population_effects(design, *logit_nodes(eps), 3, majority)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_allclose(found, (1 + 2 * eps - 2 * eps**2) / 3, rtol=1e-9)
    rows = draw_rows(design, 0, 3, 2000, majority)
    np.testing.assert_allclose(AmeRegression("unpenalized").init(rows).values, expected, atol=0.05)


@pytest.mark.parametrize("constant", [0.3, 0.85, 1 / 3, 0.0, -1e9])
@pytest.mark.parametrize("design", [ATTRIBUTION, SHAPLEY])
def test_a_utility_that_never_changes_has_no_effects(constant, design):
    rows = draw_rows(design, 0, 20, 200, lambda members: np.full((len(members), 1), constant))
    noise = 1 + 1e-15 * stream(0, "noise").standard_normal(rows.utilities.shape)  # a prediction, computed in two ways
    for utilities in (rows.utilities, rows.utilities * noise):
        same = dataclasses.replace(rows, utilities=utilities)
        for rule in ("one_standard_error", "minimum", "unpenalized"):
            result = AmeRegression(rule).init(same)
            np.testing.assert_array_equal(result.values, 0)
            assert result.num_selected == 0
        assert not Knockoffs().init(same).any()


def test_residuals_are_those_of_a_regression_on_bucket_columns():
    rng = stream(0, "columns")
    bucket, columns = rng.permutation(np.arange(60) % 4), rng.standard_normal((60, 3)) + np.array([0, 1e6, 0])
    columns[:, 2] = np.array([0.1, 0.7, 1e5, 1 / 3])[bucket]
    indicators = np.eye(4)[bucket]
    expected = columns - indicators @ np.linalg.lstsq(indicators, columns)[0]
    np.testing.assert_allclose(residualize(columns, bucket)[:, :2], expected[:, :2], atol=1e-9)
    np.testing.assert_array_equal(residualize(columns, bucket)[:, 2], 0)
    many = residualize(np.full((300_000, 1), 0.1), np.arange(300_000) % 2)
    np.testing.assert_array_equal(many, 0)


def test_effects_of_the_kernel_game_equal_enumeration():
    game, queries = kernel_game()
    utility = KernelUtility(game, queries)
    points = ATTRIBUTION.points
    expected = enumerated(game, queries, lambda size: np.mean([oracles.bernoulli_weight(12, q)(size) for q in points]))
    found = population_effects(ATTRIBUTION, points, [0.25] * 4, 12, utility)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    game, queries = kernel_game(8)
    utility = KernelUtility(game, queries)
    p, chances = logit_nodes(0.01)
    density = chances / (chances @ (p * (1 - p))) * p * (1 - p)  # of p uniform on (eps, 1 - eps)
    expected = enumerated(game, queries, lambda size: density @ [oracles.bernoulli_weight(8, q)(size) for q in p])
    found = population_effects(SHAPLEY, p, chances, 8, utility)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("design", "nodes"), [(ATTRIBUTION, (ATTRIBUTION.points, [0.25] * 4)), (SHAPLEY, logit_nodes(0.01))]
)
def test_least_squares_on_drawn_rows_tends_to_the_effects(design, nodes):
    game, queries = kernel_game(8)
    utility = KernelUtility(game, queries)
    truth = population_effects(design, *nodes, 8, utility)
    rows = draw_rows(design, 1, 8, 3200, utility)
    few, many = (
        oracles.relative_error(AmeRegression("unpenalized").init(rows.first(m)).values, truth) for m in (200, 3200)
    )
    assert many < 0.1
    assert many < 0.45 * few


def test_the_path_is_that_of_scikit_learn():
    draws = stream(0, "test lasso")
    x, y = draws.standard_normal((60, 9)), draws.standard_normal((60, 1))
    y += x[:, :1] - 0.5 * x[:, 3:4]
    bucket = np.zeros(60, int)
    centered = residualize(x, bucket), residualize(y, bucket)[:, 0]
    fold = np.arange(60) % 5
    splits = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(5)]
    found = AmeRegression("minimum").regress(x, y, bucket)
    alphas = np.abs(centered[0].T @ centered[1]).max() / 60 * np.geomspace(1, 0.01, 40)
    expected = LassoCV(alphas=alphas, cv=splits, fit_intercept=False, tol=1e-7).fit(*centered)
    np.testing.assert_allclose(found.penalties, expected.alpha_)
    np.testing.assert_allclose(found.cv_errors[0], expected.mse_path_.mean(axis=1), rtol=1e-3)
    np.testing.assert_allclose(found.values[:, 0], expected.coef_, atol=1e-3)
    stricter = AmeRegression("one_standard_error").regress(x, y, bucket)
    best = expected.mse_path_[np.argmin(expected.mse_path_.mean(axis=1))]
    limit = best.mean() + best.std(ddof=1) / math.sqrt(5)
    within = alphas[expected.mse_path_.mean(axis=1) <= limit]
    np.testing.assert_allclose(stricter.penalties, within.max())
    assert 2 <= stricter.num_selected[0] <= found.num_selected[0]


def test_buckets_of_p_are_not_penalized():
    """Utilities that depend on p alone give no effects; shifting buckets changes nothing."""
    rows = draw_rows(ATTRIBUTION, 0, 20, 300, lambda members: members[:, :1] * 1.0)
    moved = rows.utilities + 100 * rows.p[:, None] ** 3
    plain, shifted = (
        AmeRegression().init(SubsetRows(rows.design, 0, rows.members, rows.p, rows.draw, utilities))
        for utilities in (rows.utilities, moved)
    )
    np.testing.assert_allclose(shifted.values, plain.values, atol=1e-10)
    assert np.argmax(plain.values) == 0
    only_p = SubsetRows(rows.design, 0, rows.members, rows.p, rows.draw, np.round(rows.p, 1)[:, None] * 0 + 5.0)
    assert not AmeRegression().init(only_p).values.any()
    buckets = p_buckets(SHAPLEY, draw_rows(SHAPLEY, 0, 3, 2000, majority).p)
    assert np.bincount(buckets).min() > 50
    assert len(np.unique(buckets)) == 20


def poisoned_game(seed):
    """400 examples, ten of which share a feature and the wrong label; a query with that feature."""
    draws = stream(seed, "poison game")
    features = draws.standard_normal((400, 64)) / 8
    responses = np.sign(features @ draws.standard_normal(64) + 0.1 * draws.standard_normal(400))
    poisons = draws.permutation(np.flatnonzero(responses > 0))[:10]
    features[:, 0] = 0
    features[poisons, 0] = 0.5
    responses[poisons] = -1
    clean = next(i for i in range(400) if i not in poisons)
    query = 0.3 * features[clean] + np.eye(64)[0]
    return KernelGame.relative(features, responses[:, None], 3.0), poisons, query[None]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ten_poisons_among_400_are_found(seed):
    game, poisons, query = poisoned_game(seed)
    rows = draw_rows(ATTRIBUTION, seed, 400, 800, KernelUtility(game, query))
    worst = np.argsort(AmeRegression().init(rows).values[:, 0])[:10]
    assert set(worst) == set(poisons)
    chosen = Knockoffs(rate=0.1, harmful=True).init(rows)[:, 0]
    assert chosen[poisons].all()


def test_false_discoveries_are_within_their_rate():
    """25 games of 40 players of whom 12 matter, with pairs that only count together and noise."""
    shares, powers = [], []
    for repeat in range(25):
        draws = stream(repeat, "test knockoffs")
        true = draws.permutation(40)[:12]
        noise = draws.standard_normal(240)

        def utility(members, true=true, noise=noise):
            pairs = members[:, true[:6]] * members[:, true[6:]]
            return (members[:, true].sum(axis=1) + pairs.sum(axis=1) + noise)[:, None]

        rows = draw_rows(ATTRIBUTION, repeat, 40, 240, utility)
        chosen = Knockoffs(rate=0.2).init(rows)[:, 0]
        found = np.isin(np.flatnonzero(chosen), true)
        shares.append(1 - found.mean() if len(found) else 0.0)
        powers.append(found.sum() / 12)
    assert np.mean(shares) <= 0.2 + 2 * np.std(shares) / np.sqrt(25)
    assert np.mean(powers) > 0.7


def test_nothing_is_selected_where_nobody_matters():
    chosen = []
    for repeat in range(20):
        noise = stream(repeat, "noise").standard_normal((200, 1))
        rows = draw_rows(ATTRIBUTION, repeat, 30, 200, lambda members, noise=noise: noise)
        chosen.append(Knockoffs(rate=0.1).init(rows).any())
    assert np.mean(chosen) <= 0.1 + 2 * np.sqrt(0.09 / 20)


def test_knockoff_threshold_by_hand():
    w = np.array([5.0, 4, 3, 2, 1, -1.5, 0, 0])
    assert knockoff_threshold(w, 0.25) == 2.0  # (1 + 0) / 4; at 1: (1 + 1) / 5
    assert knockoff_threshold(w, 0.2) == math.inf
    assert knockoff_threshold(w, 0.4) == 1.0
    assert knockoff_threshold(np.zeros(3), 0.5) == math.inf


@pytest.mark.parametrize(
    "semivalue", [SHAPLEY_VALUE, BANZHAF_VALUE, beta_shapley(4.0, 1.0)], ids=lambda value: value.name
)
@pytest.mark.parametrize("design", [SIZES, SHAPLEY], ids=lambda design: design.name)
def test_one_sample_is_unbiased_and_knows_its_error(semivalue, design):
    game, queries = kernel_game(8)
    utility, n = KernelUtility(game, queries), 8
    empty, full = utility(np.array([[False] * n, [True] * n]))
    weights = size_weights(semivalue, n)
    assert weights.sum() == pytest.approx(1)
    truth = enumerated(game, queries, lambda size: weights[size] / math.comb(n - 1, size))
    scores = []
    for seed in range(40):
        found = table_values(draw_rows(design, seed, n, 60, utility), semivalue, empty, full)
        scores.append(((found.values - truth) / found.standard_errors, found.values - truth))
    standardized, error = (np.array(part) for part in zip(*scores, strict=True))
    assert np.abs(error.mean(axis=0) / (error.std(axis=0) / np.sqrt(40))).max() < 4
    assert 0.7 < np.sqrt(np.mean(standardized**2)) < 1.4


@pytest.mark.parametrize("semivalue", [SHAPLEY_VALUE, beta_shapley(4.0, 1.0)], ids=lambda value: value.name)
def test_the_size_is_taken_out_by_fits_to_the_other_rows(semivalue):
    """Against a least-squares fit for each row; were a row in its own fit, estimates would be biased."""
    n, rows = 15, draw_rows(SIZES, 0, 15, 40, lambda members: np.sqrt(members.sum(axis=1))[:, None])
    size = rows.members.sum(axis=1)
    utilities = rows.utilities + stream(0, "test sizes").standard_normal((40, 1))
    asked = size_weights(semivalue, n)
    powers = (np.arange(1, n)[:, None] / n) ** 0.5
    basis = np.arcsin(powers) ** np.arange(5)
    residual, back = np.empty((40, 1)), 0.0
    for row in range(40):
        others = np.arange(40) != row
        fit = basis @ np.linalg.lstsq(basis[size[others] - 1], utilities[others])[0]
        residual[row] = utilities[row] - fit[size[row] - 1]
        back += (asked[: n - 1] - asked[1:]) @ fit / 40
    found = one_sample._without_size(utilities, size, asked, 40)
    np.testing.assert_allclose(found[0], residual, rtol=1e-6)
    np.testing.assert_allclose(found[1], back, rtol=1e-6, atol=1e-9)


def test_drawn_sizes_are_those_of_rows():
    for design in (SIZES, SHAPLEY, BANZHAF, ATTRIBUTION):
        size = draw_rows(design, 0, 6, 2000, majority).members.sum(axis=1)
        chances = drawn_sizes(design, 6)
        assert chances.sum() == pytest.approx(1)
        assert np.abs(np.bincount(size, minlength=7) / 2000 - chances).max() < 4.5 * np.sqrt(0.25 / 2000)


def test_banzhaf_by_sample_reuse():
    game, queries = kernel_game(8)
    utility = KernelUtility(game, queries)
    truth = enumerated(game, queries, oracles.bernoulli_weight(8, 0.5))
    whole = SubsetRows(BANZHAF, 0, all_subsets(8), np.full(256, 0.5), np.arange(256), utility(all_subsets(8)))
    np.testing.assert_allclose(msr_banzhaf(whole).values, truth, rtol=1e-8, atol=1e-12)
    found = msr_banzhaf(draw_rows(BANZHAF, 0, 8, 2000, utility))
    score = (found.values - truth) / found.standard_errors
    assert np.abs(score).max() < 4
    assert 0.5 < np.sqrt(np.mean(score**2)) < 1.5


def test_what_cannot_be_used_is_named():
    rows = draw_rows(SIZES, 0, 12, 40, majority)
    with pytest.raises(MethodError, match="design sizes draws sizes"):
        AmeRegression().init(rows)
    with pytest.raises(MethodError, match="design sizes is not of Banzhaf"):
        msr_banzhaf(rows)
    few = draw_rows(ATTRIBUTION, 0, 12, 9, majority)
    with pytest.raises(MethodError, match="9 subsets are too few for the rule one_standard_error"):
        AmeRegression().init(few)
    with pytest.raises(MethodError, match="9 subsets are too few for the rule unpenalized"):
        AmeRegression("unpenalized").init(few)
    with pytest.raises(MethodError, match=r"\d subsets are neither empty nor full"):
        table_values(few, SHAPLEY_VALUE, np.zeros(1), np.ones(1))
    with pytest.raises(MethodError, match="on one side of 2 subsets"):
        msr_banzhaf(draw_rows(BANZHAF, 0, 12, 2, majority))
    halves = draw_rows(BANZHAF, 0, 30, 40, majority)
    with pytest.raises(MethodError, match="hardly draws the sizes that shapley asks about"):
        table_values(halves, SHAPLEY_VALUE, np.zeros(1), np.ones(1))
    table_values(halves, BANZHAF_VALUE, np.zeros(1), np.ones(1))
    with pytest.raises(MethodError, match="did not converge"):
        AmeRegression(max_iterations=1).init(draw_rows(ATTRIBUTION, 0, 60, 60, lambda m: m @ np.ones((60, 1))))
