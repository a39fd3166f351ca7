"""The row store against a bare numpy memmap, the price of a commit, and of opening a store of many shards.

    python -m benchmarks.store [--dim 4096] [--rows 16384] [--rounds 5] [--parts bandwidth commit shards zstd]

One thread; wall time, alternating, medians. Both write the same float32 rows as float16 and force them to disk, and
read them back as float32. The memmap has no scales, no checksums and no commit records; it is the physical limit.
Bandwidths are of stored bytes, by wall and by CPU time. `commit` is the share of a write in the checksum and in the
record. `shards`: the commit records of 10^5 shards are written without their data, and the store is opened and
compared with them, as a reader does. Also: what zstd would save. Writes benchmarks/results/store.json.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd

from llmattrib.commits import checksum, record_path
from llmattrib.manifest import Manifest
from llmattrib.rng import stream
from llmattrib.storage import atomic_write
from llmattrib.store import RowStore, quantize

RESULT = Path(__file__).parent / "results" / "store.json"
SHARD_SIZE = 256


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    return both_seconds(run)[0]


def both_seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


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


def bandwidth(folder: Path, num_rows: int, dim: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return MB of stored bytes a second of wall and of CPU time, medians."""
    rows = stream(0, "benchmark", "store").standard_normal((SHARD_SIZE, 1, dim)).astype(np.float32)
    times: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("write", "memmap_write", "read", "memmap_read", "verify")
    }
    ours, bare = folder / "rows.zarr", folder / "rows.bin"
    for _ in range(rounds):
        shutil.rmtree(ours, ignore_errors=True)
        bare.unlink(missing_ok=True)
        times["write"].append(both_seconds(lambda: write_store(ours, num_rows, rows)))
        times["memmap_write"].append(both_seconds(lambda: write_memmap(bare, num_rows, rows)))
        times["read"].append(both_seconds(lambda: read_store(ours)))
        times["memmap_read"].append(both_seconds(lambda: read_memmap(bare, num_rows, dim)))
        times["verify"].append(both_seconds(lambda: RowStore.open(str(ours)).verify()))
    megabytes = num_rows * dim * 2 / 1e6
    return {
        clock: {name: round(megabytes / statistics.median(pair[k] for pair in pairs)) for name, pairs in times.items()}
        for k, clock in enumerate(("wall", "cpu"))
    }


def commits(folder: Path, dim: int, rounds: int) -> dict[str, float]:
    """Return CPU milliseconds of one shard: the whole write, the checksum of its bytes, and its record on disk."""
    rows = stream(0, "benchmark", "store").standard_normal((SHARD_SIZE, 1, dim)).astype(np.float32)
    stored, path = quantize(rows, "float16")[0], folder / "commits.zarr"
    store = RowStore.create(str(path), manifest(SHARD_SIZE * rounds, dim))
    scalars = {"norm": rows[:, 0, 0]}
    calls: dict[str, Callable[[int], object]] = {
        "write_shard": lambda k: store.write_shard(k, rows, scalars),
        "checksum": lambda _: checksum(stored),
        "record": lambda k: atomic_write(f"{path}/commits/{k}.partial", b"{}"),
    }
    return {
        name: round(1e3 * statistics.median(both_seconds(lambda k=k, call=call: call(k))[1] for k in range(rounds)), 2)  # type: ignore[misc]
        for name, call in calls.items()
    }


def many_shards(folder: Path, num_shards: int, rounds: int) -> dict[str, float]:
    """Return milliseconds of the calls that list or read every commit record."""
    path = str(folder / "many.zarr")
    RowStore.create(path, manifest(num_shards, 8, shard_size=1))
    for shard in range(num_shards):
        record = {"shard": shard, "rows": 1, "checksum": "0" * 64}
        place = Path(record_path(path, shard))
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(record) + "\n")
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: RowStore.open(path).require_complete(),
        "digest": lambda: RowStore.open(path).digest(),
    }
    times = {name: [both_seconds(call) for _ in range(rounds)] for name, call in calls.items()}
    return {
        f"{name}_{clock}": round(1e3 * statistics.median(pair[k] for pair in pairs), 1)
        for name, pairs in times.items()
        for k, clock in enumerate(("wall", "cpu"))
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


def table(result: dict[str, Any]) -> str:
    """Render bandwidths and their ratio to the memmap's."""
    lines = [
        "| | MB/s of wall time | MB/s of CPU time | of the memmap, wall | of the memmap, CPU |",
        "|---|---|---|---|---|",
    ]
    wall, cpu = result["mb_per_second"]["wall"], result["mb_per_second"]["cpu"]
    for name in wall:
        limit = name if name.startswith("memmap") else {"write": "memmap_write"}.get(name, "memmap_read")
        lines.append(
            f"| {name.replace('_', ', ')} | {wall[name]:,} | {cpu[name]:,} | {wall[name] / wall[limit]:.2f} "
            f"| {cpu[name] / cpu[limit]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write its JSON, a part at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as name:
            found = PARTS[part](Path(name), arguments)
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        load = {**known.get("load_before", {}), part: round(os.getloadavg()[0], 1)}
        RESULT.write_text(json.dumps({**known, **found, "load_before": load}, indent=2) + "\n")
    print(RESULT.read_text())


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "bandwidth": lambda folder, asked: {
        "dim": asked.dim,
        "rows": asked.rows,
        "mb_per_second": bandwidth(folder, asked.rows, asked.dim, asked.rounds),
    },
    "commit": lambda folder, asked: {"commit_cpu_milliseconds": commits(folder, asked.dim, 20)},
    "shards": lambda folder, asked: {
        "shards": asked.shards,
        "milliseconds": many_shards(folder, asked.shards, asked.rounds),
    },
    "zstd": lambda _, asked: {"zstd": compression(asked.dim)},
}


if __name__ == "__main__":
    main()
