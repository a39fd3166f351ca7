"""Commit records: what says that a shard of a store is finished, for every kind of store.

    commits/<shard>-<checksum>      an empty file

A record is created in one step after the data of its shard is on disk, and holds nothing of time, host or rank. All is
in its name, so one listing says which shards are finished and what they hold. The module knows nothing of what a shard
holds.
"""

import re
from typing import NamedTuple

import numpy as np
import xxhash

from llmattrib import storage

_RECORD = re.compile(r"(\d+)-([0-9a-f]{32})")  # other files that find their way into a folder are passed over


class Problem(NamedTuple):
    """One finding of `verify` of a store; `shard` is -1 for what belongs to no shard."""

    shard: int
    what: str


def checksum(*arrays: np.ndarray) -> str:
    """XXH3 (128 bits) of the decoded bytes of a shard: its arrays as stored, one after another.

    It tells damage and other data, not an attacker. blake2b takes as long as all else of a write.
    """
    hasher = xxhash.xxh3_128()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def record_path(path: str, shard: int, checksum: str) -> str:
    """Return the commit record of a shard of the store at `path`; without one the shard is pending."""
    return f"{path}/commits/{shard:06d}-{checksum}"


def commit(path: str, shard: int, *arrays: np.ndarray) -> str:
    """Create the commit record of a shard whose data is on disk, and return its checksum.

    The record itself is not forced to disk: a power cut may take those of the last seconds, whose shards are then
    computed again to the same bytes.

    Args:
        path: the store.
        shard: its number.
        arrays: what it holds, as stored; all of one length.

    Raises:
        DiskSpaceError, StoreError: the record cannot be written.
    """
    found = checksum(*arrays)
    storage.create_empty(record_path(path, shard, found))
    return found


def committed(path: str) -> dict[int, str]:
    """Return the checksums of the shards of the store at `path` that have a record, in order: one listing."""
    names = storage.list_names(f"{path}/commits")
    found = {int(match[1]): match[2] for name in names if (match := _RECORD.fullmatch(name))}
    return dict(sorted(found.items()))
