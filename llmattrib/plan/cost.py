"""The cost model: FLOPs, bytes and hours of each stage as formulas, derived in docs/scaling.md.

A multiplication with an addition is two FLOPs. Counts are of matrix products and other terms that grow; sums over
examples are exact where the lengths are known. Limits: linear layers are counted, so the FLOPs of routed experts kept
in one tensor are not; reduce counts a typical number of nodes and rounds, which depend on the data.
"""

from dataclasses import dataclass

import numpy as np

from llmattrib.config import RunConfig
from llmattrib.estimators.mean_field import LARGE, MeanField
from llmattrib.estimators.streamed import StreamedField
from llmattrib.features.curvature import fit_bytes
from llmattrib.features.extract import COLUMNS
from llmattrib.index import MAX_POINTS_PER_CENTROID, TRAINING_ROWS
from llmattrib.index_record import PQ_BITS, resolve_kind
from llmattrib.manifest import Manifest
from llmattrib.plan.shape import ModelShape
from llmattrib.sections import IndexConfig, Method
from llmattrib.settings import resolve

NODES, ROUNDS = 31, 6
"""Nodes of a mean field, and rounds of its fixed point at each: typical of unit rows at ridge 0.1."""
KMEANS_ROUNDS = 25
_VECTOR_BYTES = 4


@dataclass(frozen=True)
class Tokens:
    """Sums over the examples, padding of their batches included.

    Attributes:
        num_examples: n.
        num_tokens: tokens without padding.
        padded: tokens with padding.
        pairs: sum over examples of the squared width of their batch.
        completion: completion positions.
    """

    num_examples: int
    num_tokens: int
    padded: int
    pairs: int
    completion: int

    def scaled(self, num_examples: int) -> "Tokens":
        """Return the sums of another number of examples of the same lengths."""
        sums = self.num_tokens, self.padded, self.pairs, self.completion
        return Tokens(num_examples, *(total * num_examples // self.num_examples for total in sums))


def feature_dim(shape: ModelShape, config: RunConfig) -> int:
    """Return p, the width of the sketch."""
    sketch = config.features.sketch
    if sketch.kind == "none":
        return shape.gradient_dim
    return sketch.dim if sketch.kind == "rademacher" else min(sketch.dim, shape.gradient_dim)


def num_outputs(config: RunConfig) -> int:
    """Return c, the feature rows of an example."""
    return len(config.data.label_words) if config.features.output == "logits" else 1


def build_flops(shape: ModelShape, config: RunConfig, tokens: Tokens, num_adapters: int) -> dict[str, int]:
    """Return the FLOPs of `build` by part: forward, backward, lora, sketch.

    With L weights in linear layers, L' of them from the lowest LoRA layer on, H in the output embedding, w and w' the
    heads times their width summed over those layers, T tokens, M completion positions, W the width of a batch:

        forward     2 L T + 2 H M + 4 w sum W^2
        backward    c (2 L' T + 2 H M + k w' sum W^2)         k = 10 for fused attention, 8 for eager
        lora        init:     2 j T (sum r d_in + c sum r d_out) for j draws
                    trained:  T (4 sum r d_in + 2 sum r d_out) + c T (4 sum r d_in + 6 sum r d_out)
        sketch      c n P (4, dense 2 p + 2) for gradients of P entries
        whitening   c n sum 2 m k (m + k) over factors of m x k, sides with an eigenbasis only
        curvature   two of these passes over part of the examples, whitening, and 2 c T sum (m^2 + k^2)

    The last two with `features.preconditioner` only. No gradient of a base weight is formed, so the backward costs one
    product a layer, not two.
    """
    c, at_init = num_outputs(config), config.features.linearisation == "init"
    passes = 1 if at_init else num_adapters
    head = 2 * shape.head_parameters * tokens.completion
    attention = 10 if config.model.attn_implementation == "sdpa" else 8
    forward = 2 * shape.linear_parameters * tokens.padded + head + 4 * shape.attention_width * tokens.pairs
    backward = 2 * shape.backward_parameters * tokens.padded + head
    backward += attention * shape.backward_attention_width * tokens.pairs
    if at_init:
        lora = 2 * config.features.num_inits * tokens.padded * (shape.lora_in + c * shape.lora_out)
    else:
        lora = tokens.padded * (4 * shape.lora_in + 2 * shape.lora_out)
        lora += c * tokens.padded * (4 * shape.lora_in + 6 * shape.lora_out)
    entry = 2 * feature_dim(shape, config) + 2 if config.features.sketch.kind == "rademacher" else 4
    sketch = c * tokens.num_examples * shape.gradient_dim * entry
    parts = {"forward": passes * forward, "backward": passes * c * backward, "lora": passes * lora}
    whitened = {} if config.features.preconditioner == "none" else _whitening_flops(shape, config, tokens, parts)
    return {**parts, "sketch": sketch, **whitened}


def _whitening_flops(shape: ModelShape, config: RunConfig, tokens: Tokens, parts: dict[str, int]) -> dict[str, int]:
    """Return the FLOPs of whitening all examples, and of fitting the curvature in two passes of `parts`."""
    c, limit = num_outputs(config), config.features.max_eigen_side
    sides = [[side for side in factor if side <= limit] for factor in shape.shapes]
    rotation = sum(2 * m * k * sum(kept) for (m, k), kept in zip(shape.shapes, sides, strict=True))
    moments = 2 * sum(side * side for kept in sides for side in kept)
    fitted = min(config.features.curvature_examples, tokens.num_examples)
    whitening = c * tokens.num_examples * rotation
    fit = 2 * sum(parts.values()) + whitening + c * tokens.num_tokens * moments
    return {"whitening": whitening, "curvature": fit * fitted // tokens.num_examples}


def curvature_bytes(shape: ModelShape, config: RunConfig) -> int:
    """Return the bytes on the device while the curvature is fitted, more than what whitening takes later."""
    return 0 if config.features.preconditioner == "none" else fit_bytes(shape.shapes, config.features.max_eigen_side)


def train_flops(shape: ModelShape, config: RunConfig, tokens: Tokens) -> int:
    """Return the FLOPs of `train`: forward and backward of every epoch with gradients of A and B, without padding."""
    head = 2 * shape.head_parameters * tokens.completion
    linear = 2 * (shape.linear_parameters + shape.backward_parameters) * tokens.num_tokens
    attention = (4 * shape.attention_width + 10 * shape.backward_attention_width) * tokens.pairs
    return (
        config.train.num_adapters
        * config.train.epochs
        * (linear + 2 * head + attention + 6 * tokens.num_tokens * (shape.lora_in + shape.lora_out))
    )


def features_manifest(config: RunConfig, num_rows: int, dim: int) -> Manifest:
    """Return the manifest that gives the size of the features; its fingerprint is empty."""
    shard = config.features.shard_size
    return Manifest("features", num_rows, num_outputs(config), dim, config.features_dtype, shard, COLUMNS)


def representers_bytes(config: RunConfig, num_rows: int, dim: int) -> int:
    """Return the bytes of one method's representers: rows, scales, and the vectors `mean` and `total`."""
    c = num_outputs(config)
    store = Manifest("representers", num_rows, c, dim, config.reduce.dtype, config.features.shard_size)
    return store.num_bytes + 2 * _VECTOR_BYTES * c * dim


def index_flops(config: IndexConfig, num_rows: int, dim: int) -> dict[str, int]:
    """Return the FLOPs of building one method's index (`build`) and of one query (`search`)."""
    product, kind = 2 * dim, resolve_kind(config, num_rows, dim)
    if kind == "flat":
        return {"build": 0, "search": num_rows * product}
    mapping = (2 * min(num_rows, TRAINING_ROWS) + num_rows) * product * dim  # two moments, and of every row
    if kind == "scan":  # a code of two coordinates is one look-up
        return {"build": mapping, "search": num_rows * dim // 2 + (dim + config.candidates) * product}
    if kind == "hnsw":  # a search of width ef looks at about 2 M neighbours of each of ef nodes, half of them new
        looked = config.hnsw_neighbors * product
        return {"build": num_rows * config.hnsw_ef_construction * looked, "search": config.hnsw_ef_search * looked}
    lists, centroids = config.ivf_lists, config.ivf_lists + (1 << PQ_BITS)
    training = min(num_rows, max(TRAINING_ROWS, MAX_POINTS_PER_CENTROID * lists))
    scanned = num_rows * min(config.ivf_probes, lists) // lists
    return {
        "build": mapping + product * centroids * (KMEANS_ROUNDS * training + num_rows),
        "search": product * (dim + centroids + config.candidates) + scanned * config.pq_subquantizers,
    }


def reduce_cost(config: RunConfig, method: Method, num_rows: int, dim: int) -> dict[str, int | str]:
    """Return the FLOPs and the host memory, in bytes, of one method's representers, and its form if it has one.

    Args:
        config: the run.
        method: which method.
        num_rows: n.
        dim: p.
    """
    features, has_labels = config.features, bool(config.data.label_words)
    is_whitened = features.preconditioner != "none"
    settings = resolve(config.reduce, method, features.output, has_labels, num_rows, dim, is_whitened)
    n, p, c, d = num_rows, dim, num_outputs(config), min(num_rows, dim)
    shard = 3 * _VECTOR_BYTES * min(features.shard_size, n) * c * p  # two blocks are read ahead, one is written
    if settings.form == "streamed":
        streamed = StreamedField()
        draws = 8 * 32 * p * p if settings.certificate_draws else 0
        return {
            "method": method,
            "form": settings.form,
            "flops": c * NODES * streamed.num_flops(n, p, ROUNDS),
            "memory_bytes": c * streamed.num_bytes(n, p, NODES) + draws + shard,
        }
    if settings.form is not None:
        node = 2 * ROUNDS * n * d * d
        if settings.form != "cavity":
            node += n**3 // 3 + 3 * n * n * d if n <= LARGE else 3 * n * n * d
            node += 12 * n * n * d if settings.form == "pairs" else 0
        rows = 8 * n * p * (3 if n < p else 1)
        estimator = MeanField(form=settings.form)
        return {
            "method": method,
            "form": settings.form,
            "flops": c * NODES * node,
            "memory_bytes": c * rows + estimator.num_bytes(n, p, 1) + (c - 1) * 8 * n * d + shard,
        }
    if settings.ridge is None:
        return {"method": method, "form": "", "flops": 2 * n * p, "memory_bytes": shard}
    gram, memory = (4 * n * n * p, 24 * n * p) if n < p else (2 * n * p * p, 0)
    solve = d**3 // 3 + 2 * n * d * d + (4 * n * p * d if n < p else 0)
    return {"method": method, "form": "", "flops": gram + solve, "memory_bytes": memory + 24 * d * d + shard}


def sketch_table_bytes(shape: ModelShape, config: RunConfig) -> int:
    """Return the bytes of the sketch's tables on the device: an int32 and a float32 an entry, or dense signs."""
    sketch = config.features.sketch
    if sketch.kind == "none" or (sketch.kind == "oporp" and sketch.dim >= shape.gradient_dim):
        return 0
    return shape.gradient_dim * (8 if sketch.kind == "oporp" else sketch.dim)


def shard_bytes(config: RunConfig, dim: int) -> int:
    """Return the host memory of a shard while it is built and written: float32 rows and their stored copy."""
    return config.features.shard_size * num_outputs(config) * dim * (4 + np.dtype(config.features_dtype).itemsize)
