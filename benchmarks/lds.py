"""Linear datamodelling score of every method against models retrained on random halves of the data.

    python -m benchmarks.lds [--tasks sms facts] [--points init early trained both] [--preconditioners none ekfac]

Three tasks (benchmarks/truth/). On a 1M-parameter Llama: SMS spam through two label tokens, where answers share no word
with the messages, and factbook questions. On SmolLM2-135M: factbook questions, with one model a point. Truth:
benchmarks/truth/<task>_margins.npz, sub-models on random halves, mean over training seeds. Scores: exact gradients (no
sketch), each method at its own defaults.

Methods are named `method` (features at initialisation, one of them: the default), `method, k inits`, `method, early`
(features at an adapter after a fine-tune of 2 epochs), `method, k trained` (features at k adapters trained with
different seeds), `method, both` (features at the early adapter and at a trained one together) and `method,
k checkpoints` (features at k epochs of one fine-tune, evenly spaced). `ekfac_influence` and `ekfac_shapley` are
grad_dot and Shapley on features whitened by EK-FAC. Baselines are those of `llmattrib evaluate`, rows of bergson those
of `benchmarks.peers.bergson_lds`.
`one_seed` is the score of one seed's margins against the mean of the others, sub-model by sub-model, and `ceiling` what
a score that knew all but the noise of the seeds would have (llmattrib/evaluate/lds.py).
Intervals are 95 %, over prompts and subsets. Adds to benchmarks/results/lds.json, task by task and name
by name, and renders docs/choosing.md.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks.truth.margins import TASKS, TINY, load
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.evaluate.lds import Lds, lds, reachable, seed_agreement
from llmattrib.evaluate.scores import BASELINES, baseline_scores, method_scores
from llmattrib.games.subset_table import SubsetRows
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.train import train_adapter
from llmattrib.values.validation import load_validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "lds.json"
PAGE = HERE.parent / "docs" / "choosing.md"
BEGIN, END = "<!-- lds:begin -->\n", "<!-- lds:end -->\n"
DEFAULT = "shapley"
METHODS = ("shapley", "banzhaf", "leave_one_out", "influence", "trak", "datainf", "grad_dot", "grad_cos")
WHITENED = {"grad_dot": "ekfac_influence", "shapley": "ekfac_shapley"}
"""Methods on features whitened by EK-FAC."""
POINTS = {"init": (1, 5), "early": (1,), "trained": (1, 5), "both": (1,), "checkpoints": (3, 5)}
EARLY_EPOCHS = 2


def figures(found: Lds) -> dict[str, Any]:
    """Return what is recorded of a score."""
    interval = [round(found.low, 4), round(found.high, 4)]
    return {"lds": round(found.lds, 4), "ci95": interval, "beyond_size": round(found.beyond_size, 4)}


def variant(task: str, point: str, count: int, preconditioner: str = "none") -> RunConfig:
    """Return the run of one linearisation point; trains its adapters."""
    base = load_config(HERE / "truth" / f"{task}.yaml")
    tree = base.model_dump(mode="json")
    tree["run_dir"] = f"runs/lds/{task}/{point}{count}"
    tree["features"]["linearisation"] = "init" if point == "init" else "trained"
    tree["features"]["num_inits"] = count if point == "init" else 1
    tree["reduce"]["methods"] = list(METHODS)
    if preconditioner != "none":
        tree["run_dir"] += f"_{preconditioner}"
        tree["features"]["preconditioner"] = preconditioner
        tree["reduce"]["methods"] = ["grad_dot", "shapley"]
    if point == "trained":
        tree["model"]["adapters"] = [adapter(base, seed) for seed in range(count)]
    elif point in ("early", "both"):
        few = base.train.model_copy(update={"epochs": EARLY_EPOCHS})
        early = [adapter(base.model_copy(update={"train": few}), 0, "early")]
        tree["model"]["adapters"] = [adapter(base, 0), *early] if point == "both" else early
    elif point == "checkpoints":
        tree["train"]["checkpoints"] = count
        train_adapter(RunConfig.model_validate(tree))
    return RunConfig.model_validate(tree)


def adapter(base: RunConfig, seed: int, name: str = "adapter") -> str:
    """Train the adapter of one seed on all examples."""
    run_dir = base.run_dir.replace("truth_", "lds/") + f"/{name}{seed}"
    return train_adapter(base.model_copy(update={"run_dir": run_dir, "seed": seed})).path


def scores_of(config: RunConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the scores of every method of a run, from its features on."""
    build_features(config)
    reduce_run(config)
    run, is_whitened = Run(config), config.features.preconditioner == "ekfac"
    validation = load_validation(run)
    for method in config.reduce.methods:
        yield (WHITENED[method] if is_whitened else method), method_scores(run, method, validation)
    if config.run_dir.endswith("init1"):
        for baseline in BASELINES:
            yield baseline, baseline_scores(run, baseline)
    layout = config.layout
    for path in (layout.features, layout.path("representers"), layout.validation):  # not sketched: tens of GB in all
        shutil.rmtree(path, ignore_errors=True)


def name_of(method: str, point: str, count: int) -> str:
    """Return the name of a method at a linearisation point."""
    if method in BASELINES or (point, count) == ("init", 1):
        return method
    several = f"{count} {'inits' if point == 'init' else point}"
    return f"{method}, {point if point in ('early', 'both') else several}"


def truth_of(rows: SubsetRows, margins: np.ndarray) -> dict[str, Any]:
    """Return what the truth holds; of several seeds also how well they agree, and what can be reached."""
    found = {"seeds": len(margins), "subsets": len(rows.p), "queries": margins.shape[2]}
    if len(margins) > 1:
        one = seed_agreement(margins)
        found |= {"one_seed": round(one, 4), "ceiling": round(reachable(one, len(margins)), 4)}
    return found


def merge(task: str, found: dict[str, Any], methods: dict[str, Any]) -> None:
    """Add to the result file."""
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    old = tree["tasks"].get(task, {}).get("methods", {})
    ranked = sorted((old | methods).items(), key=lambda item: -item[1]["lds"])
    tree = {"default_method": DEFAULT, "tasks": tree["tasks"] | {task: {**found, "methods": dict(ranked)}}}
    RESULT.write_text(json.dumps(tree, indent=1) + "\n")


def cell_text(cell: dict[str, Any]) -> str:
    """Render one score."""
    return f"{cell['beyond_size']:.2f}; {cell['lds']:.2f} ({cell['ci95'][0]:.2f}-{cell['ci95'][1]:.2f})"


def table(result: dict[str, Any]) -> str:
    """Render the scores for docs/choosing.md: a row a method, a column a linearisation point."""
    columns = {
        "init": "",
        "5 inits": ", 5 inits",
        "early": ", early",
        "1 adapter": ", 1 trained",
        "5 adapters": ", 5 trained",
        "both": ", both",
        "3 checkpoints": ", 3 checkpoints",
        "5 checkpoints": ", 5 checkpoints",
    }
    lines = []
    for task, found in result["tasks"].items():
        sub_models = f"{found['subsets']} sub-models x {found['seeds']} seeds, {found['queries']} prompts"
        lines += [
            f"**{task}** ({sub_models})",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        peers = sorted({name.partition(",")[0] for name in found["methods"] if name.startswith("bergson")})
        for method in (*METHODS, *WHITENED.values(), *peers, *BASELINES):
            cells = [found["methods"].get(method + suffix) for suffix in columns.values()]
            texts = [cell_text(cell) if cell else "" for cell in cells]
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def write_docs() -> None:
    """Write the table into its page."""
    fill(PAGE, BEGIN, table(json.loads(RESULT.read_text())), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--preconditioners", nargs="+", choices=["none", "ekfac"], default=["none", "ekfac"])
    options = parser.parse_args()
    for task in options.tasks:
        rows, margins = load(task)
        found = truth_of(rows, margins)
        for point in options.points:
            for count in POINTS[point] if task in TINY else POINTS[point][:1]:
                methods = {}
                configs = [variant(task, point, count, preconditioner) for preconditioner in options.preconditioners]
                for method, scores in chain.from_iterable(map(scores_of, configs)):
                    name = name_of(method, point, count)
                    methods[name] = figures(lds(scores, rows))
                    print(task, name, methods[name], flush=True)
                merge(task, found, methods)
    write_docs()


if __name__ == "__main__":
    main()
