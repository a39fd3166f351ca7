"""The retraining game: U(S) is what a model fine-tuned on the subset S says to each query.

    U_q(S) = log-odds of query q's answer under the LoRA fine-tune on S

A sub-model is trained exactly as `llmattrib train` would on the rows of S alone: same base, LoRA shape, optimizer,
epochs and batches of the seed's streams, from fresh factors (`warm_start`: from an adapter's). For label words the
log-odds are the label margin; for completions log p/(1-p) of the mean token log-probability, a monotone function of the
mean loss. All sub-models share one base in memory and differ in their factors, which are reset in place.

Cost: one fine-tune a subset, and one forward pass over the queries. The empty subset is the model it starts from.
Source: docs/methods.md section 4; Lin et al. 2022 (AME), Ilyas et al. 2022 (datamodels), Park et al. 2023 (LDS).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmattrib.config import RunConfig
from llmattrib.device import resolve_device
from llmattrib.encoding import Encoded, collate, label_token_ids, length_batches
from llmattrib.extraction import batch_memory
from llmattrib.features.outputs import Reading, evaluate_output
from llmattrib.finetune import FineTuning
from llmattrib.forward import completion_logits
from llmattrib.model import LoadedModel, prepare_trainable
from llmattrib.progress import Progress, silent
from llmattrib.train import training_dtype


def load_trainable(config: RunConfig, adapter: str | None = None) -> FineTuning:
    """Load the base model of a run with factors to train.

    Args:
        config: the run.
        adapter: a PEFT folder whose factors they are; fresh ones without.

    Raises:
        ModelError, ConfigError, DeviceMemoryError: as `prepare_trainable`.
    """
    dtype = training_dtype(config.train.dtype, resolve_device(config.model.device))
    loaded = prepare_trainable(config.model, dtype, config.seed, adapter)
    return FineTuning(loaded, config.train, config.model.lora.dropout, config.seed)


@torch.no_grad()
def log_odds(config: RunConfig, loaded: LoadedModel, queries: Sequence[Encoded]) -> Float[np.ndarray, " q"]:
    """Return the log-odds of each query's answer under the factors as they are, float64."""
    label_ids = label_token_ids(loaded.tokenizer, config.data)
    found = np.empty(len(queries))
    for rows in length_batches(list(map(len, queries)), config.features.tokens_per_batch):
        with batch_memory(config, len(rows)):
            batch = collate([queries[row] for row in rows], loaded.pad_id).to(loaded.device)
            reading = Reading(*completion_logits(loaded.model, batch), batch.labels)
            found[rows] = evaluate_output("log_odds", reading, label_ids).log_odds.double().cpu().numpy()
    return found


@dataclass
class RetrainingGame:
    """Fine-tunes on subsets of n examples, read off by q queries.

    Attributes:
        config: the run; reads `data.label_words`, `features.tokens_per_batch` and what training reads.
        tuning: from `load_trainable`.
        examples: n tokenised training examples.
        ids: their names, for messages.
        queries: q tokenised queries, each with its answer.
        start: factors that sub-models begin with; None for fresh ones of the seed.
    """

    config: RunConfig
    tuning: FineTuning
    examples: Sequence[Encoded]
    ids: Sequence[str]
    queries: Sequence[Encoded]
    start: dict[str, Tensor] | None = None

    def train(self, members: Bool[np.ndarray, " n"], seed: int) -> None:
        """Fine-tune on a subset; the factors stay as trained.

        Raises:
            NonFiniteGradientError: a gradient is NaN or infinite.
            DeviceMemoryError: a batch does not fit on the device.
        """
        rows = np.flatnonzero(members).tolist()
        self.tuning.restart(seed, self.start)
        self.tuning.run([self.examples[row] for row in rows], [self.ids[row] for row in rows])

    def worth(
        self, members: Bool[np.ndarray, "m n"], seed: int, progress: Progress = silent
    ) -> Float[np.ndarray, "m q"]:
        """Return the utilities of subsets.

        Args:
            members: the subsets.
            seed: of the fine-tunes: fresh factors, order of examples, dropout.
            progress: told of subsets done.

        Raises:
            NonFiniteGradientError, DeviceMemoryError: as `train`.
        """
        found = np.empty((len(members), len(self.queries)))
        for row, subset in enumerate(members):
            self.train(subset, seed)
            found[row] = log_odds(self.config, self.tuning.loaded, self.queries)
            progress(row + 1, len(members))
        return found
