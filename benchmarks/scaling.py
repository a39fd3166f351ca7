"""Strong scaling of `build` from one process to two, one thread each, under the real launcher.

    python -m benchmarks.scaling [--examples 512] [--rounds 3]

Features of SmolLM2-135M for examples of the factbook, from nothing. Two parts are timed: the *command*, from the call
of `accelerate launch` to its end, with imports, loading of the model and planning of the sketch; and the *shards*, from
when a rank begins its first one until all ranks have finished their last. Both as wall seconds and as CPU seconds of
the process that takes most: on a machine with other work, the ratio of CPU seconds says what two cores of one's own
would give. Rounds are pairs of jobs; medians. Both jobs must write the same data. Writes
benchmarks/results/scaling.json and the table of docs/scaling.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._pages import fill
from llmattrib.config import RunConfig, config_to_yaml, load_config
from llmattrib.store import RowStore

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- build:begin -->\n", "<!-- build:end -->\n"
SHARD_SIZE = 8
PARTS = ("command", "shards")


def run_of(folder: Path, num_examples: int) -> RunConfig:
    """The first examples of configs/smollm2.yaml, in shards of which each process gets many."""
    overrides = [f"run_dir={folder}/run", f"data.limit={num_examples}", f"features.shard_size={SHARD_SIZE}"]
    return load_config(ROOT / "configs" / "smollm2.yaml", [*overrides, "model.device=cpu"])


def work(file: Path) -> None:
    """Build as one rank of a job, and leave its figures beside the config."""
    from llmattrib.build import build_features
    from llmattrib.distributed import ranks

    team, began = ranks(), []

    def progress(done: int, total: int) -> None:
        if not began:
            began.extend((time.perf_counter(), time.process_time()))

    result = build_features(load_config(file), team, progress)
    wall, cpu = time.perf_counter() - began[0], time.process_time()
    figures = {"tokens": result.num_tokens, "shards_wall": wall, "shards_cpu": cpu - began[1], "command_cpu": cpu}
    (file.parent / f"rank{team.rank}.json").write_text(json.dumps(figures))


def measure(file: Path, num_processes: int) -> dict[str, Any]:
    """Run one job from the start; CPU seconds are of the process that takes most."""
    config = load_config(file)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml")]
    command += ["--num_processes", str(num_processes), str(Path(__file__)), "--work", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=env)
    wall = time.perf_counter() - began
    ranks = [json.loads((file.parent / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    most = {name: round(max(rank[name] for rank in ranks), 2) for name in ranks[0]}
    return {"command_wall": round(wall, 2), **most, "digest": RowStore.open(config.layout.features).digest()}


def compare(folder: Path, num_examples: int, rounds: int) -> dict[str, Any]:
    """Run pairs of jobs; return all figures and the medians of their ratios."""
    file = folder / "config.yaml"
    file.write_text(config_to_yaml(run_of(folder, num_examples)))
    load = round(os.getloadavg()[0], 1)
    pairs = [{"one": measure(file, 1), "two": measure(file, 2)} for _ in range(rounds)]
    (digest,) = {pair[key].pop("digest") for pair in pairs for key in ("one", "two")}
    (tokens,) = {pair[key].pop("tokens") for pair in pairs for key in ("one", "two")}
    names = [f"{part}_{clock}" for part in PARTS for clock in ("wall", "cpu")]
    return {
        "model": "SmolLM2-135M",
        "examples": num_examples,
        "tokens": tokens,
        "digest": digest,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "rounds": pairs,
        "median": {
            key: {name: round(statistics.median(pair[key][name] for pair in pairs), 1) for name in names}
            for key in ("one", "two")
        },
        "speedup": {
            name: round(statistics.median(pair["one"][name] / pair["two"][name] for pair in pairs), 2) for name in names
        },
    }


def table(result: dict[str, Any]) -> str:
    """Render the result for docs/scaling.md."""
    lines = ["| seconds | 1 process | 2 processes | ratio |", "|---|---|---|---|"]
    for part in PARTS:
        for clock, what in (("wall", "wall"), ("cpu", "CPU, of the process that takes most")):
            name = f"{part}_{clock}"
            one, two = (f"{result['median'][key][name]:.1f}" for key in ("one", "two"))
            lines.append(f"| {part}, {what} | {one} | {two} | {result['speedup'][name]:.2f} |")
    note = f"{result['examples']} examples, {result['tokens']:,} tokens, medians of {len(result['rounds'])} rounds"
    return "\n".join(lines) + f"\n\n{note}; load of the machine before: {result['load_before']:.1f}.\n"


def main() -> None:
    """Run the benchmark, write its JSON and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments.examples, arguments.rounds)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    fill(PAGE, BEGIN, table(result), END)
    print(table(result))


if __name__ == "__main__":
    main()
