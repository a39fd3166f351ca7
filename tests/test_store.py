"""The row store: what is written comes back, a broken run ends as an unbroken one, and damage is found and named."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from records import record
from test_build import contents

from llmattrib.commits import Problem, record_path
from llmattrib.errors import (
    CorruptShardError,
    DiskSpaceError,
    FingerprintMismatchError,
    IncompleteStoreError,
    StoreError,
    StoreLockedError,
    StoreNotFoundError,
)
from llmattrib.lock import locked
from llmattrib.manifest import Manifest, differing
from llmattrib.quantize import dequantize, quantize
from llmattrib.rng import stream
from llmattrib.storage import atomic_write, require_space
from llmattrib.store import RowStore

DTYPES = ["int8", "float16", "float32"]


def manifest(**changes):
    settings = {
        "kind": "features",
        "num_rows": 22,
        "num_outputs": 2,
        "dim": 5,
        "dtype": "float16",
        "shard_size": 6,
        "columns": ("norm", "loss"),
        "fingerprint": {"model": "m", "sketch": {"kind": "oporp", "dim": 5}},
        "info": {"note": "kept"},
    }
    return Manifest(**{**settings, **changes})


def data(of):
    """Rows of very different sizes, one of zeros, and their columns."""
    draw = stream(0, "store test")
    rows = draw.standard_normal((of.num_rows, of.num_outputs, of.dim))
    rows *= 10.0 ** draw.integers(-12, 12, (of.num_rows, 1, 1))
    rows[3] = 0
    columns = {name: draw.standard_normal(of.num_rows).astype(np.float32) for name in of.columns}
    return rows.astype(np.float32), columns


def fill(store, shards=None):
    rows, columns = data(store.manifest)
    for shard in store.pending() if shards is None else shards:
        part = slice(*store.shard_range(shard))
        store.write_shard(shard, rows[part], {name: values[part] for name, values in columns.items()})
    return store


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "features.zarr")


@pytest.fixture(params=["local", "file URL", "object store"])
def any_path(request, tmp_path):
    if request.param == "object store":
        url = f"memory://{tmp_path.name}/features.zarr"
        yield url
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    else:
        yield ("file://" if request.param == "file URL" else "") + str(tmp_path / "features.zarr")


# ---------------------------------------------------------------------------------------------------- values


def bounds(rows, dtype):
    """The most that an entry may be off."""
    largest = np.abs(rows).max(axis=(1, 2), keepdims=True)
    return {
        "int8": np.broadcast_to(largest / 254 * (1 + 2.0**-15), rows.shape),
        "float16": np.maximum(np.abs(rows) * 2.0**-11, largest * 2.0**-38),
        "float32": 0 * rows,
    }[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", [1, 6, 22, 64, 100, 130])
def test_rows_come_back(any_path, dtype, shard_size):
    store = fill(RowStore.create(any_path, manifest(dtype=dtype, shard_size=shard_size)))
    rows, columns = data(store.manifest)
    read = RowStore.open(any_path)
    assert read.is_complete
    assert read.manifest == store.manifest
    bound = bounds(rows, dtype)
    for start, stop in [(0, 22), (0, 1), (5, 7), (3, 19), (21, 22), (8, 8)]:
        back = read.read(start, stop)
        assert back.dtype == np.float32
        assert (np.abs(back - rows[start:stop]) <= bound[start:stop]).all()
    for name, values in columns.items():
        np.testing.assert_array_equal(read.column(name), values)
    assert read.verify() == []


def test_blocks_cover_all_rows_once_in_order(path):
    store = fill(RowStore.create(path, manifest()))
    blocks = list(store.blocks())
    assert [start for start, _ in blocks] == [0, 6, 12, 18]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), store.read(0, 22))


def test_blocks_of_some_shards_read_no_other(path):
    store = fill(RowStore.create(path, manifest()), [1, 3])
    blocks = list(store.blocks([3, 1]))
    assert [start for start, _ in blocks] == [18, 6]
    np.testing.assert_array_equal(blocks[0][1], store.read(18, 22))
    assert list(store.blocks([])) == []
    np.testing.assert_array_equal(store.column("norm", 7, 12), np.asarray(store._columns)[7:12, 1])


def test_one_shard_is_read_ahead(path, monkeypatch):
    store = fill(RowStore.create(path, manifest()))
    asked, is_read, read = [], threading.Event(), RowStore.read

    def reading(self, start, stop):
        asked.append(start)
        rows = read(self, start, stop)
        if start == 6:
            is_read.set()
        return rows

    monkeypatch.setattr(RowStore, "read", reading)
    blocks = store.blocks()
    assert next(blocks)[0] == 0
    assert is_read.wait(10), "while the caller has the first"
    time.sleep(0.05)
    assert asked == [0, 6]
    blocks.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_read_and_written_again_are_the_same_bytes(tmp_path, dtype):
    first = fill(RowStore.create(str(tmp_path / "a"), manifest(dtype=dtype)))
    second = RowStore.create(str(tmp_path / "b"), manifest(dtype=dtype))
    for shard in range(first.num_shards):
        part = slice(*first.shard_range(shard))
        columns = {name: first.column(name)[part] for name in ("norm", "loss")}
        second.write_shard(shard, first.read(part.start, part.stop), columns)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_float16_scale_is_the_power_of_two_that_fills_the_range():
    tops = np.array([1.0, 0.5, 3e38, 1.5e-30, 2.0**-126, 2.0**14, 0.0, 0.7], np.float32)
    rows = np.stack([-tops, tops / 3], axis=1)[:, None]
    stored, scale = quantize(rows, "float16")
    assert stored.dtype == np.float16
    mantissa, _ = np.frexp(scale)
    assert (mantissa == 0.5).all()
    top = np.abs(stored.astype(np.float32)).max(axis=(1, 2))
    normal = [0, 1, 2, 3, 5, 7]
    assert ((top[normal] > 2**13) & (top[normal] <= 2**14)).all()
    assert top[0] == 2**14
    assert (scale[6], top[6]) == (1, 0)
    np.testing.assert_allclose(stored * scale[:, None, None], rows, rtol=2**-10)


def test_int8_scale_fills_the_range_and_codes_times_scales_are_exact():
    top, small = float(np.finfo(np.float32).max), 2.0**-126
    draw = stream(0, "int8")
    tops = np.array([1.0, 127.0, 0.7, top, top * (1 - 2.0**-18), 3e38, 1e-30, 127 * small, 0.0], np.float32)
    rows = (tops[:, None, None] * draw.uniform(-1, 1, (len(tops), 2, 50))).astype(np.float32)
    rows[:, 1, 7] = -tops
    stored, scale = quantize(rows, "int8")
    assert stored.dtype == np.int8
    assert (np.abs(stored.astype(int)).max(axis=(1, 2))[:-1] == 127).all()
    assert (scale[-1], np.abs(stored[-1]).max()) == (1, 0)
    assert scale[1] == 1
    back = stored * scale[:, None, None]
    assert back.dtype == np.float32
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back, stored * scale.astype(np.float64)[:, None, None])
    error = np.abs(back.astype(np.float64) - rows)
    assert (error <= tops.astype(np.float64)[:, None, None] / 254 * (1 + 2.0**-15)).all()
    assert error[0].max() > 1 / 255, "no finer than int8"
    again, of_again = quantize(back, "int8")
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_array_equal(of_again, scale)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_rows_below_the_smallest_scale_lose_digits_and_no_more(dtype):
    rows = np.array([2.0**-126, -(2.0**-130), 2.0**-149, 0], np.float32).reshape(1, 1, 4)
    stored, scale = quantize(rows, dtype)
    assert scale[0] == np.float32(2.0**-126)
    unit = 1 if dtype == "int8" else 2.0**-24
    assert (np.abs(stored.astype(np.float64) * 2.0**-126 - rows) <= unit / 2 * 2.0**-126).all()
    again, of_again = quantize((stored * scale[:, None, None]).astype(np.float32), dtype)
    np.testing.assert_array_equal(again, stored)
    assert of_again == scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_scale_of_a_row_that_is_not_finite_is_none(dtype, bad):
    rows = np.ones((70, 2, 3), np.float32)
    rows[66, 1, 2] = bad
    scale = quantize(rows, dtype)[1]
    assert np.isnan(scale).nonzero()[0].tolist() == [66]


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_quantize_works_in_blocks_as_in_one_piece(dtype):
    rows = stream(0, "long").standard_normal((200, 1, 3)).astype(np.float32)
    whole, scale = quantize(rows, dtype)
    for row in range(200):
        one, of_one = quantize(rows[row : row + 1], dtype)
        assert (whole[row] == one[0]).all()
        assert scale[row] == of_one[0]


def test_columns_hold_infinity_and_zero_width(path):
    store = RowStore.create(path, manifest(num_rows=2, shard_size=2, columns=("log_odds",)))
    store.write_shard(0, np.ones((2, 2, 5), np.float32), {"log_odds": np.array([np.inf, np.nan], np.float32)})
    np.testing.assert_array_equal(store.column("log_odds"), [np.inf, np.nan])
    with pytest.raises(StoreError, match="has no column 'loss'"):
        store.column("loss")


# ------------------------------------------------------------------------------------------------ layout on disk


def test_one_file_a_shard_and_one_record(path):
    fill(RowStore.create(path, manifest(num_rows=300, shard_size=128)))
    arrays = [f"{name}/zarr.json" for name in ("rows", "columns")]
    shards = [f"rows/c.{k}.0.0" for k in range(3)] + [f"columns/c.{k}.0" for k in range(3)]
    records = [f"commits/{record(path, k).name}" for k in range(3)]
    assert sorted(contents(path)) == sorted(["zarr.json", *arrays, *shards, *records])
    assert [Path(path, name).stat().st_size for name in records] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_reads_it_without_us(path, dtype):
    store = fill(RowStore.create(path, manifest(num_rows=300, shard_size=192, dtype=dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="r")
    rows, columns = group["rows"], group["columns"]
    assert rows.shards == (192, 2, 5)
    assert rows.chunks == (64, 2, 5)
    sharding = rows.metadata.to_dict()["codecs"][0]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    back = rows[:].astype(np.float32) * columns[:, 0][:, None, None]
    np.testing.assert_array_equal(back, store.read(0, 300))
    assert group.attrs["llmattrib"]["fingerprint"] == store.manifest.fingerprint


@pytest.mark.parametrize(("shard_size", "chunk"), [(1, 1), (10, 10), (64, 64), (256, 64), (100, 50), (67, 1)])
def test_inner_chunks_fill_a_shard_evenly(path, shard_size, chunk):
    RowStore.create(path, manifest(num_rows=3, shard_size=shard_size))
    assert zarr.open_array(path, path="rows", mode="r").chunks[0] == chunk


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_write_the_same_bytes_in_any_order(tmp_path, dtype):
    fill(RowStore.create(str(tmp_path / "a"), manifest(dtype=dtype)))
    fill(RowStore.create(str(tmp_path / "b"), manifest(dtype=dtype)), [2, 0, 3, 1])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_opening_reads_the_manifest_and_one_listing(path, monkeypatch):
    fill(RowStore.create(path, manifest(num_rows=300, shard_size=3)))
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kw: opened.append(self.name) or real(self, *args, **kw))
    assert RowStore.open(path).is_complete
    assert set(opened) <= {"zarr.json"}


# -------------------------------------------------------------------------------------------------- commit, resume


def test_uncommitted_rows_are_not_there(path):
    store = fill(RowStore.create(path, manifest()), [0, 2])
    assert store.pending() == [1, 3]
    assert not store.is_complete
    with pytest.raises(IncompleteStoreError, match=r"lacks 2 of 4 shards \(first: 1\)[\s\S]*run `llmattrib build`"):
        store.require_complete()
    with pytest.raises(CorruptShardError, match=r"shard 1 of .* \(rows 6-12\) is not committed"):
        store.read(0, 8)
    blocks = store.blocks()
    assert next(blocks)[0] == 0
    with pytest.raises(CorruptShardError, match=r"shard 1 of .* is not committed"):
        next(blocks)
    store.read(12, 18)
    fill(RowStore.create(path, manifest()))
    store.require_complete()
    assert store.read(0, 22).shape == (22, 2, 5)


def test_a_record_beyond_the_last_shard_does_not_stand_for_a_missing_one(path):
    fill(RowStore.create(path, manifest()), [0, 1, 2])
    Path(record_path(path, 7, "0" * 32)).touch()
    store = RowStore.open(path)
    assert not store.is_complete
    with pytest.raises(IncompleteStoreError, match=r"lacks 1 of 4 shards \(first: 3\)"):
        store.require_complete()


def test_data_without_a_record_is_written_again(tmp_path):
    broken = fill(RowStore.create(str(tmp_path / "broken"), manifest()))
    for shard, damage in [(1, b""), (3, b"half of a shard")]:
        Path(broken.path, f"rows/c.{shard}.0.0").write_bytes(damage)
        Path(broken.path, f"columns/c.{shard}.0").write_bytes(damage)
        record(broken.path, shard).unlink()
    for left in ("rows/c.1.0.0.1f.partial", "columns/c.3.0.2f.partial", "zarr.3f.partial", "commits/.x.partial"):
        Path(broken.path, left).write_bytes(b"left by a killed writer")
    resumed = RowStore.create(broken.path, manifest(info={"note": "another"}))
    assert resumed.manifest.info == {"note": "kept"}
    assert resumed.pending() == [1, 3]
    fill(resumed)
    fill(RowStore.create(str(tmp_path / "whole"), manifest()))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


KILLED = """
import io, os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import zarr.storage._local as local
from test_store import RowStore, fill, manifest
calls = 0
def dying(owner, name, real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, call)
for name in ("replace", "rename", "fsync", "link", "open"):
    dying(os, name, getattr(os, name))
dying(io, "open", io.open)
fill(RowStore.create({path!r}, manifest()))
"""


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 15, 17, 21, 26, 34, 42, 50, 58])
def test_killed_at_any_step_the_rerun_is_the_unbroken_run(tmp_path, step):
    fill(RowStore.create(str(tmp_path / "whole"), manifest()))
    broken = str(tmp_path / "broken")
    root = Path(__file__).parents[1]
    script = KILLED.format(tests=str(root / "tests"), root=str(root), step=step, path=broken)
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -9
    fill(RowStore.create(broken, manifest()))
    assert contents(broken) == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ manifest


def test_a_mismatch_lists_the_differing_keys(path):
    RowStore.create(path, manifest())
    other = manifest(num_rows=23, fingerprint={"model": "m", "sketch": {"kind": "none", "dim": 5}, "seed": 1})
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint.sketch.kind: stored 'oporp', now 'none'") as error:
        RowStore.create(path, other)
    assert error.value.differing == {
        "num_rows": (22, 23),
        "fingerprint.seed": (None, 1),
        "fingerprint.sketch.kind": ("oporp", "none"),
    }


def test_another_schema_is_a_mismatch(path):
    RowStore.create(path, manifest())
    file = Path(path, "zarr.json")
    file.write_text(file.read_text().replace('"schema": 2', '"schema": 99'))
    with pytest.raises(FingerprintMismatchError, match="schema: stored 99, now 2"):
        RowStore.open(path)


def test_differing_is_empty_for_equal_trees():
    assert differing(manifest().to_json(), manifest().to_json()) == {}


def test_digest_follows_data_and_settings(tmp_path):
    digests = set()
    for number, of in enumerate([manifest(), manifest(), manifest(num_rows=21), manifest(fingerprint={"model": "n"})]):
        store = RowStore.create(str(tmp_path / str(number)), of)
        digests.add(store.digest())
        digests.add(fill(store).digest())
    assert len(digests) == 6


# ------------------------------------------------------------------------------------------------ damage


def flip(file, offset):
    raw = bytearray(Path(file).read_bytes())
    raw[offset] ^= 0x10
    Path(file).write_bytes(bytes(raw))


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("offset", [0, 7, -3, -30])
@pytest.mark.parametrize("array", ["rows/c.1.0.0", "columns/c.1.0"])
def test_a_flipped_bit_is_found_and_named(path, array, offset, dtype):
    store = fill(RowStore.create(path, manifest(dtype=dtype)))
    flip(Path(path, array), offset)
    with pytest.raises(CorruptShardError, match=r"shard 1 of .* cannot be decoded[\s\S]*delete .*commits/000001-"):
        store.read(6, 12)
    store.read(0, 6)
    assert [problem.shard for problem in store.verify()] == [1]
    if array.startswith("columns"):
        with pytest.raises(CorruptShardError, match="shard 1 of"):
            store.column("loss")


@pytest.mark.parametrize("array", ["rows/c.1.0.0", "columns/c.1.0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_or_cut_file_is_found_and_named(path, array, dtype):
    store = fill(RowStore.create(path, manifest(dtype=dtype)))
    file = Path(path, array)
    file.write_bytes(file.read_bytes()[:-9])
    assert [problem.shard for problem in store.verify()] == [1]
    file.unlink()
    assert [problem.shard for problem in store.verify()] == [1]
    if array.startswith("rows"):
        with pytest.raises(CorruptShardError, match=r"shard 1 of .* has no data on disk \(rows\)"):
            store.read(0, 22)
    else:
        with pytest.raises(CorruptShardError, match=r"shard 1 of .* has no data on disk \(columns\)"):
            store.column("norm")


def test_repair_as_the_message_says(tmp_path):
    fill(RowStore.create(str(tmp_path / "whole"), manifest()))
    store = fill(RowStore.create(str(tmp_path / "hurt"), manifest()))
    flip(Path(store.path, "rows/c.2.0.0"), 5)
    record(store.path, 2).unlink()
    fill(RowStore.create(store.path, manifest()), [2])
    assert contents(store.path) == contents(tmp_path / "whole")


def test_verify_finds_what_the_crc_cannot(path):
    store = fill(RowStore.create(path, manifest(num_rows=18)))
    assert store.verify() == []
    rows = [Path(path, f"rows/c.{shard}.0.0") for shard in (0, 1)]
    rows[0].write_bytes(rows[1].read_bytes())  # a valid shard, of other rows
    record(path, 1).rename(record_path(path, 1, "0" * 32))
    record(path, 2).unlink()
    Path(record_path(path, 7, "0" * 32)).touch()
    assert store.verify() == [
        Problem(0, "does not match the checksum of its commit record"),
        Problem(1, "does not match the checksum of its commit record"),
        Problem(2, "is not committed"),
        Problem(7, "has a commit record but lies beyond the last shard"),
    ]


# ------------------------------------------------------------------------------------------------ vectors


def test_vectors_come_back_and_can_be_replaced(any_path):
    store = fill(RowStore.create(any_path, manifest()))
    for factor in (1, 2):
        mean = factor * stream(0, "mean").standard_normal((2, 5)).astype(np.float32)
        store.write_vector("mean", mean)
        np.testing.assert_array_equal(RowStore.open(any_path).read_vector("mean"), mean)
    with pytest.raises(StoreError, match="has no vectors/total"):
        store.read_vector("total")
    with pytest.raises(StoreError, match=r"vector 'total' of .* is not finite"):
        store.write_vector("total", np.full((2, 5), np.inf, np.float32))


def test_a_store_without_its_arrays_is_named(path):
    fill(RowStore.create(path, manifest()))
    Path(path, "rows/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"features.zarr has no rows[\s\S]*run the stage that made it again"):
        RowStore.open(path)
    for damage in ("{", '{"zarr_format": 3, "node_type": "array"}', '{"zarr_format": 3}'):
        Path(path, "rows/zarr.json").write_text(damage)
        with pytest.raises(StoreError, match=r"features.zarr has no rows that can be read"):
            RowStore.open(path)


def test_other_files_among_the_records_are_passed_over(path):
    store = fill(RowStore.create(path, manifest()), [0, 2])
    for name in ("._000001", "000001.json", "000001-", f"{'0' * 6}-{'g' * 32}", "notes.json", "x"):
        Path(path, "commits", name).write_text("?")
    assert store.pending() == [1, 3]
    assert {problem.what for problem in store.verify()} == {"is not committed"}


def test_a_damaged_vector_is_found(path):
    store = fill(RowStore.create(path, manifest()))
    store.write_vector("mean", np.ones((2, 5), np.float32))
    chunk = Path(path, "vectors/mean/c.0.0")
    flip(chunk, 3)
    with pytest.raises(CorruptShardError, match=r"vector 'mean' of .* cannot be decoded"):
        store.read_vector("mean")
    assert [problem.shard for problem in store.verify()] == [-1]
    chunk.unlink()
    with pytest.raises(CorruptShardError, match=r"vector 'mean' of .* was not written to its end"):
        store.read_vector("mean")


# ------------------------------------------------------------------------------------------------ refusals


def test_absent_store_names_the_stage_that_makes_it(path, tmp_path):
    with pytest.raises(
        StoreNotFoundError, match=r"there is no store at .*\n[\s\S]*run `llmattrib reduce C.yaml` first"
    ):
        RowStore.open(path, made_by="llmattrib reduce C.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotFoundError, match="there is no store"):
        RowStore.open(str(tmp_path / "file" / "below"))
    assert not Path(path).exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"could not be read or written[\s\S]*check the path, its permissions"):
        RowStore.create(str(tmp_path / "file" / "below"), manifest())
    with pytest.raises(StoreError, match="could not be read or written"):
        atomic_write("/proc/llmattrib/file", b"")
    with pytest.raises(StoreError, match="cannot be reached: Protocol not known: nosuch"):
        RowStore.create("nosuch://bucket/features.zarr", manifest())


def test_foreign_data_is_left_alone(path):
    zarr.create_array(path, name="rows", data=np.ones(3))
    with pytest.raises(StoreError, match="holds Zarr data without a manifest"):
        RowStore.create(path, manifest())
    assert zarr.open_array(path, path="rows", mode="r")[:].tolist() == [1, 1, 1]
    Path(path, "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"zarr.json is not JSON"):
        RowStore.open(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_fit_are_refused(path, dtype):
    store = RowStore.create(path, manifest(dtype=dtype))
    good = np.ones((6, 2, 5), np.float32)
    columns = {"norm": np.ones(6, np.float32), "loss": np.ones(6, np.float32)}
    with pytest.raises(StoreError, match=r"got rows float32\[5, 2, 5\][\s\S]*expected: float32\[6, 2, 5\]"):
        store.write_shard(0, good[:5], {name: values[:5] for name, values in columns.items()})
    with pytest.raises(StoreError, match=r"got rows float64\[6, 2, 5\]"):
        store.write_shard(0, good.astype(np.float64), columns)
    with pytest.raises(StoreError, match=r"got columns .*[\s\S]*expected: 6 values for each of \['norm', 'loss'\]"):
        store.write_shard(0, good, {"norm": columns["norm"]})
    bad = good.copy()
    bad[2, 1, 3] = np.nan
    with pytest.raises(StoreError, match=r"row 8 of .* is not finite"):
        store.write_shard(1, bad, columns)
    assert store.pending() == [0, 1, 2, 3]
    store.write_shard(0, good, columns)
    with pytest.raises(StoreError, match=r"shard 0 of .* is committed already"):
        store.write_shard(0, good, columns)
    with pytest.raises(StoreError, match="was opened for reading"):
        RowStore.open(path).write_shard(1, good, columns)


def test_disk_space_is_checked_before_the_first_row(path, tmp_path):
    with pytest.raises(
        DiskSpaceError, match=r"needs [\d,.]+ GB more and [\d,.]+ GB are free[\s\S]*features.sketch.dim"
    ):
        RowStore.create(path, manifest(num_rows=10**12, dim=10**6, shard_size=10**6))
    assert not Path(path).exists()
    require_space(f"memory://{tmp_path.name}", 10**30)


def test_a_full_disk_commits_nothing_and_a_rerun_goes_on(path):
    store = fill(RowStore.create(path, manifest(dim=4000)), [0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DiskSpaceError, match=r"could not be written[\s\S]*finished shards are kept"):
            fill(store, [1])
        with pytest.raises(DiskSpaceError, match="could not be written"):
            atomic_write(path + "/big", bytes(30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.pending() == [1, 2, 3]
    fill(RowStore.create(path, manifest(dim=4000)))
    assert store.verify() == []


# ------------------------------------------------------------------------------------------------ lock


def test_one_writer_at_a_time(any_path):
    with locked(any_path):
        with (
            pytest.raises(StoreLockedError, match=rf"is being written by process {os.getpid()} on .*"),
            locked(any_path),
        ):
            pass
        fill(RowStore.create(any_path, manifest()))
    with locked(any_path):
        pass
    assert fsspec.core.url_to_fs(any_path + ".lock")[0].exists(any_path + ".lock") is False


def test_a_lock_is_given_back_after_an_error(path):
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    assert not Path(path + ".lock").exists()


HOLD = "import sys; sys.path.insert(0, {root!r}); from llmattrib.lock import locked; import time\n" \
       "with locked({path!r}): print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def holder(path):
    script = HOLD.format(root=str(Path(__file__).parents[1]), path=path)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_of_a_live_process_holds_and_of_a_killed_one_does_not(path, holder):
    with pytest.raises(StoreLockedError, match=f"process {holder.pid} on .*[\\s\\S]*delete .*features.zarr.lock"):
        locked(path).__enter__()
    holder.kill()
    holder.wait()
    assert Path(path + ".lock").exists()
    with locked(path):
        pass
    assert not Path(path + ".lock").exists()


def test_a_terminated_process_gives_its_lock_back(path, holder):
    holder.terminate()
    assert holder.wait() == 143
    assert not Path(path + ".lock").exists()


def rewrite_owner(path, **changes):
    lock = Path(path + ".lock")
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))


def test_another_host_cannot_be_judged(path, holder):
    rewrite_owner(path, host="elsewhere")
    holder.kill()
    holder.wait()
    with pytest.raises(StoreLockedError, match=f"process {holder.pid} on elsewhere"):
        locked(path).__enter__()


def test_a_reused_pid_is_not_its_former_owner(path, holder):
    rewrite_owner(path, started="another boot:1")
    with locked(path):
        pass


def test_a_requeued_slurm_job_takes_over_its_own_lock(path, holder, monkeypatch):
    rewrite_owner(path, host="elsewhere", slurm_job="71", slurm_restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(StoreLockedError, match="on elsewhere"):
        locked(path).__enter__()
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    with locked(path):
        pass


def test_an_unreadable_lock_holds(path):
    Path(path + ".lock").write_text("?")
    with pytest.raises(StoreLockedError, match=r"by another process[\s\S]*delete"):
        locked(path).__enter__()


RACE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from llmattrib.lock import locked
def wait(name):
    while not Path({folder!r}, name).exists():
        time.sleep(0.001)
print("ready", flush=True)
wait("go")
with locked({path!r}):
    print("held", flush=True)
    wait("stop")
"""


def test_of_many_that_find_a_dead_holder_one_wins(path, tmp_path, holder):
    holder.kill()
    holder.wait()
    script = RACE.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path), path=path)
    command = [sys.executable, "-c", script]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(4)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
    (tmp_path / "go").touch()
    while sum(racer.poll() is not None for racer in racers) < 3:
        time.sleep(0.01)
    (tmp_path / "stop").touch()
    outputs = [racer.communicate()[0] for racer in racers]
    assert sorted(outputs) == ["", "", "", "held\n"]
    assert not Path(path + ".lock").exists()


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_torch_and_numpy_give_the_same_bytes(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every float16, of all numbers half way between two of them, and of their neighbours."""
    import torch  # noqa: F401

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = np.sort(halves[np.isfinite(halves)]).astype(np.float32)[:-1]
    between = (wide[:-1] + wide[1:]) / 2
    small = np.float32(2.0) ** np.arange(-140, -20, dtype=np.float32)
    values = np.concatenate([wide, between, np.nextafter(between, np.float32(9e9)), small, -small, 1.5 * small])
    rows = np.resize(values, (64, 1, len(values) // 64 + 1)) * np.float32(2) ** np.arange(-32, 32)[:, None, None]
    found = []
    for without in (False, True):
        with monkeypatch.context() as patch:
            if without:
                patch.delitem(sys.modules, "torch")
            stored, scale = quantize(rows.astype(np.float32), dtype)
            back = np.empty(rows.shape, np.float32)
            dequantize(stored, scale[:, None, None], back)
            found.append((stored.tobytes(), back.tobytes()))
    assert found[0] == found[1]


def test_rows_that_may_not_be_written_to_are_read(recwarn: pytest.WarningsRecorder) -> None:
    """Bytes of an object store."""
    stored, out = np.arange(8, dtype=np.float16).reshape(2, 1, 4), np.empty((2, 1, 4), np.float32)
    stored.flags.writeable = False
    dequantize(stored, np.full((2, 1, 1), 0.5, np.float32), out)
    np.testing.assert_array_equal(out, stored / 2)
    assert not recwarn.list
