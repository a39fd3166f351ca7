"""The growing table: what is written comes back, growing in steps gives the same bytes, damage is found and named."""

import fsspec
import numpy as np
import pytest
from records import record
from test_build import contents

from llmattrib.errors import (
    CorruptShardError,
    DiskSpaceError,
    FingerprintMismatchError,
    StoreError,
    StoreNotFoundError,
)
from llmattrib.rng import stream
from llmattrib.table import TableManifest, TableStore

COLUMNS = {"mask": ("uint8", (3,)), "p": ("float64", ()), "number": ("int64", ()), "values": ("float64", (2,))}


def manifest(**changes):
    return TableManifest(**{"columns": COLUMNS, "shard_size": 4, "fingerprint": {"game": {"seed": 1}}, **changes})


def shard_data(shard, size=4):
    draws = stream(0, "table test", shard)
    return {
        "mask": draws.integers(0, 256, (size, 3), dtype=np.uint8),
        "p": draws.random(size),
        "number": draws.integers(0, 2**60, size),
        "values": draws.standard_normal((size, 2)),
    }


def fill(table):
    for shard in table.pending():
        table.write_shard(shard, shard_data(shard))


@pytest.fixture(params=["local", "object store"])
def path(request, tmp_path):
    if request.param == "object store":
        url = f"memory://{tmp_path.name}/table.zarr"
        yield url
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    else:
        yield str(tmp_path / "table.zarr")


def test_what_is_written_comes_back_to_the_bit(path):
    table = TableStore.create(path, manifest())
    assert table.read()[0] == []
    table.extend({"kind": "a"}, 3)
    fill(table)
    shards, columns = TableStore.open(path).read()
    assert shards == [0, 1, 2]
    for name in COLUMNS:
        expected = np.concatenate([shard_data(shard)[name] for shard in range(3)])
        np.testing.assert_array_equal(columns[name], expected)
        assert columns[name].dtype == expected.dtype


def test_rows_of_zeros_are_on_disk(tmp_path):
    table = TableStore.create(str(tmp_path), manifest())
    table.extend({}, 1)
    zeros = {name: np.zeros_like(array) for name, array in shard_data(0).items()}
    table.write_shard(0, zeros)
    assert (tmp_path / "mask/c.0.0").is_file()
    np.testing.assert_array_equal(table.read()[1]["mask"], zeros["mask"])


def test_growing_in_steps_with_reopening_gives_the_bytes_of_one_run(tmp_path):
    whole = TableStore.create(str(tmp_path / "whole"), manifest())
    whole.extend({"kind": "a"}, 4)
    fill(whole)
    for step in (1, 2, 1):
        table = TableStore.create(str(tmp_path / "steps"), manifest())
        table.extend({"kind": "a"}, step)
        fill(table)
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


def test_what_a_killed_writer_left_is_written_again(tmp_path):
    tables = [TableStore.create(str(tmp_path / name), manifest()) for name in ("whole", "broken")]
    for table in tables:
        table.extend({}, 3)
        fill(table)
    broken = tmp_path / "broken"
    record(broken, 1).unlink()
    (broken / "mask/c.1.0").write_bytes(b"half")
    (broken / "commits/.0.partial").write_bytes(b"{")
    resumed = TableStore.create(str(broken), manifest())
    assert resumed.pending() == [1]
    assert resumed.read()[0] == [0, 2]
    fill(resumed)
    assert contents(broken) == contents(tmp_path / "whole")


def test_segments_number_their_shards_across_interruptions(path):
    table = TableStore.create(path, manifest())
    for kind, count in (("a", 2), ("b", 1), ("a", 2), ("b", 1), ("a", 1)):
        table.extend({"kind": kind}, count)
    found = [(segment["kind"], number) for segment, number in map(table.segment, range(7))]
    assert found == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 3), ("b", 1), ("a", 4)]
    with pytest.raises(StoreError, match="no shard 7"):
        table.segment(7)


@pytest.mark.parametrize("damage", ["flip", "missing", "checksum"])
def test_damage_is_named(tmp_path, damage):
    table = TableStore.create(str(tmp_path), manifest())
    table.extend({}, 2)
    fill(table)
    chunk, of_shard = tmp_path / "mask/c.1.0", record(tmp_path, 1)
    if damage == "flip":
        data = bytearray(chunk.read_bytes())
        data[0] ^= 1
        chunk.write_bytes(data)
    elif damage == "missing":
        chunk.unlink()
    else:
        of_shard.rename(of_shard.with_name(of_shard.name[:-4] + "0000"))
    with pytest.raises(CorruptShardError, match=r"shard 1 of .* (cannot be decoded|does not match)"):
        table.read()


def test_other_settings_are_refused(path):
    TableStore.create(path, manifest())
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint.game.seed: stored 1, now 2"):
        TableStore.create(path, manifest(fingerprint={"game": {"seed": 2}}))
    with pytest.raises(FingerprintMismatchError, match="shard_size"):
        TableStore.create(path, manifest(shard_size=8))


def test_another_schema_is_refused(tmp_path):
    TableStore.create(str(tmp_path), manifest())
    group = tmp_path / "zarr.json"
    group.write_text(group.read_text().replace('"schema": 2', '"schema": 0'))
    with pytest.raises(FingerprintMismatchError, match="schema: stored 0, now 2"):
        TableStore.open(str(tmp_path))


def test_an_absent_table_is_named(path):
    with pytest.raises(StoreNotFoundError, match=r"no table at .*\n.*\n.*TableStore.create"):
        TableStore.open(path)
    TableStore.create(path, manifest())


def test_shards_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    table = TableStore.create(str(tmp_path), manifest())
    table.extend({}, 2)
    good = shard_data(0)
    with pytest.raises(StoreError, match="got columns"):
        table.write_shard(0, {**good, "p": good["p"].astype(np.float32)})
    with pytest.raises(StoreError, match="got columns"):
        table.write_shard(0, {name: array for name, array in good.items() if name != "p"})
    bad = good["values"].copy()
    bad[2, 1] = np.nan
    with pytest.raises(StoreError, match=r"values .* is not finite in row 6"):
        table.write_shard(1, {**good, "values": bad})
    table.write_shard(0, good)
    for shard in (0, 2):
        with pytest.raises(StoreError, match="committed already or not planned"):
            table.write_shard(shard, good)
    reader = TableStore.open(str(tmp_path))
    with pytest.raises(StoreError, match="opened for reading"):
        reader.write_shard(1, good)
    with pytest.raises(StoreError, match="opened for reading"):
        reader.extend({}, 1)
    with pytest.raises(DiskSpaceError, match="needs"):
        table.extend({}, 10**15)
