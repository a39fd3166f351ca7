"""Linear sketches that preserve inner products of long block-structured gradients.

    oporp        each block: random signs, one random permutation, sums within equal bins (Li & Li 2023). A block's
                 width is proportional to its share of the squared gradient norm (the allocation that minimises the
                 variance of an inner product, since a block of width w adds about |g|^2 |g'|^2 / w).
    rademacher   one dense random sign matrix over all blocks, divided by sqrt(dim). For small models and comparison.
    none         concatenation: exact, as long as the gradient.

Every table is a pure function of (seed, block name, role), so it is the same on any device, rank and order of use.
E<Sx, Sy> = <x, y> for all three. A sketch knows block sizes and widths, nothing of models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llmattrib.errors import SketchError
from llmattrib.rng import stream

SketchKind = Literal["oporp", "rademacher", "none"]
MAX_RADEMACHER_BYTES = 4 << 30


@dataclass(frozen=True)
class Block:
    """One LoRA factor of one layer: the unit a sketch treats separately.

    Attributes:
        name: layer name, with the adapter's name before it when there are several.
        role: `A` or `B`.
        size: number of gradient entries.
    """

    name: str
    role: str
    size: int


@dataclass(frozen=True)
class SketchPlan:
    """What a sketch is made of; JSON-able, recorded in the store's manifest.

    Attributes:
        kind: `oporp`, `rademacher` or `none`.
        seed: seed of the tables.
        dim: width of the whole sketch.
        blocks: the blocks in order.
        widths: width of each block (all equal to `dim` for `rademacher`, whose blocks share their columns).
    """

    kind: SketchKind
    seed: int
    dim: int
    blocks: tuple[Block, ...]
    widths: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts."""
        return asdict(self) | {"blocks": [asdict(block) for block in self.blocks], "widths": list(self.widths)}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "SketchPlan":
        """Read back `to_json`."""
        return cls(
            tree["kind"],
            int(tree["seed"]),
            int(tree["dim"]),
            tuple(Block(**block) for block in tree["blocks"]),
            tuple(tree["widths"]),
        )


def allocate_widths(sizes: Sequence[int], squared_norms: Sequence[float], dim: int) -> tuple[int, ...]:
    """Divide `dim` among blocks in proportion to their squared norms, at least 1 and at most their size each.

    Args:
        sizes: entries of each block.
        squared_norms: mean squared gradient norm of each block; any common unit.
        dim: total width; sketches wider than the gradient are cut to its length.

    Returns:
        Widths that sum to min(dim, sum(sizes)).

    Raises:
        SketchError: there are more blocks than dimensions.
    """
    if dim < len(sizes):
        raise SketchError(
            f"a sketch of {dim} dimensions cannot hold {len(sizes)} blocks",
            expected="one dimension a block at least",
            fix=f"set features.sketch.dim to {4 * len(sizes)} or more, or adapt fewer layers",
        )
    size = np.asarray(sizes, dtype=np.int64)
    weight = np.maximum(np.asarray(squared_norms, dtype=np.float64), 0.0)
    weight = weight / weight.sum() if weight.sum() > 0 else size / size.sum()
    width = np.zeros(len(size), dtype=np.float64)
    is_full = np.zeros(len(size), dtype=bool)
    budget = float(min(dim, int(size.sum())))
    while True:  # each round fills at least one block to its size, so at most len(sizes) rounds
        free = budget - size[is_full].sum()
        share = np.where(is_full, 0.0, weight)
        total = share.sum()
        share = share / total if total > 0 else np.where(is_full, 0.0, size) / max(size[~is_full].sum(), 1)
        width = np.where(is_full, size, share * free)
        overfull = ~is_full & (width >= size)
        if not overfull.any():
            break
        is_full |= overfull
    return tuple(int(w) for w in _round_to_sum(width, size, round(budget)))


def _round_to_sum(width: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """Round to integers in [1, size] that sum to `total`, by largest remainder."""
    whole: np.ndarray = np.clip(np.floor(width), 1, size).astype(np.int64)
    remainder = width - whole
    while (missing := total - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = whole < size if step > 0 else whole > 1
        order = np.argsort(-step * remainder, kind="stable")
        chosen = order[movable[order]][: abs(missing)]
        whole[chosen] += step
        remainder[chosen] -= step
    return whole


def make_plan(
    kind: SketchKind,
    seed: int,
    dim: int,
    blocks: Sequence[Block],
    squared_norms: Sequence[float],
) -> SketchPlan:
    """Plan a sketch for `blocks`.

    Args:
        kind: which sketch.
        seed: seed of its tables.
        dim: width wanted; `none` has the gradient's own length, and `oporp` is never wider than that.
        blocks: the blocks in order.
        squared_norms: mean squared gradient norm of each, measured on a calibration sample (`oporp` only).

    Raises:
        SketchError: the sketch does not fit the blocks or the memory.
    """
    sizes = [block.size for block in blocks]
    if kind == "none":
        return SketchPlan(kind, seed, sum(sizes), tuple(blocks), tuple(sizes))
    if kind == "rademacher":
        if sum(sizes) * dim > MAX_RADEMACHER_BYTES:
            raise SketchError(
                f"a dense sign matrix of {sum(sizes):,} x {dim:,} needs {sum(sizes) * dim / 2**30:.1f} GiB",
                expected=f"at most {MAX_RADEMACHER_BYTES / 2**30:.0f} GiB",
                fix="use features.sketch.kind=oporp, or a smaller features.sketch.dim",
            )
        return SketchPlan(kind, seed, dim, tuple(blocks), (dim,) * len(sizes))
    widths = allocate_widths(sizes, squared_norms, dim)
    return SketchPlan(kind, seed, sum(widths), tuple(blocks), widths)


class Sketch:
    """A planned sketch with its tables on a device; tables are made when a block is first used.

    Args:
        plan: what to build.
        device: where gradients arrive.
    """

    def __init__(self, plan: SketchPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.device = torch.device(device)
        self._offsets = [0, *np.cumsum(plan.widths).tolist()]
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def dim(self) -> int:
        """Width of the sketch."""
        return self.plan.dim

    def add(self, phi: Float[Tensor, "b dim"], block: int, gradient: Float[Tensor, "b size"]) -> None:
        """Add the sketch of one block's gradients to `phi` in place.

        Args:
            phi: [b, dim] float32, the running sketch of a batch.
            block: number of the block in the plan.
            gradient: [b, size] float32.
        """
        if self.plan.kind == "rademacher":
            signs, _ = self._table(block)
            phi += (gradient @ signs.to(gradient.dtype)) / self.plan.dim**0.5
            return
        columns = phi[:, self._offsets[block] : self._offsets[block + 1]]
        if self.plan.widths[block] == self.plan.blocks[block].size:
            columns += gradient
            return
        order, signs = self._table(block)
        width = self.plan.widths[block]
        signed = gradient.index_select(1, order).mul_(signs)
        whole = signed.shape[1] // width * width
        columns += signed[:, :whole].reshape(len(signed), -1, width).sum(1)
        columns[:, : signed.shape[1] - whole] += signed[:, whole:]

    def _table(self, block: int) -> tuple[Tensor, Tensor]:
        if block not in self._tables:
            size, key = self.plan.blocks[block].size, self.plan.blocks[block]
            generator = stream(self.plan.seed, "sketch", self.plan.kind, key.name, key.role)
            if self.plan.kind == "rademacher":
                signs = torch.from_numpy(_signs(generator, size * self.plan.dim).reshape(size, self.plan.dim))
                self._tables[block] = (signs.to(self.device),) * 2
            else:
                order = torch.from_numpy(generator.permutation(size).astype(np.int32))
                signs = torch.from_numpy(_signs(generator, size).astype(np.float32))
                self._tables[block] = order.to(self.device), signs.to(self.device)
        return self._tables[block]


def _signs(generator: np.random.Generator, count: int) -> np.ndarray:
    """Draw `count` independent signs as int8."""
    bits = np.unpackbits(np.frombuffer(generator.bytes((count + 7) // 8), dtype=np.uint8), count=count)
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)
