"""T-step influence: what T steps of gradient descent make of an example, instead of what infinitely many would.

    v_i = U diag(f(h)) U^T phi_i,   f(h) = (1 - (1 - eta h)^T) / h,   Phi^T Phi = U diag(h) U^T

Gradient descent on the squared error of a linear model, theta <- theta - eta Phi^T (Phi theta - y), moves from 0 in T
steps to sum_i y_i v_i: v_i is the derivative with respect to the target of i. At T = 1 it is eta phi_i, the inner
product of gradients; for T to infinity Phi^+ of the least-squares solution, influence without a ridge; between them
about influence with lam = 1/(eta T). eta = rate / sum_j |phi_j|^2, so that no rate up to 1 can overshoot.

Limits: holds the d x d Gram, d = min(n, p), and its eigenvectors.
Source: docs/methods.md section 4; gradient flow as a spectral filter, Ali et al. 2019 (arXiv 1810.10082).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.games.kernel import FeatureRows
from llmattrib.scorers.gradient import absolute_ridge


@dataclass(frozen=True)
class SpectralState:
    """The filter of the curvature.

    Attributes:
        basis: [p, d] of the row space, or None when d = p.
        filtered: [d, d] U diag(f) U^T.
    """

    basis: Float[np.ndarray, "p d"] | None
    filtered: Float[np.ndarray, "d d"]


@dataclass(frozen=True)
class Spectral:
    """Influence of T steps of gradient descent.

    Attributes:
        steps: T, at least 1.
        rate: eta in units of 1 / sum_j |phi_j|^2, positive.
    """

    steps: int
    rate: float

    def init(self, features: FeatureRows) -> SpectralState:
        """Filter the curvature.

        Raises:
            MethodError: all features are zero, the descent diverges, or the Gram does not fit the memory.
        """
        eta = self.rate / (features.num_rows * absolute_ridge(features, 1.0))
        values, vectors = np.linalg.eigh(features.gram)
        if eta * values[-1] > 2:
            raise MethodError(
                f"gradient descent diverges at rate {self.rate:g}: it overshoots by {eta * values[-1] - 1:.3g} a step",
                expected=f"at most {2 * self.rate / (eta * values[-1]):.6g}, which these features allow",
                fix="name a smaller rate and more steps in spectral(T,rate)",
            )
        return SpectralState(features.basis, (vectors * descent_filter(values, eta, self.steps)) @ vectors.T)

    def compute(
        self, state: SpectralState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the representers of rows of the training features."""
        wide = rows.astype(np.float64)
        if state.basis is None:
            return np.asarray(wide @ state.filtered, np.float32)
        return np.asarray(wide @ state.basis @ state.filtered @ state.basis.T, np.float32)


def descent_filter(values: Float[np.ndarray, " d"], eta: float, steps: int) -> Float[np.ndarray, " d"]:
    """Return (1 - (1 - eta h)^T) / h, accurate for small h too; eta T where h is zero to rounding.

    Args:
        values: h, eigenvalues of a positive semidefinite matrix; rounding may have made them negative.
        eta: step size.
        steps: T.
    """
    h = np.maximum(values, 0.0)
    is_flat = h <= np.finfo(np.float64).eps * h.max(initial=0.0)
    safe = np.where(is_flat, 1.0, h)
    small = -np.expm1(steps * np.log1p(-np.minimum(eta * safe, 0.5)))
    gone = np.where(eta * safe < 0.5, small, 1 - (1 - eta * safe) ** steps)
    return np.where(is_flat, eta * steps, gone / safe)
