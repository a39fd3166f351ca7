"""The row store: n rows of c outputs by p dimensions in Zarr v3, written shard by shard, resumable, checksummed.

    features.zarr/
      zarr.json            group; its attributes hold the manifest
      rows/                [n, c, p] float16 or float32: one file a shard, inner chunks of at most 64 rows, crc32c
      columns/             [n, 1 + k] float32: the row's scale, then the scalar columns; one file a shard, crc32c
      vectors/<name>/      [c, p] float32, written whole
      commits/<shard>.json {"shard", "rows", "checksum"}: the shard is finished

A shard is a fixed run of rows with one writer, so rows need no lock. Its record is created, in one step, after its
data is on disk: what has no record is not there, and is written again. Neither time, host nor rank is stored, so the
bytes depend on the rows alone. Stored values are `row / scale` with a power of two as the scale, so float16 costs
2^-11 of an entry or 2^-38 of the row's largest, whichever is more, and a row read and written again is the same.
Nothing is compressed: zstd saves 8 % of a float16 sketch, or 15 % at 0.1 GB/s.

Rows are added at the end alone (`extend`): full shards stay as they are, a last one that was not full is written again.

Limits: random access reads an inner chunk (about 64 rows). To open a store reads its manifest and one listing of
commits/. This module alone imports zarr. Source: Zarr v3 core specification, sharding_indexed and crc32c codecs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Float
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, LocalStore

from llmattrib import storage
from llmattrib.commits import Problem, commit, committed, record_path, vouches
from llmattrib.errors import (
    CorruptShardError,
    FingerprintMismatchError,
    IncompleteStoreError,
    StoreAccessError,
    StoreError,
    StoreNotFoundError,
)
from llmattrib.manifest import SCALE, SCHEMA, Manifest, differing
from llmattrib.quantize import quantize

__all__ = ["Manifest", "RowStore", "quantize"]

_KEY = "llmattrib"
_REOPENED = "reopened"  # in `info`, while a store is extended: the shard whose commit record no longer counts
Shape = tuple[int, ...]
REMAKE = "delete the store and run the stage that made it again"


def _zarr_store(path: str, read_only: bool) -> LocalStore | FsspecStore:
    local = storage.local_path(path)
    return LocalStore(local, read_only=read_only) if local else FsspecStore.from_url(path, read_only=read_only)


def open_group(path: str, mode: Literal["r", "r+", "a"]) -> zarr.Group:
    """Open a group; naming the format and refusing consolidated metadata saves the look-ups of older layouts."""
    return zarr.open_group(_zarr_store(path, mode == "r"), mode=mode, zarr_format=3, use_consolidated=False)


def read_attributes(path: str) -> dict[str, Any] | None:
    """Return the attributes of the group at `path`, or None when there is no group."""
    try:
        return dict(json.loads(storage.read_bytes(f"{path}/zarr.json")).get("attributes", {}))
    except storage.ABSENT:
        return None
    except ValueError as error:
        raise StoreError(f"{path}/zarr.json is not JSON", fix=REMAKE) from error


class RowStore:
    """Features or representers on disk. Make one by `create` (to write) or `open` (to read)."""

    def __init__(self, path: str, manifest: Manifest, read_only: bool) -> None:
        self.path, self.manifest, self._read_only = path, manifest, read_only
        self._committed: set[int] = set()
        self._group = open_group(path, "r" if read_only else "r+")
        self._rows, self._columns = self._array("rows"), self._array("columns")
        self.refresh()

    @classmethod
    def create(cls, path: str, manifest: Manifest) -> "RowStore":
        """Make the store, or resume the one that is there (its `info` is kept); by one process, before others open it.

        Args:
            path: local path or fsspec URL.
            manifest: what the store is to hold.

        Raises:
            FingerprintMismatchError: a store with other settings is there; names the differing keys.
            DiskSpaceError: the rows that are missing would not fit.
            StoreError: something else is at `path`, or it cannot be written.
        """
        path = path.rstrip("/")
        attributes = read_attributes(path)
        if attributes is None or _KEY not in attributes:
            if storage.exists(f"{path}/rows/c"):
                found = f"{path} holds Zarr data without a manifest"
                raise StoreError(found, expected="nothing, or a store", fix="move it away or name another run_dir")
            storage.require_space(path, manifest.num_bytes)
            with storage.named_errors(path):
                _make(path, manifest)
        store = cls.open(path, read_only=False)
        keys = differing(store.manifest.compared(), manifest.compared())
        if keys:
            raise FingerprintMismatchError(path, keys)
        store._settle()
        for folder in ("", "/rows", "/columns", "/commits", "/vectors"):
            storage.remove_partial(path + folder)
        storage.require_space(path, len(store.pending()) * manifest.num_bytes // store.num_shards)
        return store

    @classmethod
    def open(cls, path: str, *, made_by: str = "llmattrib build", read_only: bool = True) -> "RowStore":
        """Open a store that is there, complete or not.

        Args:
            path: local path or fsspec URL.
            made_by: the command that makes such a store, for the message when it is absent.
            read_only: refuse writes; ranks that write shards pass False.

        Raises:
            StoreNotFoundError: there is none.
            FingerprintMismatchError: it is of another schema.
        """
        path = path.rstrip("/")
        attributes = read_attributes(path)
        stored = attributes.get(_KEY) if attributes is not None else None
        if stored is None:
            found = f"there is no store at {path}"
            raise StoreNotFoundError(found, expected="a finished earlier stage", fix=f"run `{made_by}` first")
        if stored.get("schema") != SCHEMA:
            raise FingerprintMismatchError(path, {"schema": (stored.get("schema"), SCHEMA)})
        with storage.named_errors(path):
            return cls(path, Manifest.from_json(stored), read_only)

    def extend(self, manifest: Manifest) -> None:
        """Plan more rows at the end, by one process; a crash in the middle leaves the old plan or the new one.

        Args:
            manifest: of more rows than are there, the first of them the same; its `info` replaces the stored one.

        Raises:
            DiskSpaceError: they would not fit.
            StoreError: the path cannot be written.
        """
        self._settle()
        old = self.manifest
        assert manifest.num_rows > old.num_rows
        storage.require_space(self.path, manifest.num_bytes - old.num_bytes)
        last, num_over = divmod(old.num_rows, old.shard_size)
        reopened = {_REOPENED: last} if num_over else {}
        self._resize(manifest.num_rows)  # first: a reader goes by the manifest, and may find arrays that are longer
        self._save(dataclasses.replace(manifest, info={**manifest.info, **reopened}))
        self._settle()

    def _settle(self) -> None:
        """End what a killed `extend` left."""
        self._resize(self.manifest.num_rows)
        info = dict(self.manifest.info)
        if _REOPENED in info:
            storage.remove(record_path(self.path, info.pop(_REOPENED)))
            self._save(dataclasses.replace(self.manifest, info=info))

    def _resize(self, num_rows: int) -> None:
        with storage.named_errors(self.path):
            for array in (self._rows, self._columns):
                if array.shape[0] != num_rows:
                    array.resize((num_rows, *array.shape[1:]))

    def _save(self, manifest: Manifest) -> None:
        with storage.named_errors(self.path):
            self._group.attrs.update({_KEY: manifest.to_json()})
        self.manifest = manifest

    def _array(self, name: str) -> zarr.Array[Any]:
        try:
            array = self._group[name]
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{self.path} has no {name} that can be read", fix=REMAKE) from error
        assert isinstance(array, zarr.Array)
        return array.with_config({"write_empty_chunks": True})

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-self.manifest.num_rows // self.manifest.shard_size)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        start = shard * self.manifest.shard_size
        return start, min(start + self.manifest.shard_size, self.manifest.num_rows)

    def refresh(self) -> None:
        """List the commit records again: one listing, no file is read."""
        self._committed = {*committed(self.path)} - {self.manifest.info.get(_REOPENED)}

    def pending(self) -> list[int]:
        """Return the shards without a commit record, in order, as of now."""
        self.refresh()
        return [shard for shard in range(self.num_shards) if shard not in self._committed]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self._committed) == self.num_shards or not self.pending()

    def require_complete(self, made_by: str = "llmattrib build") -> None:
        """Raise unless every shard is committed.

        Raises:
            IncompleteStoreError: says how many of how many are missing.
        """
        if not self.is_complete:
            missing = self.pending()
            raise IncompleteStoreError(
                f"{self.path} lacks {len(missing)} of {self.num_shards} shards (first: {missing[0]})",
                expected="a complete store",
                fix=f"run `{made_by}` again: it computes only what is missing",
            )

    def write_shard(
        self, shard: int, rows: Float[np.ndarray, "m c p"], scalars: Mapping[str, Float[np.ndarray, " m"]]
    ) -> None:
        """Write one shard and commit it. What an earlier, killed writer left of it is removed first.

        Args:
            shard: its number.
            rows: its rows, float32, finite.
            scalars: one float32 value a row for every column of the manifest.

        Raises:
            StoreError: rows are not finite, shapes or columns do not fit, the shard is committed already, or the
                path cannot be written.
            DiskSpaceError: the disk is full; nothing is committed.
        """
        self._check_writable(shard)
        start, stop = self.shard_range(shard)
        self.manifest.check_rows(self.path, start, stop, rows, scalars)
        stored, scale = quantize(rows, self.manifest.dtype)
        columns = np.stack([scale, *(scalars[name] for name in self.manifest.columns)], axis=1).astype("<f4")
        files = f"{self.path}/rows/c/{shard}", f"{self.path}/columns/c/{shard}"
        for folder in files:
            storage.remove(folder)
        with storage.named_errors(self.path):
            self._rows[start:stop] = stored
            self._columns[start:stop] = columns
        storage.sync_file(f"{files[0]}/0/0")
        storage.sync_file(f"{files[1]}/0")
        commit(self.path, shard, stored, columns)
        self._committed.add(shard)

    def _check_writable(self, shard: int) -> None:
        if self._read_only:
            raise StoreError(f"{self.path} was opened for reading", fix="open it with read_only=False")
        if shard in self._committed:
            raise StoreError(f"shard {shard} of {self.path} is committed already", expected="a pending shard")

    def _corrupt(self, shard: int, what: str) -> CorruptShardError:
        return CorruptShardError(
            f"shard {shard} of {self.path} (rows {'-'.join(map(str, self.shard_range(shard)))}) {what}",
            expected="the data its commit record vouches for",
            fix=f"delete {record_path(self.path, shard)} and run its stage again: only this shard is computed",
        )

    def _decode(self, array: zarr.Array[Any], shard: int, start: int, stop: int) -> np.ndarray:
        """Read rows of one shard as stored; zarr checks the crc32c of every inner chunk."""
        try:
            with storage.named_errors(self.path):
                part = np.asarray(array[start:stop])
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise self._corrupt(shard, f"cannot be decoded ({array.basename}: {error})") from error
        if np.isnan(part.reshape(len(part), -1)[:, 0]).any():  # the fill value: no finite row holds it
            raise self._corrupt(shard, f"has no data on disk ({array.basename})")
        return part

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Split rows [start, stop) at shard boundaries into committed (shard, start, stop)."""
        assert 0 <= start <= stop <= self.manifest.num_rows
        while start < stop:
            shard = start // self.manifest.shard_size
            if shard not in self._committed and shard in self.pending():
                raise self._corrupt(shard, "is not committed")
            end = min(stop, self.shard_range(shard)[1])
            yield shard, start, end
            start = end

    def read(self, start: int, stop: int) -> Float[np.ndarray, "m c p"]:
        """Return rows [start, stop) as float32.

        Raises:
            CorruptShardError: a shard is not committed, is missing or fails its crc32c.
        """
        out = np.empty((stop - start, self.manifest.num_outputs, self.manifest.dim), np.float32)
        for shard, first, last in self._pieces(start, stop):
            part = out[first - start : last - start]
            part[:] = self._decode(self._rows, shard, first, last)
            if self.manifest.dtype == "float16":
                part *= self._decode(self._columns, shard, first, last)[:, :1, None]
        return out

    def blocks(self, shards: Sequence[int] | None = None) -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        """Yield (first row, rows) of some shards, by default of all in order.

        The next shard is read in the background while the caller works on this one: two are in memory.
        """
        ranges = [self.shard_range(shard) for shard in (range(self.num_shards) if shards is None else shards)]
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self.read, *ranges[0]) if ranges else None
            for place, (start, _) in enumerate(ranges, start=1):
                assert following is not None
                block = following.result()
                following = reader.submit(self.read, *ranges[place]) if place < len(ranges) else None
                yield start, block

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " m"]:
        """Return one of `columns`."""
        return self.columns((name,), start, stop)[:, 0]

    def columns(self, names: Sequence[str], start: int = 0, stop: int | None = None) -> Float[np.ndarray, "m k"]:
        """Return scalar columns, of which `scale` is one, of rows [start, stop), by default of all.

        Raises:
            StoreError: there is no such column.
            CorruptShardError: a shard is not committed, is missing or fails its crc32c.
        """
        known = (SCALE, *self.manifest.columns)
        if missing := sorted({*names} - {*known}):
            raise StoreError(f"{self.path} has no column {missing[0]!r}", expected=f"one of {', '.join(known)}")
        pieces = list(self._pieces(start, self.manifest.num_rows if stop is None else stop))
        try:  # all files at once; one by one only to find the bad one
            with storage.named_errors(self.path):
                whole = np.asarray(self._columns[start:stop])
        except ValueError:
            whole = np.full((1, len(known)), np.nan, np.float32)
        if np.isnan(whole[:, 0]).any():
            whole = np.concatenate([self._decode(self._columns, *piece) for piece in pieces])
        return whole[:, [known.index(name) for name in names]]

    def write_vector(self, name: str, vector: Float[np.ndarray, "c p"]) -> None:
        """Write a float32 array that belongs to the whole store, in one file; a vector of that name is replaced.

        Raises:
            StoreError: it is not finite, or the path cannot be written.
        """
        if not np.isfinite(vector).all():
            raise StoreError(f"vector {name!r} of {self.path} is not finite", expected="finite numbers")
        with storage.named_errors(self.path):
            array = make_array(self.path, f"vectors/{name}", vector.shape, vector.shape, "float32")
            array[...] = vector.astype("<f4")

    def read_vector(self, name: str) -> Float[np.ndarray, "c p"]:
        """Read a vector.

        Raises:
            StoreError: there is none of that name.
            CorruptShardError: it fails its crc32c or was not written to its end.
        """
        try:
            with storage.named_errors(self.path):
                vector = np.asarray(self._array(f"vectors/{name}")[...])
        except ValueError as error:
            raise CorruptShardError(
                f"vector {name!r} of {self.path} cannot be decoded ({error})", fix=REMAKE
            ) from error
        if np.isnan(vector).any():
            raise CorruptShardError(f"vector {name!r} of {self.path} was not written to its end", fix=REMAKE)
        return vector

    def update_info(self, info: Mapping[str, Any]) -> None:
        """Add keys to the manifest's `info`, in one atomic write; by one process."""
        self._save(dataclasses.replace(self.manifest, info={**self.manifest.info, **info}))

    def _records(self) -> dict[int, bytes]:
        self.refresh()
        names = {shard: f"{shard:06d}.json" for shard in sorted(self._committed)}
        with storage.named_errors(self.path):
            return dict(zip(names, storage.read_folder(f"{self.path}/commits", [*names.values()]), strict=True))

    def digest(self) -> str:
        """Return a hash of the settings and of all committed data, from the commit records alone."""
        settings = json.dumps(self.manifest.compared(), sort_keys=True).encode()
        return hashlib.sha256(settings + b"".join(self._records().values())).hexdigest()[:32]

    def verify(self) -> list[Problem]:
        """Read everything, compare it with the checksums of the commit records, and look for rows not finite.

        Raises `StoreAccessError` where something cannot be read: it may be sound.
        """
        records = self._records()
        problems = [Problem(shard, "is not committed") for shard in range(self.num_shards) if shard not in records]
        for shard, data in records.items():
            problems += [Problem(shard, what) for what in self._verify_shard(shard, data)]
        for name in sorted({*storage.list_names(f"{self.path}/vectors")} - {"zarr.json"}):
            try:
                self.read_vector(name)
            except StoreAccessError:
                raise
            except StoreError as error:
                problems.append(Problem(-1, error.found))
        return sorted(problems)

    def _verify_shard(self, shard: int, data: bytes) -> Sequence[str]:
        if shard >= self.num_shards:
            return ["has a commit record but lies beyond the last shard"]
        start, stop = self.shard_range(shard)
        try:
            rows = self._decode(self._rows, shard, start, stop)
            columns = self._decode(self._columns, shard, start, stop)
            if not vouches(data, shard, rows, columns):
                return ["does not match the checksum of its commit record"]
        except ValueError:
            return ["has a commit record that is not JSON"]
        except CorruptShardError as error:
            return [error.found]
        finite = np.isfinite(rows).all(axis=(1, 2)) & np.isfinite(columns[:, 0])
        return [] if finite.all() else [f"holds row {start + int(np.argmin(finite))}, which is not finite"]


def make_array(
    path: str, name: str, shape: Shape, chunks: Shape, dtype: str, shards: Shape | None = None
) -> zarr.Array[Any]:
    """Make an empty array, in place of one that is there; floats start as NaN, which marks what was never written."""
    return zarr.create_array(
        _zarr_store(path, read_only=False),
        name=name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=[Crc32cCodec()],
        fill_value=float("nan") if np.dtype(dtype).kind == "f" else 0,
        overwrite=True,
        config={"write_empty_chunks": True},
    )


def _make(path: str, manifest: Manifest) -> None:
    """Lay out an empty store; the manifest comes last, so a killed creation is no store."""
    n, size, width = manifest.num_rows, manifest.shard_size, 1 + len(manifest.columns)
    inner = manifest.num_outputs, manifest.dim
    group = open_group(path, "a")
    make_array(path, "rows", (n, *inner), (manifest.chunk_rows, *inner), manifest.dtype, (size, *inner))
    make_array(path, "columns", (n, width), (size, width), "float32")
    group.attrs.update({_KEY: manifest.to_json()})
