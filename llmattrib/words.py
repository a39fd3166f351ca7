"""Word gradients of a run and the store that holds them: words.zarr, a row store of k sparse rows an example.

    rows      [n, k, d]    gradient of each kept word; zeros where an example has fewer
    columns   norm         of the gradients at all positions of words, also those that are not kept
              word0 ...    which word each row is of, -1 for none: whole numbers, exact in float32 below 2^24
    vectors   clusters     [1, v] word of each token, where words.synonym_cosine is set

k is `words.top_positions`, or, when all positions are kept, the number of words of the richest example: an example
that is added later must not have more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib.config import RunConfig
from llmattrib.data import Example
from llmattrib.encoding import Encoded, length_batches
from llmattrib.errors import MethodError
from llmattrib.extraction import batch_memory, model_fingerprint, not_finite, settings_fingerprint
from llmattrib.features.extract import Extractor
from llmattrib.features.words import WordExtractor, WordGradients
from llmattrib.progress import Progress, silent
from llmattrib.store import RowStore
from llmattrib.wording import NO_WORD, Wording

CLUSTERS = "clusters"
"""Name of the vector."""
METHOD = "tracin_we"


def has_words(config: RunConfig) -> bool:
    """Say whether a run is to have word gradients."""
    return METHOD in config.reduce.methods


def open_words(config: RunConfig) -> RowStore:
    """Open the word gradients of a run.

    Raises:
        StoreNotFoundError, IncompleteStoreError: they are missing or not finished.
    """
    store = RowStore.open(config.layout.words)
    store.require_complete()
    return store


def check_output(config: RunConfig) -> None:
    """Refuse features that are several an example.

    Raises:
        MethodError: features are of output `logits`.
    """
    if config.features.output == "logits":
        raise MethodError(
            f"{METHOD} needs one gradient per example, and features of output logits have one per class",
            expected="features.output loss, log_odds, margin or pntk",
            fix=f"take {METHOD} out of reduce.methods, or build features of output margin",
        )


def word_settings_fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return the part of `word_fingerprint` that is known without the model."""
    settings, words = settings_fingerprint(config), config.words
    return {
        "features": {key: settings["features"][key] for key in ("output", "linearisation")},
        "encoding": settings["encoding"],
        "words": {
            "top_positions": words.top_positions,
            "exclude": words.exclude,
            "synonym_cosine": words.synonym_cosine,
            "adapter_weights": list(words.adapter_weights),
        },
    }


def word_fingerprint(config: RunConfig, extractor: Extractor) -> dict[str, Any]:
    """Return what word gradients depend on besides the examples; at `init` no adapter, not even its shape."""
    model = dict(model_fingerprint(config, extractor)["model"])
    if config.features.linearisation == "init":
        model.pop("lora")
    return {"model": model, **word_settings_fingerprint(config)}


def load_word_extractor(config: RunConfig, extractor: Extractor) -> WordExtractor:
    """Return what computes word gradients, over the model of an extractor.

    Raises:
        ConfigError: `words.adapter_weights` does not fit the adapters.
    """
    return WordExtractor(extractor.loaded, config.features, config.words.adapter_weights, extractor.label_ids)


def stored_wording(config: RunConfig, extractor: Extractor, store: RowStore) -> Wording:
    """Return which word each token is, by the clusters of a store."""
    clusters = None
    if config.words.synonym_cosine is not None:
        clusters = store.read_vector(CLUSTERS)[0].astype(np.int64)
    return Wording(extractor.loaded.tokenizer, config.data, config.words, clusters)


def extract_words(
    config: RunConfig,
    extractor: WordExtractor,
    wording: Wording,
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    progress: Progress = silent,
) -> list[WordGradients]:
    """Compute the word gradients of tokenised examples in batches of similar length.

    Args:
        config: the run; reads `features.tokens_per_batch` and `words.top_positions`.
        extractor: from `load_word_extractor`.
        wording: which word each token is.
        encoded: m tokenised examples.
        examples: the same examples.
        progress: told of examples done.

    Raises:
        NonFiniteGradientError: an example's gradient is NaN or infinite.
        DeviceMemoryError: a batch does not fit on the device.
        DataError, ConfigError: what is the template's own text cannot be told, see `Wording.of`.
    """
    made: dict[int, WordGradients] = {}
    for batch in length_batches(list(map(len, encoded)), config.features.tokens_per_batch):
        words = [wording.of(examples[row], encoded[row]) for row in batch]
        with batch_memory(config, len(batch)):
            found = extractor.extract([encoded[row] for row in batch], words, config.words.top_positions)
        for row, one in zip(batch, found, strict=True):
            if not one.is_finite:
                raise not_finite(examples[row])
            made[row] = one
        progress(len(made), len(encoded))
    return [made[row] for row in range(len(encoded))]


def most_words(wording: Wording, encoded: Sequence[Encoded], examples: Sequence[Example]) -> int:
    """Return the number of words of the richest example, 1 at least: the rows it has in the store."""
    words = (wording.of(example, one) for example, one in zip(examples, encoded, strict=True))
    return max(1, *(len(set(own[own != NO_WORD].tolist())) for own in words))


def columns_of(places: int) -> tuple[str, ...]:
    """Return the columns of a store with so many rows an example."""
    return ("norm", *(f"word{place}" for place in range(places)))


def stored_form(
    found: Sequence[WordGradients], places: int, dim: int
) -> tuple[Float[np.ndarray, "m k d"], dict[str, Float[np.ndarray, " m"]]]:
    """Return word gradients as the rows and columns of a store."""
    rows = np.zeros((len(found), places, dim), np.float32)
    words = np.full((len(found), places), NO_WORD, np.float32)
    for row, one in enumerate(found):
        rows[row, : len(one.words)] = one.rows
        words[row, : len(one.words)] = one.words
    columns = {"norm": np.array([one.norm for one in found], np.float32)}
    return rows, columns | {name: words[:, place].copy() for place, name in enumerate(columns_of(places)[1:])}


def stored_words(store: RowStore, start: int, stop: int) -> Int[np.ndarray, "m k"]:
    """Return the words of rows [start, stop) of a store, -1 for none.

    Raises:
        CorruptShardError: a shard is not committed, is missing or fails its crc32c.
    """
    return store.columns(store.manifest.columns[1:], start, stop).astype(np.int64)
