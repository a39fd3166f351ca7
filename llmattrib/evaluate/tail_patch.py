"""Tail-patch: does one more step on what a method ranks first raise the probability of the answer?

From the run's adapter, one step of gradient descent of rate `evaluate.tail_patch_rate` is taken on the loss of one
example, its gradient clipped as in training; the change of log p of each prompt's answer is noted, and the step is
undone. p is that of the label among the label words, or the geometric mean of the completion's token probabilities.

    change        mean over prompts and the first k of their ranking
    best          the same for the k examples with the largest change: what no ranking can exceed

Each example of any top list is stepped on once, whoever ranked it. It asks what one more step does at the end of the
fine-tune, where what is learned already has a small gradient; it is no measure of what the fine-tune would have been
without the example. For a small rate the change is the rate times Grad-Dot of the trained adapter.
Intervals resample prompts. Source: docs/methods.md section 10; Chang et al. 2024 (TrackStar), section 5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from llmattrib.config import RunConfig
from llmattrib.data import load_validation_examples
from llmattrib.encoding import Encoded
from llmattrib.errors import MethodError
from llmattrib.evaluate.record import Record, Row, bootstrap_mean
from llmattrib.evaluate.retrieval import top_rows
from llmattrib.evaluate.scores import RunScores
from llmattrib.extraction import run_adapters
from llmattrib.finetune import FineTuning, backward
from llmattrib.games.retraining import load_trainable, log_odds
from llmattrib.progress import Progress, silent
from llmattrib.train import encode_without_weights

BEST = "best of these"


def log_probability(log_odds: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """Return log p of log p/(1-p)."""
    return np.asarray(-np.logaddexp(0, -log_odds))


def patch(
    config: RunConfig, tuning: FineTuning, example: Encoded, queries: Sequence[Encoded], rate: float
) -> Float[np.ndarray, " q"]:
    """Return log p of the queries after one step on an example; the factors are left as they were.

    Args:
        config: of the run.
        tuning: the factors at the adapter.
        example: to step on.
        queries: each with its answer.
        rate: of the step.
    """
    before = {name: factor.detach().clone() for name, factor in tuning.factors.items()}
    backward(tuning.loaded, [example])
    torch.nn.utils.clip_grad_norm_(tuning.factors.values(), tuning.settings.max_grad_norm)
    with torch.no_grad():
        for factor in tuning.factors.values():
            assert factor.grad is not None
            factor -= rate * factor.grad
            factor.grad = None
        after = log_probability(log_odds(config, tuning.loaded, queries))
        for name, factor in tuning.factors.items():
            factor.copy_(before[name])
    return after


def tail_patch_of_run(scores: RunScores, progress: Progress = silent) -> Record:
    """Step on what each method and baseline ranks first.

    Args:
        scores: of a run that has one adapter.
        progress: told of examples stepped on.

    Returns:
        Rows `method`, `change`, `low`, `high` and `raised`, the share of prompts whose mean change is positive; saved.

    Raises:
        MethodError: the run has no adapter, or several.
        FingerprintMismatchError: the features are of other examples than training reads now.
    """
    config, settings = scores.config, scores.config.evaluate
    adapters = run_adapters(config)
    if len(adapters) != 1:
        raise MethodError(
            f"the run has {len(adapters)} adapters",
            expected="one, to step from",
            fix="run `llmattrib train`, or name one in model.adapters",
        )
    examples = scores.require_training()
    queries = encode_without_weights(config, load_validation_examples(config.data, config.values))
    tops = {name: top_rows(array, settings.tail_patch_top) for name, array in scores.table(("size",)).items()}
    tuning = load_trainable(config, adapters[0])
    start = log_probability(log_odds(config, tuning.loaded, queries.encoded))
    chosen = np.unique(np.concatenate([top.ravel() for top in tops.values()])).tolist()
    change = np.full((len(queries.encoded), len(examples.encoded)), np.nan)
    for done, row in enumerate(chosen):
        change[:, row] = patch(config, tuning, examples.encoded[row], queries.encoded, settings.tail_patch_rate) - start
        progress(done + 1, len(chosen))
    best = top_rows(np.nan_to_num(change, nan=-np.inf), settings.tail_patch_top)
    rows = [
        _row(name, np.take_along_axis(change, top, axis=1).mean(axis=1), config.seed, settings.num_resamples)
        for name, top in {BEST: best, **tops}.items()
    ]
    rows.sort(key=lambda row: -float(row["change"] or 0))
    return Record(
        "tail_patch",
        rows,
        (
            f"mean change of log p by one step of rate {settings.tail_patch_rate:g} on each of the first "
            f"{settings.tail_patch_top} examples, {len(start)} prompts; mean p before: {np.exp(start).mean():.3f}",
            f"{len(chosen):,} examples were stepped on; `{BEST}` ranks them by what their step did",
        ),
    ).save(config, scores.features.digest())


def _row(name: str, change: Float[np.ndarray, " q"], seed: int, num_resamples: int) -> Row:
    low, high = bootstrap_mean(change[:, None], seed, "tail_patch", num_resamples)
    raised = float((change > 0).mean())
    return {
        "method": name,
        "change": float(change.mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "raised": raised,
    }
