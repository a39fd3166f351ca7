"""Groups and arrays of Zarr v3 at a path that is local or an fsspec URL: laid out, opened, resized. Alone imports zarr.

Source: Zarr v3 core specification.
"""

import json
from typing import Any, Literal, TypeAlias

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, LocalStore

from llmattrib import storage
from llmattrib.errors import StoreError

Shape = tuple[int, ...]
Array: TypeAlias = zarr.Array[Any]
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


def open_array(group: zarr.Group, path: str, name: str) -> Array:
    """Return an array of the group at `path`; rows of zeros are written like others.

    Raises:
        StoreError: there is none, or its metadata is damaged.
    """
    try:
        array = group[name]
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{path} has no {name} that can be read", fix=REMAKE) from error
    assert isinstance(array, zarr.Array)
    return array.with_config({"write_empty_chunks": True})


def shard_file(array: str, shard: int, num_axes: int) -> str:
    """Return the file of a shard of an array that is cut along its first axis alone."""
    return f"{array}/c.{'.'.join([str(shard), *['0'] * (num_axes - 1)])}"


def make_array(
    path: str,
    name: str,
    shape: Shape,
    chunks: Shape,
    dtype: str,
    shards: Shape | None = None,
    fill: float | int | None = None,
) -> Array:
    """Make an empty array, in place of one that is there; what was never written is `fill`, by default NaN or 0."""
    missing = float("nan") if np.dtype(dtype).kind == "f" else 0
    return zarr.create_array(
        _zarr_store(path, read_only=False),
        name=name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},  # no folder a shard
        fill_value=missing if fill is None else fill,
        overwrite=True,
        config={"write_empty_chunks": True},
    )
