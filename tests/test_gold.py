"""Further training: closed forms of linear models, plain loops of real ones, and tables that resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_build import changed, contents
from test_distributed import launch
from test_resume import config_file
from test_scorers import rows_of
from tiny import tiny_run
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.data import load_validation_examples
from llmattrib.encoding import collate
from llmattrib.errors import ConfigError, FingerprintMismatchError, MethodError, NonFiniteGradientError
from llmattrib.evaluate.gold import ONE_SEED, cosines, judge
from llmattrib.evaluate.scores import spectral_scores
from llmattrib.features.outputs import Reading, evaluate_output
from llmattrib.forward import completion_logits
from llmattrib.further_training import gold_scores, train_further
from llmattrib.games.further_training import FurtherTraining, batch_of
from llmattrib.games.lora_copies import LoraCopies
from llmattrib.games.retraining import load_trainable
from llmattrib.model import load_model
from llmattrib.query import Run
from llmattrib.reader import FeatureReader
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.scorers.spectral import Spectral
from llmattrib.sections import GoldConfig
from llmattrib.train import encode_without_weights, train_adapter, training_inputs
from llmattrib.values.validation import load_validation
from llmattrib.verify import verify_run

NUM_ROWS, NUM_QUERIES = 9, 3


class Regression:
    """Least squares, k copies [k, p]; a margin is a prediction."""

    def __init__(self, x, y, asked, start):
        self.x, self.y, self.asked = (torch.as_tensor(array) for array in (x, y, asked))
        self.num_examples, self.num_queries, self._start = len(x), len(asked), torch.as_tensor(start)

    def start(self, num_copies):
        return [self._start.expand(num_copies, -1).clone().requires_grad_(True)]

    def losses(self, parameters, rows):
        return ((self.x[rows] * parameters[0][:, None]).sum(2) - self.y[rows]) ** 2 / 2

    def margins(self, parameters):
        return (parameters[0] @ self.asked.T).detach().numpy()


def regression(n=30, p=4, lam=0.0):
    """A regression at its ridge solution; returns it with x, y, w and the Hessian."""
    draws = stream(0, "gold test", n)
    x, y, asked = draws.standard_normal((n, p)), draws.standard_normal(n), draws.standard_normal((5, p))
    hessian = x.T @ x / n + lam * np.eye(p)
    w = np.linalg.solve(hessian, x.T @ y / n)
    return Regression(x, y, asked, w), x, y, w, hessian


def one_out(n):
    return ~np.eye(n, dtype=bool)


def lost(trainee, seed=0, **settings):
    """[T, n, q] of leaving out each."""
    gold = GoldConfig(**settings)
    worth = FurtherTraining(trainee, gold).worth(one_out(trainee.num_examples), seed)
    return worth.reshape(trainee.num_examples, len(gold.steps), -1).transpose(1, 0, 2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everybody_less_everybody_is_exactly_zero(optimizer):
    trainee, *_ = regression()
    game = FurtherTraining(trainee, GoldConfig(steps=(1, 9), optimizer=optimizer, batch_size=7))
    members = one_out(30)[:5]
    members[[1, 3]] = True
    margins = game.margins(members, seed=2)
    np.testing.assert_array_equal(margins[:, [2, 4]], margins[:, [0, 0]])
    worth = game.worth(members, seed=2)
    assert not worth[[1, 3]].any()
    assert worth[[0, 2, 4]].all()


def test_leaving_out_of_a_ridge_regression_is_its_closed_form():
    """w_T without i - w = H^-1 g_i / (n (1 - h_i)) for T to infinity, the ridge staying whole."""
    lam, n = 0.3, 30
    trainee, x, y, w, hessian = regression(n, lam=lam)
    found = lost(trainee, steps=(400,), learning_rate=0.3, weight_decay=lam, batch_size=None)[0]
    inverse = np.linalg.inv(hessian)
    leverage = np.einsum("ip,pk,ik->i", x, inverse, x) / n
    moved = ((x @ w - y) / (1 - leverage) / n)[:, None] * (x @ inverse)
    np.testing.assert_allclose(found, -moved @ trainee.asked.numpy().T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_spectral_is_it_to_first_order_in_1_over_n(steps):
    """From the optimum of a linear model, at the rate of the steps; the error falls as 1/n."""
    errors, rate = [], 0.2
    for n in (40, 160):
        trainee, x, y, w, _ = regression(n)
        found = lost(trainee, steps=(steps,), learning_rate=rate, batch_size=None)[0]
        scorer = Spectral(steps, rate / n * np.sum(x**2))
        features = x.astype(np.float32)
        representers = scorer.compute(scorer.init(rows_of(features)), features, np.zeros(n, np.float32))
        expected = ((y - x @ w)[:, None] * representers) @ trainee.asked.numpy().T
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors[0] < 0.2
    if steps == 1:
        assert max(errors) < 1e-5
    else:
        assert 2 < errors[0] / errors[1] < 8


def test_batches_of_an_epoch_hold_everybody_once_and_leaving_out_keeps_them():
    batches = [batch_of(step, 10, 4, seed=3) for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert batches[0].tolist() != batches[3].tolist()
    assert batch_of(5, 10, None, seed=3).tolist() == list(range(10)) == batch_of(0, 10, 99, seed=1).tolist()


def test_a_step_is_that_of_its_definition():
    """One copy by hand, mini-batches and all; copies trained at once do not touch each other."""
    trainee, x, y, w, _ = regression()
    found = lost(trainee, seed=4, steps=(1, 2, 7), learning_rate=0.1, batch_size=8)
    for left_out in (0, 17):
        ends = []
        for share in (0.0, 1 / 30):
            theta, path = w.copy(), []
            for step in range(7):
                batch = batch_of(step, 30, 8, seed=4)
                gradient = x[batch].T @ (x[batch] @ theta - y[batch]) / len(batch)
                gradient -= share * x[left_out] * (x[left_out] @ theta - y[left_out])
                theta = theta - 0.1 * gradient
                path.append(trainee.asked.numpy() @ theta)
            ends.append(np.array(path)[[0, 1, 6]])
        np.testing.assert_allclose(found[:, left_out], ends[0] - ends[1], rtol=1e-9, atol=1e-15)
    alone = FurtherTraining(trainee, GoldConfig(steps=(7,), learning_rate=0.1)).worth(one_out(30)[17:18], 4)
    np.testing.assert_allclose(alone[0], found[2, 17], rtol=1e-12)


def test_steps_that_diverge_are_an_error():
    trainee, *_ = regression()
    trainee.y[3] = np.inf
    with pytest.raises(NonFiniteGradientError, match=r"not finite in step 1 (.|\n)*lower gold\.learning_rate"):
        lost(trainee, batch_size=None)


@pytest.fixture
def run(tmp_path):
    gold = {"steps": [1, 3], "learning_rate": 0.05, "batch_size": 4, "num_seeds": 2, "num_examples": 4, "shard_size": 2}
    config = tiny_run(tmp_path, num_rows=NUM_ROWS, gold=gold)
    config = changed(
        config,
        values={"data": str(config.data.train), "limit": NUM_QUERIES},
        features={
            "output": "log_odds",
            "linearisation": "trained",
            "sketch": {"kind": "none"},
            "dtype": "float32",
            "tokens_per_batch": 512,
        },
    )
    train_adapter(config)
    return config


def inputs_of(config):
    examples, _ = training_inputs(config)
    return examples.encoded, encode_without_weights(
        config, load_validation_examples(config.data, config.values)
    ).encoded


def copies_of(config):
    loaded = load_model(config.model, adapters=[config.layout.adapter], dtype="float32")
    return LoraCopies(config, loaded, *inputs_of(config))


def plain(config, left_out, seed, share):
    """Further training of PEFT's own factors, one model at a time; returns margins [T, q]."""
    loaded = load_trainable(config, config.layout.adapter).loaded
    loaded.model.double()
    examples, queries = inputs_of(config)
    factors = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    gold, found = config.gold, []
    kind = torch.optim.SGD if gold.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(factors, lr=gold.learning_rate, weight_decay=gold.weight_decay)

    def loss_of(row):
        logits, _, target = completion_logits(loaded.model, collate([examples[row]], loaded.pad_id))
        return cross_entropy(logits, target)

    for step in range(max(gold.steps)):
        batch = batch_of(step, len(examples), gold.batch_size, seed)
        (sum(map(loss_of, batch)) / len(batch) - share * loss_of(left_out)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in gold.steps:
            with torch.no_grad():
                batches = [collate([query], loaded.pad_id) for query in queries]
                readings = [Reading(*completion_logits(loaded.model, one), one.labels) for one in batches]
                found.append([float(evaluate_output("log_odds", reading, ()).log_odds) for reading in readings])
    return np.array(found)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.5), ("adamw", 0.01)])
def test_copies_of_an_adapter_train_as_one_model_at_a_time(run, optimizer, rate):
    run = changed(run, gold={"optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.01})
    members = one_out(NUM_ROWS)[[2, 5]]
    margins = FurtherTraining(copies_of(run), run.gold).margins(members, seed=1)
    still = changed(run, gold={"learning_rate": 1e-12})
    start = FurtherTraining(copies_of(still), still.gold).margins(members, seed=1)
    for copy, (left_out, share) in enumerate([(0, 0.0), (2, 1 / NUM_ROWS), (5, 1 / NUM_ROWS)]):
        expected = plain(run, left_out, 1, share)  # its norms round to float32
        np.testing.assert_allclose(margins[:, copy], expected, atol=3e-6)
        assert np.abs(expected - start[:, copy]).max() > 1e-2


def test_one_tiny_step_is_grad_dot(run):
    """To 1e-5 at a rate of 1e-7, where float32 margins would say nothing: the model computes in float64."""
    build_features(run)
    rate = 1e-7
    game = FurtherTraining(
        copies_of(run), changed(run, gold={"steps": [1], "learning_rate": rate, "batch_size": None}).gold
    )
    found = game.worth(one_out(NUM_ROWS), seed=0)
    loaded = Run(run)
    asked, features = load_validation(loaded).phi[:, 0].astype(np.float64), loaded._features
    certainty = 1 / (1 + np.exp(-features.column("log_odds").astype(np.float64)))
    phi = features.read(0, NUM_ROWS)[:, 0].astype(np.float64)
    expected = rate / NUM_ROWS * (1 - certainty)[:, None] * (phi @ asked.T)
    assert np.abs(expected).max() < 1e-6
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_float64_is_of_bases_that_can_be_widened(run):
    narrow = run.model_copy(update={"model": run.model.model_copy(update={"quantization": "8bit"})})
    loaded = load_model(run.model, adapters=[run.layout.adapter], dtype="float32")
    with pytest.raises(ConfigError, match=r"gold\.dtype is float64, and the base is held in 8bit"):
        LoraCopies(narrow, loaded, *inputs_of(run))


def test_killed_and_run_again_gives_the_same_bytes(run, tmp_path, monkeypatch):
    whole = changed(run, tmp_path / "whole")
    shutil.copytree(run.layout.adapter, whole.layout.adapter)
    assert train_further(whole) == 8
    done, worth = [], FurtherTraining.worth

    def dies(self, members, seed, progress):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(seed)
        return worth(self, members, seed, progress)

    with monkeypatch.context() as patch:
        patch.setattr(FurtherTraining, "worth", dies)
        with pytest.raises(KeyboardInterrupt):
            train_further(run)
    assert train_further(run) == 6
    assert contents(run.layout.path("gold")) == contents(whole.layout.path("gold"))
    assert train_further(run) == 0
    left_out, scores = gold_scores(run)
    assert scores.shape == (2, 2, NUM_QUERIES, 4)
    game = FurtherTraining(copies_of(run), run.gold)
    expected = game.worth(one_out(NUM_ROWS)[left_out[:2]], seed=1).reshape(2, 2, NUM_QUERIES)
    np.testing.assert_array_equal(scores[1, :, :, :2], expected.transpose(1, 2, 0))
    assert train_further(changed(run, gold={"num_examples": None})) == 12  # 10 rows a seed, the last is everybody
    more_out, more = gold_scores(run)
    assert sorted(more_out) == list(range(NUM_ROWS))
    np.testing.assert_array_equal(more[..., :4], scores)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_bytes_of_one(run, tmp_path):
    whole = changed(run, tmp_path / "whole")
    shutil.copytree(run.layout.adapter, whole.layout.adapter)
    train_further(whole)
    run = changed(run, reduce={"methods": ["grad_dot"]})
    build_features(run)
    reduce_run(run)
    ended = launch("launch/gold.py", config_file(run, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "one_seed" in ended.stdout
    assert contents(run.layout.path("gold")) == contents(whole.layout.path("gold"))


def test_other_settings_and_a_missing_adapter_are_named(run, tmp_path):
    train_further(run)
    with pytest.raises(FingerprintMismatchError, match=r"gold\.learning_rate"):
        train_further(changed(run, gold={"learning_rate": 1.0}))
    assert train_further(changed(run, train={"learning_rate": 1.0})) == 0  # of the adapter that is there
    for gold in ({"steps": [100, 200]}, {"steps": [8]}, {"steps": [1, 4, 16]}, {"learning_rate": 1.0}):
        other = changed(run, gold=gold)
        (key,) = (f"game.gold.{name}" for name in gold)
        with pytest.raises(FingerprintMismatchError) as caught:
            gold_scores(other)  # not numbers of the stored steps under other names
        assert key in caught.value.differing
    with pytest.raises(FingerprintMismatchError, match=r"game\.queries"):
        gold_scores(changed(run, values={"limit": NUM_QUERIES - 1}))
    assert gold_scores(changed(run, train={"learning_rate": 1.0}))[1].shape[1] == len(run.gold.steps)
    init = changed(run, tmp_path / "other", features={"linearisation": "init"})
    with pytest.raises(ConfigError, match="the run has 0 adapters"):
        train_further(init)


def test_verify_reads_the_tables(run):
    train_further(run)
    table = Path(run.layout.path("gold", "seed0.zarr"))
    assert not [finding for finding in verify_run(run, [run.run_dir]) if finding.place.startswith("gold")]
    (table / "utilities" / "c.0.0").write_bytes(b"broken")
    (finding,) = [finding for finding in verify_run(run, [run.run_dir]) if finding.place.startswith("gold")]
    assert "evaluate gold" in finding.rerun


def test_gold_by_the_command_line_and_spectral_is_that_of_reduce(run, tmp_path, tokenised):
    run = changed(
        run, gold={"learning_rate": 0.01, "steps": [1, 3]}, reduce={"methods": ["grad_dot", "spectral(3,0.5)"]}
    )
    path = str(config_file(run, tmp_path))
    early = CliRunner().invoke(app, ["evaluate", "gold", path])
    assert early.exit_code == 2  # before any training
    assert not Path(run.layout.path("gold")).exists()
    for stage in ("build", "reduce"):
        done = CliRunner().invoke(app, [stage, path])
        assert done.exit_code == 0, done.output
    skipped = CliRunner().invoke(app, ["evaluate", "all", path, "--only", "gold"])
    assert "skipped gold: no further training" in skipped.stdout
    tokenised.clear()
    done = CliRunner().invoke(app, ["evaluate", "gold", path, "--json"])
    assert done.exit_code == 0, done.output
    assert tokenised.count(NUM_ROWS) == 1
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first = {row["method"]: row for row in rows if row["steps"] == 1}
    assert first.keys() >= {"grad_dot", "spectral(3,0.5)", "spectral", "random", "loss", "tfidf", ONE_SEED}
    assert all(-1.001 < row["low"] <= row["high"] < 1.001 for row in rows)
    assert first["spectral"]["cosine"] > 0.99
    record = json.loads(Path(run.layout.path("evaluation", "gold.json")).read_text())
    assert [row["method"] for row in record["rows"]] == [row["method"] for row in rows]
    rate = float(record["notes"][0].partition("spectral(T,")[2].partition(")")[0])
    reader, queries = FeatureReader(Run(run)._features), load_validation(Run(run)).phi[:, 0]
    relative, found = spectral_scores(reader, queries, (3,), 0.01)
    assert rate == pytest.approx(relative, rel=1e-3)
    p = 1 / (1 + np.exp(-reader.log_odds))
    phi = reader.store.read(0, NUM_ROWS)[:, 0].astype(np.float64)
    curvature, moved = (phi.T * (p * (1 - p))) @ phi / NUM_ROWS, np.zeros((NUM_ROWS, phi.shape[1]))
    for _ in range(3):
        moved = moved - 0.01 * moved @ curvature + 0.01 / NUM_ROWS * (1 - p)[:, None] * phi
    np.testing.assert_allclose(found[3], queries @ moved.T, rtol=1e-4, atol=1e-5 * np.abs(found[3]).max())


def test_features_that_are_no_loss_and_rates_that_overshoot_are_refused(run):
    build_features(run)
    reader = FeatureReader(Run(run)._features)
    queries = load_validation(Run(run)).phi[:, 0]
    with pytest.raises(MethodError, match=r"diverges at rate(.|\n)*gold\.learning_rate"):
        spectral_scores(reader, queries, (2,), 1e4)
    reader.output = "pntk"
    with pytest.raises(MethodError, match="output pntk, whose gradients are not those of a loss"):
        spectral_scores(reader, queries, (2,), 0.1)


def test_cosines_are_their_definition_and_weights_are_repetitions():
    draws = stream(0, "cosines")
    one, other = draws.standard_normal((2, 4, 9))
    one[3] = 2.5  # a constant says nothing
    slow = [np.corrcoef(a, b)[0, 1] for a, b in zip(one[:3], other[:3], strict=True)]
    np.testing.assert_allclose(cosines(one, other)[0], [*slow, 0], rtol=1e-12)
    chosen = draws.integers(0, 9, 9)
    counts = np.bincount(chosen, minlength=9)[None].astype(float)
    np.testing.assert_allclose(
        cosines(one, other, counts)[0], cosines(one[:, chosen], other[:, chosen])[0], rtol=1e-9, atol=1e-12
    )


def test_judging_ranks_methods_beside_what_one_seed_can_reach():
    draws = stream(1, "judge")
    truth = draws.standard_normal((6, 40))
    gold = truth + 0.5 * draws.standard_normal((5, 6, 40))
    rows = judge(8, {"noise": draws.standard_normal((6, 40)), "truth": truth, "size": np.ones((6, 40))}, gold)
    assert [row.method for row in rows][:2] == ["truth", ONE_SEED]
    found = {row.method: row for row in rows}
    assert found["size"].cosine == 0
    others = [
        np.corrcoef(gold[k, q], np.delete(gold, k, axis=0).mean(axis=0)[q])[0, 1] for k in range(5) for q in range(6)
    ]
    assert found[ONE_SEED].cosine == pytest.approx(np.mean(others))
    assert found["truth"].low < found["truth"].cosine < found["truth"].high
    assert found["noise"].low < 0 < found["noise"].high or abs(found["noise"].cosine) < 0.2


def test_steps_must_rise():
    with pytest.raises(ValueError, match="steps are not rising numbers"):
        GoldConfig(steps=(4, 1))
