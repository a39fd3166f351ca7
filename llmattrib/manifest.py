"""What a store holds and what its numbers depend on, as JSON beside the numbers.

Two stores mix only when their manifests agree in everything but `info`. The module knows nothing of files.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from llmattrib.errors import StoreError
from llmattrib.quantize import NO_CODE, StoredType
from llmattrib.shards import ShardLayout

SCHEMA = 2
CHUNK_ROWS = 64
SCALE = "scale"
"""Name of the column that a store keeps for itself."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds and what its numbers depend on.

    Attributes:
        kind: `features`, `words` or `representers`.
        num_rows: n.
        num_outputs: c, feature rows per example.
        dim: p.
        dtype: how rows are stored.
        shard_size: rows a shard; a divisor near 64 makes good inner chunks.
        columns: names of float32 scalars kept with each row; `scale` is the store's own.
        fingerprint: everything that changes the numbers, as JSON; stores with different ones never mix.
        info: what a reader needs or likes to know; not compared, and the stored one is kept on resume.
    """

    kind: Literal["features", "words", "representers"]
    num_rows: int
    num_outputs: int
    dim: int
    dtype: StoredType
    shard_size: int
    columns: tuple[str, ...] = ()
    fingerprint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalise to what JSON gives back, so that a stored manifest equals the one it was made from."""
        assert min(self.num_rows, self.num_outputs, self.dim, self.shard_size) > 0
        assert len({SCALE, *self.columns}) == 1 + len(self.columns)
        for name in ("fingerprint", "info"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name), sort_keys=True)))

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk: the largest divisor of the shard size up to 64, as chunks fill a shard evenly."""
        return next(rows for rows in range(min(CHUNK_ROWS, self.shard_size), 0, -1) if self.shard_size % rows == 0)

    @property
    def rows_layout(self) -> ShardLayout:
        """How rows lie in files."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        fill = NO_CODE if self.dtype == "int8" else math.nan
        return ShardLayout((self.num_outputs, self.dim), dtype, self.shard_size, self.chunk_rows, fill)

    @property
    def columns_layout(self) -> ShardLayout:
        """How columns lie in files."""
        return ShardLayout((1 + len(self.columns),), np.dtype("<f4"), self.shard_size, None, math.nan)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows and columns on disk, without the few of chunk indexes and records."""
        row = self.num_outputs * self.dim * np.dtype(self.dtype).itemsize
        num_chunks, num_shards = -(-self.num_rows // self.chunk_rows), -(-self.num_rows // self.shard_size)
        columns = 4 * (1 + len(self.columns)) * self.shard_size  # of a shard; the last one is filled up
        return num_chunks * self.chunk_rows * row + num_shards * columns

    def check_rows(self, path: str, start: int, stop: int, rows: np.ndarray, scalars: Mapping[str, np.ndarray]) -> None:
        """Refuse rows [start, stop) that do not fit: not float32, of another shape, with other columns.

        Raises:
            StoreError: names `path` and the shard.
        """
        place, shape = f"shard {start // self.shard_size} of {path}", (stop - start, self.num_outputs, self.dim)
        if rows.shape != shape or rows.dtype != np.float32:
            raise StoreError(f"{place} got rows {rows.dtype}{list(rows.shape)}", expected=f"float32{list(shape)}")
        if set(scalars) != set(self.columns) or any(len(values) != shape[0] for values in scalars.values()):
            raise StoreError(
                f"{place} got columns { ({key: len(values) for key, values in scalars.items()}) }",
                expected=f"{shape[0]} values for each of {list(self.columns)}",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it is stored."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "columns": list(self.columns)}

    def compared(self) -> dict[str, Any]:
        """Return `to_json` without `info`: two stores mix only when these are equal."""
        return {**self.to_json(), "info": {}}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Manifest":
        """Read back `to_json` of this schema."""
        fields = {key: value for key, value in tree.items() if key != "schema"}
        return cls(**{**fields, "columns": tuple(tree["columns"])})


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (stored, wanted) for every leaf that differs between two JSON mappings."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*stored, *wanted}):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differing(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found
