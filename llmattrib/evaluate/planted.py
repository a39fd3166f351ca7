"""Is the example that taught an answer ranked first? Recall at k, where the data say which example that is.

`evaluate.source` names a column of `values.data` with the id of the training example behind each prompt; prompts
without one are no probes. Ties are broken by row. `mrr` is the mean of 1 over the rank. Intervals resample probes.
Text search is strong here: facts share words with their questions. A claim needs its row beside it.
Source: docs/methods.md section 10; Chang et al. 2024 (TrackStar).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from llmattrib.data import read_column
from llmattrib.errors import ConfigError
from llmattrib.evaluate.record import Record, Row, bootstrap_mean
from llmattrib.evaluate.scores import RunScores


def ranks_of(scores: Float[np.ndarray, "q n"], targets: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
    """Return the rank of each target among the scores of its row, 1 for the highest, ties by row."""
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None, :] < targets[:, None]
    return np.asarray(1 + ((scores > own) | ((scores == own) & earlier)).sum(axis=1))


def teaching_examples(scores: RunScores) -> tuple[list[int], list[int]]:
    """Return the probes, as rows of the validation set, and the training example that taught each.

    Raises:
        ConfigError: `evaluate.source` is not set, names no training example, or there is no probe.
        MissingFieldError: the validation set has no such column.
    """
    config = scores.config
    column, data = config.evaluate.source, config.values.data
    if column is None or data is None:
        raise ConfigError(
            "evaluate.source is not set", expected="a column of values.data with the id of the example that taught it"
        )
    settings = {"train": data, "split": config.values.split, "limit": config.values.limit}
    sources = read_column(config.data.model_copy(update=settings), column)
    rows = {example.id: row for row, example in enumerate(scores.examples)}
    probes = [(k, sources[query.id]) for k, query in enumerate(scores.queries) if sources[query.id] is not None]
    for k, source in probes:
        if str(source) not in rows:
            raise ConfigError(
                f"{data} says that {source!r} taught {scores.queries[k].id!r}, and there is no such training example",
                expected=f"an id of {config.layout.examples}, such as {scores.examples[0].id!r}",
                fix="correct the column, or leave it empty where nothing taught the answer",
            )
    if not probes:
        raise ConfigError(
            f"the column {column!r} of {data} is empty", expected="an id of a training example in some rows"
        )
    return [k for k, _ in probes], [rows[str(source)] for _, source in probes]


def recall_row(name: str, ranks: Int[np.ndarray, " q"], ks: Sequence[int], seed: int, num_resamples: int) -> Row:
    """Return recall at each k and the mean reciprocal rank, with intervals."""
    columns = {f"recall@{k}": ranks <= k for k in ks} | {"mrr": 1 / ranks}
    values = np.stack(list(columns.values()), axis=1).astype(np.float64)
    low, high = bootstrap_mean(values, seed, "planted", num_resamples)
    row: Row = {"method": name}
    for place, (key, column) in enumerate(columns.items()):
        row |= {key: float(np.mean(column)), f"{key}_low": float(low[place]), f"{key}_high": float(high[place])}
    return row


def planted_of_run(scores: RunScores) -> Record:
    """Measure how often each method and baseline ranks the teaching example first.

    Returns:
        Rows `method`, `recall@k` for each k, `mrr`, with intervals; saved.

    Raises:
        ConfigError, MissingFieldError: as `teaching_examples`.
    """
    config, settings = scores.config, scores.config.evaluate
    probes, targets = teaching_examples(scores)
    ranks = {name: ranks_of(array[probes], np.array(targets)) for name, array in scores.table(("size", "loss")).items()}
    rows = [
        recall_row(name, found, settings.recall_at, config.seed, settings.num_resamples)
        for name, found in ranks.items()
    ]
    rows.sort(key=lambda row: -float(row["mrr"] or 0))
    return Record(
        "planted",
        rows,
        (f"{len(probes)} of {len(scores.queries)} prompts have a teaching example among {len(scores.examples):,}",),
        {"ranks": {name: found.tolist() for name, found in ranks.items()}},
    ).save(config, scores.features.digest())
