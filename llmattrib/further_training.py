"""The stage behind `evaluate gold`: the final model trained further, with each of some examples left out.

    run_dir/gold/seed<k>.zarr      a subset table for each seed: masks, and what every prompt loses at every T

Filled as `retrain` fills its tables: by any number of ranks, resumable, to the same bytes. Rows are in the random order
of the design `leave_out`, so a smaller gold is the beginning of a larger one.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib.config import RunConfig
from llmattrib.distributed import Ranks
from llmattrib.encoding import EncodedSet
from llmattrib.errors import ConfigError
from llmattrib.extraction import run_adapters
from llmattrib.games.further_training import FurtherTraining
from llmattrib.games.lora_copies import LoraCopies
from llmattrib.games.subset_table import LEAVE_OUT
from llmattrib.model import load_model
from llmattrib.progress import Progress, silent
from llmattrib.retrain import inputs_from
from llmattrib.seed_tables import Game, SeedTables, Worth

MADE_BY = "llmattrib evaluate gold"
_NUMBERS = ("num_examples", "num_seeds", "shard_size")
"""Settings that say how much there is, not what it is."""


def train_further(
    config: RunConfig, ranks: Ranks | None = None, progress: Progress = silent, examples: EncodedSet | None = None
) -> int:
    """Do the further training of `config.gold` that is not there yet; called by all ranks.

    Args:
        config: the run; features are not needed.
        ranks: the processes of the job.
        progress: told of this rank's trainings done and to do.
        examples: the training examples, where they are tokenised already.

    Returns:
        Trainings done now, by all ranks.

    Raises:
        ConfigError: `values.data` is not set, or there is not one adapter.
        DataError, ModelError: the data or the model cannot be used.
        FingerprintMismatchError: further training of another model or with other settings is there.
        StoreLockedError: another job does it now.
        NonFiniteGradientError, DeviceMemoryError: as in training.
    """
    ranks = ranks or Ranks()
    game = ranks.together(lambda: _game(config, examples))
    num_examples = min(config.gold.num_examples or game.num_players, game.num_players)
    return _tables(config).fill(LEAVE_OUT, num_examples, game, ranks, progress)


def gold_scores(
    config: RunConfig, examples: EncodedSet | None = None
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, "k s q m"]]:
    """Read which examples were left out, and what each prompt lost by each: [seeds, T, q, m], in the model's log-odds.

    Args:
        config: the run.
        examples: the training examples, where they are tokenised already.

    Raises:
        StoreNotFoundError, MethodError: no further training was done.
        FingerprintMismatchError: it is of another model, other data, prompts or settings.
        CorruptShardError: a shard fails its checksum.
        ConfigError, DataError, ModelError: as `train_further`.
    """
    rows, lost = _tables(config).read(LEAVE_OUT, lambda: _game(config, examples))
    is_out = ~rows.members.all(axis=1)  # the last shard is filled up with everybody
    left_out = np.argmin(rows.members[is_out], axis=1)
    by_steps = lost[:, is_out].reshape(len(lost), len(left_out), len(config.gold.steps), -1)
    return left_out, by_steps.transpose(0, 2, 3, 1)


def _tables(config: RunConfig) -> SeedTables:
    gold = config.gold
    return SeedTables(config.layout.path("gold"), config.seed, gold.num_seeds, gold.shard_size, MADE_BY)


def _game(config: RunConfig, tokenised: EncodedSet | None = None) -> Game:
    adapters = run_adapters(config)
    if len(adapters) != 1:
        raise ConfigError(
            f"further training goes on from a final model, and the run has {len(adapters)} adapters",
            expected="one adapter",
            fix="run `llmattrib train` first, or name one in model.adapters",
        )
    examples, queries, identity = inputs_from(config, adapters[0], tokenised)
    settings = config.gold.model_dump(mode="json", exclude=set(_NUMBERS))
    kept = {key: value for key, value in identity.items() if not key.startswith(("train.", "lora."))}
    game: dict[str, Any] = kept | {f"gold.{key}": value for key, value in settings.items()}

    def load() -> Worth:
        loaded = load_model(config.model, adapters=adapters, dtype="float32")
        copies = LoraCopies(config, loaded, examples.encoded, queries.encoded)
        return FurtherTraining(copies, config.gold).worth

    num_utilities = len(config.gold.steps) * len(queries.encoded)
    return Game(len(examples.encoded), num_utilities, game, load)
