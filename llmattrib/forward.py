"""Forward passes that compute no more than is read; shared by training and features.

Logits: at a vocabulary of 50,000 to 150,000 the output layer is a large part of a small model's cost, and completions
are a small part of the tokens. A forward pre-hook on the output embedding keeps the wanted positions as one [1, m, d]
row, which any Hugging Face causal LM passes through. When the output embedding itself is a LoRA target its hooks
must see whole sequences, so all logits are computed and then selected.

Frozen prefix: with LoRA on layers 15 to 29 of 30, half of every training pass computes the same hidden states in
every epoch. They are computed once, kept (without padding, in the base's dtype) and fed to the first block that has
LoRA, while the blocks below it hand through what they get. Used only when it is exact (blocks in one `ModuleList`,
called in order with the hidden states first; checked on one batch) and the states fit in 1 GB.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from llmattrib.encoding import Batch, Encoded, collate, length_batches
from llmattrib.model import LoadedModel

MAX_PREFIX_BYTES = 2**30
PREFIX_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # relative, of a batch's loss
_TOKENS_PER_BATCH = 1024
_BLOCK = re.compile(r"(?P<list>.*?\.[^.]*)\.(?P<index>\d+)\.")


def position_logits(model: nn.Module, batch: Batch, positions: Bool[Tensor, "b t"]) -> Float32[Tensor, "m v"]:
    """Run the model and return its next-token logits at some positions.

    Args:
        model: a causal LM, bare or with LoRA layers.
        batch: padded examples on the model's device. Position ids are passed for left padding only, where they are
            needed; models that do not take them read the attention mask.
        positions: the m positions wanted, true where wanted.

    Returns:
        Float32 logits, in row-major order of `positions`, attached to the graph.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.side == "left" and "position_ids" in _forward_parameters(model):
        inputs["position_ids"] = batch.position_ids
    head = _selectable_head(model)
    if head is None:
        logits: Tensor = model(**inputs).logits[positions]
        return logits.float()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][positions].unsqueeze(0), *args[1:]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    assert logits.shape[:2] == (1, int(positions.sum())), f"the output layer gave {tuple(logits.shape)}"
    return logits[0].float()


def completion_logits(
    model: nn.Module, batch: Batch
) -> tuple[Float32[Tensor, "m v"], Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Run the model and return the logits that predict completion tokens.

    Args:
        model: a causal LM, bare or with LoRA layers.
        batch: padded examples on the model's device.

    Returns:
        For the m completion tokens of the batch, example by example in order: float32 logits attached to the graph;
        the example's row in the batch; the token to predict.
    """
    predicted = batch.completion_mask.clone()
    predicted[:, 0] = False  # nothing predicts the first token; a completion never starts there
    positions = torch.zeros_like(predicted)
    positions[:, :-1] = predicted[:, 1:]
    return position_logits(model, batch, positions), predicted.nonzero()[:, 0], batch.input_ids[predicted]


class _ReachedError(Exception):
    """Ends a forward pass at the first block with LoRA."""


class FrozenPrefix:
    """The hidden states of all examples where the first block with LoRA begins.

    Args:
        loaded: the model.
        encoded: the examples.
        blocks: the blocks below, in order.
        first: the first block with LoRA.
    """

    def __init__(
        self, loaded: LoadedModel, encoded: Sequence[Encoded], blocks: Sequence[nn.Module], first: nn.Module
    ) -> None:
        self._blocks, self._first = list(blocks), first
        self._states: list[Tensor] = [torch.empty(0)] * len(encoded)
        self._num_outputs = 0  # 0: a block returns a tensor; n: a tuple of n
        for rows in length_batches([len(item) for item in encoded], _TOKENS_PER_BATCH):
            states = self._compute(loaded, [encoded[row] for row in rows])
            for row, state in zip(rows, states, strict=True):
                self._states[row] = state[: len(encoded[row])].clone()

    @contextmanager
    def feed(self, rows: Sequence[int], width: int) -> Iterator[None]:
        """Let the next forward pass, over examples `rows` padded right to `width`, begin at the first LoRA block."""
        hidden = nn.utils.rnn.pad_sequence([self._states[row] for row in rows], batch_first=True)
        assert hidden.shape[1] == width, (hidden.shape, width)

        def hand_through(states: Tensor, *_: Any, **__: Any) -> Any:
            return (states, *[None] * (self._num_outputs - 1)) if self._num_outputs else states

        with ExitStack() as stack:
            for block in self._blocks:
                vars(block)["forward"] = hand_through
                stack.callback(vars(block).pop, "forward")
            handle = self._first.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
            stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def _compute(self, loaded: LoadedModel, items: Sequence[Encoded]) -> Tensor:
        """Return the hidden states [b, t, d] of right-padded examples at the first LoRA block."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            reached.append(args[0])
            raise _ReachedError

        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._num_outputs = len(output) if isinstance(output, tuple) else 0

        with ExitStack() as stack:
            stack.callback(self._first.register_forward_pre_hook(stop).remove)
            stack.callback(self._blocks[-1].register_forward_hook(note).remove)
            try:
                completion_logits(loaded.model, collate(items, loaded.pad_id).to(loaded.device))
            except _ReachedError:
                return reached[0]
        raise AssertionError("the first block with LoRA was not reached")


def frozen_prefix(loaded: LoadedModel, encoded: Sequence[Encoded]) -> FrozenPrefix | None:
    """Compute the hidden states that training can start from, or return None where it cannot.

    Args:
        loaded: the model, with its LoRA factors as training begins.
        encoded: all examples.
    """
    matches = [_BLOCK.match(layer.name) for layer in loaded.layers]
    base: Any = loaded.model.get_base_model()
    names = {match["list"] for match in matches if match}
    start = min((int(match["index"]) for match in matches if match), default=0)
    if len(names) != 1 or start == 0:
        return None
    blocks: Any = base.get_submodule(names.pop())
    width = int(base.config.get_text_config().hidden_size)
    num_bytes = sum(map(len, encoded)) * width * next(base.parameters()).element_size()
    if not isinstance(blocks, nn.ModuleList) or num_bytes > MAX_PREFIX_BYTES:
        return None
    try:
        prefix = FrozenPrefix(loaded, encoded, list(blocks)[:start], blocks[start])
        is_exact = _is_exact(prefix, loaded, encoded)
    except (IndexError, TypeError, AttributeError):  # blocks that are called in another way
        return None
    return prefix if is_exact else None


@torch.no_grad()
def _is_exact(prefix: FrozenPrefix, loaded: LoadedModel, encoded: Sequence[Encoded]) -> bool:
    """Compare the loss of one batch with and without the blocks below."""
    rows = list(range(min(4, len(encoded))))
    batch = collate([encoded[row] for row in rows], loaded.pad_id).to(loaded.device)
    with loaded.base_only():  # no dropout, so no random numbers are drawn
        whole, _, target = completion_logits(loaded.model, batch)
        with prefix.feed(rows, batch.input_ids.shape[1]):
            short, _, _ = completion_logits(loaded.model, batch)
    expected, found = (nn.functional.cross_entropy(logits, target).item() for logits in (whole, short))
    return abs(expected - found) <= PREFIX_TOLERANCE[loaded.fingerprint["dtype"]] * abs(expected)


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(_base(model).forward).parameters)


def _selectable_head(model: nn.Module) -> nn.Module | None:
    """Return the output embedding, or None when there is none or LoRA wraps it."""
    head: nn.Module | None = _base(model).get_output_embeddings()
    return None if head is None or hasattr(head, "lora_A") else head


def _base(model: Any) -> Any:
    """Return the transformers model inside a PeftModel, whose own forward takes any argument."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
