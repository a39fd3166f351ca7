"""Shard files are byte for byte those that zarr writes, and what zarr writes is read."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from llmattrib import storage
from llmattrib.errors import StoreAccessError
from llmattrib.rng import stream
from llmattrib.shards import ShardLayout

FILLS = {"float16": math.nan, "float32": math.nan, "int8": -128}
SHAPES = [((2, 5), 6, 6), ((1, 3), 6, 2), ((3,), 5, None), ((1, 1), 1, 1), ((2, 7), 8, 4)]
CASES = [(*shape, dtype) for shape, dtype in itertools.product(SHAPES, FILLS)]


def layout_of(shape, shard_rows, chunk_rows, dtype):
    return ShardLayout(shape, np.dtype(dtype).newbyteorder("<"), shard_rows, chunk_rows, FILLS[dtype])


def written_by_zarr(folder, of, rows):
    """Rows written a shard at a time; the array's folder."""
    array = zarr.create_array(
        folder,
        name="rows",
        shape=rows.shape,
        dtype=of.dtype.name,
        chunks=(of.chunk_rows or of.shard_rows, *of.shape),
        shards=(of.shard_rows, *of.shape) if of.chunk_rows else None,
        compressors=[Crc32cCodec()],
        fill_value=of.fill,
        config={"write_empty_chunks": True},
    )
    for start in range(0, len(rows), of.shard_rows):
        array[start : start + of.shard_rows] = rows[start : start + of.shard_rows]
    return Path(folder, "rows/c")


@pytest.mark.parametrize(("shape", "shard_rows", "chunk_rows", "dtype"), CASES)
@pytest.mark.parametrize("num_rows", [1, 5, 6, 11])
def test_bytes_are_those_of_zarr_and_are_read_back(tmp_path, shape, shard_rows, chunk_rows, dtype, num_rows):
    of = layout_of(shape, shard_rows, chunk_rows, dtype)
    rows = (30 * stream(0, "shards").standard_normal((num_rows, *shape))).astype(of.dtype)
    folder = written_by_zarr(str(tmp_path), of, rows)
    for shard, start in enumerate(range(0, num_rows, shard_rows)):
        part = rows[start : start + shard_rows]
        file = Path(folder, "/".join([str(shard), *("0" for _ in shape)]))
        assert b"".join(of.encode(part)) == file.read_bytes()
        data = np.fromfile(file, np.uint8)
        np.testing.assert_array_equal(np.concatenate(list(of.decode(data, 0, len(part), True))), part)
        for first in range(len(part)):
            begin, end = of.span(first, len(part))
            back = np.concatenate(list(of.decode(data[begin:end], first, len(part), False)))
            np.testing.assert_array_equal(back, part[first:])


def test_every_flipped_byte_and_every_cut_of_a_file_is_found():
    of = layout_of((1, 3), 6, 2, "float16")
    data = np.concatenate(of.encode(np.ones((3, 1, 3), np.float16)))
    assert len(list(of.decode(data, 0, 3, True))) == 2
    for place in range(len(data)):
        hurt = data.copy()
        hurt[place] ^= 1
        with pytest.raises(ValueError, match="crc32c"):
            list(of.decode(hurt, 0, 3, True))
        with pytest.raises(ValueError, match=r"crc32c|cut off|do not fit"):
            list(of.decode(data[:place], 0, 3, True))
    with pytest.raises(ValueError, match="do not fit"):
        list(of.decode(np.concatenate([data, data]), 0, 3, True))
    plain = layout_of((3,), 5, None, "float32")
    with pytest.raises(ValueError, match="bytes where 64 belong"):
        list(plain.decode(np.concatenate([*plain.encode(np.ones((5, 3), np.float32))] * 2), 0, 5, True))


def test_chunks_that_are_left_out_are_missed():
    of = layout_of((1, 3), 6, 2, "float16")
    data = np.concatenate(of.encode(np.ones((2, 1, 3), np.float16)))
    with pytest.raises(ValueError, match="do not fit the index"):
        list(of.decode(data, 0, 4, True))


def test_a_file_is_read_piece_by_piece_as_the_array_of_its_bytes_is(tmp_path):
    path, data = tmp_path / "file", stream(0, "bytes").integers(0, 256, 100).astype(np.uint8)
    data.tofile(path)
    for start, stop in ((0, None), (10, 60), (10, 1000), (100, None), (200, 300)):
        expected = data[start:stop]
        with storage.open_bytes(str(path), start, stop) as found:
            assert len(found) == len(expected)
            for first, last in ((0, 5), (5, 5), (3, 1000), (50, 2), (-8, None), (None, None)):
                np.testing.assert_array_equal(found[first:last], expected[first:last])
    with storage.open_bytes(str(path)) as found:
        path.write_bytes(data[:40].tobytes())  # cut off while it is open
        np.testing.assert_array_equal(found[30:50], data[30:40])
    with pytest.raises(FileNotFoundError), storage.open_bytes(str(tmp_path / "none")):
        pass
    with pytest.raises(StoreAccessError, match="could not be read"), storage.open_bytes(str(tmp_path)):
        pass
