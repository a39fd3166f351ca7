"""Linear datamodelling score of ensembles: 1, 3, 5 and 10 initialisations, adapters and checkpoints.

    python -m benchmarks.ensembles [--tasks sms facts] [--kinds inits adapters checkpoints] [--counts 1 3 5 10]

Tasks, truth, scores and intervals are those of benchmarks/lds.py, which also has EK-FAC influence. `inits` are fresh
LoRA matrices of the base model, `adapters` are trained with as many seeds, `checkpoints` are epochs of one seed, evenly
spaced (no more than the task has epochs). Methods with a curvature come twice: of the mean kernel, and as the mean of
the members' own scores (`reduce.ensemble=members`). `ridge 1` and `ridge 10` are shapley and influence at that ridge.

Every member is built by itself, with exact gradients. Its rows and queries are then turned into as many coordinates as
there are rows and queries, which keeps all inner products, and the coordinates of members stand side by side in a store
that `reduce` takes: the features of an ensemble without their millions of columns. Adds to
benchmarks/results/ensembles.json, point by point, and renders docs/choosing.md.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks.lds import adapter, figures
from benchmarks.truth.margins import TINY, load
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.data import load_examples, save_examples
from llmattrib.evaluate.lds import lds
from llmattrib.evaluate.scores import method_scores
from llmattrib.extraction import settings_fingerprint
from llmattrib.features.extract import COLUMNS
from llmattrib.features.sketch import Block, SketchPlan
from llmattrib.manifest import Manifest
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.train import adapter_paths, train_adapter
from llmattrib.values.validation import Validation, load_validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "ensembles.json"
PAGE = HERE.parent / "docs" / "choosing.md"
BEGIN, END = "<!-- ensembles:begin -->\n", "<!-- ensembles:end -->\n"
METHODS = ("shapley", "influence", "trak", "grad_dot")
MEMBERS = ("influence", "trak")
RIDGES = {"shapley": (1.0, 10.0), "influence": (1.0, 10.0)}
KINDS = ("inits", "adapters", "checkpoints")
COUNTS = (1, 3, 5, 10)


def members(task: str, kind: str, count: int) -> Iterator[tuple[str, RunConfig]]:
    """Yield the names and runs of single members, none where a task has not so many; trains their adapters."""
    base = load_config(HERE / "truth" / f"{task}.yaml")
    tree = base.model_dump(mode="json")
    tree["features"] |= {"linearisation": "init" if kind == "inits" else "trained", "num_inits": 1}
    adapters: list[str] = []
    if kind == "adapters":
        adapters = [adapter(base, seed) for seed in range(count)]
    elif kind == "checkpoints" and count <= base.train.epochs:
        train = base.train.model_copy(update={"checkpoints": count})
        own = base.model_copy(update={"run_dir": f"runs/ensembles/{task}/trained", "train": train})
        train_adapter(own)
        adapters = adapter_paths(own)
    for number in range(count if kind == "inits" else len(adapters)):
        name = f"init{number}" if kind == "inits" else adapters[number].replace("runs/", "").replace("/", "-")
        model = {} if kind == "inits" else {"adapters": [adapters[number]]}
        own_tree = {**tree, "seed": number if kind == "inits" else 0, "model": tree["model"] | model}
        yield name, RunConfig.model_validate(own_tree | {"run_dir": f"runs/ensembles/{task}/{name}"})


def coordinates(name: str, config: RunConfig) -> dict[str, np.ndarray]:
    """Return rows [n, n + q], queries [q, n + q] and columns of a member; its features are built and removed again."""
    file = Path(config.run_dir).with_name(f"{name}.npz")
    if not file.exists():
        build_features(config)
        store, validation = RowStore.open(config.layout.features), load_validation(Run(config))
        both = np.concatenate([store.read(0, store.manifest.num_rows)[:, 0], validation.phi[:, 0]]).astype(np.float64)
        values, vectors = np.linalg.eigh(both @ both.T)
        kept = vectors * np.sqrt(np.maximum(values, 0.0))
        columns = {column: store.column(column) for column in store.manifest.columns}
        num_rows = store.manifest.num_rows
        np.savez(file, rows=kept[:num_rows], queries=kept[num_rows:], labels=validation.labels, **columns)
        shutil.rmtree(config.run_dir)
    with np.load(file) as stored:
        return dict(stored)


def agreement(parts: list[dict[str, np.ndarray]]) -> float | None:
    """Return the mean correlation of two members' cosines between training examples; None for a single member."""
    cosines = []
    for part in parts:
        rows = part["rows"] / np.linalg.norm(part["rows"], axis=1, keepdims=True)
        cosines.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    pairs = np.corrcoef(cosines)[np.triu_indices(len(parts), 1)] if len(parts) > 1 else None
    return None if pairs is None else round(float(pairs.mean()), 4)


def ensemble(task: str, kind: str, count: int) -> tuple[RunConfig, Validation, float | None] | None:
    """Return a run whose features are those of an ensemble, up to a rotation; None where it has fewer members."""
    pairs = list(members(task, kind, count))
    if len(pairs) < count:
        return None
    parts = [coordinates(name, config) for name, config in pairs]
    config = pairs[0][1].model_copy(update={"run_dir": f"runs/ensembles/{task}/{kind}{count}"})
    shutil.rmtree(config.run_dir, ignore_errors=True)
    rows, queries = (
        (np.concatenate([part[side] for part in parts], axis=1) / count**0.5).astype(np.float32)[:, None]
        for side in ("rows", "queries")
    )
    width = parts[0]["rows"].shape[1]
    blocks = tuple(Block("all" if kind == "inits" else f"adapter{number}/all", "B", width) for number in range(count))
    plan = SketchPlan("none", 0, width * count, blocks, (width,) * count)
    write_store(config, rows, plan, {name: np.mean([part[name] for part in parts], axis=0) for name in COLUMNS})
    return config, Validation(queries, parts[0]["labels"], "", 0, 0), agreement(parts)


def write_store(config: RunConfig, rows: np.ndarray, plan: SketchPlan, columns: dict[str, np.ndarray]) -> None:
    """Write the features of a run that were not built."""
    manifest = Manifest(
        kind="features",
        num_rows=len(rows),
        num_outputs=1,
        dim=plan.dim,
        dtype="float32",
        shard_size=config.features.shard_size,
        columns=COLUMNS,
        fingerprint=settings_fingerprint(config),
        info={"sketch_plan": plan.to_json()},
    )
    store = RowStore.create(config.layout.features, manifest)
    save_examples(load_examples(config.data), config.layout.examples)
    for shard in store.pending():
        part = slice(*store.shard_range(shard))
        store.write_shard(
            shard, rows[part], {name: column[part].astype(np.float32) for name, column in columns.items()}
        )


def scores_at(config: RunConfig, validation: Validation, count: int, rows: Any) -> dict[str, Any]:
    """Return the score of every method of a run."""
    variants: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [("", METHODS, {})]
    variants += [(f", ridge {ridge:g}", (method,), {"ridge": ridge}) for method in RIDGES for ridge in RIDGES[method]]
    if count > 1:
        variants.append((", members", MEMBERS, {"ensemble": "members"}))
    found = {}
    for suffix, methods, settings in variants:
        tree = {"methods": methods, "certificate_draws": 0, "form": "total_gradient", **settings}
        own = config.model_copy(update={"reduce": config.reduce.model_copy(update=tree)})
        chosen = {result.method: result.ridge for result in reduce_run(own)}
        for method in methods:
            score = figures(lds(method_scores(Run(own), method, validation), rows))
            found[method + suffix] = score | {"ridge": chosen[method]}
    return found


def record(task: str, known: dict[str, Any], name: str, found: dict[str, Any], agree: float | None) -> None:
    """Add the scores of one point, and how much its members agree, to the result file."""
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    old = tree["tasks"].get(task, {})
    points, agreements = old.get("points", {}) | {name: found}, old.get("agreement", {}) | {name: agree}
    tree["tasks"][task] = {**known, "points": points, "agreement": agreements}
    RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    print(task, name, {method: (cell["beyond_size"], cell["ridge"]) for method, cell in found.items()}, flush=True)


def table(result: dict[str, Any]) -> str:
    """Render the scores: a row a method, a column an ensemble."""
    lines = []
    for task, found in result["tasks"].items():
        points = found["points"]
        names = [f"{kind} {count}" for kind in KINDS for count in COUNTS if f"{kind} {count}" in points]
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
        chosen = [points[name]["shapley"]["ridge"] for name in names]
        agree = ["" if (value := found["agreement"][name]) is None else f"{value:.2f}" for name in names]
        lines += [
            "| *ridge of shapley* | " + " | ".join(f"{ridge:g}" for ridge in chosen) + " |",
            "| *agreement of members* | " + " | ".join(agree) + " |",
            "",
        ]
    return "\n".join(lines)


def write_docs() -> None:
    """Write the table into its page."""
    fill(PAGE, BEGIN, table(json.loads(RESULT.read_text())), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TINY, default=TINY)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=COUNTS)
    options = parser.parse_args()
    for task in options.tasks:
        rows, margins = load(task)
        known = {"seeds": len(margins), "subsets": len(rows.p), "queries": margins.shape[2]}
        for kind in options.kinds:
            for count in options.counts:
                made = ensemble(task, kind, count)
                if made is not None:
                    config, validation, agree = made
                    record(task, known, f"{kind} {count}", scores_at(config, validation, count, rows), agree)
    write_docs()


if __name__ == "__main__":
    main()
