"""Pair correction of the mean field: two players at a time are averaged exactly.

For any reference weights c the random subset obeys w_S - w = P Phi^T T r with the scattering matrix
T = (diag(z - c)^-1 + K)^-1, K = Phi P Phi^T, r = y - Phi w. The mean field chooses c so that the mean of every single
player vanishes; what it leaves out begins with two players scattering between each other,

    E[T]_ij = -K_ij^3 v_i v_j (1 - v_i v_j L^2) / R        E[T]_ii = sum_j L^2 v_i v_j (s_i + L s_j v_i) / R
    R = 1 - L s_i s_j - L^2 (v_j s_i^2 + 2 v_i v_j + v_i s_j^2) - L^3 s_i s_j v_i v_j + L^4 v_i^2 v_j^2

with L = K_ij^2, v and s the variance and skew of a player's t (`fixed_point.Sites`); exact for two-valued t, so for
single players, and right to third moments for groups of copies. Triples are left out. F = w + P Phi^T E[T] r is exact
at q = 0 and q = 1, so its total gradient keeps the sum rule. This file differentiates F with c, v, s and K free;
`mean_field` adds the response of the fixed point.

Rows are done in blocks: memory O(n d + block), time about 12 n^2 d flops and 100 elementwise operations on n^2 pairs.
Source: the coherent-potential approximation and its pair (cluster) correction, Gonis 1992, chapter 4.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmattrib.estimators.fixed_point import Sites

_BLOCK = 1 << 16  # pairs handled together: arrays that fit the second-level cache


@dataclass(frozen=True)
class PairGradient:
    """Derivatives of F in the parameters of each player, as whitened representers.

    Attributes:
        weight: by c, K moving with it; includes the mean field's own r_i P phi_i.
        variance: by v.
        skew: by s.
    """

    weight: Float[np.ndarray, "g d"]
    variance: Float[np.ndarray, "g d"]
    skew: Float[np.ndarray, "g d"]


@dataclass(frozen=True)
class _Scattering:
    """E[T] between a block of players (rows) and all (columns), off the diagonal, and its derivatives.

    `hop` is E[T]_ij and `stay` the j-th term of E[T]_ii. Suffixes: _k by K_ij, _v1, _s1 by v_i, s_i, _v2, _s2 by v_j,
    s_j.
    """

    hop: np.ndarray
    hop_k: np.ndarray
    hop_v1: np.ndarray
    hop_v2: np.ndarray
    hop_s1: np.ndarray
    hop_s2: np.ndarray
    stay: np.ndarray
    stay_k: np.ndarray
    stay_v1: np.ndarray
    stay_v2: np.ndarray
    stay_s1: np.ndarray
    stay_s2: np.ndarray


def _scatter(
    k: Float[np.ndarray, "m g"],
    v1: Float[np.ndarray, "m 1"],
    s1: Float[np.ndarray, "m 1"],
    v2: Float[np.ndarray, "1 g"],
    s2: Float[np.ndarray, "1 g"],
) -> _Scattering:
    """Evaluate the formulas of the module."""
    x = k * k
    vv, ss = v1 * v2, s1 * s2
    xx, xvv = x * x, x * vv
    mixed = v2 * s1**2 + 2 * vv + v1 * s2**2
    r = 1 - x * ss - xx * (mixed + xvv * ss - xvv * xvv)
    r_x = -ss - x * (2 * mixed + 3 * xvv * ss - 4 * xvv * xvv)
    r_v1 = -xx * (2 * v2 + s2**2 + x * ss * v2 - 2 * xvv * x * v2)
    r_v2 = -xx * (2 * v1 + s1**2 + x * ss * v1 - 2 * xvv * x * v1)
    r_s1 = -x * (s2 * (1 + x * xvv) + 2 * x * v2 * s1)
    r_s2 = -x * (s1 * (1 + x * xvv) + 2 * x * v1 * s2)
    ratio = 1 / r
    hop = -xvv * (1 - x * xvv) * ratio  # E[T]_ij / K_ij
    hop_x = (-vv + 3 * xvv * xvv - hop * r_x) * ratio
    bent = s1 + x * s2 * v1
    stay = x * xvv * bent * ratio
    stay_x = (xvv * (2 * s1 + 3 * x * s2 * v1) - stay * r_x) * ratio
    hop_slope = -x + 2 * xx * xvv
    return _Scattering(
        hop=k * hop,
        hop_k=hop + 2 * x * hop_x,
        hop_v1=k * (hop_slope * v2 - hop * r_v1) * ratio,
        hop_v2=k * (hop_slope * v1 - hop * r_v2) * ratio,
        hop_s1=-k * hop * r_s1 * ratio,
        hop_s2=-k * hop * r_s2 * ratio,
        stay=stay,
        stay_k=2 * k * stay_x,
        stay_v1=(xx * v2 * (s1 + 2 * x * s2 * v1) - stay * r_v1) * ratio,
        stay_v2=(xx * v1 * bent - stay * r_v2) * ratio,
        stay_s1=(xx * vv - stay * r_s1) * ratio,
        stay_s2=(x * xx * vv * v1 - stay * r_s2) * ratio,
    )


def pair_gradient(whitened: Float[np.ndarray, "g d"], sites: Sites, residual: Float[np.ndarray, " g"]) -> PairGradient:
    """Differentiate F by every player's weight, variance and skew.

    Args:
        whitened: rows whose Gram is K.
        sites: v and s of every player.
        residual: r.
    """
    rows, r = whitened, residual[:, None]
    v, s = sites.variance.astype(rows.dtype)[:, None], sites.skew.astype(rows.dtype)[:, None]
    by_weight, by_variance, by_skew = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
    scattered, correction = np.empty_like(rows), np.empty_like(r)  # E[T] rows, E[T] r
    step = max(1, _BLOCK // len(rows))
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        k = rows[here] @ rows.T
        own = k.copy()
        own[np.arange(len(k)), np.arange(start, start + len(k))] = 0  # a player does not scatter off itself
        t = _scatter(own, v[here], s[here], v.T, s.T)
        stay = t.stay.sum(axis=1, keepdims=True)
        scattered[here] = t.hop @ rows + stay * rows[here]
        correction[here] = t.hop @ r + stay * r[here]
        moved = t.hop_k * r.T + t.stay_k * r[here]
        by_weight -= (k * (moved @ rows @ rows.T)).T @ rows[here]
        by_variance += (t.hop_v2 * r.T + t.stay_v2 * r[here]).T @ rows[here]
        by_variance[here] += (t.hop_v1 @ r + t.stay_v1.sum(axis=1, keepdims=True) * r[here]) * rows[here]
        by_skew += (t.hop_s2 * r.T + t.stay_s2 * r[here]).T @ rows[here]
        by_skew[here] += (t.hop_s1 @ r + t.stay_s1.sum(axis=1, keepdims=True) * r[here]) * rows[here]
    by_weight += (r - rows @ (rows.T @ correction)) * rows - r * (rows @ (rows.T @ scattered))
    return PairGradient(by_weight, by_variance, by_skew)
