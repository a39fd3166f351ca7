"""The laws of semivalues, over the table of estimators in contracts.py."""

import math

import numpy as np
import oracles
import pytest
from contracts import (
    ESTIMATORS,
    SAMPLED_ESTIMATORS,
    SEMIVALUE_ESTIMATORS,
    SEMIVALUES,
    THRESHOLD_CONSTANTS,
    Estimate,
    Estimator,
)
from test_ame import logit_nodes, majority, population_effects

from llmattrib.estimators.ame import AmeRegression
from llmattrib.estimators.certificate import certify
from llmattrib.estimators.enumeration import Enumeration
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.permutation import Permutation
from llmattrib.estimators.quadrature import LEAVE_ONE_OUT, SHAPLEY, Semivalue, beta_shapley
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import KernelGame
from llmattrib.games.subset_table import Design, draw_rows

WORST = 4.5  # standard errors, of some hundred values looked at
NUM_RUNS = 30

every = pytest.mark.parametrize("row", ESTIMATORS, ids=lambda row: row.name)
every_semivalue = pytest.mark.parametrize("row", SEMIVALUE_ESTIMATORS, ids=lambda row: row.name)
every_sampled = pytest.mark.parametrize("row", SAMPLED_ESTIMATORS, ids=lambda row: row.name)


def make(n: int, p: int, c: int = 1, seed: int = 0, ridge: float = 0.3) -> tuple[KernelGame, np.ndarray]:
    features, responses = oracles.random_game(n, p, seed, c=c)
    return KernelGame.relative(features, responses, ridge), oracles.random_game(6, p, seed + 100)[0]


def assert_near(row: Estimator, found: Estimate, truth: np.ndarray) -> None:
    """Within the row's bias as a whole; sampled ones within some standard errors entry by entry."""
    if row.sample is None:
        assert oracles.relative_error(found.values, truth) <= row.bias
    else:
        scores = (found.values - truth) / found.error
        assert np.abs(scores).max() < WORST
        assert np.mean(found.error**2) < 0.15 * np.mean(truth**2), "the comparison says something"


def exact(game: KernelGame, queries: np.ndarray) -> np.ndarray:
    truth = oracles.enumerate_shapley(game.features, game.responses, game.ridge)
    return np.asarray(np.einsum("mp,ncp->mnc", queries, truth))


@every
@pytest.mark.parametrize(("n", "p", "c"), [(8, 4, 1), (10, 6, 1), (8, 4, 3), (7, 15, 3)])
def test_equals_enumeration(row, n, p, c):
    game, queries = make(n, p, c)
    assert_near(row, row.run(game, queries, SHAPLEY), exact(game, queries))


@every
@pytest.mark.parametrize(("n", "p"), [(10, 5), (8, 12)])
def test_efficiency(row, n, p):
    game, queries = make(n, p, 2)
    found = row.run(game, queries, SHAPLEY)
    full = game.value(np.ones(n, bool), queries)
    gap = np.abs(found.values.sum(axis=1) - full)
    if not row.keeps_sum:
        assert np.linalg.norm(gap) > 0.01 * np.linalg.norm(full), "or the row is wrong about itself"
    elif row.sum_error is None:
        assert (gap <= np.sum(found.error, axis=1)).all()
    else:
        assert np.linalg.norm(gap) <= row.sum_error * np.linalg.norm(full)


@every
def test_symmetry(row):
    """Two players who are equal, and a third who is not."""
    game, queries = make(8, 4, 2)
    features, responses = game.features.copy(), game.responses.copy()
    features[5], responses[5] = features[2], responses[2]
    found = row.run(KernelGame(features, responses, game.ridge), queries, SHAPLEY)
    allowed = 1e-9 if row.sample is None else WORST * (found.error[:, 2] + found.error[:, 5])
    assert (np.abs(found.values[:, 2] - found.values[:, 5]) <= allowed).all()
    assert np.abs(found.values[:, 2] - found.values[:, 3]).max() > np.max(allowed)


@every
def test_null_player(row):
    game, queries = make(8, 4, 2)
    features = game.features.copy()
    features[3] = 0
    found = row.run(KernelGame(features, game.responses, game.ridge), queries, SHAPLEY)
    np.testing.assert_allclose(found.values[:, 3], 0, atol=1e-14)
    assert np.abs(found.values[:, [2, 4]]).min() > 0


@every
def test_additivity(row):
    """The value in a sum of games is the sum of the values."""
    game, queries = make(9, 5, 2)
    parts = row.run(game, queries, SHAPLEY).values
    responses = game.responses @ np.array([[1.0], [-0.5]])
    whole = row.run(KernelGame(game.features, responses, game.ridge), queries, SHAPLEY).values
    np.testing.assert_allclose(whole[..., 0], parts @ [1.0, -0.5], rtol=1e-6, atol=1e-9)


@every_semivalue
def test_leave_one_out_is_the_end_of_the_axis(row):
    game, queries = make(8, 5, 2)
    found = row.run(game, queries, LEAVE_ONE_OUT).values
    everyone = list(range(8))
    for player in everyone:
        full, without = (
            oracles.subset_weights(game.features, game.responses, game.ridge, chosen)
            for chosen in (everyone, [other for other in everyone if other != player])
        )
        np.testing.assert_allclose(found[:, player], queries @ (full - without).T, rtol=1e-8, atol=1e-11)


@every_semivalue
@pytest.mark.parametrize(("a", "b"), [(4.0, 1.0), (1.0, 4.0), (2.0, 3.0)])
def test_beta_shapley_has_the_weights_of_its_definition(row, a, b):
    """Kwon and Zou: a set of s others has weight B(s + b, n - 1 - s + a) / B(a, b); so q ~ Beta(b, a)."""

    def log_beta(x, y):
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    game, queries = make(7, 5)
    truth = oracles.enumerate_semivalue(
        game.features,
        game.responses,
        game.ridge,
        lambda size: math.exp(log_beta(size + b, 6 - size + a) - log_beta(a, b)),
    )
    assert_near(row, row.run(game, queries, beta_shapley(a, b)), np.einsum("mp,ncp->mnc", queries, truth))


@every_semivalue
@pytest.mark.parametrize("semivalue", SEMIVALUES, ids=lambda semivalue: semivalue.name)
def test_every_semivalue_has_the_weights_of_its_measure(row, semivalue):
    """A set of s others has weight E[q^s (1-q)^(n-1-s)], here by a fine Gauss rule over the density."""
    nodes, steps = np.polynomial.legendre.leggauss(60)
    q = (nodes + 1) / 2
    measure = list(zip(q, steps / 2 * semivalue.density(q), strict=True)) if semivalue.beta else semivalue.points
    game, queries = make(7, 5)
    truth = oracles.enumerate_semivalue(
        game.features,
        game.responses,
        game.ridge,
        lambda size: sum(weight * oracles.bernoulli_weight(7, q)(size) for q, weight in measure),
    )
    expected = np.einsum("mp,ncp->mnc", queries, truth)
    found = row.run(game, queries, semivalue)
    if semivalue == LEAVE_ONE_OUT:  # every draw is the same, so errors are of rounding
        np.testing.assert_allclose(found.values, expected, rtol=1e-8, atol=1e-11)
    else:
        assert_near(row, found, expected)


@every_semivalue
def test_beta_arguments_swap(row):
    """Beta(4,1)-Shapley has q ~ Beta(1,4): it asks about small sets, where the plain reading would ask about large."""
    game, queries = make(7, 5)
    swapped = row.run(game, queries, Semivalue("swapped", beta=(1.0, 4.0)))
    found = row.run(game, queries, beta_shapley(4.0, 1.0))
    np.testing.assert_array_equal(found.values, swapped.values)
    assert oracles.relative_error(row.run(game, queries, beta_shapley(1.0, 4.0)).values, found.values) > 0.2
    small, large = (game.marginals(np.full(7, full))[:, 0] @ queries.T for full in (False, True))
    value = found.values[..., 0].T
    assert oracles.relative_error(value, small) < oracles.relative_error(value, large)


@pytest.mark.parametrize(("eps", "constant"), THRESHOLD_CONSTANTS.items())
def test_threshold_game_has_the_ame_constants(eps, constant):
    """In the population, from rows, and as the mean over q of the chance that a player decides, 2 q (1 - q)."""
    p, chances = logit_nodes(eps)
    density = chances / (chances @ (p * (1 - p))) * p * (1 - p)  # logit p uniform -> p uniform
    assert density @ (2 * p * (1 - p)) == pytest.approx(constant, abs=5e-6)
    design = Design("shapley", truncation=eps)
    np.testing.assert_allclose(population_effects(design, p, chances, 3, majority), constant, atol=5e-6)
    found = AmeRegression("unpenalized").init(draw_rows(design, 0, 3, 2000, majority)).values
    np.testing.assert_allclose(found, constant, atol=0.05)


@pytest.mark.parametrize("path", ["cholesky", "rows"])
def test_antithetic_pairs_are_unbiased_and_vary_less(path):
    """Judged by the spread between 100 short runs."""
    game, queries = make(6, 4)
    truth = exact(game, queries)
    spread = {}
    for antithetic in (True, False):
        means = np.stack(
            [
                Permutation(num_permutations=8, seed=seed, path=path, antithetic=antithetic).measure(game, queries).mean
                for seed in range(100)
            ]
        )
        scores = (means.mean(axis=0) - truth) / (means.std(axis=0, ddof=1) / math.sqrt(len(means)))
        assert np.abs(scores).max() < WORST
        spread[antithetic] = float(np.mean((means - truth) ** 2))
    assert spread[True] < spread[False]


@pytest.mark.parametrize("semivalue", SEMIVALUES, ids=lambda semivalue: semivalue.name)
def test_certificates_cover_the_true_bias(semivalue):
    """Of the cavity form, which is far off. The one-sided 95 % limits hold in 85 to 98 % of runs with six queries."""
    game, queries = make(8, 3)
    result = MeanField(semivalue, form="cavity").init(game)
    values, truth = (
        np.einsum("mp,ncp->mnc", queries, found.representers) for found in (result, Enumeration(semivalue).init(game))
    )
    bias = np.linalg.norm(values - truth) / np.linalg.norm(values)
    found = [certify(game, result, queries, Subset(semivalue, num_draws=32, seed=seed)) for seed in range(24)]
    if semivalue == LEAVE_ONE_OUT:  # every draw is the same, and the mean field exact
        assert max(bias, *(certificate.upper for certificate in found)) < 1e-6
        return
    assert np.mean([certificate.upper >= bias for certificate in found]) >= 0.75
    assert np.mean([certificate.lower <= bias for certificate in found]) >= 0.95
    assert 0 < bias < 0.5


@pytest.fixture(scope="module")
def runs():
    """Short runs of every sampled estimator on one game: {name: (moments, truth)}."""
    game, queries = make(6, 4)
    truth = np.einsum("mp,ncp->mnc", queries[:3], Enumeration().init(game).representers)
    return {
        row.name: ([row.sample(game, queries[:3], seed, 20) for seed in range(NUM_RUNS)], truth)
        for row in SAMPLED_ESTIMATORS
    }


@every_sampled
def test_mean_is_unbiased(row, runs):
    """By the spread between runs, not by the error they claim."""
    moments, truth = runs[row.name]
    means = np.stack([run.mean for run in moments])
    scores = (means.mean(axis=0) - truth) / (means.std(axis=0, ddof=1) / math.sqrt(NUM_RUNS))
    assert np.abs(scores).max() < WORST


@every_sampled
def test_standard_error_is_the_spread_of_means_or_more(row, runs):
    moments, truth = runs[row.name]
    spread = np.mean([(run.mean - truth) ** 2 for run in moments])
    claimed = np.mean([run.standard_error**2 for run in moments])
    assert 0.8 * spread <= claimed <= 4 * spread


@every_sampled
def test_intervals_cover(row, runs):
    moments, truth = runs[row.name]
    covered = [np.abs(run.mean - truth) <= run.half_width(0.95) for run in moments]
    assert np.mean(covered) >= 0.95
    wrong = [(run.signs() != 0) & (run.signs() != np.sign(truth)) for run in moments]
    assert np.mean(wrong) <= 0.05
