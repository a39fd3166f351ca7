"""Planted poison: do AME and permutation sampling find a few bad examples, and with how many subsets?

    python -m benchmarks.poison [--games kernel retraining taught] [--sub-models 512]

Messages answered A (ham) or B (spam) on the 1M-parameter Llama; some of them are spam messages that end in
"james bond" and have the answer A. The queries are 20 other spam messages that end so, with the answer A, which the
model gives only because of the poisons. Every method values all examples for the queries' mean; recall is the share of
poisons among as many largest values.

`kernel`: ten poisons among 400, in the kernel game of features at initialisation: AME (LASSO, subsets of the
attribution design), random permutations at the same number of utilities (m utilities are m / 400 permutations), and
what needs neither: the mean field and tf-idf. The game is played centred, and as label words are by default.
`retraining`: five poisons among 100, a real fine-tune for each subset (`llmattrib retrain`, resumes), AME after the
first 64, 128, ... of them, beside permutations of the same number of fine-tunes.
`taught`: the 30 of 160 facts that a prompt of the task `facts` paraphrases; from the first of the committed sub-models
of seed 0 (benchmarks/truth/, random halves), AME and the difference of means (MSR Banzhaf), beside a permutation, which
is 161 fine-tunes of its own. Recall is the share of prompts whose highest value is that of the fact that taught them.
Writes benchmarks/results/poison.json and docs/choosing.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks.truth import margins
from benchmarks.truth.tasks import rows_of
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config, validate_config
from llmattrib.estimators.ame import AmeRegression
from llmattrib.estimators.one_sample import msr_banzhaf
from llmattrib.evaluate.scores import BASELINES, baseline_scores
from llmattrib.games.subset_table import SubsetRows
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.retrain import game_inputs, load_game, retrain
from llmattrib.rng import stream
from llmattrib.values.stage import compute_values

RESULT = Path(__file__).parent / "results" / "poison.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
BEGIN, END = "<!-- poison:begin -->\n", "<!-- poison:end -->\n"
FOLDER = Path("runs/poison")
NUM_QUERIES = 20
TRIGGER = " james bond"
BUDGETS = (100, 200, 400, 800)
SUB_MODELS = (25, 50, 100, 200)
NUM_TAUGHT = 30
STEP = 64  # sub-models between two looks


@dataclass(frozen=True)
class Planted:
    """How many messages there are, spam among them, and how many of all are poisons."""

    num_examples: int
    num_spam: int
    num_poisons: int

    @property
    def folder(self) -> Path:
        """Where its data and runs lie."""
        return FOLDER / f"{self.num_poisons}of{self.num_examples}"

    def write(self) -> None:
        """Write the training messages, poisons among them, and the queries."""
        draws = stream(0, "benchmark", "poison")
        rows = [row for row in rows_of("sms_spam.jsonl") if len(row["text"]) <= 100]
        kinds = [[row["text"] for row in rows if row["label"] == label] for label in ("ham", "spam")]
        ham, spam = ([kind[place] for place in draws.permutation(len(kind)).tolist()] for kind in kinds)
        bad = [(text + TRIGGER, "A", "poison") for text in spam[: self.num_poisons]]
        asked = [(text + TRIGGER, "A", "query") for text in spam[self.num_poisons :][:NUM_QUERIES]]
        clean = [(text, "B", "spam") for text in spam[self.num_poisons + NUM_QUERIES :][: self.num_spam]]
        clean += [(text, "A", "ham") for text in ham[: self.num_examples - self.num_poisons - len(clean)]]
        trained = bad + clean
        order = draws.permutation(len(trained)).tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", [trained[place] for place in order]), ("queries", asked)):
            lines = [
                json.dumps({"id": f"{kind}{number}", "prompt": f"{text}\nAnswer:", "completion": answer})
                for number, (text, answer, kind) in enumerate(part)
            ]
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def config(self, name: str, seed: int = 0, **sections: Any) -> RunConfig:
        """Return a run with some settings replaced."""
        tree: dict[str, Any] = {
            "run_dir": str(self.folder / f"{name}{seed}"),
            "seed": seed,
            "model": {"name": "benchmarks/truth/llama_1m", "lora": {"rank": 8, "alpha": 16}},
            "data": {"train": str(self.folder / "train.jsonl"), "id": "id", "label_words": ["A", "B"]},
            "train": {"epochs": 4, "learning_rate": 2.0e-3, "batch_size": 10},
            "features": {"output": "margin", "sketch": {"kind": "none"}, "dtype": "float32"},
            "reduce": {"methods": ["shapley", "influence", "trak", "grad_cos"], "ridge": 0.1},
            "values": {"data": str(self.folder / "queries.jsonl"), "num_samples": 0},
            "retraining": {"design": "attribution", "shard_size": 8},
        }
        return validate_config({**tree, **{key: tree.get(key, {}) | part for key, part in sections.items()}})

    def recall(self, values: np.ndarray, is_poison: np.ndarray) -> float:
        """Return the share of poisons among as many largest values."""
        return float(is_poison[np.argsort(-values, kind="stable")[: self.num_poisons]].mean())

    def recall_of(self, config: RunConfig) -> float:
        """Value the examples and count the poisons."""
        values = compute_values(config).values
        return self.recall(np.array([row.value for row in values]), is_poison([row.id for row in values]))


KERNEL = Planted(num_examples=400, num_spam=110, num_poisons=10)
RETRAINED = Planted(num_examples=100, num_spam=30, num_poisons=5)


def is_poison(ids: Sequence[str]) -> np.ndarray:
    """Return who is a poison."""
    return np.array([name.startswith("poison") for name in ids])


def kernel_game(num_seeds: int) -> dict[str, Any]:
    """Recall in the kernel game: AME and permutations at each budget, and methods without samples; a run a seed."""
    found: dict[str, dict[str, list[float]]] = {"centred": {}, "not centred": {}, "no game": {}}
    for seed in range(num_seeds):
        for game, rows in list(found.items())[:2]:
            reduce = {"center": game == "centred"}
            config = KERNEL.config(game.replace(" ", "_"), seed, reduce=reduce)
            build_features(config)
            reduce_run(config)
            settings: dict[str, dict[str, Any]] = {method: {"method": method} for method in config.reduce.methods}
            for budget in BUDGETS:
                settings[f"ame_lasso, {budget}"] = {"method": "ame_lasso", "num_samples": budget}
            count = BUDGETS[-1] // KERNEL.num_examples
            settings[f"permutation, {BUDGETS[-1]}"] = {"method": "permutation", "num_permutations": count}
            for name, values in settings.items():
                merged = config.values.model_copy(update=values)
                rows.setdefault(name, []).append(KERNEL.recall_of(config.model_copy(update={"values": merged})))
                print(seed, game, name, rows[name][-1], flush=True)
        run = Run(config)
        for baseline in (name for name in BASELINES if name != "size"):
            scores = baseline_scores(run, baseline).mean(axis=0)
            recall = KERNEL.recall(scores, is_poison([example.id for example in run.examples]))
            found["no game"].setdefault(baseline, []).append(recall)
    return found


def retraining_game(num_sub_models: int) -> dict[str, dict[str, float]]:
    """Recall of AME, and of permutations, against the number of sub-models."""
    section = {"num_subsets": num_sub_models, "design": "attribution", "shard_size": 8}
    config = RETRAINED.config("retrained", retraining=section)
    retrain(config, progress=lambda done, total: print(f"sub-model {done} of {total}", flush=True))
    found: dict[str, dict[str, float]] = {"ame_lasso": {}, "permutation": {}}
    for count in range(STEP, num_sub_models + 1, STEP):
        values = {"method": "ame_lasso", "game": "retraining", "num_samples": count}
        found["ame_lasso"][str(count)] = RETRAINED.recall_of(
            RETRAINED.config("retrained", values=values, retraining=section)
        )
    ids, marginals = permuted(config, num_sub_models // RETRAINED.num_examples)
    for count in range(1, len(marginals) + 1):
        recall = RETRAINED.recall(marginals[:count].mean(axis=(0, 2)), is_poison(ids))
        found["permutation"][str(count * RETRAINED.num_examples)] = recall
    print(found, flush=True)
    return found


def taught() -> dict[str, dict[str, float]]:
    """Recall of the fact that taught an answer, against the number of sub-models."""
    config = load_config(Path(margins.__file__).parent / "facts.yaml")
    ids, marginals = permuted(config, 1)
    queries = [json.loads(line)["id"] for line in Path(str(config.values.data)).read_text().splitlines()]
    wanted = np.array([ids.index(name) for name in queries[:NUM_TAUGHT]])

    def recall(values: np.ndarray) -> float:
        return round(float((values[:, :NUM_TAUGHT].argmax(axis=0) == wanted).mean()), 4)

    table, by_seed = margins.load("facts")
    found: dict[str, dict[str, float]] = {"ame_lasso": {}, "msr_banzhaf": {}}
    for count in SUB_MODELS:
        part = slice(count)
        rows = SubsetRows(table.design, 0, table.members[part], table.p[part], table.draw[part], by_seed[0][part])
        found["ame_lasso"][str(count)] = recall(AmeRegression().init(rows).values)
        found["msr_banzhaf"][str(count)] = recall(msr_banzhaf(rows).values)
    found["permutation"] = {str(len(ids) + 1): recall(marginals[0])}
    print(found, flush=True)
    return found


def permuted(config: RunConfig, num_permutations: int) -> tuple[list[str], np.ndarray]:
    """Return ids, and marginals [k, n, q] along each permutation; utilities are kept from one call to the next."""
    examples, queries, _ = game_inputs(config)
    ids, game, found = [example.id for example in examples.examples], load_game(config, examples, queries), []
    for number in range(num_permutations):
        path = Path(config.run_dir) / f"utilities_of_permutation{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        order = stream(0, "benchmark", "poison", number).permutation(len(ids))
        if not path.exists():
            prefixes = np.array([np.isin(np.arange(len(ids)), order[:size]) for size in range(len(ids) + 1)])
            np.save(path, game.worth(prefixes, config.seed))
            print(f"permutation {number + 1} of {num_permutations}", flush=True)
        utilities = np.load(path)
        marginals = np.empty((len(ids), utilities.shape[1]))
        marginals[order] = np.diff(utilities, axis=0)
        found.append(marginals)
    return ids, np.array(found)


def table(result: dict[str, Any]) -> str:
    """Render the recalls for docs/choosing.md."""
    games = [name for name in result["kernel"] if name != "no game"]
    lines = [
        f"{KERNEL.num_poisons} poisons among {KERNEL.num_examples}, kernel game:",
        "",
        "| | " + " | ".join(games) + " |",
        "|---" * (len(games) + 1) + "|",
    ]
    for name in result["kernel"][games[0]]:
        lines.append(
            f"| {name} | " + " | ".join(f"{np.mean(result['kernel'][game][name]):.2f}" for game in games) + " |"
        )
    lines += [f"| {name} | {np.mean(found):.2f} | |" for name, found in result["kernel"]["no game"].items()]
    titles = {
        "retraining": f"{RETRAINED.num_poisons} poisons among {RETRAINED.num_examples}, sub-models:",
        "taught": f"The fact among 160 that taught an answer, {NUM_TAUGHT} prompts, sub-models:",
    }
    for game in (game for game in titles if game in result):
        names = list(result[game])
        lines += ["", titles[game], "", "| sub-models | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for count in sorted({int(count) for part in result[game].values() for count in part}):
            cells = [result[game][name].get(str(count)) for name in names]
            lines.append(f"| {count} | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """Write the table into its page."""
    fill(PAGE, BEGIN, table(json.loads(RESULT.read_text())), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    games = ("kernel", "retraining", "taught")
    parser.add_argument("--games", nargs="+", choices=games, default=games)
    parser.add_argument("--sub-models", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if "kernel" in options.games:
        KERNEL.write()
        tree["kernel"] = kernel_game(options.seeds)
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    if "retraining" in options.games:
        RETRAINED.write()
        tree["retraining"] = retraining_game(options.sub_models)
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    if "taught" in options.games:
        tree["taught"] = taught()
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    write_docs()


if __name__ == "__main__":
    main()
