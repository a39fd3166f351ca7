"""Commit records of a local store, for tests that remove or damage them."""

from pathlib import Path


def record(store, shard):
    """The one record of a shard."""
    (path,) = Path(store, "commits").glob(f"{shard:06d}-*")
    return path


def recorded(store):
    """The shards that have a record."""
    return {int(path.name.partition("-")[0]) for path in Path(store, "commits").glob("[0-9]*-*")}
