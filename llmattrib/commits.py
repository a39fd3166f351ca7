"""Commit records: what says that a shard of a store is finished, for every kind of store.

    commits/<shard>.json {"shard", "rows", "checksum"}

A record is created in one step after the data of its shard is on disk, and holds nothing of time, host or rank. The
module knows nothing of what a shard holds.
"""

import hashlib
import json
import re
from typing import NamedTuple

import numpy as np

from llmattrib import storage

_RECORD = re.compile(r"(\d+)\.json")  # other files that find their way into a folder are passed over


class Problem(NamedTuple):
    """One finding of `verify` of a store; `shard` is -1 for what belongs to no shard."""

    shard: int
    what: str


def checksum(*arrays: np.ndarray) -> str:
    """blake2b of the decoded bytes of a shard: its arrays as stored, one after another."""
    hasher = hashlib.blake2b(digest_size=32)
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def record_path(path: str, shard: int) -> str:
    """Return the commit record of a shard of the store at `path`; without it the shard is pending."""
    return f"{path}/commits/{shard:06d}.json"


def commit(path: str, shard: int, *arrays: np.ndarray) -> None:
    """Create the commit record of a shard whose data is on disk.

    Args:
        path: the store.
        shard: its number.
        arrays: what it holds, as stored; all of one length.

    Raises:
        DiskSpaceError, StoreError: the record cannot be written.
    """
    record = {"shard": shard, "rows": len(arrays[0]), "checksum": checksum(*arrays)}
    storage.atomic_write(record_path(path, shard), json.dumps(record).encode() + b"\n")


def vouches(data: bytes, shard: int, *arrays: np.ndarray) -> bool:
    """Say whether a commit record is of these arrays.

    Raises:
        ValueError: it is not JSON.
    """
    return bool(json.loads(data) == {"shard": shard, "rows": len(arrays[0]), "checksum": checksum(*arrays)})


def committed(path: str) -> list[int]:
    """Return the shards of the store at `path` that have a record, in order: one listing, no file is read."""
    names = storage.list_names(f"{path}/commits")
    return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))
