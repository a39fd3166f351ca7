"""Exact Shapley values of the k-nearest-neighbour classifier, from sorted neighbours: no model, no ridge, no sampling.

For a query with known label and training examples sorted by nearness, m_i = 1 where the i-th nearest (i = 1 ... n) has
the query's label, the utility of a subset S depends on its own k nearest to the query:

- hard label (Jia et al.):      v(S) = (1/k) * matches among the min(k, |S|) nearest of S,    v(empty) = 0
- soft label (Wang and Jia):    v(S) = share of matches among them,                           v(empty) = 1/C

Values follow by one pass from the farthest to the nearest, O(n) a query after sorting. Neighbours come in as an array.
The soft-label pass needs all n of them.

It looks at features only to order examples: values of examples far from the query are all but equal.
Examples at the same distance are ordered by number; their values then differ though the examples do not.
Sources: Jia et al. 2019 (arXiv 1908.08619), theorems 1 and 2; Wang and Jia 2023 (arXiv 2304.04258).
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from llmattrib.errors import MethodError


def knn_shapley(order: Int[np.ndarray, "q m"], matches: Bool[np.ndarray, "q n"], k: int) -> Float[np.ndarray, "q n"]:
    """Return hard-label values of all examples for each query.

    With m < n neighbours, those not given get 0 and the others are off by at most 1/m each, if m >= k (theorem 2).

    Args:
        order: example numbers, nearest first.
        matches: whether example j (by number) has the query's label.
        k: neighbours of the classifier.

    Returns:
        Values by example number; with all neighbours given they sum to the classifier's utility, min(k, n) votes at
        most, over k.

    Raises:
        MethodError: `order` is not made of different examples, k is not positive, or fewer than min(k, n) neighbours
            are given.
    """
    n, given = matches.shape[1], order.shape[1]
    _check(order, n, k)
    if given < min(k, n):
        raise MethodError(
            f"{given} neighbours are given for k = {k}",
            expected=f"at least {min(k, n)}; values are off by up to one over their number",
            fix="search for more neighbours",
        )
    hits = np.take_along_axis(matches, order, axis=1).astype(np.float64)
    place = np.arange(1, given)
    steps = (hits[:, :-1] - hits[:, 1:]) / k * (np.minimum(k, place) / place)
    last = hits[:, -1:] * min(k, n) / (n * k) if given == n else np.zeros((len(hits), 1))
    return _scatter(order, _sum_from_last(steps, last), n)


def soft_knn_shapley(
    order: Int[np.ndarray, "q n"], matches: Bool[np.ndarray, "q n"], k: int, num_classes: int
) -> Float[np.ndarray, "q n"]:
    """Return soft-label values of all examples for each query.

    Args:
        order: all example numbers, nearest first.
        matches: whether example j (by number) has the query's label.
        k: neighbours of the classifier.
        num_classes: C; the classifier without examples guesses.

    Returns:
        Values by example number; they sum to the share of matches among the k nearest, minus 1/C.

    Raises:
        MethodError: `order` is not made of different examples, or k is not positive.
    """
    n = matches.shape[1]
    _check(order, n, k)
    hits = np.take_along_axis(matches, order, axis=1).astype(np.float64)
    others = hits[:, :-1].mean(axis=1, keepdims=True) if n > 1 else hits
    grown = np.sum(1 / np.arange(2, min(k, n) + 1))  # subsets of 1 ... k - 1 others take the farthest one in
    last = (hits[:, -1:] - 1 / num_classes + (hits[:, -1:] - others) * grown) / n
    place, reach = np.arange(1, n), min(k, n - 1)
    small = np.sum(1 / np.arange(1, reach + 1))  # both of two neighbours in line are among the k nearest
    large = ((n - 1) * np.minimum(k, place) / place - reach) / k
    steps = (hits[:, :-1] - hits[:, 1:]) / max(n - 1, 1) * (small + large)
    return _scatter(order, _sum_from_last(steps, last), n)


def _check(order: Int[np.ndarray, "q m"], num_players: int, k: int) -> None:
    if k < 1:
        raise MethodError(f"k is {k}", expected="at least 1 neighbour")
    ascending = np.sort(order, axis=1)
    if (ascending[:, 1:] == ascending[:, :-1]).any() or order.min() < 0 or order.max() >= num_players:
        raise MethodError(
            "neighbours repeat or are missing",
            expected=f"different example numbers below {num_players} in every row",
            fix="use an exact index, or fewer neighbours of an approximate one",
        )


def _sum_from_last(steps: Float[np.ndarray, "q k"], last: Float[np.ndarray, "q 1"]) -> Float[np.ndarray, "q m"]:
    """Return s with s_m = last and s_i = s_{i+1} + steps_i."""
    return np.cumsum(np.concatenate([steps, last], axis=1)[:, ::-1], axis=1)[:, ::-1]


def _scatter(
    order: Int[np.ndarray, "q m"], values: Float[np.ndarray, "q m"], num_players: int
) -> Float[np.ndarray, "q n"]:
    out = np.zeros((len(order), num_players))
    np.put_along_axis(out, order, values, axis=1)
    return out
