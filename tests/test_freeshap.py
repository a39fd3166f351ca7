"""FreeShap against a restatement that refits every prefix, and against the axioms."""

import itertools
import math

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators import freeshap
from llmattrib.estimators.freeshap import FreeShap, KernelProblem
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.permutation import UtilityResult
from llmattrib.rng import stream


def problem(n, m=6, num_classes=3, kernels="single", seed=0, p=40, scale=60.0):
    """Features of every class's logit around the mean of the example's class."""
    draws = stream(seed, "test freeshap", n)
    labels, asked = draws.integers(num_classes, size=n), draws.integers(num_classes, size=m)
    means = draws.standard_normal((num_classes, 1, p))
    features, queries = (
        scale * (means[rows] + 0.8 * draws.standard_normal((len(rows), num_classes, p))) for rows in (labels, asked)
    )
    return KernelProblem.of_features(features, queries, labels, asked, kernels)


def sampled(of, **settings):
    found = FreeShap(**settings).sample(of)
    return UtilityResult.of(Moments.of(found.samples, found.shape), found)


def utilities(of, members, ridge=1e-6, scale=1e4):
    """(cross-entropy, accuracy) of each query from its definition: [2, m]."""
    m, num_classes = len(of.query_labels), of.num_classes
    if not members:
        return np.array([[-math.log(num_classes)] * m, [1 / num_classes] * m])
    one_hot = np.eye(num_classes)[of.labels[members]]
    outputs = np.empty((m, num_classes))
    for c in range(num_classes):
        index = c if len(of.kernel) > 1 else 0
        kernel = of.kernel[index][np.ix_(members, members)] / scale + ridge * np.eye(len(members))
        outputs[:, c] = of.query_kernel[index][:, members] / scale @ np.linalg.inv(kernel) @ one_hot[:, c]
    log_softmax = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    right = np.argmax(outputs, axis=1) == of.query_labels
    return np.array([log_softmax[np.arange(m), of.query_labels], right])


def refit(of, num_permutations, tolerance, seed=0):
    """Truncated Monte Carlo as published, one solve a prefix: values [2, m, n] and the mean number of prefixes."""
    n = len(of.labels)
    empty, full = utilities(of, []), utilities(of, list(range(n)))
    values, reached = np.zeros((2, len(of.query_labels), n)), []
    for k in range(num_permutations):
        order = stream(seed, "freeshap", k).permutation(n)
        before, run = empty, 0
        for place, player in enumerate(order):
            after = utilities(of, list(order[: place + 1]))
            values[:, :, player] += (after - before) / num_permutations
            before = after
            gap, span = abs(full.mean(axis=1) - after.mean(axis=1)), abs(full.mean(axis=1) - empty.mean(axis=1))
            run = run + 1 if tolerance is not None and all(gap <= tolerance * span) else 0
            if run == 2:
                break
        reached.append(place + 1)
    return values, np.mean(reached)


@pytest.mark.parametrize("kernels", ["single", "per_class"])
@pytest.mark.parametrize("tolerance", [None, 0.05, 0.3])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_values_equal_refitting_every_prefix(kernels, tolerance, block, monkeypatch):
    monkeypatch.setattr(freeshap, "BLOCK", block)
    of = problem(25, kernels=kernels)
    found = sampled(of, num_permutations=4, tolerance=tolerance)
    expected, reached = refit(of, 4, tolerance)
    np.testing.assert_allclose(found.moments.mean, expected.mean(axis=1), atol=1e-7)
    assert found.mean_prefixes == reached
    assert (reached < 25) == (tolerance is not None)


@pytest.mark.parametrize("kernels", ["single", "per_class"])
def test_values_sum_to_the_utility_of_all_without_truncation(kernels):
    of = problem(40, kernels=kernels)
    found = sampled(of, num_permutations=2, tolerance=None)
    np.testing.assert_allclose(found.full, utilities(of, list(range(40))).mean(axis=1), atol=1e-8)
    np.testing.assert_allclose(found.moments.mean.sum(axis=1), found.full - found.empty, atol=1e-8)
    np.testing.assert_allclose(found.empty, [-np.log(3), 1 / 3])


def test_permutations_tend_to_the_shapley_values():
    of = problem(5, m=4)
    worth = {
        members: utilities(of, list(members)).mean(axis=1)
        for size in range(6)
        for members in itertools.combinations(range(5), size)
    }
    truth = np.zeros((2, 5))
    for members, before in worth.items():
        for player in set(range(5)) - set(members):
            gain = worth[tuple(sorted((*members, player)))] - before
            truth[:, player] += gain / (5 * math.comb(4, len(members)))
    found = sampled(of, num_permutations=1500, tolerance=None).moments
    assert (np.abs(found.mean - truth) <= 4 * found.standard_error + 1e-12).all()
    assert oracles.relative_error(found.mean, truth) < 0.1


def test_truncation_moves_the_sum_by_its_tolerance_at_most():
    found = sampled(problem(60), num_permutations=5)
    assert found.mean_prefixes < 60
    missing = np.abs(found.moments.mean.sum(axis=1) - (found.full - found.empty))
    assert (missing <= 0.05 * np.abs(found.full - found.empty) + 1e-12).all()


def test_flipped_labels_get_the_lowest_values():
    of = problem(60, m=40, num_classes=2, seed=1)
    flipped = np.arange(6) * 9
    labels = of.labels.copy()
    labels[flipped] = 1 - labels[flipped]
    wrong = KernelProblem(of.kernel, of.query_kernel, labels, of.query_labels, 2)
    values = sampled(wrong, num_permutations=30, ridge=0.3).moments.mean[0]
    assert set(np.argsort(values)[:6]) == set(flipped)


def test_ranges_of_permutations_merge():
    of = problem(12)
    whole = sampled(of, num_permutations=6)
    parts = [sampled(of, num_permutations=3, first_permutation=first).moments for first in (0, 3)]
    merged = parts[0].merge(parts[1])
    np.testing.assert_allclose(merged.mean, whole.moments.mean, atol=1e-12)
    np.testing.assert_allclose(merged.standard_error, whole.moments.standard_error, atol=1e-12)


def test_single_kernel_is_that_of_class_0():
    draws = stream(0, "test kernels")
    features, queries = draws.standard_normal((5, 3, 7)), draws.standard_normal((2, 3, 7))
    labels = np.arange(5) % 3
    single = KernelProblem.of_features(features, queries, labels, labels[:2])
    every = KernelProblem.of_features(features, queries, labels, labels[:2], "per_class")
    np.testing.assert_allclose(single.kernel, [features[:, 0] @ features[:, 0].T])
    for c in range(3):
        np.testing.assert_allclose(every.kernel[c], features[:, c] @ features[:, c].T)
        np.testing.assert_allclose(every.query_kernel[c], queries[:, c] @ features[:, c].T)


def test_what_cannot_be_used_is_named():
    of = problem(10)
    with pytest.raises(MethodError, match="2 kernels are given for 3 classes"):
        KernelProblem(np.repeat(of.kernel, 2, 0), np.repeat(of.query_kernel, 2, 0), of.labels, of.query_labels, 3)
    with pytest.raises(MethodError, match=r"labels lie in 0 \.\.\. 2"):
        KernelProblem(of.kernel, of.query_kernel, of.labels, of.query_labels, 2)
    with pytest.raises(MethodError, match="not positive definite at ridge 1e-06"):
        sampled(KernelProblem(-of.kernel, of.query_kernel, of.labels, of.query_labels, 3))
    with pytest.raises(MethodError, match="FreeShap of 10 examples and 6 queries needs"):
        FreeShap(max_bytes=1000).sample(of)
