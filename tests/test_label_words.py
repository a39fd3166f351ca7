"""Classification by label words, from texts with wrong labels to values: margins of two words, logits of three.

A prompt is made of the words of its class; a tenth of the labels is flipped. Labels of the data are mapped to words.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from tiny import tiny_run

from llmattrib.build import build_features
from llmattrib.config import RunConfig
from llmattrib.errors import LabelWordError
from llmattrib.hits import Query
from llmattrib.index import build_index
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.train import train_adapter
from llmattrib.values.stage import compute_values

CLASSES = (
    ("red tree", "red stone", "tree"),
    ("green river", "blue", "river blue"),
    ("user", "assistant", "user system"),
)
LABEL_MAP = {"first kind": "yes", "second kind": "no", "third kind": "ham"}
NUM_TRAIN, NUM_FLIPPED, NUM_TEST = 60, 6, 18


def write_task(folder: Path, num_classes: int) -> np.ndarray:
    """Write learn.jsonl and test.jsonl; return which training labels are flipped."""
    random, kinds = stream(0, "toy", str(num_classes)), list(LABEL_MAP)
    flipped = np.zeros(NUM_TRAIN, dtype=bool)
    flipped[random.permutation(NUM_TRAIN)[:NUM_FLIPPED]] = True
    for name, count in (("learn", NUM_TRAIN), ("test", NUM_TEST)):
        rows = []
        for k in range(count):
            truth = k % num_classes
            words = [CLASSES[truth][int(j)] for j in random.integers(3, size=3)]
            step = 1 + int(random.integers(num_classes - 1)) if name == "learn" and flipped[k] else 0
            label = kinds[(truth + step) % num_classes]
            rows.append({"id": f"{name}-{k}", "prompt": " ".join(words), "completion": label})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return flipped


@pytest.fixture(scope="module", params=[2, 3], ids=["margin of two words", "logits of three"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, np.ndarray]:
    """A run, trained and indexed, and which of its labels are flipped."""
    folder, num_classes = tmp_path_factory.mktemp("toy"), int(request.param)
    flipped = write_task(folder, num_classes)
    config = tiny_run(
        folder,
        data={
            "train": str(folder / "learn.jsonl"),
            "id": "id",
            "label_map": dict(list(LABEL_MAP.items())[:num_classes]),
        },
        train={"epochs": 1, "batch_size": 20},
        features={"output": "margin" if num_classes == 2 else "logits", "tokens_per_batch": 2048, "shard_size": 20},
        reduce={"methods": ["shapley"], "certificate_draws": 0},
        values={"data": str(folder / "test.jsonl"), "num_samples": 0},
    )
    train_adapter(config)
    build_features(config)
    reduce_run(config)
    build_index(config, "shapley")
    return config, flipped


def test_flipped_labels_have_the_lowest_values(case: tuple[RunConfig, np.ndarray]) -> None:
    config, flipped = case
    result = compute_values(config)
    values = np.array([item.value for item in result.values])
    assert roc_auc_score(flipped, -values) > 0.9
    assert values[flipped].mean() < 0 < values[~flipped].mean()
    assert result.expected_total is not None
    assert result.total == pytest.approx(result.expected_total, rel=2e-2)
    assert {item.completion for item in result.values} == set(config.data.label_words)


def test_values_of_a_prompt_sum_to_its_total(case: tuple[RunConfig, np.ndarray]) -> None:
    config, flipped = case
    run = Run(config)
    lines = (Path(config.data.train).parent / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:6]]
    queries = [replace(Query.of(row["prompt"], row["completion"]), id=row["id"]) for row in rows]
    found = run.query_many(queries, top=NUM_TRAIN)
    store = RowStore.open(config.layout.representers("shapley"))
    harmful = 0
    for hits, row in zip(found, rows, strict=True):
        assert hits.completion == LABEL_MAP[row["completion"]]
        values = [hit.value for hit in (*hits.helpful, *hits.harmful)]
        assert len(values) == store.manifest.num_rows
        assert sum(values) == pytest.approx(hits.total, abs=1e-4)
        harmful += sum(flipped[hit.row] for hit in hits.harmful[:NUM_FLIPPED])
    assert harmful / (6 * NUM_FLIPPED) > 2 * NUM_FLIPPED / NUM_TRAIN, "flipped labels are not more harmful than others"


def test_an_answer_may_be_given_as_text_of_the_data_or_as_label_word(case: tuple[RunConfig, np.ndarray]) -> None:
    run = Run(case[0])
    texts = ["first kind", " first kind\n", "yes"]
    assert [answer.completion for answer in run.answers([Query.of("red tree", text) for text in texts])] == ["yes"] * 3
    (generated,) = run.answers([Query.of("red tree")])
    assert generated.completion in case[0].data.label_words
    with pytest.raises(LabelWordError, match=r"query 2 has the completion 'fourth'\n  expected: one of \['first kind'"):
        run.answers([Query.of("red tree", "yes"), Query.of("red tree", "fourth")])
