"""Shapley values of the kernel game from random permutations, of its outputs or of any utility of them.

Players enter in the order of a permutation; the gain of each is a sample of its value. All prefixes are solved at once:

- `cholesky`, for n small against d = min(n, p): K + lam I = L L^T in the order of the permutation, a = L^-1 k(x),
  b = L^-1 y; the k-th gain is a_k b_k and the k-th prefix predicts sum_{j<=k} a_j b_j. n^3/3 + n^2 (m + c) flops.
- `rows`, for n large: blocks of d/2 players; with A = lam I + Phi^T Phi of the players before, W = A^-1/2 Phi_b^T and
  I + W^T W = M M^T, the gains within the block are products of M^-1 W^T A^-1/2 phi(x) and M^-1 (y_b - Phi_b w).
  About 3.3 n d^2 + 4.5 n d m flops, no n x n matrix; A is formed and factorised anew, so errors do not add up.

`measure` values the outputs themselves, which are linear, for all queries at once. `measure_utility` values a function
of the prediction (accuracy, log-likelihood) by streaming over prefixes; it can stop a permutation where the utility no
longer moves (truncation), which saves time on the `rows` path and biases the values by up to the tolerance.

Permutations come in pairs, one and its reverse, and a pair is one sample (antithetic): unbiased, and noise that is odd
under reversal cancels. Sample k depends on the seed and k only, so workers take ranges of k and merge.
Sources: docs/methods.md section 3; Castro et al. 2009 (permutations); Wang et al. 2024 (FreeShap, truncation).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
from jaxtyping import Bool, Float, Int

from llmattrib.errors import MethodError
from llmattrib.estimators.moments import Moments
from llmattrib.games.kernel import KernelGame
from llmattrib.memory import require_memory
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream

Utility = Callable[[Float[np.ndarray, "k m c"]], Float[np.ndarray, "k u"]]
"""Maps predictions of k subsets for m queries to their worth, for each query (u = m) or for all together (u = 1)."""
_STREAMED = 1 << 22  # predictions held together
_GATHERED = 64  # rows of a kernel matrix put in order at a time


def accuracy(labels: Int[np.ndarray, " m"]) -> Utility:
    """Return the chance of the right class among the largest outputs: 0 or 1, 1/c where all are equal."""

    def utility(predictions: Float[np.ndarray, "k m c"]) -> Float[np.ndarray, "k m"]:
        best = predictions == predictions.max(axis=2, keepdims=True)
        return np.asarray(best[:, np.arange(len(labels)), labels] / best.sum(axis=2))

    return utility


def log_likelihood(labels: Int[np.ndarray, " m"]) -> Utility:
    """Return minus the cross-entropy, in nats, of the softmax of the outputs; -log c where all are equal."""

    def utility(predictions: Float[np.ndarray, "k m c"]) -> Float[np.ndarray, "k m"]:
        chosen = predictions[:, np.arange(len(labels)), labels]
        return np.asarray(chosen - scipy.special.logsumexp(predictions, axis=2))

    return utility


class Steps(NamedTuple):
    """Consecutive players of a permutation; the gain of the k-th is queries[:, k] times responses[k].

    Attributes:
        queries: [m, k].
        responses: [k, c].
    """

    queries: Float[np.ndarray, "m k"]
    responses: Float[np.ndarray, "k c"]


class UtilitySamples(NamedTuple):
    """Values of a utility, sample by sample.

    Attributes:
        samples: [u, n + 1] each: values, and in the last column how many players entered before truncation.
        empty: [u] utility of no players.
        full: [u] utility of all.
        shape: of a sample.
    """

    samples: Iterator[Float[np.ndarray, "u n1"]]
    empty: Float[np.ndarray, " u"]
    full: Float[np.ndarray, " u"]
    shape: tuple[int, int]


@dataclass(frozen=True)
class UtilityResult:
    """Values of a utility.

    Attributes:
        moments: of shape [u, n].
        empty: [u] utility of no players.
        full: [u] utility of all.
        mean_prefixes: players that entered before truncation, mean over permutations.
    """

    moments: Moments
    empty: Float[np.ndarray, " u"]
    full: Float[np.ndarray, " u"]
    mean_prefixes: float

    @classmethod
    def of(cls, moments: Moments, found: UtilitySamples) -> "UtilityResult":
        """Read the moments of samples."""
        return cls(moments.at(np.s_[:, :-1]), found.empty, found.full, float(moments.mean[0, -1]))


@dataclass(frozen=True)
class Permutation:
    """The estimator.

    Attributes:
        num_permutations: even when antithetic.
        antithetic: whether a sample is the mean of a permutation and its reverse.
        seed: of the permutations.
        first_sample: number of the first sample; disjoint ranges can be merged.
        path: `cholesky`, `rows`, or `auto` for the fewer flops.
        tolerance: stop a permutation once the mean utility over queries is within this part of |U(N) - U(empty)| of
            U(N); None never stops. Of utilities alone.
        num_consecutive: prefixes in a row that must be within the tolerance.
        max_bytes: memory allowed; what is available when None.
    """

    num_permutations: int = 200
    antithetic: bool = True
    seed: int = 0
    first_sample: int = 0
    path: Literal["auto", "cholesky", "rows"] = "auto"
    tolerance: float | None = None
    num_consecutive: int = 2
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check that permutations pair up."""
        if self.antithetic and self.num_permutations % 2:
            raise MethodError(
                f"{self.num_permutations} permutations cannot be paired with their reverses", expected="an even number"
            )

    def measure(self, game: KernelGame, queries: Float[np.ndarray, "m p"], progress: Progress = silent) -> Moments:
        """Estimate the Shapley values of all players in the outputs for query features.

        Args:
            game: the kernel game.
            queries: phi of the queries.
            progress: called with (samples done, samples).

        Returns:
            Moments of shape [m, n, c].

        Raises:
            MethodError: it does not fit the memory.
        """
        solver = self._solver(game, queries)
        (n, c), m = game.responses.shape, len(queries)

        arrays = itertools.cycle(np.empty((2, c, m, n)))  # a sample is used up before the next pair; players last

        def gains(order: Int[np.ndarray, " n"], weight: float) -> Float[np.ndarray, "c m n"]:
            values, responses, start = next(arrays), np.empty((n, c)), 0
            for steps in solver.steps(order):
                players = order[start : start + len(steps.responses)]
                values[-1][:, players], responses[players] = steps.queries, weight * steps.responses
                start += len(players)
            for output in range(c):  # the last one in place
                np.multiply(values[-1], responses[:, output], out=values[output])
            return values

        moments = Moments.of(self._samples(n, gains, progress), (c, m, n))
        return Moments(moments.count, *(np.moveaxis(part, 0, 2) for part in moments.parts))

    def measure_utility(self, game: KernelGame, queries: Float[np.ndarray, "m p"], utility: Utility) -> UtilityResult:
        """Estimate the Shapley values of all players in a utility of the prediction.

        Args:
            game: the kernel game.
            queries: phi of the queries.
            utility: what predictions are worth.

        Raises:
            MethodError: it does not fit the memory.
        """
        found = self.sample_joint_utility([(game, queries)], utility)
        return UtilityResult.of(Moments.of(found.samples, found.shape), found)

    def sample_joint_utility(
        self, games: Sequence[tuple[KernelGame, Float[np.ndarray, "m p"]]], utility: Utility
    ) -> UtilitySamples:
        """Sample the Shapley values in a utility of the predictions of several games of the same players together.

        Args:
            games: kernel games with their query features, of one shape; their responses are the c predictions in turn.
            utility: what predictions are worth.

        Raises:
            MethodError: it does not fit the memory.
        """
        solvers = [self._solver(game, queries) for game, queries in games]
        n, m = len(games[0][0].features), len(games[0][1])
        whole = [game.value(np.ones(n, bool), queries.astype(np.float64, copy=False)) for game, queries in games]
        full_predictions = np.concatenate(whole, axis=1)
        c = full_predictions.shape[1]
        empty, full = utility(np.stack([np.zeros((m, c)), full_predictions]))
        close = None if self.tolerance is None else self.tolerance * abs(float(full.mean() - empty.mean()))
        shape = (len(full), n + 1)

        def gains(order: Int[np.ndarray, " n"], weight: float) -> Float[np.ndarray, "u n1"]:
            values, start, before, worth, run = np.zeros(shape), 0, np.zeros((m, c)), empty, 0
            max_rows = max(1, _STREAMED // (m * c))
            for parts in zip(*(_split(solver.steps(order), max_rows) for solver in solvers), strict=True):
                increments = [steps.queries.T[:, :, None] * steps.responses[:, None, :] for steps in parts]
                predictions = np.concatenate(increments, axis=2)
                predictions[0] += before
                np.cumsum(predictions, axis=0, out=predictions)
                worths = utility(predictions)
                stop = len(worths)
                if close is not None:
                    stop, run = truncate(np.abs(full.mean() - worths.mean(axis=1)) <= close, run, self.num_consecutive)
                players = order[start : start + stop]
                values[:, players] = np.diff(worths[:stop], axis=0, prepend=worth[None]).T
                start, before, worth = start + stop, predictions[-1], worths[-1]
                if close is not None and run >= self.num_consecutive:
                    break
            values[:, n] = start
            values *= weight
            return values

        return UtilitySamples(self._samples(n, gains), empty, full, shape)

    def _samples(
        self, num_players: int, gains: Callable[[Int[np.ndarray, " n"], float], np.ndarray], progress: Progress = silent
    ) -> Iterator[np.ndarray]:
        """Yield the gains of one permutation, or the mean of a pair, at a time."""
        count, weight = self.num_permutations // (2 if self.antithetic else 1), 0.5 if self.antithetic else 1.0
        for done in range(count):
            order = stream(self.seed, "permutation", self.first_sample + done).permutation(num_players)
            sample = gains(order, weight)
            if self.antithetic:
                sample += gains(order[::-1], weight)
            yield sample
            progress(done + 1, count)

    def _solver(self, game: KernelGame, queries: Float[np.ndarray, "m p"]) -> "_Cholesky | _Rows":
        """Choose the path and check its memory."""
        (n, p), m, c = game.features.shape, len(queries), game.responses.shape[1]
        d = min(n, p)
        cholesky = n**3 / 3 + n**2 * (m + c)
        rows = 3.3 * n * d**2 + 4.5 * n * d * m
        dense = self.path == "cholesky" or (self.path == "auto" and cholesky <= rows)
        size = 8 * (7 * m * n * c + (3 * n * n if dense else 3 * n * d))
        require_memory(
            size, f"permutations of {n} examples", "take fewer queries at a time, or path rows", self.max_bytes
        )
        return (_Cholesky if dense else _Rows)(game, queries.astype(np.float64, copy=False))


def _split(blocks: Iterator[Steps], max_rows: int) -> Iterator[Steps]:
    """Cut blocks to at most `max_rows` players."""
    for queries, responses in blocks:
        for start in range(0, len(responses), max_rows):
            yield Steps(queries[:, start : start + max_rows], responses[start : start + max_rows])


def truncate(near: Bool[np.ndarray, " k"], run: int, needed: int) -> tuple[int, int]:
    """Return how many prefixes are kept, and the length of the run of near ones at their end."""
    for position, is_near in enumerate(near):
        run = run + 1 if is_near else 0
        if run == needed:
            return position + 1, run
    return len(near), run


class _Cholesky:
    """All prefixes from one Cholesky factor of the kernel matrix."""

    def __init__(self, game: KernelGame, queries: Float[np.ndarray, "m p"]) -> None:
        features = game.features.astype(np.float64, copy=False)
        self.kernel = features @ features.T
        self.kernel[np.diag_indices(len(features))] += game.ridge
        self.num_queries = len(queries)
        self.sides = np.concatenate([queries @ features.T, game.responses.T.astype(np.float64)])  # [m + c, n]
        self._rows, self._both = np.empty((_GATHERED, len(features))), np.empty_like(self.kernel)
        (self._potrf,) = scipy.linalg.get_lapack_funcs(("potrf",), (self.kernel,))
        (self._trsm,) = scipy.linalg.get_blas_funcs(("trsm",), (self.kernel,))

    def steps(self, order: Int[np.ndarray, " n"]) -> Iterator[Steps]:
        """Yield all players at once."""
        for start in range(0, len(order), _GATHERED):  # one half is all that the factor reads
            chosen = order[start : start + _GATHERED]
            rows = self._rows[: len(chosen)]
            np.take(self.kernel, chosen, axis=0, out=rows, mode="clip")
            self._both[start : start + len(chosen), start:] = rows.take(order[start:], axis=1, mode="clip")
        # The upper half in C order is the lower half in Fortran order, which LAPACK takes without a copy.
        factor, failed = self._potrf(self._both.T, lower=1, overwrite_a=1, clean=0)
        if failed:
            raise np.linalg.LinAlgError("Matrix is not positive definite")  # as numpy's, see `ridge_errors`
        solved = self._trsm(1.0, factor, self.sides.take(order, axis=1).T, lower=1, overwrite_b=1)
        yield Steps(solved[:, : self.num_queries].T, solved[:, self.num_queries :])


class _Rows:
    """Blocks of players in d dimensions."""

    def __init__(self, game: KernelGame, queries: Float[np.ndarray, "m p"]) -> None:
        self.coordinates, self.ridge = game.space.coordinates, game.ridge
        self.responses = game.responses.astype(np.float64, copy=False)
        self.queries = game.space.project(queries)

    def steps(self, order: Int[np.ndarray, " n"]) -> Iterator[Steps]:
        """Yield blocks of d/2 players."""
        d, m = self.coordinates.shape[1], len(self.queries)
        gram, target = self.ridge * np.eye(d), np.zeros((d, self.responses.shape[1]))
        size = max(1, d // 2)
        for start in range(0, len(order), size):
            players = order[start : start + size]
            rows, wanted = self.coordinates[players], self.responses[players]
            sides = np.concatenate([rows.T, self.queries.T, target], axis=1)
            halved = _halve(scipy.linalg.cholesky(gram, lower=True, check_finite=False), sides)
            white, others = halved[:, : len(players)], halved[:, len(players) :]
            inner = white.T @ white
            inner[np.diag_indices(len(inner))] += 1
            right = white.T @ others
            right[:, m:] = wanted - right[:, m:]
            solved = _halve(scipy.linalg.cholesky(inner, lower=True, overwrite_a=True, check_finite=False), right)
            yield Steps(solved[:, :m].T, solved[:, m:])
            gram += rows.T @ rows
            target += rows.T @ wanted


def _halve(factor: Float[np.ndarray, "k k"], sides: Float[np.ndarray, "k m"]) -> Float[np.ndarray, "k m"]:
    """Apply the inverse of a Cholesky factor."""
    return np.asarray(scipy.linalg.solve_triangular(factor, sides, lower=True, overwrite_b=True, check_finite=False))
