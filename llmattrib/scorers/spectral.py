"""T-step influence: what T steps of gradient descent make of an example, instead of what infinitely many would.

    v_i = e_i U diag(f(h)) U^T phi_i,   f(h) = (1 - (1 - eta h)^T) / h,   Phi^T diag(c) Phi = U diag(h) U^T

Gradient descent on the mean loss moves a small change of the parameters by I - eta H / n a step, H the Gauss-Newton
curvature: with phi the gradient of a log-odds c_i = p_i (1 - p_i), and what i adds in each step is e_i = 1 - p_i along
phi_i. Features of a loss are -(1 - p_i) times these: c_i = p_i / (1 - p_i), e_i = 1. The reader scales the rows by
sqrt(c_i) before they come here (reader.py, `curved`); with c = e = 1 it is descent on the squared error of a linear
model, theta <- theta - eta Phi^T (Phi theta - y), and v_i the derivative of its end with respect to the target of i.

At T = 1 it is the inner product of gradients of the loss, times eta; for T to infinity influence without a ridge;
between them about influence with lam = 1/(eta T). eta = rate / sum_j c_j |phi_j|^2, so that no rate up to 1 can
overshoot; steps of size s on the mean loss have eta = s/n, `relative_rate`.

Limits: holds the d x d Gram, d = min(n, p), and its eigenvectors.
Source: docs/methods.md section 4; gradient flow as a spectral filter, Ali et al. 2019 (arXiv 1810.10082).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

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
        rate: eta in units of 1 / sum_j c_j |phi_j|^2, positive.
        weighted: whether to multiply by e_i = 1 - p_i. Features of output `loss` carry that factor in their gradient
            already.
    """

    steps: int
    rate: float
    weighted: bool = False

    def init(self, features: FeatureRows) -> SpectralState:
        """Filter the curvature of rows that are scaled by sqrt(c_i).

        Raises:
            MethodError: all features are zero, the descent diverges, or the Gram does not fit the memory.
        """
        eta = self.rate / (features.num_rows * absolute_ridge(features, 1.0))
        values, vectors = np.linalg.eigh(features.gram)
        if eta * values[-1] > 2:
            raise MethodError(
                f"gradient descent diverges at rate {self.rate:g}: it overshoots by {eta * values[-1] - 1:.3g} a step",
                expected=f"at most {2 * self.rate / (eta * values[-1]):.6g}, which these features allow",
                fix="take a smaller rate and more steps, in spectral(T,rate) or gold.learning_rate",
            )
        return SpectralState(features.basis, (vectors * descent_filter(values, eta, self.steps)) @ vectors.T)

    def compute(
        self, state: SpectralState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the representers of rows of the training features, unscaled; p_i = sigmoid(log_odds_i)."""
        wide = rows.astype(np.float64)
        if self.weighted:
            wide *= expit(-log_odds.astype(np.float64))[:, None]
        if state.basis is None:
            return np.asarray(wide @ state.filtered, np.float32)
        return np.asarray(wide @ state.basis @ state.filtered @ state.basis.T, np.float32)


def relative_rate(features: FeatureRows, step: float) -> float:
    """Return the rate of steps of an absolute size on the mean loss, given rows that are scaled by sqrt(c_i)."""
    return step * features.mean_square


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
