"""Gradient scorers: Grad-Dot, Grad-Cos, influence functions and TRAK, as representers.

    grad_dot    v_i = phi_i
    grad_cos    v_i = phi_i / |phi_i|                              (the query is scaled to unit norm too)
    influence   v_i = (lam I + Phi^T Phi)^-1 phi_i                 lam = ridge * mean |phi|^2
    trak        v_i = (1 - p_i) (lam I + Phi^T Phi)^-1 phi_i

Signs: features of a loss and of a log-odds differ in sign on both sides of the inner product, so a positive score
always means that training on i raises the log-probability of the query's answer.

Each scorer is a frozen dataclass: `init` reads the features once and returns a state, `compute` maps a block of rows
to a block of representers. The Gram matrix is accumulated in float64 over blocks; no array is n x p, except that for
n < p the rows are rotated into their n dimensions, which takes less than a p x p matrix.
The rest of the family: datainf.py, iterative.py, spectral.py.
Sources: Pruthi et al. 2020 (TracIn), Koh and Liang 2017, Park et al. 2023 (TRAK); docs/methods.md section 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy.special import expit

from llmattrib.errors import MethodError
from llmattrib.games.kernel import FeatureRows

State = TypeVar("State")
SQUARABLE = (1e-15, 1e15)
"""Norms of rows whose squares float32 holds; others are scaled before they are squared."""


@runtime_checkable
class Scorer(Protocol[State]):
    """What every gradient scorer offers."""

    def init(self, features: FeatureRows) -> State:
        """Do what needs all features."""
        ...

    def compute(
        self, state: State, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the representers of a block of rows, float32."""
        ...


@dataclass(frozen=True)
class GradDot:
    """Inner product of gradients."""

    def init(self, features: FeatureRows) -> None:
        """Need nothing."""

    def compute(
        self, state: None, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the rows themselves."""
        return rows


@dataclass(frozen=True)
class GradCos:
    """Cosine of gradients; queries must be scaled by `unit_rows` too.

    Attributes:
        members: as `unit_rows` takes them.
    """

    members: tuple[int, ...] = ()

    def init(self, features: FeatureRows) -> None:
        """Need nothing."""

    def compute(
        self, state: None, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return unit rows; rows of zeros stay zero."""
        return unit_rows(rows, self.members)


@dataclass(frozen=True)
class InverseState:
    """The factored curvature.

    Attributes:
        basis: [p, d] of the row space, or None when d = p.
        factor: [d, d] lower Cholesky factor of lam I + Gram.
    """

    basis: Float[np.ndarray, "p d"] | None
    factor: Float[np.ndarray, "d d"]


@dataclass(frozen=True)
class Influence:
    """Influence function with the empirical curvature of the features.

    Attributes:
        ridge: lam in units of the mean squared feature norm, positive.
    """

    ridge: float

    def init(self, features: FeatureRows) -> InverseState:
        """Factor the curvature.

        Raises:
            MethodError: all features are zero, or the matrix does not fit the memory.
        """
        return InverseState(features.basis, _factor(features, self.ridge))

    def compute(
        self, state: InverseState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return (lam I + Phi^T Phi)^-1 applied to rows of the training features."""
        return _solve(state, rows).astype(np.float32)


@dataclass(frozen=True)
class Trak:
    """TRAK of one model: influence weighted by how far the example is from certain.

    Attributes:
        ridge: lam in units of the mean squared feature norm, positive.
        weighted: whether to multiply by 1 - p_i. Features of output `loss` carry that factor in their gradient
            already: set False, and TRAK is then the influence function.
    """

    ridge: float
    weighted: bool = True

    def init(self, features: FeatureRows) -> InverseState:
        """Factor the curvature.

        Raises:
            MethodError: all features are zero, or the matrix does not fit the memory.
        """
        return InverseState(features.basis, _factor(features, self.ridge))

    def compute(
        self, state: InverseState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return (1 - p_i) (lam I + Phi^T Phi)^-1 phi_i, p_i = sigmoid(log_odds_i)."""
        solved = _solve(state, rows)
        if self.weighted:
            solved *= expit(-log_odds.astype(np.float64))[:, None]
        return solved.astype(np.float32)


def unit_rows(rows: Float[np.ndarray, "*shape p"], members: Sequence[int] = ()) -> Float[np.ndarray, "*shape p"]:
    """Scale rows to unit norm; zeros stay zero.

    Args:
        rows: the features.
        members: columns of each of several adapters, side by side. Each adapter's part gets the same norm, so that an
            inner product of rows is the mean of the adapters' cosines; else the one with the largest gradients decides.
    """
    if len(members) > 1:
        parts = np.split(rows, np.cumsum(members)[:-1], axis=-1)
        scale = np.asarray(len(members) ** 0.5, rows.dtype)
        return np.concatenate([unit_rows(part) / scale for part in parts], axis=-1)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    is_usual = (norms > SQUARABLE[0]) & (norms < SQUARABLE[1])
    unit = np.asarray(rows / np.where(is_usual, norms, 1))
    if not is_usual.all():
        odd = ~is_usual[..., 0]
        largest = np.abs(rows[odd]).max(axis=-1, keepdims=True)
        scaled = rows[odd] / np.where(largest > 0, largest, 1)
        unit[odd] = scaled / np.maximum(np.linalg.norm(scaled, axis=-1, keepdims=True), 1)
    return unit


def absolute_ridge(features: FeatureRows, ridge: float) -> float:
    """Return lam = ridge * mean |phi|^2.

    Raises:
        MethodError: all features are zero.
    """
    lam = ridge * features.mean_square
    if lam <= 0:
        raise MethodError(
            "all features are zero, so a ridge relative to them is zero too",
            expected="examples whose gradients differ",
            fix="set reduce.center=false if there is one example or all are equal; else check features.output",
        )
    return lam


def _factor(features: FeatureRows, ridge: float) -> Float[np.ndarray, "d d"]:
    matrix = features.gram.copy()
    matrix[np.diag_indices(len(matrix))] += absolute_ridge(features, ridge)
    return np.linalg.cholesky(matrix)


def _solve(state: InverseState, rows: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "m p"]:
    wide = rows.astype(np.float64)
    if state.basis is not None:
        wide = wide @ state.basis
    solved = scipy.linalg.cho_solve((state.factor, True), wide.T, check_finite=False).T
    return np.asarray(solved if state.basis is None else solved @ state.basis.T)
