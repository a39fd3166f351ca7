"""The mean field of the kernel game at one q: how a random subset looks to each player.

Every player is in the subset with probability q. Averages over subsets are replaced by one weighted problem

    P = (lam I + sum_g c_g phi_g phi_g^T)^-1,   s_g = phi_g^T P phi_g,   d_g = s_g / (1 - c_g s_g)

where d_g, the leverage of g without itself, fixes the weight: with m ~ Binomial(k_g, q) copies of a group of k_g equal
players, t = E[m/(1 + m d)], e = E[1/(1 + m d)], c = t/e. For k = 1 this is c = q/(1 + (1-q) d). Groups make exact
duplicates exact: they are the one case where the leverages of two players are tied together.

Iterating d -> s/(1 - c s) alone takes up to 40 rounds near the q where the subsets begin to fill the feature space;
Anderson acceleration of log d needs 3-8. Source: docs/methods.md section 3; Walker and Ni 2011 (Anderson).
"""

from dataclasses import dataclass, fields

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from llmattrib.errors import MethodError

TINY = 1e-300
"""Leverage of a row of zeros, whose value is zero; keeps its logarithm finite."""
_DEPTH = 3  # previous steps that Anderson acceleration combines


@dataclass(frozen=True)
class Sites:
    """Averages over the number m of copies of each group that are in the subset, given d and q.

    With x = m/(1 + m d), t = (x - E[x])/e^2 is how a draw of m departs from the mean field (its T-matrix, E[t] = 0).
    Suffixes _q and _d are partial derivatives.

    Attributes:
        weight: c = E[x]/e.
        empty: e = E[1/(1 + m d)].
        gain: derivative of c in q.
        variance: v = E[t^2].
        skew: E[t^3]/v; 0 where v = 0. For k = 1 the two values of t are the roots of t^2 - skew t - v.
    """

    weight: Float[np.ndarray, " g"]
    empty: Float[np.ndarray, " g"]
    gain: Float[np.ndarray, " g"]
    variance: Float[np.ndarray, " g"]
    variance_q: Float[np.ndarray, " g"]
    variance_d: Float[np.ndarray, " g"]
    skew: Float[np.ndarray, " g"]
    skew_q: Float[np.ndarray, " g"]
    skew_d: Float[np.ndarray, " g"]


def sites(cavity: Float[np.ndarray, " g"], q: float, counts: Int[np.ndarray, " g"]) -> Sites:
    """Average over the copies of each group.

    Args:
        cavity: d, leverage of one copy in the absence of its group.
        q: probability of each copy.
        counts: k, copies in each group.
    """
    table = np.empty((len(fields(Sites)), len(cavity)))
    for rows in (counts == 1, counts > 1):
        if rows.any():
            table[:, rows] = _averages(cavity[rows, None], q, counts[rows, None])
    return Sites(*table)


def _chances(q: float, k: Int[np.ndarray, "g 1"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the chances of m = 0 ... max k copies and their derivatives in q, [g or 1, m] each."""
    if k.max() == 1:
        return np.array([[1 - q, q]]), np.array([[-1.0, 1.0]])
    from scipy.stats import binom  # noqa: PLC0415  (half a second to import, and a query does not need it)

    m = np.arange(k.max() + 1)[None, :]
    return binom.pmf(m, k, q), k * (binom.pmf(m - 1, k - 1, q) - binom.pmf(m, k - 1, q))


def _mean(chance: np.ndarray, values: Float[np.ndarray, "g m"]) -> Float[np.ndarray, "g 1"]:
    return np.asarray(np.sum(chance * values, axis=1, keepdims=True))


def _averages(d: Float[np.ndarray, "g 1"], q: float, k: Int[np.ndarray, "g 1"]) -> Float[np.ndarray, "9 g"]:
    """Return the fields of `Sites` for groups of similar size."""
    chance, chance_q = _chances(q, k)
    m = np.arange(k.max() + 1)[None, :]
    x, absent = m / (1 + m * d), 1 / (1 + m * d)
    center, e = _mean(chance, x), _mean(chance, absent)
    center_q, y, square = _mean(chance_q, x), x - center, x**2
    second, third = _mean(chance, y**2), _mean(chance, y**3)
    second_q, second_d = _mean(chance_q, y**2), -2 * _mean(chance, y * square)
    third_q = _mean(chance_q, y**3) - 3 * second * center_q
    third_d = 3 * _mean(chance, y**2 * (_mean(chance, square) - square))
    log_e_q, log_e_d = _mean(chance_q, absent) / e, -_mean(chance, x * absent) / e
    v = second / e**4
    safe = np.where(second > 0, second, 1)
    skew = third / safe / e**2
    rows = [
        center / e,
        e,
        center_q / e**2,
        v,
        second_q / e**4 - 4 * v * log_e_q,
        second_d / e**4 - 4 * v * log_e_d,
        skew,
        third_q / safe / e**2 - skew * (second_q / safe + 2 * log_e_q),
        third_d / safe / e**2 - skew * (second_d / safe + 2 * log_e_d),
    ]
    return np.concatenate(rows, axis=1).T


@dataclass(frozen=True)
class Field:
    """The mean field at one q.

    Attributes:
        q: the inclusion probability.
        cavity: d.
        sites: averages at d.
        factor: [d, d] lower Cholesky factor L of P^-1.
        whitened: [g, d] rows L^-1 phi_g, whose Gram is Phi P Phi^T.
        num_iterations: solves it took.
    """

    q: float
    cavity: Float[np.ndarray, " g"]
    sites: Sites
    factor: Float[np.ndarray, "d d"]
    whitened: Float[np.ndarray, "g d"]
    num_iterations: int

    def weights(self, responses: Float[np.ndarray, "g c"]) -> Float[np.ndarray, "d c"]:
        """Return the mean-field estimate of E[w_S], in whitened coordinates."""
        return np.asarray(self.whitened.T @ (self.sites.weight[:, None] * responses))

    def unwhiten(self, rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
        """Map whitened rows L^-1 phi to P phi."""
        factor = self.factor.astype(rows.dtype, copy=False)
        solved = scipy.linalg.solve_triangular(factor, rows.T, lower=True, trans="T", check_finite=False)
        return np.ascontiguousarray(solved.T)


def factorize(
    coordinates: Float[np.ndarray, "g d"], weight: Float[np.ndarray, " g"], ridge: float
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "g d"]]:
    """Return the Cholesky factor of lam I + R^T diag(c) R and the whitened rows."""
    scaled = np.sqrt(weight)[:, None] * coordinates
    matrix = scaled.T @ scaled
    matrix[np.diag_indices(len(matrix))] += ridge
    factor = np.linalg.cholesky(matrix)
    whitened = scipy.linalg.solve_triangular(factor, coordinates.T, lower=True, check_finite=False).T
    return factor, whitened


def solve_field(
    coordinates: Float[np.ndarray, "g d"],
    counts: Int[np.ndarray, " g"],
    ridge: float,
    q: float,
    log_cavity: Float[np.ndarray, " g"],
    *,
    tolerance: float,
    max_iterations: int,
) -> Field:
    """Solve the mean field at q.

    Args:
        coordinates: one row a group, float64.
        counts: copies in each group.
        ridge: lam, absolute.
        q: inclusion probability.
        log_cavity: where to start.
        tolerance: largest change of log d in the last round.
        max_iterations: rounds allowed.

    Returns:
        The field; `factor` and `whitened` belong to the last round, within `tolerance` of `cavity`.

    Raises:
        MethodError: it does not converge, or leaves the range of float64.
    """
    x = log_cavity
    points: list[np.ndarray] = []
    steps: list[np.ndarray] = []
    for iteration in range(1, max_iterations + 1):
        with np.errstate(all="ignore"):  # what rounding makes of a leverage near one is found below
            current = sites(np.exp(x), q, counts)
            factor, whitened = factorize(coordinates, current.weight, ridge)
            leverage = np.einsum("gd,gd->g", whitened, whitened)
            step = np.log(np.maximum(leverage, TINY) / (1 - current.weight * leverage)) - x
        if not np.isfinite(step).all():
            raise MethodError(
                f"the mean field at q = {q:.3g} is lost in rounding: a leverage is one or more",
                expected="a ridge that is not lost in rounding beside the Gram matrix",
                fix="take a larger reduce.ridge",
            )
        if np.abs(step).max() <= tolerance:
            cavity = np.exp(x + step)
            return Field(q, cavity, sites(cavity, q, counts), factor, whitened, iteration)
        points, steps = [*points, x][-_DEPTH - 1 :], [*steps, step][-_DEPTH - 1 :]
        x = accelerate(points, steps)
    raise MethodError(
        f"the mean field at q = {q:.3g} has not converged after {max_iterations} rounds",
        expected=f"a change of log leverage below {tolerance:g}",
        fix="take a larger reduce.ridge",
    )


def accelerate(points: list[np.ndarray], steps: list[np.ndarray]) -> Float[np.ndarray, " g"]:
    """Return Anderson's next point from the last points and the plain steps there."""
    latest: Float[np.ndarray, " g"] = points[-1] + steps[-1]
    if len(points) > 1:
        step_changes = np.diff(np.stack(steps), axis=0).T
        point_changes = np.diff(np.stack(points), axis=0).T
        mixing = np.linalg.lstsq(step_changes, steps[-1], rcond=1e-10)[0]
        latest = latest - (point_changes + step_changes) @ mixing
    return latest


def interpolate(u: float, known: dict[float, np.ndarray]) -> Float[np.ndarray, "..."]:
    """Interpolate what is known at some nodes from the (up to four) nearest ones."""
    nearest = sorted(known, key=lambda other: abs(other - u))[:4]
    found = np.zeros_like(known[nearest[0]])
    for node in nearest:
        others = [other for other in nearest if other != node]
        found += np.prod([(u - other) / (node - other) for other in others]) * known[node]
    return found
