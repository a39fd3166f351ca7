"""Leave-one-out: do scores rank the examples as training without each of them does?

    truth[q, i] = log-odds of prompt q with everybody, less those without example i

The first is the same for all i, so the rank correlation needs only sub-models of the design `leave_out`: Spearman over
the examples that were left out, for each prompt. It is the strictest truth, and the noisiest: two fine-tunes of other
seeds can differ more than one example moves either. With several seeds a note says how well one seed ranks the examples
as the mean of the others does.
The interval resamples examples and prompts together.
Source: docs/methods.md section 10; Koh and Liang 2017.
"""

import numpy as np
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.evaluate.lds import agreement_note, mean_correlation, spearman
from llmattrib.evaluate.record import Record, interval
from llmattrib.evaluate.scores import RunScores
from llmattrib.games.subset_table import LEAVE_OUT, SubsetRows
from llmattrib.retrain import retrained_seeds
from llmattrib.rng import stream

FEWEST = 3


def left_out(rows: SubsetRows) -> tuple[list[int], Float[np.ndarray, "m q"]]:
    """Return the examples that were left out, and what each was worth up to a constant: minus the log-odds without it.

    Raises:
        MethodError: fewer than three examples were left out.
    """
    one = np.flatnonzero((~rows.members).sum(axis=1) == 1)
    if len(one) < FEWEST:
        raise MethodError(
            f"{len(one)} examples were left out by `llmattrib retrain`",
            expected=f"{FEWEST} or more, one at a time",
            fix="set retraining.design=leave_out and retraining.num_subsets, and retrain",
        )
    return (~rows.members[one]).argmax(axis=1).tolist(), -rows.utilities[one]


def leave_one_out(
    scores: Float[np.ndarray, "q n"], rows: SubsetRows, seed: int = 0, num_resamples: int = 1000
) -> tuple[Float[np.ndarray, " q"], float, float]:
    """Compare scores with what leaving out did.

    Args:
        scores: of n examples for q prompts.
        rows: of the design `leave_out`, of the same examples and prompts.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Returns:
        Spearman correlation of each prompt (NaN where undefined), and the 95 % interval of their mean.

    Raises:
        MethodError: shapes differ, or fewer than three examples were left out.
    """
    if scores.shape != (rows.utilities.shape[1], rows.num_players):
        raise MethodError(
            f"scores are {scores.shape}, and sub-models have {rows.utilities.shape[1]} prompts and "
            f"{rows.num_players} examples",
            expected="equal prompts and examples",
            fix="run `llmattrib retrain` and build features from the same config",
        )
    examples, worth = left_out(rows)
    given = scores.T[examples]
    draws = stream(seed, "evaluate", "leave_one_out")
    num_examples, num_prompts = worth.shape
    samples = np.empty(num_resamples)
    for number in range(num_resamples):
        some, prompts = draws.integers(0, num_examples, num_examples), draws.integers(0, num_prompts, num_prompts)
        samples[number] = mean_correlation(spearman(given[some][:, prompts], worth[some][:, prompts]))
    return spearman(given, worth), *interval(samples)


def leave_one_out_of_run(scores: RunScores) -> Record:
    """Compare the methods and baselines of a run with its `leave_out` sub-models.

    Returns:
        Rows `method`, `spearman`, `low`, `high`; saved.

    Raises:
        StoreNotFoundError: nothing was retrained.
        FingerprintMismatchError: the sub-models or the features are of other data, prompts or settings.
        MethodError: no example was left out.
    """
    config = scores.config
    rows, worth = retrained_seeds(config, LEAVE_OUT, scores.training)
    scores.require_training()
    found = {
        name: leave_one_out(array, rows, config.seed, config.evaluate.num_resamples)
        for name, array in scores.table(without=("size",)).items()
    }
    order = sorted(found, key=lambda name: -mean_correlation(found[name][0]))
    num_seeds = config.retraining.num_seeds
    notes = [f"{len(left_out(rows)[0]):,} of {rows.num_players:,} examples left out, {num_seeds} fine-tunes each"]
    notes += agreement_note(worth)
    if num_seeds == 1:
        notes.append("with one seed the noise between two fine-tunes is part of the truth: expect small correlations")
    return Record(
        "leave_one_out",
        [
            {"method": name, "spearman": mean_correlation(per_prompt), "low": low, "high": high}
            for name in order
            for per_prompt, low, high in [found[name]]
        ],
        tuple(notes),
        {"per_prompt": {name: found[name][0].tolist() for name in order}},
    ).save(config, scores.features.digest())
