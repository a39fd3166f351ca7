"""One more step: small ones are Grad-Dot at the adapter, the factors come back, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_build import changed
from tiny import tiny_run

import llmattrib.forward
from llmattrib.build import build_features
from llmattrib.errors import FingerprintMismatchError, MethodError
from llmattrib.evaluate.scores import RunScores
from llmattrib.evaluate.tail_patch import log_probability, patch, tail_patch_of_run
from llmattrib.games.retraining import load_trainable, log_odds
from llmattrib.reduce import reduce_run
from llmattrib.retrain import game_inputs
from llmattrib.train import train_adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_run(
        tmp_path_factory.mktemp("tail"),
        num_rows=10,
        train={"max_grad_norm": 1e9},
        features={"linearisation": "trained", "output": "loss", "dtype": "float32", "sketch": {"kind": "none"}},
        reduce={"methods": ["grad_dot"]},
        evaluate={"tail_patch_top": 2, "tail_patch_rate": 1e-3, "num_resamples": 50},
    )
    config = changed(config, values={"data": str(config.data.train), "limit": 4})
    train_adapter(config)
    build_features(config)
    reduce_run(config)
    return config


def test_a_small_step_is_grad_dot_and_leaves_nothing(run):
    """Change of mean token log p = rate * <gradient of the query's loss, gradient of the example's loss>."""
    examples, queries, _ = game_inputs(run)
    tuning = load_trainable(run, run.layout.adapter)
    before = {name: factor.detach().clone() for name, factor in tuning.factors.items()}
    start = log_probability(log_odds(run, tuning.loaded, queries.encoded))
    exact = RunScores(run).of("grad_dot")
    for row in (0, 7):
        change = patch(run, tuning, examples.encoded[row], queries.encoded, 1e-3) - start
        np.testing.assert_allclose(change, 1e-3 * exact[:, row], rtol=0.05, atol=2e-6)
        assert np.abs(change).max() > 1e-4
    assert all(torch.equal(factor, before[name]) for name, factor in tuning.factors.items())
    assert all(factor.grad is None for factor in tuning.factors.values())


def test_a_step_in_float16_is_scaled_as_in_training(run, monkeypatch):
    half = changed(run, train={"dtype": "float16"})
    examples, queries, _ = game_inputs(half)
    tuning = load_trainable(half, run.layout.adapter)
    start = log_probability(log_odds(half, tuning.loaded, queries.encoded))
    monkeypatch.setattr(llmattrib.forward, "FLOAT16_LOSS_SCALE", 2.0**-30)  # no gradient is left
    np.testing.assert_array_equal(patch(half, tuning, examples.encoded[0], queries.encoded, 1.0), start)


def test_log_probability_is_that_of_the_odds():
    p = np.array([1e-9, 0.3, 0.999])
    np.testing.assert_allclose(log_probability(np.log(p / (1 - p))), np.log(p), rtol=1e-9)


def test_the_best_is_an_upper_bound_and_gradients_come_near(run):
    record = tail_patch_of_run(RunScores(run))
    found = {row["method"]: row for row in record.rows}
    assert set(found) == {"grad_dot", "best of these", "random", "loss", "tfidf", "bm25", "embedding"}
    assert record.rows[0]["method"] == "best of these"
    assert found["grad_dot"]["change"] == pytest.approx(found["best of these"]["change"], rel=0.05)
    assert found["grad_dot"]["change"] > found["random"]["change"]
    assert all(row["low"] <= row["change"] <= row["high"] and 0 <= row["raised"] <= 1 for row in record.rows)


def test_another_order_of_the_examples_is_refused(run, tmp_path):
    lines = Path(run.data.train).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[::-1]))
    other = changed(run, data={"train": str(tmp_path / "train.jsonl")}, model={"adapters": [run.layout.adapter]})
    with pytest.raises(FingerprintMismatchError, match=r"id of row 0 \(id 'row-0'\): stored 'row-0', now 'row-9'"):
        tail_patch_of_run(RunScores(other))


def test_without_an_adapter_there_is_nothing_to_step_from(run, tmp_path):
    other = tiny_run(tmp_path, reduce={"methods": ["grad_dot"]})
    other = changed(other, values={"data": str(other.data.train)})
    build_features(other)
    with pytest.raises(MethodError, match="expected: one, to step from"):
        tail_patch_of_run(RunScores(other))
