"""Search times and recall of each kind of index, and what a warm query adds to forward and backward of its prompt.

    python -m benchmarks.query [--parts search warm cold] [--sizes 10000 100000 1000000]

`search`: representers are synthetic, with the spectrum of real ones. Features of 5,574 text messages (margin of two
label words, 1M-parameter Llama, OPORP to 512 dimensions) give a mean, a covariance and the spread of norms. Features
are drawn from these, and representers are those of influence at ridge 0.1 over n such features. They are nearly white
in the coordinates that matter, without clusters: hard for lists and graphs. Queries are other draws of the features,
and so of the very distribution that the coordinates of `scan` and `ivfpq` are fitted to: their best case. One query at
a time, the hundred best, through llmattrib.index; median wall and CPU milliseconds. Recall is against `flat`.

`warm`: SmolLM2-135M, LoRA of rank 8, a prompt with its completion: `Run.query` of an opened run against forward and
backward of the same tokens with the same LoRA; alternating, one thread, medians of CPU time.

`cold`: CPU seconds of `llmattrib --help` and of `llmattrib query` in a new process, and of the parts of such a query;
medians of three.

Writes benchmarks/results/query.json, a part at a time, and the table of docs/architecture.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks._process import children_seconds
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config, validate_config
from llmattrib.index import build_index, open_index
from llmattrib.manifest import Manifest
from llmattrib.rng import stream
from llmattrib.settings import resolve
from llmattrib.store import RowStore

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "query.json"
PAGE, BEGIN, END = ROOT / "docs" / "architecture.md", "<!-- query:begin -->\n", "<!-- query:end -->\n"
FOLDER = Path("runs") / "benchmarks" / "query"
DIM, RIDGE, SHARD_SIZE, METHOD = 512, 0.1, 4096, "influence"
NUM_QUERIES, TOP, TIMED, MOST_SECONDS = 100, 100, 40, 3
NUM_FEATURES = 65_536  # of the store that the coordinates of a scan are found from
KINDS = ("flat", "scan", "hnsw", "ivfpq")
COLD = 3
PROFILE = """
import json, sys, time
marks = {"Python": time.process_time()}
import torch; marks["import torch"] = time.process_time()
import transformers.models.llama.modeling_llama, peft; marks["import transformers and peft"] = time.process_time()
from llmattrib.query import Run; marks["import llmattrib, faiss, zarr"] = time.process_time()
run = Run.open(sys.argv[1])
run.extractor, run.sketch; marks["load the model"] = time.process_time()
run.load(); marks["open index and texts"] = time.process_time()
run.query(*sys.argv[2:]); marks["the query"] = time.process_time()
ends = list(marks.values())
print(json.dumps(dict(zip(marks, [end - begin for begin, end in zip([0, *ends], ends)]))))
"""


def real_features() -> np.ndarray:
    """Return the features [5574, 512] of the messages, computing them first."""
    folder = FOLDER / "messages"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (ROOT / "llmattrib/assets/sms_spam.jsonl").read_text("utf-8").splitlines()]
    words = {"ham": "A", "spam": "B"}
    lines = (json.dumps({"prompt": f"{row['text']}\nAnswer:", "completion": words[row["label"]]}) for row in rows)
    (folder / "messages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = validate_config(
        {
            "run_dir": str(folder),
            "model": {"name": "benchmarks/truth/llama_1m", "lora": {"rank": 8, "alpha": 16}},
            "data": {"train": str(folder / "messages.jsonl"), "label_words": ["A", "B"], "overlong": "truncate"},
            "features": {"output": "margin", "sketch": {"dim": DIM}},
        }
    )
    build_features(config)
    return np.concatenate([block[:, 0] for _, block in RowStore.open(config.layout.features).blocks()])


class Population:
    """Features with the mean, covariance and spread of norms of real ones."""

    def __init__(self, rows: np.ndarray) -> None:
        wide = rows.astype(np.float64)
        self.mean = wide.mean(axis=0)
        values, axes = np.linalg.eigh(np.cov(wide.T))
        self.root = (axes * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        norms = np.linalg.norm(wide, axis=1)
        self.scales = (norms / np.sqrt((norms**2).mean())).astype(np.float32)
        self.moment = wide.T @ wide / len(wide)

    def draw(self, num_rows: int, *names: str) -> np.ndarray:
        """Return features [n, 512]."""
        rng = stream(0, "benchmark", "query", *names)
        rows = rng.standard_normal((num_rows, DIM), np.float32) @ self.root.T + self.mean.astype(np.float32)
        return rows * rng.choice(self.scales, num_rows)[:, None]

    def influence(self, num_rows: int) -> np.ndarray:
        """Return what turns features into representers of influence over so many of them."""
        gram = num_rows * self.moment
        return np.linalg.inv(gram + RIDGE * np.trace(self.moment) * np.eye(DIM)).astype(np.float32)


def run_of(folder: Path, kind: str) -> RunConfig:
    """A run of which stores alone are there."""
    tree = {"run_dir": str(folder), "model": {"name": "none"}, "data": {"train": "none"}, "index": {"kind": kind}}
    return validate_config({**tree, "reduce": {"methods": [METHOD]}})


def write_stores(folder: Path, population: Population, num_rows: int) -> None:
    """Write features for the coordinates, and representers."""
    config = run_of(folder, "flat")
    features = RowStore.create(
        config.layout.features, Manifest("features", NUM_FEATURES, 1, DIM, "float16", SHARD_SIZE)
    )
    for shard in features.pending():
        rows = population.draw(SHARD_SIZE, "features", str(shard))
        features.write_shard(shard, rows[:, None], {})
    settings = resolve(config.reduce, METHOD, "margin", False, num_rows, DIM)
    manifest = Manifest(
        "representers",
        num_rows,
        1,
        DIM,
        "float32",
        SHARD_SIZE,
        fingerprint={"features": features.digest()},
        info=vars(settings),
    )
    store, weights = RowStore.create(config.layout.representers(METHOD), manifest), population.influence(num_rows)
    store.write_vector("mean", np.zeros((1, DIM), np.float32))
    store.write_vector("total", np.zeros((1, DIM), np.float32))
    for shard in store.pending():
        start, stop = store.shard_range(shard)
        rows = population.draw(stop - start, "examples", str(shard)) @ weights
        store.write_shard(shard, rows[:, None], {})


def milliseconds(run: Callable[[int], object]) -> tuple[float, float]:
    """Return median wall and CPU milliseconds of some calls."""
    run(0)
    times = []
    began = time.perf_counter()
    for k in range(TIMED):
        if len(times) >= 5 and time.perf_counter() - began > MOST_SECONDS:
            break
        wall, cpu = time.perf_counter(), time.process_time()
        run(k)
        times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return tuple(round(statistics.median(column), 2) for column in zip(*times, strict=True))  # type: ignore[return-value]


def search_kind(
    folder: Path, kind: str, queries: np.ndarray, exact: np.ndarray | None, threads: list[int]
) -> tuple[dict[str, Any], Any]:
    """Build an index in this process, time its searches, and count what it finds."""
    import faiss

    config = run_of(folder, kind)
    cpu = time.process_time()
    built = build_index(config, METHOD)
    row: dict[str, Any] = {
        "kind": kind,
        "rows": built.num_rows,
        "build_cpu_seconds": round(time.process_time() - cpu, 1),
        "build_seconds": round(built.seconds, 1),
        "file_bytes": built.num_bytes,
    }
    index = open_index(config, METHOD)
    for count in threads:
        faiss.omp_set_num_threads(count)
        wall, cpu = milliseconds(lambda k: index.search(queries[k : k + 1], TOP))
        both, both_cpu = milliseconds(lambda k: index.extremes(queries[k : k + 1], TOP))
        times = {"search_ms": wall, "search_cpu_ms": cpu, "both_sides_ms": both, "both_sides_cpu_ms": both_cpu}
        row[f"threads_{count}"] = times
    found = index.search(queries, TOP)[1]
    if exact is not None:
        for top in (10, TOP):
            shared = [len(set(a[:top]) & set(b[:top])) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
            row[f"recall_at_{top}"] = round(float(np.mean(shared)) / top, 4)
    return row, found


def resident_bytes(folder: Path, kind: str) -> dict[str, int]:
    """Return the memory of a new process that opened an index and searched it: of its own, and of mapped files."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from benchmarks.query import run_of, METHOD, TOP;"
        "from llmattrib.index import open_index;"
        "lines = lambda: {l.split(':')[0]: int(l.split()[1]) * 1024"
        " for l in open('/proc/self/status') if l.startswith('Rss')};"
        "before = lines(); index = open_index(run_of(Path(sys.argv[1]), sys.argv[2]), METHOD);"
        "[index.search(q[None], TOP) for q in np.load(sys.argv[3])[:40]]; after = lines();"
        "print(after['RssAnon'] - before['RssAnon'], after['RssFile'] - before['RssFile'])"
    )
    command = [sys.executable, "-c", code, str(folder), kind, str(folder / "queries.npy")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    own, mapped = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()
    return {"resident_bytes": int(own), "mapped_bytes": int(mapped)}


def search(sizes: list[int], kinds: list[str], threads: list[int]) -> dict[str, Any]:
    """Measure kinds at sizes, and keep what is known of the others; `flat` comes first, as the truth of recall."""
    rows = {(row["rows"], row["kind"]): row for row in results().get("search", {}).get("rows", [])}
    for num_rows in sizes:
        folder = FOLDER / str(num_rows)
        exact = folder / "exact.npy"
        if not exact.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_stores(folder, Population(real_features()), num_rows)
            np.save(folder / "queries.npy", Population(real_features()).draw(NUM_QUERIES, "queries"))
        queries = np.load(folder / "queries.npy")
        for kind in kinds:
            shutil.rmtree(folder / "index", ignore_errors=True)
            load, truth = os.getloadavg()[0], None if kind == "flat" else np.load(exact)
            row, found = search_kind(folder, kind, queries, truth, threads)
            if kind == "flat":
                np.save(exact, found)
            row = {**row, **resident_bytes(folder, kind), "load_before": round(load, 1)}
            rows[num_rows, kind] = row
            print(row, flush=True)
            shutil.rmtree(folder / "index")
            merge("search", _searches(rows))
    return _searches(rows)


def _searches(rows: dict[tuple[int, str], dict[str, Any]]) -> dict[str, Any]:
    order = sorted(rows, key=lambda key: (key[0], KINDS.index(key[1])))
    return {"dim": DIM, "top": TOP, "queries": NUM_QUERIES, "rows": [rows[key] for key in order]}


def results() -> dict[str, Any]:
    """Return what was written so far."""
    return dict(json.loads(RESULT.read_text())) if RESULT.exists() else {}


def warm(rounds: int) -> dict[str, Any]:
    """Time queries of an opened run of SmolLM2 and forward and backward of the same tokens."""
    import torch

    from llmattrib.encoding import collate, encode
    from llmattrib.forward import completion_logits
    from llmattrib.hits import Query
    from llmattrib.model import load_model
    from llmattrib.query import Run
    from llmattrib.reduce import reduce_run

    torch.set_num_threads(1)
    overrides = [f"run_dir={FOLDER / 'smollm2'}", "data.limit=16", "reduce.methods=[influence]"]
    config = load_config(ROOT / "configs" / "smollm2_factbook.yaml", [*overrides, "query.method=influence"])
    build_features(config)
    reduce_run(config)
    build_index(config, METHOD)
    run = Run(config)
    run.load()
    example = run.examples[0]
    prompt, completion = example.prompt_text, example.completion
    trainable = load_model(config.model, adapters=[])
    for key, parameter in trainable.model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    asked = Query.of(prompt, completion).answered(completion)
    encoded = encode(asked, trainable.tokenizer, config.data, max_length=trainable.max_length)

    def plain() -> None:
        logits, _, target = completion_logits(trainable.model, collate([encoded], trainable.pad_id))
        torch.nn.functional.cross_entropy(logits, target).backward()
        trainable.model.zero_grad(set_to_none=True)

    def seconds(call: Callable[[], object]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "query": lambda: run.query(prompt, completion),
        "features": lambda: run.features([asked], [encoded]),
    }
    for call in calls.values():
        call()
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    added = [one["query"] / one["plain"] - 1 for one in times]
    return {
        "tokens": len(encoded),
        "examples": len(run.examples),
        "rounds": rounds,
        **{f"{name}_cpu_seconds": round(statistics.median(one[name] for one in times), 4) for name in calls},
        "added": round(statistics.median(added), 4),
        "added_range": [round(min(added), 4), round(max(added), 4)],
    }


def cold() -> dict[str, Any]:
    """Return CPU seconds of new processes: help, a query of the run that `warm` made, and where those of one go."""
    folder = str(FOLDER / "smollm2")
    rows = [json.loads(line) for line in (ROOT / "llmattrib/assets/factbook_qa.jsonl").read_text("utf-8").splitlines()]
    asked = ["--prompt", rows[0]["question"], "--completion", rows[0]["answer"], "--json"]
    commands = {
        "help": ["-m", "llmattrib.cli", "--help"],
        "query": ["-m", "llmattrib.cli", "query", folder, *asked],
    }
    found: dict[str, Any] = {}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, command in commands.items():
        taken = []
        for _ in range(COLD):
            before = children_seconds()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env=env)
            taken.append(children_seconds() - before)
        found[f"{name}_cpu_seconds"] = round(statistics.median(taken), 2)
    command = [sys.executable, "-c", PROFILE, folder, asked[1], asked[3]]
    texts = [subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout for _ in range(COLD)]
    profiles = [json.loads(text.splitlines()[-1]) for text in texts]
    medians = {part: round(statistics.median(profile[part] for profile in profiles), 2) for part in profiles[0]}
    return {**found, "profile_cpu_seconds": medians}


def merge(part: str, found: dict[str, Any]) -> None:
    """Write one part of the result, and keep the others."""
    RESULT.write_text(json.dumps({**results(), part: found}, indent=2) + "\n")


def table(result: dict[str, Any]) -> str:
    """Render the searches."""
    lines = [
        "| rows | kind | search, ms | CPU ms | both sides, ms | recall@10 | recall@100 "
        "| build, CPU s | file | held in memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["search"]["rows"]:
        one = row["threads_1"]
        recall = [f"{row[name]:.3f}" if name in row else "1" for name in ("recall_at_10", "recall_at_100")]
        lines.append(
            f"| {row['rows']:,} | `{row['kind']}` | {one['search_ms']:.1f} | {one['search_cpu_ms']:.1f} "
            f"| {one['both_sides_ms']:.1f} | {recall[0]} | {recall[1]} | {row['build_cpu_seconds']:,.0f} "
            f"| {row['file_bytes'] / 1e6:,.0f} MB | {row['resident_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """Write the searches into their page."""
    fill(PAGE, BEGIN, table(results()), END)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "search": lambda arguments: search(arguments.sizes, arguments.kinds, arguments.threads),
    "warm": lambda arguments: warm(arguments.rounds),
    "cold": lambda _: cold(),
}


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for part in arguments.parts:
        merge(part, PARTS[part](arguments))
        write_docs()
    print(table(results()))


if __name__ == "__main__":
    main()
