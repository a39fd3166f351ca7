"""Do signs stay? The share of helpful and harmful signs that are the same when half of the examples are not there.

Random halves of the training examples, drawn without replacement, are reduced again by the same code and settings; the
scores of the examples that are in a half are compared with those of the whole run. What is resampled is the training
set, from stored features: no model is run. It says nothing of other LoRA initialisations or sketch seeds.

    agreement        share of (prompt, example, half) whose sign is that of the whole run
    agreement top    the same among the tenth of the examples with the largest |score| of each prompt

A method whose scores do not depend on other examples (grad_dot, grad_cos, text search) agrees by construction: to be
stable is not to be right, and chance alone is at .5. Intervals resample prompts.
Cost: `evaluate.sign_resamples` times `reduce` on half of the data; half of the features on local disk.
Source: docs/methods.md section 10; Wang et al. 2024 (FreeShap), on sign robustness.
"""

import tempfile
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from llmattrib.config import RunConfig
from llmattrib.errors import MethodError
from llmattrib.evaluate.record import Record, Row, bootstrap_mean
from llmattrib.evaluate.scores import RunScores, scores_of_representers
from llmattrib.progress import Progress, silent
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.words import METHOD as WORDS

FEWEST = 8


def sub_store(features: RowStore, rows: Int[np.ndarray, " m"], run_dir: str, config: RunConfig) -> RunConfig:
    """Write some rows of a feature store as the features of another run; return its config.

    Args:
        features: the store.
        rows: ascending.
        run_dir: where the other run is to be.
        config: of the run.
    """
    methods = tuple(method for method in config.reduce.methods if method != WORDS)  # which has no features here
    reduce = config.reduce.model_copy(update={"methods": methods})
    other = config.model_copy(update={"run_dir": run_dir, "reduce": reduce})
    whole = features.manifest
    fingerprint = {**whole.fingerprint, "rows": rows.tolist()}
    store = RowStore.create(other.layout.features, replace(whole, num_rows=len(rows), fingerprint=fingerprint))
    columns = {name: features.column(name) for name in whole.columns}
    kept: list[Float[np.ndarray, "m c p"]] = []
    shard = 0
    for start, block in features.blocks():
        kept.append(block[rows[(rows >= start) & (rows < start + len(block))] - start])
        size = sum(map(len, kept))
        while shard < store.num_shards and size >= store.shard_range(shard)[1] - store.shard_range(shard)[0]:
            first, last = store.shard_range(shard)
            phi = np.concatenate(kept)
            store.write_shard(
                shard, phi[: last - first], {name: column[rows[first:last]] for name, column in columns.items()}
            )
            kept, size, shard = [phi[last - first :]], size - (last - first), shard + 1
    return other


def agreement(
    whole: Float[np.ndarray, "q m"], half: Float[np.ndarray, "q m"]
) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """Return, for each prompt, the share of equal signs, and that among the tenth with the largest |whole|."""
    same = np.sign(whole) == np.sign(half)
    top = np.argsort(-np.abs(whole), axis=1, kind="stable")[:, : max(1, whole.shape[1] // 10)]
    return same.mean(axis=1), np.take_along_axis(same, top, axis=1).mean(axis=1)


def signs_of_run(scores: RunScores, progress: Progress = silent) -> Record:
    """Measure how robust the signs of each method are.

    Args:
        scores: of the run.
        progress: told of halves done.

    Returns:
        Rows `method`, `agreement`, `agreement_top`, with intervals; saved.

    Raises:
        MethodError: the run has fewer than eight examples, or a method cannot be reduced on half of them.
    """
    config, settings = scores.config, scores.config.evaluate
    num_examples = len(scores.examples)
    if num_examples < FEWEST:
        raise MethodError(f"halves of {num_examples} examples say nothing", expected=f"{FEWEST} examples or more")
    whole = {method: scores.of(method) for method in scores.methods}
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in (*whole, "random")}
    draws = stream(config.seed, "evaluate", "signs")
    for number in range(settings.sign_resamples):
        rows = np.sort(draws.permutation(num_examples)[: num_examples // 2])
        with tempfile.TemporaryDirectory(prefix="llmattrib-") as folder:
            half = sub_store(scores.features, rows, folder, config)
            if half.reduce.methods:
                reduce_run(half)
            for method, array in whole.items():
                is_own = method not in half.reduce.methods
                again = array[:, rows] if is_own else scores_of_representers(half, method, scores.validation)
                found[method].append(agreement(array[:, rows], again))
        chance = scores.of("random")[:, rows]
        found["random"].append(agreement(chance, draws.standard_normal(chance.shape)))
        progress(number + 1, settings.sign_resamples)
    means = {name: np.mean(np.array(parts), axis=0) for name, parts in found.items()}
    rows_found = [_row(name, both, config, settings.num_resamples) for name, both in means.items()]
    rows_found.sort(key=lambda row: -float(row["agreement"] or 0))
    return Record(
        "signs",
        rows_found,
        (
            f"{settings.sign_resamples} random halves of {num_examples:,} examples reduced again, "
            f"{len(scores.queries)} prompts",
            "a score that depends on its own example alone keeps its sign by construction",
        ),
    ).save(config, scores.features.digest())


def _row(name: str, both: Float[np.ndarray, "2 q"], config: RunConfig, num_resamples: int) -> Row:
    low, high = bootstrap_mean(both.T, config.seed, "signs", num_resamples)
    row: Row = {"method": name}
    for place, key in enumerate(("agreement", "agreement_top")):
        row |= {key: float(both[place].mean()), f"{key}_low": float(low[place]), f"{key}_high": float(high[place])}
    return row
