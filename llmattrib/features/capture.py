"""Exact per-example gradients of LoRA factors from one batched forward and backward.

For a layer y = W x + s B A x with input x_t and output gradient d_t = df/dy_t (METHODS.md section 2):

    df/dB = s sum_t d_t (A x_t)^T        [d_out, r]
    df/dA = s sum_t (B^T d_t) x_t^T      [r, d_in]

A forward hook keeps A x (and x where dA is wanted); a hook on the layer's output hands on the two sides of these outer
products as soon as the backward reaches it (`capture_pairs`), or their sums, the gradients of every example
(`capture`), so no more than one layer's gradients are alive. All
parameters stay frozen: the outputs of the lowest layers become the leaves of the graph, so the backward stops there
and forms no gradient of a base weight or an embedding.

Knows nothing of what the gradients are for. Limit: a layer must see its input as [batch, tokens, d_in].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmattrib.errors import FeatureError

Consumer = Callable[[int, Float[Tensor, "b size"]], None]
"""Takes a block number and the gradients of a batch with respect to that block, one row an example."""
PairConsumer = Callable[[int, Float[Tensor, "b t m"], Float[Tensor, "b t k"]], None]
"""Takes a block number and the two sides of a batch's gradients [m, k]: each is the sum over t of l_t r_t^T."""


@dataclass(frozen=True)
class Tap:
    """One LoRA layer to differentiate.

    Attributes:
        name: the layer, for messages.
        module: the module whose input is x and whose output is y.
        a: [r, d_in] factor A.
        b: [d_out, r] factor B, or None where B = 0 and df/dA vanishes.
        scaling: s.
        block_a: number of the block of A, or None.
        block_b: number of the block of B.
    """

    name: str
    module: nn.Module
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"] | None
    scaling: float
    block_a: int | None
    block_b: int


@contextmanager
def capture(taps: Sequence[Tap], consume: Consumer) -> Iterator[None]:
    """Send the gradients of every backward of a forward run inside this context to `consume`.

    Args:
        taps: the layers; a layer used twice in a forward is consumed twice, and the parts add up.
        consume: called in backward order with float32 rows; it must not keep the tensor.

    Raises:
        FeatureError: a layer's input is not [batch, tokens, d_in].
    """
    with capture_pairs(taps, lambda block, left, right: consume(block, gradients(left, right))):
        yield


def gradients(left: Float[Tensor, "b t m"], right: Float[Tensor, "b t k"]) -> Float[Tensor, "b size"]:
    """Return sum_t left_t right_t^T of each example as a row of size m k."""
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


@contextmanager
def capture_pairs(taps: Sequence[Tap], see: PairConsumer) -> Iterator[None]:
    """Send the two sides of the gradients of every backward of a forward run inside this context to `see`.

    Of B the left side is d and the right one s A x; of A they are s B^T d and x. Where a position does not reach the
    output, padding for one, d is zero.

    Args:
        taps: the layers.
        see: called in backward order with float32 tensors; it must not keep or change them.

    Raises:
        FeatureError: a layer's input is not [batch, tokens, d_in].
    """
    handles = [tap.module.register_forward_hook(_forward_hook(tap, see)) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(tap: Tap, see: PairConsumer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if x.dim() != 3:
            raise FeatureError(
                f"layer {tap.name} receives an input of shape {tuple(x.shape)}",
                expected="[batch, tokens, d_in]: layers that mix examples (routed experts) have no per-example rows",
                fix="leave this layer out of the adapter's target modules",
            )
        hidden = (x @ tap.a.T.to(x.dtype)).float().mul_(tap.scaling)
        kept = x if tap.block_a is not None else None
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda d: _see_layer(tap, d.detach().float(), hidden, kept, see))  # type: ignore[no-untyped-call]
        return output

    return hook


def _see_layer(
    tap: Tap,
    d: Float[Tensor, "b t d_out"],
    hidden: Float[Tensor, "b t r"],
    x: Float[Tensor, "b t d_in"] | None,
    see: PairConsumer,
) -> None:
    see(tap.block_b, d, hidden)
    if x is not None and tap.b is not None and tap.block_a is not None:
        see(tap.block_a, (d @ tap.b.to(d.dtype)).mul_(tap.scaling), x.float())
