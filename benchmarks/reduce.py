"""Memory and time of `reduce` over a synthetic feature store, by one process and by two.

    python -m benchmarks.reduce [--rows 200000] [--dim 512] [--methods influence,trak banzhaf shapley]

Rows are normal with a decaying spectrum, stored in float16. Each line is one job under the real launcher, one thread a
process: peak resident memory (VmHWM), what importing alone took of it, and CPU seconds of each process. A quarter of
the rows shows what depends on their number. Representers of one and of two processes are compared. Semivalues are
streamed, without a certificate. Writes benchmarks/results/reduce.json, where rows of the same job are replaced and
others kept, and the table of docs/scaling.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks._process import peak_bytes
from llmattrib.config import RunConfig, validate_config
from llmattrib.manifest import Manifest
from llmattrib.rng import stream
from llmattrib.store import RowStore

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "reduce.json"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- reduce:begin -->\n", "<!-- reduce:end -->\n"
SHARD_SIZE = 1024
METHODS = ["influence,trak", "banzhaf", "shapley"]
COLUMNS = ("norm", "loss", "log_odds", "label")


def run_of(folder: Path, methods: list[str]) -> RunConfig:
    """A run of which only the features are there."""
    tree = {"run_dir": str(folder), "model": {"name": "none"}, "data": {"train": "none"}}
    return validate_config({**tree, "reduce": {"methods": methods, "form": "streamed", "certificate_draws": 0}})


def write_features(config: RunConfig, num_rows: int, dim: int) -> None:
    """Write the synthetic store, a shard at a time."""
    fingerprint = {"features": {"output": "log_odds"}, "encoding": {"label_words": []}}
    manifest = Manifest("features", num_rows, 1, dim, "float16", SHARD_SIZE, COLUMNS, fingerprint, {})
    store = RowStore.create(config.layout.features, manifest)
    spectrum = 1 / np.sqrt(1 + np.arange(dim, dtype=np.float32))
    for shard in store.pending():
        start, stop = store.shard_range(shard)
        rng = stream(0, "benchmark", "reduce", str(shard))
        rows = rng.standard_normal((stop - start, 1, dim), np.float32) * spectrum
        store.write_shard(shard, rows, {name: rng.standard_normal(stop - start, np.float32) for name in COLUMNS})


def work(folder: Path, methods: list[str]) -> None:
    """Reduce as one rank of a job, and leave its figures beside the run."""
    from llmattrib.distributed import ranks
    from llmattrib.reduce import reduce_run

    team = ranks()
    imported, cpu, wall = peak_bytes(), time.process_time(), time.perf_counter()
    results = reduce_run(run_of(folder, methods), team)
    figures = {
        "sum_rule_error": results[0].sum_rule_error,
        "peak_bytes": peak_bytes(),
        "imported_bytes": imported,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
    }
    (folder / f"rank{team.rank}.json").write_text(json.dumps(figures))


def measure(folder: Path, methods: list[str], num_processes: int) -> dict[str, Any]:
    """Run one job from the start."""
    shutil.rmtree(folder / "representers", ignore_errors=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml")]
    command += ["--num_processes", str(num_processes), str(Path(__file__)), "--work", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    load = os.getloadavg()[0]
    subprocess.run([*command, "--methods", ",".join(methods)], check=True, cwd=ROOT, env=env)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    (error, *_) = [rank.pop("sum_rule_error") for rank in ranks]
    row = {"processes": num_processes, "methods": methods, "load_before": round(load, 1), "ranks": ranks}
    return row if error is None else {**row, "sum_rule_error": error}


def difference(first: Path, second: Path) -> float:
    """Return the largest difference of two stores over their largest entry."""
    largest, apart = 0.0, 0.0
    one, other = RowStore.open(str(first)), RowStore.open(str(second))
    for (_, rows), (_, others) in zip(one.blocks(), other.blocks(), strict=True):
        largest = max(largest, float(np.abs(rows).max()))
        apart = max(apart, float(np.abs(rows - others).max()))
    return apart / largest


def table(result: dict[str, Any]) -> str:
    """Render the result for docs/scaling.md; of several processes the figures of the largest."""
    lines = [
        "| methods | rows | processes | CPU seconds of a process | wall seconds | peak memory of a process "
        "| of it imports | sum-rule error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        largest = {name: max(rank[name] for rank in run["ranks"]) for name in run["ranks"][0]}
        peak, imported = (f"{largest[name] / 1e9:.2f} GB" for name in ("peak_bytes", "imported_bytes"))
        lines.append(
            f"| {', '.join(run['methods'])} | {run['rows']:,} | {run['processes']} | {largest['cpu_seconds']:.1f} "
            f"| {largest['wall_seconds']:.1f} | {peak} | {imported} "
            f"| {format(run['sum_rule_error'], '.0e') if 'sum_rule_error' in run else '-'} |"
        )
    return "\n".join(lines) + "\n"


def compare(folder: Path, methods: list[str], num_rows: int) -> Iterator[dict[str, Any]]:
    """Run a job by one process and by two; each row is there as soon as it is measured."""
    kept, here = folder / "alone", Path(run_of(folder, methods).layout.representers(methods[0]))
    yield {"rows": num_rows, **measure(folder, methods, 1)}
    shutil.move(folder / "representers", kept)
    row = measure(folder, methods, 2)
    yield {"rows": num_rows, **row, "relative_difference": difference(kept / here.name, here)}
    shutil.rmtree(kept)


def keep(dim: int, new: dict[str, Any]) -> None:
    """Put a row into the result in place of the one of the same job, and render it."""

    def job(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["methods"], row["rows"], row["processes"]

    before = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    runs = [row for row in before if job(row) != job(new)] + [new]
    RESULT.write_text(
        json.dumps({"dim": dim, "shard_size": SHARD_SIZE, "runs": sorted(runs, key=job)}, indent=2) + "\n"
    )
    rendered = table(json.loads(RESULT.read_text()))
    fill(PAGE, BEGIN, rendered, END)
    print(rendered)


def main() -> None:
    """Run the benchmark, write its JSON and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of one job each")
    parser.add_argument("--quarter-only", action="store_true", help="leave the larger number of rows out")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    jobs = [names.split(",") for names in arguments.methods]
    if arguments.work:
        work(arguments.work, jobs[0])
        return
    with tempfile.TemporaryDirectory() as name:
        for num_rows in (arguments.rows // 4, arguments.rows)[: 1 if arguments.quarter_only else 2]:
            folder = Path(name) / str(num_rows)
            write_features(run_of(folder, jobs[0]), num_rows, arguments.dim)
            for methods in jobs:
                for row in compare(folder, methods, num_rows):
                    keep(arguments.dim, row)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
