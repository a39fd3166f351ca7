"""Further training as the judge: cosine of a method's scores with what leaving examples out of T more steps does.

    mean over prompts q of cos( score[q, :], a[q, :] )      over the examples that were left out, both less their mean

a is the gold of further_training.py, mean over seeds. Taking the mean over left-out examples out of it is the
adjustment of Wei et al.: what all examples share is that the model goes on learning, and not whose doing it is. It is
taken out of the scores too, so the cosine is a Pearson correlation; a score that is the same for all examples gets 0.

Beside the methods of `reduce.methods` and the baselines of scores.py stand

    spectral    spectral(T,rate) at the T and the rate of the gold itself, where it is trained by sgd
    one_seed    the gold of one seed against the mean of the others, mean over seeds: how noisy it is

Intervals resample prompts and left-out examples together (percentile bootstrap).
Source: Wei et al. 2024 (arXiv 2412.03906), section 5.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from llmattrib.evaluate.record import Record, interval
from llmattrib.evaluate.scores import RunScores, spectral_scores
from llmattrib.further_training import gold_scores
from llmattrib.reader import FeatureReader
from llmattrib.rng import stream

SPECTRAL, ONE_SEED = "spectral", "one_seed"


@dataclass(frozen=True)
class Agreement:
    """How well a method agrees with the gold after T steps.

    Attributes:
        steps: T.
        method: its name, or a baseline's, `spectral` or `one_seed`.
        cosine: mean over prompts.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    steps: int
    method: str
    cosine: float
    low: float
    high: float


def gold_of_run(scores: RunScores) -> Record:
    """Judge the methods and the baselines of a run by the further training that is there.

    Returns:
        For each T the methods, best first.

    Raises:
        StoreNotFoundError, MethodError: no further training was done, or the features are of an output that is no loss.
        FingerprintMismatchError: it, or the features, are of another model, other data, prompts or settings.
        IncompleteStoreError, StaleIndexError: a stage is missing or outdated.
    """
    config, gold = scores.config, scores.config.gold
    left_out, truth = gold_scores(config, scores.training)
    scores.require_training()
    table, notes = scores.table(), list[str]()
    natural: dict[int, Float[np.ndarray, "q n"]] = {}
    if config.features.preconditioner != "none":
        notes.append("spectral is left out: the features are whitened, and the steps are not")
    elif gold.optimizer == "sgd":
        reader = FeatureReader(scores.features)
        rate, natural = spectral_scores(reader, scores.validation.phi[:, 0], gold.steps, gold.learning_rate)
        notes.append(f"spectral is spectral(T,{rate:.4g}), the rate of these steps in the units of reduce.methods")
    rows: list[Agreement] = []
    for place, steps in enumerate(gold.steps):
        named = table | ({SPECTRAL: natural[steps]} if natural else {})
        chosen = {name: array[:, left_out] for name, array in named.items()}
        rows += judge(steps, chosen, truth[:, place], config.seed, config.evaluate.num_resamples)
    notes.append(f"{truth.shape[3]} examples left out, {len(truth)} seeds, {truth.shape[2]} prompts")
    details = {"gold": gold.model_dump(mode="json")}
    record = Record("gold", [asdict(row) for row in rows], tuple(notes), details)
    return record.save(config, scores.features.digest())


def judge(
    steps: int,
    scores: Mapping[str, Float[np.ndarray, "q m"]],
    gold: Float[np.ndarray, "k q m"],
    seed: int = 0,
    num_resamples: int = 1000,
) -> list[Agreement]:
    """Compare scores with the gold at one T.

    Args:
        steps: T.
        scores: name -> scores of m examples for q prompts.
        gold: of k training seeds.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Returns:
        A row for each name, best first; of `one_seed` too where there are two seeds or more.
    """
    draws = stream(seed, "evaluate", "gold")
    prompts, examples = (
        draws.multinomial(size, np.full(size, 1 / size), num_resamples).astype(np.float64) for size in gold.shape[1:]
    )
    mean = gold.mean(axis=0)
    pairs = {name: [(one, mean)] for name, one in scores.items()}
    if len(gold) > 1:
        pairs[ONE_SEED] = [(one, np.delete(gold, number, axis=0).mean(axis=0)) for number, one in enumerate(gold)]
    found = []
    for name, each in pairs.items():
        cosine = float(np.mean([cosines(*pair).mean() for pair in each]))
        resampled = np.mean([cosines(*pair, examples) for pair in each], axis=0)
        low, high = interval((resampled * prompts).sum(axis=1) / prompts.sum(axis=1))
        found.append(Agreement(steps, name, cosine, low, high))
    return sorted(found, key=lambda row: -row.cosine)


def cosines(
    one: Float[np.ndarray, "q m"], other: Float[np.ndarray, "q m"], weights: Float[np.ndarray, "w m"] | None = None
) -> Float[np.ndarray, "w q"]:
    """Return the cosine of the rows less their means, for each prompt; 0 where a row is constant.

    Args:
        one: scores.
        other: scores.
        weights: how often each example counts, one row a resample; once without.
    """
    counted = np.ones((1, one.shape[1])) if weights is None else weights
    first, second = map(_centred, (one, other))

    def product(left: Float[np.ndarray, "q m"], right: Float[np.ndarray, "q m"]) -> Float[np.ndarray, "w q"]:
        means = (counted @ left.T) * (counted @ right.T) / counted.sum(axis=1, keepdims=True)
        return np.asarray(counted @ (left * right).T - means)

    size = product(first, first) * product(second, second)
    is_constant = size <= 1e-20
    return np.asarray(np.where(is_constant, 0.0, product(first, second) / np.sqrt(np.where(is_constant, 1.0, size))))


def _centred(rows: Float[np.ndarray, "q m"]) -> Float[np.ndarray, "q m"]:
    """Subtract the mean of each row and scale it to a largest entry of 1; zeros where nothing but rounding is left."""
    found = rows - rows.mean(axis=1, keepdims=True)
    largest = np.abs(found).max(axis=1, keepdims=True)
    is_constant = largest <= 1e-12 * np.abs(rows).max(axis=1, keepdims=True)
    return np.asarray(np.where(is_constant, 0.0, found / np.where(is_constant, 1.0, largest)))
