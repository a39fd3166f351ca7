"""Is TracIn-WE right? Against sub-models on random halves, and by deletion curves.

    python -m benchmarks.tracin_we [--tasks sms facts] [--parts halves deletion] [--removed 10 20]

`halves`: the committed sub-models of benchmarks/truth/, trained on random halves of the data. The linear datamodelling
score of each method; and, for the k examples that it calls most helpful (or most harmful) for a query, by how much the
query's log-odds change from halves with all of them to halves without: the slope of a regression on how many of the k
are in a half and on its size, times -k. All prompts, no fine-tune of its own.

`deletion`: the k examples are removed from the whole data and the model is fine-tuned again, with the same seed; a
method that is right lowers the log-odds of the query's answer by removing helpful examples (Del+) and raises them by
removing harmful ones (Del-). Queries are the first of each task. Sub-models are kept in runs/tracin_we/<task>.json as
they are made, so a run that was stopped goes on; shown are the queries that are complete.

Beside `tracin_we`, as it is by default and with all positions kept, stand Grad-Dot over all LoRA
layers and over the last layer alone (TracIn-Last), all at initialisation with exact values; and random examples. Tasks
are the two of benchmarks/truth/ on the 1M-parameter Llama. Writes benchmarks/results/tracin_we.json and
docs/tracin_we.md.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks.truth.margins import TINY, load
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.data import load_examples, load_validation_examples
from llmattrib.evaluate.lds import lds
from llmattrib.evaluate.scores import method_scores
from llmattrib.games.retraining import RetrainingGame, load_trainable
from llmattrib.games.subset_table import SubsetRows
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.train import encode_without_weights
from llmattrib.values.validation import load_validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "tracin_we.json"
PAGE = HERE.parent / "docs" / "tracin_we.md"
BEGIN, END = "<!-- tracin_we:begin -->\n", "<!-- tracin_we:end -->\n"
FOLDER = Path("runs/tracin_we")
METHODS = ("tracin_we", "grad_dot", "grad_dot, last layer")
VARIANTS: dict[str, dict[str, Any]] = {
    "tracin_we": {},
    "tracin_we, all positions": {"top_positions": None},
}
COUNTED = (5, 10, 20)
REMOVED = (10, 20)
NUM_QUERIES = 8
NUM_RANDOM = 4


def run_of(task: str, variant: str = "tracin_we") -> RunConfig:
    """Return the run of a task: exact features at initialisation, and word gradients."""
    base = load_config(HERE / "truth" / f"{task}.yaml")
    tree = base.model_dump(mode="json")
    tree["run_dir"] = str(FOLDER / task / str(list(VARIANTS).index(variant)))
    tree["features"]["num_inits"] = 1
    tree["words"].update(VARIANTS[variant])
    tree["reduce"]["methods"] = ["grad_dot", "tracin_we"]
    return RunConfig.model_validate(tree)


def scores_of(task: str, variants: Iterable[str] = VARIANTS) -> dict[str, np.ndarray]:
    """Return the values [q, n] of every method."""
    found = {}
    for variant in variants:
        config = run_of(task, variant)
        build_features(config)
        reduce_run(config)
        run = Run(config)
        validation = load_validation(run)
        found[variant] = method_scores(run, "tracin_we", validation)
        if not VARIANTS[variant]:
            found["grad_dot"] = method_scores(run, "grad_dot", validation)
            found["grad_dot, last layer"] = last_layer(config, validation.phi[:, 0])
    return found


def last_layer(config: RunConfig, queries: np.ndarray) -> np.ndarray:
    """Return Grad-Dot values over the LoRA matrices of the last layer alone."""
    store = RowStore.open(config.layout.features)
    plan = store.manifest.info["sketch_plan"]
    assert plan["kind"] == "none"
    numbers = [int(block["name"].split("layers.")[1].split(".")[0]) for block in plan["blocks"]]
    is_last = np.repeat(np.array(numbers) == max(numbers), plan["widths"])
    rows = store.read(0, store.manifest.num_rows)[:, 0]
    return np.asarray(queries[:, is_last].astype(np.float64) @ rows[:, is_last].T)


def against_halves(task: str) -> dict[str, Any]:
    """Compare all methods with the committed sub-models."""
    rows, margins = load(task)
    scores = scores_of(task)
    num_queries, n = scores["grad_dot"].shape
    chance = stream(0, "benchmark", "tracin_we", "halves").standard_normal((num_queries, n))
    methods = {}
    for method, values in (scores | {"random": chance}).items():
        found = lds(values, rows)
        interval = [round(found.low, 4), round(found.high, 4)]
        moved = {
            str(k): {sign: figures(slopes(values * (1 if sign == "+" else -1), rows, k)) for sign in "+-"}
            for k in COUNTED
        }
        methods[method] = {"lds": round(found.lds, 4), "ci95": interval, "moved": moved}
        print(task, method, methods[method], flush=True)
    counts = {"subsets": len(rows.p), "seeds": len(margins), "queries": num_queries, "examples": n}
    return {**counts, "methods": methods}


def slopes(scores: np.ndarray, rows: SubsetRows, k: int) -> np.ndarray:
    """Return, for each query, the change of its log-odds from halves with its k first examples to halves without."""
    sizes = rows.members.sum(axis=1)
    found = []
    for query, values in enumerate(scores):
        first = np.argsort(-values, kind="stable")[:k]
        columns = np.stack([rows.members[:, first].sum(axis=1), sizes, np.ones(len(sizes))], axis=1)
        found.append(-k * np.linalg.lstsq(columns.astype(float), rows.utilities[:, query], rcond=None)[0][0])
    return np.array(found)


def removals(
    scores: dict[str, np.ndarray], num_queries: int, num_removed: int, seed: int
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yield (name, query or None for all of them, examples to remove)."""
    n = next(iter(scores.values())).shape[1]
    for draw in range(NUM_RANDOM):
        chosen = stream(seed, "benchmark", "tracin_we", num_removed, draw).choice(n, num_removed, replace=False)
        yield f"random {draw}", None, chosen
    for query in range(num_queries):
        for method in METHODS:
            order = np.argsort(-scores[method][query], kind="stable")
            yield f"{method} +", query, order[:num_removed]
            yield f"{method} -", query, order[::-1][:num_removed]


def measure(task: str, sizes: tuple[int, ...]) -> None:
    """Fine-tune what is not there yet; results are kept one by one."""
    config = run_of(task)
    scores = scores_of(task, ["tracin_we"])
    examples, queries = load_examples(config.data), load_validation_examples(config.data, config.values)
    train, asked = encode_without_weights(config, examples), encode_without_weights(config, queries[:NUM_QUERIES])
    ids = [example.id for example in train.examples]
    game = RetrainingGame(config, load_trainable(config), train.encoded, ids, asked.encoded)
    path = FOLDER / f"{task}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def worth(name: str, removed: np.ndarray) -> None:
        if name not in kept:
            members = np.ones((1, len(ids)), bool)
            members[0, removed] = False
            kept[name] = game.worth(members, config.seed)[0].tolist()
            path.write_text(json.dumps(kept) + "\n")
            print(task, name, flush=True)

    worth("all", np.array([], np.int64))
    for size in sizes:
        for name, query, removed in removals(scores, NUM_QUERIES, size, config.seed):
            worth(f"{size} {name}" + ("" if query is None else f" of query {query}"), removed)


def summary(kept: dict[str, list[float]], size: int) -> dict[str, Any] | None:
    """Return mean changes of the log-odds and their standard errors, over the first queries that are complete.

    None while these are fewer than three, or random removals are missing.
    """
    whole, names = np.array(kept["all"]), [f"{method} {sign}" for method in METHODS for sign in "+-"]
    num_queries = 0
    while all(f"{size} {name} of query {num_queries}" in kept for name in names):
        num_queries += 1
    at_random = [kept.get(f"{size} random {draw}") for draw in range(NUM_RANDOM)]
    if num_queries < 3 or None in at_random:
        return None
    queries = range(num_queries)
    random = np.array(at_random) - whole
    methods = {
        name: figures(np.array([kept[f"{size} {name} of query {query}"][query] - whole[query] for query in queries]))
        for name in names
    }
    spread = round(float(random.std()), 4)
    return {"queries": num_queries, "methods": methods, "random": figures(random.mean(axis=0)), "one_random_sd": spread}


def figures(change: np.ndarray) -> dict[str, float]:
    """Return mean and standard error."""
    return {"mean": round(float(change.mean()), 4), "error": round(float(change.std(ddof=1) / len(change) ** 0.5), 4)}


def deletion(task: str) -> dict[str, Any] | None:
    """Return the figures of a task's sub-models, as far as they are there."""
    path = FOLDER / f"{task}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    curves = {str(size): summary(kept, size) for size in sorted({int(n.split()[0]) for n in kept if n != "all"})}
    curves = {size: found for size, found in curves.items() if found is not None}
    return {"num_random": NUM_RANDOM, "removed": curves} if curves else None


def table(result: dict[str, Any]) -> str:
    """Render the figures for docs/tracin_we.md."""
    lines = []
    for task, found in result["halves"].items():
        lines += [
            f"**{task}**: {found['subsets']} halves of {found['examples']} examples x {found['seeds']} seeds, "
            f"{found['queries']} queries",
            "",
            "| | LDS | " + " | ".join(f"{k} {kind}" for k in COUNTED for kind in ("helpful", "harmful")) + " |",
            "|---" * (2 + 2 * len(COUNTED)) + "|",
        ]
        for method, row in found["methods"].items():
            cells = [cell_text(row["moved"][str(k)][sign]) for k in COUNTED for sign in "+-"]
            low, high = row["ci95"]
            lines.append(f"| {method} | {row['lds']:.2f} ({low:.2f}-{high:.2f}) | " + " | ".join(cells) + " |")
        lines.append("")
    for task, found in result.get("deletion", {}).items():
        lines += [
            f"**{task}**, fine-tuned again on all examples but k",
            "",
            "| k, queries | method | Del+ (should be negative) | Del- (should be positive) |",
            "|---|---|---|---|",
        ]
        for size, curve in found["removed"].items():
            for method in METHODS:
                cells = [cell_text(curve["methods"][f"{method} {sign}"]) for sign in "+-"]
                lines.append(f"| {size}, {curve['queries']} | {method} | " + " | ".join(cells) + " |")
            noise = f"one removal moves one query by {curve['one_random_sd']:.2f} (standard deviation)"
            name = f"{size}, {NUM_QUERIES} | random {found['num_random']} times"
            lines.append(f"| {name} | {cell_text(curve['random'])} | {noise} |")
        lines.append("")
    return "\n".join(lines)


def cell_text(cell: dict[str, float]) -> str:
    """Render one mean."""
    return f"{cell['mean']:+.2f} +- {cell['error']:.2f}"


def write_docs() -> None:
    """Write the table into its page."""
    fill(PAGE, BEGIN, table(json.loads(RESULT.read_text())), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("halves", "deletion")
    parser.add_argument("--tasks", nargs="+", choices=TINY, default=TINY)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--removed", nargs="+", type=int, default=REMOVED)
    options = parser.parse_args()
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"halves": {}}
    for task in options.tasks:
        if "halves" in options.parts:
            tree["halves"][task] = against_halves(task)
        if "deletion" in options.parts:
            measure(task, tuple(options.removed))
        curves = deletion(task)
        if curves is not None:
            tree.setdefault("deletion", {})[task] = curves
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    write_docs()


if __name__ == "__main__":
    main()
