"""What every estimator of the kernel game promises, one row each; tests/test_laws.py holds all rows to all laws.

A new estimator is a new row of ESTIMATORS: how to run it, and how far it may be off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmattrib.estimators.enumeration import Enumeration
from llmattrib.estimators.mean_field import MeanField, MeanFieldResult
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.permutation import Permutation
from llmattrib.estimators.quadrature import (
    BANZHAF,
    LEAVE_ONE_OUT,
    SHAPLEY,
    Semivalue,
    ame,
    beta_shapley,
    weighted_banzhaf,
)
from llmattrib.estimators.subset import Subset, SubsetResult
from llmattrib.games.kernel import KernelGame


@dataclass(frozen=True)
class Estimate:
    """Values [m, n, c] and their standard errors, 0 where there is no sampling."""

    values: np.ndarray
    error: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Estimator:
    """A row.

    Attributes:
        name: for messages.
        run: (game, queries, semivalue) -> estimate.
        bias: relative error allowed beyond the standard error: of all values of a game together.
        sum_error: relative error allowed to the sum of all values; None where it is a matter of sampling.
        keeps_sum: whether the values sum to the full model's prediction at all.
        only_shapley: whether other semivalues are out of reach.
        sample: (game, queries, seed, number of samples) -> moments; None where there is no sampling.
    """

    name: str
    run: Callable[[KernelGame, np.ndarray, Semivalue], Estimate]
    bias: float
    sum_error: float | None
    keeps_sum: bool = True
    only_shapley: bool = False
    sample: Callable[[KernelGame, np.ndarray, int, int], Moments] | None = None


SEMIVALUES = (
    SHAPLEY,
    BANZHAF,
    LEAVE_ONE_OUT,
    beta_shapley(4.0, 1.0),
    beta_shapley(1.0, 4.0),
    beta_shapley(2.0, 3.0),
    weighted_banzhaf(0.3),
    ame((0.2, 0.4, 0.6, 0.8)),
)
THRESHOLD_CONSTANTS = {0.01: 0.33993, 0.1: 0.39333}
"""AME of the game that is won by two of three players, p uniform on (eps, 1 - eps); METHODS section 4."""


def in_a_sweep(semivalue: Semivalue) -> Callable[[KernelGame], SubsetResult | MeanFieldResult]:
    """The mean field of a semivalue among others."""
    others = (beta_shapley(3.0, 1.0), ame((0.3, 0.5)), SHAPLEY)
    return lambda game: MeanField(form="pairs").sweep(game, (*others, semivalue))[-1]


def by_representers(
    make: Callable[[Semivalue], Callable[[KernelGame], SubsetResult | MeanFieldResult]],
) -> Callable[..., Estimate]:
    def run(game: KernelGame, queries: np.ndarray, semivalue: Semivalue) -> Estimate:
        return Estimate(np.einsum("mp,ncp->mnc", queries, make(semivalue)(game).representers))

    return run


def by_moments(make: Callable[[Semivalue], Subset | Permutation]) -> Callable[..., Estimate]:
    def run(game: KernelGame, queries: np.ndarray, semivalue: Semivalue) -> Estimate:
        moments = make(semivalue).measure(game, queries)
        return Estimate(moments.mean, moments.standard_error)

    return run


def permutation(name: str, **settings: object) -> Estimator:
    per_sample = 1 if settings.get("antithetic") is False else 2
    return Estimator(
        name,
        by_moments(lambda _: Permutation(num_permutations=400, **settings)),
        bias=0,
        sum_error=1e-9,
        only_shapley=True,
        sample=lambda game, queries, seed, count: Permutation(
            num_permutations=per_sample * count, seed=seed, **settings
        ).measure(game, queries),
    )


ESTIMATORS = [
    Estimator("enumeration", by_representers(lambda s: Enumeration(s).init), bias=1e-8, sum_error=1e-9),
    Estimator("mean field, pairs", by_representers(lambda s: MeanField(s, form="pairs").init), 0.05, 1e-3),
    Estimator("mean field, one of a sweep", by_representers(in_a_sweep), 0.05, 1e-3),
    Estimator(
        "mean field, total gradient", by_representers(lambda s: MeanField(s, form="total_gradient").init), 0.05, 1e-3
    ),
    Estimator(
        "mean field, cavity", by_representers(lambda s: MeanField(s, form="cavity").init), 0.25, None, keeps_sum=False
    ),
    Estimator(
        "subset",
        by_moments(lambda s: Subset(s, num_draws=512)),
        bias=0,
        sum_error=None,
        sample=lambda game, queries, seed, count: Subset(num_draws=count, seed=seed).measure(game, queries),
    ),
    permutation("permutation, cholesky", path="cholesky"),
    permutation("permutation, rows", path="rows"),
    permutation("permutation, not antithetic", antithetic=False),
]
SEMIVALUE_ESTIMATORS = [row for row in ESTIMATORS if not row.only_shapley]
SAMPLED_ESTIMATORS = [row for row in ESTIMATORS if row.sample is not None]
