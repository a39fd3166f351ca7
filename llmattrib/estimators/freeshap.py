"""FreeShap as published: truncated Monte-Carlo permutations of kernel regression on the empirical NTK, for comparison.

The game of a subset S is kernel ridge regression on uncentred one-hot labels, and its utility is measured on labelled
validation queries, on the raw outputs f(x) in R^C:

    f_S(x) = k_S(x)^T (K_SS + ridge I)^-1 Y_S,   K = kernel / scale,   ridge 1e-6, scale 1e4
    U: minus the mean cross-entropy of softmax(f), in nats, and the accuracy of argmax f (the first of equal ones)
    U(empty): -log C and 1/C

`single` takes one kernel for all classes (gradients of the logit of class 0), `per_class` one for each. A permutation
stops after two consecutive prefixes at which both utilities are within 5 % of |U(N) - U(empty)| of U(N); players after
that get 0, which biases values by as much.

The reference updates inverses; here a Cholesky factor grows by blocks of players as far as the permutation gets, so the
k-th prefix predicts sum_{j<=k} a_j b_j, a = L^-1 k(x), b = L^-1 Y. (The published code, from 500 players on and where
told to update inverses, uses that of class 0 for every class; `per_class` here always uses each class's own.) Cost of
a permutation that stops at s players: s^3/3 + s^2 m for each kernel, s m C for utilities; n^2 numbers a kernel. All of
it float64: at a ridge of 1e-6 kernels rounded to float32 may not be positive definite, and are refused.

These are values over a set of validation queries, not representers: the utilities are not linear in phi(x).
Source: Wang et al. 2024 (FreeShap, arXiv 2406.04606); docs/methods.md section 7.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import scipy.special
from jaxtyping import Float, Int

from llmattrib.errors import MethodError
from llmattrib.estimators.permutation import UtilitySamples, truncate
from llmattrib.memory import require_memory
from llmattrib.rng import stream

Kernels = Literal["single", "per_class"]
BLOCK = 64  # players whose prefixes are evaluated together


@dataclass(frozen=True)
class KernelProblem:
    """Training and validation data as kernels.

    Attributes:
        kernel: [g, n, n] inner products of training features; g = 1, shared by all classes, or C.
        query_kernel: [g, m, n] of validation with training features.
        labels: [n] 0 ... C - 1.
        query_labels: [m].
        num_classes: C.
    """

    kernel: Float[np.ndarray, "g n n"]
    query_kernel: Float[np.ndarray, "g m n"]
    labels: Int[np.ndarray, " n"]
    query_labels: Int[np.ndarray, " m"]
    num_classes: int

    def __post_init__(self) -> None:
        """Check that labels and kernels belong together."""
        if len(self.kernel) not in (1, self.num_classes) or len(self.kernel) != len(self.query_kernel):
            raise MethodError(
                f"{len(self.kernel)} kernels are given for {self.num_classes} classes",
                expected="one, or one for each class",
            )
        every = np.concatenate([self.labels, self.query_labels])
        if every.min() < 0 or every.max() >= self.num_classes:
            raise MethodError(
                f"labels lie in {every.min()} ... {every.max()}", expected=f"0 ... {self.num_classes - 1}"
            )

    @classmethod
    def of_features(
        cls,
        features: Float[np.ndarray, "n c p"],
        queries: Float[np.ndarray, "m c p"],
        labels: Int[np.ndarray, " n"],
        query_labels: Int[np.ndarray, " m"],
        kernels: Kernels = "single",
    ) -> "KernelProblem":
        """Form kernels from features of each class's logit (`features.output` logits).

        Args:
            features: [n, C, p] of training examples.
            queries: [m, C, p] of validation examples.
            labels: [n].
            query_labels: [m].
            kernels: `single` uses class 0 alone.
        """
        num_classes = features.shape[1]
        count = 1 if kernels == "single" else num_classes
        by_class = features[:, :count].transpose(1, 0, 2).astype(np.float64)
        asked = queries[:, :count].transpose(1, 0, 2).astype(np.float64)
        turned = by_class.transpose(0, 2, 1)
        return cls(by_class @ turned, asked @ turned, labels, query_labels, num_classes)


@dataclass(frozen=True)
class FreeShap:
    """The estimator; defaults are those of the paper.

    Attributes:
        num_permutations: samples.
        tolerance: part of |U(N) - U(empty)| that stops a permutation; None never stops.
        num_consecutive: prefixes in a row that must be within it.
        ridge: absolute, on the scaled kernel.
        scale: what kernels are divided by.
        seed: of the permutations.
        first_permutation: number of the first one; disjoint ranges can be merged.
        max_bytes: memory allowed; what is available when None.
    """

    num_permutations: int = 200
    tolerance: float | None = 0.05
    num_consecutive: int = 2
    ridge: float = 1e-6
    scale: float = 1e4
    seed: int = 0
    first_permutation: int = 0
    max_bytes: int | None = None

    def sample(self, problem: KernelProblem) -> UtilitySamples:
        """Return an iterator of samples of both utilities, their means over queries; a permutation is a sample.

        Raises:
            MethodError: it does not fit the memory, or a kernel is not positive definite at this ridge.
        """
        g, m, n = problem.query_kernel.shape
        size = 8 * (3 * g * n * (n + m) + 3 * BLOCK * m * problem.num_classes)
        fix = "take fewer validation examples, or the single kernel"
        require_memory(size, f"FreeShap of {n} examples and {m} queries", fix, self.max_bytes)
        empty = np.array([-np.log(problem.num_classes), 1 / problem.num_classes])
        full = _worth(self._total(problem)[None], problem.query_labels)[:, 0].mean(axis=1)

        def samples() -> Iterator[Float[np.ndarray, "2 n1"]]:
            for done in range(self.num_permutations):
                order = stream(self.seed, "freeshap", self.first_permutation + done).permutation(n)
                values, reached = np.zeros((2, n + 1)), 0
                for gains in self._gains(problem, order, empty, full):
                    players = order[reached : reached + gains.shape[1]]
                    values[:, players] = gains.mean(axis=2)
                    reached += len(players)
                values[:, n] = reached
                yield values

        return UtilitySamples(samples(), empty, full, (2, n + 1))

    def _total(self, problem: KernelProblem) -> Float[np.ndarray, "m c"]:
        """Return the outputs of all players together."""
        total = np.zeros((len(problem.query_labels), problem.num_classes))
        for queries, responses in self._steps(problem, np.arange(len(problem.labels))):
            total += np.einsum("kmg,kc->mc" if queries.shape[2] == 1 else "kmc,kc->mc", queries, responses)
        return total

    def _gains(
        self,
        problem: KernelProblem,
        order: Int[np.ndarray, " n"],
        empty: Float[np.ndarray, " 2"],
        full: Float[np.ndarray, " 2"],
    ) -> Iterator[Float[np.ndarray, "2 k m"]]:
        """Yield the gains of blocks of players for every query, up to truncation."""
        close = -np.ones(2) if self.tolerance is None else self.tolerance * np.abs(full - empty)
        before = np.zeros((len(problem.query_labels), problem.num_classes))
        worth = np.repeat(empty[:, None], len(before), axis=1)
        run = 0
        for queries, responses in self._steps(problem, order):
            outputs = queries * responses[:, None, :]
            outputs[0] += before
            np.cumsum(outputs, axis=0, out=outputs)
            worths = _worth(outputs, problem.query_labels)
            near = (np.abs(worths.mean(axis=2) - full[:, None]) <= close[:, None]).all(axis=0)
            stop, run = truncate(near, run, self.num_consecutive)
            yield np.diff(worths[:, :stop], axis=1, prepend=worth[:, None])
            if run == self.num_consecutive:
                return
            before, worth = outputs[-1], worths[:, -1]

    def _steps(
        self, problem: KernelProblem, order: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Float[np.ndarray, "k m g"], Float[np.ndarray, "k c"]]]:
        """Yield (a, b) of blocks of players, growing one Cholesky factor a kernel."""
        n, num_queries, g = len(order), len(problem.query_labels), len(problem.kernel)
        one_hot = np.eye(problem.num_classes)[problem.labels]
        targets = [one_hot] if g == 1 else [one_hot[:, c : c + 1] for c in range(g)]
        factors = np.zeros((g, n, n))
        solved = [np.empty((n, num_queries + target.shape[1])) for target in targets]
        for start in range(0, n, BLOCK):
            new = order[start : start + BLOCK]
            stop = start + len(new)
            for index, (factor, target, done) in enumerate(zip(factors, targets, solved, strict=True)):
                sides = np.concatenate(
                    [problem.query_kernel[index][:, new].T.astype(np.float64) / self.scale, target[new]], axis=1
                )
                rows = problem.kernel[index][np.ix_(new, order[:stop])].astype(np.float64) / self.scale
                self._grow(factor, rows, start)
                sides -= factor[start:stop, :start] @ done[:start]
                done[start:stop] = scipy.linalg.solve_triangular(factor[start:stop, start:stop], sides, lower=True)
            here = slice(start, stop)
            yield (
                np.stack([done[here, :num_queries] for done in solved], axis=2),
                np.concatenate([done[here, num_queries:] for done in solved], axis=1),
            )

    def _grow(self, factor: Float[np.ndarray, "n n"], rows: Float[np.ndarray, "k s"], start: int) -> None:
        """Add the Cholesky rows of new players, whose kernel rows are given."""
        stop = rows.shape[1]
        if start:
            old = scipy.linalg.solve_triangular(factor[:start, :start], rows[:, :start].T, lower=True)
            factor[start:stop, :start] = old.T
        corner = rows[:, start:] - factor[start:stop, :start] @ factor[start:stop, :start].T
        corner[np.diag_indices(len(corner))] += self.ridge
        try:
            factor[start:stop, start:stop] = np.linalg.cholesky(corner)
        except np.linalg.LinAlgError as error:
            raise MethodError(
                f"the kernel over {self.scale:g} is not positive definite at ridge {self.ridge:g}",
                expected="a Gram matrix computed in float64",
                fix="form it in float64 (KernelProblem.of_features), or take a larger values.freeshap_ridge",
            ) from error


def _worth(outputs: Float[np.ndarray, "k m c"], labels: Int[np.ndarray, " m"]) -> Float[np.ndarray, "2 k m"]:
    """Return minus the cross-entropy, and whether the argmax is right, of raw outputs."""
    chosen = outputs[:, np.arange(len(labels)), labels]
    likelihood = chosen - scipy.special.logsumexp(outputs, axis=2)
    return np.stack([likelihood, (outputs.argmax(axis=2) == labels).astype(np.float64)])
