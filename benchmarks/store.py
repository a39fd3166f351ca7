"""The row store against a bare numpy memmap, what a shard costs, and what it takes to open a store of many.

    python -m benchmarks.store [--dim 4096] [--rows 8192] [--rounds 9] [--parts bandwidth ahead shard shards zstd]

One thread; shards of 256 rows, all in turn; medians and ranges of ratios that are taken within a round, by wall and by
CPU time, above 1 where the store is quicker. All force every shard to disk. Rows of the table, and what the store is
compared with:

    write, read      float32 rows to stored rows and back, a shard at a time
    blocks           the same reads one shard ahead, by a second thread, as all stages read
    numpy            a bare memmap of as many bytes of the same dtype, without checksums and commit records: it converts
                     as `astype` does, and of int8 finds and keeps a scale a row, as a cast would give other numbers
    bytes            a memmap that copies bytes that are converted already and gives them back as they are, which no
                     store of float32 rows can do
    zarr             the same array written and read by zarr, of rows that are converted already; neither scales nor
                     records, and nothing is forced to disk
    without torch    the store where torch is not loaded; it is, in every process that builds or reduces

Bandwidths are MB of stored rows a second. `ahead`: wall seconds of a pass over float32 shards that are not in the page
cache, with 10 ms of other work after each, where this process may empty the cache (the whole machine's).

`shard`: CPU milliseconds of the steps of writing and reading one shard. `shards`: the commit records of 10^5 shards are
made without their data, and the store is opened and its digest taken, with a warm cache and, where this process may
drop it, with a cold one (the whole machine's). `zstd`: what compression would save.

Writes benchmarks/results/store.json.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd

from llmattrib import storage
from llmattrib.commits import checksum, record_path
from llmattrib.groups import make_array, open_array, open_group
from llmattrib.manifest import Manifest
from llmattrib.quantize import quantize
from llmattrib.rng import stream
from llmattrib.store import RowStore

RESULT = Path(__file__).parent / "results" / "store.json"
CACHES = Path("/proc/sys/vm/drop_caches")
SHARD_SIZE = 256
DTYPES = ("int8", "float16", "float32")
Times = tuple[float, float]
CLOCKS = ("wall", "cpu")


def seconds(run: Callable[[], object]) -> Times:
    """Wall and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def manifest(num_rows: int, dim: int, dtype: Any, shard_size: int = SHARD_SIZE) -> Manifest:
    """A store of one output."""
    return Manifest("features", num_rows, 1, dim, dtype, shard_size, ("norm",))


def shard_of(dim: int) -> np.ndarray:
    """Rows of one shard."""
    return stream(0, "benchmark", "store").standard_normal((SHARD_SIZE, 1, dim)).astype(np.float32)


def write_store(path: Path, num_rows: int, rows: np.ndarray, dtype: str) -> None:
    """Write the same shard as often as it takes."""
    store = RowStore.create(str(path), manifest(num_rows, rows.shape[-1], dtype))
    for shard in store.pending():
        store.write_shard(shard, rows, {"norm": rows[:, 0, 0]})


def write_memmap(path: Path, num_rows: int, rows: np.ndarray, dtype: str) -> None:
    """The same by numpy alone."""
    whole = np.memmap(path, dtype, "w+", shape=(num_rows, *rows.shape[1:]))
    scales = scales_of(path, num_rows, "w+") if has_scales(dtype, rows.dtype) else None
    for start in range(0, num_rows, SHARD_SIZE):
        place = slice(start, start + SHARD_SIZE)
        if scales is None:
            whole[place] = rows
        else:
            scale = np.abs(rows).max(axis=(1, 2), keepdims=True) / np.float32(127)
            scales[place] = scale
            whole[place] = np.rint(rows / scale)
            scales.flush()
        whole.flush()


def has_scales(dtype: str, given: Any) -> bool:
    """Whether a memmap of a dtype needs scales for rows of another."""
    return dtype == "int8" and np.dtype(given) != np.int8


def scales_of(path: Path, num_rows: int, mode: Any) -> np.memmap[Any, Any]:
    """Open the scales of a memmap, which are a file beside it."""
    return np.memmap(path.with_suffix(".scales"), np.float32, mode, shape=(num_rows, 1, 1))


def write_zarr(path: Path, num_rows: int, stored: np.ndarray) -> None:
    """The same array by zarr, of rows that are converted."""
    of = manifest(num_rows, stored.shape[-1], stored.dtype.name)
    shape, chunk = stored.shape[1:], of.chunk_rows
    array = make_array(str(path), "rows", (num_rows, *shape), (chunk, *shape), of.dtype, (SHARD_SIZE, *shape), 0)
    for start in range(0, num_rows, SHARD_SIZE):
        array[start : start + SHARD_SIZE] = stored


def read_zarr(path: Path, num_rows: int) -> None:
    """Read it back, a shard at a time."""
    array = open_array(open_group(str(path), "r"), str(path), "rows")
    for start in range(0, num_rows, SHARD_SIZE):
        np.asarray(array[start : start + SHARD_SIZE])


def read_store(path: Path) -> None:
    """Read all rows, a shard at a time."""
    store = RowStore.open(str(path))
    for shard in range(store.num_shards):
        store.read(*store.shard_range(shard))


def read_ahead(path: Path) -> None:
    """Read all rows, the next shard while the caller has one."""
    for _ in RowStore.open(str(path)).blocks():
        pass


def without_torch(call: Callable[[], object]) -> None:
    """Call in a process that seems not to have loaded torch."""
    kept = sys.modules.pop("torch")
    try:
        call()
    finally:
        sys.modules["torch"] = kept


def read_memmap(path: Path, num_rows: int, dim: int, dtype: str, wanted: str) -> None:
    """The same by numpy alone."""
    whole = np.memmap(path, dtype, "r", shape=(num_rows, 1, dim))
    scales = scales_of(path, num_rows, "r") if has_scales(dtype, wanted) else None
    for start in range(0, num_rows, SHARD_SIZE):
        place = slice(start, start + SHARD_SIZE)
        rows = whole[place].astype(wanted)
        if scales is not None:
            rows *= scales[place]


PEERS = {
    "write": ("numpy", "bytes", "zarr", "without_torch"),
    "read": ("numpy", "bytes", "zarr", "without_torch"),
    "blocks": ("numpy", "bytes"),
}
"""What each row is compared with."""


def bandwidth(folder: Path, num_rows: int, dim: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Return MB of stored rows a second of wall and of CPU time, and how many times as long the others take."""
    rows = shard_of(dim)
    ready = rows.astype(dtype)
    ours, bare, bytes_, zarrs, plain = (folder / f"{name}.x" for name in ("ours", "bare", "bytes", "zarr", "plain"))
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: write_store(ours, num_rows, rows, dtype),
        "write_numpy": lambda: write_memmap(bare, num_rows, rows, dtype),
        "write_bytes": lambda: write_memmap(bytes_, num_rows, ready, dtype),
        "write_zarr": lambda: write_zarr(zarrs, num_rows, ready),
        "write_without_torch": lambda: without_torch(lambda: write_store(plain, num_rows, rows, dtype)),
        "read": lambda: read_store(ours),
        "blocks": lambda: read_ahead(ours),
        "read_numpy": lambda: read_memmap(bare, num_rows, dim, dtype, "float32"),
        "read_bytes": lambda: read_memmap(bytes_, num_rows, dim, dtype, dtype),
        "read_zarr": lambda: read_zarr(zarrs, num_rows),
        "read_without_torch": lambda: without_torch(lambda: read_store(plain)),
        "verify": lambda: RowStore.open(str(ours)).verify(),
    }
    times: dict[str, list[Times]] = {name: [] for name in calls}
    for number in range(rounds):
        for path in (ours, zarrs, plain):
            shutil.rmtree(path, ignore_errors=True)
        for path in (bare, bytes_):
            path.unlink(missing_ok=True)
        writes = [name for name in calls if name.startswith("write")]
        reads = [name for name in calls if name not in writes]
        for group in (writes, reads):
            for name in group if number % 2 == 0 else reversed(group):
                times[name].append(seconds(calls[name]))
    megabytes = num_rows * dim * np.dtype(dtype).itemsize / 1e6
    speed = {
        clock: {name: round(megabytes / statistics.median(pair[k] for pair in pairs)) for name, pairs in times.items()}
        for k, clock in enumerate(CLOCKS)
    }
    ratios = {
        name: {
            peer: {
                clock: ratio_of(times[f"{'write' if name == 'write' else 'read'}_{peer}"], times[name], k)
                for k, clock in enumerate(CLOCKS)
            }
            for peer in peers
        }
        for name, peers in PEERS.items()
    }
    return {"mb_per_second": speed, "times_as_long": ratios}


def ratio_of(theirs: list[Times], ours: list[Times], clock: int) -> dict[str, Any]:
    """Return median and range over rounds of their time over ours."""
    ratios = [other[clock] / own[clock] for other, own in zip(theirs, ours, strict=True)]
    return {"ratio": round(statistics.median(ratios), 2), "range": [round(f(ratios), 2) for f in (min, max)]}


def ahead(folder: Path, num_rows: int, dim: int, rounds: int) -> dict[str, Any]:
    """Return wall seconds of a pass over what is not in memory, by itself and with work after each shard."""
    write_store(folder / "cold", num_rows, shard_of(dim), "float32")
    store = RowStore.open(str(folder / "cold"))
    passes: dict[str, Callable[[], Iterator[object]]] = {
        "one at a time": lambda: (store.read(*store.shard_range(shard)) for shard in range(store.num_shards)),
        "one ahead": store.blocks,
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, shards in passes.items():
            if not drop_caches():
                return {}
            start = time.perf_counter()
            for _ in shards():
                time.sleep(0.01)
            times[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def steps(folder: Path, dim: int, rounds: int, dtype: str) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds of the steps of one shard; `rest` is what the whole takes beyond them."""
    rows, path = shard_of(dim), str(folder / "steps.zarr")
    store = RowStore.create(path, manifest(SHARD_SIZE * rounds, dim, dtype))
    scalars = {"norm": rows[:, 0, 0]}
    of, stored = store.manifest.rows_layout, quantize(rows, store.manifest.dtype)[0]
    parts, file, small = of.encode(stored), f"{path}/rows/x", f"{path}/columns/x"
    data = np.concatenate(parts)
    record = f"{path}/commits/x"
    writes: dict[str, Callable[[int], object]] = {
        "whole": lambda k: store.write_shard(k, rows, scalars),
        "quantise": lambda _: quantize(rows, store.manifest.dtype),
        "crc32c": lambda _: of.encode(stored),
        "checksum": lambda _: checksum(stored),
        "files": lambda _: storage.write_files({file: parts, small: parts[-1:]}),
        "record": lambda k: storage.create_empty(f"{record}{k}"),
    }
    reads: dict[str, Callable[[int], object]] = {
        "whole": lambda k: store.read(*store.shard_range(k)),
        "file": lambda _: np.fromfile(file, np.uint8),
        "crc32c": lambda _: list(of.decode(data, 0, SHARD_SIZE, True)),
    }
    found = {}
    for name, calls in (("write", writes), ("read", reads)):
        times: dict[str, list[float]] = {step: [] for step in calls}
        for k in range(rounds):
            for step, call in calls.items():
                times[step].append(seconds(lambda k=k, call=call: call(k))[1])  # type: ignore[misc]
        medians = {step: 1e3 * statistics.median(values) for step, values in times.items()}
        medians["rest"] = 2 * medians["whole"] - sum(medians.values())
        found[name] = {step: round(value, 2) for step, value in medians.items()}
    return found


def drop_caches() -> bool:
    """Empty the page cache, where this process may."""
    os.sync()
    try:
        CACHES.write_text("3")
    except OSError:
        return False
    return True


def many_shards(folder: Path, num_shards: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds of the calls that list the commit records, with a warm and with a cold cache."""
    path = str(folder / "many.zarr")
    RowStore.create(path, manifest(num_shards, 8, "int8", shard_size=1))
    Path(path, "commits").mkdir(exist_ok=True)
    for shard in range(num_shards):
        Path(record_path(path, shard, f"{shard:032x}")).touch()
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: RowStore.open(path).require_complete(),
        "digest": lambda: RowStore.open(path).digest(),
    }
    times: dict[str, list[Times]] = {}
    for call in calls.values():  # imports and the like
        call()
    for name, call in calls.items():
        times[f"{name}_warm"] = [seconds(call) for _ in range(rounds)]
        if drop_caches():
            times[f"{name}_cold"] = [seconds(call) for _ in range(2) if drop_caches()]
    return {
        f"{name}_{clock}": round(1e3 * statistics.median(pair[k] for pair in pairs), 1)
        for name, pairs in times.items()
        for k, clock in enumerate(CLOCKS)
    }


def compression(dim: int, dtype: Any) -> dict[str, float]:
    """Return what zstd does to a shard of rows: bytes kept, and MB a second of CPU time."""
    stored, _ = quantize(shard_of(dim), dtype)
    codec = Zstd(level=1)
    packed = codec.encode(stored)
    megabytes = stored.nbytes / 1e6
    return {
        "kept": round(len(packed) / stored.nbytes, 3),
        "encode_mb_s": round(megabytes / seconds(lambda: codec.encode(stored))[1]),
        "decode_mb_s": round(megabytes / seconds(lambda: codec.decode(packed))[1]),
    }


def main() -> None:
    """Run the benchmark and write its JSON, a part at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        load = round(os.getloadavg()[0], 1)
        with tempfile.TemporaryDirectory() as name:
            found = PARTS[part](Path(name), arguments)
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        loads = {**known.get("load_before", {}), part: load}
        RESULT.write_text(json.dumps({**known, **found, "load_before": loads}, indent=2) + "\n")
    print(RESULT.read_text())


def each(part: Callable[[Path, str], Any], folder: Path) -> dict[str, Any]:
    """Run a part for every dtype, each in a folder of its own."""
    folders = {dtype: folder / dtype for dtype in DTYPES}
    for one in folders.values():
        one.mkdir()
    return {dtype: part(one, dtype) for dtype, one in folders.items()}


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "bandwidth": lambda folder, asked: {
        "dim": asked.dim,
        "rows": asked.rows,
        "bandwidth": each(lambda one, dtype: bandwidth(one, asked.rows, asked.dim, asked.rounds, dtype), folder),
    },
    "ahead": lambda folder, asked: {"cold_wall_seconds": ahead(folder, asked.rows, asked.dim, 3)},
    "shard": lambda folder, asked: {
        "shard_cpu_milliseconds": each(lambda one, dtype: steps(one, asked.dim, 20, dtype), folder)
    },
    "shards": lambda folder, asked: {
        "shards": asked.shards,
        "milliseconds": many_shards(folder, asked.shards, asked.rounds),
    },
    "zstd": lambda folder, asked: {"zstd": each(lambda _, dtype: compression(asked.dim, dtype), folder)},
}


if __name__ == "__main__":
    main()
