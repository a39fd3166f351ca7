"""The measured bias of a mean field: its values against a few unbiased draws, with the sampling noise taken out.

Let D_a = (mean of block a of draws) - (mean-field values), over sampled queries and all players. E[D_a] = -bias, and
blocks are independent, so products of *different* blocks are free of noise:

    |bias|^2 = E <D_a, D_b>,  a != b       while <D_a, D_a> holds the noise as well

Their mean over pairs is an unbiased estimate; it is given relative to the square of the mean field's values. A
jackknife over blocks gives its standard error, on the safe side where noise prevails. Draws see less than their own
noise, since the noise of many players and queries averages out.

A bias near zero cannot be proven zero: `upper` is what is excluded, `bias` what is seen.
Source: docs/methods.md section 3; U-statistics and their jackknife are classical (Arvesen 1969).
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from llmattrib.errors import MethodError
from llmattrib.estimators.mean_field import MeanFieldResult
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.streamed import StreamedResult
from llmattrib.estimators.streamed_node import add_gram, mirror
from llmattrib.estimators.subset import Draw, Subset
from llmattrib.games.kernel import FeatureRows, KernelGame
from llmattrib.memory import require_memory
from llmattrib.rng import stream

MIN_DRAWS = 8
_TOGETHER = 8  # Gram matrices of a streamed certificate that are summed in one pass
_BLOCKS = 16  # more of them make the standard error more reliable, fewer leave more strata of q to a block


@dataclass(frozen=True)
class MeasuredBias:
    """The numbers of a `Certificate`, all relative to the size of the values.

    Attributes:
        bias: what is seen; 0 where the noise exceeds it.
        standard_error: how far one standard error of |bias|^2 moves `bias`, up or down, whichever is more.
        lower: one-sided 95 % limit from below.
        upper: the same from above.
        noise: standard error of the draws' own mean.
        num_draws: subsets solved.
        num_queries: query features compared on.
    """

    bias: float
    standard_error: float
    lower: float
    upper: float
    noise: float
    num_draws: int
    num_queries: int

    def __str__(self) -> str:
        return f"bias {self.bias:.1%} +- {self.standard_error:.1%} (at most {self.upper:.1%}, {self.num_draws} draws)"


@dataclass(frozen=True)
class Certificate:
    """How far a mean field is from the truth, as far as draws can tell.

    Attributes:
        products: [k, k] <D_a, D_b> of the k blocks.
        square: |values|^2 of the mean field.
        num_draws: subsets solved.
        num_queries: query features they were compared on.
    """

    products: Float[np.ndarray, "k k"]
    square: float
    num_draws: int
    num_queries: int

    def merge(self, other: "Certificate") -> "Certificate":
        """Return the certificate of two games together (other responses or features), from the same number of draws."""
        assert (self.num_draws, self.num_queries) == (other.num_draws, other.num_queries)
        return Certificate(self.products + other.products, self.square + other.square, self.num_draws, self.num_queries)

    @property
    def bias(self) -> float:
        """Root of |bias|^2, relative to the values; 0 where the noise exceeds what is seen."""
        return self._relative(self._between())

    @property
    def standard_error(self) -> float:
        """How far one standard error of |bias|^2 moves `bias`, up or down, whichever is more."""
        return max(abs(self._at(1.0) - self.bias), abs(self._at(-1.0) - self.bias))

    @property
    def lower(self) -> float:
        """One-sided 95 % limit from below."""
        return self._at(-float(stdtrit(len(self.products) - 1, 0.95)))

    @property
    def upper(self) -> float:
        """One-sided 95 % limit from above."""
        return self._at(float(stdtrit(len(self.products) - 1, 0.95)))

    def _at(self, num_errors: float) -> float:
        """Return the bias some standard errors of its square away."""
        return self._relative(max(self._between(), 0.0) + num_errors * self._spread())

    @property
    def noise(self) -> float:
        """Standard error of the draws' own mean, relative: a plain difference would show the bias plus this."""
        of_a_block = float(np.trace(self.products)) / len(self.products) - self._between()
        return self._relative(of_a_block / len(self.products))

    def summary(self) -> "MeasuredBias":
        """Return what is stored and printed."""
        return MeasuredBias(
            self.bias, self.standard_error, self.lower, self.upper, self.noise, self.num_draws, self.num_queries
        )

    def _relative(self, square: float) -> float:
        return float(np.sqrt(max(square, 0.0) / self.square)) if self.square else 0.0

    def _between(self, without: int | None = None) -> float:
        """Mean product of different blocks."""
        kept = np.delete(np.delete(self.products, without, 0), without, 1) if without is not None else self.products
        count = len(kept)
        return float((kept.sum() - np.trace(kept)) / (count * (count - 1)))

    def _spread(self) -> float:
        """Jackknife standard error of `_between`."""
        count = len(self.products)
        leaves = np.array([self._between(block) for block in range(count)])
        return float(np.sqrt((count - 1) * np.var(leaves)))


def certify(
    game: KernelGame, result: MeanFieldResult, queries: Float[np.ndarray, "m p"], estimator: Subset
) -> Certificate:
    """Measure the bias of a mean field.

    Args:
        game: the game it is of.
        result: the mean field.
        queries: phi of the queries to compare on; see `sample_queries`.
        estimator: the draws, at least 8; its semivalue must be the mean field's. They are put into 16 or more equal
            blocks (below 16 draws, of one each), stratified within; draws that fill no block are left out.

    Raises:
        MethodError: too few draws, another semivalue, or it does not fit the memory.
    """
    estimator, num_strata, num_blocks = _in_blocks(estimator, result.semivalue)
    shape = (len(queries), *game.responses.shape)
    size = 8 * ((num_blocks + 8) * int(np.prod(shape)) + 3 * game.space.coordinates.size)
    require_memory(size, "a certificate", "set reduce.certificate_draws to 0", estimator.max_bytes)
    values = np.einsum("mp,ncp->mnc", queries, result.representers, optimize=True).astype(np.float64)
    samples = estimator.samples(game, queries)
    gaps = np.empty((num_blocks, values.size))
    for gap in gaps:
        gap[:] = (Moments.of(itertools.islice(samples, num_strata), shape).mean - values).ravel()
    return Certificate(gaps @ gaps.T, float(np.sum(values**2)), estimator.num_draws, len(queries))


def _in_blocks(estimator: Subset, semivalue: str) -> tuple[Subset, int, int]:
    """Return the draws that fill equal blocks, the draws of a block and the number of blocks."""
    if estimator.num_draws < MIN_DRAWS:
        raise MethodError(
            f"a certificate of {estimator.num_draws} draws", expected=f"at least {MIN_DRAWS}", fix="take 16 to 64"
        )
    if estimator.semivalue.name != semivalue:
        raise MethodError(
            f"draws for {estimator.semivalue.name} cannot check a mean field of {semivalue}",
            expected="the same semivalue",
        )
    num_strata = max(1, estimator.num_draws // _BLOCKS)
    num_blocks = estimator.num_draws // num_strata
    return replace(estimator, num_draws=num_blocks * num_strata, num_strata=num_strata), num_strata, num_blocks


def certify_streamed(
    features: FeatureRows,
    ridge: float,
    result: StreamedResult,
    queries: Float[np.ndarray, "m p"],
    estimator: Subset,
) -> Certificate:
    """Compare a streamed mean field with draws, in a few passes over the features; called by all processes.

    Args:
        features: the rows of the game.
        ridge: lam, absolute.
        result: the mean field.
        queries: phi of the queries.
        estimator: the draws, as for `certify`.

    Raises:
        MethodError: too few draws, another semivalue, or it does not fit the memory.
    """
    estimator, num_strata, num_blocks = _in_blocks(estimator, result.semivalue)
    p, n, draws = features.dim, features.num_rows, list(estimator.draws(features.num_rows))
    size = p * p * (np.dtype(result.precision).itemsize * len(draws) + 24 * _TOGETHER) + n * len(draws)
    require_memory(size, "a certificate", "set reduce.certificate_draws to 0", estimator.max_bytes)
    solved: list[Solved] = []
    for first in range(0, len(draws), _TOGETHER):
        some = draws[first : first + _TOGETHER]

        def solve(sums: list[np.ndarray], start: int, rows: np.ndarray, some: list[Draw] = some) -> None:
            wide, responses = rows.astype(np.float64), result.responses[start : start + len(rows)]
            for draw, gram, moment in zip(some, sums[0], sums[1], strict=True):
                members = draw.members[start : start + len(rows)]
                add_gram(gram, wide[members])
                moment += wide[members].T @ responses[members]

        found = zip(*features.sums(solve, (len(some), p, p), (len(some), p)), strict=True)
        solved += [Solved.of(mirror(gram), moment, ridge, result.precision) for gram, moment in found]

    def compare(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
        values, wide = result.products(start, rows, queries), rows.astype(result.precision)
        responses, gaps = result.responses[start : start + len(rows)], np.zeros((num_blocks, values.size))
        for number, (draw, subset) in enumerate(zip(draws, solved, strict=True)):
            found = subset.marginals(wide, responses, draw.members[start : start + len(rows)], queries)
            gaps[number // num_strata] += draw.weight / num_strata * found.ravel()
        gaps -= values.ravel()
        sums[0] += gaps @ gaps.T
        sums[1] += np.sum(values**2)

    products, square = features.sums(compare, (num_blocks, num_blocks), (1,))
    return Certificate(products, float(square[0]), estimator.num_draws, len(queries))


@dataclass(frozen=True)
class Solved:
    """The ridge regression on one subset.

    Attributes:
        inverse: [p, p] L^-1 of lam I + Phi_S^T Phi_S = L L^T.
        weights: [p] L^-1 Phi_S^T y_S.
    """

    inverse: Float[np.ndarray, "p p"]
    weights: Float[np.ndarray, " p"]

    @classmethod
    def of(
        cls, gram: Float[np.ndarray, "p p"], moment: Float[np.ndarray, " p"], ridge: float, precision: str
    ) -> "Solved":
        """Factorise in float64, and keep the result in `precision`."""
        gram[np.diag_indices(len(gram))] += ridge
        inverse = scipy.linalg.solve_triangular(np.linalg.cholesky(gram), np.eye(len(gram)), lower=True)
        return cls(inverse.astype(precision), (inverse @ moment).astype(precision))

    def marginals(
        self,
        rows: Float[np.ndarray, "m p"],
        responses: Float[np.ndarray, " m"],
        members: Bool[np.ndarray, " m"],
        queries: Float[np.ndarray, "q p"],
    ) -> Float[np.ndarray, "q m"]:
        """Return v(S + i) - v(S - i) of some players for queries; see `KernelGame.marginals`."""
        white = rows @ self.inverse.T.astype(rows.dtype)
        leverage = np.einsum("mp,mp->m", white, white).astype(np.float64)
        factor = (responses - white @ self.weights.astype(rows.dtype)) / np.where(members, 1 - leverage, 1 + leverage)
        return np.asarray(((queries @ self.inverse.T).astype(rows.dtype) @ white.T) * factor)


def sample_queries(features: FeatureRows, num_queries: int, seed: int) -> Float[np.ndarray, "m p"]:
    """Return training rows, and as many random combinations of all of them, scaled to the rows' mean square norm.

    Args:
        features: the rows; called by all processes that share them.
        num_queries: how many, half of them combinations.
        seed: of the choice.
    """
    rng, n = stream(seed, "certificate", "queries"), features.num_rows
    chosen = np.sort(rng.choice(n, min(num_queries // 2, n), replace=False))
    mixing = rng.standard_normal((num_queries - len(chosen), n))

    def visit(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
        here = (chosen >= start) & (chosen < start + len(rows))
        sums[0][here] += rows[chosen[here] - start]
        sums[1] += mixing[:, start : start + len(rows)] @ rows

    rows, mixed = features.sums(visit, (len(chosen), features.dim), (len(mixing), features.dim))
    lengths = np.linalg.norm(mixed, axis=1, keepdims=True)
    typical = np.sqrt(np.mean(np.sum(rows.astype(np.float64) ** 2, axis=1)))
    return np.concatenate([rows, mixed * (typical / np.where(lengths > 0, lengths, 1))])
