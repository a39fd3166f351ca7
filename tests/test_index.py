"""The index against plain inner products: values, order, harmful side, shares, reuse, staleness, damage."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from llmattrib.config import RunConfig, validate_config
from llmattrib.errors import (
    ConfigError,
    CorruptShardError,
    DeviceMemoryError,
    DiskSpaceError,
    IncompleteStoreError,
    StaleIndexError,
    StoreNotFoundError,
)
from llmattrib.index import build_index, open_index, verify_index
from llmattrib.index_record import check_fits, index_bytes, resolve_kind
from llmattrib.index_sample import SAMPLE_ROWS
from llmattrib.manifest import Manifest
from llmattrib.query import Run
from llmattrib.rng import stream
from llmattrib.sections import IndexConfig, ReduceConfig
from llmattrib.settings import resolve
from llmattrib.store import RowStore


def make_run(tmp_path: Path, name: str = "run", **index: Any) -> RunConfig:
    tree = {"run_dir": str(tmp_path / name), "model": {"name": "m"}, "data": {"train": "d.jsonl"}, "index": index}
    return validate_config(tree)


def write_representers(config: RunConfig, rows: np.ndarray, seed: str = "a", shards: int | None = None) -> None:
    n, c, p = rows.shape
    manifest = Manifest("representers", n, c, p, "float32", 1024 if n > 1000 else 16, fingerprint={"seed": seed})
    store = RowStore.create(config.layout.representers("trak"), manifest)
    for shard in store.pending()[:shards]:
        start, stop = store.shard_range(shard)
        store.write_shard(shard, rows[start:stop], {})


def write_both(config: RunConfig, rows: np.ndarray, features: np.ndarray | None = None, center: bool = True) -> None:
    """Representers with the features they are of, which a scan index needs."""
    n, c, p = rows.shape
    fingerprint = {"features": {"output": "loss"}, "encoding": {"label_words": []}}
    store = RowStore.create(config.layout.features, Manifest("features", n, c, p, "float32", 1024, (), fingerprint))
    features = rows if features is None else features
    for shard in store.pending():
        store.write_shard(shard, features[slice(*store.shard_range(shard))], {})
    settings = resolve(ReduceConfig(center=center), "trak", "loss", False, n, p)
    manifest = Manifest("representers", n, c, p, "float32", 1024, (), {"features": store.digest()}, asdict(settings))
    kept = RowStore.create(config.layout.representers("trak"), manifest)
    kept.write_vector("mean", features.mean(0) if center else np.zeros((c, p), np.float32))
    kept.write_vector("total", rows.sum(0))
    for shard in kept.pending():
        kept.write_shard(shard, rows[slice(*kept.shard_range(shard))], {})


def draw(n: int, c: int, p: int, seed: int = 0) -> np.ndarray:
    return stream(seed, "test index").standard_normal((n, c, p)).astype(np.float32)


def clustered(n: int, dim: int) -> np.ndarray:
    """Rows as real ones are: a spectrum that falls off, in groups, of unequal length."""
    generator = stream(1, "test index")
    spectrum = 1 / np.sqrt(1 + np.arange(dim))
    centers = generator.standard_normal((50, dim)) * spectrum
    rows = centers[generator.integers(50, size=n)] + 0.5 * generator.standard_normal((n, dim)) * spectrum
    return (rows * generator.uniform(0.5, 1.5, (n, 1))).astype(np.float32)[:, None]


@pytest.mark.parametrize(("n", "c", "p"), [(50, 1, 24), (50, 3, 8), (7, 2, 5)])
def test_flat_search_equals_sorted_inner_products(tmp_path: Path, n: int, c: int, p: int) -> None:
    config = make_run(tmp_path)
    rows, queries = draw(n, c, p), draw(4, c, p, seed=1).reshape(4, -1)
    write_representers(config, rows)
    result = build_index(config, "trak")
    assert (result.num_rows, result.dim, result.kind, result.is_reused) == (n, c * p, "flat", False)
    index = open_index(config, "trak")
    exact = queries.astype(np.float64) @ rows.reshape(n, -1).T.astype(np.float64)
    for largest in (True, False):
        scores, found = index.search(queries, 6, largest=largest)
        expected = np.argsort(-exact if largest else exact, axis=1)[:, :6]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, axis=1), rtol=1e-5, atol=1e-5)
    assert index.is_sum_exact
    np.testing.assert_allclose(index.sum_of_magnitudes(queries), np.abs(exact).sum(1), rtol=1e-5)


def test_more_hits_than_rows_gives_every_row_once(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(9, 1, 4))
    build_index(config, "trak")
    scores, found = open_index(config, "trak").search(draw(2, 1, 4).reshape(2, 4), 50)
    assert scores.shape == (2, 9)
    assert sorted(found[1].tolist()) == list(range(9))


@pytest.mark.parametrize("largest", [True, False])
def test_equal_values_are_ordered_by_row(tmp_path: Path, largest: bool) -> None:
    config = make_run(tmp_path)
    write_representers(config, np.ones((40, 1, 4), np.float32))
    build_index(config, "trak")
    _, found = open_index(config, "trak").search(np.ones((1, 4), np.float32), 40, largest=largest)
    assert found[0].tolist() == list(range(40))


def test_vectors_are_the_stored_representers(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    rows = draw(40, 2, 4)
    write_representers(config, rows)
    build_index(config, "trak")
    wanted = np.array([39, 0, 17])
    np.testing.assert_array_equal(open_index(config, "trak").vectors(wanted), rows[wanted].reshape(3, -1))
    assert open_index(config, "trak").vectors(wanted[:0]).shape == (0, 8)


def test_share_denominator_is_estimated_from_a_fixed_sample_above_its_size(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    n = 2 * SAMPLE_ROWS
    rows, query = draw(n, 1, 8), draw(1, 1, 8, seed=1).reshape(1, 8)
    write_representers(config, rows)
    build_index(config, "trak")
    index = open_index(config, "trak")
    magnitudes = np.abs(rows.reshape(n, 8) @ query[0])
    assert not index.is_sum_exact
    estimate = index.sum_of_magnitudes(query)[0]
    standard_error = magnitudes.std() * n / np.sqrt(SAMPLE_ROWS) * np.sqrt(1 - SAMPLE_ROWS / n)
    assert abs(estimate - magnitudes.sum()) < 4 * standard_error
    assert estimate != pytest.approx(magnitudes.sum(), rel=1e-6)
    sample = np.load(config.layout.index_sample("trak"))
    assert len(np.unique(sample, axis=0)) == SAMPLE_ROWS
    assert set(map(bytes, sample)) <= set(map(bytes, rows.reshape(n, 8)))


APPROXIMATE: dict[str, dict[str, Any]] = {
    "scan": {"kind": "scan", "candidates": 300},
    "hnsw": {"kind": "hnsw", "hnsw_neighbors": 16, "hnsw_ef_construction": 80, "hnsw_ef_search": 128},
    "ivfpq": {"kind": "ivfpq", "ivf_lists": 32, "ivf_probes": 24, "pq_subquantizers": 8, "candidates": 100},
}


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_index_finds_nearly_all_with_exact_values(tmp_path: Path, kind: str) -> None:
    config = make_run(tmp_path, **APPROXIMATE[kind])
    rows = clustered(10_000, 16)
    queries = clustered(40, 16).reshape(40, -1)
    write_both(config, rows)
    assert build_index(config, "trak").kind == kind
    index = open_index(config, "trak")
    exact = queries @ rows.reshape(len(rows), -1).T
    for largest in (True, False):
        scores, found = index.search(queries, 10, largest=largest)
        best = np.argsort(-exact if largest else exact, axis=1)[:, :10]
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)])
        assert recall > 0.9, (kind, largest, recall)
        np.testing.assert_allclose(scores, np.take_along_axis(exact, found, axis=1), rtol=1e-4, atol=1e-4)
        assert (np.diff(scores if largest else -scores, axis=1) <= 0).all()
        both = index.extremes(queries, 10)[0 if largest else 1]
        np.testing.assert_array_equal(both[1], found)
        np.testing.assert_allclose(both[0], scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("index", "outputs"),
    [
        ({"kind": "scan", "candidates": 200}, 1),
        ({"kind": "scan", "candidates": 200}, 3),
        ({"kind": "ivfpq", "candidates": 200, "ivf_lists": 16, "ivf_probes": 16, "pq_subquantizers": 24}, 3),
    ],
)
def test_what_nearly_white_representers_answer_to_queries_along_few_directions_is_found(
    tmp_path: Path, index: dict[str, Any], outputs: int
) -> None:
    """Codes in the representers' own coordinates miss most of these."""
    n, p = 10_000, 48 // outputs
    spread = (10.0 ** -np.linspace(0, 2, p)).astype(np.float32)
    turn = np.linalg.qr(draw(1, p, p, seed=3)[0])[0]
    features = (draw(n, outputs, p) * spread + 0.3) @ turn
    rows = (draw(n, outputs, p, seed=2) / spread) @ turn
    config = make_run(tmp_path, **index)
    write_both(config, rows, features)
    result = build_index(config, "trak")
    sample = Path(config.layout.index_sample("trak")).stat().st_size
    assert index_bytes(config.index, n, outputs * p) == pytest.approx(result.num_bytes + sample, rel=0.02)
    queries = ((draw(40, outputs, p, seed=1) * spread) @ turn).reshape(40, -1)
    exact = queries @ rows.reshape(n, -1).T
    best = np.argsort(-exact, axis=1)[:, :10]

    def recall(found: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]))

    values, found = open_index(config, "trak").search(queries, 10)
    np.testing.assert_allclose(values, np.take_along_axis(exact, found, axis=1), rtol=1e-3, atol=1e-3)
    assert recall(found) > 0.97
    plain = faiss.IndexPQFastScan(outputs * p, outputs * p // 2, 4, faiss.METRIC_INNER_PRODUCT)
    plain.train(rows.reshape(n, -1))
    plain.add(rows.reshape(n, -1))
    rough = plain.search(queries, 200)[1]
    kept = [row[np.argsort(-exact[k, row])[:10]] for k, row in enumerate(rough)]
    assert recall(np.array(kept)) < 0.8


def test_a_scan_of_all_rows_is_exact_and_verified(tmp_path: Path) -> None:
    config = make_run(tmp_path, kind="scan", candidates=700)
    rows, queries = draw(700, 2, 5), draw(3, 2, 5, seed=1).reshape(3, -1)
    write_both(config, rows)
    build_index(config, "trak")
    scores, found = open_index(config, "trak").search(queries, 700)
    exact = queries @ rows.reshape(700, -1).T
    np.testing.assert_array_equal(found, np.argsort(-exact, axis=1))
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found, 1), rtol=1e-4, atol=1e-5)
    layout = config.layout
    store = RowStore.open(layout.representers("trak"))
    files = layout.index("trak"), layout.index_sample("trak"), layout.index_manifest("trak")
    assert verify_index(*files, store) == ""
    other = make_run(tmp_path, "other", kind="scan")
    write_both(other, draw(700, 2, 5, seed=9))
    manifest = Path(files[2])
    record = json.loads(manifest.read_text())
    other_store = RowStore.open(other.layout.representers("trak"))
    manifest.write_text(json.dumps(record | {"representers": other_store.digest()}))
    assert "other vectors than the representers" in verify_index(*files, other_store)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_an_index_of_other_vectors_is_named(tmp_path: Path, kind: str) -> None:
    """The record says the representers are these; the vectors are not."""
    config, other = make_run(tmp_path, kind=kind), make_run(tmp_path, "other", kind=kind)
    rows = draw(300, 2, 5)
    write_both(config, rows)
    build_index(config, "trak")
    layout = config.layout
    files = layout.index("trak"), layout.index_sample("trak"), layout.index_manifest("trak")
    assert verify_index(*files, RowStore.open(layout.representers("trak"))) == ""
    rows[200, 0, 0] += 1
    write_both(other, rows)
    store = RowStore.open(other.layout.representers("trak"))
    record = json.loads(Path(files[2]).read_text())
    Path(files[2]).write_text(json.dumps(record | {"representers": store.digest()}))
    assert "other vectors than the representers" in verify_index(*files, store)


def test_a_scan_needs_the_features_its_representers_are_of(tmp_path: Path) -> None:
    config = make_run(tmp_path, kind="scan")
    write_both(config, draw(700, 1, 8))
    shutil.rmtree(config.layout.features)
    with pytest.raises(StoreNotFoundError, match="run `llmattrib build` first"):
        build_index(config, "trak")
    write_both(make_run(tmp_path, "other"), draw(700, 1, 8, seed=1))
    shutil.copytree(make_run(tmp_path, "other").layout.features, config.layout.features)
    with pytest.raises(StaleIndexError, match="was made from other features"):
        build_index(config, "trak")


@pytest.mark.parametrize(
    ("kind", "num_rows", "dim", "resolved"),
    [
        ("auto", 99_999, 512, "flat"),
        ("auto", 100_000, 512, "scan"),
        ("auto", 10**6, 8193, "flat"),
        ("hnsw", 9, 9, "hnsw"),
    ],
)
def test_auto_is_flat_where_that_is_quick(kind: Any, num_rows: int, dim: int, resolved: str) -> None:
    assert resolve_kind(IndexConfig(kind=kind), num_rows, dim) == resolved


def test_a_scan_of_too_few_or_too_wide_rows_says_what_fits(tmp_path: Path) -> None:
    config = make_run(tmp_path, kind="scan")
    write_representers(config, draw(300, 1, 12))
    with pytest.raises(ConfigError, match=r"kind=scan, and 300 examples\n  expected: 624 examples.*\n.*kind=flat"):
        build_index(config, "trak")
    with pytest.raises(ConfigError, match=r"of 8,193 numbers\n  expected: 8,192 or fewer"):
        check_fits(IndexConfig(), "scan", 10_000, 8193)
    with pytest.raises(ConfigError, match=r"kind=ivfpq, and representers of 8,193 numbers"):
        check_fits(IndexConfig(), "ivfpq", 10_000, 8193)


def test_ivfpq_that_finds_too_few_fills_up_with_row_minus_one(tmp_path: Path) -> None:
    config = make_run(tmp_path, kind="ivfpq", ivf_lists=200, ivf_probes=1, pq_subquantizers=4)
    rows = clustered(10_000, 8)
    write_both(config, rows)
    build_index(config, "trak")
    scores, found = open_index(config, "trak").search(clustered(1, 8).reshape(1, -1), 2_000)
    missing = found[0] < 0
    assert 0 < missing.sum() < 2_000
    assert not missing[: (~missing).sum()].any(), "found rows come first"
    assert (scores[0][missing] == -np.inf).all()


@pytest.mark.parametrize("kind", ["flat", "scan", "hnsw", "ivfpq"])
def test_two_builds_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    files = []
    for name in ("one", "two"):
        config = make_run(tmp_path, name, **APPROXIMATE.get(kind, {}))
        write_both(config, clustered(10_000, 16))
        faiss.omp_set_num_threads(2)  # building takes one all the same
        build_index(config, "trak")
        assert faiss.omp_get_max_threads() == 2
        faiss.omp_set_num_threads(1)
        layout = config.layout
        paths = layout.index("trak"), layout.index_sample("trak"), layout.index_manifest("trak")
        files.append([Path(path).read_bytes() for path in paths])
    assert files[0] == files[1]


def test_finished_index_is_reused_and_one_of_other_settings_is_replaced(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(30, 1, 8))
    build_index(config, "trak")
    path = Path(config.layout.index("trak"))
    written = path.stat().st_mtime_ns
    again = build_index(config, "trak")
    assert again.is_reused
    assert again.num_bytes == path.stat().st_size
    assert path.stat().st_mtime_ns == written
    hnsw = config.model_copy(update={"index": IndexConfig(kind="hnsw")})
    assert not build_index(hnsw, "trak").is_reused
    with pytest.raises(StaleIndexError, match=r"was built with hnsw_ef.*, kind=hnsw\n  expected: kind=flat, as"):
        open_index(config, "trak")
    searching = hnsw.model_copy(update={"index": IndexConfig(kind="hnsw", hnsw_ef_search=7)})
    assert build_index(searching, "trak").is_reused, "what only a search reads does not make an index stale"


def test_index_of_other_representers_is_stale(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(30, 1, 8))
    build_index(config, "trak")
    path = Path(config.layout.representers("trak"))
    path.rename(path.with_name("old"))
    write_representers(config, draw(30, 1, 8, seed=1))
    with pytest.raises(StaleIndexError, match=r"trak\.faiss was built from other representers"):
        open_index(config, "trak")
    assert not build_index(config, "trak").is_reused
    open_index(config, "trak")


def test_stages_out_of_order(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    with pytest.raises(StoreNotFoundError, match="run `llmattrib reduce` first"):
        build_index(config, "trak")
    with pytest.raises(StoreNotFoundError, match=r"there is no index at .*\n.*\n.*run `llmattrib index` first"):
        open_index(config, "trak")
    write_representers(config, draw(40, 1, 8), shards=1)
    with pytest.raises(IncompleteStoreError, match="lacks 2 of 3 shards"):
        build_index(config, "trak")


def test_interrupted_build_leaves_the_index_that_was_there(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(40, 1, 8))
    build_index(config, "trak")
    other = config.model_copy(update={"index": IndexConfig(kind="hnsw")})

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(other, "trak", stop)
    assert open_index(config, "trak").num_rows == 40
    assert build_index(config, "trak").is_reused


@pytest.mark.parametrize("damage", ["truncated", "missing", "zeroed"])
def test_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(30, 1, 8))
    build_index(config, "trak")
    path = Path(config.layout.index("trak"))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if damage == "truncated" else bytes(len(data)))
    with pytest.raises(CorruptShardError, match=r"trak\.faiss is missing or not whole"):
        open_index(config, "trak")


@pytest.mark.parametrize("kept", [None, 0, 40, -5, "of other rows"])
def test_damaged_sample_is_named(tmp_path: Path, kept: int | str | None) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(30, 1, 8))
    build_index(config, "trak")
    sample = Path(config.layout.index_sample("trak"))
    if kept is None:
        sample.unlink()
    elif isinstance(kept, int):
        sample.write_bytes(sample.read_bytes()[:kept])
    else:
        np.save(sample, np.zeros((29, 8), np.float32))
    with pytest.raises(CorruptShardError, match=r"trak\.sample\.npy is missing or not whole\n.*30 representers of 8 n"):
        open_index(config, "trak")


@pytest.mark.parametrize("missing", [500, 20_000])
def test_a_disk_that_fills_up_leaves_no_index(tmp_path: Path, missing: int) -> None:
    """Of the last bytes faiss's own writer would say nothing: they fail when the file is closed."""
    config = make_run(tmp_path)
    write_representers(config, draw(400, 1, 16))
    size = len(faiss.serialize_index(faiss.IndexFlatIP(16))) + 400 * 16 * 4
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
    try:
        with pytest.raises(DiskSpaceError, match=r"trak\.faiss could not be written.*\n.*free space"):
            build_index(config, "trak")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Path(config.layout.path("index")).iterdir()) == []
    result = build_index(config, "trak")
    assert (result.is_reused, result.num_bytes) == (False, size)
    assert Path(result.path).read_bytes() == faiss.serialize_index(faiss.read_index(result.path)).tobytes()
    assert open_index(config, "trak").num_rows == 400


def test_a_disk_without_room_is_found_before_the_index_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(400, 1, 16))
    usage, needed = shutil.disk_usage(tmp_path), index_bytes(config.index, 400, 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(DiskSpaceError, match=r"(?s)trak\.faiss needs .* GB more.*set index\.kind=ivfpq"):
        build_index(config, "trak", lambda done, total: pytest.fail("a row was added"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert build_index(config, "trak").num_rows == 400


def test_an_open_index_does_not_mix_in_representers_that_replaced_its_own(tmp_path: Path) -> None:
    config = make_run(tmp_path, **APPROXIMATE["ivfpq"])
    rows, queries = clustered(10_000, 16), clustered(2, 16).reshape(2, -1)
    write_both(config, rows)
    build_index(config, "trak")
    index, path = open_index(config, "trak"), Path(config.layout.representers("trak"))
    assert (index.search(queries, 5)[1] >= 0).all()
    for file in path.glob("rows/c.*"):
        file.unlink()
    with pytest.raises(CorruptShardError, match="has no data on disk"):
        index.search(queries, 5)
    for shards in (0, 2, None):  # of a `reduce` that has written nothing yet, is at work, is done
        shutil.rmtree(path)
        write_representers(config, -rows, shards=shards)
        for search in (index.search, index.extremes):
            with pytest.raises(StaleIndexError, match=r"trak\.faiss was built from other representers"):
                search(queries, 5)


def test_an_opened_run_takes_the_index_that_was_made_again(tmp_path: Path) -> None:
    config = make_run(tmp_path, **APPROXIMATE["ivfpq"])
    rows, queries = clustered(10_000, 16), clustered(2, 16).reshape(2, -1)
    write_both(config, rows)
    build_index(config, "trak")
    run = Run(config)
    run._attribution("trak")
    shutil.rmtree(config.layout.representers("trak"))
    write_both(config, -rows, rows)
    for ask in (lambda: run._extremes("trak", queries, 5), lambda: run._attribution("trak")):
        with pytest.raises(StaleIndexError, match="run `llmattrib index` again"):
            ask()
    build_index(config, "trak")
    run._attribution("trak")
    (scores, found), _ = run._extremes("trak", queries, 5)
    exact = -(queries @ rows.reshape(len(rows), -1).T)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found, axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}'])
def test_unreadable_manifest_is_no_index(tmp_path: Path, text: str) -> None:
    config = make_run(tmp_path)
    write_representers(config, draw(30, 1, 8))
    build_index(config, "trak")
    Path(config.layout.index_manifest("trak")).write_text(text)
    with pytest.raises(StoreNotFoundError, match="there is no index"):
        open_index(config, "trak")
    assert not build_index(config, "trak").is_reused
    assert json.loads(Path(config.layout.index_manifest("trak")).read_text())["num_rows"] == 30


def test_ivfpq_with_too_few_examples_or_a_misfit_says_what_fits(tmp_path: Path) -> None:
    config = make_run(tmp_path, kind="ivfpq", ivf_lists=16)
    write_representers(config, draw(300, 1, 12))
    with pytest.raises(ConfigError, match=r"and 300 examples\n  expected: 9,984 examples.*\n.*index\.kind=flat"):
        build_index(config, "trak")
    config = make_run(tmp_path, "other", kind="ivfpq", ivf_lists=16, pq_subquantizers=13)
    write_representers(config, clustered(10_000, 12))
    with pytest.raises(ConfigError, match=r"=13, and representers of 12 numbers\n.*\n.*to 12 or less"):
        build_index(config, "trak")


def test_index_on_a_url(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    config = config.model_copy(update={"run_dir": "memory://test_index"})
    rows, queries = draw(50, 1, 8), draw(2, 1, 8, seed=1).reshape(2, 8)
    write_representers(config, rows)
    build_index(config, "trak")
    _, found = open_index(config, "trak").search(queries, 1)
    np.testing.assert_array_equal(found[:, 0], (queries @ rows.reshape(50, 8).T).argmax(1))
    assert build_index(config, "trak").is_reused


@pytest.mark.parametrize(("codes", "on_gpu"), [(8, True), (10, False)])
def test_codes_that_faiss_knows_on_no_gpu_are_searched_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: int, on_gpu: bool
) -> None:
    def clone(index: Any, options: Any) -> Any:
        if taken:
            raise RuntimeError("StandardGpuResources: alloc fail type FlatData (cudaMalloc error out of memory [2])")
        taken.append(index)
        return index

    taken: list[Any] = []
    config = make_run(tmp_path, **APPROXIMATE["ivfpq"] | {"pq_subquantizers": codes})
    write_both(config, clustered(10_000, 16))
    build_index(config, "trak")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", clone, raising=False)
    open_index(config, "trak").search(clustered(8, 16).reshape(8, -1), 10)
    assert bool(taken) == on_gpu
    if on_gpu:
        with pytest.raises(DeviceMemoryError, match=r"the index of 10,000 rows does not fit[\s\S]*scan or hnsw"):
            open_index(config, "trak")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_gpu_search_equals_cpu_search(tmp_path: Path, kind: str) -> None:
    assert faiss.get_num_gpus() > 0
    config = make_run(tmp_path, **APPROXIMATE.get(kind, {}))
    rows, queries = clustered(10_000, 16), clustered(8, 16).reshape(8, -1)
    write_both(config, rows)
    build_index(config, "trak")
    index = open_index(config, "trak")
    on_gpu = index.search(queries, 10)
    index._gpu_index = None
    on_cpu = index.search(queries, 10)
    np.testing.assert_array_equal(on_gpu[1], on_cpu[1])
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=1e-4)


def test_missing_faiss_names_the_extras() -> None:
    code = "import sys; sys.modules['faiss'] = None; import llmattrib.index"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: faiss is not installed" in ended.stderr
    assert "extra `cpu` or `gpu`" in ended.stderr
