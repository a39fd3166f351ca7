"""What a run takes, before it is run: `plan_run` puts the shape of the model and the cost model together.

Nothing is downloaded but a config and a tokenizer, and no weight is read. Hours are FLOPs over an assumed share of a
device's peak: arithmetic, not measurements. Tokens are exact when the data file and the tokenizer are here, else those
that `plan` states. Peaks of GPUs are of dense bfloat16; the CPU is 16 cores of 3 GHz with 32 float32 FLOPs a cycle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmattrib.config import RunConfig
from llmattrib.data import load_examples
from llmattrib.encoding import Encoded, encode_all, length_batches, length_limit
from llmattrib.errors import ConfigError, ModelNotFoundError
from llmattrib.extraction import run_adapters
from llmattrib.index_record import index_bytes
from llmattrib.plan import cost
from llmattrib.plan.cost import Tokens
from llmattrib.plan.shape import BatchShape, EmptyModel, ModelShape, batch_peak, empty_model
from llmattrib.train import adapter_paths
from llmattrib.weights import load_tokenizer_alone
from llmattrib.words import METHOD as WORDS

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "CPU": 16 * 3e9 * 32}
SCALES = (10**6, 10**8, 10**9)
HEAP_FACTOR = 1.6
"""Peak of the C heap over the bytes alive in a batch on a CPU: glibc keeps freed blocks. 1.5 to 1.8 with
SmolLM2 (benchmarks/plan.py), up to 2.5 with a small model at `trained`. GPU figures are of the bytes alive."""
GATHERED_UNITS = 2
"""Parts whose weights ZeRO-3 holds whole at once: the one in use and the one being fetched."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one `build` process.

    Attributes:
        weights: base weights, whole.
        lora: float32 factors, and the fresh A of `init`.
        sketch: tables of the sketch.
        curvature: of a preconditioner, while it is fitted.
        batch: activations, logits and gradients of the largest batch, those alive at once.
        shard: rows of a shard and their stored copy, on the host.
        gpu: a GPU that holds the whole model.
        gpu_zero3: one of `plan.num_gpus` GPUs that share the weights, with the parts that are gathered.
        cpu: a process without a GPU, over what its imports take.
    """

    weights: int
    lora: int
    sketch: int
    curvature: int
    batch: int
    shard: int
    gpu: int
    gpu_zero3: int
    cpu: int


@dataclass(frozen=True)
class Scale:
    """The cost of one number of examples of the same lengths.

    Attributes:
        num_examples: n.
        num_tokens: without padding.
        build_flops: all parts of `build`.
        hours: device -> hours of `build` on one device.
        features_bytes: the feature store.
        representers_bytes: one method's store.
        index_bytes: one method's index.
        index_build_flops: of one method's index.
        index_search_flops: of one query.
        reduce: method, form, FLOPs and host memory of each method.
    """

    num_examples: int
    num_tokens: int
    build_flops: int
    hours: dict[str, float]
    features_bytes: int
    representers_bytes: int
    index_bytes: int
    index_build_flops: int
    index_search_flops: int
    reduce: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        name: `model.name`.
        shape: the model and its LoRA.
        gradient_dim: entries of an example's gradient.
        feature_dim: width of the sketch.
        num_outputs: feature rows of an example.
        num_methods: methods of reduce.
        num_gpus: GPUs that share the work.
        efficiency: assumed share of peak FLOP/s.
        tokens: sums over the examples.
        tokens_are_exact: false when they are those that `plan` states.
        batch: the batch with the highest peak.
        train_flops: of `train`; 0 with an adapter of your own.
        flops: of `build`, by part.
        memory: of one `build` process.
        scales: this run, then 10^6, 10^8 and 10^9 examples.
        notes: what a reader should know.
    """

    name: str
    shape: ModelShape
    gradient_dim: int
    feature_dim: int
    num_outputs: int
    num_methods: int
    num_gpus: int
    efficiency: float
    tokens: Tokens
    tokens_are_exact: bool
    batch: BatchShape
    train_flops: int
    flops: dict[str, int]
    memory: Memory
    scales: tuple[Scale, ...]
    notes: tuple[str, ...]


def plan_run(config: RunConfig) -> Plan:
    """Plan a run from its config alone.

    Args:
        config: the run; `plan` states what cannot be read here.

    Returns:
        Sizes in bytes, FLOPs, hours.

    Raises:
        ModelNotFoundError: the architecture is not known.
        ConfigError: neither the data nor its stated size is there; LoRA does not fit the model.
        DataError: the data cannot be used.
    """
    notes: list[str] = []
    adapter, num_adapters = _adapter(config, notes)
    empty = empty_model(config, adapter, num_adapters)
    shape = empty.shape
    encoded = _encoded(config, shape)
    tokens, batches = _stated(config, shape) if encoded is None else _measured(config, encoded)
    batch, peak = max(((batch, batch_peak(empty, config, batch)) for batch in batches), key=lambda pair: pair[1])
    dim = cost.feature_dim(shape, config)
    _note(config, shape, notes)
    return Plan(
        name=config.model.name,
        shape=shape,
        gradient_dim=shape.gradient_dim,
        feature_dim=dim,
        num_outputs=cost.num_outputs(config),
        num_methods=len(config.reduce.methods),
        num_gpus=config.plan.num_gpus,
        efficiency=config.plan.efficiency,
        tokens=tokens,
        tokens_are_exact=encoded is not None,
        batch=batch,
        train_flops=0 if config.model.adapters else cost.train_flops(shape, config, tokens),
        flops=cost.build_flops(shape, config, tokens, num_adapters),
        memory=_memory(config, empty, peak, dim, num_adapters),
        scales=tuple(
            _scale(config, shape, tokens.scaled(n), dim, num_adapters) for n in (tokens.num_examples, *SCALES)
        ),
        notes=tuple(notes),
    )


def _adapter(config: RunConfig, notes: list[str]) -> tuple[Path | None, int]:
    """Return the adapter whose shape is planned, None for the shape in the config, and how many there are."""
    try:
        names = run_adapters(config)
    except ModelNotFoundError:  # `train` will make it
        names = []
    here = [path for path in map(Path, names) if (path / "adapter_config.json").is_file()]
    if names and not here:
        notes.append(f"{names[0]} is not here: LoRA has the shape of model.lora")
    if not names and config.features.linearisation == "trained":
        return None, len(adapter_paths(config))
    return (here[0] if here else None), max(len(names), 1)


def _note(config: RunConfig, shape: ModelShape, notes: list[str]) -> None:
    if config.model.dtype == "float32":
        notes.append("GPU hours assume the peak of bfloat16 and model.dtype is float32, which GPUs compute more slowly")
    embedding = shape.vocab_size * shape.hidden_size
    uncounted = shape.num_parameters - shape.linear_parameters - shape.head_parameters - embedding
    if uncounted > 0.1 * shape.num_parameters:
        notes.append(f"{uncounted:,} parameters are in no linear layer: their FLOPs are not counted")
    if WORDS in config.reduce.methods:
        top = config.words.top_positions
        points = len(config.model.adapters) if config.features.linearisation == "trained" else 1
        each = (top or 1) * max(points, 1) * shape.hidden_size * (4 if config.words.dtype == "float32" else 2)
        notes.append(
            f"the word gradients of {WORDS} are not counted: a forward and a backward pass more, and {each:,} bytes "
            + ("a word of an example" if top is None else "an example")
        )


def _encoded(config: RunConfig, shape: ModelShape) -> list[Encoded] | None:
    """Tokenise the data if it and the tokenizer are here."""
    model, data, plan = config.model, config.data, config.plan
    is_here = Path(data.train).is_file()
    if is_here:
        try:
            tokenizer = load_tokenizer_alone(
                model.name,
                [*map(Path, model.adapters)],
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            )
        except ModelNotFoundError:
            if plan.tokens_per_example is None:
                raise
        else:
            return encode_all(
                load_examples(data), tokenizer, data, shape.context or int(tokenizer.model_max_length)
            ).encoded
    if plan.tokens_per_example is None or plan.num_examples is None:
        raise ConfigError(
            f"the tokens of {data.train} are not known: "
            + ("no tokenizer" if is_here else "there is no such file here"),
            expected="the data file and the tokenizer, or plan.num_examples and plan.tokens_per_example",
            fix="set plan.num_examples and plan.tokens_per_example (the mean of prompt and completion)",
        )
    return None


def _measured(config: RunConfig, encoded: Sequence[Encoded]) -> tuple[Tokens, list[BatchShape]]:
    """Sum over the batches that `build` will make; return also those that may need the most memory."""
    size, shapes = config.features.shard_size, []
    for start in range(0, len(encoded), size):
        shard = encoded[start : start + size]
        for rows in length_batches(list(map(len, shard)), config.features.tokens_per_batch):
            completion = sum(len(shard[row]) - shard[row].completion_start for row in rows)
            shapes.append(BatchShape(len(rows), max(len(shard[row]) for row in rows), completion))
    tokens = Tokens(
        num_examples=len(encoded),
        num_tokens=sum(map(len, encoded)),
        padded=sum(shape.num_examples * shape.width for shape in shapes),
        pairs=sum(shape.num_examples * shape.width**2 for shape in shapes),
        completion=sum(shape.num_completion for shape in shapes),
    )
    return tokens, _largest(shapes)


def _largest(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """Return the batches with the most tokens, attention and completion positions."""
    found = {
        max(shapes, key=lambda shape: shape.num_examples * shape.width),
        max(shapes, key=lambda shape: shape.num_examples * shape.width**2),
        max(shapes, key=lambda shape: shape.num_completion),
    }
    return sorted(found, key=lambda shape: (shape.width, shape.num_examples, shape.num_completion))


def _stated(config: RunConfig, shape: ModelShape) -> tuple[Tokens, list[BatchShape]]:
    """Return the sums and the batch of examples of one length, the stated one."""
    plan = config.plan
    assert plan.num_examples is not None
    assert plan.tokens_per_example is not None
    limit = length_limit(config.data, shape.context or plan.tokens_per_example)
    width, n = min(plan.tokens_per_example, limit), plan.num_examples
    completion = 1 if config.data.label_words else min(plan.completion_tokens or max(width // 4, 1), width - 1)
    count = min(n, max(1, config.features.tokens_per_batch // width))
    batches = [BatchShape(count, width, count * completion)]
    if limit > width:  # one example as long as allowed
        batches.append(BatchShape(1, min(limit, config.features.tokens_per_batch), completion))
    return Tokens(n, n * width, n * width, n * width**2, n * completion), batches


def _memory(config: RunConfig, empty: EmptyModel, peak: int, dim: int, num_adapters: int) -> Memory:
    shape, at_init = empty.shape, config.features.linearisation == "init"
    factors = 4 * num_adapters * (shape.lora_in + shape.lora_out)
    lora = factors + (4 * config.features.num_inits * shape.lora_in if at_init else 0)
    sketch = cost.sketch_table_bytes(shape, config)
    shard = cost.shard_bytes(config, dim)
    curvature = cost.curvature_bytes(shape, config)
    beside = lora + sketch + curvature + peak
    gathered = GATHERED_UNITS * shape.gathered_bytes
    shared = min(shape.weight_bytes, -(-shape.weight_bytes // config.plan.num_gpus) + gathered)
    return Memory(
        weights=shape.weight_bytes,
        lora=lora,
        sketch=sketch,
        curvature=curvature,
        batch=peak,
        shard=shard,
        gpu=shape.weight_bytes + beside,
        gpu_zero3=shared + beside,
        cpu=shape.weight_bytes + lora + sketch + curvature + shard + round(HEAP_FACTOR * peak),
    )


def _scale(config: RunConfig, shape: ModelShape, tokens: Tokens, dim: int, num_adapters: int) -> Scale:
    n, width = tokens.num_examples, cost.num_outputs(config) * dim
    flops = sum(cost.build_flops(shape, config, tokens, num_adapters).values())
    index = cost.index_flops(config.index, n, width)
    return Scale(
        num_examples=n,
        num_tokens=tokens.num_tokens,
        build_flops=flops,
        hours={device: flops / (rate * config.plan.efficiency * 3600) for device, rate in PEAK_FLOPS.items()},
        features_bytes=cost.features_manifest(config, n, dim).num_bytes,
        representers_bytes=cost.representers_bytes(config, n, dim),
        index_bytes=index_bytes(config.index, n, width),
        index_build_flops=index["build"],
        index_search_flops=index["search"],
        reduce=tuple(cost.reduce_cost(config, method, n, dim) for method in config.reduce.methods),
    )
