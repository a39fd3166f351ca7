import itertools
import math

import numpy as np
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators.knn import knn_shapley, soft_knn_shapley
from llmattrib.index import nearest_rows
from llmattrib.rng import stream


def problem(n, seed, num_queries=3, num_classes=3):
    draws = stream(seed, "test knn", n)
    features, queries = draws.standard_normal((n, 4)), draws.standard_normal((num_queries, 4))
    labels, wanted = draws.integers(num_classes, size=n), draws.integers(num_classes, size=num_queries)
    return features, queries, labels[None] == wanted[:, None]


def enumerate_shapley(n, utility):
    """From the definition: every player joining every subset."""
    values = np.zeros(n)
    for player in range(n):
        others = [other for other in range(n) if other != player]
        for size in range(n):
            for chosen in itertools.combinations(others, size):
                gain = utility({*chosen, player}) - utility(set(chosen))
                values[player] += gain / (n * math.comb(n - 1, size))
    return values


def hard(order, matches, k):
    return lambda members: sum(matches[player] for player in [i for i in order if i in members][:k]) / k


def soft(order, matches, k, num_classes):
    def utility(members):
        nearest = [i for i in order if i in members][:k]
        return sum(matches[i] for i in nearest) / len(nearest) if nearest else 1 / num_classes

    return utility


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (2, 1), (2, 2), (5, 1), (7, 3), (7, 6), (7, 7), (6, 9), (10, 4)])
def test_values_equal_enumeration(n, k):
    features, queries, matches = problem(n, k)
    order = nearest_rows(features, queries)
    found, found_soft = knn_shapley(order, matches, k), soft_knn_shapley(order, matches, k, 3)
    for row in range(1 if n == 10 else len(queries)):
        expected = enumerate_shapley(n, hard(order[row], matches[row], k))
        np.testing.assert_allclose(found[row], expected, atol=1e-12)
        expected = enumerate_shapley(n, soft(order[row], matches[row], k, 3))
        np.testing.assert_allclose(found_soft[row], expected, atol=1e-12)


def test_values_sum_to_the_utility_of_all():
    features, queries, matches = problem(300, 0, num_queries=5)
    order = nearest_rows(features, queries)
    everyone = set(range(300))
    for row in range(5):
        total = hard(order[row], matches[row], 11)(everyone)
        assert knn_shapley(order, matches, 11)[row].sum() == pytest.approx(total, abs=1e-12)
        total = soft(order[row], matches[row], 11, 3)(everyone) - 1 / 3
        assert soft_knn_shapley(order, matches, 11, 3)[row].sum() == pytest.approx(total, abs=1e-12)


def test_neighbours_are_sorted_and_equal_ones_by_number():
    features, queries, _ = problem(40, 1)
    features[30] = features[7]
    found = nearest_rows(features, queries)
    for row, query in enumerate(queries):
        near = [x @ query for x in features]
        assert found[row].tolist() == sorted(range(40), key=lambda i: (-round(near[i], 9), i))


@pytest.mark.parametrize("given", [5, 20, 100])
def test_first_neighbours_are_within_their_bound(given):
    features, queries, matches = problem(400, 3, num_queries=20)
    order = nearest_rows(features, queries)
    exact, found = knn_shapley(order, matches, 5), knn_shapley(order[:, :given], matches, 5)
    assert 0 < np.abs(found - exact).max() <= 1 / given


def test_what_cannot_be_used_is_named():
    features, queries, matches = problem(6, 4)
    order = nearest_rows(features, queries)
    with pytest.raises(MethodError, match="2 neighbours are given for k = 3"):
        knn_shapley(order[:, :2], matches, 3)
    for bad in (np.zeros_like(order), order - 1, order + 1):
        with pytest.raises(MethodError, match="repeat or are missing"):
            knn_shapley(bad, matches, 3)
        with pytest.raises(MethodError, match="repeat or are missing"):
            soft_knn_shapley(bad, matches, 3, 2)
    with pytest.raises(MethodError, match="k is 0"):
        knn_shapley(order, matches, 0)
