"""Exact per-example gradients of LoRA factors from one batched forward and backward.

For a layer y = W x + s B A x with input x_t and output gradient d_t = df/dy_t (METHODS.md section 2):

    df/dB = s sum_t d_t (A x_t)^T        [d_out, r]
    df/dA = s sum_t (B^T d_t) x_t^T      [r, d_in]

At B = 0 a forward hook keeps A x, and a hook on the layer's output hands on the two sides of these outer products as
soon as the backward reaches it (`capture_pairs`), or their sums, the gradients of every example (`capture`), so no more
than one layer's gradients are alive. Where the adapter takes part in the forward the hook adds s B A x to the output of
the base layer: A x and s B^T d, which the gradients need, are then those of the forward and the backward. All
parameters stay frozen: the outputs of the lowest layers become the leaves of the graph, so the backward stops there and
forms no gradient of a base weight or an embedding.

Knows nothing of what the gradients are for. Limit: a layer must see its input as [batch, tokens, d_in].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmattrib.errors import FeatureError

Consumer = Callable[[int, Float[Tensor, "b size"]], None]
"""Takes a block number and the gradients of a batch with respect to that block, one row an example."""
PairConsumer = Callable[[int, Float[Tensor, "b t m"], Float[Tensor, "b t k"]], None]
"""Takes a block number and the two sides of a batch's gradients [m, k]: each is the sum over t of l_t r_t^T."""


@dataclass(frozen=True)
class Tap:
    """One layer to differentiate with respect to B at B = 0, where df/dA vanishes; the forward knows no A.

    Attributes:
        name: the layer, for messages.
        module: the module whose input is x and whose output is y.
        a: [r, d_in] factor A.
        scaling: s.
        block: number of the block of B.
    """

    name: str
    module: nn.Module
    a: Float[Tensor, "r d_in"]
    scaling: float
    block: int

    def hooks(self, see: PairConsumer) -> list[RemovableHandle]:
        """Hook the layer."""

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = _input(self.name, inputs)
            hidden = (x @ self.a.T.to(x.dtype)).float().mul_(self.scaling)
            return _watched(output, lambda d: see(self.block, d, hidden))

        return [self.module.register_forward_hook(after)]


@dataclass(frozen=True)
class AdapterTap:
    """One layer to differentiate with respect to A and B at an adapter; adapters are off, and the hook adds B A x.

    Attributes:
        name: the layer, for messages.
        module: the module whose input is x and whose output is W x.
        a: [r, d_in] factor A, float32.
        b: [d_out, r] factor B, float32.
        scaling: s.
        factor: what gradients are multiplied by.
        block_a: number of the block of A.
        block_b: number of the block of B.
    """

    name: str
    module: nn.Module
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    scaling: float
    factor: float
    block_a: int
    block_b: int

    def hooks(self, see: PairConsumer) -> list[RemovableHandle]:
        """Hook the layer."""
        up = (self.scaling * self.b.T).contiguous()

        def receive(d: Tensor, reduced: Tensor, x: Tensor, hidden: Tensor) -> None:
            see(self.block_a, _scaled(reduced, self.factor), x)
            see(self.block_b, d, _scaled(hidden, self.scaling * self.factor))

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            _input(self.name, inputs)
            added: Tensor = _Added.apply(_leaf(output), inputs[0], self.a, up, receive)  # type: ignore[no-untyped-call]
            return added

        return [self.module.register_forward_hook(after)]


class _Added(torch.autograd.Function):
    """y + s B A x from y = W x of any kind and dtype; the backward hands on d, s B^T d, x and A x."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "b t d_out"],
        x: Float[Tensor, "b t d_in"],
        a: Float[Tensor, "r d_in"],
        up: Float[Tensor, "r d_out"],
        receive: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        """Add, in the dtype of the factors; `up` is s B^T, contiguous."""
        hidden = x.to(a.dtype) @ a.T
        ctx.save_for_backward(x, hidden, a, up)
        ctx.receive = receive
        flat = y.detach().flatten(0, 1).to(a.dtype)  # y itself, which nobody else has, or a wider copy
        added = flat.addmm_(hidden.flatten(0, 1), up)
        return added.view(y.shape).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of y and x."""
        (d,) = grads
        x, hidden, a, up = ctx.saved_tensors
        wide = d.to(a.dtype)
        reduced = wide @ up.T
        ctx.receive(wide, reduced, x.to(a.dtype), hidden)
        below = (reduced @ a).to(x.dtype) if ctx.needs_input_grad[1] else None
        return d, below, None, None, None


Taps = Sequence[Tap] | Sequence[AdapterTap]


@contextmanager
def capture(taps: Taps, consume: Consumer) -> Iterator[None]:
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
    if left.shape[2] > right.shape[2]:  # a product whose rows are long is several times quicker on a CPU
        return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).flatten(1)
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


@contextmanager
def capture_pairs(taps: Taps, see: PairConsumer) -> Iterator[None]:
    """Send the two sides of the gradients of every backward of a forward run inside this context to `see`.

    Of B the left side is d and the right one A x, of A they are B^T d and x; s is in either one. Where a position does
    not reach the output, padding for one, d is zero.

    Args:
        taps: the layers.
        see: called in backward order with float32 tensors; it must not keep or change them.

    Raises:
        FeatureError: a layer's input is not [batch, tokens, d_in].
    """
    handles = [handle for tap in taps for handle in tap.hooks(see)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(name: str, inputs: tuple[Any, ...]) -> Tensor:
    x: Tensor = inputs[0].detach()
    if x.dim() != 3:
        raise FeatureError(
            f"layer {name} receives an input of shape {tuple(x.shape)}",
            expected="[batch, tokens, d_in]: layers that mix examples (routed experts) have no per-example rows",
            fix="leave this layer out of the adapter's target modules",
        )
    return x


def _watched(output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """Return the output with its gradient handed on."""
    output = _leaf(output)

    def hand_on(d: Tensor) -> None:
        receive(d.detach().float())

    output.register_hook(hand_on)  # type: ignore[no-untyped-call]
    return output


def _leaf(output: Tensor) -> Tensor:
    """Return the output; a leaf where nothing below it is differentiated."""
    return output if output.requires_grad else output.detach().requires_grad_()


def _scaled(values: Tensor, factor: float) -> Tensor:
    """Return the product, and the values themselves for 1."""
    return values if factor == 1.0 else values * factor
