"""Any semivalue from one subset table, without a regression.

With P_s the chance that the semivalue asks about s others, q_s that of a size in the design, a subset of size s tells
about every player, in or out:

    value_i = P_{n-1} U(N) - P_0 U(empty) + E[ U(S) (in: P_{s-1} n/(s q_s),  out: -P_s n/((n-s) q_s)) ],   1 <= s <= n-1

Unbiased for any design that draws all sizes. What U owes to the size alone is taken out first by a polynomial in
arcsin sqrt(s/n), fitted for each row to the other rows, so that estimates stay unbiased, and added back exactly. The
design by size is made for it; a design that hardly draws the sizes asked about is refused: no standard error could
warn of what was never seen.

Banzhaf values from subsets with p = 1/2 are simply the mean with the player less the mean without (maximum sample
reuse, MSR), which is exact about the chances of its own rows.

Standard errors are those of independent rows; n sizes and m rows cost O(m n q).
Sources: Wang and Jia 2022 (arXiv 2205.15466); Li and Yu 2024 (One Sample Fits All, NeurIPS), for the design.
"""

from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.estimators.quadrature import Semivalue, clenshaw_curtis
from llmattrib.games.subset_table import SIZES, Design, SubsetRows, size_chances

DEGREE = 4
"""Of the polynomial in the size."""
MOST_WASTE = 100.0
"""Mean squared weight of a row, over that of the design by size, above which estimates are refused."""


@dataclass(frozen=True)
class TableValues:
    """Values read from a table.

    Attributes:
        values: [n, q].
        standard_errors: [n, q].
    """

    values: Float[np.ndarray, "n q"]
    standard_errors: Float[np.ndarray, "n q"]


def msr_banzhaf(rows: SubsetRows) -> TableValues:
    """Estimate Banzhaf values from rows with p = 1/2.

    Raises:
        MethodError: rows have another p, or a player is in nearly all or nearly none of them.
    """
    if (rows.p != 0.5).any() or rows.design.by_size:
        raise MethodError(f"design {rows.design.name} is not of Banzhaf", expected="subsets with p = 1/2")
    inside = rows.members.astype(np.float64)
    means, variances = [], []
    for chosen in (inside, 1 - inside):
        counts = chosen.sum(axis=0)[:, None]
        if counts.min() < 2:
            found = f"a player is on one side of {len(inside)} subsets fewer than twice"
            raise MethodError(found, expected="two subsets with and two without each player", fix="draw more subsets")
        centered = rows.utilities - rows.utilities.mean(axis=0)
        mean = chosen.T @ centered / counts
        means.append(mean)
        variances.append((chosen.T @ centered**2 / counts - mean**2).clip(0) / (counts - 1))
    return TableValues(means[0] - means[1], np.sqrt(variances[0] + variances[1]))


def size_weights(semivalue: Semivalue, num_players: int) -> Float[np.ndarray, " n"]:
    """Return the chance P_s that a semivalue asks about s = 0 ... n - 1 others."""
    others, size = num_players - 1, np.arange(num_players)
    weights = np.zeros(num_players)
    for q, weight in semivalue.points:
        weights += weight * scipy.stats.binom.pmf(size, others, q)
    if semivalue.beta is not None:
        weights += scipy.stats.betabinom.pmf(size, others, *semivalue.beta)
    return weights


def drawn_sizes(design: Design, num_players: int) -> Float[np.ndarray, " k"]:
    """Return the chance q_s of each size s = 0 ... n in a design."""
    size = np.arange(num_players + 1)
    if design.by_size:
        return np.concatenate([[0.0], size_chances(num_players), [0.0]])
    if design.points:
        return np.asarray(np.mean([scipy.stats.binom.pmf(size, num_players, p) for p in design.points], axis=0))
    assert design.truncation is not None
    u, weights = clenshaw_curtis(512)
    edge = np.log(1 / design.truncation - 1)
    p = 1 / (1 + np.exp(-edge * (2 * u - 1)))
    return np.asarray(weights @ scipy.stats.binom.pmf(size[None], num_players, p[:, None]))


def table_values(
    rows: SubsetRows,
    semivalue: Semivalue,
    empty: Float[np.ndarray, " q"],
    full: Float[np.ndarray, " q"],
) -> TableValues:
    """Estimate a semivalue from rows of one design.

    Args:
        rows: of one design of a subset table.
        semivalue: Shapley, Banzhaf, Beta-Shapley, leave-one-out or AME(P).
        empty: U of nobody.
        full: U of everybody.

    Raises:
        MethodError: there are too few rows.
    """
    n, size = rows.num_players, rows.members.sum(axis=1)
    inner, total = (size > 0) & (size < n), len(size)
    if inner.sum() < 4 * (DEGREE + 1):
        raise MethodError(
            f"{inner.sum()} subsets are neither empty nor full",
            expected=f"at least {4 * (DEGREE + 1)}",
            fix="draw more subsets",
        )
    asked, drawn = size_weights(semivalue, n), drawn_sizes(rows.design, n)
    waste = _spread(asked, drawn) / _spread(asked, drawn_sizes(SIZES, n))
    if waste > MOST_WASTE:
        raise MethodError(
            f"design {rows.design.name} hardly draws the sizes that {semivalue.name} asks about",
            expected=f"at most {MOST_WASTE:g} times the subsets of the design {SIZES.name}, found {waste:.1e}",
            fix=f"fill rows of the design {SIZES.name}",
        )
    s, members = size[inner], rows.members[inner]
    residual, back = _without_size(rows.utilities[inner], s, asked, total)
    into, out = asked[s - 1] * n / (s * drawn[s]), asked[s] * n / ((n - s) * drawn[s])
    weights = np.where(members, into[:, None], -out[:, None])
    mean = weights.T @ residual / total
    error = np.sqrt(((weights**2).T @ residual**2 / total - mean**2).clip(0) / (total - 1))
    return TableValues(mean + back + asked[-1] * full - asked[0] * empty, error)


def _spread(asked: Float[np.ndarray, " n"], drawn: Float[np.ndarray, " k"]) -> float:
    """Return the mean squared weight of a row; infinite when a size that is asked about is never drawn."""
    n = len(asked)
    s = np.arange(1, n)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        terms = (asked[s - 1] ** 2 * n / s + asked[s] ** 2 * n / (n - s)) / drawn[s]
    return float(np.nan_to_num(terms, nan=0.0, posinf=np.inf).sum())


def _without_size(
    utilities: Float[np.ndarray, "m q"], size: np.ndarray, asked: Float[np.ndarray, " n"], total: int
) -> tuple[Float[np.ndarray, "m q"], Float[np.ndarray, " q"]]:
    """Return utilities less f(size), f fitted to the other rows, and the mean of sum_s f(s) (P_{s-1} - P_s)."""
    n = len(asked)
    every = np.arange(1, n)
    basis, _ = np.linalg.qr(np.polynomial.legendre.legvander(4 / np.pi * np.arcsin(np.sqrt(every / n)) - 1, DEGREE))
    rows = basis[size - 1]
    inverse = np.linalg.pinv(rows.T @ rows, hermitian=True)
    whole = inverse @ (rows.T @ utilities)
    leverage = np.einsum("md,de,me->m", rows, inverse, rows)[:, None]
    residual = (utilities - rows @ whole) / np.maximum(1 - leverage, 1e-6)
    asks = basis.T @ (asked[every - 1] - asked[every])
    return residual, asks @ whole - (rows @ inverse @ asks) @ residual / total
