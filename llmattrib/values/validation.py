"""Features of a validation set, kept in a row store beside those of the training examples.

They are made as a query's are: same model, sketch and encoding, each with its own completion as the answer. The store
follows the row-store protocol: shards of `features.shard_size` rows, each committed, so a killed run goes on where it
stopped. Its fingerprint holds the examples and everything the training features depend on; what is there of another
validation set is replaced, since it can be computed again. A complete store is reused without loading the model.

Limit: validation features are held in memory, [m, c, p] float32.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llmattrib import storage
from llmattrib.config import digest
from llmattrib.data import Example, data_fingerprint, load_validation_examples
from llmattrib.errors import FingerprintMismatchError, StoreNotFoundError
from llmattrib.extraction import encode_examples, extract_rows, settings_fingerprint
from llmattrib.features.extract import COLUMNS
from llmattrib.manifest import differing
from llmattrib.preconditioner import CURVATURE
from llmattrib.progress import Progress, silent
from llmattrib.query import Run
from llmattrib.store import Manifest, RowStore

MADE_BY = "llmattrib values"


@dataclass(frozen=True)
class Validation:
    """Validation examples as the games see them.

    Attributes:
        phi: [m, c, p] features.
        labels: [m] label of each, -1 without label words.
        digest: of the store.
        num_truncated: examples whose prompt was cut to fit.
        num_skipped: examples left out because they did not fit.
    """

    phi: Float[np.ndarray, "m c p"]
    labels: Int[np.ndarray, " m"]
    digest: str
    num_truncated: int
    num_skipped: int


def load_validation(run: Run, progress: Progress = silent) -> Validation:
    """Return the features of the validation set, computing shards that are not there yet.

    Args:
        run: the run; reads `values.data`, `values.split` and `values.limit` of its config.
        progress: told of examples done, when there are any to do.

    Raises:
        ConfigError: `values.data` is not set.
        DataError: the validation examples cannot be used.
        FingerprintMismatchError: the config or the model is not the one the stored features were made with.
        NonFiniteGradientError, DeviceMemoryError: as when building features.
    """
    config = run.config
    features = RowStore.open(config.layout.features)
    examples = load_validation_examples(config.data, config.values)
    stored = {key: value for key, value in features.manifest.fingerprint.items() if key != "data"}
    keys = differing({key: value for key, value in stored.items() if key != "model"}, settings_fingerprint(config))
    if keys:
        raise FingerprintMismatchError(features.path, keys)
    wanted = {
        **features_fingerprint(features),
        "validation": {
            "examples": data_fingerprint(examples),
            "max_length": config.data.max_length,
            "overlong": config.data.overlong,
        },
    }
    path = config.layout.validation
    store = _stored(path)
    if store is not None and differing(store.manifest.fingerprint, wanted):
        storage.remove(path)
        store = None
    if store is None or not store.is_complete:
        store = _compute(run, features, examples, wanted, progress)
    return Validation(
        phi=store.read(0, store.manifest.num_rows),
        labels=store.column("label").astype(np.int64),
        digest=store.digest(),
        num_truncated=int(store.manifest.info["num_truncated"]),
        num_skipped=int(store.manifest.info["num_skipped"]),
    )


def features_fingerprint(features: RowStore) -> dict[str, object]:
    """Return what validation features depend on besides their examples: all that training features do."""
    stored = {key: value for key, value in features.manifest.fingerprint.items() if key != "data"}
    whitened = {CURVATURE: features.manifest.info[CURVATURE]} if CURVATURE in features.manifest.info else {}
    return {**stored, "sketch_plan": digest(features.manifest.info["sketch_plan"]), **whitened}


def _stored(path: str) -> RowStore | None:
    try:
        return RowStore.open(path, made_by=MADE_BY)
    except StoreNotFoundError:
        return None


def _compute(
    run: Run, features: RowStore, examples: list[Example], fingerprint: dict[str, object], progress: Progress
) -> RowStore:
    """Create or resume the store and write what is missing."""
    encoded = encode_examples(run.config, run.extractor, examples)
    trained = features.manifest
    manifest = Manifest(
        kind="features",
        num_rows=len(encoded.encoded),
        num_outputs=trained.num_outputs,
        dim=trained.dim,
        dtype=trained.dtype,
        shard_size=trained.shard_size,
        columns=COLUMNS,
        fingerprint=fingerprint,
        info={"num_truncated": encoded.num_truncated, "num_skipped": encoded.num_skipped},
    )
    store = RowStore.create(run.config.layout.validation, manifest)
    for shard in store.pending():
        start, stop = store.shard_range(shard)

        def report(done: int, _: int, before: int = start) -> None:
            progress(before + done, manifest.num_rows)

        part = slice(start, stop)
        rows, columns = extract_rows(
            run.config, run.extractor, run.sketch, encoded.encoded[part], encoded.examples[part], progress=report
        )
        store.write_shard(shard, rows, columns)
    store.require_complete(MADE_BY)
    return store
