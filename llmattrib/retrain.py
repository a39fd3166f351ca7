"""The stage `retrain`: sub-models on random subsets of the examples, and what each says to the validation prompts.

    run_dir/retraining/seed<k>.zarr      a subset table for each training seed: masks, p, log-odds of every prompt

All seeds train on the same subsets, drawn from streams of the run's seed, so the mean over seeds is the mean over
tables. A table is filled shard by shard by any number of ranks; killed jobs go on, more subsets and more seeds are
added at any time, and what is there is kept. AME, the linear datamodelling score and leave-one-out read the tables.
"""

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib.adapters import ADAPTER_WEIGHTS
from llmattrib.config import RunConfig
from llmattrib.data import data_fingerprint, load_validation_examples
from llmattrib.distributed import Ranks
from llmattrib.encoding import EncodedSet, encoded_fingerprint
from llmattrib.errors import ConfigError
from llmattrib.extraction import run_adapters
from llmattrib.games.retraining import RetrainingGame, load_trainable
from llmattrib.games.subset_table import DESIGNS, Design, SubsetRows, SubsetTable
from llmattrib.lock import locked
from llmattrib.progress import Progress, silent
from llmattrib.train import encode_without_weights, training_inputs
from llmattrib.weights import file_digest

MADE_BY = "llmattrib retrain"


@dataclass(frozen=True)
class RetrainResult:
    """What was trained.

    Attributes:
        path: the folder of the tables.
        design: how subsets were drawn.
        num_subsets: subsets, each trained with every seed.
        num_seeds: seeds.
        num_queries: validation prompts.
        num_done: sub-models trained by this call.
        seconds: wall time of this call.
    """

    path: str
    design: str
    num_subsets: int
    num_seeds: int
    num_queries: int
    num_done: int
    seconds: float


def retrain(config: RunConfig, ranks: Ranks | None = None, progress: Progress = silent) -> RetrainResult:
    """Train the sub-models of `config.retraining` that are not there yet; called by all ranks.

    Args:
        config: the run; features are not needed.
        ranks: the processes of the job.
        progress: told of this rank's sub-models done and to do.

    Returns:
        What is there now.

    Raises:
        ConfigError: `values.data` is not set, or `warm_start` without one adapter.
        DataError, ModelError: the data or the model cannot be used.
        FingerprintMismatchError: sub-models of other data or settings are there.
        StoreLockedError: another job trains them now.
        NonFiniteGradientError, DeviceMemoryError: as in training.
    """
    started, settings = time.perf_counter(), config.retraining
    ranks = ranks or Ranks()
    path = config.layout.path("retraining")
    examples, queries, identity = ranks.together(lambda: game_inputs(config))
    with locked(path) if ranks.is_main else nullcontext():
        pending = ranks.on_main(lambda: _create(config, len(examples.encoded), len(queries.encoded), identity))
        done = ranks.together(lambda: _fill(config, examples, queries, pending, ranks, progress)) if any(pending) else 0
    return RetrainResult(
        path=path,
        design=settings.design,
        num_subsets=_tables(config)[0].num_rows(DESIGNS[settings.design]),
        num_seeds=settings.num_seeds,
        num_queries=len(queries.encoded),
        num_done=sum(ranks.gather(done)),
        seconds=time.perf_counter() - started,
    )


def retrained_seeds(config: RunConfig, design: Design | None = None) -> tuple[SubsetRows, Float[np.ndarray, "s m q"]]:
    """Read the subsets that are trained with every seed.

    Args:
        config: the run.
        design: of the subsets; that of `config.retraining` by default.

    Returns:
        The subsets, their utilities log-odds, means over seeds; and the log-odds of each seed.

    Raises:
        StoreNotFoundError: nothing was retrained.
        MethodError: no subset of this design is trained.
        CorruptShardError: a shard fails its checksum.
    """
    rows = [table.rows(design or DESIGNS[config.retraining.design]) for table in _tables(config)]
    draws = sorted(set.intersection(*(set(part.draw.tolist()) for part in rows)))
    places = [np.searchsorted(part.draw, draws) for part in rows]
    utilities = np.array([part.utilities[place] for part, place in zip(rows, places, strict=True)])
    first, place = rows[0], places[0]
    mean = dataclasses.replace(
        first,
        members=first.members[place],
        p=first.p[place],
        draw=first.draw[place],
        utilities=utilities.mean(axis=0),
    )
    return mean, utilities


def retrained_rows(config: RunConfig, design: Design | None = None) -> SubsetRows:
    """Return the first of `retrained_seeds`.

    Raises:
        As `retrained_seeds`.
    """
    return retrained_seeds(config, design)[0]


def _path(config: RunConfig, seed: int) -> str:
    return config.layout.path("retraining", f"seed{config.seed + seed}.zarr")


def _tables(config: RunConfig) -> list[SubsetTable]:
    return [SubsetTable.open(_path(config, seed), made_by=MADE_BY) for seed in range(config.retraining.num_seeds)]


def _adapter(config: RunConfig) -> str | None:
    """Return the adapter that fine-tunes begin with, if any."""
    if not config.retraining.warm_start:
        return None
    adapters = run_adapters(config)
    if len(adapters) != 1:
        raise ConfigError(
            f"retraining.warm_start needs the run's adapter, and there are {len(adapters)}",
            expected="one adapter",
            fix="run `llmattrib train` first, name one in model.adapters, or set retraining.warm_start=false",
        )
    return adapters[0]


def game_inputs(config: RunConfig) -> tuple[EncodedSet, EncodedSet, dict[str, Any]]:
    """Return examples, queries and what the utilities depend on besides the training seed; loads no weights.

    Raises:
        ConfigError, DataError, ModelError: as `retrain`.
    """
    examples, identity = training_inputs(config)
    queries = encode_without_weights(config, load_validation_examples(config.data, config.values))
    adapter = _adapter(config)
    identity = {key: value for key, value in identity.items() if key != "seed"}
    return (
        examples,
        queries,
        {
            **identity,
            "queries": data_fingerprint(queries.examples),
            "query_tokens": encoded_fingerprint(queries.encoded),
            "start": "fresh" if adapter is None else file_digest(Path(adapter) / ADAPTER_WEIGHTS)[:32],
        },
    )


def load_game(config: RunConfig, examples: EncodedSet, queries: EncodedSet) -> RetrainingGame:
    """Load the model and set up the game of a run.

    Raises:
        ConfigError, ModelError, DeviceMemoryError: as `retrain`.
    """
    adapter = _adapter(config)
    tuning = load_trainable(config, adapter)
    start = None if adapter is None else {name: factor.detach().clone() for name, factor in tuning.factors.items()}
    ids = [example.id for example in examples.examples]
    return RetrainingGame(config, tuning, examples.encoded, ids, queries.encoded, start)


def _create(config: RunConfig, num_examples: int, num_queries: int, identity: dict[str, Any]) -> list[list[int]]:
    """Make or extend the tables; return the shards to fill of each. First rank only."""
    settings, pending = config.retraining, []
    for seed in range(settings.num_seeds):
        game = {**identity, "training_seed": config.seed + seed}
        path = _path(config, seed)
        table = SubsetTable.create(path, num_examples, num_queries, config.seed, game, settings.shard_size)
        table.extend(DESIGNS[settings.design], settings.num_subsets)
        pending.append(table.pending())
    return pending


def _fill(
    config: RunConfig,
    examples: EncodedSet,
    queries: EncodedSet,
    pending: list[list[int]],
    ranks: Ranks,
    progress: Progress,
) -> int:
    """Train this rank's share; return the number of sub-models."""
    game = load_game(config, examples, queries)
    todo = ranks.share([(seed, shard) for seed, shards in enumerate(pending) for shard in shards])
    tables = [SubsetTable.open(_path(config, seed), read_only=False) for seed in range(len(pending))]
    size = config.retraining.shard_size
    for done, (seed, shard) in enumerate(todo):

        def report(part: int, _: int, before: int = size * done) -> None:
            progress(before + part, size * len(todo))

        tables[seed].fill_shard(shard, partial(game.worth, seed=config.seed + seed, progress=report))
    return size * len(todo)
