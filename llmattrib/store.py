"""The row store: n rows of c outputs by p dimensions in Zarr v3, written shard by shard, resumable, checksummed.

    features.zarr/
      zarr.json            group; its attributes hold the manifest
      rows/c.<shard>.0.0   [n, c, p] of the manifest's dtype: one file a shard, inner chunks of at most 64 rows, crc32c
      columns/c.<shard>.0  [n, 1 + k] float32: the row's scale, then the scalar columns; one file a shard, crc32c
      vectors/<name>/      [c, p] float32, written whole
      commits/<shard>-<checksum>  empty: the shard is finished

A shard is a fixed run of rows with one writer, so rows need no lock. Its record is created, in one step, after its
data is on disk: what has no record is not there, and is written again. Neither time, host nor rank is stored, so the
bytes depend on the rows alone. Stored values of int8 and float16 are `row / scale` (`quantize.py`); a row read and
written again is the same. Nothing is compressed: zstd saves a tenth or less of a sketch.

Rows are added at the end alone (`extend`): full shards stay as they are, a last one that was not full is written again.

Limits: random access reads an inner chunk (about 64 rows). To open a store, and its digest, read its manifest and one
listing of commits/. Shards are made and read by `shards.py`, all else by zarr (`groups.py`).
Source: Zarr v3 core specification, sharding_indexed and crc32c codecs.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from llmattrib import storage
from llmattrib.commits import Problem, checksum, commit, committed, record_path
from llmattrib.errors import (
    CorruptShardError,
    FingerprintMismatchError,
    IncompleteStoreError,
    StoreAccessError,
    StoreError,
    StoreNotFoundError,
)
from llmattrib.groups import REMAKE, Array, make_array, open_array, open_group, read_attributes, shard_file
from llmattrib.manifest import SCALE, SCHEMA, Manifest, differing
from llmattrib.quantize import dequantize, quantize

__all__ = ["Manifest", "RowStore", "quantize"]

_KEY = "llmattrib"
_REOPENED = "reopened"  # in `info`, while a store is extended: the shard whose commit record no longer counts


class RowStore:
    """Features or representers on disk. Make one by `create` (to write) or `open` (to read)."""

    def __init__(self, path: str, manifest: Manifest, read_only: bool) -> None:
        self.path, self.manifest, self._read_only = path, manifest, read_only
        self._committed: dict[int, str] = {}
        self._layouts = {"rows": manifest.rows_layout, "columns": manifest.columns_layout}
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
            shard = info.pop(_REOPENED)
            if checksum := committed(self.path).get(shard):
                storage.remove(record_path(self.path, shard, checksum))
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

    def _array(self, name: str) -> Array:
        return open_array(self._group, self.path, name)

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
        self._committed = committed(self.path)
        self._committed.pop(self.manifest.info.get(_REOPENED, -1), None)

    def record(self, shard: int) -> str | None:
        """Return the path of the commit record of a shard, None when it had none at the last listing."""
        checksum = self._committed.get(shard)
        return None if checksum is None else record_path(self.path, shard, checksum)

    def pending(self) -> list[int]:
        """Return the shards without a commit record, in order, as of now."""
        self.refresh()
        return [shard for shard in range(self.num_shards) if shard not in self._committed]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return self._committed.keys() >= {*range(self.num_shards)} or not self.pending()

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
        if not (finite := np.isfinite(scale)).all():
            row = start + int(np.argmin(finite))
            raise StoreError(f"row {row} of {self.path} is not finite", expected="finite numbers")
        columns = np.stack([scale, *(scalars[name] for name in self.manifest.columns)], axis=1).astype("<f4")
        parts = {"rows": stored, "columns": columns}
        storage.write_files({self._file(name, shard): self._layouts[name].encode(part) for name, part in parts.items()})
        self._committed[shard] = commit(self.path, shard, stored, columns)

    def _check_writable(self, shard: int) -> None:
        if self._read_only:
            raise StoreError(f"{self.path} was opened for reading", fix="open it with read_only=False")
        if shard in self._committed:
            raise StoreError(f"shard {shard} of {self.path} is committed already", expected="a pending shard")

    def _corrupt(self, shard: int, what: str) -> CorruptShardError:
        record = self.record(shard)
        return CorruptShardError(
            f"shard {shard} of {self.path} (rows {'-'.join(map(str, self.shard_range(shard)))}) {what}",
            expected="the data its commit record vouches for",
            fix=f"{f'delete {record} and ' if record else ''}run its stage again: only this shard is computed",
        )

    def _file(self, name: str, shard: int) -> str:
        return shard_file(f"{self.path}/{name}", shard, 1 + len(self._layouts[name].shape))

    def _parts(
        self, name: str, shard: int, start: int, stop: int, data: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yield rows [start, stop) of one shard as stored, a chunk at a time; the crc32c of every one is checked.

        `data` is the file where it was read already.
        """
        layout, (begin, end) = self._layouts[name], self.shard_range(shard)
        is_file = data is not None or (start == begin and stop == end)
        span = (0, None) if is_file else layout.span(start - begin, stop - begin)
        source = storage.open_bytes(self._file(name, shard), *span) if data is None else contextlib.nullcontext(data)
        try:
            with source as content:
                yield from layout.decode(content, start - begin, stop - begin, is_file)
        except storage.ABSENT as error:
            raise self._corrupt(shard, f"has no data on disk ({name})") from error
        except ValueError as error:
            raise self._corrupt(shard, f"cannot be decoded ({name}: {error})") from error

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
            place, scale = first - start, None
            if self.manifest.dtype != "float32":
                scale = np.concatenate([part[:, :1, None] for part in self._parts("columns", shard, first, last)])
            for part in self._parts("rows", shard, first, last):
                of_rows = None if scale is None else scale[place + start - first :][: len(part)]
                dequantize(part, of_rows, out[place : place + len(part)])
                place += len(part)
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
        stop = self.manifest.num_rows if stop is None else stop
        pieces = list(self._pieces(start, stop))
        try:
            files = storage.fetch([self._file("columns", shard) for shard, _, _ in pieces])
        except storage.ABSENT:
            files = [None] * len(pieces)  # one at a time: the missing one is named
        parts = [
            part for piece, file in zip(pieces, files, strict=True) for part in self._parts("columns", *piece, file)
        ]
        whole = np.concatenate([np.empty((0, len(known)), np.float32), *parts])
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

    def digest(self) -> str:
        """Return a hash of the settings and of all committed data, from the names of the commit records alone."""
        self.refresh()
        tree = {**self.manifest.compared(), "checksums": self._committed}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]

    def verify(self) -> list[Problem]:
        """Read everything, compare it with the checksums of the commit records, and look for rows not finite.

        Raises `StoreAccessError` where something cannot be read: it may be sound.
        """
        self.refresh()
        records = self._committed
        problems = [Problem(shard, "is not committed") for shard in range(self.num_shards) if shard not in records]
        for shard in records:
            problems += [Problem(shard, what) for what in self._verify_shard(shard)]
        for name in sorted({*storage.list_names(f"{self.path}/vectors")} - {"zarr.json"}):
            try:
                self.read_vector(name)
            except StoreAccessError:
                raise
            except StoreError as error:
                problems.append(Problem(-1, error.found))
        return sorted(problems)

    def _verify_shard(self, shard: int) -> Sequence[str]:
        if shard >= self.num_shards:
            return ["has a commit record but lies beyond the last shard"]
        start, stop = self.shard_range(shard)
        try:
            rows, columns = (list(self._parts(name, shard, start, stop)) for name in ("rows", "columns"))
        except CorruptShardError as error:
            return [error.found]
        if checksum(*rows, *columns) != self._committed[shard]:
            return ["does not match the checksum of its commit record"]
        finite = np.isfinite(np.concatenate(rows)).all(axis=(1, 2)) & np.isfinite(columns[0][:, 0])
        return [] if finite.all() else [f"holds row {start + int(np.argmin(finite))}, which is not finite"]


def _make(path: str, manifest: Manifest) -> None:
    """Lay out an empty store; the manifest comes last, so a killed creation is no store."""
    group = open_group(path, "a")
    for name, of in (("rows", manifest.rows_layout), ("columns", manifest.columns_layout)):
        shape = manifest.num_rows, *of.shape
        shard, chunk = (of.shard_rows, *of.shape), (of.chunk_rows or of.shard_rows, *of.shape)
        make_array(path, name, shape, chunk, of.dtype.name, shard if of.chunk_rows else None, of.fill)
    group.attrs.update({_KEY: manifest.to_json()})
