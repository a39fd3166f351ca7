import numpy as np
import pytest

from llmattrib.estimators.moments import SIGNS, Moments


def draw(count, shape=(3, 2), seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)) * 2 + 1e3)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_moments_equal_two_passes(count):
    samples = draw(count)
    found = Moments.of(iter(samples), (3, 2))
    assert found.count == count
    np.testing.assert_allclose(found.mean, np.mean(samples, axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.m2, np.var(samples, axis=0) * count, atol=1e-9)
    np.testing.assert_array_equal(found.low, np.min(samples, axis=0))
    np.testing.assert_array_equal(found.high, np.max(samples, axis=0))
    if count > 1:
        expected = np.std(samples, axis=0, ddof=1) / np.sqrt(count)
        np.testing.assert_allclose(found.standard_error, expected, rtol=1e-9)


@pytest.mark.parametrize("cuts", [(0,), (1,), (5, 6), (0, 9, 9)])
def test_merged_parts_equal_the_whole(cuts):
    samples = draw(12)
    whole = Moments.of(samples, (3, 2))
    merged = Moments.empty((3, 2))
    for start, stop in zip((0, *cuts), (*cuts, 12), strict=True):
        merged = merged.merge(Moments.of(samples[start:stop], (3, 2)))
    assert merged.count == 12
    for name in ("mean", "m2", "low", "high"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_nothing_is_known_below_two_samples_and_no_interval_below_sixteen():
    none, one = Moments.empty((2,)), Moments.of(draw(1, (2,)), (2,))
    for moments in (none, none.merge(none), one, Moments.of(draw(15, (2,)), (2,))):
        assert np.isinf(moments.standard_error).all() == (moments.count < 2)
        assert np.isinf(moments.half_width()).all()
        assert not moments.signs().any()


def test_equal_samples_have_certain_signs():
    moments = Moments.of([np.array([2.0, -1.0, 0.0])] * 16, (3,))
    assert [SIGNS[sign] for sign in moments.signs().tolist()] == ["helpful", "harmful", "undetermined"]


def test_half_width_is_the_empirical_bernstein_formula():
    samples = draw(50, (1,))
    moments = Moments.of(samples, (1,))
    length = np.log(3 / (0.1 / (50 * 51)))
    expected = np.sqrt(2 * np.var(samples, ddof=1) * length / 50) + 3 * np.ptp(samples) * length / 50
    assert moments.half_width(0.9)[0] == pytest.approx(expected)


def test_interval_holds_at_all_counts_at_once():
    """All 700 looks at a growing sample of a skewed variable with mean 1."""
    draws = np.random.default_rng(1).exponential(size=(700, 400))
    moments, covered = Moments.empty((400,)), np.ones(400, bool)
    for sample in draws:
        moments = moments.merge(Moments.of([sample], (400,)))
        covered &= np.abs(moments.mean - 1) <= moments.half_width()
    assert covered.mean() >= 0.95
    assert (moments.signs() == 1).mean() > 0.5, "it does decide"
