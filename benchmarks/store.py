"""The row store against a bare numpy memmap, and the price of opening a store of many shards.

    python -m benchmarks.store [--dim 4096] [--rows 16384] [--rounds 5]

One thread; wall time, alternating, medians. Both write the same float32 rows as float16 and force them to disk, and
read them back as float32. The memmap has no scales, no checksums and no commit records; it is the physical limit.
Bandwidths are of stored bytes. Also: what zstd would save. Writes benchmarks/results/store.json.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numcodecs import Zstd

from llmattrib.manifest import Manifest
from llmattrib.rng import stream
from llmattrib.store import RowStore, quantize

RESULT = Path(__file__).parent / "results" / "store.json"
SHARD_SIZE = 256


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def manifest(num_rows: int, dim: int, shard_size: int = SHARD_SIZE) -> Manifest:
    """A float16 store of one output."""
    return Manifest("features", num_rows, 1, dim, "float16", shard_size, ("norm",))


def write_store(path: Path, num_rows: int, rows: np.ndarray) -> None:
    """Write the same shard as often as it takes."""
    store = RowStore.create(str(path), manifest(num_rows, rows.shape[-1]))
    for shard in store.pending():
        store.write_shard(shard, rows, {"norm": rows[:, 0, 0]})


def write_memmap(path: Path, num_rows: int, rows: np.ndarray) -> None:
    """The same by numpy alone."""
    whole = np.memmap(path, "<f2", "w+", shape=(num_rows, *rows.shape[1:]))
    for start in range(0, num_rows, SHARD_SIZE):
        whole[start : start + SHARD_SIZE] = rows
        whole.flush()


def read_store(path: Path) -> None:
    """Read all rows, a shard at a time."""
    for _ in RowStore.open(str(path)).blocks():
        pass


def read_memmap(path: Path, num_rows: int, dim: int) -> None:
    """The same by numpy alone."""
    whole = np.memmap(path, "<f2", "r", shape=(num_rows, 1, dim))
    for start in range(0, num_rows, SHARD_SIZE):
        whole[start : start + SHARD_SIZE].astype(np.float32)


def bandwidth(folder: Path, num_rows: int, dim: int, rounds: int) -> dict[str, float]:
    """Return MB of stored bytes a second, medians."""
    rows = stream(0, "benchmark", "store").standard_normal((SHARD_SIZE, 1, dim)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in ("write", "memmap_write", "read", "memmap_read", "verify")}
    ours, bare = folder / "rows.zarr", folder / "rows.bin"
    for _ in range(rounds):
        shutil.rmtree(ours, ignore_errors=True)
        bare.unlink(missing_ok=True)
        times["write"].append(seconds(lambda: write_store(ours, num_rows, rows)))
        times["memmap_write"].append(seconds(lambda: write_memmap(bare, num_rows, rows)))
        times["read"].append(seconds(lambda: read_store(ours)))
        times["memmap_read"].append(seconds(lambda: read_memmap(bare, num_rows, dim)))
        times["verify"].append(seconds(lambda: RowStore.open(str(ours)).verify()))
    megabytes = num_rows * dim * 2 / 1e6
    return {name: round(megabytes / statistics.median(values)) for name, values in times.items()}


def many_shards(folder: Path, num_shards: int, rounds: int) -> dict[str, float]:
    """Return milliseconds of the calls that touch every commit record or column file."""
    path = str(folder / "many.zarr")
    store = RowStore.create(path, manifest(num_shards, 8, shard_size=1))
    for shard in store.pending():
        store.write_shard(shard, np.ones((1, 1, 8), np.float32), {"norm": np.ones(1, np.float32)})
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: RowStore.open(path),
        "digest": lambda: RowStore.open(path).digest(),
        "column": lambda: RowStore.open(path).column("norm"),
    }
    return {
        name: round(1e3 * statistics.median(seconds(call) for _ in range(rounds)), 1) for name, call in calls.items()
    }


def compression(dim: int) -> dict[str, float]:
    """Return what zstd does to a shard of float16 rows: bytes kept, and MB/s against a copy."""
    rows = stream(0, "benchmark", "zstd").standard_normal((SHARD_SIZE, 1, dim)).astype(np.float32)
    stored, _ = quantize(rows, "float16")
    codec = Zstd(level=1)
    packed = codec.encode(stored)
    megabytes = stored.nbytes / 1e6
    return {
        "kept": round(len(packed) / stored.nbytes, 3),
        "encode_mb_s": round(megabytes / seconds(lambda: codec.encode(stored))),
        "decode_mb_s": round(megabytes / seconds(lambda: codec.decode(packed))),
    }


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = {
            "dim": arguments.dim,
            "rows": arguments.rows,
            "mb_per_second": bandwidth(Path(name), arguments.rows, arguments.dim, arguments.rounds),
            "shards": arguments.shards,
            "milliseconds": many_shards(Path(name), arguments.shards, arguments.rounds),
            "zstd": compression(arguments.dim),
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
