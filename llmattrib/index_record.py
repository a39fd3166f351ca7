"""What an index was made from, its size, and which kind `auto` is: the record beside it. Knows nothing of faiss."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from llmattrib import storage
from llmattrib.errors import ConfigError, StaleIndexError
from llmattrib.index_sample import SAMPLE_ROWS
from llmattrib.sections import IndexConfig, Method
from llmattrib.store import RowStore

SCHEMA = 3
Kind = Literal["flat", "scan", "hnsw", "ivfpq"]
FLAT_BELOW = 100_000
"""`auto` is `flat` with fewer rows: reading 10^5 x 512 numbers takes 10 to 20 ms."""
MAX_CODED_DIM = 8192
"""Coordinates of scan and ivfpq are found by the eigenvectors of a [d, d] matrix."""
POINTS_PER_CENTROID = 39
"""faiss warns below this many training rows for each k-means centroid."""
PQ_BITS, SCAN_BITS = 8, 4
"""Of a code of ivfpq and of scan."""
SHAPING: dict[Kind, tuple[str, ...]] = {
    "flat": (),
    "scan": ("tail",),
    "hnsw": ("hnsw_neighbors", "hnsw_ef_construction"),
    "ivfpq": ("tail", "ivf_lists", "pq_subquantizers"),
}
"""The settings that shape the file of each kind; those of a search alone are left out."""


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` did.

    Attributes:
        path: the index.
        method: whose representers it holds.
        kind: `flat`, `scan`, `hnsw` or `ivfpq`.
        num_rows: n.
        dim: c * p.
        num_bytes: size of the file.
        seconds: time taken.
        is_reused: whether an index of the same representers and settings was there.
    """

    path: str
    method: Method
    kind: str
    num_rows: int
    dim: int
    num_bytes: int
    seconds: float
    is_reused: bool


def resolve_kind(config: IndexConfig, num_rows: int, dim: int) -> Kind:
    """Return the kind of index, with `auto` resolved: exact below 10^5 rows, `scan` from there on where it can.

    Args:
        config: its kind.
        num_rows: n.
        dim: c * p.
    """
    if config.kind != "auto":
        return config.kind
    return "flat" if num_rows < FLAT_BELOW or dim > MAX_CODED_DIM else "scan"


def index_bytes(config: IndexConfig, num_rows: int, dim: int) -> int:
    """Return the bytes of one method's index file and of its sample of vectors for shares.

    Args:
        config: its kind and settings.
        num_rows: n.
        dim: c * p.
    """
    vector = 4 * dim  # float32
    sample, kind = min(num_rows, SAMPLE_ROWS) * vector, resolve_kind(config, num_rows, dim)
    if kind == "flat":
        return num_rows * vector + sample
    if kind == "scan":  # at most: codes are of as many coordinates as the data need
        return num_rows * (vector + dim // 4) + dim * vector + sample
    if kind == "hnsw":  # level l >= 1 holds M^-l of the rows; offsets 8 bytes, levels 4
        m = config.hnsw_neighbors
        links = 2 * m + (m / (m - 1) if m > 1 else 1)
        return num_rows * (vector + 12) + round(4 * links * num_rows) + sample
    codebooks = (config.ivf_lists + (1 << PQ_BITS) + dim) * vector
    return num_rows * (config.pq_subquantizers + 8) + codebooks + sample


def check_fits(config: IndexConfig, kind: Kind, num_rows: int, dim: int) -> None:
    """Raise where an index of a kind cannot be made.

    Raises:
        ConfigError: too few rows to train it, or dimensions it cannot take.
    """
    lists = {"scan": 1 << SCAN_BITS, "ivfpq": max(config.ivf_lists, 1 << PQ_BITS)}.get(kind, 0)
    if num_rows < POINTS_PER_CENTROID * lists:
        with_lists = f" with {config.ivf_lists} lists" if kind == "ivfpq" else ""
        raise ConfigError(
            f"index.kind={kind}{with_lists}, and {num_rows:,} examples",
            expected=f"{POINTS_PER_CENTROID * lists:,} examples or more to train it",
            fix="set index.kind=flat: it is exact and needs no training",
        )
    if kind in ("scan", "ivfpq") and dim > MAX_CODED_DIM:
        raise ConfigError(
            f"index.kind={kind}, and representers of {dim:,} numbers",
            expected=f"{MAX_CODED_DIM:,} or fewer",
            fix="set index.kind to flat or hnsw, or features.sketch.dim lower",
        )
    if kind == "ivfpq" and config.pq_subquantizers > dim:
        raise ConfigError(
            f"index.pq_subquantizers={config.pq_subquantizers}, and representers of {dim} numbers",
            expected="no more than these",
            fix=f"set index.pq_subquantizers to {dim} or less",
        )


def shaping_settings(config: IndexConfig, kind: Kind) -> dict[str, Any]:
    """Return the settings that shape the file."""
    return {"kind": kind} | {name: getattr(config, name) for name in SHAPING[kind]}


def read_record(path: str) -> dict[str, Any] | None:
    """Return the record at `path`; None when there is none, when it is not whole or of another schema."""
    try:
        record = json.loads(storage.read_bytes(path))
    except (FileNotFoundError, ValueError):  # not whole: as good as no index
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def check_representers(path: str, record: dict[str, Any], store: RowStore) -> None:
    """Compare the index at `path` with the representers that are there: one listing.

    Raises:
        StaleIndexError: it is of others.
    """
    if record["representers"] != store.digest():
        raise StaleIndexError(
            f"{path} was built from other representers than {store.path} holds now",
            expected="an index of the present representers",
            fix="run `llmattrib index` again",
        )


def check_current(path: str, record: dict[str, Any], store: RowStore, config: IndexConfig) -> Kind:
    """Return the kind of the index at `path`.

    Raises:
        StaleIndexError: it is of other representers than `store` holds, or of other settings than `config` has.
    """
    check_representers(path, record, store)
    kind = resolve_kind(config, record["num_rows"], record["dim"])
    wanted = shaping_settings(config, kind)
    if record["settings"] != wanted:
        raise StaleIndexError(
            f"{path} was built with {_named(record['settings'])}",
            expected=f"{_named(wanted)}, as the config says",
            fix="run `llmattrib index` again, or restore the settings",
        )
    return kind


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={settings[name]}" for name in sorted(settings))
