"""Sub-models: each is what `train` would make of its subset, tables resume and grow, ranks agree, AME reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_build import changed, contents
from test_distributed import launch
from test_resume import config_file
from tiny import tiny_adapter_dir, tiny_run, tiny_tokenizer
from typer.testing import CliRunner

from llmattrib.adapters import ADAPTER_WEIGHTS
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.data import load_validation_examples
from llmattrib.distributed import Ranks
from llmattrib.errors import ConfigError, FingerprintMismatchError, MethodError, StoreNotFoundError
from llmattrib.evaluate.lds import lds_of_run
from llmattrib.evaluate.leave_one_out import leave_one_out_of_run
from llmattrib.evaluate.scores import RunScores
from llmattrib.evaluate.suite import evaluate_all
from llmattrib.extraction import encode_examples, load_extractor
from llmattrib.games.retraining import RetrainingGame, load_trainable, log_odds
from llmattrib.games.subset_table import BANZHAF, LEAVE_OUT, SubsetTable
from llmattrib.plan.run import plan_run
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.retrain import retrain, retrained_rows
from llmattrib.train import encode_without_weights, train_adapter, training_inputs
from llmattrib.values.stage import compute_values

NUM_ROWS, NUM_QUERIES = 8, 3


@pytest.fixture
def run(tmp_path):
    config = tiny_run(tmp_path, num_rows=NUM_ROWS, labels=True, retraining={"num_subsets": 4, "shard_size": 2})
    return changed(config, values={"data": str(config.data.train), "limit": NUM_QUERIES})


def game_of(config):
    examples, _ = training_inputs(config)
    queries = encode_without_weights(config, load_validation_examples(config.data, config.values))
    ids = [example.id for example in examples.examples]
    return RetrainingGame(config, load_trainable(config), examples.encoded, ids, queries.encoded)


def test_everybody_is_the_adapter_that_train_makes(run):
    """The margins of the sub-model on all examples are the log-odds that features of the trained adapter store."""
    game = game_of(run)
    full = game.worth(np.ones((1, NUM_ROWS), bool), run.seed)[0]
    trained = changed(run, features={"linearisation": "trained", "output": "margin", "dtype": "float32"})
    train_adapter(trained)
    build_features(trained)
    stored = Run(trained)._features.column("log_odds")[:NUM_QUERIES]
    np.testing.assert_allclose(full, stored, rtol=2e-5, atol=2e-5)


def test_a_subset_is_trained_as_a_data_set_of_its_own(run, tmp_path):
    lines = Path(run.data.train).read_text().splitlines()
    (tmp_path / "part.jsonl").write_text("\n".join(lines[1:6:2]) + "\n")
    part = changed(run, tmp_path / "part", data={"train": str(tmp_path / "part.jsonl")})
    members = np.zeros((2, NUM_ROWS), bool)
    members[1, 1:6:2] = True
    found = game_of(run).worth(members, run.seed)
    alone = game_of(part)
    np.testing.assert_array_equal(found[1], alone.worth(np.ones((1, 3), bool), run.seed)[0])
    base = game_of(run)
    np.testing.assert_array_equal(found[0], log_odds(run, base.tuning.loaded, base.queries))  # nobody: untrained
    assert np.abs(found[1] - found[0]).max() > 1e-3


def test_killed_and_run_again_gives_the_same_bytes(run, tmp_path, monkeypatch):
    run = changed(run, retraining={"num_seeds": 2})
    whole = changed(run, tmp_path / "whole")
    assert retrain(whole).num_done == 8
    done, worth = [], RetrainingGame.worth

    def dies(self, members, seed, progress):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(seed)
        return worth(self, members, seed, progress)

    with monkeypatch.context() as patch:
        patch.setattr(RetrainingGame, "worth", dies)
        with pytest.raises(KeyboardInterrupt):
            retrain(run)
    result = retrain(run)
    assert result.num_done == 6
    assert contents(result.path) == contents(whole.layout.path("retraining"))
    assert retrain(run).num_done == 0
    rows = retrained_rows(run)
    tables = [SubsetTable.open(run.layout.path("retraining", f"seed{seed}.zarr")).rows(BANZHAF) for seed in (0, 1)]
    np.testing.assert_array_equal(tables[0].members, tables[1].members)
    np.testing.assert_array_equal(rows.utilities, (tables[0].utilities + tables[1].utilities) / 2)
    assert not np.array_equal(tables[0].utilities, tables[1].utilities)


def test_it_grows_by_subsets_and_by_seeds(run):
    retrain(run)
    before = retrained_rows(run)
    more = changed(run, retraining={"num_subsets": 6, "num_seeds": 2})
    assert retrain(more).num_done == 2 + 6
    np.testing.assert_array_equal(retrained_rows(more).members[:4], before.members)
    np.testing.assert_array_equal(
        retrained_rows(changed(more, retraining={"num_seeds": 1})).utilities[:4], before.utilities
    )


def test_leaving_out(run):
    config = changed(run, retraining={"design": "leave_out", "num_subsets": NUM_ROWS + 1})
    retrain(config)
    rows = retrained_rows(config)
    left = ~rows.members[:NUM_ROWS]
    assert (left.sum(axis=1) == 1).all()
    assert (left.sum(axis=0) == 1).all()
    assert rows.members[NUM_ROWS:].all()
    full = game_of(config).worth(np.ones((1, NUM_ROWS), bool), config.seed)[0]
    np.testing.assert_array_equal(rows.utilities[NUM_ROWS:], [full, full])
    assert rows.design == LEAVE_OUT


def test_a_warm_start_begins_at_the_adapter(run):
    warm = changed(run, retraining={"warm_start": True})
    with pytest.raises(ConfigError, match="needs the run's adapter, and there are 0"):
        retrain(warm)
    train_adapter(run)
    still = changed(warm, train={"learning_rate": 1e-12})
    retrain(still)
    trained = load_trainable(run, run.layout.adapter)
    queries = encode_without_weights(run, load_validation_examples(run.data, run.values))
    at_adapter = log_odds(run, trained.loaded, queries.encoded)
    np.testing.assert_allclose(retrained_rows(still).utilities, np.tile(at_adapter, (4, 1)), atol=1e-5)
    assert Path(run.layout.adapter, ADAPTER_WEIGHTS).is_file()


def test_sub_models_have_the_tokenizer_that_the_adapter_of_the_run_brings(run, tmp_path):
    adapter = tiny_adapter_dir(tmp_path, run.model.name)
    tiny_tokenizer(chat_template=False).save_pretrained(adapter)
    run = changed(run, model={"adapters": [adapter]})
    examples, identity = training_inputs(run)
    extractor = load_extractor(run)
    assert examples.encoded == encode_examples(run, extractor, examples.examples).encoded
    assert identity["chat_template"] == "none" == extractor.loaded.fingerprint["chat_template"]
    assert load_trainable(run).loaded.tokenizer.chat_template is None
    assert plan_run(run).tokens.num_tokens == sum(map(len, examples.encoded))


def test_other_settings_and_missing_tables_are_named(run):
    with pytest.raises(StoreNotFoundError, match="llmattrib retrain"):
        retrained_rows(run)
    retrain(run)
    with pytest.raises(FingerprintMismatchError, match=r"(?s)train\.learning_rate.*by subsets, not by examples"):
        retrain(changed(run, train={"learning_rate": 1e-3}))
    with pytest.raises(ConfigError, match=r"values\.data is not set"):
        retrain(changed(run, values={"data": None}))


def test_sub_models_of_something_else_judge_nothing(run, tmp_path):
    """Other prompts, training, seeds of the draws and data: named when the sub-models are read, as when more are."""
    run = changed(run, reduce={"methods": ["grad_dot"]}, retraining={"design": "attribution"})
    build_features(run)
    reduce_run(run)
    retrain(run)
    once = lds_of_run(RunScores(changed(run, evaluate={"num_resamples": 1})))
    assert all(row["low"] == row["high"] for row in once.rows)
    lines = Path(run.data.train).read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[5:8]))
    (tmp_path / "swapped.jsonl").write_text("".join(lines[::-1]))
    prompts = {"data": str(tmp_path / "prompts.jsonl")}
    for sections, key in (
        ({"values": prompts}, "game.queries"),
        ({"train": {"epochs": 1, "learning_rate": 1.0}}, "game.train.learning_rate"),
        ({"model": {"lora": {"rank": 2}}}, "game.lora.rank"),
        ({"data": {"train": str(tmp_path / "swapped.jsonl")}}, "game.data"),
    ):
        other = changed(run, **sections)
        for read in (
            retrained_rows,
            lambda config: lds_of_run(RunScores(config)),
            lambda config: leave_one_out_of_run(RunScores(changed(config, retraining={"design": "leave_out"}))),
            lambda config: compute_values(
                changed(config, values={"method": "ame_lasso", "game": "retraining", "num_samples": 4})
            ),
        ):
            with pytest.raises(FingerprintMismatchError) as caught:
                read(other)
            assert key in caught.value.differing
    outcome = evaluate_all(RunScores(changed(run, train={"epochs": 1})), only=["lds"])
    assert not outcome.records
    assert "was made with other settings (game.train.epochs: stored 2, now 1)" in outcome.skipped["lds"]
    moved = Path(run.layout.path("retraining"))
    moved.joinpath("seed0.zarr").rename(moved / "seed1.zarr")
    with pytest.raises(FingerprintMismatchError) as caught:
        retrained_rows(changed(run, seed=1))
    assert caught.value.differing["seed"] == (0, 1)


def test_sub_models_of_new_data_do_not_judge_old_features(run):
    run = changed(run, reduce={"methods": ["grad_dot"]})
    build_features(run)
    reduce_run(run)
    lines = Path(run.data.train).read_text().splitlines(keepends=True)
    Path(run.data.train).write_text("".join(lines[::-1]))
    retrain(run)
    with pytest.raises(FingerprintMismatchError, match=r"(?s)features\.zarr .*id of row 0 \(id 'row-0'\).*build` and"):
        lds_of_run(RunScores(run))


def test_two_processes_give_the_bytes_of_one(run, tmp_path):
    whole = changed(run, tmp_path / "whole")
    retrain(whole, Ranks())
    ended = launch("launch/retrain.py", config_file(run, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "4 sub-models trained now" in ended.stdout
    assert contents(run.layout.path("retraining")) == contents(whole.layout.path("retraining"))


def test_lds_by_the_command_line(run, tmp_path, tokenised):
    run = changed(run, reduce={"methods": ["influence"]}, retraining={"num_subsets": 12})
    path = str(config_file(run, tmp_path))
    for stage in ("retrain", "build", "reduce"):
        done = CliRunner().invoke(app, [stage, path])
        assert done.exit_code == 0, done.output
    tokenised.clear()
    done = CliRunner().invoke(app, ["evaluate", "lds", path, "--json"])
    assert done.exit_code == 0, done.output
    assert tokenised.count(NUM_ROWS) == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["method"] for row in rows} == {"influence", "random", "size", "loss", "tfidf", "bm25", "embedding"}
    assert all(-1 <= row["low"] <= row["lds"] <= row["high"] <= 1 for row in rows)


def test_ame_of_sub_models(run, tmp_path, tokenised):
    """A constant game plus one example's share: LASSO finds it, in values of the retraining game."""
    run = changed(run, retraining={"design": "attribution", "num_subsets": 64, "shard_size": 32})
    run = changed(run, values={"method": "ame_lasso", "game": "retraining", "num_samples": 64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RetrainingGame, "worth", lambda self, members, seed, progress: np.tile(3.0 * members[:, [2]], (1, 3))
        )
        retrain(run)
    path = str(config_file(run, tmp_path))
    tokenised.clear()
    done = CliRunner().invoke(app, ["values", path])
    assert done.exit_code == 0, done.output
    assert tokenised.count(NUM_ROWS) == 1
    lines = Path(run.run_dir, "values", "ame_lasso_retraining.csv").read_text().splitlines()
    values = [float(line.split(",")[2]) for line in lines[1:]]
    assert np.argmax(values) == 2
    assert values[2] == pytest.approx(3.0, rel=0.1)
    with pytest.raises(MethodError, match=r"values\.utility=accuracy, and sub-models are asked for the log-odds"):
        compute_values(changed(run, values={"utility": "accuracy"}))
    shutil.rmtree(Path(run.run_dir, "retraining"))
    missing = CliRunner().invoke(app, ["values", path, "values.num_samples=32"])
    assert missing.exit_code == 2
    assert "llmattrib retrain" in missing.output
