"""Scalar output functions of a causal LM whose gradients are features.

Each takes the logits at the positions it reads, and returns one value per example and per output, plus the scalar
columns every store carries. Nothing here knows about LoRA, hooks or sketches.

All losses go through the token margin m = z_y - logsumexp(z_others), nll = softplus(-m): it keeps full relative
precision when a token is nearly certain, where log-softmax in float32 rounds to zero and `log_odds` would be infinite.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from llmattrib.sections import OutputFunction


@dataclass(frozen=True)
class Reading:
    """Logits at the positions an output function reads, for a batch of b examples.

    Attributes:
        logits: [m, v] float32, row k belongs to example `example[k]`.
        example: [m] example of each row, ascending.
        target: [m] token that follows each row's position.
        label: [b] index into the label words, -1 without labels.
    """

    logits: Float[Tensor, "m v"]
    example: Int[Tensor, " m"]
    target: Int[Tensor, " m"]
    label: Int[Tensor, " b"]


@dataclass(frozen=True)
class OutputValues:
    """Values to differentiate and the columns to store.

    Attributes:
        outputs: [c, b] with gradient; c = 1 except for `logits`.
        loss: [b] mean negative log-likelihood of the completion, or of the label among the label words. Nats.
        log_odds: [b] log p/(1-p) of the completion's mean token log-probability, or the label margin.
    """

    outputs: Float[Tensor, "c b"]
    loss: Float[Tensor, " b"]
    log_odds: Float[Tensor, " b"]


def token_margins(logits: Float[Tensor, "m v"], target: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return z_y - logsumexp of all other logits, row by row."""
    chosen = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], float("-inf"))
    return chosen.squeeze(1) - torch.logsumexp(others, dim=1)


def mean_per_example(values: Float[Tensor, " m"], example: Int[Tensor, " m"], num_examples: int) -> Float[Tensor, " b"]:
    """Average rows of the same example. A small dense product: the same order of sums on every device."""
    membership = (example[None, :] == torch.arange(num_examples, device=example.device)[:, None]).to(values.dtype)
    return (membership @ values) / membership.sum(1)


def evaluate_output(kind: OutputFunction, reading: Reading, label_ids: Sequence[int]) -> OutputValues:
    """Evaluate output function `kind`.

    Args:
        kind: `loss`, `log_odds`, `margin`, `logits` or `pntk` (Mohamadi et al. 2023: sum of logits over sqrt(c)).
        reading: logits at the completion's positions, or at the answer position alone when there are label words.
        label_ids: token ids of the label words, empty for generation.

    Returns:
        Values whose sum over examples can be differentiated: an example's value depends on its own tokens only.
    """
    num_examples = reading.label.shape[0]
    if label_ids:
        words = reading.logits[:, list(label_ids)]
        margin = token_margins(words, reading.label)
        loss, log_odds = softplus(-margin), margin
    else:
        nll = softplus(-token_margins(reading.logits, reading.target))
        loss = mean_per_example(nll, reading.example, num_examples)
        log_odds = -loss - torch.log(-torch.expm1(-loss))
        words = reading.logits
    if kind == "loss":
        outputs = loss[None]
    elif kind in ("log_odds", "margin"):
        outputs = log_odds[None]
    elif kind == "logits":
        outputs = words.T
    else:
        summed = words.sum(1) / words.shape[1] ** 0.5
        outputs = (summed if label_ids else mean_per_example(summed, reading.example, num_examples))[None]
    return OutputValues(outputs, loss.detach(), log_odds.detach())
