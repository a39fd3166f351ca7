"""A faiss index over the representers of one method: rows of [c, p] flattened to vectors of c * p.

    index/<method>.faiss        the index
    index/<method>.sample.npy   all representers up to 4,096, else as many drawn at random: the sum of |value| over
                                the training set, the denominator of a share, is read off them
    index/<method>.json         written last: digest of the representers, kind, sizes, checksums of the two files

`flat` is exact and holds the vectors themselves; `hnsw` holds them beside a graph and finds nearly all of the best;
`ivfpq` holds codes of `pq_subquantizers` bytes a row, and its candidates are rescored with the stored
representers. The most harmful examples are the search with the negated query. All three are built with fixed seeds,
one thread where the order of work would show, so the same representers give the same bytes.

Limits: building holds what the index holds (flat and hnsw: n * c * p * 4 bytes); training of ivfpq holds 65,536 rows
or 256 for each list. A GPU build of faiss searches `flat` and `ivfpq` on the GPUs, up to 2,048 hits.
This module alone imports faiss.
Source: Douze et al., The Faiss library (2024), arXiv 2401.08281.
"""

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib import storage
from llmattrib.config import RunConfig
from llmattrib.errors import ConfigError, CorruptShardError, StaleIndexError, StoreNotFoundError
from llmattrib.layout import RunLayout
from llmattrib.lock import locked
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream
from llmattrib.sections import IndexConfig, Method
from llmattrib.store import RowStore

try:
    import faiss
except ImportError as missing:
    raise ConfigError(
        "faiss is not installed",
        expected="one of its two builds, faiss-cpu or faiss-gpu, which exclude each other",
        fix="install llmattrib with the extra `cpu` or `gpu`",
    ) from missing

SCHEMA = 2
SAMPLE_ROWS = 4096
POINTS_PER_CENTROID = 39  # faiss warns below this many training rows for each k-means centroid
MAX_POINTS_PER_CENTROID = 256  # and draws this many above it
PQ_BITS = 8
RESCORED = 4  # candidates rescored for each hit of an ivfpq search
MAX_GPU_HITS = 2048


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` did.

    Attributes:
        path: the index.
        method: whose representers it holds.
        kind: `flat`, `hnsw` or `ivfpq`.
        num_rows: n.
        dim: c * p.
        num_bytes: size of the file.
        seconds: time taken.
        is_reused: whether an index of the same representers and settings was there.
    """

    path: str
    method: Method
    kind: str
    num_rows: int
    dim: int
    num_bytes: int
    seconds: float
    is_reused: bool


class VectorIndex:
    """An opened index. Made by `open_index`."""

    def __init__(
        self, index: Any, config: IndexConfig, representers: RowStore, sample: Float[np.ndarray, "m d"]
    ) -> None:
        self._index, self._config, self._representers, self._sample = index, config, representers, sample
        self._gpu_index = None
        if config.kind != "hnsw" and faiss.get_num_gpus() > 0:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            self._gpu_index = faiss.index_cpu_to_all_gpus(index, options)

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of a vector, c * p."""
        return int(self._index.d)

    @property
    def is_sum_exact(self) -> bool:
        """Whether `sum_of_magnitudes` sums over every example."""
        return len(self._sample) == self.num_rows

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int, largest: bool = True
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """Find the rows with the largest, or smallest, inner products.

        Args:
            queries: vectors in the space of the representers.
            k: rows wanted; at most n are returned.
            largest: false finds the smallest.

        Returns:
            Inner products and row numbers, best first, equal ones by row. An approximate index that finds fewer than
            k rows fills up with row -1.
        """
        k = min(k, self.num_rows)
        sign = np.float32(1 if largest else -1)
        candidates = min(RESCORED * k, self.num_rows) if self._config.kind == "ivfpq" else k
        scores, rows = self._search(np.ascontiguousarray(sign * queries, dtype=np.float32), candidates)
        if self._config.kind == "ivfpq":
            scores = self._rescore(sign * queries, rows)
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        return sign * np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def vectors(self, rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """Read representers from their store; each costs the read of its chunk of about 64 rows."""
        read = [self._representers.read(row, row + 1).reshape(1, -1) for row in rows.tolist()]
        return np.concatenate([np.empty((0, self.dim), np.float32), *read])

    def sum_of_magnitudes(self, queries: Float[np.ndarray, "q d"]) -> Float[np.ndarray, " q"]:
        """Return the sum of |inner product| over all examples, estimated from a fixed sample above 4,096 of them."""
        scale = self.num_rows / len(self._sample)
        total = np.abs(np.matmul(queries, self._sample.T)).sum(1, dtype=np.float64)
        return np.asarray(scale * total, dtype=np.float32)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._gpu_index is not None and k <= MAX_GPU_HITS:
            scores, rows = self._gpu_index.search(queries, k)
            return scores, rows
        parameters = None
        if self._config.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(self._config.hnsw_ef_search, k))
        elif self._config.kind == "ivfpq":
            parameters = faiss.SearchParametersIVF(nprobe=self._config.ivf_probes)
        scores, rows = self._index.search(queries, k, params=parameters)
        return scores, rows

    def _rescore(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Replace the inner products with codes by those with the stored representers."""
        found = np.unique(rows[rows >= 0])
        exact = np.matmul(queries, self.vectors(found).T)
        columns = np.searchsorted(found, np.maximum(rows, 0)).clip(0, max(len(found) - 1, 0))
        return np.take_along_axis(exact, columns, axis=1) if len(found) else np.full(rows.shape, -np.inf, np.float32)


def nearest_rows(rows: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"]) -> Int[np.ndarray, "q n"]:
    """Sort all rows by inner product with each query, largest first, equal ones by number; exact, in float32."""
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(np.ascontiguousarray(rows, np.float32))
    scores, found = index.search(np.ascontiguousarray(queries, np.float32), len(rows))
    return np.take_along_axis(found, np.lexsort((found, -scores), axis=1), axis=1)


def build_index(config: RunConfig, method: Method, progress: Progress = silent) -> IndexResult:
    """Index the representers of `method`, unless an index of the same representers and settings is there.

    Args:
        config: the run.
        method: which representers.
        progress: told of rows added.

    Raises:
        StoreNotFoundError: the method was not reduced yet.
        IncompleteStoreError: its representers are not finished.
        ConfigError: the representers cannot be indexed with these settings.
        StoreLockedError: another process writes an index of this run now.
    """
    began = time.perf_counter()
    layout = config.layout
    store = _open_representers(layout, method)
    settings = _build_settings(config.index)
    stored = _read_manifest(layout.index_manifest(method))
    path = layout.index(method)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "method": method,
        "representers": store.digest(),
        "settings": settings,
        "num_rows": store.manifest.num_rows,
        "dim": store.manifest.num_outputs * store.manifest.dim,
    }
    is_reused = stored is not None and storage.exists(path) and manifest.items() <= stored.items()
    if stored is not None and is_reused:
        manifest = stored
    else:
        index, sample = _fill(store, config, progress)
        with locked(layout.path("index")):
            storage.remove(layout.index_manifest(method))
            manifest["num_bytes"] = _write_index(index, path)
            buffer = io.BytesIO()
            np.save(buffer, sample)
            storage.atomic_write(layout.index_sample(method), buffer.getvalue())
            manifest["checksums"] = [storage.checksum(file) for file in (path, layout.index_sample(method))]
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            storage.atomic_write(layout.index_manifest(method), text.encode())
    seconds = time.perf_counter() - began
    sizes = manifest["num_rows"], manifest["dim"], manifest["num_bytes"]
    return IndexResult(path, method, config.index.kind, *sizes, seconds, is_reused)


def open_index(config: RunConfig, method: Method) -> VectorIndex:
    """Open the index of `method`.

    Raises:
        StoreNotFoundError: there is none.
        StaleIndexError: it was built from other representers or with other settings.
        CorruptShardError: the file is not what was written.
    """
    layout = config.layout
    manifest = _read_manifest(layout.index_manifest(method))
    if manifest is None:
        raise StoreNotFoundError(
            f"there is no index at {layout.index(method)}",
            expected=f"the index of {method}",
            fix="run `llmattrib index` first",
        )
    store = _open_representers(layout, method)
    _check_current(layout.index(method), manifest, store, config.index)
    index = _read_index(layout.index(method), manifest["num_bytes"])
    sample = np.load(io.BytesIO(_read(layout.index_sample(method))), allow_pickle=False)
    return VectorIndex(index, config.index, store, sample)


def _open_representers(layout: RunLayout, method: Method) -> RowStore:
    store = RowStore.open(layout.representers(method), made_by="llmattrib reduce")
    store.require_complete("llmattrib reduce")
    return store


def _build_settings(config: IndexConfig) -> dict[str, Any]:
    """Return the settings that shape the file; those of a search alone are left out."""
    names = {
        "flat": (),
        "hnsw": ("hnsw_neighbors", "hnsw_ef_construction"),
        "ivfpq": ("ivf_lists", "pq_subquantizers"),
    }
    return {"kind": config.kind} | {name: getattr(config, name) for name in names[config.kind]}


def _read_manifest(path: str) -> dict[str, Any] | None:
    try:
        manifest = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # not whole: as good as no index
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None


def _check_current(path: str, manifest: dict[str, Any], store: RowStore, config: IndexConfig) -> None:
    if manifest["representers"] != store.digest():
        raise StaleIndexError(
            f"{path} was built from other representers than {store.path} holds now",
            expected="an index of the present representers",
            fix="run `llmattrib index` again",
        )
    wanted = _build_settings(config)
    if manifest["settings"] != wanted:
        raise StaleIndexError(
            f"{path} was built with {_named(manifest['settings'])}",
            expected=f"{_named(wanted)}, as the config says",
            fix="run `llmattrib index` again, or restore the settings",
        )


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={settings[name]}" for name in sorted(settings))


def _fill(store: RowStore, config: RunConfig, progress: Progress) -> tuple[Any, np.ndarray]:
    """Return the filled index and the sample of representers, in one pass (two for ivfpq)."""
    num_rows, dim = store.manifest.num_rows, store.manifest.num_outputs * store.manifest.dim
    index = _empty_index(config.index, num_rows, dim, config.seed)
    sampled = _draw(config.seed, "shares", num_rows, SAMPLE_ROWS)
    sample = np.empty((len(sampled), dim), np.float32)
    with _one_thread():
        if not index.is_trained:
            most = MAX_POINTS_PER_CENTROID * max(config.index.ivf_lists, 1 << PQ_BITS)
            index.train(_gather(store, _draw(config.seed, "training", num_rows, most)))
        for start, rows in store.blocks():
            vectors = np.ascontiguousarray(rows.reshape(len(rows), -1))
            index.add(vectors)
            first, last = np.searchsorted(sampled, (start, start + len(rows)))
            sample[first:last] = vectors[sampled[first:last] - start]
            progress(start + len(rows), num_rows)
    return index, sample


def _draw(seed: int, name: str, num_rows: int, most: int) -> np.ndarray:
    """Return at most `most` row numbers without repeats, sorted."""
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(stream(seed, "index", name).choice(num_rows, most, replace=False))


def _gather(store: RowStore, wanted: np.ndarray) -> np.ndarray:
    parts = []
    for start, rows in store.blocks():
        first, last = np.searchsorted(wanted, (start, start + len(rows)))
        parts.append(rows[wanted[first:last] - start].reshape(last - first, -1))
    return np.concatenate(parts)


def _empty_index(config: IndexConfig, num_rows: int, dim: int, seed: int) -> Any:
    if config.kind == "flat":
        return faiss.IndexFlatIP(dim)
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.hnsw_neighbors, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.hnsw_ef_construction
        return index
    needed = POINTS_PER_CENTROID * max(config.ivf_lists, 1 << PQ_BITS)
    if num_rows < needed:
        raise ConfigError(
            f"index.kind=ivfpq with {config.ivf_lists} lists, and {num_rows:,} examples",
            expected=f"{needed:,} examples or more to train it",
            fix="set index.kind=flat: it is exact and needs no training",
        )
    if dim % config.pq_subquantizers:
        fitting = [size for size in range(1, min(dim, 256) + 1) if dim % size == 0]
        raise ConfigError(
            f"index.pq_subquantizers={config.pq_subquantizers} does not divide the {dim} dimensions",
            expected=f"one of {', '.join(map(str, fitting))}",
            fix="set index.pq_subquantizers to one of these",
        )
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dim), dim, config.ivf_lists, config.pq_subquantizers, PQ_BITS, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed = index.pq.cp.seed = int(stream(seed, "index", "k-means").integers(1, 1 << 30))
    return index


@contextmanager
def _one_thread() -> Iterator[None]:
    """Build on one thread: a graph or clusters made by several depend on their timing."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _write_index(index: Any, path: str) -> int:
    """Write atomically; return the number of bytes. A local file is written in place, not through memory."""
    local = storage.local_path(path)
    if local is None:
        data = faiss.serialize_index(index).tobytes()
        storage.atomic_write(path, data)
        return len(data)
    local.parent.mkdir(parents=True, exist_ok=True)
    storage.remove_partial(str(local.parent))
    partial = local.with_name(f".{local.name}.{os.getpid()}{storage.PARTIAL}")
    with storage.named_errors(path):
        try:
            faiss.write_index(index, str(partial))
        except RuntimeError as error:  # faiss says so when the disk is full
            partial.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        storage.sync_file(str(partial))
        partial.replace(local)
        return local.stat().st_size


def _read_index(path: str, num_bytes: int) -> Any:
    local = storage.local_path(path)
    try:
        if local is None:
            return faiss.deserialize_index(np.frombuffer(storage.read_bytes(path), np.uint8))
        if local.exists() and local.stat().st_size == num_bytes:
            return faiss.read_index(str(local), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, FileNotFoundError):
        pass
    raise CorruptShardError(
        f"{path} is missing or not whole",
        expected=f"the {num_bytes:,} bytes that were written",
        fix=f"delete {path.removesuffix('.faiss')}.json and run `llmattrib index` again",
    )


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise CorruptShardError(f"{path} is missing", fix="delete the index folder and index again") from error


def verify_index(path: str, sample: str, manifest_path: str, store: RowStore | None) -> str:
    """Read an index and compare it with its checksums and with the representers.

    Args:
        path: the index.
        sample: of its representers.
        manifest_path: what it was made from.
        store: its representers; None leaves out the comparison with them.

    Returns:
        What is wrong with it; empty when it is sound.
    """
    manifest = _read_manifest(manifest_path)
    if manifest is None:
        return "was not written to its end"
    try:
        found = [storage.checksum(file) for file in (path, sample)]
        if found != manifest.get("checksums"):
            return "does not match the checksums it was written with"
        index = _read_index(path, manifest["num_bytes"])
    except (CorruptShardError, FileNotFoundError) as error:
        return f"is missing a file or cannot be read ({error})"
    if store is None:
        return ""
    if manifest["representers"] != store.digest():
        return f"was built from other representers than {store.path} holds now"
    if (index.ntotal, index.d) != (store.manifest.num_rows, store.manifest.num_outputs * store.manifest.dim):
        return f"holds {index.ntotal:,} vectors of {index.d:,} numbers, and the representers are of another number"
    if manifest["settings"]["kind"] != "ivfpq":  # the others hold the vectors themselves
        for start, rows in store.blocks():
            if not np.array_equal(index.reconstruct_n(start, len(rows)), rows.reshape(len(rows), -1)):
                return f"holds other vectors than the representers, from row {start} on"
    return ""
