"""A growing table in Zarr v3: named columns of any dtype, written in whole shards, resumable, checksummed.

    <name>.zarr/
      zarr.json            group; its attributes hold the manifest
      <column>/            [rows, *shape], one file a shard, crc32c
      commits/<shard>-<checksum>  empty: the shard is finished

The protocol is that of the row store (`store.py`): one writer a shard, data on disk before its record, nothing of time,
host or rank in the bytes. What differs: `extend` adds shards at any time, the columns are what the caller says, and
whole shards are read and compared with the checksum of their record each time. So the table can be read while it is
being filled: rows are those that are committed. Growing in one step or in several gives the same bytes.

Limits: reads are of everything that is committed; a shard is held in memory. One process creates and extends.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmattrib import storage
from llmattrib.commits import Problem, checksum, commit, committed, record_path
from llmattrib.errors import CorruptShardError, FingerprintMismatchError, StoreError, StoreNotFoundError
from llmattrib.groups import make_array, open_array, open_group, read_attributes, shard_file
from llmattrib.manifest import differing

SCHEMA = 2
SAME = "the same examples, prompts and settings: a table grows by subsets, not by examples"
"""What a table is refused without."""
_KEY = "llmattrib_table"


@dataclass(frozen=True)
class TableManifest:
    """What a table holds.

    Attributes:
        columns: name -> (dtype, shape of one row).
        shard_size: rows a shard.
        fingerprint: everything that changes the numbers, as JSON; tables with different ones never mix.
        segments: what the shards hold, in order, in runs of equal content: JSON with the key `shards`, their number.
    """

    columns: Mapping[str, tuple[str, tuple[int, ...]]]
    shard_size: int
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    segments: tuple[Mapping[str, Any], ...] = ()

    @property
    def num_shards(self) -> int:
        """Shards planned."""
        return sum(segment["shards"] for segment in self.segments)

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard on disk, without its checksums and record."""
        return self.shard_size * sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s in self.columns.values())

    def compared(self) -> dict[str, Any]:
        """Return what two tables must share to be one, as JSON."""
        columns = {name: [dtype, list(shape)] for name, (dtype, shape) in self.columns.items()}
        tree = {"columns": columns, "shard_size": self.shard_size, "fingerprint": self.fingerprint}
        return dict(json.loads(json.dumps({"schema": SCHEMA, **tree}, sort_keys=True)))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it is stored."""
        return {**self.compared(), "segments": list(self.segments)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "TableManifest":
        """Read back `to_json` of this schema."""
        columns = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tree["columns"].items()}
        return cls(columns, tree["shard_size"], tree["fingerprint"], tuple(tree["segments"]))


class TableStore:
    """A table on disk. Make one by `create` (to write) or `open` (to read)."""

    def __init__(self, path: str, manifest: TableManifest, read_only: bool) -> None:
        self.path, self.manifest, self._read_only = path, manifest, read_only
        self._group = open_group(path, "r" if read_only else "r+")

    @classmethod
    def create(cls, path: str, manifest: TableManifest) -> "TableStore":
        """Make the table, or go on with the one that is there; by one process.

        Args:
            path: local path or fsspec URL.
            manifest: what it is to hold; of a table that is there the stored segments are kept.

        Raises:
            FingerprintMismatchError: a table with other columns, shards or fingerprint is there.
            StoreError: the path cannot be written.
        """
        path = path.rstrip("/")
        if _KEY not in (read_attributes(path) or {}):
            with storage.named_errors(path):
                group = open_group(path, "a")
                for name, (dtype, shape) in manifest.columns.items():
                    make_array(path, name, (0, *shape), (manifest.shard_size, *shape), dtype)
                group.attrs.update({_KEY: manifest.to_json()})
        table = cls.open(path, read_only=False)
        keys = differing(table.manifest.compared(), manifest.compared())
        if keys:
            raise FingerprintMismatchError(path, keys, expected=SAME)
        for folder in ("", "/commits", *(f"/{name}" for name in manifest.columns)):
            storage.remove_partial(path + folder)
        return table

    @classmethod
    def open(cls, path: str, *, made_by: str = "TableStore.create", read_only: bool = True) -> "TableStore":
        """Open a table that is there, complete or not; what is planned later shows after opening it again.

        Args:
            path: local path or fsspec URL.
            made_by: what makes such a table, for the message when it is absent.
            read_only: refuse writes; ranks that write shards pass False.

        Raises:
            StoreNotFoundError: there is none.
            FingerprintMismatchError: it is of another schema.
        """
        path = path.rstrip("/")
        stored = (read_attributes(path) or {}).get(_KEY)
        if stored is None:
            found = f"there is no table at {path}"
            raise StoreNotFoundError(found, expected="a table of subsets and utilities", fix=f"make it with {made_by}")
        if stored.get("schema") != SCHEMA:
            raise FingerprintMismatchError(path, {"schema": (stored.get("schema"), SCHEMA)})
        with storage.named_errors(path):
            return cls(path, TableManifest.from_json(stored), read_only)

    def extend(self, content: Mapping[str, Any], num_shards: int) -> None:
        """Plan more shards; a crash in the middle leaves the plan as it was. By one process.

        Args:
            content: JSON that says what they hold; joined to the last segment when it is equal.
            num_shards: how many.

        Raises:
            StoreError: the table was opened for reading, or cannot be written.
            DiskSpaceError: they would not fit.
        """
        self._check_writable()
        assert num_shards > 0
        storage.require_space(self.path, num_shards * self.manifest.shard_bytes)
        kind = dict(json.loads(json.dumps(content, sort_keys=True)))
        segments = list(self.manifest.segments)
        if segments and {**kind, "shards": segments[-1]["shards"]} == segments[-1]:
            num_shards += segments.pop()["shards"]
        segments.append({**kind, "shards": num_shards})
        manifest = TableManifest(
            self.manifest.columns, self.manifest.shard_size, self.manifest.fingerprint, tuple(segments)
        )
        rows = manifest.num_shards * manifest.shard_size
        with storage.named_errors(self.path):
            for name, (_, shape) in manifest.columns.items():
                open_array(self._group, self.path, name).resize((rows, *shape))
            self._group.attrs.update({_KEY: manifest.to_json()})
        self.manifest = manifest

    def record(self, shard: int) -> str | None:
        """Return the path of the commit record of a shard, None when it has none as of now."""
        found = committed(self.path).get(shard)
        return None if found is None else record_path(self.path, shard, found)

    def pending(self) -> list[int]:
        """Return the planned shards that are not finished, in order, as of now."""
        done = committed(self.path)
        return [shard for shard in range(self.manifest.num_shards) if shard not in done]

    def segment(self, shard: int) -> tuple[Mapping[str, Any], int]:
        """Return the segment of a shard and the shard's number among those of equal content."""
        start = 0
        kinds: dict[str, int] = {}
        for segment in self.manifest.segments:
            kind = json.dumps({**segment, "shards": 0}, sort_keys=True)
            if shard < start + segment["shards"]:
                return segment, kinds.get(kind, 0) + shard - start
            start += segment["shards"]
            kinds[kind] = kinds.get(kind, 0) + segment["shards"]
        raise StoreError(f"{self.path} has no shard {shard}", expected=f"a number below {start}", fix="extend it first")

    def write_shard(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write one shard and commit it. What an earlier, killed writer left of it is replaced.

        Args:
            shard: its number.
            columns: one array of `shard_size` rows for every column, of its dtype; floats finite.

        Raises:
            StoreError: columns do not fit or are not finite, the shard is committed or not planned, or the path
                cannot be written.
            DiskSpaceError: the disk is full; nothing is committed.
        """
        self._check_writable()
        if shard not in self.pending():
            found = f"shard {shard} of {self.path} is committed already or not planned"
            raise StoreError(found, expected="a pending shard", fix="extend the table first")
        size = self.manifest.shard_size
        wanted = {name: (np.dtype(d), (size, *shape)) for name, (d, shape) in self.manifest.columns.items()}
        given = {name: (array.dtype, array.shape) for name, array in columns.items()}
        if given != wanted:
            raise StoreError(f"shard {shard} of {self.path} got columns {given}", expected=f"{wanted}")
        for name, array in columns.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                row = int(np.argmin(np.isfinite(array.reshape(size, -1)).all(axis=1)))
                found = f"column {name} of {self.path} is not finite in row {shard * size + row}"
                raise StoreError(found, expected="finite numbers")
        for name, (_, shape) in wanted.items():
            file = shard_file(f"{self.path}/{name}", shard, len(shape))
            storage.remove(file)
            with storage.named_errors(self.path):
                open_array(self._group, self.path, name)[shard * size : (shard + 1) * size] = columns[name]
            storage.sync_file(file)
        commit(self.path, shard, *(columns[name] for name in wanted))

    def read(self) -> tuple[list[int], dict[str, np.ndarray]]:
        """Return the committed shards and all columns of their rows.

        Raises:
            CorruptShardError: a shard is missing, fails its crc32c or the checksum of its record.
        """
        shards = committed(self.path)
        parts = [self._read_shard(shard, found) for shard, found in shards.items()]
        empty = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in self.manifest.columns.items()}
        return list(shards), {
            name: np.concatenate([none, *(part[name] for part in parts)]) for name, none in empty.items()
        }

    def _read_shard(self, shard: int, found: str) -> dict[str, np.ndarray]:
        size = self.manifest.shard_size
        rows = slice(shard * size, (shard + 1) * size)
        try:
            with storage.named_errors(self.path):
                columns = {
                    name: np.asarray(open_array(self._group, self.path, name)[rows]) for name in self.manifest.columns
                }
        except ValueError as error:
            raise self._corrupt(shard, f"cannot be decoded ({error})") from error
        if checksum(*columns.values()) != found:
            raise self._corrupt(shard, "does not match the checksum of its commit record")
        return columns

    def verify(self) -> list[Problem]:
        """Read everything, compare it with the checksums of the commit records, and look for numbers not finite."""
        problems = [Problem(shard, "is not committed") for shard in self.pending()]
        for shard, found in committed(self.path).items():
            if shard >= self.manifest.num_shards:
                problems.append(Problem(shard, "has a commit record but lies beyond the last shard"))
                continue
            try:
                columns = self._read_shard(shard, found)
            except CorruptShardError as error:
                problems.append(Problem(shard, error.found))
                continue
            floats = {name: array for name, array in columns.items() if array.dtype.kind == "f"}
            bad = [name for name, array in floats.items() if not np.isfinite(array).all()]
            problems += [Problem(shard, f"holds numbers in column {name} that are not finite") for name in bad]
        return sorted(problems)

    def _corrupt(self, shard: int, what: str) -> CorruptShardError:
        record = self.record(shard)
        return CorruptShardError(
            f"shard {shard} of {self.path} {what}",
            expected="the data its commit record vouches for",
            fix=f"{f'delete {record} and ' if record else ''}fill the table again: only this shard is computed",
        )

    def _check_writable(self) -> None:
        if self._read_only:
            raise StoreError(f"{self.path} was opened for reading", fix="open it with read_only=False")
