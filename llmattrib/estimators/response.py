"""Solves N Z = B, the response of the mean field's fixed point, for many right-hand sides.

    N = I - E,   E_ij = (w_i^T w_j)^2 off the diagonal, 0 on it;   w_i = sqrt(b_i) times the whitened row of player i

float64 rows are solved by Cholesky (n^3/3 + n^2 d flops for the factor). float32 rows by conjugate gradients on all
columns of B side by side. E has one eigenvalue of size up to one, whose vector is positive (Perron), and a bulk of
hundredths: random rows of d dimensions have (w_i^T w_j)^2 near |w_i|^2 |w_j|^2 / d. A few Lanczos steps from a positive
vector find the large eigenvalue, and preconditioned by them one product with E brings the residual to about 1e-4.

Products. With a block of columns E is formed in row strips, one half of it (E = E^T), 3 n^2 d flops, and forgotten; it
is kept where it is no larger than the rows themselves are several times over, n <= 16 d. With a vector it is
(E x)_i = w_i^T (W^T diag(x) W) w_i - |w_i|^4 x_i, 4 n d^2 flops: linear in n. So are the Lanczos steps, and the
residual of a step that is not yet taken, which is measured on two random combinations of its columns. The last product
of a plain iteration is thereby saved; where the low-rank part alone suffices, there is none.

Knows no games, q or quadrature. Memory: 8 n d numbers, and n^2 (n <= 16 d) or 512 n.
Measured iterations: docs/methods.md section 3. Sources: Saad 2003, algorithm 9.1 (preconditioned conjugate gradients);
Hutchinson 1990 (norms from random signs).
"""

from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float32, Float64

from llmattrib.errors import MethodError
from llmattrib.rng import stream

_KEPT = 16
_STRIP = 512
_LANCZOS = 5
_PROBES = 2


def response_bytes(num_groups: int, dim: int, itemsize: int) -> int:
    """Return the memory that a solver takes beside its rows and sides, in bytes: 8 is `Direct`, 4 `Iterative`."""
    if itemsize == 8:
        return 8 * num_groups**2
    return 4 * num_groups * (6 * dim + (num_groups if num_groups <= _KEPT * dim else _STRIP))


def unstable(q: float) -> MethodError:
    """Return the error of an N that is not positive definite."""
    return MethodError(
        f"the mean field is not stable at q = {q:.3g}",
        expected="a positive definite response of the fixed point",
        fix="take a larger reduce.ridge, or set reduce.form=cavity",
    )


class Direct:
    """N by its Cholesky factor.

    Args:
        rows: w.
        q: for messages.

    Attributes:
        residual: None, rounding apart there is none.

    Raises:
        MethodError: N is not positive definite.
    """

    residual: float | None = None

    def __init__(self, rows: Float64[np.ndarray, "g d"], q: float) -> None:
        potrf, self._potrs = scipy.linalg.get_lapack_funcs(("potrf", "potrs"), (rows,))
        system = -_half_squares(rows)
        system[np.diag_indices(len(system))] = 1
        self._factor, failed = potrf(system, lower=1, overwrite_a=1)
        if failed:
            raise unstable(q)

    def solve(self, sides: Float64[np.ndarray, "g k"]) -> Float64[np.ndarray, "g k"]:
        """Return N^-1 sides."""
        solved: np.ndarray = self._potrs(self._factor, sides, lower=1)[0]
        return solved


class Iterative:
    """N by products with it.

    Args:
        rows: w.
        q: for messages.
        tolerance: |B - N Z| / |B| to reach, Frobenius norms.
        max_products: products of E with a right-hand side allowed.

    Attributes:
        num_products: products of E with right-hand sides so far.
        residual: the largest relative residual of the solutions so far, as measured on random combinations.

    Raises:
        MethodError: N is not positive definite.
    """

    def __init__(
        self, rows: Float32[np.ndarray, "g d"], q: float, tolerance: float = 1e-4, max_products: int = 50
    ) -> None:
        self.num_products, self.residual = 0, 0.0
        self._rows = np.ascontiguousarray(rows)
        self._q, self._tolerance, self._max_products = q, tolerance, max_products
        self._squares = np.einsum("gd,gd->g", rows, rows) ** 2
        self._system = _half_squares(rows) if len(rows) <= _KEPT * rows.shape[1] else None
        if self._system is not None:
            self._system[np.diag_indices(len(rows))] = 0
        self._ritz, self._vectors = self._lanczos()
        if self._ritz.max() >= 1:  # a lower bound of the largest eigenvalue of E
            raise unstable(q)

    def solve(self, sides: Float32[np.ndarray, "g k"]) -> Float32[np.ndarray, "g k"]:
        """Return N^-1 sides.

        Raises:
            MethodError: N is not positive definite, or the tolerance is not reached.
        """
        scale = float(np.linalg.norm(sides))
        solution, residual = np.zeros_like(sides), sides.copy()
        if not scale:
            return solution
        probes = stream(0, "response", "probes").choice([-1, 1], (sides.shape[1], _PROBES)).astype(sides.dtype)
        direction, before = np.zeros_like(sides), np.ones(sides.shape[1], sides.dtype)
        for done in range(self._max_products + 1):
            step = self._precondition(residual)
            mixed = step @ probes
            left = residual @ probes - mixed + self._apply(mixed)
            error = float(np.linalg.norm(left)) / (scale * _PROBES**0.5)
            if error <= self._tolerance:
                self.residual = max(self.residual, error)
                return np.asarray(solution + step)
            if done == self._max_products:
                break
            now = np.einsum("gk,gk->k", residual, step)
            direction *= now / before
            direction += step
            moved = self._product(direction)
            curvature = np.einsum("gk,gk->k", direction, moved)
            if (curvature < 0).any():
                raise unstable(self._q)
            length = np.divide(now, curvature, out=np.zeros_like(now), where=curvature > 0)
            solution += length * direction
            residual -= length * moved
            before = np.where(now > 0, now, 1).astype(now.dtype)
        raise MethodError(
            f"the response of the mean field at q = {self._q:.3g} has a residual of {error:.1e} after "
            f"{self._max_products} products",
            expected=f"at most {self._tolerance:g}",
            fix="take a larger reduce.ridge, or set reduce.form=cavity",
        )

    def _precondition(self, sides: Float32[np.ndarray, "g k"]) -> Float32[np.ndarray, "g k"]:
        """Return N^-1 sides with the Lanczos approximation of E."""
        known = self._vectors.T @ sides
        return np.asarray(sides + self._vectors @ ((self._ritz / (1 - self._ritz))[:, None] * known))

    def _lanczos(self) -> tuple[Float32[np.ndarray, " m"], Float32[np.ndarray, "g m"]]:
        """Return Ritz values and vectors of E."""
        start = np.sqrt(self._squares)
        basis = (start / max(float(np.linalg.norm(start)), np.finfo(np.float32).tiny))[:, None]
        images = self._apply(basis)
        while basis.shape[1] < _LANCZOS:
            rest = images[:, -1:]
            for _ in range(2):
                rest = rest - basis @ (basis.T @ rest)
            size = float(np.linalg.norm(rest))
            if size <= 1e-6 * float(np.linalg.norm(images)):
                break
            basis = np.concatenate([basis, rest / size], axis=1)
            images = np.concatenate([images, self._apply(basis[:, -1:])], axis=1)
        projected = basis.T.astype(np.float64) @ images
        values, turn = np.linalg.eigh((projected + projected.T) / 2)
        return values.astype(np.float32), np.ascontiguousarray(basis @ turn.astype(np.float32))

    def _product(self, sides: Float32[np.ndarray, "g k"]) -> Float32[np.ndarray, "g k"]:
        """Return N sides, counted."""
        self.num_products += 1
        return np.asarray(sides - (self._kept(sides) if self._system is not None else self._strips(sides)))

    def _apply(self, columns: Float32[np.ndarray, "g m"]) -> Float32[np.ndarray, "g m"]:
        """Return E columns (`_product` gives N), for a few."""
        if self._system is not None:
            return self._kept(columns)
        rows = self._rows
        found = np.empty_like(columns)
        for index, column in enumerate(columns.T):
            moment = rows.T @ (column[:, None] * rows)
            found[:, index] = np.einsum("gd,gd->g", rows @ moment, rows) - self._squares * column
        return found

    def _kept(self, columns: Float32[np.ndarray, "g m"]) -> Float32[np.ndarray, "g m"]:
        symm = scipy.linalg.get_blas_funcs("symm", (columns,))
        return np.asarray(symm(1.0, self._system, np.ascontiguousarray(columns).T, side=1, lower=1).T)

    def _strips(self, sides: Float32[np.ndarray, "g k"]) -> Float32[np.ndarray, "g k"]:
        """Return E sides; each strip of the upper half serves its rows and, transposed, its columns."""
        total = np.zeros_like(sides)
        for start in range(0, len(sides), _STRIP):
            stop = min(start + _STRIP, len(sides))
            strip = self._rows[start:stop] @ self._rows[start:].T
            np.multiply(strip, strip, out=strip)
            strip[np.diag_indices(stop - start)] = 0
            total[start:stop] += strip @ sides[start:]
            total[stop:] += strip[:, stop - start :].T @ sides[start:stop]
        return total


def _half_squares(rows: Float[np.ndarray, "g d"]) -> Any:
    """Return the squares of the rows' Gram, the lower half of a Fortran array (what BLAS takes without a copy)."""
    syrk = scipy.linalg.get_blas_funcs("syrk", (rows,))
    system = syrk(1.0, np.ascontiguousarray(rows).T, trans=1, lower=1)
    np.multiply(system, system, out=system)
    return system
