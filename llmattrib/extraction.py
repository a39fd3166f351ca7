"""What the stages that run the model share: a run's adapters, extractor and tokenised examples, and their features.

Also what features depend on besides the examples: the fingerprint that a query's model must agree with.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib.config import RunConfig
from llmattrib.data import Example
from llmattrib.distributed import Sharding
from llmattrib.encoding import Encoded, EncodedSet, encode_all, label_token_ids, length_batches
from llmattrib.errors import (
    ModelNotFoundError,
    NonFiniteGradientError,
    memory_errors,
)
from llmattrib.features.extract import COLUMNS, Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.model import load_model
from llmattrib.progress import Progress, silent
from llmattrib.storage import exists, local_path
from llmattrib.train import adapter_paths


def run_adapters(config: RunConfig) -> list[str]:
    """Return the adapters of a run: those it names, else those it trained, else none.

    Of several that it trained, features at `init` have no use but for the first, which answers.

    Raises:
        ModelNotFoundError: features are asked for at trained adapters and one is missing; or they are not local.
    """
    if config.model.adapters:
        return list(config.model.adapters)
    is_trained = config.features.linearisation == "trained"
    wanted = adapter_paths(config) if is_trained else [config.layout.adapter]
    missing = [path for path in wanted if not exists(path)]
    if missing and is_trained:
        raise ModelNotFoundError(
            f"there is no adapter: model.adapters is empty and {missing[0]} does not exist",
            expected="an adapter for features.linearisation=trained"
            if len(wanted) == 1
            else f"the {len(wanted)} adapters of train.num_adapters and train.checkpoints",
            fix="run `llmattrib train` first, name your own in model.adapters, or set features.linearisation=init",
        )
    if missing:
        return []
    local = [local_path(path) for path in wanted]
    if None in local:
        raise ModelNotFoundError(
            f"the adapter of the run is at {config.layout.adapter}",
            expected="an adapter in a local folder",
            fix="copy it here and name the copy in model.adapters",
        )
    return list(map(str, local))


def load_extractor(config: RunConfig, sharding: Sharding | None = None) -> Extractor:
    """Load the model of a run and what computes its features.

    Args:
        config: the run.
        sharding: where ranks share the model's weights; all of them call.

    Raises:
        ModelError: base model or adapter is missing or does not fit.
        LabelWordError: a label word is not one token.
        DeviceMemoryError: the weights, or this rank's part of them, do not fit on the device.
    """
    loaded = load_model(config.model, adapters=run_adapters(config), sharding=sharding)
    label_ids = label_token_ids(loaded.tokenizer, config.data)
    fix = "take a smaller dtype, or more or larger devices"
    with memory_errors(config.model.name, expected="room for its weights", fix=fix):
        return Extractor(loaded, config.features, config.seed, label_ids)


def encode_examples(config: RunConfig, extractor: Extractor, examples: Sequence[Example]) -> EncodedSet:
    """Tokenise examples as the features of a run see them.

    Raises:
        OverlongExampleError, LabelWordError, EmptyDatasetError: see `encode_all`.
    """
    loaded = extractor.loaded
    return encode_all(examples, loaded.tokenizer, config.data, loaded.max_length)


def calibration_batches(config: RunConfig, encoded: Sequence[Encoded]) -> list[list[Encoded]]:
    """Return evenly spaced examples, as batches, for planning a sketch."""
    return spaced_batches(config, encoded, config.features.sketch.calibration_examples)


def spaced_batches(config: RunConfig, encoded: Sequence[Encoded], count: int) -> list[list[Encoded]]:
    """Return `count` evenly spaced examples, all when there are fewer, as batches."""
    count = min(count, len(encoded))
    sample = [encoded[int(row)] for row in np.linspace(0, len(encoded) - 1, count).round()]
    return [
        [sample[row] for row in batch]
        for batch in length_batches(list(map(len, sample)), config.features.tokens_per_batch)
    ]


def model_fingerprint(config: RunConfig, extractor: Extractor) -> dict[str, Any]:
    """Return what features depend on besides the examples, as JSON; a query's model must agree in all of it."""
    at_init = config.features.linearisation == "init"
    model = {key: value for key, value in extractor.loaded.fingerprint.items() if not (at_init and key == "adapters")}
    return {"model": model, **settings_fingerprint(config)}


def settings_fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return the part of `model_fingerprint` that is known without the model."""
    features, data = config.features, config.data
    at_init = features.linearisation == "init"
    sketch: dict[str, Any] = {"kind": features.sketch.kind}
    if features.sketch.kind != "none":
        sketch["dim"] = features.sketch.dim
    if features.sketch.kind == "oporp":
        sketch["calibration_examples"] = features.sketch.calibration_examples
    preconditioner: dict[str, Any] = {}
    if features.preconditioner != "none":
        names = ("preconditioner", "damping", "curvature_examples", "max_eigen_side")
        preconditioner = {name: getattr(features, name) for name in names}
    return {
        "features": {
            "output": features.output,
            "linearisation": features.linearisation,
            "num_inits": features.num_inits if at_init else None,
            "sketch": sketch,
            **preconditioner,
        },
        "encoding": {
            "chat_template": data.chat_template,
            "system": data.system,
            "label_words": list(data.label_words),
        },
        "seed": config.seed,
    }


def resolved_config(config: RunConfig) -> RunConfig:
    """Return the run with relative paths that exist made absolute, so that it can be replayed from anywhere."""
    model, data = config.model, config.data
    model = model.model_copy(
        update={"name": _absolute(model.name), "adapters": tuple(_absolute(path) for path in model.adapters)}
    )
    data = data.model_copy(update={"train": _absolute(data.train)})
    values = config.values
    if values.data is not None:
        values = values.model_copy(update={"data": _absolute(values.data)})
    evaluate = config.evaluate
    if evaluate.mislabeled is not None:
        evaluate = evaluate.model_copy(update={"mislabeled": _absolute(evaluate.mislabeled)})
    return config.model_copy(update={"model": model, "data": data, "values": values, "evaluate": evaluate})


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).exists() else name


def extract_rows(
    config: RunConfig,
    extractor: Extractor,
    sketch: Sketch,
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    progress: Progress = silent,
) -> tuple[Float[np.ndarray, "m c p"], dict[str, Float[np.ndarray, " m"]]]:
    """Compute the features of tokenised examples in batches of similar length.

    Args:
        config: the run; reads `features.tokens_per_batch`.
        extractor: from `load_extractor`.
        sketch: the store's, or an exact one.
        encoded: m tokenised examples.
        examples: the same examples, for error messages.
        progress: told of examples done.

    Returns:
        Features, and the columns of the store, in the order of `encoded`.

    Raises:
        NonFiniteGradientError: an example's gradient is NaN or infinite.
        DeviceMemoryError: a batch does not fit on the device.
    """
    rows = np.empty((len(encoded), extractor.num_outputs, sketch.dim), np.float32)
    columns = {name: np.empty(len(encoded), np.float32) for name in COLUMNS}
    num_done = 0
    for batch in length_batches(list(map(len, encoded)), config.features.tokens_per_batch):
        with batch_memory(config, len(batch)):
            features = extractor.extract([encoded[row] for row in batch], sketch)
        bad = features.nonfinite_rows()
        if bad:
            raise not_finite(examples[batch[bad[0]]], float(features.columns["loss"][bad[0]]))
        rows[batch] = features.phi
        for name in COLUMNS:
            columns[name][batch] = features.columns[name]
        num_done += len(batch)
        progress(num_done, len(encoded))
    return rows, columns


def not_finite(example: Example, loss: float | None = None) -> NonFiniteGradientError:
    """Return the error that names an example whose gradient is NaN or infinite."""
    return NonFiniteGradientError(
        f"the gradient of example {example.id!r} (row {example.index}) is NaN or infinite"
        + ("" if loss is None else f"; its loss is {loss:g}"),
        expected="finite numbers",
        fix="look at that example's text; if it is in order, try model.dtype=float32 (or bfloat16 for float16)",
    )


def batch_memory(config: RunConfig, num_examples: int) -> AbstractContextManager[None]:
    """Name the batch size to try when a batch of features does not fit."""
    budget = config.features.tokens_per_batch
    smaller = f"set features.tokens_per_batch={max(1, budget // 2)}"
    shorter = (
        "set data.max_length and data.overlong=truncate (the batch is one example already), or use a smaller dtype"
    )
    return memory_errors(
        f"a batch of {num_examples} examples (features.tokens_per_batch is {budget})",
        expected="room for the activations of one batch beside the model",
        fix=f"{smaller if num_examples > 1 else shorter}; finished shards are kept",
    )
