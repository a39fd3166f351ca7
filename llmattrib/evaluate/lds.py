"""Linear datamodelling score: does the sum of scores over a subset rank what a model trained on it says?

    LDS = mean over prompts q of Spearman( sum_{i in S} score[q, i], U_q(S) )   over held-out random subsets S

U_q(S) are the log-odds of prompt q under sub-models of the stage `retrain`. Subsets in which everybody is by chance
differ in size, and a model trained on more of the same data is often surer of everything: the baseline `size`, a score
of 1 for every example, says how much of a score that alone can be. `beyond_size` is the same correlation after a linear
regression on |S| has been taken out of both sides. The interval resamples prompts and subsets together (percentile
bootstrap), so it covers both.
Source: Park et al. 2023 (TRAK), section 4; Ilyas et al. 2022.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.evaluate.record import Record
from llmattrib.evaluate.scores import RunScores
from llmattrib.games.subset_table import SubsetRows
from llmattrib.retrain import retrained_seeds
from llmattrib.rng import stream


@dataclass(frozen=True)
class Lds:
    """The score of one method.

    Attributes:
        lds: mean over prompts.
        low: lower end of the 95 % interval.
        high: upper end.
        beyond_size: mean over prompts of the correlation with the size of subsets regressed out.
        per_prompt: [q] Spearman correlation of each prompt; NaN where either side is constant.
    """

    lds: float
    low: float
    high: float
    beyond_size: float
    per_prompt: Float[np.ndarray, " q"]


def lds_of_run(scores: RunScores) -> Record:
    """Score the methods of `reduce.methods` and the baselines of scores.py against the run's sub-models.

    Returns:
        Rows `method`, `lds`, `low`, `high`, `beyond_size`; saved.

    Raises:
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: a stage is missing or outdated, `retrain` too.
        FingerprintMismatchError: the sub-models or the features are of other data, prompts or settings.
        MethodError: no subset of the design is trained, or there are fewer than three.
    """
    config = scores.config
    rows, margins = retrained_seeds(config, examples=scores.training)
    scores.require_training()
    num_resamples = config.evaluate.num_resamples
    found = {name: lds(array, rows, config.seed, num_resamples) for name, array in scores.table().items()}
    ranked = sorted(found.items(), key=lambda item: -item[1].lds)
    size = f"{len(rows.p)} subsets ({rows.design.name}), {config.retraining.num_seeds} seeds each"
    return Record(
        "lds",
        [
            {"method": name, "lds": row.lds, "low": row.low, "high": row.high, "beyond_size": row.beyond_size}
            for name, row in ranked
        ],
        (f"against sub-models of {size}, {rows.utilities.shape[1]} prompts", *agreement_note(margins)),
        {"per_prompt": {name: row.per_prompt.tolist() for name, row in ranked}},
    ).save(config, scores.features.digest())


def lds(scores: Float[np.ndarray, "q n"], rows: SubsetRows, seed: int = 0, num_resamples: int = 1000) -> Lds:
    """Compare scores with what sub-models said.

    Args:
        scores: of n examples for q prompts.
        rows: subsets of the same n examples with utilities of the same q prompts, from `retrained_rows`.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        MethodError: shapes differ, or there are fewer than three subsets.
    """
    if scores.shape != (rows.utilities.shape[1], rows.num_players) or len(rows.utilities) < 3:
        raise MethodError(
            f"scores are {scores.shape}, and {len(rows.utilities)} sub-models have "
            f"{rows.utilities.shape[1]} prompts and {rows.num_players} examples",
            expected="equal prompts and examples, and three sub-models or more",
            fix="run `llmattrib retrain` and build features from the same config",
        )
    predicted = rows.members.astype(np.float64) @ scores.T
    per_prompt = spearman(predicted, rows.utilities)
    beyond = spearman(_without_size(predicted, rows), _without_size(rows.utilities, rows))
    draws = stream(seed, "evaluate", "lds")
    num_subsets, num_prompts = predicted.shape
    resampled = []
    for _ in range(num_resamples):
        subsets = draws.integers(0, num_subsets, num_subsets)
        prompts = draws.integers(0, num_prompts, num_prompts)
        with np.errstate(invalid="ignore"):
            found = spearman(predicted[subsets][:, prompts], rows.utilities[subsets][:, prompts])
        resampled.append(mean_correlation(found))
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Lds(mean_correlation(per_prompt), float(low), float(high), mean_correlation(beyond), per_prompt)


def spearman(one: Float[np.ndarray, "m q"], other: Float[np.ndarray, "m q"]) -> Float[np.ndarray, " q"]:
    """Return the rank correlation of each column, ties averaged; NaN where a column is constant."""
    ranks = [scipy.stats.rankdata(array, axis=0) for array in (one, other)]
    first, second = (rank - rank.mean(axis=0) for rank in ranks)
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return np.asarray(np.divide((first * second).sum(axis=0), norms, out=np.full(len(norms), np.nan), where=norms > 0))


def agreement_note(utilities: Float[np.ndarray, "s m q"]) -> tuple[str, ...]:
    """Say how well one training seed ranks sub-models as the mean of the others does, and what that lets be reached."""
    if len(utilities) < 2:
        return ()
    one = seed_agreement(utilities)
    return (
        f"one seed ranks the sub-models as the mean of the others does to {one:.2f}; a score that knew all but the "
        f"noise of the seeds would have about {reachable(one, len(utilities)):.2f}",
    )


def seed_agreement(utilities: Float[np.ndarray, "s m q"]) -> float:
    """Return the rank correlation of one of several seeds with the mean of the others, mean over prompts and seeds."""
    found = [
        mean_correlation(spearman(utilities[seed], np.delete(utilities, seed, axis=0).mean(axis=0)))
        for seed in range(len(utilities))
    ]
    return float(np.mean(found))


def reachable(one_seed: float, num_seeds: int) -> float:
    """Return the correlation of what seeds have in common with the mean of them, which no score can exceed.

    With r the correlation of two seeds, that of one with the mean of k - 1 others is
    a = r sqrt((k - 1) / (1 + (k - 2) r)), and that of what seeds share with the mean of k is
    sqrt(k r / (1 + (k - 1) r)). Exact where the noise of seeds is of one size and independent; ranks follow it closely.

    Args:
        one_seed: a; below 0 it says that they share nothing.
        num_seeds: k, two or more.

    Source: Spearman 1910 and Brown 1910, reliability of a mean.
    """
    squared = max(one_seed, 0.0) ** 2
    linear = squared * (num_seeds - 2)
    r = (linear + math.sqrt(linear**2 + 4 * squared * (num_seeds - 1))) / (2 * (num_seeds - 1))
    return math.sqrt(num_seeds * r / (1 + (num_seeds - 1) * r))


def _without_size(values: Float[np.ndarray, "m q"], rows: SubsetRows) -> Float[np.ndarray, "m q"]:
    """Return what a linear regression on the size of the subsets leaves; zeros where that is rounding."""
    size = rows.members.sum(axis=1) - rows.members.sum(axis=1).mean()
    centred = values - values.mean(axis=0)
    left = centred - np.outer(size, size @ centred / max(float(size @ size), 1.0))
    return np.where(np.abs(left).max(axis=0) > 1e-9 * np.abs(values).max(axis=0), left, 0.0)


def mean_correlation(per_prompt: Float[np.ndarray, " q"]) -> float:
    """Return the mean of defined correlations; scores that say nothing count as 0."""
    return float(np.nan_to_num(per_prompt).mean())
