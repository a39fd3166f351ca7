"""Linear datamodelling score of ensembles: 1, 3, 5 and 10 initialisations, adapters and checkpoints.

    python -m benchmarks.ensembles [--tasks sms facts] [--kinds inits adapters checkpoints ekfac] [--counts 1 3 5 10]

Tasks, truth, scores and intervals are those of benchmarks/lds.py. `inits` are fresh LoRA matrices of the base model,
`adapters` are trained with as many seeds, `checkpoints` are epochs of one seed, evenly spaced (as many as the task has
epochs at most). Methods with a curvature come twice: of the mean kernel, and as the mean of the members' own scores
(`reduce.ensemble=members`). `ekfac` is EK-FAC influence at `init`, at an early adapter and at a trained one. Adds to
benchmarks/results/ensembles.json, point by point, and renders docs/choosing.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.lds import WHITENED, adapter, figures, variant
from benchmarks.truth.margins import TASKS, load
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.evaluate.lds import lds
from llmattrib.evaluate.scores import method_scores
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.train import adapter_paths, train_adapter
from llmattrib.values.validation import load_validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "ensembles.json"
PAGE = HERE.parent / "docs" / "choosing.md"
BEGIN, END = "<!-- ensembles:begin -->\n", "<!-- ensembles:end -->\n"
METHODS = ("shapley", "influence", "trak", "grad_dot")
MEMBERS = ("influence", "trak")
KINDS = ("inits", "adapters", "checkpoints")
COUNTS = (1, 3, 5, 10)
EKFAC_POINTS = {"init": "inits", "early": "early adapter", "trained": "adapters"}


def point(task: str, kind: str, count: int) -> RunConfig | None:
    """Return the run of an ensemble, its adapters trained; None where there are not so many checkpoints."""
    base = load_config(HERE / "truth" / f"{task}.yaml")
    tree = base.model_dump(mode="json")
    tree["run_dir"] = f"runs/ensembles/{task}/{kind}{count}"
    tree["features"] |= {"linearisation": "init" if kind == "inits" else "trained", "num_inits": 1}
    tree["reduce"] |= {"methods": list(METHODS), "certificate_draws": 0}
    if kind == "inits":
        tree["features"]["num_inits"] = count
    elif kind == "adapters":
        tree["model"]["adapters"] = [adapter(base, seed) for seed in range(count)]
    elif count > base.train.epochs:
        return None
    else:
        train = base.train.model_copy(update={"checkpoints": count})
        own = base.model_copy(update={"run_dir": f"runs/ensembles/{task}/checkpoints", "train": train})
        train_adapter(own)
        tree["model"]["adapters"] = adapter_paths(own)
    return RunConfig.model_validate(tree)


def scores_at(config: RunConfig, rows: Any) -> dict[str, Any]:
    """Return the score of every method of a run, and of every method with members of its own where there are any."""
    build_features(config)
    reduce_run(config)
    found = {}
    run = Run(config)
    validation = load_validation(run)
    for method in config.reduce.methods:
        found[method] = figures(lds(method_scores(run, method, validation), rows))
    if len(config.model.adapters) > 1:
        reduce = config.reduce.model_copy(update={"methods": MEMBERS, "ensemble": "members"})
        own = config.model_copy(update={"reduce": reduce})
        reduce_run(own)
        for method in MEMBERS:
            found[f"{method}, members"] = figures(lds(method_scores(Run(own), method, validation), rows))
    return found


def ekfac_at(task: str, where: str, rows: Any) -> dict[str, Any]:
    """Return the score of EK-FAC influence at one point of benchmarks/lds.py."""
    config = variant(task, where, 1, "ekfac")
    build_features(config)
    reduce_run(config)
    run = Run(config)
    return {WHITENED["grad_dot"]: figures(lds(method_scores(run, "grad_dot", load_validation(run)), rows))}


def record(task: str, known: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Add the scores of one point to the result file."""
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    points = tree["tasks"].get(task, {}).get("points", {})
    points[name] = points.get(name, {}) | found
    tree["tasks"][task] = {**known, "points": points}
    RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    print(task, name, {method: cell["lds"] for method, cell in found.items()}, flush=True)


def table(result: dict[str, Any]) -> str:
    """Render the scores: a row a method, a column an ensemble."""
    lines = []
    for task, found in result["tasks"].items():
        points = found["points"]
        names = [f"{kind} {count}" for kind in KINDS for count in COUNTS if f"{kind} {count}" in points]
        names += [name for name in points if name not in names]
        lines += [
            f"**{task}** ({found['subsets']} sub-models x {found['seeds']} seeds, {found['queries']} prompts)",
            "",
            "| | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for method in dict.fromkeys(method for name in names for method in points[name]):
            cells = [points[name].get(method) for name in names]
            texts = [f"{cell['beyond_size']:.2f}; {cell['lds']:.2f}" if cell else "" for cell in cells]
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def write_docs() -> None:
    """Write the table into its page."""
    text, rendered = PAGE.read_text(encoding="utf-8"), table(json.loads(RESULT.read_text()))
    PAGE.write_text(text.partition(BEGIN)[0] + BEGIN + rendered + END + text.partition(END)[2], encoding="utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "ekfac"], default=[*KINDS, "ekfac"])
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=COUNTS)
    options = parser.parse_args()
    for task in options.tasks:
        rows, margins = load(task)
        known = {"seeds": len(margins), "subsets": len(rows.p), "queries": margins.shape[2]}
        for kind in options.kinds:
            if kind == "ekfac":
                for where, name in EKFAC_POINTS.items():
                    label = name if where == "early" else f"{name} 1"
                    record(task, known, label, ekfac_at(task, where, rows))
                continue
            for count in options.counts:
                config = point(task, kind, count)
                if config is not None:
                    record(task, known, f"{kind} {count}", scores_at(config, rows))
    write_docs()


if __name__ == "__main__":
    main()
