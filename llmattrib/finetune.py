"""LoRA factors in training: one epoch at a time over tokenised examples, from fresh factors or from where they are.

AdamW, linear warm-up and decay, gradient clipping, loss on completion tokens; batches are drawn afresh each epoch from
named streams. What is trained is held in memory: the caller saves it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from llmattrib.encoding import Encoded, collate
from llmattrib.errors import NonFiniteGradientError, memory_errors
from llmattrib.forward import completion_logits, loss_scale
from llmattrib.model import LoadedModel, lora_a_init
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream
from llmattrib.sections import TrainConfig


class FineTuning:
    """The factors of a model that `prepare_trainable` loaded, and their optimizer.

    Attributes:
        loaded: the model.
        settings: of the training.
        dropout: of LoRA.
        seed: of fresh factors, the order of examples and dropout.
        factors: the trained tensors by name, in the order of the model.
        optimizer: over them.
    """

    def __init__(self, loaded: LoadedModel, settings: TrainConfig, dropout: float, seed: int) -> None:
        self.loaded, self.settings, self.dropout = loaded, settings, dropout
        self.factors: dict[str, Tensor] = {}
        for layer in loaded.layers:
            self.factors[f"{layer.name}.A"], self.factors[f"{layer.name}.B"], _ = layer.factors("default")
        self._continue(seed)

    def _continue(self, seed: int) -> None:
        self.seed = seed
        self.optimizer = torch.optim.AdamW(
            self.factors.values(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )

    @torch.no_grad()
    def restart(self, seed: int, start: dict[str, Tensor] | None = None) -> None:
        """Begin anew with another seed.

        Args:
            seed: of all that is random.
            start: factors to begin with; None draws A afresh and sets B to zero.
        """
        for layer in self.loaded.layers:
            a, b, _ = layer.factors("default")
            if start is None:
                a.copy_(lora_a_init(seed, layer, a.shape[0], 0))
                b.zero_()
            else:
                a.copy_(start[f"{layer.name}.A"])
                b.copy_(start[f"{layer.name}.B"])
        self._continue(seed)

    def run(self, encoded: Sequence[Encoded], ids: Sequence[str]) -> None:
        """Train all epochs; no examples leave the factors as they are.

        Args:
            encoded: examples.
            ids: their names, for messages.

        Raises:
            NonFiniteGradientError, DeviceMemoryError: as `epoch`.
        """
        for epoch in range(self.settings.epochs if encoded else 0):
            self.epoch(encoded, ids, epoch)

    def epoch(self, encoded: Sequence[Encoded], ids: Sequence[str], epoch: int, progress: Progress = silent) -> float:
        """Train one epoch.

        Args:
            encoded: examples.
            ids: their names, for messages.
            epoch: its number, from 0.
            progress: told of sequences done and in all, over all epochs.

        Returns:
            Mean loss, nats a completion token.

        Raises:
            NonFiniteGradientError: a gradient is NaN or infinite.
            DeviceMemoryError: a batch does not fit on the device.
        """
        settings = self.settings
        order = stream(self.seed, "train_order", epoch).permutation(len(encoded)).tolist()
        num_batches = -(-len(encoded) // settings.batch_size)
        total_loss, total_tokens = 0.0, 0
        for number in range(num_batches):
            rows = order[number * settings.batch_size : (number + 1) * settings.batch_size]
            step = epoch * num_batches + number
            rate = settings.learning_rate * learning_rate_factor(
                step, settings.epochs * num_batches, settings.warmup_ratio
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with self._dropout_stream(step), _device_memory(settings.batch_size, len(rows)):
                loss, tokens = backward(self.loaded, [encoded[row] for row in rows])
            norm = torch.nn.utils.clip_grad_norm_(self.factors.values(), settings.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise NonFiniteGradientError(
                    f"the gradient is {float(norm)} in step {step + 1} (epoch {epoch + 1}), "
                    f"among the examples {', '.join(repr(ids[row]) for row in rows)}",
                    expected="finite numbers",
                    fix="look at these examples, lower train.learning_rate, or set train.dtype to bfloat16 or float32",
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total_loss, total_tokens = total_loss + loss * tokens, total_tokens + tokens
            progress(epoch * len(encoded) + number * settings.batch_size + len(rows), settings.epochs * len(encoded))
        return total_loss / total_tokens

    @contextmanager
    def _dropout_stream(self, step: int) -> Iterator[None]:
        """Draw dropout masks of a step from a stream of its own, so that a resumed run draws the same."""
        dropout, device = self.dropout > 0, self.loaded.device
        devices = [device] if device.type == "cuda" else []  # the default is all GPUs of the machine
        with torch.random.fork_rng(devices) if dropout else nullcontext():
            if dropout:
                torch.manual_seed(int(stream(self.seed, "dropout", step).integers(2**63)))
            yield


def backward(loaded: LoadedModel, examples: Sequence[Encoded]) -> tuple[float, int]:
    """Accumulate the gradient of the batch's mean loss; return that loss in nats and its number of tokens."""
    scale = loss_scale(loaded)
    batch = collate(examples, loaded.pad_id).to(loaded.device)
    logits, _, target = completion_logits(loaded.model, batch)
    loss = torch.nn.functional.cross_entropy(logits, target)
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    if scale != 1.0:
        for parameter in loaded.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
    return loss.item(), len(target)


def _device_memory(batch_size: int, num_examples: int) -> AbstractContextManager[None]:
    """Name the batch size to try when a batch does not fit."""
    smaller = f"set train.batch_size={max(1, batch_size // 2)}"
    shorter = (
        "set data.max_length and data.overlong=truncate (the batch is one example already), or train.dtype=bfloat16"
    )
    return memory_errors(
        f"a batch of {num_examples} examples (train.batch_size is {batch_size})",
        expected="room for the activations of one batch beside the model",
        fix=smaller if num_examples > 1 else shorter,
    )


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the share of the learning rate at a step: linear up over the warm-up, then linear down towards zero.

    Args:
        step: from 0.
        num_steps: steps in all.
        warmup_ratio: share of the steps that warm up.
    """
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (num_steps - step) / (num_steps - warmup)
