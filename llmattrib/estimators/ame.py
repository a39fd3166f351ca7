"""Average marginal effects by regression on a subset table: many players, few of which matter.

    AME_i(P) = E_{p ~ P} E_{S ~ Bernoulli(p)} [U(S + i) - U(S - i)]

Regress utilities on one feature a player, with mean 0 given p and independent of the other players given p, so that
each coefficient is a multiple of the player's AME whatever the game:

    p on points           x = 1/p (in), -1/(1-p) (out)    AME = coefficient * v,  v = E[1/(p(1-p))]
    logit p uniform       x = z - p                       AME = coefficient: p is then uniform on (eps, 1 - eps)

The first is made for sparse effects, the second for Shapley values, biased by the truncation: 1/3 for each of three
players that decide by majority becomes .33993 at eps = .01 and .39333 at .1, so values do not sum to U(N) - U(empty).

LASSO chooses who matters. Its penalty is found by cross-validation over interleaved folds (rows are independent), the
largest whose error is within one standard error of the best. What U owes to p alone is taken out first: columns for
buckets of p, unpenalised, by projecting utilities and features. LASSO shrinks: ranks are better than sizes.

Cost: a Gram matrix of n x n for each fold and all queries, a path of coordinate descent for each fold and query; m
about 10 k log2 n rows for k effects. On dense games (all players matter a little) take the subset or
permutation sampler.
Source: Lin et al. 2022 (arXiv 2206.10013), whose code leaves out the factor v: ranks agree, scales do not.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path

from llmattrib.errors import MethodError
from llmattrib.games.subset_table import Design, SubsetRows
from llmattrib.progress import Progress, silent

Rule = Literal["one_standard_error", "minimum", "unpenalized"]
BUCKETS = 20
"""Buckets of p where it is continuous."""
_ROUNDING = 1e-12  # of a column's largest entry: less than this is no change of it


def player_features(
    design: Design, members: np.ndarray, p: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, "m n"], float]:
    """Return the feature of each player in each row, and what its coefficient is to be multiplied by.

    Args:
        design: how the rows were drawn.
        members: [m, n] bool.
        p: [m].

    Raises:
        MethodError: players are not independent given p.
    """
    p = p[:, None]
    if design.truncation is not None:
        return members - p, 1.0
    if not design.points:
        raise MethodError(f"design {design.name} draws sizes", expected="a design that draws p")
    return np.where(members, 1 / p, -1 / (1 - p)), float(np.mean([1 / (q * (1 - q)) for q in design.points]))


def p_buckets(design: Design, p: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Return the bucket of each row: its point, or one of at most 20 equal parts of the axis of logit p."""
    if design.points:
        return np.unique(p, return_inverse=True)[1]
    assert design.truncation is not None
    edge = np.log(1 / design.truncation - 1)
    place = (np.log(p / (1 - p)) / edge + 1) / 2
    num_buckets = min(BUCKETS, max(1, len(p) // BUCKETS))
    return np.unique(np.clip((place * num_buckets).astype(int), 0, num_buckets - 1), return_inverse=True)[1]


def residualize(columns: Float[np.ndarray, "m k"], bucket: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m k"]:
    """Subtract from each column its mean in each bucket: the projection that leaves bucket columns unpenalised.

    What is left of a column is exactly zero where it is rounding: of a utility that never changes, and LASSO would look
    for effects in the rounding.
    """
    counts, first = np.bincount(bucket), np.unique(bucket, return_index=True)[1]
    shifted = columns - columns[first][bucket]  # the sum of many equal numbers has an error that grows with their count
    sums = np.zeros((len(counts), columns.shape[1]))
    np.add.at(sums, bucket, shifted)
    rest = shifted - (sums / counts[:, None])[bucket]
    is_rounding = np.abs(rest).max(axis=0) <= _ROUNDING * np.abs(columns).max(axis=0)
    return np.where(is_rounding, 0.0, rest)


@dataclass(frozen=True)
class AmeResult:
    """Average marginal effects.

    Attributes:
        values: [n, q] AME of each player in each utility.
        penalties: [q] LASSO penalty that was chosen, 0 without one.
        num_selected: [q] players with an effect that is not 0.
        cv_errors: [q, k] mean squared error of the folds at each penalty of the path; k = 0 without one.
    """

    values: Float[np.ndarray, "n q"]
    penalties: Float[np.ndarray, " q"]
    num_selected: Int[np.ndarray, " q"]
    cv_errors: Float[np.ndarray, "q k"]


@dataclass(frozen=True)
class AmeRegression:
    """The estimator.

    Attributes:
        rule: which penalty of the path; `unpenalized` is least squares, for tables of more rows than players.
        num_folds: of the cross-validation.
        num_penalties: length of the path.
        smallest: last penalty of the path over the first, at which everything is 0.
        max_iterations: sweeps of coordinate descent allowed for one penalty.
    """

    rule: Rule = "one_standard_error"
    num_folds: int = 5
    num_penalties: int = 40
    smallest: float = 1e-2
    max_iterations: int = 10_000

    def init(self, rows: SubsetRows, progress: Progress = silent) -> AmeResult:
        """Estimate all effects.

        Args:
            rows: of one design of a subset table.
            progress: called with (utilities done, utilities).

        Raises:
            MethodError: the design draws no p, there are too few rows, or coordinate descent does not converge.
        """
        features, scale = player_features(rows.design, rows.members, rows.p)
        result = self.regress(features, rows.utilities, p_buckets(rows.design, rows.p), progress)
        values = scale * result.values
        return AmeResult(values, result.penalties, result.num_selected, result.cv_errors)

    def regress(
        self,
        features: Float[np.ndarray, "m k"],
        utilities: Float[np.ndarray, "m q"],
        bucket: Int[np.ndarray, " m"],
        progress: Progress = silent,
    ) -> AmeResult:
        """Return plain coefficients of features, buckets unpenalised.

        Raises:
            MethodError: there are too few rows, or coordinate descent does not converge.
        """
        num_rows, num_columns = features.shape
        wanted = num_columns + int(bucket.max()) + 2 if self.rule == "unpenalized" else 2 * self.num_folds
        if num_rows < wanted:
            raise MethodError(
                f"{num_rows} subsets are too few for the rule {self.rule} with {num_columns} columns",
                expected=f"at least {wanted}",
                fix="draw more subsets, or let LASSO choose (rule one_standard_error)",
            )
        x, y = residualize(features, bucket), residualize(utilities, bucket)
        if self.rule == "unpenalized":
            coefficients = np.asarray(scipy.linalg.lstsq(x, y)[0])
            zeros, errors = np.zeros(y.shape[1]), np.zeros((y.shape[1], 0))
        else:
            coefficients, zeros, errors = self._penalized(x, y, progress)
        return AmeResult(coefficients, zeros, np.count_nonzero(coefficients, axis=0), errors)

    def _penalized(
        self, x: Float[np.ndarray, "m k"], y: Float[np.ndarray, "m q"], progress: Progress
    ) -> tuple[Float[np.ndarray, "k q"], Float[np.ndarray, " q"], Float[np.ndarray, "q l"]]:
        """Return coefficients, penalties and errors along the path."""
        num_rows, num_queries = y.shape
        fold = np.arange(num_rows) % self.num_folds
        grams, targets = zip(
            *((x[fold == f].T @ x[fold == f], x[fold == f].T @ y[fold == f]) for f in range(self.num_folds)),
            strict=True,
        )
        gram, target = sum(grams), sum(targets)
        chosen, penalties = np.zeros((x.shape[1], num_queries)), np.zeros(num_queries)
        errors = np.zeros((num_queries, self.num_penalties))
        for query in range(num_queries):
            top = np.abs(target[:, query]).max() / num_rows
            if top == 0:  # nothing depends on anybody
                continue
            path = top * np.geomspace(1, self.smallest, self.num_penalties)
            squares = np.empty((self.num_folds, self.num_penalties))
            for f in range(self.num_folds):
                inside = fold != f
                found = self._path(x[inside], y[inside, query], path, gram - grams[f], (target - targets[f])[:, query])
                squares[f] = np.mean((y[~inside, query, None] - x[~inside] @ found) ** 2, axis=0)
            errors[query] = squares.mean(axis=0)
            best = int(np.argmin(errors[query]))
            if self.rule == "one_standard_error":
                spread = squares[:, best].std(ddof=1) / np.sqrt(self.num_folds)
                best = int(np.argmax(errors[query] <= errors[query, best] + spread))
            chosen[:, query] = self._path(x, y[:, query], path[: best + 1], gram, target[:, query])[:, -1]
            penalties[query] = path[best]
            progress(query + 1, num_queries)
        return chosen, penalties, errors

    def _path(
        self,
        x: Float[np.ndarray, "m k"],
        y: Float[np.ndarray, " m"],
        penalties: Float[np.ndarray, " l"],
        gram: Float[np.ndarray, "k k"],
        target: Float[np.ndarray, " k"],
    ) -> Float[np.ndarray, "k l"]:
        """Return coefficients at each penalty."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                found = lasso_path(
                    x, y, alphas=penalties, precompute=gram, Xy=target, max_iter=self.max_iterations, tol=1e-5
                )
        except ConvergenceWarning as error:
            raise MethodError(
                f"LASSO on {len(y)} subsets of {x.shape[1]} columns did not converge",
                expected=f"convergence in {self.max_iterations} sweeps",
                fix="draw more subsets, or take a shorter path (smallest = 0.05)",
            ) from error
        return np.asarray(found[1])


@dataclass(frozen=True)
class Knockoffs:
    """Selection of players with an effect, at a bounded false-discovery rate.

    Each player gets a knockoff, a column drawn with the same p that no utility has seen; b and b~ are their LASSO
    coefficients, W = max(b, 0) - max(b~, 0), and the threshold is the smallest t with

        (1 + number of W <= -t) / number of W >= t  <=  rate

    (knockoff+ of Barber and Candes 2015). The expected share of players without any effect among the selected is then
    at most `rate`, for any game and any number of rows, as the true distribution of S given p is known (Candes et al.
    2018). At least 1/rate players are selected, or none.

    Attributes:
        rate: of false discoveries.
        harmful: look for players that lower the utility instead.
        regression: how b is found; the penalty of least error has most power.
    """

    rate: float = 0.1
    harmful: bool = False
    regression: AmeRegression = AmeRegression(rule="minimum")

    def init(self, rows: SubsetRows, progress: Progress = silent) -> Bool[np.ndarray, "n q"]:
        """Return which players are selected in each utility.

        Raises:
            MethodError: as `AmeRegression.init`.
        """
        players, _ = player_features(rows.design, rows.members, rows.p)
        copies, _ = player_features(rows.design, rows.dummies(), rows.p)
        both = np.concatenate([players, copies], axis=1)
        sign = -1.0 if self.harmful else 1.0
        result = self.regression.regress(both, sign * rows.utilities, p_buckets(rows.design, rows.p), progress)
        positive = np.maximum(result.values, 0)
        statistics = positive[: rows.num_players] - positive[rows.num_players :]
        thresholds = np.array([knockoff_threshold(column, self.rate) for column in statistics.T])
        return np.asarray(statistics >= thresholds)


def knockoff_threshold(statistics: Float[np.ndarray, " n"], rate: float) -> float:
    """Return the knockoff+ threshold; infinity when no player can be selected."""
    for t in np.unique(np.abs(statistics[statistics != 0])):
        if (1 + np.sum(statistics <= -t)) <= rate * np.sum(statistics >= t):
            return float(t)
    return float("inf")
