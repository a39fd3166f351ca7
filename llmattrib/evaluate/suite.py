"""All evaluations of a run by name, what each needs, and all of them in one go.

An evaluation whose truth is not there is skipped with the reason: the run then has nothing to be judged by in that
respect. Whatever else goes wrong is an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llmattrib.errors import ConfigError, LlmattribError
from llmattrib.evaluate.curves import curves_of_run
from llmattrib.evaluate.gold import gold_of_run
from llmattrib.evaluate.lds import lds_of_run
from llmattrib.evaluate.leave_one_out import leave_one_out_of_run
from llmattrib.evaluate.mislabel import mislabel_of_run
from llmattrib.evaluate.planted import planted_of_run
from llmattrib.evaluate.record import Record, read_record
from llmattrib.evaluate.scores import RunScores
from llmattrib.evaluate.signs import FEWEST, signs_of_run
from llmattrib.evaluate.sketch import sketch_fidelity
from llmattrib.evaluate.tail_patch import tail_patch_of_run
from llmattrib.extraction import run_adapters
from llmattrib.further_training import gold_scores
from llmattrib.games.subset_table import DESIGNS, LEAVE_OUT
from llmattrib.progress import Progress, silent
from llmattrib.retrain import retrained_rows

SKETCH_EXAMPLES = 50


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        measure: measures a run and saves what was found.
        missing: says what truth a run lacks for it, "" when it has it.
        question: that it answers.
    """

    measure: Callable[[RunScores, Progress], Record]
    missing: Callable[[RunScores], str]
    question: str


def _sub_models(scores: RunScores, design: str | None = None) -> str:
    """Say why there is no truth from `retrain`."""
    config = scores.config
    chosen = DESIGNS[design or config.retraining.design]
    if design is None and chosen == LEAVE_OUT:
        return "retraining.design is leave_out, and the score needs random subsets"
    try:
        retrained_rows(config, chosen, scores.training)
    except LlmattribError as error:
        return f"no sub-models of the design {chosen.name}: {error.found}"
    return ""


def _mislabeled(scores: RunScores) -> str:
    settings = scores.config.evaluate
    known = settings.mislabeled is not None or settings.mislabeled_column is not None
    return "" if known else "neither evaluate.mislabeled nor evaluate.mislabeled_column is set"


def _further_training(scores: RunScores) -> str:
    """Say why there is no further training."""
    try:
        gold_scores(scores.config, scores.training)
    except LlmattribError as error:
        return f"no further training: {error.found}"
    return ""


def _adapter(scores: RunScores) -> str:
    count = len(run_adapters(scores.config))
    return "" if count == 1 else f"the run has {count} adapters; one step is taken from one"


def _exact(scores: RunScores) -> str:
    outputs = scores.features.manifest.num_outputs
    return "" if outputs == 1 else "the features have a row for each class"


def _halves(scores: RunScores) -> str:
    count = scores.features.manifest.num_rows
    return "" if count >= FEWEST else f"halves of {count} examples say nothing; {FEWEST} or more are needed"


def _sketch(scores: RunScores, progress: Progress) -> Record:
    """Compare the stored sketch with exact inner products, as `evaluate sketch` does at its own width."""
    sketch_fidelity(scores.config, (), SKETCH_EXAMPLES, progress)
    found = read_record(scores.config, "sketch", scores.features.digest())
    assert found is not None
    return found[0]


EVALUATIONS: dict[str, Evaluation] = {
    "lds": Evaluation(
        lambda scores, _: lds_of_run(scores),
        _sub_models,
        "Do sums of scores predict what models trained on random subsets say?",
    ),
    "leave_one_out": Evaluation(
        lambda scores, _: leave_one_out_of_run(scores),
        partial(_sub_models, design="leave_out"),
        "Do scores rank examples as training without each of them does?",
    ),
    "gold": Evaluation(
        lambda scores, _: gold_of_run(scores),
        _further_training,
        "Do scores say what further training of the final model without each example does?",
    ),
    "curves": Evaluation(
        curves_of_run,
        lambda scores: "the run has one example" if scores.features.manifest.num_rows == 1 else "",
        "What does a model say that was trained without the highest examples, or on them alone?",
    ),
    "mislabel": Evaluation(
        lambda scores, _: mislabel_of_run(scores), _mislabeled, "Are wrongly labelled examples found?"
    ),
    "planted": Evaluation(
        lambda scores, _: planted_of_run(scores),
        lambda scores: "" if scores.config.evaluate.source is not None else "evaluate.source is not set",
        "Is the example that taught an answer ranked first?",
    ),
    "tail_patch": Evaluation(
        tail_patch_of_run, _adapter, "Does one more step on what is ranked first raise the probability of the answer?"
    ),
    "signs": Evaluation(
        signs_of_run, _halves, "Do helpful and harmful stay what they are when half of the examples are not there?"
    ),
    "sketch": Evaluation(_sketch, _exact, "How far are the stored features from exact gradients?"),
}
"""Name -> evaluation, in the order in which they are reported."""


@dataclass(frozen=True)
class Outcome:
    """What `evaluate_all` did.

    Attributes:
        records: of the evaluations that ran.
        skipped: name -> why, of the others.
    """

    records: tuple[Record, ...]
    skipped: dict[str, str]


def evaluate_all(
    scores: RunScores,
    skip: Sequence[str] = (),
    progress: Callable[[str], Progress] = lambda _: silent,
    only: Sequence[str] = (),
) -> Outcome:
    """Run every evaluation that a run has the truth for.

    Args:
        scores: of the run.
        skip: names to leave out.
        progress: makes the progress of an evaluation.
        only: names to run, all when empty.

    Raises:
        ConfigError: there is no such evaluation, or `values.data` is not set.
        LlmattribError: an evaluation that has its truth fails.
    """
    for name in (*skip, *only):
        if name not in EVALUATIONS:
            raise ConfigError(f"there is no evaluation {name!r}", expected=f"one of {', '.join(EVALUATIONS)}")
    records: list[Record] = []
    skipped: dict[str, str] = {}
    for name, evaluation in EVALUATIONS.items():
        if name in skip or (only and name not in only):
            continue
        reason = evaluation.missing(scores)
        if reason:
            skipped[name] = reason
        else:
            records.append(evaluation.measure(scores, progress(name)))
    return Outcome(tuple(records), skipped)
