"""Peak memory of each stage against the number of examples.

    python -m benchmarks.memory [--rows 1000 4000 16000] [--stages build reduce_influence ...]

A run for each number of examples: text messages (repeated, with a number before each, beyond 5,574) on the Llama of
1M parameters, features of 512 dimensions of the margin of two label words, representers with the settings a run has
by default. `train` is one epoch, `values` those of `shapley` over 500 messages. Each stage is a process of its own, one
thread: its peak resident memory (VmHWM of a new program, which does not begin at its parent's as ru_maxrss does), and
what of it importing alone took. `reduce_streamed` and `reduce_memory` are `shapley` by its `streamed` form, and by the
one that `auto` takes up to 20,000 examples, each with the certificate. `index_*` are of `influence`; an index is built
in memory, and mapped from its file when it is searched. `query_*` is a prompt answered from the start: model, texts,
index.

Writes benchmarks/results/memory.json, a process at a time; `benchmarks.render` makes the table.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._process import measured, peak_bytes
from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.index import build_index
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.train import train_adapter

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "memory.json"
ASSET = ROOT / "llmattrib" / "assets" / "sms_spam.jsonl"
DIM, WORDS = 512, {"ham": "A", "spam": "B"}
NUM_VALIDATION = 500


def run_of(folder: Path, method: str = "influence", form: str = "auto", kind: str = "flat") -> RunConfig:
    """Return the config of a run with one method and one kind of index."""
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(ROOT / "benchmarks/truth/llama_1m"), "lora": {"rank": 8, "alpha": 16}},
        "data": {"train": str(folder / "messages.jsonl"), "label_words": list(WORDS.values()), "overlong": "truncate"},
        "features": {"output": "margin", "sketch": {"dim": DIM}},
        "reduce": {"methods": [method], "form": form},
        "index": {"kind": kind},
        "query": {"method": method},
        "train": {"epochs": 1},
        "values": {"data": str(folder / "validation.jsonl")},
    }
    return validate_config(tree)


def write_messages(folder: Path, num_rows: int) -> None:
    """Write the training set, and the validation set."""
    rows = [json.loads(line) for line in ASSET.read_text(encoding="utf-8").splitlines()]
    with (folder / "messages.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            again, row = divmod(number, len(rows))
            text = f"{again} {rows[row]['text']}" if again else rows[row]["text"]
            file.write(json.dumps({"prompt": text, "completion": WORDS[rows[row]["label"]]}) + "\n")
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[-NUM_VALIDATION:]:
            file.write(json.dumps({"prompt": row["text"], "completion": WORDS[row["label"]]}) + "\n")


def index(folder: Path, kind: str) -> None:
    """Build an index of a kind in place of the one that is there."""
    shutil.rmtree(folder / "run" / "index", ignore_errors=True)
    build_index(run_of(folder, kind=kind), "influence")


def values(folder: Path) -> None:
    """Value the training set, and certify the signs."""
    from llmattrib.values.stage import compute_values  # scikit-learn, which no other stage imports

    compute_values(run_of(folder, "shapley"))


def train(folder: Path) -> None:
    """Fine-tune an adapter beside the run, whose answers stay those of the base model."""
    train_adapter(run_of(folder).model_copy(update={"run_dir": str(folder / "trained")}))


def query(folder: Path, kind: str) -> None:
    """Answer a prompt."""
    assert Run(run_of(folder, kind=kind)).query("Are you coming home for dinner tonight?", "A", top=100).helpful


STAGES: dict[str, Callable[[Path], object]] = {
    "train": train,
    "build": lambda folder: build_features(run_of(folder)),
    "reduce_influence": lambda folder: reduce_run(run_of(folder)),
    "reduce_streamed": lambda folder: reduce_run(run_of(folder, "shapley", "streamed")),
    "reduce_memory": lambda folder: reduce_run(run_of(folder, "shapley")),
    "index_flat": lambda folder: index(folder, "flat"),
    "query_flat": lambda folder: query(folder, "flat"),
    "index_scan": lambda folder: index(folder, "scan"),
    "query_scan": lambda folder: query(folder, "scan"),
    "values": values,
}
"""Stages in the order in which one needs the other."""


def work(folder: Path, stage: str) -> dict[str, Any]:
    """Do a stage in this process and return its figures."""
    imported, cpu = peak_bytes(), time.process_time()
    STAGES[stage](folder)
    return {
        "imported_bytes": imported,
        "peak_bytes": peak_bytes(),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def keep(num_rows: int, stage: str, figures: dict[str, Any]) -> None:
    """Put the figures of a stage in place of older ones."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"dim": DIM, "stages": {}}
    row = {**found["stages"].get(stage, {}), str(num_rows): figures}
    found["stages"][stage] = dict(sorted(row.items(), key=lambda item: int(item[0])))
    found["stages"] = {name: found["stages"][name] for name in STAGES if name in found["stages"]}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 4_000, 16_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", nargs=2, metavar=("FOLDER", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(Path(arguments.work[0]), arguments.work[1])))
        return
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_messages(Path(folder), num_rows)
            for stage in arguments.stages:
                figures = measured("memory", folder, stage)
                print(num_rows, stage, figures, flush=True)
                keep(num_rows, stage, figures)


if __name__ == "__main__":
    main()
