"""What a sampled value comes with: mean, standard error, interval and the certainty of its sign.

Samples arrive one at a time or in parts, on any number of workers; count, mean, sum of squared deviations (M2) and
range are kept in float64 and merged exactly (Chan). The interval is the empirical-Bernstein one,

    mean +- ( sqrt(2 V l / M) + 3 R l / M ),   l = ln(3 / delta_M),   delta_M = delta / (M (M + 1))

V the variance and R the range of the M samples so far. Because the delta_M sum to delta it holds at all M together, so
sampling may stop when signs are certain ("anytime"). R is the *observed* range: marginal contributions have no useful
bound known beforehand, so the guarantee is nominal. The range of a few samples says little (two samples miss 5 % by
themselves), so below 16 the interval is infinite; tests then hold its coverage above 95 % at all M together.

There is no R-hat: samples are independent and it would say nothing. Stratified samples have a true error below the one
given here, never above.
Sources: Chan, Golub and LeVeque 1983; Audibert, Munos and Szepesvari 2009; Mnih, Szepesvari and Audibert 2008.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int8

Sign = Literal["helpful", "harmful", "undetermined"]
SIGNS: dict[int, Sign] = {1: "helpful", -1: "harmful", 0: "undetermined"}
"""What the codes of `Moments.signs` mean."""
_PIECE = 8192  # numbers accumulated at a time: six arrays of them stay in the second-level cache
MIN_COUNT = 16
"""Samples below which there is no interval."""


@dataclass(frozen=True)
class Moments:
    """Statistics of samples of one shape, entry by entry.

    Attributes:
        count: M, samples seen.
        mean: their mean.
        m2: sum of squared deviations from it.
        low: the smallest sample.
        high: the largest.
    """

    count: int
    mean: Float[np.ndarray, "..."]
    m2: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Moments":
        """Return the moments of no samples."""
        return cls(0, np.zeros(shape), np.zeros(shape), np.full(shape, np.inf), np.full(shape, -np.inf))

    @classmethod
    def of(
        cls, samples: Iterable[Float[np.ndarray, "..."]], shape: tuple[int, ...], start: "Moments | None" = None
    ) -> "Moments":
        """Accumulate samples of a shape, one after the other, in place (Welford).

        Args:
            samples: arrays of the shape.
            shape: of a sample.
            start: moments of the samples before; the result has the bytes of all of them accumulated at once.
        """
        start = start or cls.empty(shape)
        count, parts = start.count, [part.copy() for part in start.parts]
        pieces = [slice(first, first + _PIECE) for first in range(0, start.mean.size, _PIECE)]
        before, after = np.empty((2, _PIECE))
        for sample in samples:
            assert sample.shape == shape
            count += 1
            flat, accumulated = sample.reshape(-1), [part.reshape(-1) for part in parts]
            for piece in pieces:
                new, (mean, m2, low, high) = flat[piece], (part[piece] for part in accumulated)
                shift, rest = before[: len(new)], after[: len(new)]
                np.subtract(new, mean, out=shift)
                mean += np.divide(shift, count, out=rest)
                shift *= np.subtract(new, mean, out=rest)
                m2 += shift
                np.minimum(low, new, out=low)
                np.maximum(high, new, out=high)
        return cls(count, *parts)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of samples."""
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.m2 + other.m2 + shift**2 * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    @property
    def parts(self) -> tuple[Float[np.ndarray, "..."], ...]:
        """Mean, M2, low and high."""
        return self.mean, self.m2, self.low, self.high

    def at(self, index: Any) -> "Moments":
        """Return the moments of some entries."""
        return Moments(self.count, *(part[index] for part in self.parts))

    @property
    def variance(self) -> Float[np.ndarray, "..."]:
        """Unbiased variance of a sample; infinite below two samples."""
        if self.count < 2:
            return np.full(self.mean.shape, np.inf)
        return np.asarray(self.m2 / (self.count - 1))

    @property
    def standard_error(self) -> Float[np.ndarray, "..."]:
        """Standard error of the mean."""
        return np.asarray(np.sqrt(self.variance / max(self.count, 1)))

    def half_width(self, confidence: float = 0.95) -> Float[np.ndarray, "..."]:
        """Return how far the interval reaches on each side of the mean; infinite below 16 samples."""
        if self.count < MIN_COUNT:
            return np.full(self.mean.shape, np.inf)
        length = np.log(3 * self.count * (self.count + 1) / (1 - confidence))
        spread = np.sqrt(2 * self.variance * length / self.count)
        return np.asarray(spread + 3 * (self.high - self.low) * length / self.count)

    def signs(self, confidence: float = 0.95) -> Int8[np.ndarray, "..."]:
        """Return 1 where the interval is above zero (helpful), -1 below (harmful), 0 where undetermined."""
        certain = np.abs(self.mean) > self.half_width(confidence)
        return np.where(certain, np.sign(self.mean), 0).astype(np.int8)
