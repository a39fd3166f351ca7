"""From encoded examples to sketched LoRA gradients and their scalar columns.

An extractor fixes what is differentiated (output function) and where (linearisation point); a sketch says how the
gradients are compressed. At `init` every B is zero, so the network is the base model, every df/dA vanishes, and any
number of fresh A matrices can share one forward and backward: their features are one wider block. At `trained` each
adapter is one pass, and their blocks concatenate. Blocks of k inits or adapters are divided by sqrt(k), so kernels
average.

With `features.preconditioner` rows are whitened by the curvature of training examples before they are sketched
(curvature.py). Otherwise examples never mix: a row depends on its own tokens only, up to float32 rounding of batched
kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llmattrib.encoding import Batch, Encoded, Side, collate
from llmattrib.features.capture import AdapterTap, Tap, capture_pairs, gradients
from llmattrib.features.curvature import Curvature, CurvatureFit, Shape, Whitening
from llmattrib.features.outputs import OutputValues, Reading, evaluate_output
from llmattrib.features.sketch import Block, Sketch, SketchKind, SketchPlan, make_plan
from llmattrib.forward import completion_logits, loss_scale
from llmattrib.model import LoadedModel, LoraLayer, lora_a_init
from llmattrib.sections import FeaturesConfig

COLUMNS = ("norm", "loss", "log_odds", "label")


@dataclass(frozen=True)
class FeatureBatch:
    """Features of b examples.

    Attributes:
        phi: [b, c, p] float32 sketched gradients; c = 1 except for output `logits`.
        columns: [b] float32 each: `norm` (of the gradient, whitened if it is, before the sketch), `loss` (nats),
            `log_odds`, `label`.
    """

    phi: Float[np.ndarray, "b c p"]
    columns: dict[str, Float[np.ndarray, " b"]]

    def nonfinite_rows(self) -> list[int]:
        """Return the rows whose gradient holds NaN or infinity."""
        finite = np.isfinite(self.phi).all(axis=(1, 2)) & np.isfinite(self.columns["norm"])
        return [int(row) for row in np.flatnonzero(~finite)]


@contextmanager
def standing_at(loaded: LoadedModel, adapter: str | None) -> Iterator[None]:
    """Be at a linearisation point: the base model (None), or an adapter."""
    if adapter is None:
        with loaded.base_only():
            yield
    else:
        loaded.use(adapter)
        yield


_OutputConsumer = Callable[[int, int, Float[Tensor, "b size"]], None]
"""Takes an output number, a block number and the gradients of that output with respect to that block."""
_OutputPairs = Callable[[int, int, Float[Tensor, "b t m"], Float[Tensor, "b t k"]], None]
"""The same, of the two sides whose sum of outer products the gradients are."""


@dataclass(frozen=True)
class _Point:
    """One linearisation point: an adapter, or the base model with fresh A matrices."""

    adapter: str | None
    taps: tuple[Tap, ...] | tuple[AdapterTap, ...]


class Extractor:
    """Computes features of batches at a fixed linearisation point.

    Attributes:
        blocks: of parameters, in the order of the sketch.
        shapes: of the blocks' gradients, rows and columns.
        num_batches: extracted so far.
        whitening: set by `fit_curvature` and `whiten`; None without a preconditioner.

    Args:
        loaded: the model with its adapters, frozen. If ranks share its weights, all of them make an extractor, and run
            the same number of batches, of any sizes.
        config: output function and linearisation point.
        seed: seed of the fresh A matrices.
        label_ids: token ids of the label words, empty for generation.
    """

    def __init__(self, loaded: LoadedModel, config: FeaturesConfig, seed: int, label_ids: Sequence[int] = ()) -> None:
        self.loaded = loaded
        self.output = config.output
        self.label_ids = tuple(label_ids)
        self.blocks: tuple[Block, ...] = ()
        self.shapes: tuple[Shape, ...] = ()
        self.num_batches = 0
        self.whitening: Whitening | None = None
        self._config = config
        self._loss_scale = loss_scale(loaded)
        self._points: list[_Point] = []
        if config.linearisation == "init":
            self._points.append(_Point(None, self._init_taps(seed, config.num_inits)))
        else:
            for adapter in loaded.adapter_names:
                self._points.append(_Point(adapter, self._trained_taps(adapter)))
        if loaded.sharding:  # the taps hold the factors, so those of the model can go
            loaded.sharding.partition(loaded.model, loaded.device)

    @property
    def num_outputs(self) -> int:
        """Number of feature rows an example has."""
        return len(self.label_ids) if self.output == "logits" else 1

    def plan(self, kind: SketchKind, seed: int, dim: int, sample: Sequence[Sequence[Encoded]]) -> SketchPlan:
        """Plan a sketch whose block widths follow the squared gradient norms measured on `sample`.

        Args:
            kind: `oporp`, `rademacher` or `none`.
            seed: seed of the sketch's tables.
            dim: width wanted.
            sample: batches of calibration examples; read for `oporp` only.
        """
        norms = np.ones(len(self.blocks))
        if kind == "oporp" and dim < sum(block.size for block in self.blocks):
            norms = sum((self._block_norms(batch) for batch in sample), np.zeros(len(self.blocks)))
        return make_plan(kind, seed, dim, self.blocks, norms.tolist())

    def fit_curvature(self, sample: Sequence[Sequence[Encoded]]) -> Curvature:
        """Fit the EK-FAC curvature in two passes over `sample`, and whiten what is extracted from now on.

        Args:
            sample: batches of training examples.

        Raises:
            FeatureError: a layer is used several times in a forward.
        """
        fit = CurvatureFit(self.shapes, self._config.max_eigen_side, self.loaded.device)
        for examples in sample:
            batch = self._collated(examples)

            def add(
                _: int, block: int, left: Tensor, right: Tensor, is_token: Tensor = batch.attention_mask > 0
            ) -> None:
                fit.add_pair(block, left, right, is_token)

            self._differentiate(batch, add)
        fit.find_bases()
        for examples in sample:
            batch = self._collated(examples)
            self._differentiate(batch, lambda _, block, *pair: fit.add_gradients(block, gradients(*pair)))
        curvature = fit.curvature(self.num_outputs * sum(map(len, sample)))
        self.whiten(curvature)
        return curvature

    def whiten(self, curvature: Curvature) -> None:
        """Whiten what is extracted from now on."""
        self.whitening = Whitening(curvature, self._config.damping, self.loaded.device, len(self._points))

    def extract(self, examples: Sequence[Encoded], sketch: Sketch, padding_side: Side = "right") -> FeatureBatch:
        """Compute the features of one batch.

        Args:
            examples: b encoded examples.
            sketch: made from this extractor's plan.
            padding_side: `right` or `left`; the result does not depend on it.

        Returns:
            Features in the order of `examples`. NaN and infinity are passed on, see `FeatureBatch.nonfinite_rows`.
        """
        shape = len(examples), self.num_outputs
        phi = torch.zeros(*shape, sketch.dim, device=self.loaded.device)
        squared = torch.zeros(*shape, device=self.loaded.device)

        def consume(output: int, block: int, gradient: Tensor) -> None:
            sketch.add(phi[:, output], block, gradient)
            squared[:, output] += gradient.square().sum(1)

        values = self._gradients(examples, consume, padding_side)
        self.num_batches += 1
        num_points = len(values)
        columns = {
            "norm": squared.sum(1).sqrt(),
            "loss": torch.stack([value.loss for value in values]).sum(0) / num_points,
            "log_odds": torch.stack([value.log_odds for value in values]).sum(0) / num_points,
            "label": torch.tensor([float(example.label) for example in examples]),
        }
        return FeatureBatch(phi.cpu().numpy(), {name: column.cpu().numpy() for name, column in columns.items()})

    def _block_norms(self, examples: Sequence[Encoded]) -> Float[np.ndarray, " blocks"]:
        """Return the summed squared gradient norm of each block over a batch."""
        norms = np.zeros(len(self.blocks))

        def consume(output: int, block: int, gradient: Tensor) -> None:
            norms[block] += float(gradient.square().sum())

        self._gradients(examples, consume, "right")
        return norms

    def _gradients(self, examples: Sequence[Encoded], consume: _OutputConsumer, side: Side) -> list[OutputValues]:
        """Run forward and backward at every linearisation point; whiten the gradients."""
        whitening = self.whitening
        assert (whitening is None) == (self._config.preconditioner == "none"), "fit or load the curvature first"

        def form(output: int, block: int, left: Tensor, right: Tensor) -> None:
            gradient = gradients(left, right)
            consume(output, block, gradient if whitening is None else whitening(block, gradient))

        return self._differentiate(self._collated(examples, side), form)

    def _collated(self, examples: Sequence[Encoded], side: Side = "right") -> Batch:
        return collate(examples, self.loaded.pad_id, side).to(self.loaded.device)

    def _differentiate(self, batch: Batch, see: _OutputPairs) -> list[OutputValues]:
        """Run forward and backward at every linearisation point."""
        return [self._pass(point, batch, see) for point in self._points]

    def _pass(self, point: _Point, batch: Batch, see: _OutputPairs) -> OutputValues:
        output, last, sharding = 0, self.num_outputs - 1, self.loaded.sharding

        def route(block: int, left: Tensor, right: Tensor) -> None:
            see(output, block, left, right)

        with self.loaded.base_only(), capture_pairs(point.taps, route), torch.enable_grad():
            for output in range(last + 1):  # `route` reads it
                if output == 0 or sharding:  # partitioned weights serve one backward of a forward
                    logits, example, target = completion_logits(self.loaded.model, batch)
                    reading = Reading(logits, example, target, batch.labels)
                    values = evaluate_output(self.output, reading, self.label_ids)
                scaled = values.outputs[output].sum() * self._loss_scale
                scaled.backward(retain_graph=output < last and not sharding)  # type: ignore[no-untyped-call]
                if sharding:
                    sharding.release()
        return OutputValues(values.outputs.detach(), values.loss, values.log_odds)

    def _add_block(self, name: str, role: str, rows: int, columns: int) -> int:
        self.blocks += (Block(name, role, rows * columns),)
        self.shapes += ((rows, columns),)
        return len(self.blocks) - 1

    def _init_taps(self, seed: int, num_inits: int) -> tuple[Tap, ...]:
        taps = []
        for layer in self.loaded.layers:
            shape_a, _, scaling = layer.factors(self.loaded.adapter_names[0])
            rank = shape_a.shape[0]
            fresh = torch.cat([lora_a_init(seed, layer, rank, init) for init in range(num_inits)])
            fresh = (fresh / num_inits**0.5).to(self.loaded.device)
            block = self._add_block(layer.name, "B", layer.d_out, rank * num_inits)
            taps.append(Tap(layer.name, layer.module, fresh, scaling / self._loss_scale, block))
        return tuple(taps)

    def _trained_taps(self, adapter: str) -> tuple[AdapterTap, ...]:
        num_adapters = len(self.loaded.adapter_names)
        prefix = f"{adapter}/" if num_adapters > 1 else ""
        return tuple(self._trained_tap(layer, adapter, prefix, num_adapters) for layer in self.loaded.layers)

    def _trained_tap(self, layer: LoraLayer, adapter: str, prefix: str, num_adapters: int) -> AdapterTap:
        a, b, scaling = layer.factors(adapter)
        block_a = self._add_block(prefix + layer.name, "A", *a.shape)
        block_b = self._add_block(prefix + layer.name, "B", *b.shape)
        factor = 1 / (num_adapters**0.5 * self._loss_scale)
        a, b = a.detach().to(self.loaded.device), b.detach().to(self.loaded.device)
        return AdapterTap(layer.name, layer.module, a, b, scaling, factor, block_a, block_b)
