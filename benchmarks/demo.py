"""The demo over several seeds: recall of the teaching example for every method and tf-idf, time and peak memory.

    python -m benchmarks.demo [--seeds 3] [--run-dir runs/demo-seeds] [--readme]

Each seed is a process of its own, from training to scoreboard, with all cores. Prompts of all seeds are pooled:
recall is hits over prompts. Finished seeds are kept. Writes benchmarks/results/demo.json; with
--readme also the table in README.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "demo.json"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- demo:begin -->\n", "<!-- demo:end -->\n"


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Run one demo, or read what an earlier run of this benchmark measured."""
    record = folder / "benchmark.json"
    if not record.exists():
        start = time.perf_counter()
        command = [sys.executable, "-m", "llmattrib.cli", "demo", "--run-dir", str(folder), "--seed", str(seed)]
        subprocess.run(command, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        record.write_text(json.dumps({"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}) + "\n")
    return json.loads((folder / "scoreboard.json").read_text()) | json.loads(record.read_text())  # type: ignore[no-any-return]


def pool(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Pool prompts over seeds."""
    pooled: dict[str, dict[str, dict[str, float]]] = {}
    for method, groups in runs[0]["methods"].items():
        pooled[method] = {}
        for group in groups:
            rows = [run["methods"][method][group] for run in runs]
            count = sum(row["count"] for row in rows)
            recall = {
                key: sum(row[key] * row["count"] for row in rows) / max(count, 1) for key in rows[0] if key != "count"
            }
            pooled[method][group] = {**recall, "count": count}
    return pooled


def table(result: dict[str, Any]) -> str:
    """Render recall as Markdown."""
    groups = next(iter(result["methods"].values()))
    repeated, held_out = groups["swapped"]["count"], groups["held_out"]["count"]
    lines = [
        f"| recall@1 / @5 (prompts) | wrong answer repeated ({repeated}) | held-out fact, new words ({held_out}) |",
        "|---|---|---|",
    ]
    for method, row in result["methods"].items():
        name = f"**{method}** (default)" if method == result["default_method"] else method
        name = "tf-idf over prompt + answer" if method == "tfidf" else name
        cells = [f"{row[group]['recall@1']:.2f} / {row[group]['recall@5']:.2f}" for group in ("swapped", "held_out")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    runs = [run_seed(arguments.run_dir / str(seed), seed) for seed in range(arguments.seeds)]
    figures = [
        {"seed": run["seed"], "seconds": round(run["seconds"], 1), "peak_memory_bytes": run["peak_memory_bytes"]}
        for run in runs
    ]
    RESULT.parent.mkdir(exist_ok=True)
    result = {"default_method": runs[0]["default_method"], "runs": figures, "methods": pool(runs)}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())
    if arguments.readme:
        head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        README.write_text(head + BEGIN + table(result) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
