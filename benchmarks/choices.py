"""What the smaller settings are worth: output function, response and sketch size, by linear datamodelling score.

    python -m benchmarks.choices [--tasks sms facts]

Tasks and truth are those of benchmarks/lds.py; Shapley at initialisation, everything else as by default. One setting is
changed at a time: `features.output` and `reduce.response` with exact gradients, then `features.sketch.dim` with the
rows that a sketch stores by default. Writes benchmarks/results/choices.json and renders docs/choosing.md.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._pages import fill
from benchmarks.lds import figures
from benchmarks.truth.margins import TINY, load
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.evaluate.lds import lds
from llmattrib.evaluate.scores import method_scores
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.values.validation import load_validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "choices.json"
PAGE = HERE.parent / "docs" / "choosing.md"
BEGIN, END = "<!-- choices:begin -->\n", "<!-- choices:end -->\n"
OUTPUTS = {"sms": ("loss", "log_odds", "margin", "logits", "pntk"), "facts": ("loss", "log_odds", "pntk")}
DIMS = (256, 1024, 4096, 16384)


def variants(task: str) -> Iterator[tuple[str, RunConfig]]:
    """Yield the name and the run of every setting."""
    base = load_config(HERE / "truth" / f"{task}.yaml").model_dump(mode="json")
    base["features"]["num_inits"] = 1
    base["reduce"] |= {"methods": ["shapley"], "certificate_draws": 0}

    def run(name: str, features: dict[str, Any], reduce: dict[str, Any]) -> tuple[str, RunConfig]:
        sections = {"features": base["features"] | features, "reduce": base["reduce"] | reduce}
        folder = f"runs/choices/{task}/{name.replace(' ', '_')}"
        return name, RunConfig.model_validate(base | sections | {"run_dir": folder})

    for output in OUTPUTS[task]:
        yield run(f"output {output}", {"output": output}, {})
    yield run("response residual", {}, {"response": "residual"})
    for dim in DIMS:
        yield run(f"sketch {dim}", {"sketch": {"kind": "oporp", "dim": dim}, "dtype": "auto"}, {})


def measure(task: str) -> dict[str, Any]:
    """Return the score of every setting of a task."""
    truth, found = load(task)[0], {}
    for name, config in variants(task):
        build_features(config)
        reduce_run(config)
        run = Run(config)
        found[name] = figures(lds(method_scores(run, "shapley", load_validation(run)), truth))
        print(task, name, found[name], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """Render the scores: a row a setting, a column a task."""
    names = dict.fromkeys(name for found in result["tasks"].values() for name in found)
    lines = ["| | " + " | ".join(result["tasks"]) + " |", "|---" * (len(result["tasks"]) + 1) + "|"]
    for name in names:
        cells = [found.get(name) for found in result["tasks"].values()]
        texts = [f"{cell['beyond_size']:.2f}; {cell['lds']:.2f}" if cell else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """Write the table into its page."""
    fill(PAGE, BEGIN, table(json.loads(RESULT.read_text())), END)


def main() -> None:
    """Measure and write; figures of the other task stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TINY, default=TINY)
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    for task in parser.parse_args().tasks:
        tree["tasks"][task] = measure(task)
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    write_docs()


if __name__ == "__main__":
    main()
