"""One q of the streamed mean field: values of a chunk's players, and the passes that find their Lanczos basis.

What is computed and why: `streamed`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from llmattrib.estimators.response import unstable
from llmattrib.games.kernel import FeatureRows


@dataclass(frozen=True)
class StreamedGame:
    """The kernel game as one process of several sees it.

    Attributes:
        features: the rows, of which this process has some; chunks are the same for any number of processes.
        responses: [n] y of all rows, float64.
        ridge: lam, absolute.
        dtype: of products with rows.
    """

    features: FeatureRows
    responses: Float[np.ndarray, " n"]
    ridge: float
    dtype: np.dtype[Any]

    def y(self, start: int, rows: Float[np.ndarray, "m p"]) -> Float[np.ndarray, " m"]:
        """Return the responses of a chunk."""
        return self.responses[start : start + len(rows)]


class Site(NamedTuple):
    """One player at one q, from its leverage; see docs/methods.md section 3.

    Attributes:
        weight: c.
        gain: derivative of c in q.
        b: root of the variance of its departure from the mean field.
    """

    weight: Float[np.ndarray, " m"]
    gain: Float[np.ndarray, " m"]
    b: Float[np.ndarray, " m"]


def site(leverage: Float[np.ndarray, " m"], q: float) -> Site:
    """Solve (1-q) d^2 + (1-s) d - s = 0 for every s, without cancellation."""
    s, a = leverage.astype(np.float64), 1 - q
    root = np.sqrt((1 - s) ** 2 + 4 * a * s)
    d = np.where(s < 1, 2 * s / np.maximum((1 - s) + root, 1e-300), (s - 1 + root) / (2 * a if a else 1.0))
    empty = 1 + a * d
    return Site(q / empty, (1 + d) / empty**2, np.sqrt(q * a) * (1 + d) / empty**2)


@dataclass(frozen=True)
class Node:
    """The mean field and its derivative at one q.

    Attributes:
        q: the inclusion probability.
        inverse: [p, p] L^-1 of G = L L^T; rows phi become `white` rows L^-1 phi.
        weights: [p] L^-1 of the sum of c y phi, so w = L^-T weights.
        basis: Lanczos vectors by the first row of each of this process's chunks, [m, k] each.
        mixed: [k, p] what a unit of each vector adds, white.
        total: [p] sum of the values of all players.
        num_rounds: passes of the fixed point.
    """

    q: float
    inverse: Float[np.ndarray, "p p"]
    weights: Float[np.ndarray, " p"]
    basis: dict[int, np.ndarray]
    mixed: Float[np.ndarray, "k p"]
    total: Float[np.ndarray, " p"]
    num_rounds: int

    def white_values(
        self, start: int, rows: Float[np.ndarray, "m p"], responses: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return L^T times the values of the rows of one chunk; `@ inverse` are the values."""
        white: np.ndarray = rows @ self.inverse.T
        found = site(np.einsum("mp,mp->m", white, white), self.q)
        residual = responses - white @ self.weights.astype(white.dtype)
        values = (found.gain * residual).astype(white.dtype)[:, None] * white
        if len(self.mixed):
            values += (self.basis[start] @ self.mixed).astype(white.dtype)
        return np.asarray(values)


class Derivative:
    """The Lanczos basis at one q, a pass for each vector.

    Args:
        game: the game.
        num_vectors: of the basis; there is none at q = 0 and q = 1, where nothing scatters.
        q: the inclusion probability.
        inverse: as of `Node`.
        weights: as of `Node`.
    """

    def __init__(
        self,
        game: StreamedGame,
        num_vectors: int,
        q: float,
        inverse: Float[np.ndarray, "p p"],
        weights: Float[np.ndarray, " p"],
    ) -> None:
        self.game, self.q, self.inverse, self.weights = game, q, inverse, weights
        self.dim, self.k = game.features.dim, num_vectors if 0 < q < 1 else 0
        self.basis: dict[int, np.ndarray] = {}
        self.moments = np.zeros((0, self.dim, self.dim))  # M of each vector
        self.diagonals = np.zeros((0, 0))  # sum of (b s)^2 q_l q_m
        self.sides = np.zeros((0, self.dim))  # Q^T b U

    def node(self, rounds: int) -> Node:
        """Build the basis and finish the node."""
        self._first()
        while 0 < len(self.sides) < self.k and self._extend():
            pass
        mixed, total = np.zeros((0, self.dim)), self.plain
        if self.k:
            scale = (self.q * (1 - self.q)) ** -0.5
            products = np.einsum("lpk,mpk->lm", self.moments, self.moments, optimize=True) - self.diagonals
            values = np.linalg.eigvalsh(products)
            if values.max() >= 1:  # a lower bound of the largest eigenvalue of E
                raise unstable(self.q)
            identity = np.eye(len(products))
            mixed = scale * (np.linalg.inv(identity - products) - identity) @ self.sides
            total = total + np.sqrt(self.game.features.num_rows) * mixed[0]  # ones are sqrt(n) times the first vector
        total = total @ self.inverse.astype(np.float64)
        return Node(self.q, self.inverse, self.weights, self.basis, mixed.astype(self.game.dtype), total, rounds)

    def _rows(self, start: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Site, np.ndarray]:
        """Return white rows, leverages, sites and residuals of a chunk."""
        white = rows.astype(self.game.dtype) @ self.inverse.T
        leverage = np.einsum("mp,mp->m", white, white)
        residual = self.game.y(start, rows) - white @ self.weights.astype(white.dtype)
        return white, leverage, site(leverage, self.q), residual

    def _first(self) -> None:
        """Begin with the vector of ones; its norm is known."""
        value = self.game.features.num_rows**-0.5

        def visit(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
            white, leverage, found, residual = self._rows(start, rows)
            sums[0] += white.T @ (found.gain * residual).astype(white.dtype)
            if self.k:
                self._gather(sums[1:], white, found.b, residual, np.full(len(rows), value))
                sums[2][0] += value**2 * np.sum((found.b * leverage) ** 2)
                self.basis[start] = np.full((len(rows), 1), value, self.game.dtype)

        shapes = [(self.dim,), *([(self.dim, self.dim), (1,), (self.dim,)] if self.k else [])]
        self.plain, *rest = self.game.features.sums(visit, *shapes)
        if self.k:
            self.moments, self.diagonals, self.sides = rest[0][None], rest[1][None], rest[2][None]

    def _gather(
        self, sums: list[np.ndarray], white: np.ndarray, b: np.ndarray, residual: np.ndarray, vector: np.ndarray
    ) -> None:
        """Add the chunk's part of M and of the side of a vector."""
        scaled = (b * vector).astype(white.dtype)[:, None] * white
        sums[0] += white.T @ scaled
        sums[2] += scaled.T @ residual.astype(white.dtype)

    def _extend(self) -> bool:
        """Add the next vector, E times the last made orthogonal to all; say whether there is one."""
        size, last = len(self.sides), self.moments[-1].astype(self.game.dtype)
        images: dict[int, np.ndarray] = {}

        def visit(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
            white, leverage, found, residual = self._rows(start, rows)
            basis = self.basis[start].astype(np.float64)
            square = (found.b * leverage) ** 2
            image = found.b * np.einsum("mp,mp->m", white @ last, white) - square * basis[:, -1]
            images[start] = image
            self._gather(sums, white, found.b, residual, image)
            sums[1][:size] += basis.T @ image
            sums[1][size] += image @ image
            sums[1][size + 1 : -1] += basis.T @ (square * image)
            sums[1][-1] += image @ (square * image)

        moment, numbers, side = self.game.features.sums(visit, (self.dim, self.dim), (2 * size + 2,), (self.dim,))
        along, square = numbers[:size], float(numbers[size])
        across, own = numbers[size + 1 : -1], float(numbers[-1])
        rest = square - float(along @ along)
        if rest <= 1e-8 * square:
            return False
        norm = rest**0.5
        row = (across - self.diagonals @ along) / norm
        corner = (own - 2 * along @ across + along @ self.diagonals @ along) / rest
        self.moments = np.concatenate([self.moments, [(moment - np.tensordot(along, self.moments, 1)) / norm]])
        self.diagonals = np.block([[self.diagonals, row[:, None]], [row[None], np.array([[corner]])]])
        self.sides = np.concatenate([self.sides, [(side - along @ self.sides) / norm]])
        for start, image in images.items():
            following = (image - self.basis[start] @ along) / norm
            self.basis[start] = np.column_stack([self.basis[start], following]).astype(self.game.dtype)
        return True


def add_gram(total: Float[np.ndarray, "p p"], rows: Float[np.ndarray, "m p"]) -> None:
    """Add rows^T rows to the lower half of a matrix in C order; see `mirror`."""
    syrk = scipy.linalg.get_blas_funcs("syrk", (rows, total))
    syrk(1.0, rows.T, beta=1.0, c=total.T, overwrite_c=1)


def mirror(half: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
    """Return the symmetric matrix of which `add_gram` made a half."""
    return np.asarray(np.tril(half) + np.tril(half, -1).T)
