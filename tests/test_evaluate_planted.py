"""Recall of the teaching example: ranks against sorting, the column that names it, the command line."""

import json

import numpy as np
import pytest
from test_build import changed
from test_resume import config_file
from tiny import tiny_rows, tiny_run
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.errors import ConfigError, MissingFieldError, StaleIndexError
from llmattrib.evaluate.planted import planted_of_run, ranks_of, recall_row, teaching_examples
from llmattrib.evaluate.retrieval import recall, top_rows
from llmattrib.evaluate.scores import RunScores
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream


def test_ranks_are_places_in_the_sorted_list():
    scores = np.round(stream(0, "planted test").standard_normal((30, 12)), 1)  # with ties
    targets = stream(1, "planted test").integers(0, 12, 30)
    ranks = ranks_of(scores, targets)
    order = top_rows(scores, 12)
    assert ranks.tolist() == [1 + order[q].tolist().index(targets[q]) for q in range(30)]
    row = recall_row("m", ranks, (1, 5), 0, 200)
    slow = recall(order.tolist(), targets.tolist(), (1, 5))
    assert (row["recall@1"], row["recall@5"]) == pytest.approx((slow["recall@1"], slow["recall@5"]))
    assert row["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert row["recall@5_low"] < row["recall@5"] < row["recall@5_high"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    queries = [{**row, "taught_by": row["id"], "empty": None} for row in tiny_rows(5)]
    queries[3]["taught_by"] = None
    queries[1]["wrong"] = "row-77"
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in queries))
    config = tiny_run(
        folder,
        values={"data": str(path)},
        reduce={"methods": ["influence", "grad_cos"]},
        evaluate={"source": "taught_by", "recall_at": [1, 3]},
    )
    build_features(config)
    reduce_run(config)
    return config


def test_a_prompt_that_is_an_example_is_taught_by_it(run, tmp_path):
    record = planted_of_run(RunScores(run))
    found = {row["method"]: row for row in record.rows}
    assert set(found) == {"influence", "grad_cos", "random", "tfidf", "bm25", "embedding"}
    assert found["grad_cos"]["recall@1"] == found["tfidf"]["recall@1"] == 1  # a text is nearest to itself
    assert found["random"]["mrr"] < 1
    assert record.notes == ("4 of 5 prompts have a teaching example among 12",)
    done = CliRunner().invoke(app, ["evaluate", "planted", str(config_file(run, tmp_path)), "--json"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(record.rows)


def test_representers_of_other_reduce_settings_are_not_judged(run):
    scores = RunScores(changed(run, reduce={"ridge": 0.2}))
    with pytest.raises(
        StaleIndexError, match=r"influence\.zarr was made with reduce settings ridge=0\.1\n.*ridge=0\.2"
    ):
        planted_of_run(scores)
    assert scores.of("grad_cos").shape == (5, 12)  # which has no ridge


def test_columns_that_name_nothing_are_refused(run):
    for settings, message in (
        ({"source": None}, "evaluate.source is not set"),
        ({"source": "wrong"}, "says that 'row-77' taught 'row-1'"),
        ({"source": "empty"}, "is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            teaching_examples(RunScores(changed(run, evaluate=settings)))
    with pytest.raises(MissingFieldError, match="has no field 'teacher'"):
        teaching_examples(RunScores(changed(run, evaluate={"source": "teacher"})))
