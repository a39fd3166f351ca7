"""`llmattrib evaluate all` on the two tasks of the ground truth: every question, every method, beside baselines.

    python -m benchmarks.evaluation [--tasks sms facts] [--only NAME ...] [--curves KIND ...]

A 1M-parameter Llama fine-tuned on 200 messages with 20 labels flipped (sms) and on 160 facts (facts), as in
benchmarks/lds.py, which has the linear datamodelling scores on the same tasks. Features at initialisation, exact. One
fine-tune a sub-model: small differences are noise, and the random rankings say how small. Resumes: sub-models that are
there are kept. About a hundred fine-tunes of 3 to 8 seconds; --only and --curves measure a part and leave the other
figures as they are. Writes benchmarks/results/evaluation.json, and the tables and the picture of docs/evaluation.md
(`--tasks` alone renders what is recorded). Needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._pages import fill
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.evaluate.scores import RunScores
from llmattrib.evaluate.suite import EVALUATIONS, evaluate_all
from llmattrib.reduce import reduce_run
from llmattrib.report.plots import curves_picture, interval_of, is_method
from llmattrib.retrain import retrain
from llmattrib.train import train_adapter

HERE = Path(__file__).parent
RESULT = HERE / "results" / "evaluation.json"
PAGE = HERE.parent / "docs" / "evaluation.md"
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- evaluation:begin -->\n", "<!-- evaluation:end -->\n"
FOLDER = Path("runs") / "benchmarks" / "evaluation"
TASKS = ("sms", "facts")
METHODS = ("shapley", "influence", "grad_cos")
NUM_LEFT_OUT = 16
CURVES = ["keep_highest", "remove_highest"]
ELSEWHERE = ("sketch", "lds")  # the features are exact; benchmarks/lds.py has the scores
FRACTIONS = [0.05, 0.1, 0.3]
PARAPHRASES = 30  # of the questions about facts; the others are asked with another country's answer


def rows_of(task: str, name: str) -> list[dict[str, Any]]:
    """Read the data of a task."""
    return [json.loads(line) for line in (HERE / "truth" / f"{task}_{name}.jsonl").read_text().splitlines()]


def write_truth(task: str) -> dict[str, Any]:
    """Write what the committed data say of flipped labels and teaching examples; return the settings that name it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if task == "sms":
        path = FOLDER / "sms_flipped.txt"
        path.write_text("".join(f"{row['id']}\n" for row in rows_of(task, "train") if row["id"].endswith("-flipped")))
        return {"evaluate": {"mislabeled": str(path)}}
    path, lines = FOLDER / "facts_queries.jsonl", []
    for number, row in enumerate(rows_of(task, "queries")):
        lines.append(json.dumps({**row, "taught_by": row["id"] if number < PARAPHRASES else None}) + "\n")
    path.write_text("".join(lines))
    return {"evaluate": {"source": "taught_by"}, "values": {"data": str(path)}}


def task_config(task: str, curves: Sequence[str] = CURVES) -> RunConfig:
    """Return the run of a task."""
    tree = load_config(HERE / "truth" / f"{task}.yaml").model_dump(mode="json")
    truth = write_truth(task)
    tree["run_dir"] = str(FOLDER / task)
    tree["features"]["num_inits"] = 1
    tree["reduce"]["methods"] = list(METHODS)
    tree["retraining"] |= {"design": "leave_out", "num_subsets": NUM_LEFT_OUT, "num_seeds": 1}
    tree["values"] |= truth.get("values", {})
    tree["evaluate"] |= {
        "curves": list(curves),
        "fractions": FRACTIONS,
        "num_random": 2,
        **truth["evaluate"],
    }
    return RunConfig.model_validate(tree)


def measure(task: str, only: Sequence[str], curves: Sequence[str]) -> dict[str, Any]:
    """Run a task from data to figures; what is there is kept."""
    config = task_config(task, curves)
    train_adapter(config)
    build_features(config)
    reduce_run(config)
    if not only or "leave_one_out" in only:
        retrain(config)
    outcome = evaluate_all(RunScores(config), skip=ELSEWHERE, only=only)
    return {
        record.name: {
            "notes": list(record.notes),
            "rows": [rounded(row) for row in record.rows],
            **({"details": record.details} if record.name == "curves" else {}),
        }
        for record in outcome.records
    }


def rounded(row: Any) -> dict[str, Any]:
    """Round what is recorded."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def table(record: dict[str, Any]) -> list[str]:
    """Render the rows of one evaluation: intervals in the cells of their numbers."""
    keys = [key for key in record["rows"][0] if not key.endswith(("low", "high"))]
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|---" * len(keys) + "|"]
    for row in record["rows"]:
        name = str(row["method"])
        cells = [f"**{name}**" if is_method(name, METHODS) else name]
        for key in keys[1:]:
            ends = interval_of(row, key)
            value = "-" if row[key] is None else f"{row[key]:.2f}"
            cells.append(value if ends is None else f"{value} ({ends[0]:.2f} .. {ends[1]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tables(result: dict[str, Any]) -> str:
    """Render everything that was measured for docs/evaluation.md, a heading a question."""
    lines = []
    names = {name for found in result["tasks"].values() for name in found}
    for name in EVALUATIONS:
        if name not in names:
            continue
        lines += [f"## {EVALUATIONS[name].question}", ""]
        if name == "curves":
            lines += [f"![{EVALUATIONS[name].question}]({PICTURE.name})", ""]
        for task, found in result["tasks"].items():
            if name in found:
                notes = "; ".join(found[name]["notes"])
                lines += [f"**{task}** ({notes})", "", *table(found[name]), ""]
    return "\n".join(lines)


def write_docs() -> None:
    """Write the tables into their page, and the picture beside it."""
    result = json.loads(RESULT.read_text())
    fill(PAGE, BEGIN, tables(result), END)
    curves = {task: found["curves"]["details"] for task, found in result["tasks"].items() if "curves" in found}
    if curves:
        PICTURE.write_bytes(curves_picture(curves, METHODS))


def main() -> None:
    """Measure tasks and write the JSON; figures of the other task stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--only", nargs="+", choices=EVALUATIONS, default=())
    parser.add_argument("--curves", nargs="+", default=CURVES)
    options = parser.parse_args()
    found = json.loads(RESULT.read_text())["tasks"] if RESULT.exists() else {}
    for task in options.tasks:
        found[task] = found.get(task, {}) | measure(task, options.only, options.curves)
        RESULT.write_text(
            json.dumps({"tasks": {name: found[name] for name in TASKS if name in found}}, indent=1) + "\n"
        )
    write_docs()


if __name__ == "__main__":
    main()
