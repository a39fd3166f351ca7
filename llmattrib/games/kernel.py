"""The kernel game: ridge regression on features, played by training examples.

    v_S(x) = phi(x)^T w_S,   w_S = P_S Phi_S^T y_S,   P_S = (lam I + Phi_S^T Phi_S)^-1

Values are linear in phi(x), so a player's value is a representer in feature space and one set of representers serves
every query. All responses (the c columns of y) share P_S. Rows span at most d = min(n, p) dimensions; `row_space`
rotates into them exactly (QR, float64), so every estimator works in d dimensions, and maps results back. Nothing is
dropped for numerical rank: lam > 0 keeps every solve definite, and a direction without data costs time, not accuracy.

Takes arrays, or blocks of rows where they may be long; knows nothing of models, stores or queries.
Limits: `row_space` of n < p holds Phi in float64 (n p <= p^2 numbers); p >= n does Grams of p^2.
Source: docs/methods.md section 3; Wang et al. 2024 (FreeShap) for the game, the hat-matrix identities are classical.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from llmattrib.errors import MethodError, first_line
from llmattrib.memory import require_memory

Blocks = Callable[[], Iterator[tuple[int, Float[np.ndarray, "m p"]]]]
"""Called for a fresh pass over (first row, rows)."""

Total = Callable[[Callable[[], np.ndarray]], np.ndarray]
"""Adds up what each of several processes makes of its own rows; every process gets the sum."""

LOO_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Relative ridges that leave-one-out chooses from."""


def alone(part: Callable[[], np.ndarray]) -> np.ndarray:
    """Be the `Total` of a process that has all rows."""
    return part()


def array_blocks(rows: Float[np.ndarray, "n p"], max_rows: int = 1024) -> Blocks:
    """Serve an array as blocks."""

    def blocks() -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
        for start in range(0, len(rows), max_rows):
            yield start, rows[start : start + max_rows]

    return blocks


@contextmanager
def ridge_errors() -> Iterator[None]:
    """Turn a matrix that cannot be factored, since its ridge is lost in rounding, into an error that says what to do.

    Raises:
        MethodError: there is one.
    """
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise MethodError(
            f"a system of the kernel game cannot be solved ({first_line(error)})",
            expected="a ridge that is not lost in rounding beside the Gram matrix",
            fix="take a larger reduce.ridge",
        ) from error


def form_gram(blocks: Blocks, dim: int, total: Total = alone) -> Float[np.ndarray, "p p"]:
    """Return Phi^T Phi in float64, of the rows of all processes.

    A float32 Gram would put errors of 6e-8 |Phi|^2 beside lam, which is 1e-7 |Phi|^2 at ridge 0.01 and n = 100,000.
    """

    def part() -> Float[np.ndarray, "p p"]:
        gram = np.zeros((dim, dim))
        for _, rows in blocks():
            wide = rows.astype(np.float64)
            gram += wide.T @ wide
        return gram

    return total(part)


@dataclass(frozen=True)
class RowSpace:
    """Rows in an orthonormal basis of d = min(n, p) dimensions that contains them.

    Attributes:
        coordinates: [n, d] float64, R of Phi = R Q^T.
        basis: [p, d] float64 Q, or None when d = p and Q = I.
    """

    coordinates: Float[np.ndarray, "n d"]
    basis: Float[np.ndarray, "p d"] | None

    def lift(self, rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m p"]:
        """Map coordinates to feature space."""
        return rows if self.basis is None else rows @ self.basis.T.astype(rows.dtype, copy=False)

    def project(self, rows: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "m d"]:
        """Map feature rows to coordinates; what lies outside the row space is lost."""
        return rows if self.basis is None else rows @ self.basis.astype(rows.dtype, copy=False)


def row_space(features: Float[np.ndarray, "n p"]) -> RowSpace:
    """Rotate rows into their span when n < p, by Householder QR; the identity otherwise."""
    n, p = features.shape
    if n >= p:
        return RowSpace(features.astype(np.float64, copy=False), None)
    basis, triangle = np.linalg.qr(features.T.astype(np.float64, copy=False))
    return RowSpace(np.ascontiguousarray(triangle.T), basis)


def mean_square(features: Float[np.ndarray, "n p"]) -> float:
    """Return the mean squared row norm, the unit of a relative ridge."""
    return float(np.einsum("ij,ij->", features, features, dtype=np.float64) / len(features))


def leave_one_out_errors(
    blocks: Blocks,
    responses: Float[np.ndarray, "n c"],
    gram: Float[np.ndarray, "p p"],
    ridges: Sequence[float],
    total: Total = alone,
) -> list[float]:
    """Return the mean squared leave-one-out residual at each absolute ridge, in closed form.

    The residual of i without i is (y_i - phi_i^T w) / (1 - h_i), h_i = phi_i^T P phi_i. One eigendecomposition, two
    passes over the rows.

    Args:
        blocks: the rows of Phi that this process has.
        responses: [n, c], of all rows.
        gram: Phi^T Phi, of all rows.
        ridges: absolute values of lam.
        total: adds up over processes.

    Returns:
        One mean over players and responses for each ridge.
    """
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)

    def moments() -> Float[np.ndarray, "p c"]:
        sums = np.zeros((len(gram), responses.shape[1]))
        for start, rows in blocks():
            sums += rows.T.astype(np.float64) @ responses[start : start + len(rows)]
        return sums

    target = vectors.T @ total(moments)

    def errors() -> Float[np.ndarray, " r"]:
        sums = np.zeros(len(ridges))
        for start, rows in blocks():
            turned = rows.astype(np.float64) @ vectors
            wanted = responses[start : start + len(rows)]
            for index, lam in enumerate(ridges):
                leverage = turned**2 @ (1 / (values + lam))
                residual = wanted - turned @ (target / (values + lam)[:, None])
                sums[index] += np.sum((residual / (1 - leverage)[:, None]) ** 2)
        return sums

    return [float(error / responses.size) for error in total(errors)]


@dataclass(frozen=True)
class FeatureRows:
    """Features that are read block by block; what several methods need of them is computed once.

    Attributes:
        blocks: a pass over the rows that this process has, float32.
        num_rows: n, of all processes.
        dim: p.
        max_bytes: memory allowed to one array; what is available when None.
        total: adds up over processes; then all of them ask for the same, in the same order.
        everything: a pass over the rows of all processes; `blocks` when None.
    """

    blocks: Blocks
    num_rows: int
    dim: int
    max_bytes: int | None = None
    total: Total = alone
    everything: Blocks | None = None

    @classmethod
    def of(cls, features: Float[np.ndarray, "n p"]) -> "FeatureRows":
        """Serve an array to one process."""
        return cls(array_blocks(features), *features.shape)

    def all_blocks(self) -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
        """Yield (first row, rows) of all rows, whichever process they are of."""
        return (self.everything or self.blocks)()

    def sums(
        self, visit: Callable[[list[np.ndarray], int, np.ndarray], None], *shapes: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Return what one pass adds to zeros, over the rows of all processes.

        Args:
            visit: called with the arrays to add to, and each first row and rows.
            shapes: of the arrays, float64.
        """

        def part() -> Float[np.ndarray, " k"]:
            parts = [np.zeros(shape) for shape in shapes]
            for start, rows in self.blocks():
                visit(parts, start, rows)
            return np.concatenate([array.ravel() for array in parts])

        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        return [flat.reshape(shape) for flat, shape in zip(np.split(self.total(part), ends[:-1]), shapes, strict=True)]

    @cached_property
    def space(self) -> RowSpace:
        """All rows, in d = min(n, p) dimensions.

        Raises:
            MethodError: they do not fit the memory.
        """
        size = 8 * self.num_rows * self.dim * (3 if self.num_rows < self.dim else 1)  # Q and R beside a copy
        require_memory(
            size,
            f"holding {self.num_rows} rows of {self.dim} features",
            "use a smaller features.sketch.dim, or a machine with more memory",
            self.max_bytes,
        )

        def part() -> Float[np.ndarray, "n p"]:
            rows = np.zeros((self.num_rows, self.dim))
            for start, block in self.blocks():
                rows[start : start + len(block)] = block
            return rows

        return row_space(self.total(part))

    @property
    def is_wide(self) -> bool:
        """Whether n < p, so that the row space is smaller than the feature space."""
        return self.num_rows < self.dim

    @property
    def basis(self) -> Float[np.ndarray, "p d"] | None:
        """Q of the row space, None when it is everything."""
        return self.space.basis if self.is_wide else None

    @cached_property
    def gram(self) -> Float[np.ndarray, "d d"]:
        """Sum of phi phi^T in row-space coordinates; streams over blocks when n >= p.

        Raises:
            MethodError: it does not fit the memory.
        """
        if self.is_wide:
            return np.asarray(self.space.coordinates.T @ self.space.coordinates)
        fix = "use a smaller features.sketch.dim, or a machine with more memory"
        require_memory(24 * self.dim**2, f"the Gram matrix of {self.dim} features", fix, self.max_bytes)
        return form_gram(self.blocks, self.dim, self.total)

    @cached_property
    def mean_square(self) -> float:
        """Mean squared row norm, the unit of a relative ridge."""

        def part() -> Float[np.ndarray, " 1"]:
            squares = (np.einsum("mp,mp->", rows, rows, dtype=np.float64) for _, rows in self.blocks())
            return np.array([sum(squares)], np.float64)

        return float(self.total(part)[0]) / self.num_rows

    def leave_one_out_errors(self, responses: Float[np.ndarray, "n c"], ridges: Sequence[float]) -> list[float]:
        """Return the mean squared leave-one-out residual at each absolute ridge; see the function of that name."""
        if self.is_wide:
            return leave_one_out_errors(array_blocks(self.space.coordinates), responses, self.gram, ridges)
        return leave_one_out_errors(self.blocks, responses, self.gram, ridges, self.total)


@dataclass(frozen=True)
class KernelGame:
    """The game of n players.

    Attributes:
        features: [n, p] Phi.
        responses: [n, c] y.
        ridge: lam, absolute and positive; `relative` sets it in units of the mean squared feature norm.
    """

    features: Float[np.ndarray, "n p"]
    responses: Float[np.ndarray, "n c"]
    ridge: float

    def __post_init__(self) -> None:
        """Check our own invariants."""
        assert len(self.features) == len(self.responses) > 0
        assert self.ridge > 0

    @classmethod
    def relative(
        cls, features: Float[np.ndarray, "n p"], responses: Float[np.ndarray, "n c"], ridge: float
    ) -> "KernelGame":
        """Make a game whose lam is `ridge` times the mean squared feature norm."""
        return cls(features, responses, ridge * mean_square(features))

    @cached_property
    def space(self) -> RowSpace:
        """The rows in d = min(n, p) dimensions."""
        return row_space(self.features)

    def _solve(self, members: Bool[np.ndarray, " n"], sides: Float[np.ndarray, "d k"]) -> Float[np.ndarray, "d k"]:
        """Return P_S applied to columns."""
        rows = self.space.coordinates[members]
        matrix = rows.T @ rows
        matrix[np.diag_indices(len(matrix))] += self.ridge
        solved: Float[np.ndarray, "d k"] = scipy.linalg.solve(matrix, sides, assume_a="pos")
        return solved

    def _weights(self, members: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "c d"]:
        rows = self.space.coordinates[members]
        return self._solve(members, rows.T @ self.responses[members].astype(np.float64)).T

    def weights(self, members: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "c p"]:
        """Return w_S, the representer of the whole subset."""
        return self.space.lift(self._weights(members))

    def value(self, members: Bool[np.ndarray, " n"], queries: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "m c"]:
        """Return v_S at query features."""
        return np.asarray(queries @ self.weights(members).T)

    def marginals(self, members: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n c p"]:
        """Return the representers of v(S + i) - v(S - i) for every player i, exactly, from one solve.

        P_S phi_i r_i / (1 + h_i) for i outside S and / (1 - h_i) for i inside, r_i = y_i - phi_i^T w_S.
        """
        coordinates = self.space.coordinates
        solved = self._solve(members, coordinates.T).T
        leverage = np.einsum("nd,nd->n", coordinates, solved)
        residual = self.responses - coordinates @ self._weights(members).T
        residual = residual / np.where(members, 1 - leverage, 1 + leverage)[:, None]
        return np.asarray(residual[:, :, None] * self.space.lift(solved)[:, None, :])
