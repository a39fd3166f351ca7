"""Wrong labels found: AUROC against sklearn, neighbours and residuals against slow versions, the truth's two forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from sklearn.metrics import roc_auc_score
from test_build import changed
from test_resume import config_file
from tiny import tiny_rows, tiny_run
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.config import validate_config
from llmattrib.errors import ConfigError, DataError, FingerprintMismatchError, MethodError, MissingFieldError
from llmattrib.evaluate.mislabel import (
    detection,
    disagreement,
    mislabel_of_run,
    read_mislabeled,
    regression_loss,
    residuals,
    self_scores,
)
from llmattrib.evaluate.retrieval import tfidf_scores
from llmattrib.evaluate.scores import RunScores, bm25_scores
from llmattrib.games.kernel import KernelGame
from llmattrib.manifest import Manifest
from llmattrib.reader import FeatureReader
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.values.estimates import is_label_free, label_free

NUM_ROWS, WRONG = 24, (2, 7, 12)


def test_detection_counts_the_most_suspicious():
    wrong = np.array([True, False, False, True])
    found = detection(np.array([3.0, 2.0, 1.0, 0.0]), wrong)
    assert (found.auroc, found.recall) == (0.5, 0.5)
    found = detection(np.array([3.0, 1.0, 0.0, 2.0]), wrong)
    assert (found.auroc, found.low, found.high, found.recall) == (1, 1, 1, 1)


@pytest.mark.parametrize("num_wrong", [1, 9])
def test_of_one_example_there_is_no_interval(num_wrong):
    found = detection(stream(2, "mislabel test").standard_normal(10), np.arange(10) < num_wrong)
    assert (found.low, found.high) == (0, 1)


def test_auroc_is_that_of_sklearn_and_its_interval_covers():
    draws = stream(0, "mislabel test")
    wrong = np.arange(200) < 40
    covered = 0
    for _ in range(200):
        suspicion = np.round(draws.standard_normal(200) + wrong, 1)  # with ties
        found = detection(suspicion, wrong)
        assert found.auroc == pytest.approx(roc_auc_score(wrong, suspicion))
        covered += found.low <= 0.7602 <= found.high  # of two normals one apart: Phi(1/sqrt 2)
    assert 0.9 * 200 <= covered <= 0.99 * 200


def test_neighbours_are_counted_without_oneself():
    num_rows = 300  # more than are compared at once
    vectors = stream(1, "mislabel test").standard_normal((num_rows, 4))
    likeness, labels = vectors @ vectors.T, np.arange(num_rows) % 2
    found = disagreement(vectors, labels)
    np.testing.assert_array_equal(disagreement(scipy.sparse.csr_matrix(vectors), labels), found)
    for i in range(num_rows):
        others = sorted((j for j in range(num_rows) if j != i), key=lambda j: -likeness[i, j])[:10]
        assert found[i] == pytest.approx(np.mean([labels[j] != labels[i] for j in others]))


def test_features_without_the_label_say_nothing_of_random_labels(tmp_path):
    rows = stream(3, "mislabel test").standard_normal((200, 1, 6)).astype(np.float32)
    labels = stream(4, "mislabel test").integers(0, 2, 200)
    for output in ("margin", "loss", "pntk", "logits"):
        own = np.where((labels == 1)[:, None, None], 1, -1) if output in ("margin", "loss") else 1
        assert disagreement(label_free(rows * own, labels, output), labels).mean() == pytest.approx(0.5, abs=0.05)
    for num_words, outputs in ((2, ("margin", "loss", "pntk", "logits")), (3, ("pntk", "logits"))):
        for output in ("margin", "loss", "pntk", "logits"):
            fingerprint = {"features": {"output": output}, "encoding": {"label_words": ["a"] * num_words}}
            path = str(tmp_path / f"{output}{num_words}.zarr")
            store = RowStore.create(path, Manifest("features", 8, 1, 4, "float32", 4, (), fingerprint))
            assert is_label_free(FeatureReader(store)) == (output in outputs)


def test_texts_without_a_word_are_alike(tmp_path):
    assert regression_loss(["!!!", "...", "!", "?"], np.arange(4) % 2) is None
    for scores in (tfidf_scores, bm25_scores):
        np.testing.assert_array_equal(scores(["!!!", "?"], ["what?", "", "..."]), np.zeros((3, 2)))
        assert scores(["a word", "?"], ["a word"]).argmax() == 0


def test_residuals_without_an_example_are_those_of_a_fit_without_it():
    rows = stream(0, "test residuals").standard_normal((9, 4))
    games = tuple(KernelGame(rows * scale, np.ones((9, 1)), 0.3) for scale in (1.0, 2.0))
    labels = np.arange(9) % 2
    for chosen in (games[:1], games):
        found = residuals(chosen, labels)
        for i in range(9):
            game = chosen[labels[i] if len(chosen) > 1 else 0]
            kept = np.arange(9) != i
            assert np.isclose(found[i], 1 - game.value(kept, game.features[i : i + 1])[0, 0])


def test_a_label_too_rare_for_folds_has_no_regression():
    assert regression_loss(["a", "b", "c"], np.array([0, 0, 1])) is None
    texts = ["red tree"] * 6 + ["green river"] * 6
    found = regression_loss(texts, np.array([0] * 5 + [1] + [1] * 6))
    assert found is not None
    assert found.argmax() == 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mislabel")
    rows = tiny_rows(NUM_ROWS, labels=True)
    for k, row in enumerate(rows):
        row["prompt"] = ("red tree " if k % 2 else "green river ") + row["prompt"]
        row["wrong"] = k in WRONG
        if k in WRONG:
            row["completion"] = {"yes": "no", "no": "yes"}[row["completion"]]
    (folder / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(
        folder,
        labels=True,
        features={"output": "margin"},
        reduce={"methods": ["shapley", "influence", "grad_cos"]},
        evaluate={"mislabeled_column": "wrong"},
    )
    config = changed(config, data={"train": str(folder / "learn.jsonl")})
    config = changed(config, values={"data": str(folder / "learn.jsonl"), "limit": 6})
    build_features(config)
    reduce_run(config)
    return config


def test_both_forms_of_the_truth_are_one(run, tmp_path):
    scores = RunScores(run)
    wrong = read_mislabeled(scores)
    assert np.flatnonzero(wrong).tolist() == list(WRONG)
    for name, text in (("ids.txt", "row-12\n\nrow-2\nrow-7"), ("ids.json", '["row-2", "row-7", "row-12"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        other = changed(run, evaluate={"mislabeled_column": None, "mislabeled": str(tmp_path / name)})
        np.testing.assert_array_equal(read_mislabeled(RunScores(other)), wrong)


def test_embeddings_are_of_prompts_alone_where_there_are_labels(run, tmp_path):
    rows = [json.loads(line) for line in Path(run.data.train).read_text().splitlines()[:4]]
    turned = [{**row, "completion": {"yes": "no", "no": "yes"}[row["completion"]]} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    found = RunScores(changed(run, values={"data": str(tmp_path / "asked.jsonl")})).of("embedding")
    np.testing.assert_allclose(np.diag(found), -1, atol=1e-6)  # the same prompt and the other label


def test_a_column_of_other_examples_is_refused(run, tmp_path):
    """Without ids rows go by their place: moved ones would be called wrong for others, missing ones not be found."""
    lines = Path(run.data.train).read_text().splitlines(keepends=True)
    unnamed = changed(run, tmp_path / "run", data={"id": None})
    build_features(unnamed)
    for rows, said in ((lines[::-1], "prompt of row 0"), (lines[:-1], "num_rows: stored")):
        (tmp_path / "learn.jsonl").write_text("".join(rows))
        other = changed(unnamed, data={"train": str(tmp_path / "learn.jsonl")})
        with pytest.raises(FingerprintMismatchError, match=said):
            read_mislabeled(RunScores(other))


def test_what_does_not_say_it_is_refused(run, tmp_path):
    def read(**settings):
        return read_mislabeled(RunScores(changed(run, evaluate={"mislabeled_column": None, **settings})))

    with pytest.raises(ConfigError, match="nothing says which labels are wrong"):
        read()
    (tmp_path / "ids.txt").write_text("row-99\n")
    with pytest.raises(ConfigError, match="'row-99', which is no training example"):
        read(mislabeled=str(tmp_path / "ids.txt"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(mislabeled=str(tmp_path / "none.txt"))
    (tmp_path / "ids.txt").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(mislabeled=str(tmp_path / "ids.txt"))
    with pytest.raises(MissingFieldError, match="has no field 'flipped'"):
        read(mislabeled_column="flipped")
    with pytest.raises(DataError, match="expected: true or false in every row"):
        read(mislabeled_column="prompt")
    with pytest.raises(MethodError, match="expected: some wrong and some right ones"):
        detection(np.arange(3.0), np.zeros(3, bool))
    tree = run.model_dump(mode="json")
    with pytest.raises(ConfigError, match="both say which labels are wrong"):
        validate_config(tree | {"evaluate": {"mislabeled": "x", "mislabeled_column": "y"}})


def test_self_influence_is_the_inner_product_of_representer_and_feature(run):
    store = RowStore.open(run.layout.representers("influence"))
    phi = RowStore.open(run.layout.features).read(0, NUM_ROWS)
    slow = [float(phi[i, 0].astype(float) @ store.read(i, i + 1)[0, 0]) for i in range(NUM_ROWS)]
    found = self_scores(RunScores(run), "influence")
    np.testing.assert_allclose(found, slow, rtol=1e-5)
    assert (found > 0).all()


def test_everything_is_listed_beside_the_trivial(run, tmp_path):
    record = mislabel_of_run(RunScores(run))
    names = [row["method"] for row in record.rows]
    assert {
        "value, shapley",
        "value, tfidf",
        "value, embedding",
        "self, influence",
        "loss",
        "gradient norm",
        "residual",
        "disagreement, features",
        "disagreement, tf-idf",
        "tf-idf regression",
        "random",
    } <= set(names)
    assert "self, grad_cos" not in names  # one for everybody
    assert all(0 <= row["low"] <= row["auroc"] <= row["high"] <= 1 for row in record.rows)
    assert record.rows[0]["auroc"] == max(row["auroc"] for row in record.rows)
    best = {row["method"]: row["auroc"] for row in record.rows}
    assert best["tf-idf regression"] > 0.9  # the first words say the class
    done = CliRunner().invoke(app, ["evaluate", "mislabel", str(config_file(run, tmp_path)), "--json"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(record.rows)
    assert json.loads(Path(run.layout.path("evaluation", "mislabel.json")).read_text())["rows"] == list(record.rows)
