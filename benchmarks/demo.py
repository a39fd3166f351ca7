"""The demo over several seeds: recall of the teaching example for every method and tf-idf, time and peak memory.

    python -m benchmarks.demo [--seeds 3] [--run-dir runs/demo-seeds] [--trained]

Each seed is a process of its own with one thread, from its imports to the scoreboard. Prompts of all seeds are pooled:
recall is hits over prompts. Finished seeds are kept. The sketch of the first seed is compared with exact gradients.
With --trained the same prompts and answers are traced with features at the trained adapter as well
(`features.linearisation=trained`). Writes benchmarks/results/demo.json and the table in README.md.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks._pages import fill
from benchmarks._process import measured, peak_bytes
from llmattrib.build import build_features
from llmattrib.config import load_config
from llmattrib.demo import run_demo, score
from llmattrib.evaluate.sketch import sketch_fidelity
from llmattrib.facts import choose_facts, make_probes
from llmattrib.hits import Query
from llmattrib.index import build_index
from llmattrib.narration import ConsoleNarrator
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.sections import METHODS

RESULT = Path(__file__).parent / "results" / "demo.json"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- demo:begin -->\n", "<!-- demo:end -->\n"


def work(folder: str, seed: int) -> dict[str, Any]:
    """Run one demo in this process and return what the process took."""
    run_demo(folder, seed, ConsoleNarrator(Console(stderr=True)))
    return {
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
    }


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Run one demo, or read what an earlier run of this benchmark measured."""
    record = folder / "benchmark.json"
    if not record.exists():
        start = time.perf_counter()
        figures = measured("demo", str(folder), str(seed))
        record.write_text(json.dumps({"seconds": round(time.perf_counter() - start, 1), **figures}) + "\n")
    return json.loads((folder / "scoreboard.json").read_text()) | json.loads(record.read_text())  # type: ignore[no-any-return]


def trained_scores(folder: Path, seed: int) -> dict[str, Any]:
    """Score the prompts and answers of a finished demo with features at the trained adapter."""
    record = folder / "trained" / "scoreboard.json"
    if not record.exists():
        config = load_config(str(folder))
        config = config.model_copy(
            update={
                "run_dir": str(folder / "trained"),
                "model": config.model.model_copy(update={"adapters": (str(folder / "adapter"),)}),
                "features": config.features.model_copy(update={"linearisation": "trained"}),
            }
        )
        build_features(config)
        reduce_run(config)
        for method in METHODS:
            build_index(config, method)
        facts = choose_facts(seed)
        probes = make_probes(seed, facts)
        answers = json.loads((folder / "evaluation" / "answers.json").read_text())["answers"]
        queries = [Query.of(probe.prompt, text) for probe, text in zip(probes, answers, strict=True)]
        answered = Run(config).query_many(queries, top=5, methods=METHODS)
        found = {method: answered[k :: len(METHODS)] for k, method in enumerate(METHODS)}
        scores = score(config, facts, probes, queries, found)
        record.write_text(json.dumps(asdict(scores), indent=2) + "\n")
    return json.loads(record.read_text())  # type: ignore[no-any-return]


def sketch_report(folder: Path) -> dict[str, Any]:
    """Compare the sketched kernel of a finished demo with the exact one; the same as `llmattrib evaluate sketch`."""
    path = folder / "evaluation" / "sketch.json"
    if not path.exists():
        sketch_fidelity(load_config(str(folder)))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


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
        f"| recall@1 / @5 | wrong answer repeated ({repeated} prompts) | held-out fact, new words ({held_out}) |",
        "|---|---|---|",
    ]
    for method, row in result["methods"].items():
        name = f"**{method}** (default)" if method == result["default_method"] else method
        name = "tf-idf over prompt + answer" if method == "tfidf" else name
        cells = [f"{part['recall@1']:.2f} / {part['recall@5']:.2f}" for part in (row["swapped"], row["held_out"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--work", nargs=2, metavar=("FOLDER", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work[0], int(arguments.work[1]))))
        return
    runs = [run_seed(arguments.run_dir / str(seed), seed) for seed in range(arguments.seeds)]
    keys = ("seed", "seconds", "cpu_seconds", "peak_memory_bytes", "threads")
    figures = [{key: run[key] for key in keys} for run in runs]
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "default_method": runs[0]["default_method"],
        "runs": figures,
        "methods": pool(runs),
        "sketch": sketch_report(arguments.run_dir / "0"),
    }
    if arguments.trained:
        result["trained"] = pool(
            [trained_scores(arguments.run_dir / str(seed), seed) for seed in range(arguments.seeds)]
        )
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())
    fill(README, BEGIN, table(result), END)


if __name__ == "__main__":
    main()
