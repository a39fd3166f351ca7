"""Planted poison: do AME and permutation sampling find ten bad examples among 400, and with how many subsets?

    python -m benchmarks.poison [--games kernel retraining] [--sub-models 192]

400 messages answered A (ham) or B (spam) on the 1M-parameter Llama; ten of them are spam messages that end in
"james bond" and have the answer A. The queries are 20 other spam messages that end so, with the answer A, which the
model gives only because of the poisons. Every method values all examples for the queries' mean; recall is the share of
poisons among its ten largest values.

`kernel` plays the kernel game of features at initialisation: AME (LASSO, subsets of the attribution design), random
permutations at the same number of utilities (m utilities are m / 400 permutations), and what needs neither: the mean
field and tf-idf. `retraining` fine-tunes a sub-model for each subset (`llmattrib retrain`, resumes) and reports AME's
recall after the first 32, 64, ... of them. Writes benchmarks/results/poison.json and
docs/choosing.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.truth.tasks import rows_of
from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.evaluate.scores import BASELINES, baseline_scores
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.retrain import retrain
from llmattrib.rng import stream
from llmattrib.values.stage import compute_values

RESULT = Path(__file__).parent / "results" / "poison.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
BEGIN, END = "<!-- poison:begin -->\n", "<!-- poison:end -->\n"
FOLDER = Path("runs/poison")
NUM_EXAMPLES, NUM_POISONS, NUM_QUERIES = 400, 10, 20
TRIGGER = " james bond"
BUDGETS = (100, 200, 400, 800)


def write_data() -> None:
    """Write the training messages, poisons among them, and the queries."""
    draws = stream(0, "benchmark", "poison")
    rows = [row for row in rows_of("sms_spam.jsonl") if len(row["text"]) <= 100]
    kinds = [[row["text"] for row in rows if row["label"] == label] for label in ("ham", "spam")]
    ham, spam = ([kind[place] for place in draws.permutation(len(kind)).tolist()] for kind in kinds)
    num_spam = 110
    bad = [(text + TRIGGER, "A", "poison") for text in spam[:NUM_POISONS]]
    asked = [(text + TRIGGER, "A", "query") for text in spam[NUM_POISONS : NUM_POISONS + NUM_QUERIES]]
    clean = [(text, "B", "spam") for text in spam[NUM_POISONS + NUM_QUERIES :][:num_spam]]
    clean += [(text, "A", "ham") for text in ham[: NUM_EXAMPLES - NUM_POISONS - len(clean)]]
    trained = bad + clean
    order = draws.permutation(len(trained)).tolist()
    for name, part in (("train", [trained[place] for place in order]), ("queries", asked)):
        lines = [
            json.dumps({"id": f"{kind}{number}", "prompt": f"{text}\nAnswer:", "completion": answer})
            for number, (text, answer, kind) in enumerate(part)
        ]
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(seed: int = 0, **sections: Any) -> RunConfig:
    """Return the run of a seed with some settings replaced."""
    tree: dict[str, Any] = {
        "run_dir": str(FOLDER / f"seed{seed}"),
        "seed": seed,
        "model": {"name": "benchmarks/truth/llama_1m", "lora": {"rank": 8, "alpha": 16}},
        "data": {"train": str(FOLDER / "train.jsonl"), "id": "id", "label_words": ["A", "B"]},
        "train": {"epochs": 4, "learning_rate": 2.0e-3, "batch_size": 10},
        "features": {"output": "margin", "sketch": {"kind": "none"}, "dtype": "float32"},
        "reduce": {"methods": ["shapley", "influence", "trak", "grad_cos"], "ridge": 0.1},
        "values": {"data": str(FOLDER / "queries.jsonl"), "num_samples": 0},
        "retraining": {"design": "attribution", "shard_size": 8},
    }
    return validate_config({**tree, **{name: tree.get(name, {}) | part for name, part in sections.items()}})


def recall(values: np.ndarray, is_poison: np.ndarray) -> float:
    """Return the share of poisons among the ten largest values."""
    return float(is_poison[np.argsort(-values, kind="stable")[:NUM_POISONS]].mean())


def recall_of(config: RunConfig) -> float:
    """Value the examples and count the poisons."""
    values = compute_values(config).values
    return recall(np.array([row.value for row in values]), np.array([row.id.startswith("poison") for row in values]))


def kernel_game(num_seeds: int) -> dict[str, Any]:
    """Recall in the kernel game: AME and permutations at each budget, and methods without samples; a run a seed."""
    found: dict[str, Any] = {}
    for seed in range(num_seeds):
        config = config_of(seed)
        build_features(config)
        reduce_run(config)
        settings: dict[str, dict[str, Any]] = {method: {"method": method} for method in config.reduce.methods}
        for budget in BUDGETS:
            settings[f"ame_lasso, {budget}"] = {"method": "ame_lasso", "num_samples": budget}
            if budget >= 2 * NUM_EXAMPLES:
                settings[f"permutation, {budget}"] = {
                    "method": "permutation",
                    "num_permutations": budget // NUM_EXAMPLES,
                }
        for name, values in settings.items():
            found.setdefault(name, []).append(recall_of(config_of(seed, values=values)))
            print(seed, name, found[name][-1], flush=True)
        run = Run(config)
        is_poison = np.array([example.id.startswith("poison") for example in run.examples])
        for baseline in (name for name in BASELINES if name != "size"):
            found.setdefault(baseline, []).append(recall(baseline_scores(run, baseline).mean(axis=0), is_poison))
    return found


def retraining_game(num_sub_models: int) -> dict[str, float]:
    """Recall of AME against the number of sub-models."""
    config = config_of(retraining={"num_subsets": num_sub_models, "design": "attribution", "shard_size": 8})
    retrain(config, progress=lambda done, total: print(f"sub-model {done} of {total}", flush=True))
    found = {}
    for count in range(32, num_sub_models + 1, 32):
        values = {"method": "ame_lasso", "game": "retraining", "num_samples": count}
        found[str(count)] = recall_of(config_of(values=values, retraining=config.retraining.model_dump()))
        print("sub-models", count, "recall", found[str(count)], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """Render the recalls for docs/choosing.md."""
    lines = ["| kernel game | recall |", "|---|---|"]
    lines += [f"| {name} | {np.mean(found):.2f} |" for name, found in result["kernel"].items()]
    if "retraining" in result:
        lines += ["", "| retraining game, sub-models | recall of AME |", "|---|---|"]
        lines += [f"| {count} | {found:.2f} |" for count, found in result["retraining"]["ame_lasso"].items()]
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """Write the table into its page."""
    text, rendered = PAGE.read_text(encoding="utf-8"), table(json.loads(RESULT.read_text()))
    PAGE.write_text(text.partition(BEGIN)[0] + BEGIN + rendered + END + text.partition(END)[2], encoding="utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    games = ("kernel", "retraining")
    parser.add_argument("--games", nargs="+", choices=games, default=games)
    parser.add_argument("--sub-models", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    write_data()
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if "kernel" in options.games:
        tree["kernel"] = kernel_game(options.seeds)
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    if "retraining" in options.games:
        tree["retraining"] = {"ame_lasso": retraining_game(options.sub_models)}
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
    write_docs()


if __name__ == "__main__":
    main()
