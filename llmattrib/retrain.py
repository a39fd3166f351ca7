"""The stage `retrain`: sub-models on random subsets of the examples, and what each says to the validation prompts.

    run_dir/retraining/seed<k>.zarr      a subset table for each training seed: masks, p, log-odds of every prompt

AME, the linear datamodelling score and leave-one-out read the tables; how they are shared out, resumed and grown is in
seed_tables.py.
"""

import time
from dataclasses import dataclass
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
from llmattrib.games.subset_table import DESIGNS, Design, SubsetRows
from llmattrib.progress import Progress, silent
from llmattrib.seed_tables import Game, SeedTables, Worth
from llmattrib.train import encode_without_weights, training_inputs
from llmattrib.weight_files import file_digest

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
    tables, design = _tables(config), DESIGNS[settings.design]
    game = ranks.together(lambda: _game(config))
    done = tables.fill(design, settings.num_subsets, game, ranks, progress)
    return RetrainResult(
        path=tables.folder,
        design=settings.design,
        num_subsets=tables.num_rows(design),
        num_seeds=settings.num_seeds,
        num_queries=game.num_utilities,
        num_done=done,
        seconds=time.perf_counter() - started,
    )


def retrained_seeds(
    config: RunConfig, design: Design | None = None, examples: EncodedSet | None = None
) -> tuple[SubsetRows, Float[np.ndarray, "s m q"]]:
    """Read the subsets that are trained with every seed.

    Args:
        config: the run.
        design: of the subsets; that of `config.retraining` by default.
        examples: the training examples, where they are tokenised already.

    Returns:
        The subsets, their utilities log-odds, means over seeds; and the log-odds of each seed.

    Raises:
        StoreNotFoundError: nothing was retrained.
        FingerprintMismatchError: the sub-models are of other data, prompts or settings.
        MethodError: no subset of this design is trained.
        CorruptShardError: a shard fails its checksum.
        ConfigError, DataError, ModelError: as `retrain`.
    """
    return _tables(config).read(design or DESIGNS[config.retraining.design], lambda: _game(config, examples))


def retrained_rows(config: RunConfig, design: Design | None = None, examples: EncodedSet | None = None) -> SubsetRows:
    """Return the first of `retrained_seeds`.

    Raises:
        As `retrained_seeds`.
    """
    return retrained_seeds(config, design, examples)[0]


def _tables(config: RunConfig) -> SeedTables:
    settings = config.retraining
    return SeedTables(config.layout.path("retraining"), config.seed, settings.num_seeds, settings.shard_size, MADE_BY)


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


def game_inputs(config: RunConfig, examples: EncodedSet | None = None) -> tuple[EncodedSet, EncodedSet, dict[str, Any]]:
    """Return examples, queries and what the utilities depend on besides the training seed; loads no weights.

    Args:
        config: the run.
        examples: where they are tokenised already.

    Raises:
        ConfigError, DataError, ModelError: as `retrain`.
    """
    return inputs_from(config, _adapter(config), examples)


def inputs_from(
    config: RunConfig, adapter: str | None, examples: EncodedSet | None = None
) -> tuple[EncodedSet, EncodedSet, dict[str, Any]]:
    """Return the same of training that begins with an adapter, or with fresh factors.

    Raises:
        ConfigError, DataError, ModelError: as `retrain`.
    """
    examples, identity = training_inputs(config, examples)
    queries = encode_without_weights(config, load_validation_examples(config.data, config.values))
    return (
        examples,
        queries,
        {
            **{key: value for key, value in identity.items() if key != "seed"},
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


def _game(config: RunConfig, tokenised: EncodedSet | None = None) -> Game:
    examples, queries, identity = game_inputs(config, tokenised)

    def load() -> Worth:
        return load_game(config, examples, queries).worth

    return Game(len(examples.encoded), len(queries.encoded), identity, load)
