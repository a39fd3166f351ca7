import itertools
import math

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators import permutation as permutation_module
from llmattrib.estimators.enumeration import Enumeration
from llmattrib.estimators.permutation import Permutation, accuracy, log_likelihood
from llmattrib.games.kernel import KernelGame
from llmattrib.rng import stream

SHAPES = [(12, 4), (9, 9), (7, 20)]
PATHS = ["cholesky", "rows"]


def make(n, p, ridge=0.1, c=2, seed=0):
    features, responses = oracles.gradient_like_game(n, p, seed, c=c)
    return KernelGame.relative(features, responses, ridge), oracles.random_game(5, p, 1)[0]


def orders_of(estimator, n):
    pairs = []
    for k in range(estimator.num_permutations // (2 if estimator.antithetic else 1)):
        order = stream(estimator.seed, "permutation", estimator.first_sample + k).permutation(n)
        pairs.append([order, order[::-1]] if estimator.antithetic else [order])
    return pairs


def prefix_gains(game, queries, order, utility=None):
    """Refit after every player: [m, n, c], or [m, n] of a utility."""
    predictions = [
        queries @ oracles.subset_weights(game.features, game.responses, game.ridge, list(order[:k])).T
        for k in range(len(order) + 1)
    ]
    worth = np.stack(predictions) if utility is None else utility(np.stack(predictions))
    gains = np.empty_like(worth[1:])
    gains[order] = np.diff(worth, axis=0)
    return np.moveaxis(gains, 0, 1)


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_values_equal_direct_prefix_solves(n, p, ridge, path):
    game, queries = make(n, p, ridge)
    estimator = Permutation(num_permutations=4, path=path)
    samples = [np.mean([prefix_gains(game, queries, o) for o in pair], axis=0) for pair in orders_of(estimator, n)]
    found = estimator.measure(game, queries)
    assert found.count == 2
    scale = np.abs(samples).max()
    np.testing.assert_allclose(found.mean, np.mean(samples, axis=0), rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(found.variance, np.var(samples, axis=0, ddof=1), rtol=1e-7, atol=1e-9 * scale**2)


@pytest.mark.parametrize(("n", "p"), [(150, 20), (60, 90)])
def test_both_paths_agree_over_many_blocks(n, p):
    game, queries = make(n, p, ridge=1e-3)
    dense, blocks = (Permutation(num_permutations=2, path=path).measure(game, queries) for path in PATHS)
    np.testing.assert_allclose(blocks.mean, dense.mean, rtol=1e-9, atol=1e-9 * np.abs(dense.mean).max())


def test_path_is_the_one_with_fewer_flops():
    for n, p, expected in ((40, 200, "_Cholesky"), (40, 39, "_Cholesky"), (400, 20, "_Rows")):
        game, queries = make(n, p)
        assert type(Permutation()._solver(game, queries)).__name__ == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [accuracy, log_likelihood])
def test_utilities_equal_direct_prefix_solves(kind, path, monkeypatch):
    game, queries = make(12, 4, c=3)
    utility = kind(np.array([0, 1, 2, 0, 1]))
    estimator = Permutation(num_permutations=4, path=path)
    samples = [
        np.mean([prefix_gains(game, queries, o, utility) for o in pair], axis=0) for pair in orders_of(estimator, 12)
    ]
    for streamed in (1 << 22, 70):  # all at once, and a few prefixes at a time
        monkeypatch.setattr(permutation_module, "_STREAMED", streamed)
        result = estimator.measure_utility(game, queries, utility)
        np.testing.assert_allclose(result.moments.mean, np.mean(samples, axis=0), rtol=1e-9, atol=1e-9)
        assert result.mean_prefixes == 12
    np.testing.assert_allclose(result.moments.mean.sum(axis=1), result.full - result.empty, atol=1e-9)


def test_utilities_are_what_they_say():
    predictions = np.array([[[0.0, 0, 0], [0, 0, 0]], [[1, 3, 2], [2, 2, 1]]])
    labels = np.array([1, 0])
    np.testing.assert_allclose(accuracy(labels)(predictions), [[1 / 3, 1 / 3], [1, 1 / 2]])
    odds = [math.exp(3) / sum(math.exp(z) for z in (1, 3, 2)), math.exp(2) / (2 * math.exp(2) + math.exp(1))]
    np.testing.assert_allclose(log_likelihood(labels)(predictions), np.log([[1 / 3, 1 / 3], odds]))


@pytest.mark.parametrize("path", PATHS)
def test_truncation_stops_after_enough_near_prefixes(path, monkeypatch):
    game, queries = make(30, 4, c=2)
    utility = log_likelihood(np.array([0, 1, 1, 0, 1]))
    estimator = Permutation(num_permutations=6, path=path, tolerance=0.2, num_consecutive=3, antithetic=False)
    ends = utility(np.stack([np.zeros((5, 2)), game.value(np.ones(30, bool), queries)])).mean(axis=1)
    samples, lengths = [], []
    for (order,) in orders_of(estimator, 30):
        gains = prefix_gains(game, queries, order, utility)
        worth = ends[0] + np.cumsum(gains[:, order].mean(axis=0))
        near = np.abs(ends[1] - worth) <= 0.2 * abs(ends[1] - ends[0])
        stop = next((k + 1 for k in range(2, 30) if near[k - 2 : k + 1].all()), 30)
        gains[:, order[stop:]] = 0
        samples.append(gains)
        lengths.append(stop)
    assert min(lengths) < 30
    monkeypatch.setattr(permutation_module, "_STREAMED", 40)  # runs go on over the borders of blocks
    result = estimator.measure_utility(game, queries, utility)
    np.testing.assert_allclose(result.moments.mean, np.mean(samples, axis=0), rtol=1e-8, atol=1e-9)
    assert result.mean_prefixes == pytest.approx(np.mean(lengths))


def test_all_permutations_give_the_shapley_value():
    game, queries = make(4, 3)
    everyone = [prefix_gains(game, queries, np.array(order)) for order in itertools.permutations(range(4))]
    truth = np.einsum("mp,ncp->mnc", queries, Enumeration().init(game).representers)
    np.testing.assert_allclose(np.mean(everyone, axis=0), truth, rtol=1e-9, atol=1e-12)


def test_pairs_reduce_the_noise_of_equally_many_permutations():
    game, queries = make(40, 6, ridge=1.0, c=1)
    paired = Permutation(num_permutations=120).measure(game, queries)
    single = Permutation(num_permutations=120, antithetic=False).measure(game, queries)
    assert (paired.count, single.count) == (60, 120)
    assert np.median(paired.standard_error) < 0.9 * np.median(single.standard_error)
    gap = np.abs(paired.mean - single.mean) / np.hypot(paired.standard_error, single.standard_error)
    assert gap.max() < 4.5


def test_ranges_of_samples_merge_to_the_whole():
    game, queries = make(9, 4)
    whole = Permutation(num_permutations=20).measure(game, queries)
    parts = [Permutation(num_permutations=2 * k, first_sample=at).measure(game, queries) for at, k in ((0, 3), (3, 7))]
    merged = parts[0].merge(parts[1])
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_progress_is_reported():
    game, queries = make(9, 4)
    seen = []
    Permutation(num_permutations=4).measure(game, queries, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_odd_numbers_cannot_be_paired():
    with pytest.raises(MethodError, match=r"7 permutations cannot be paired(.|\n)*an even number"):
        Permutation(num_permutations=7)
    assert Permutation(num_permutations=7, antithetic=False).num_permutations == 7


def test_memory_is_checked():
    game, queries = make(9, 4)
    with pytest.raises(
        MethodError, match=r"permutations of 9 examples needs(.|\n)*fewer queries at a time, or path rows"
    ):
        Permutation(max_bytes=100).measure(game, queries)
