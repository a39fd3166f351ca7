"""What `build` fills a store with: gradient features, or the word gradients of `tracin_we`.

A product knows its store's manifest and computes the rows of a shard; how shards are shared out, committed and resumed
is the business of build.py. Products of one run share the model and the tokenised examples.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib.append import content_fingerprint
from llmattrib.config import RunConfig
from llmattrib.distributed import Ranks
from llmattrib.encoding import Encoded, EncodedSet
from llmattrib.errors import MethodError, StoreAccessError, StoreError, StoreNotFoundError
from llmattrib.extraction import batch_memory, calibration_batches, extract_rows, model_fingerprint
from llmattrib.features.extract import COLUMNS, Extractor
from llmattrib.features.sketch import Sketch, SketchPlan
from llmattrib.preconditioner import CURVATURE, curvature_digest, fit_curvature, load_curvature
from llmattrib.progress import Progress
from llmattrib.storage import atomic_write, exists, require_space
from llmattrib.store import Manifest, RowStore
from llmattrib.wording import Wording, synonym_clusters
from llmattrib.words import (
    CLUSTERS,
    check_output,
    columns_of,
    extract_words,
    has_words,
    load_word_extractor,
    most_words,
    stored_form,
    stored_wording,
    word_fingerprint,
)

PACKAGES = ("llmattrib", "numpy", "peft", "tokenizers", "torch", "transformers", "zarr")
"""Their versions are noted in the manifest."""
Rows = tuple[Float[np.ndarray, "m c p"], dict[str, Float[np.ndarray, " m"]]]


class Product(ABC):
    """What one store of a run is filled with.

    Attributes:
        path: the store.

    Args:
        config: the run.
        extractor: its model.
        encoded: all examples.
    """

    path: str

    def __init__(self, config: RunConfig, extractor: Extractor, encoded: EncodedSet) -> None:
        self.config, self.extractor, self.encoded = config, extractor, encoded

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Batches run through the model so far."""

    @abstractmethod
    def plan(self, ranks: Ranks) -> None:
        """Find what the manifest needs to say; called by all ranks."""

    @abstractmethod
    def manifest(self) -> Manifest:
        """Return the manifest of the store as it is to be; after `plan`, on the first rank."""

    @abstractmethod
    def precede(self, manifest: Manifest) -> None:
        """Write what a new store needs beside it, before it is made; on the first rank."""

    @abstractmethod
    def complete(self, store: RowStore) -> None:
        """Write what the store holds besides rows; once it is prepared, on the first rank."""

    @abstractmethod
    def begin(self, store: RowStore) -> None:
        """Read what rows are made with; once the store is prepared, on every rank."""

    @abstractmethod
    def rows(self, part: slice, progress: Progress) -> Rows:
        """Compute the rows and columns of some examples."""

    @abstractmethod
    def pad(self, example: Encoded) -> None:
        """Run a batch of this example through the model for nothing."""

    def common(self) -> dict[str, Any]:
        """Return the fields of a manifest that any product has."""
        return {
            "num_rows": len(self.encoded.encoded),
            "shard_size": self.config.features.shard_size,
            "info": {
                "num_truncated": self.encoded.num_truncated,
                "num_skipped": self.encoded.num_skipped,
                "versions": {package: version(package) for package in PACKAGES},
            },
        }


class LoraProduct(Product):
    """Sketched gradients with respect to the LoRA parameters: features.zarr."""

    def __init__(self, config: RunConfig, extractor: Extractor, encoded: EncodedSet) -> None:
        super().__init__(config, extractor, encoded)
        self.path = config.layout.features

    @property
    def num_batches(self) -> int:
        """Batches run through the model so far."""
        return self.extractor.num_batches

    def plan(self, ranks: Ranks) -> None:
        """Take the curvature and the sketch of the store, else the first rank's.

        Where ranks share the weights, all of them fit and plan.
        """
        config, encoded = self.config, self.encoded.encoded
        is_new = config.features.preconditioner != "none" and not ranks.on_main(lambda: exists(self.path))

        def fitted() -> bytes | None:
            mine = is_new and (ranks.is_main or ranks.sharding)
            return fit_curvature(config, self.extractor, encoded) if mine else None

        self._curvature = ranks.in_passes(fitted)

        def stored() -> dict[str, Any] | None:
            try:
                return dict(RowStore.open(self.path).manifest.info["sketch_plan"])
            except StoreNotFoundError:
                return None

        def planned() -> dict[str, Any] | None:
            if not (ranks.is_main or ranks.sharding):
                return None
            sketch, sample = config.features.sketch, calibration_batches(config, encoded)
            with batch_memory(config, max(map(len, sample))):
                return self.extractor.plan(sketch.kind, config.seed, sketch.dim, sample).to_json()

        plan = ranks.on_main(stored) or ranks.gather(ranks.in_passes(planned))[0]
        self._plan = SketchPlan.from_json(plan)

    def manifest(self) -> Manifest:
        """Return the manifest of the store as it is to be."""
        common, encoded = self.common(), self.encoded
        data = content_fingerprint(encoded.examples, encoded.encoded)
        info = {
            "sketch_plan": self._plan.to_json(),
            "sketch_rows": len(encoded.encoded),
            **({} if self._curvature is None else {CURVATURE: curvature_digest(self._curvature)}),
            "label_ids": list(self.extractor.label_ids),
            "has_adapter": self.extractor.loaded.fingerprint["adapters"] != "none",  # at init too: it answers queries
        }
        return Manifest(
            kind="features",
            num_outputs=self.extractor.num_outputs,
            dim=self._plan.dim,
            dtype=self.config.features_dtype,
            columns=COLUMNS,
            fingerprint={**model_fingerprint(self.config, self.extractor), "data": data},
            **{**common, "info": {**common["info"], **info}},
        )

    def precede(self, manifest: Manifest) -> None:
        """Write the curvature."""
        if self._curvature is not None:
            require_space(self.path, manifest.num_bytes + len(self._curvature))
            atomic_write(self.config.layout.curvature, self._curvature)

    def complete(self, store: RowStore) -> None:
        """Write nothing."""

    def begin(self, store: RowStore) -> None:
        """Load the curvature and make the sketch of the store."""
        self._curvature = None  # gigabytes, for large models; it is in its file now
        load_curvature(self.config, self.extractor, store.manifest.info)
        plan = SketchPlan.from_json(dict(store.manifest.info["sketch_plan"]))
        self._sketch = Sketch(plan, self.extractor.loaded.device)

    def rows(self, part: slice, progress: Progress) -> Rows:
        """Compute the rows and columns of some examples."""
        encoded, examples = self.encoded.encoded[part], self.encoded.examples[part]
        return extract_rows(self.config, self.extractor, self._sketch, encoded, examples, progress=progress)

    def pad(self, example: Encoded) -> None:
        """Run a batch of this example through the model for nothing."""
        self.extractor.extract([example], self._sketch)


class WordProduct(Product):
    """Word gradients: words.zarr."""

    def __init__(self, config: RunConfig, extractor: Extractor, encoded: EncodedSet) -> None:
        super().__init__(config, extractor, encoded)
        self.path = config.layout.words
        self._words = load_word_extractor(config, extractor)

    @property
    def num_batches(self) -> int:
        """Batches run through the model so far."""
        return self._words.num_batches

    def plan(self, ranks: Ranks) -> None:
        """Refuse what cannot be computed, before it is begun.

        Raises:
            MethodError: features have several outputs, or synonyms are asked for and ranks share the embeddings.
        """
        ranks.together(lambda: self._check(is_cut=ranks.sharding is not None))

    def _check(self, is_cut: bool) -> None:
        check_output(self.config)
        if is_cut and self.config.words.synonym_cosine is not None:
            raise MethodError(
                "words.synonym_cosine needs the whole embedding matrix, which no process has that shares the weights",
                expected="processes that have the whole model each, or words.synonym_cosine=null",
                fix="build with launch/multi_gpu.yaml, or set words.synonym_cosine=null",
            )

    def manifest(self) -> Manifest:
        """Return the manifest of the store as it is to be."""
        config, encoded = self.config, self.encoded
        places = config.words.top_positions
        if places is None:
            wording = Wording(self.extractor.loaded.tokenizer, config.data, config.words, self._clusters)
            places = most_words(wording, encoded.encoded, encoded.examples)
        data = content_fingerprint(encoded.examples, encoded.encoded)
        return Manifest(
            kind="words",
            num_outputs=places,
            dim=self._words.dim,
            dtype=config.words.dtype,
            columns=columns_of(places),
            fingerprint={**word_fingerprint(config, self.extractor), "data": data},
            **self.common(),
        )

    def precede(self, manifest: Manifest) -> None:
        """Write nothing."""

    def complete(self, store: RowStore) -> None:
        """Write which tokens are one word, unless it is there."""
        if self.config.words.synonym_cosine is None:
            return
        try:
            store.read_vector(CLUSTERS)
        except StoreAccessError:
            raise
        except StoreError:
            assert self._clusters is not None
            store.write_vector(CLUSTERS, self._clusters[None].astype(np.float32))

    def begin(self, store: RowStore) -> None:
        """Read which tokens are one word."""
        self._wording = stored_wording(self.config, self.extractor, store)
        self._places = store.manifest.num_outputs

    def rows(self, part: slice, progress: Progress) -> Rows:
        """Compute the rows and columns of some examples."""
        encoded, examples = self.encoded.encoded[part], self.encoded.examples[part]
        found = extract_words(self.config, self._words, self._wording, encoded, examples, progress)
        return stored_form(found, self._places, self._words.dim)

    def pad(self, example: Encoded) -> None:
        """Run a batch of this example through the model for nothing."""
        self._words.extract([example], [np.array(example.input_ids, np.int64)], 1)

    @cached_property
    def _clusters(self) -> Int[np.ndarray, " v"] | None:
        """The word of each token; the first rank computes it, the others read it from the store."""
        cosine = self.config.words.synonym_cosine
        base: Any = self.extractor.loaded.model.get_base_model()
        return None if cosine is None else synonym_clusters(base.get_input_embeddings().weight, cosine)


def products(config: RunConfig, extractor: Extractor, encoded: EncodedSet) -> list[Product]:
    """Return what the stores of a run are filled with, in the order they are built."""
    made: list[Product] = [LoraProduct(config, extractor, encoded)]
    return [*made, WordProduct(config, extractor, encoded)] if has_words(config) else made
