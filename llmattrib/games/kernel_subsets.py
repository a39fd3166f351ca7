"""Values of many subsets of the kernel game for many queries: what fills a subset table.

Each subset is one Cholesky solve, in the smaller of its two forms: |S| dual coefficients or d = min(n, p) primal ones,

    dual     v_S(x) = k_S(x)^T (K_SS + lam I)^-1 y_S,     K = Phi Phi^T,  k(x) = Phi phi(x)
    primal   v_S(x) = phi(x)^T (Phi_S^T Phi_S + lam I)^-1 Phi_S^T y_S

K and k are computed once for all subsets and queries. Cost of a subset: min(|S|, d)^3 / 3, and |S| d^2 for the primal
Gram. Everything is float64.
Limits: K needs n^2 numbers, and is only formed when some subset is small against d; queries times n numbers.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from llmattrib.games.kernel import KernelGame
from llmattrib.memory import require_memory


@dataclass(frozen=True)
class KernelUtility:
    """The utility of subsets: predictions of the ridge regression on them. Called with masks.

    Attributes:
        game: the kernel game.
        queries: [q, p] query features, transformed as the game's features are.
    """

    game: KernelGame
    queries: Float[np.ndarray, "q p"]

    def __call__(self, members: Bool[np.ndarray, "m n"]) -> Float[np.ndarray, "m k"]:
        """Return v_S at all queries, [m, q * c] with the response moving fastest.

        Args:
            members: [m, n] subsets.

        Raises:
            MethodError: the kernel matrix does not fit the memory.
        """
        (num_queries, c), d = (len(self.queries), self.game.responses.shape[1]), self.game.space.coordinates.shape[1]
        values = np.zeros((len(members), num_queries, c))
        for row, inside in enumerate(members):
            chosen = np.flatnonzero(inside)
            if len(chosen):
                values[row] = self._dual(chosen) if len(chosen) < d else self._primal(chosen)
        return values.reshape(len(members), num_queries * c)

    @cached_property
    def _responses(self) -> Float[np.ndarray, "n c"]:
        return self.game.responses.astype(np.float64)

    @cached_property
    def _kernel(self) -> Float[np.ndarray, "n n"]:
        rows = self.game.space.coordinates
        fix = "use a smaller features.sketch.dim, below the size of the subsets"
        require_memory(8 * len(rows) ** 2, f"the kernel matrix of {len(rows)} examples", fix)
        return np.asarray(rows @ rows.T)

    @cached_property
    def _projected(self) -> Float[np.ndarray, "q d"]:
        return self.game.space.project(self.queries.astype(np.float64))

    @cached_property
    def _to_queries(self) -> Float[np.ndarray, "n q"]:
        return np.asarray(self.game.space.coordinates @ self._projected.T)

    def _dual(self, chosen: np.ndarray) -> Float[np.ndarray, "q c"]:
        matrix = self._kernel[np.ix_(chosen, chosen)]
        solved = _solve(matrix, self.game.ridge, self._responses[chosen])
        return np.asarray(self._to_queries[chosen].T @ solved)

    def _primal(self, chosen: np.ndarray) -> Float[np.ndarray, "q c"]:
        rows = self.game.space.coordinates[chosen]
        solved = _solve(rows.T @ rows, self.game.ridge, rows.T @ self._responses[chosen])
        return np.asarray(self._projected @ solved)


def _solve(matrix: Float[np.ndarray, "k k"], ridge: float, sides: Float[np.ndarray, "k c"]) -> Float[np.ndarray, "k c"]:
    """Return (matrix + ridge I)^-1 sides; overwrites the matrix."""
    matrix[np.diag_indices(len(matrix))] += ridge
    solved: Float[np.ndarray, "k c"] = scipy.linalg.solve(matrix, sides, assume_a="pos", overwrite_a=True)
    return solved
