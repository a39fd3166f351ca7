"""The file of one shard of an array as Zarr v3 lays it out, made and read here as zarr takes several times as long.

    with chunks   chunk, its crc32c; chunk, its crc32c; ...; index of (offset, length) a chunk, the index's crc32c
    without       the rows, their crc32c

Chunks are runs of rows, little endian, not compressed, so each lies where its number says; those wholly beyond the last
row are left out, and the last one is filled up. Tests hold the bytes equal to those that zarr writes.

Source: Zarr v3 core specification, sharding_indexed and crc32c codecs.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from jaxtyping import UInt8

_CRC_BYTES = 4
_INDEX_BYTES = 16
_ABSENT = np.iinfo(np.uint64).max


@runtime_checkable
class Bytes(Protocol):
    """An array of bytes, or what reads a slice when it is asked for one."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> UInt8[np.ndarray, " b"]: ...


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """How an array lies in the files of its shards.

    Attributes:
        shape: of one row.
        dtype: of the stored numbers.
        shard_rows: rows a shard.
        chunk_rows: rows of an inner chunk, a divisor of `shard_rows`; None where the shard is one chunk without index.
        fill: what rows beyond the last hold, and no row that was written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    shard_rows: int
    chunk_rows: int | None
    fill: float | int

    @property
    def _rows(self) -> int:
        return self.chunk_rows or self.shard_rows

    @property
    def _chunk_bytes(self) -> int:
        return self._rows * math.prod(self.shape) * self.dtype.itemsize

    def encode(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the parts of the file that holds `rows`, at most a shard of them, in the array's dtype."""
        parts = []
        for start in range(0, len(rows), self._rows):
            chunk = rows[start : start + self._rows]
            if len(chunk) < self._rows:
                chunk = np.concatenate([chunk, np.full((self._rows - len(chunk), *self.shape), self.fill, self.dtype)])
            parts.append(_bytes(chunk))
            parts.append(_crc(parts[-1]))
        if self.chunk_rows is not None:
            index = _bytes(self._index(-(-len(rows) // self._rows)))
            parts += [index, _crc(index)]
        return parts

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return which bytes of the file rows [first, last) of a shard lie in: those of their chunks."""
        stride = self._chunk_bytes + _CRC_BYTES
        return first // self._rows * stride, -(-last // self._rows) * stride

    def decode(self, data: Bytes, first: int, last: int, is_file: bool) -> Iterator[np.ndarray]:
        """Yield rows [first, last) a chunk at a time, each once its crc32c is checked.

        Args:
            data: the bytes of `span`, or of the whole file.
            first: first row, counted in the shard.
            last: the row after the last.
            is_file: whether `data` is the whole file, whose index is checked too; `first` is then 0.

        Raises:
            ValueError: the bytes do not fit, or fail a crc32c.
        """
        begin, end = first // self._rows, -(-last // self._rows)
        stride = self._chunk_bytes + _CRC_BYTES
        if is_file and self.chunk_rows is None and len(data) != stride:
            raise ValueError(f"{len(data)} bytes where {stride} belong")
        if is_file and self.chunk_rows is not None:
            self._check_index(data, end)
        for number in range(begin, end):
            start = number * self._rows
            place = (number - begin) * stride
            chunk = _checked(data[place : place + stride], stride, f"chunk {number}")
            rows = chunk.view(self.dtype).reshape(self._rows, *self.shape)
            yield rows[max(first - start, 0) : last - start]

    def _check_index(self, data: Bytes, needed: int) -> None:
        assert self.chunk_rows is not None
        count = self.shard_rows // self.chunk_rows
        size = count * _INDEX_BYTES + _CRC_BYTES
        index = _checked(data[-size:], size, "the index").view("<u8").reshape(count, 2)
        stride = self._chunk_bytes + _CRC_BYTES
        used = int((index[:, 0] != _ABSENT).sum())
        is_full = (index == self._index(used)).all() and len(data) == used * stride + size
        if used < needed or not is_full:
            raise ValueError(f"{len(data)} bytes do not fit the index")

    def _index(self, used: int) -> np.ndarray:
        assert self.chunk_rows is not None
        stride = self._chunk_bytes + _CRC_BYTES
        index = np.full((self.shard_rows // self.chunk_rows, 2), _ABSENT, "<u8")
        index[:used, 0], index[:used, 1] = np.arange(used) * stride, stride
        return index


def _bytes(array: np.ndarray) -> UInt8[np.ndarray, " b"]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _crc(data: np.ndarray) -> UInt8[np.ndarray, " 4"]:
    return np.array([crc32c(data.data)], "<u4").view(np.uint8)


def _checked(data: np.ndarray, size: int, what: str) -> UInt8[np.ndarray, " b"]:
    if len(data) != size:
        raise ValueError(f"{what} is cut off")
    if crc32c(data[:-_CRC_BYTES].data) != int(data[-_CRC_BYTES:].view("<u4")[0]):
        raise ValueError(f"{what} fails its crc32c")
    return data[:-_CRC_BYTES]
