"""The model of a run without its weights: what is counted, and the peak memory of a batch, on torch's meta device.

Parameters and LoRA layers are those of the real classes (transformers, PEFT), so any architecture that `build` takes
is planned alike. `batch_peak` runs the real forward, output function and backward on tensors that have shapes and no
data, and follows every storage from birth to death. Attention is replaced by what the fused kernels keep (inputs,
output, one number a row, the mask as numbers), since the meta device has no fused kernel. Workspaces inside kernels,
the allocator's rounding and fragmentation are not seen.
"""

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from llmattrib.adapters import linear_modules
from llmattrib.config import RunConfig
from llmattrib.errors import ModelNotFoundError, first_line
from llmattrib.features.capture import AdapterTap, Tap, capture
from llmattrib.features.curvature import Shape
from llmattrib.features.outputs import Reading, evaluate_output
from llmattrib.features.sketch import Block
from llmattrib.model import LoraLayer, empty_adapter
from llmattrib.weights import load_architecture, quiet_loading


@dataclass(frozen=True)
class ModelShape:
    """What the costs of a model depend on.

    Attributes:
        architecture: class of the model.
        num_parameters: of the base model; tied ones once.
        weight_bytes: of these parameters and the buffers, in `model.dtype`.
        gathered_bytes: of the largest part that ZeRO-3 brings together at once: a block of layers, or the embedding.
        linear_parameters: matrix entries a token is multiplied with, without the output embedding.
        backward_parameters: those in the lowest block with LoRA and above: where the backward goes.
        head_parameters: of the output embedding, used at completion positions only.
        attention_width: heads times head width, summed over layers.
        backward_attention_width: the same from the lowest block with LoRA on.
        hidden_size: width of a token.
        vocab_size: rows of the output embedding.
        context: most tokens of an example.
        lora_in: sum of r * d_in over LoRA layers, the entries of all A.
        lora_out: sum of r * d_out, the entries of all B.
        blocks: the gradient's blocks, as `build` sees them.
        shapes: rows and columns of each.
    """

    architecture: str
    num_parameters: int
    weight_bytes: int
    gathered_bytes: int
    linear_parameters: int
    backward_parameters: int
    head_parameters: int
    attention_width: int
    backward_attention_width: int
    hidden_size: int
    vocab_size: int
    context: int
    lora_in: int
    lora_out: int
    blocks: tuple[Block, ...]
    shapes: tuple[Shape, ...]

    @property
    def gradient_dim(self) -> int:
        """Entries of an example's gradient before the sketch."""
        return sum(block.size for block in self.blocks)


@dataclass(frozen=True)
class EmptyModel:
    """A model with LoRA on the meta device.

    Attributes:
        model: the PEFT model, frozen.
        taps: what `build` would hook.
        shape: its numbers.
    """

    model: nn.Module
    taps: tuple[Tap, ...] | tuple[AdapterTap, ...]
    shape: ModelShape


def empty_model(config: RunConfig, adapter: Path | None = None, num_adapters: int = 1) -> EmptyModel:
    """Make the model of a run on the meta device.

    Args:
        config: the run; `plan.architecture` stands for a model that is not here.
        adapter: folder whose adapter_config.json gives the LoRA shape; `model.lora` when None.
        num_adapters: adapters whose `trained` features are concatenated.

    Raises:
        ModelNotFoundError: the architecture is not known.
        ConfigError, UnsupportedAdapterError: LoRA does not fit it.
    """
    settings = config.model
    architecture = load_architecture(
        config.plan.architecture or settings.name,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    try:
        with torch.device("meta"), quiet_loading():
            base: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                architecture,
                dtype=getattr(torch, settings.dtype),
                attn_implementation=settings.attn_implementation,
                trust_remote_code=settings.trust_remote_code,
            )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ModelNotFoundError(
            f"{settings.name} cannot be laid out: {first_line(error)}", expected="a causal language model"
        ) from error
    counts = _count(base)
    linear = [
        (name, sum(p.numel() for p in module.parameters() if p.dim() == 2)) for name, module in linear_modules(base)
    ]
    model, layers = empty_adapter(base, settings.lora, adapter)
    taps, blocks, shapes = _taps(layers, config, num_adapters)
    lowest = min(_block_number(layer.name) for layer in layers)
    backward = sum(size for name, size in linear if _block_number(name) >= lowest)
    text = architecture.get_text_config()
    heads = int(text.num_attention_heads)
    width = heads * int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    num_layers = int(text.num_hidden_layers)
    factors = [layer.factors("default")[:2] for layer in layers]
    shape = ModelShape(
        architecture=type(base).__name__,
        **counts,
        linear_parameters=sum(size for _, size in linear),
        backward_parameters=backward,
        attention_width=width * num_layers,
        backward_attention_width=width * (num_layers - max(lowest, 0)),
        hidden_size=int(text.hidden_size),
        context=int(getattr(text, "max_position_embeddings", 0) or 0),
        lora_in=sum(a.numel() for a, _ in factors),
        lora_out=sum(b.numel() for _, b in factors),
        blocks=blocks,
        shapes=shapes,
    )
    return EmptyModel(model, taps, shape)


def _count(base: Any) -> dict[str, int]:
    """Count what is counted before LoRA wraps the layers."""
    head = base.get_output_embeddings().weight
    largest = int(head.numel()) * head.element_size()
    for module in base.modules():
        if isinstance(module, nn.ModuleList):
            largest = max(largest, *(sum(p.numel() * p.element_size() for p in block.parameters()) for block in module))
    return {
        "num_parameters": sum(p.numel() for p in base.parameters()),
        "weight_bytes": sum(t.numel() * t.element_size() for t in (*base.parameters(), *base.buffers())),
        "gathered_bytes": largest,
        "head_parameters": int(head.numel()),
        "vocab_size": int(head.shape[0]),
    }


def _block_number(name: str) -> int:
    """Return the block of layers that a module is in, -1 outside: the first number of its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _taps(
    layers: list[LoraLayer], config: RunConfig, num_adapters: int
) -> tuple[tuple[Tap, ...] | tuple[AdapterTap, ...], tuple[Block, ...], tuple[Shape, ...]]:
    """Return the taps of one pass, and the blocks of all with their shapes, in the order of `build`."""
    fresh_taps: list[Tap] = []
    trained_taps: list[AdapterTap] = []
    blocks: list[Block] = []
    shapes: list[Shape] = []
    num_inits = config.features.num_inits
    at_init = config.features.linearisation == "init"
    for layer in layers:
        a, b, scaling = layer.factors("default")
        if at_init:
            fresh = a.new_empty(a.shape[0] * num_inits, a.shape[1])
            fresh_taps.append(Tap(layer.name, layer.module, fresh, scaling, len(blocks)))
            blocks.append(Block(layer.name, "B", b.numel() * num_inits))
            shapes.append((b.shape[0], b.shape[1] * num_inits))
        else:
            place = len(blocks), len(blocks) + 1
            trained_taps.append(AdapterTap(layer.name, layer.module, a, b, scaling, 1.0, *place))
            blocks += [Block(layer.name, "A", a.numel()), Block(layer.name, "B", b.numel())]
            shapes += [(a.shape[0], a.shape[1]), (b.shape[0], b.shape[1])]
    times = 1 if at_init else num_adapters
    taps = tuple(fresh_taps) if at_init else tuple(trained_taps)
    return taps, tuple(blocks) * times, tuple(shapes) * times


@dataclass(frozen=True)
class BatchShape:
    """A padded batch: b examples of t tokens, m of them completion tokens."""

    num_examples: int
    width: int
    num_completion: int


def batch_peak(empty: EmptyModel, config: RunConfig, batch: BatchShape) -> int:
    """Return the largest number of bytes alive at once beyond the weights while a batch becomes features.

    Args:
        empty: the model.
        config: the run: output function, linearisation, label words.
        batch: its shape.
    """
    tuner: Any = empty.model.base_model
    tuner.disable_adapter_layers()
    empty.model.requires_grad_(False)
    own = [t.untyped_storage() for t in (*empty.model.parameters(), *empty.model.buffers())]
    meter = _Meter([*own, *(tap.a.untyped_storage() for tap in empty.taps if isinstance(tap, Tap))])
    with meter, _FusedAttention(), torch.device("meta"):
        phi = torch.empty(batch.num_examples, config.features.sketch.dim)

        def consume(block: int, gradient: Float[Tensor, "b size"]) -> None:
            sketched = gradient * 1.0
            phi.add_(sketched[:, :1])
            gradient.square().sum(1)

        with capture(empty.taps, consume), torch.enable_grad():
            outputs = _outputs(empty, config, batch)
            for number in range(len(outputs)):
                outputs[number].sum().backward(retain_graph=number + 1 < len(outputs))  # type: ignore[no-untyped-call]
    return meter.peak


def _outputs(empty: EmptyModel, config: RunConfig, batch: BatchShape) -> Float[Tensor, "c b"]:
    b, t, m = batch.num_examples, batch.width, batch.num_completion
    base: Any = empty.model
    head = base.get_base_model().get_output_embeddings()
    ids = torch.zeros(b, t, dtype=torch.int64)
    mask = torch.ones(b, 1, t, t, dtype=torch.bool)  # of four dimensions, which no model looks into
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[None, :m].clone(), *args[1:]))
    try:
        logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    row = torch.zeros(m, dtype=torch.int64)
    reading = Reading(logits, row, row, torch.zeros(b, dtype=torch.int64))
    return evaluate_output(config.features.output, reading, range(len(config.data.label_words))).outputs


class _Meter(TorchDispatchMode):
    """Follows the bytes of all storages that are made while it is on."""

    def __init__(self, own: list[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = {storage._cdata for storage in own}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


class _FusedAttention(TorchFunctionMode):
    """Puts what a fused attention kernel keeps in place of scaled_dot_product_attention."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **settings)
        mask = settings.get("attn_mask")
        if len(args[0]) == 1:  # one example by itself has no padding, and needs no mask
            mask = None
        numbers = None if mask is None else mask.to(args[0].dtype)
        return _Kept.apply(*args[:3], numbers)  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    """Attention that only keeps: queries, keys, values, mask, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
