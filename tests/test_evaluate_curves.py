"""Removal and selection curves: an additive game where they are known, real sub-models, resume, the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_build import changed
from test_resume import config_file
from tiny import tiny_run
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.errors import ConfigError, FingerprintMismatchError, MethodError, StoreError
from llmattrib.evaluate.curves import Curves, by_class, curves_of_run, cut, cut_sizes, ranked, rankings_of, retrained
from llmattrib.evaluate.scores import RunScores
from llmattrib.games.chosen_subsets import ChosenSubsets
from llmattrib.games.retraining import RetrainingGame
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.sections import EvaluateConfig
from llmattrib.verify import verify_run

KINDS = ("remove_highest", "remove_lowest", "keep_highest", "keep_lowest")
NUM_EXAMPLES, NUM_PROMPTS = 20, 3


def worth_of(shares):
    """Utilities of an additive game [q, n], and how often each subset was asked for."""
    asked = []

    def utility(members, seed):
        asked.append((seed, members.tobytes()))
        return members.astype(float) @ shares.T + seed

    return utility, asked


def test_curves_of_an_additive_game_are_sums_of_its_shares():
    """With U(S) = sum of shares, each point is minus the shares removed, or of those not kept; areas are trapezoids."""
    shares = stream(0, "curves test").standard_normal((NUM_PROMPTS, NUM_EXAMPLES))
    utility, _ = worth_of(shares)
    curves = Curves({"exact": [ranked(shares.mean(axis=0))]}, KINDS, cut_sizes((0.1, 0.25, 0.5), NUM_EXAMPLES))
    found = curves.curves(utility(curves.members, 0)[None], 0, 200)["exact"]
    mean = np.sort(shares.mean(axis=0))[::-1]
    sizes = [2, 5, 10]
    slow = {
        "remove_highest": [-mean[:k].sum() for k in sizes],
        "remove_lowest": [-mean[-k:].sum() for k in sizes],
        "keep_highest": [mean[:k].sum() - mean.sum() for k in sizes],
        "keep_lowest": [mean[-k:].sum() - mean.sum() for k in sizes],
    }
    for kind, points in slow.items():
        curve = found[kind]
        np.testing.assert_allclose(curve.change, points, atol=1e-12)
        np.testing.assert_allclose(curve.fractions, [0.1, 0.25, 0.5])
        start = -mean.sum() if kind.startswith("keep") else 0.0
        area = 0.1 * (start + points[0]) / 2 + 0.15 * (points[0] + points[1]) / 2 + 0.25 * (points[1] + points[2]) / 2
        assert curve.area == pytest.approx(area / 0.5)
        assert curve.area_low < curve.area < curve.area_high  # prompts differ
        assert (curve.low < curve.change).all()
        assert (curve.change < curve.high).all()


def test_a_prompt_of_its_own_is_measured_alone():
    shares = stream(1, "curves test").standard_normal((NUM_PROMPTS, NUM_EXAMPLES))
    rankings = rankings_of({"exact": shares}, None, EvaluateConfig(curve_prompts=2, num_random=1), 0)
    assert list(rankings) == ["exact", "exact, own", "random"]
    curves = Curves(rankings, ("remove_highest",), cut_sizes((0.25,), NUM_EXAMPLES))
    utility, _ = worth_of(shares)
    found = curves.curves(utility(curves.members, 0)[None], 0, 20)
    slow = np.mean([-np.sort(shares[q])[::-1][:5].sum() for q in range(2)])
    np.testing.assert_allclose(found["exact, own"]["remove_highest"].change, [slow])
    assert found["exact"]["remove_highest"].change[0] > slow  # its own highest hurt a prompt more than the mean's


def test_random_by_class_keeps_the_proportions_at_every_cut():
    classes = ["a"] * 15 + ["b"] * 5
    order = by_class(classes, stream(0, "by class test")).order
    assert sorted(order.tolist()) == list(range(20))
    for size in (4, 8, 12, 16):
        for part in (order[:size], order[-size:]):
            assert abs(sum(classes[row] == "b" for row in part) - size / 4) <= 1
    other = by_class(classes, stream(1, "by class test")).order
    assert not np.array_equal(order, other)


def test_cuts():
    order = np.array([3, 0, 2, 1])
    assert cut(order, "remove_highest", 1).tolist() == [True, True, True, False]
    assert cut(order, "remove_lowest", 1).tolist() == [True, False, True, True]
    assert cut(order, "keep_highest", 2).tolist() == [True, False, False, True]
    assert cut(order, "keep_lowest", 1).tolist() == [False, True, False, False]
    assert cut_sizes((0.01, 0.02, 0.5, 0.999), 10).tolist() == [1, 5, 9]  # never none, never all, each once
    with pytest.raises(MethodError, match="the run has one example\n  expected: two or more"):
        cut_sizes((0.1,), 1)


def test_the_table_is_asked_before_the_game(tmp_path):
    shares = stream(2, "curves test").standard_normal((NUM_PROMPTS, NUM_EXAMPLES))
    members = stream(3, "curves test").random((6, NUM_EXAMPLES)) < 0.5
    members[5] = members[0]
    utility, asked = worth_of(shares)

    def dies(subset, seed):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return utility(subset, seed)

    path = str(tmp_path / "chosen.zarr")

    def table():
        return ChosenSubsets(path, NUM_EXAMPLES, NUM_PROMPTS, {"name": "toy"})

    with pytest.raises(KeyboardInterrupt):
        table().worth(members, range(2), dies)
    found = table().worth(members, range(2), utility)
    assert len(asked) == len(set(asked)) == 10  # five subsets, two seeds, each once though it was killed
    slow = members @ shares.T
    np.testing.assert_allclose(found, [slow, slow + 1])
    np.testing.assert_array_equal(table().worth(members[::-1], range(1, 2), dies)[0], found[1][::-1])  # asks nothing
    with pytest.raises(FingerprintMismatchError, match="name"):
        ChosenSubsets(path, NUM_EXAMPLES, NUM_PROMPTS, {"name": "another"})
    with pytest.raises(StoreError, match="expected: finite numbers"):
        table().worth(~members[:1], range(1), lambda subset, seed: np.full((1, NUM_PROMPTS), np.nan))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    config = tiny_run(
        folder,
        num_rows=8,
        labels=True,
        reduce={"methods": ["influence", "grad_dot"]},
        evaluate={"fractions": [0.25, 0.5], "num_random": 1, "num_resamples": 20},
    )
    config = changed(config, values={"data": str(config.data.train), "limit": 3})
    build_features(config)
    reduce_run(config)
    return config


def test_curves_are_of_real_sub_models(run, monkeypatch, tokenised):
    """What is recorded is the difference of two real fine-tunes; asked again nothing is trained."""
    record = curves_of_run(RunScores(run))
    assert tokenised.count(8) == 1
    names = {"influence", "grad_dot", "loss", "tfidf", "bm25", "embedding", "random", "random by class"}
    assert {row["method"] for row in record.rows} == names
    scores = RunScores(run).of("influence").mean(axis=0)
    without = np.ones(8, bool)
    without[np.argsort(-scores, kind="stable")[:2]] = False
    pair = retrained(run, np.array([np.ones(8, bool), without]), range(1))[0]
    change = record.details["influence"]["remove_highest"]["change"]
    assert change[0] == pytest.approx((pair[1] - pair[0]).mean(), abs=1e-5)
    assert abs(change[0]) > 1e-4
    monkeypatch.setattr(RetrainingGame, "worth", None)  # nothing is trained
    assert curves_of_run(RunScores(run)).rows == record.rows
    saved = json.loads(Path(run.layout.path("evaluation", "curves.json")).read_text())
    assert saved["rows"] == list(record.rows)


def test_verify_names_the_command_that_fills_the_table_again(run):
    curves_of_run(RunScores(run))
    record = min(Path(run.layout.path("retraining", "chosen.zarr", "commits")).glob("[0-9]*"))
    kept = record.read_bytes()
    record.unlink()
    (finding,) = [item for item in verify_run(run, ["run.yaml"]) if "chosen" in item.place]
    record.write_bytes(kept)
    assert finding.rerun == "llmattrib evaluate curves run.yaml"


def test_other_examples_than_those_of_the_features_are_refused(run, tmp_path):
    """A file with as many rows, two of them in the other order, or one corrected, or one more."""
    lines = Path(run.data.train).read_text().splitlines(keepends=True)
    swapped = [lines[1], lines[0], *lines[2:]]
    corrected = [*lines[:2], lines[2].replace('"yes"', '"no"'), *lines[3:]]
    assert corrected != lines
    for rows, said in (
        (swapped, r"id of row 0 \(id 'row-0'\): stored 'row-0', now 'row-1'"),
        (corrected, r"completion of row 2 \(id 'row-2'\): stored 'yes', now 'no'"),
        ([*lines, lines[0].replace("row-0", "row-8")], "num_rows: stored 8, now 9"),
    ):
        (tmp_path / "train.jsonl").write_text("".join(rows))
        other = changed(run, data={"train": str(tmp_path / "train.jsonl")})
        with pytest.raises(FingerprintMismatchError, match=said):
            curves_of_run(RunScores(other))


def test_by_the_command_line(run, tmp_path):
    path = str(config_file(run, tmp_path))
    done = CliRunner().invoke(app, ["evaluate", "curves", path])
    assert done.exit_code == 0, done.output
    assert "remove highest" in done.stdout
    assert "random by class" in done.stdout
    only = [word for name in ("lds", "curves", "mislabel") for word in ("--only", name)]
    done = CliRunner().invoke(app, ["evaluate", "all", path, *only, "--json"])
    assert done.exit_code == 0, done.output
    names = [json.loads(line)["evaluation"] for line in done.stdout.splitlines()]
    assert "curves" in names
    assert "skipped lds: no sub-models of the design banzhaf" in done.stderr
    assert "skipped mislabel: neither evaluate.mislabeled nor" in done.stderr
    done = CliRunner().invoke(app, ["evaluate", "all", path, "--only", "everything"])
    assert done.exit_code == 2
    assert "there is no evaluation 'everything'" in done.stderr


def test_only_and_skip_name_evaluations(run):
    from llmattrib.evaluate.suite import evaluate_all

    with pytest.raises(ConfigError, match="there is no evaluation 'lsd'"):
        evaluate_all(RunScores(run), skip=("lsd",))
