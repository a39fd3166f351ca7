"""Further training: what a final model loses when an example has no part in the steps that follow.

    a_i(q) = m_q(theta_T) - m_q(theta_T without i)          theta_0 the final model, T steps of the optimizer

m_q is the log-odds of query q's answer, so a positive number says that i helps it (with g = -m_q this is g without i
less g of everybody, as Wei et al. write it). A step descends the mean loss of a batch; without i it descends

    mean_{j in batch} loss_j - loss_i / n

so that all copies of a model see the same batches in the same order, and the sum over an epoch is that of the others.
Copies that leave out different examples are trained at once, one of them leaving out nobody: what is returned are
differences between two rows of the same arithmetic, in float64, and nobody's is exactly 0.

The loop knows no model: it takes a `Trainee`, which may be a ridge regression, a small network or the LoRA factors of
an LLM (lora_copies.py). Dropout is off; the rate is constant; AdamW starts without moments.
Cost: (examples + examples / shard size) x seeds x T steps.
Source: Wei et al. 2024 (arXiv 2412.03906); docs/methods.md section 12.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmattrib.errors import NonFiniteGradientError
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream
from llmattrib.sections import GoldConfig


@runtime_checkable
class Trainee(Protocol):
    """k copies of a model that are trained at once; parameters are tensors [k, ...], each copy has its own row.

    Attributes:
        num_examples: n.
        num_queries: q.
    """

    num_examples: int
    num_queries: int

    def start(self, num_copies: int) -> list[Tensor]:
        """Return the parameters of the final model, each [k, ...], leaves with gradients."""
        ...

    def losses(self, parameters: Sequence[Tensor], rows: Int[np.ndarray, "k b"]) -> Float[Tensor, "k b"]:
        """Return the loss of examples under each copy."""
        ...

    def margins(self, parameters: Sequence[Tensor]) -> Float[np.ndarray, "k q"]:
        """Return the log-odds, or what else is attributed, of each query under each copy, float64."""
        ...


@dataclass(frozen=True)
class FurtherTraining:
    """The game of leaving one example out of further training.

    Attributes:
        trainee: the final model.
        settings: how it is trained.
    """

    trainee: Trainee
    settings: GoldConfig

    def worth(
        self, members: Bool[np.ndarray, "m n"], seed: int, progress: Progress = silent
    ) -> Float[np.ndarray, "m s"]:
        """Return what each query loses where one example is left out, after every number of steps, flattened [T, q].

        Args:
            members: everybody, or everybody but one.
            seed: of the order of examples.
            progress: told of copies done.

        Raises:
            NonFiniteGradientError: a gradient is NaN or infinite.
            DeviceMemoryError: a batch does not fit on the device.
        """
        lost = np.zeros((len(members), len(self.settings.steps), self.trainee.num_queries))
        someone = ~members.all(axis=1)
        if someone.any():
            margins = self.margins(members[someone], seed)
            lost[someone] = (margins[:, :1] - margins[:, 1:]).transpose(1, 0, 2)
        progress(len(members), len(members))
        return lost.reshape(len(members), -1)

    def margins(self, members: Bool[np.ndarray, "m n"], seed: int) -> Float[np.ndarray, "s k q"]:
        """Return the margins [T, 1 + m, q] of everybody and of each row of members.

        Raises:
            NonFiniteGradientError, DeviceMemoryError: as `worth`.
        """
        settings, trainee = self.settings, self.trainee
        left_out = (~members).sum(axis=1)
        assert (left_out <= 1).all(), "further training leaves out one example at a time"
        own = np.concatenate([[0], np.argmin(members, axis=1)])
        share = np.concatenate([[0.0], -left_out / trainee.num_examples])
        parameters = trainee.start(len(own))
        optimizer = _optimizer(settings, parameters)
        found = []
        for step in range(max(settings.steps)):
            batch = batch_of(step, trainee.num_examples, settings.batch_size, seed)
            rows = np.concatenate([np.tile(batch, (len(own), 1)), own[:, None]], axis=1)
            weights = np.concatenate([np.full((len(own), len(batch)), 1 / len(batch)), share[:, None]], axis=1)
            losses = trainee.losses(parameters, rows)
            (losses * torch.as_tensor(weights).to(losses)).sum().backward()  # type: ignore[no-untyped-call]
            _check_finite(parameters, step, batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step + 1 in settings.steps:
                found.append(trainee.margins(parameters))
        return np.array(found)


def batch_of(step: int, num_examples: int, batch_size: int | None, seed: int) -> Int[np.ndarray, " b"]:
    """Return the examples of a step: an epoch's order is drawn afresh; without a batch size everybody.

    Args:
        step: from 0.
        num_examples: n.
        batch_size: of a batch; the last of an epoch may be smaller.
        seed: of the order.
    """
    if batch_size is None or batch_size >= num_examples:
        return np.arange(num_examples)
    epoch, number = divmod(step, -(-num_examples // batch_size))
    order = stream(seed, "further_training", epoch).permutation(num_examples)
    return np.asarray(order[number * batch_size : (number + 1) * batch_size])


def _optimizer(settings: GoldConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer; its update of one entry knows no other, so copies stay apart."""
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    return kind(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _check_finite(parameters: Sequence[Tensor], step: int, batch: Int[np.ndarray, " b"]) -> None:
    if not all(bool(torch.isfinite(parameter.grad).all()) for parameter in parameters if parameter.grad is not None):
        raise NonFiniteGradientError(
            f"a gradient is not finite in step {step + 1} of further training, examples {batch.tolist()}",
            expected="finite numbers",
            fix="lower gold.learning_rate, or look at these examples",
        )
