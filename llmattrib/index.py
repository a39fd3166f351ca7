"""A faiss index over the representers of one method: rows of [c, p] flattened to vectors of c * p.

    index/<method>.faiss        the index
    index/<method>.sample.npy   some representers (index_sample.py): the sum of |value| over the training set, the
                                denominator of a share, is read off them
    index/<method>.json         written last: digest of the representers, kind, sizes, checksums of the two files

`flat` is exact and holds the vectors themselves. `scan` and `ivfpq` hold codes of the coordinates of coordinates.py.
Those of `scan` are of 2 bits a coordinate and lie beside the vectors; a search reads all codes and then the vectors of
the `candidates` best, so its values are exact. Those of `ivfpq` are of `pq_subquantizers` bytes a row, in lists, with
no vectors; its candidates are rescored with the stored representers. `hnsw` holds the vectors beside a graph. The most
harmful examples are the search with the negated query. All are built with fixed seeds, one thread where the order of
work would show, so the same representers give the same bytes. Which kind to take, with figures: docs/architecture.md.

Limits: building holds what the index holds (all but ivfpq: n * c * p * 4 bytes); training of scan and ivfpq holds
65,536 rows, or 256 for each list if that is more. Vectors are mapped from a local file and not held when it is
searched. A GPU build of faiss searches `flat`, and `ivfpq` of at most 48 bytes, on the GPUs, up to 2,048 hits.
This module alone imports faiss.
Source: Douze et al., The Faiss library (2024), arXiv 2401.08281; Andre, Kermarrec and Le Scouarnec, Accelerated
nearest neighbor search with Quick ADC (2017), arXiv 1704.07355.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib import storage
from llmattrib.config import RunConfig
from llmattrib.coordinates import coordinates_of
from llmattrib.errors import ConfigError, CorruptShardError, StoreNotFoundError, memory_errors
from llmattrib.index_record import (
    PQ_BITS,
    SCAN_BITS,
    SCHEMA,
    IndexResult,
    Kind,
    check_current,
    check_fits,
    check_representers,
    index_bytes,
    read_record,
    resolve_kind,
    shaping_settings,
)
from llmattrib.index_sample import SAMPLE_ROWS, draw, gather, read_sample, write_sample
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

MAX_POINTS_PER_CENTROID = 256  # faiss draws this many above it
MAX_GPU_HITS = 2048  # and lists probed
GPU_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)  # bytes a row of ivfpq that the GPU build of faiss knows
TRAINING_ROWS = 65_536
CANDIDATES_PER_HIT = 20  # at least
SMALLER_FILE = "free space, set run_dir on a larger disk, or set index.kind=ivfpq: its file holds codes alone"


class VectorIndex:
    """An opened index. Made by `open_index`."""

    def __init__(
        self,
        index: Any,
        kind: Kind,
        config: IndexConfig,
        representers: RowStore,
        check_representers: Callable[[], None],
        sample: Float[np.ndarray, "m d"],
    ) -> None:
        self._index, self._kind, self._config = index, kind, config
        self._representers, self._check_representers, self._sample = representers, check_representers, sample
        self._gpu_index = None
        probes = min(config.ivf_probes, config.ivf_lists) if kind == "ivfpq" else 0
        if kind == "ivfpq":
            faiss.extract_index_ivf(index).nprobe = probes
        is_known = probes <= MAX_GPU_HITS and config.pq_subquantizers in GPU_CODES
        if (kind == "flat" or (kind == "ivfpq" and is_known)) and faiss.get_num_gpus() > 0:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            fix = "free memory of the GPUs, or set index.kind to scan or hnsw, which the CPU searches, and index again"
            with memory_errors(f"the index of {index.ntotal:,} rows", expected="room for it on all GPUs", fix=fix):
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
        sign = np.float32(1 if largest else -1)
        scores, rows = self._best(sign * queries, min(k, self.num_rows))
        return sign * scores, rows

    def extremes(
        self, queries: Float[np.ndarray, "q d"], k: int
    ) -> tuple[tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]], ...]:
        """Return `search` for the largest and for the smallest inner products; one pass where it is a scan."""
        scores, rows = self._best(np.concatenate([queries, -queries]), min(k, self.num_rows))
        num = len(queries)
        return (scores[:num], rows[:num]), (-scores[num:], rows[num:])

    def vectors(self, rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """Read representers from their store; each costs the read of its chunk of about 64 rows.

        Raises:
            StaleIndexError: the store holds others by now.
            CorruptShardError: they cannot be read.
        """
        try:
            read = [self._representers.read(row, row + 1).reshape(1, -1) for row in rows.tolist()]
        finally:
            self._check_representers()  # not before: `reduce` may replace them while they are read
        return np.concatenate([np.empty((0, self.dim), np.float32), *read])

    def _num_candidates(self, k: int) -> int:
        return min(max(self._config.candidates, CANDIDATES_PER_HIT * k), self.num_rows)

    def sum_of_magnitudes(self, queries: Float[np.ndarray, "q d"]) -> Float[np.ndarray, " q"]:
        """Return the sum of |inner product| over all examples, estimated from a fixed sample above 4,096 of them."""
        scale = self.num_rows / len(self._sample)
        total = np.abs(np.matmul(queries, self._sample.T)).sum(1, dtype=np.float64)
        return np.asarray(scale * total, dtype=np.float32)

    def _best(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest inner products and their rows, in order."""
        wanted = self._num_candidates(k) if self._kind == "ivfpq" else k
        scores, rows = self._search(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        if self._kind == "ivfpq":
            scores = self._rescore(queries, rows)
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._gpu_index is not None and k <= MAX_GPU_HITS:
            scores, rows = self._gpu_index.search(queries, k)
            return scores, rows
        parameters = None
        if self._kind == "scan":
            factor = (self._num_candidates(k) + 0.5) / k  # faiss rounds down
            parameters = faiss.IndexRefineSearchParameters(k_factor=factor)
        elif self._kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(self._config.hnsw_ef_search, k))
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
        DiskSpaceError: the index would not fit on the disk.
        StoreLockedError: another process writes an index of this run now.
    """
    began = time.perf_counter()
    layout = config.layout
    store = _open_representers(layout, method)
    num_rows, dim = store.manifest.num_rows, store.manifest.num_outputs * store.manifest.dim
    kind = resolve_kind(config.index, num_rows, dim)
    stored = read_record(layout.index_manifest(method))
    path = layout.index(method)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "method": method,
        "representers": store.digest(),
        "settings": shaping_settings(config.index, kind),
        "num_rows": num_rows,
        "dim": dim,
    }
    is_reused = stored is not None and storage.exists(path) and manifest.items() <= stored.items()
    if stored is not None and is_reused:
        manifest = stored
    else:
        check_fits(config.index, kind, num_rows, dim)
        storage.require_space(path, index_bytes(config.index, num_rows, dim), SMALLER_FILE)
        index, sample = _fill(kind, store, config, progress)
        with locked(layout.path("index")):
            storage.remove(layout.index_manifest(method))
            manifest["num_bytes"] = _write_index(index, path)
            write_sample(layout.index_sample(method), sample)
            manifest["checksums"] = [storage.checksum(file) for file in (path, layout.index_sample(method))]
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            storage.atomic_write(layout.index_manifest(method), text.encode())
    seconds = time.perf_counter() - began
    return IndexResult(path, method, kind, num_rows, dim, manifest["num_bytes"], seconds, is_reused)


def open_index(config: RunConfig, method: Method) -> VectorIndex:
    """Open the index of `method`.

    Raises:
        StoreNotFoundError: there is none.
        StaleIndexError: it was built from other representers or with other settings.
        CorruptShardError: a file is not what was written.
    """
    layout = config.layout
    manifest = read_record(layout.index_manifest(method))
    if manifest is None:
        raise StoreNotFoundError(
            f"there is no index at {layout.index(method)}",
            expected=f"the index of {method}",
            fix="run `llmattrib index` first",
        )
    store = _open_representers(layout, method)
    kind = check_current(layout.index(method), manifest, store, config.index)
    index = _read_index(layout.index(method), manifest["num_bytes"])
    sample = read_sample(layout.index_sample(method), manifest["num_rows"], manifest["dim"])
    check = partial(check_representers, layout.index(method), manifest, store)
    return VectorIndex(index, kind, config.index, store, check, sample)


def _open_representers(layout: RunLayout, method: Method) -> RowStore:
    store = RowStore.open(layout.representers(method), made_by="llmattrib reduce")
    store.require_complete("llmattrib reduce")
    return store


def _fill(kind: Kind, store: RowStore, config: RunConfig, progress: Progress) -> tuple[Any, np.ndarray]:
    """Return the filled index and the sample of representers, in one pass (two for scan and ivfpq)."""
    num_rows, dim = store.manifest.num_rows, store.manifest.num_outputs * store.manifest.dim
    sampled = draw(config.seed, "shares", num_rows, SAMPLE_ROWS)
    sample = np.empty((len(sampled), dim), np.float32)
    with _one_thread():
        if kind in ("scan", "ivfpq"):
            index, add = _empty_coded(kind, store, config)
        else:
            index = _empty_whole(kind, config.index, dim)
            add = index.add
        for start, rows in store.blocks():
            vectors = np.ascontiguousarray(rows.reshape(len(rows), -1))
            add(vectors)
            first, last = np.searchsorted(sampled, (start, start + len(rows)))
            sample[first:last] = vectors[sampled[first:last] - start]
            progress(start + len(rows), num_rows)
    return index, sample


def _empty_coded(kind: Kind, store: RowStore, config: RunConfig) -> tuple[Any, Callable[[np.ndarray], None]]:
    """Return a trained index without rows, and what adds rows to it.

    Queries are mapped by the index itself; rows have another map, so they are added to its parts.
    """
    most = max(TRAINING_ROWS, MAX_POINTS_PER_CENTROID * config.index.ivf_lists if kind == "ivfpq" else 0)
    sample = gather(store, draw(config.seed, "training", store.manifest.num_rows, most))
    multiple = 2 if kind == "scan" else config.index.pq_subquantizers
    maps = coordinates_of(config, store, sample, TRAINING_ROWS, config.index.tail, multiple)
    dim, width = maps.of_rows.shape
    codes = _empty_codes(kind, config.index, width, config.seed)
    codes.train(np.matmul(sample, maps.of_rows))
    turn = faiss.LinearTransform(dim, width, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(maps.of_queries.T).ravel(), turn.A)
    turn.is_trained = True
    coded = faiss.IndexPreTransform(turn, codes)
    index = faiss.IndexRefine(coded, faiss.IndexFlatIP(dim)) if kind == "scan" else coded

    def add(rows: np.ndarray) -> None:
        codes.add(np.matmul(rows, maps.of_rows))
        if kind == "scan":
            index.refine_index.add(rows)
        coded.ntotal = index.ntotal = codes.ntotal

    return index, add


def _empty_whole(kind: Kind, config: IndexConfig, dim: int) -> Any:
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    index = faiss.IndexHNSWFlat(dim, config.hnsw_neighbors, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = config.hnsw_ef_construction
    return index


def _empty_codes(kind: Kind, config: IndexConfig, width: int, seed: int) -> Any:
    random = int(stream(seed, "index", "k-means").integers(1, 1 << 30))
    if kind == "scan":
        codes = faiss.IndexPQFastScan(width, width // 2, SCAN_BITS, faiss.METRIC_INNER_PRODUCT)
        codes.pq.cp.seed = random
        return codes
    lists, size = config.ivf_lists, config.pq_subquantizers
    codes = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, size, PQ_BITS, faiss.METRIC_INNER_PRODUCT)
    codes.cp.seed = codes.pq.cp.seed = random
    codes.cp.spherical = False  # faiss makes centroids of unit length for inner products; residuals are then no shorter
    return codes


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
    """Write atomically; return the number of bytes. A local file is written in place, not through memory.

    The file is Python's: faiss's own passes over a failing close, and so over what a full disk did not take of the last
    buffer, and its other errors have no number.
    """
    local = storage.local_path(path)
    if local is None:
        data = faiss.serialize_index(index).tobytes()
        storage.atomic_write(path, data)
        return len(data)
    local.parent.mkdir(parents=True, exist_ok=True)
    storage.remove_partial(str(local.parent))
    unfinished = local.with_name(f".{local.name}.{os.getpid()}{storage.PARTIAL}")
    with storage.named_errors(path):
        try:
            with unfinished.open("wb") as file:
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
                num_bytes = file.tell()
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.replace(local)
        storage.sync_file(str(local))
        return num_bytes


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
    manifest = read_record(manifest_path)
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
    kind = manifest["settings"]["kind"]
    if kind != "ivfpq":  # the others hold the vectors themselves
        vectors = faiss.downcast_index(index.refine_index) if kind == "scan" else index
        for start, rows in store.blocks():
            if not np.array_equal(vectors.reconstruct_n(start, len(rows)), rows.reshape(len(rows), -1)):
                return f"holds other vectors than the representers, from row {start} on"
    return ""
