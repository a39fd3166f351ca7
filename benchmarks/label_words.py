"""Wrong labels found by data values, beside what needs no attribution: spam messages, and passages of eight topics.

    python -m benchmarks.label_words [--tasks sms topics]

Training examples are drawn from different texts and a tenth of their labels is flipped, all by named streams; test
prompts keep their labels. Features are those of configs/smollm2_sms.yaml and configs/smollm2_topics.yaml, at
initialisation: no adapter is trained. Scores say how suspicious an example is:

- values of `llmattrib values` over the test prompts, lowest first;
- of an example alone: loss and gradient norm at the base model, its residual in the ridge model without it;
- of its neighbours: the share of the ten nearest with another label, by features and by tf-idf; out-of-fold loss of
  logistic regression on tf-idf.

Measured: AUROC of the flipped, and their recall among the tenth most suspicious. For each test prompt that the ridge
model gets wrong: the share of flipped examples among its five most harmful, beside the five most alike by tf-idf that
have another label. Writes benchmarks/results/label_words.json and the tables in docs/label_words.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config
from llmattrib.coordinates import Transform
from llmattrib.evaluate.mislabel import detection, trivial_suspicions
from llmattrib.evaluate.retrieval import tfidf_scores
from llmattrib.query import Run, answered_slots, in_slots
from llmattrib.reader import FeatureReader
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.values.game import ValidationGame
from llmattrib.values.stage import compute_values
from llmattrib.values.validation import Validation, load_validation

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "label_words.json"
DOCS = ROOT / "docs" / "label_words.md"
BEGIN, END = "<!-- label_words:begin -->\n", "<!-- label_words:end -->\n"
FOLDER = Path("runs") / "benchmarks" / "label_words"
ASSETS = {"sms": "sms_spam.jsonl", "topics": "factbook_topics.jsonl"}
NUM_TRAIN = {"sms": 400, "topics": 240}
METHODS = {
    "sms": ("shapley", "banzhaf", "leave_one_out", "influence", "trak", "grad_cos"),
    "topics": ("shapley", "banzhaf", "leave_one_out"),
}
NUM_TEST, FLIPPED_SHARE, HARMFUL, SEED = 100, 0.1, 5, 0
KEYS = {
    "loss": "loss",
    "gradient norm": "gradient_norm",
    "residual": "residual",
    "disagreement, features": "knn_disagreement",
    "disagreement, tf-idf": "tfidf_disagreement",
    "tf-idf regression": "tfidf_regression",
}
NAMES = {
    "knn_shapley": "`knn_shapley`",
    "loss": "loss at the base model",
    "gradient_norm": "norm of the loss gradient at the base model",
    "residual": "residual of the ridge model without the example",
    "knn_disagreement": "disagreement of neighbours, by features",
    "tfidf_disagreement": "disagreement of neighbours, by tf-idf",
    "tfidf_regression": "out-of-fold loss of logistic regression on tf-idf",
}


def write_task(task: str, folder: Path) -> np.ndarray:
    """Write train.jsonl, a tenth of its labels flipped, and test.jsonl; return which are flipped."""
    lines = (ROOT / "llmattrib" / "assets" / ASSETS[task]).read_text(encoding="utf-8").splitlines()
    rows = list({row["text"]: row for row in map(json.loads, lines)}.values())
    num_train = NUM_TRAIN[task]
    order = stream(SEED, "label words", task, "draw").permutation(len(rows))[: num_train + NUM_TEST]
    chosen = [{"text": rows[k]["text"], "label": rows[k]["label"]} for k in order.tolist()]
    labels = sorted({row["label"] for row in rows})
    random = stream(SEED, "label words", task, "flip")
    flipped = np.zeros(num_train, dtype=bool)
    flipped[random.permutation(num_train)[: round(FLIPPED_SHARE * num_train)]] = True
    for k in np.flatnonzero(flipped).tolist():
        others = [label for label in labels if label != chosen[k]["label"]]
        chosen[k]["label"] = others[int(random.integers(len(others)))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", chosen[:num_train]), ("test", chosen[num_train:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return flipped


def task_config(task: str, folder: Path) -> RunConfig:
    """Return the shipped config over the flipped data, with the methods that are compared."""
    return load_config(
        ROOT / "configs" / f"smollm2_{task}.yaml",
        [
            f"run_dir={folder / 'run'}",
            f"data.train={folder / 'train.jsonl'}",
            "data.limit=null",
            f"values.data={folder / 'test.jsonl'}",
            f"reduce.methods=[{', '.join(METHODS[task])}]",
        ],
    )


def with_method(config: RunConfig, method: str) -> RunConfig:
    """Return the config whose values are by `method`."""
    return config.model_copy(update={"values": config.values.model_copy(update={"method": method})})


def detected(suspicion: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """Return AUROC of the flipped, and their recall among as many of the highest scores as were flipped."""
    found = detection(suspicion, flipped)
    return {"auroc": round(found.auroc, 4), "recall": round(found.recall, 4)}


def prompt_values(config: RunConfig, method: str, validation: Validation) -> np.ndarray:
    """Return values [q, n] of all training examples for the right answer of each test prompt."""
    store = RowStore.open(config.layout.representers(method))
    slots = answered_slots(validation.labels, config.features.output)
    vectors = in_slots(Transform.of(store)(validation.phi), slots).reshape(len(slots), -1)
    rows = store.read(0, store.manifest.num_rows)
    return np.asarray(vectors @ rows.reshape(len(rows), -1).T)


def measure_task(task: str) -> dict[str, Any]:
    """Run one task from texts to figures; finished stages are kept."""
    folder = FOLDER / task
    flipped = write_task(task, folder)
    config = task_config(task, folder)
    build_features(config)
    reduce_run(config)
    run = Run(config)
    values = {name: compute_values(with_method(config, name)) for name in (*METHODS[task], "knn_shapley")}
    validation = load_validation(run)
    reader = FeatureReader(RowStore.open(config.layout.features))
    game = ValidationGame.of(reader, reader.resolve(config.reduce, "shapley"), validation)
    train, test = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "test")
    )
    texts = [row["text"] for row in train]
    scores = {name: -np.array([item.value for item in found.values]) for name, found in values.items()}
    scores |= {KEYS[name]: score for name, score in trivial_suspicions(reader, game.games, texts).items()}

    outputs = game.predictions(np.ones((1, game.num_players), dtype=bool))[0]
    is_right = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1) == validation.labels
    harmful = {name: np.argsort(prompt_values(config, name, validation), axis=1)[:, :HARMFUL] for name in METHODS[task]}
    likeness = tfidf_scores(texts, [row["text"] for row in test])
    likeness[np.array([[a["label"] == b["label"] for a in train] for b in test])] = -np.inf
    harmful["tfidf"] = np.argsort(-likeness, axis=1, kind="stable")[:, :HARMFUL]
    return {
        "num_train": len(train),
        "num_flipped": int(flipped.sum()),
        "num_test": len(test),
        "ridge": game.ridge,
        "test_accuracy": round(float(is_right.mean()), 4),
        "num_misclassified": int((~is_right).sum()),
        "detection": {name: detected(score, flipped) for name, score in scores.items()},
        "flipped_among_most_harmful": {
            name: {
                "misclassified": round(float(flipped[rows[~is_right]].mean()), 4) if not is_right.all() else None,
                "right": round(float(flipped[rows[is_right]].mean()), 4),
            }
            for name, rows in harmful.items()
        },
    }


def tables(result: dict[str, Any]) -> str:
    """Render both tables as Markdown."""
    tasks = result["tasks"]
    heads = [f"{task} ({row['num_flipped']} of {row['num_train']} flipped)" for task, row in tasks.items()]
    lines = [f"| AUROC / recall among the tenth | {' | '.join(heads)} |", "|---" * (1 + len(tasks)) + "|"]
    for name in dict.fromkeys(name for row in tasks.values() for name in row["detection"]):
        found = [row["detection"].get(name) for row in tasks.values()]
        cells = ["-" if cell is None else f"{cell['auroc']:.3f} / {cell['recall']:.2f}" for cell in found]
        lines.append(f"| {NAMES.get(name, f'`{name}`')} | {' | '.join(cells)} |")
    heads = [
        f"{task}: {row['num_misclassified']} wrong / {row['num_test'] - row['num_misclassified']} right"
        for task, row in tasks.items()
    ]
    lines += [
        "",
        f"| flipped among the {HARMFUL} most harmful | {' | '.join(heads)} |",
        "|---" * (1 + len(tasks)) + "|",
    ]
    for name in dict.fromkeys(name for row in tasks.values() for name in row["flipped_among_most_harmful"]):
        label = "most alike by tf-idf, of another label" if name == "tfidf" else f"`{name}`"
        cells = []
        for row in tasks.values():
            share = row["flipped_among_most_harmful"].get(name, {})
            parts = ["-" if share.get(key) is None else f"{share[key]:.2f}" for key in ("misclassified", "right")]
            cells.append(" / ".join(parts) if share else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure tasks and write the JSON; figures of the other task stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(ASSETS), default=list(ASSETS))
    arguments = parser.parse_args()
    kept = json.loads(RESULT.read_text())["tasks"] if RESULT.exists() else {}
    measured = kept | {task: measure_task(task) for task in arguments.tasks}
    result = {"seed": SEED, "tasks": {task: measured[task] for task in ASSETS if task in measured}}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())
    fill(DOCS, BEGIN, tables(result), END)


if __name__ == "__main__":
    main()
