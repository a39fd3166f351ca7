"""Influence functions by iteration: for p so large that a p x p matrix does not fit the memory.

    influence_cg       conjugate gradients on (lam I + Phi^T Phi) v = phi_i
    influence_lissa    v <- phi_i / c + v - (lam I + Phi^T Phi) v / c,  c just above the largest eigenvalue

Both tend to `influence` and need products Phi^T (Phi v) alone, for which all rows are read again, block by block: one
pass over the store for each iteration and block of rows. Memory is a few arrays like a block of rows. Conjugate
gradients need about sqrt(h / lam) ln(1/tolerance) iterations, h the largest eigenvalue, and fewer when few eigenvalues
are large; LiSSA (h / lam) ln(1/tolerance), and is what the other one is compared with in the literature: cut off after
T iterations it is gradient descent, see spectral.py.

Source: Martens 2010 and Koh and Liang 2017 (conjugate gradients); Agarwal et al. 2017, arXiv 1602.03943 (LiSSA), here
with the curvature of all examples in each step instead of a sampled one, so that nothing is random.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.games.kernel import FeatureRows
from llmattrib.rng import stream
from llmattrib.scorers.gradient import absolute_ridge

TOLERANCE = 1e-5
"""Of the residual, relative to phi_i."""
_POWER_STEPS = 20
_POWER_MARGIN = 1.1  # on an estimate that is from below; LiSSA diverges only beyond twice c


@dataclass(frozen=True)
class CgState:
    """What conjugate gradients need.

    Attributes:
        features: all rows, to be read again.
        lam: absolute ridge.
    """

    features: FeatureRows
    lam: float


@dataclass(frozen=True)
class InfluenceCg:
    """Influence functions by conjugate gradients.

    Attributes:
        ridge: lam in units of the mean squared feature norm, positive.
        iterations: most of them.
    """

    ridge: float
    iterations: int

    def init(self, features: FeatureRows) -> CgState:
        """Measure the unit of the ridge.

        Raises:
            MethodError: all features are zero.
        """
        return CgState(features, absolute_ridge(features, self.ridge))

    def compute(
        self, state: CgState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return (lam I + Phi^T Phi)^-1 applied to rows.

        Raises:
            MethodError: a residual is above `TOLERANCE` after all iterations.
        """
        residual = rows.astype(np.float64)
        direction, solution = residual.copy(), np.zeros_like(residual)
        square = np.einsum("mp,mp->m", residual, residual)
        wanted = TOLERANCE**2 * square
        for _ in range(self.iterations):
            is_open = square > wanted
            if not is_open.any():
                break
            moved = state.lam * direction + curvature_product(state.features, direction)
            steepness = np.einsum("mp,mp->m", direction, moved)
            step = np.divide(square, steepness, out=np.zeros_like(square), where=is_open)[:, None]
            solution += step * direction
            residual -= step * moved
            following = np.einsum("mp,mp->m", residual, residual)
            ratio = np.divide(following, square, out=np.zeros_like(square), where=is_open)[:, None]
            direction = np.where(is_open[:, None], residual + ratio * direction, direction)
            square = np.where(is_open, following, square)
        worst = np.sqrt(np.divide(square, wanted, out=np.zeros_like(square), where=wanted > 0).max()) * TOLERANCE
        if worst > TOLERANCE:
            raise MethodError(
                f"conjugate gradients leave a residual of {worst:.2g} after {self.iterations} iterations",
                expected=f"{TOLERANCE:g} or less",
                fix="raise reduce.iterations, or take a larger reduce.ridge",
            )
        return solution.astype(np.float32)


@dataclass(frozen=True)
class LissaState:
    """What LiSSA needs.

    Attributes:
        features: all rows, to be read again.
        lam: absolute ridge.
        scale: c.
        iterations: as many as `TOLERANCE` needs, or as are allowed.
    """

    features: FeatureRows
    lam: float
    scale: float
    iterations: int

    @property
    def residual(self) -> float:
        """The largest residual that can be left, relative to phi_i: that of a direction without curvature."""
        return float((1 - self.lam / self.scale) ** self.iterations)


@dataclass(frozen=True)
class InfluenceLissa:
    """Influence functions by LiSSA.

    Attributes:
        ridge: lam in units of the mean squared feature norm, positive.
        iterations: most of them.
    """

    ridge: float
    iterations: int

    def init(self, features: FeatureRows) -> LissaState:
        """Measure the unit of the ridge and the largest eigenvalue: `_POWER_STEPS` passes.

        Raises:
            MethodError: all features are zero.
        """
        lam = absolute_ridge(features, self.ridge)
        scale = lam + _POWER_MARGIN * largest_eigenvalue(features)
        needed = int(np.ceil(np.log(TOLERANCE) / np.log1p(-lam / scale)))
        return LissaState(features, lam, scale, min(needed, self.iterations))

    def compute(
        self, state: LissaState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return (lam I + Phi^T Phi)^-1 applied to rows, up to `state.residual`."""
        start = rows.astype(np.float64) / state.scale
        solution = start.copy()
        for _ in range(state.iterations):
            solution += start - (state.lam * solution + curvature_product(state.features, solution)) / state.scale
        return solution.astype(np.float32)


def curvature_product(features: FeatureRows, vectors: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "m p"]:
    """Return Phi^T Phi applied to row vectors, from one pass over all rows, by this process alone."""
    found = np.zeros_like(vectors)
    for _, rows in features.all_blocks():
        wide = rows.astype(np.float64)
        found += (vectors @ wide.T) @ wide
    return found


def largest_eigenvalue(features: FeatureRows) -> float:
    """Estimate the largest eigenvalue of Phi^T Phi from below, by power iteration."""
    vector = stream(0, "power", features.dim).standard_normal((1, features.dim))
    norm = 0.0
    for _ in range(_POWER_STEPS):
        vector = curvature_product(features, vector / np.linalg.norm(vector))
        norm = float(np.linalg.norm(vector))
    return norm
