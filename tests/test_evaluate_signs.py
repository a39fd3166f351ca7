"""Signs on halves of the examples: a half is reduced as a run of its own would be, and what cannot change does not."""

import numpy as np
import pytest
from test_build import changed
from tiny import tiny_run

from llmattrib.build import build_features
from llmattrib.errors import MethodError
from llmattrib.evaluate.scores import RunScores, scores_of_representers
from llmattrib.evaluate.signs import agreement, signs_of_run, sub_store
from llmattrib.evaluate.suite import evaluate_all
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_run(
        tmp_path_factory.mktemp("signs"),
        num_rows=20,
        labels=True,
        features={"output": "margin", "dtype": "float32"},
        reduce={"methods": ["influence", "grad_dot"]},
        evaluate={"sign_resamples": 3, "num_resamples": 50},
    )
    config = changed(config, values={"data": str(config.data.train), "limit": 4})
    build_features(config)
    reduce_run(config)
    return config


def test_agreement_counts_signs():
    whole = np.array([[3.0, -2.0, 1.0, -1.0], [1.0, 1.0, -5.0, 1.0]])
    half = np.array([[-1.0, -2.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0]])
    every, top = agreement(whole, half)
    assert every.tolist() == [0.75, 0.5]
    assert top.tolist() == [0, 1]  # of the largest |score| alone


def test_a_part_is_reduced_as_it_would_be_alone(run, tmp_path):
    rows = np.array([0, 2, 3, 7, 8, 11, 13, 14, 19])  # over several shards, and a last one that is not full
    scores = RunScores(run)
    other = sub_store(scores.features, rows, str(tmp_path / "half"), run)
    store, whole = RowStore.open(other.layout.features), scores.features
    np.testing.assert_array_equal(store.read(0, 9), whole.read(0, 20)[rows])
    np.testing.assert_array_equal(store.column("log_odds"), whole.column("log_odds")[rows])
    reduce_run(other)
    found = scores_of_representers(other, "influence", scores.validation)
    phi = whole.read(0, 20)[rows, 0].astype(np.float64)
    ridge = 0.1 * (phi**2).sum(axis=1).mean()
    inverse = np.linalg.inv(phi.T @ phi + ridge * np.eye(phi.shape[1]))
    np.testing.assert_allclose(found, scores.validation.phi[:, 0] @ inverse @ phi.T, rtol=1e-3, atol=1e-6)


def test_what_does_not_depend_on_others_agrees_and_chance_is_a_half(run):
    record = signs_of_run(RunScores(run))
    found = {row["method"]: row for row in record.rows}
    assert found["grad_dot"]["agreement"] == found["grad_dot"]["agreement_top"] == 1
    assert found["random"]["agreement"] == pytest.approx(0.5, abs=0.15)
    assert 0.5 < found["influence"]["agreement"] < 1
    assert (
        found["influence"]["agreement_low"] <= found["influence"]["agreement"] <= found["influence"]["agreement_high"]
    )
    assert record.rows == signs_of_run(RunScores(run)).rows  # the same halves


def test_too_few_examples_are_refused(tmp_path):
    config = tiny_run(tmp_path, num_rows=4, reduce={"methods": ["grad_dot"]})
    build_features(config)
    with pytest.raises(MethodError, match="expected: 8 examples or more"):
        signs_of_run(RunScores(config))
    outcome = evaluate_all(RunScores(config), only=["signs"])
    assert outcome.skipped == {"signs": "halves of 4 examples say nothing; 8 or more are needed"}
