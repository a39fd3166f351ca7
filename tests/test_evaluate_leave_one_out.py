"""Leave-one-out: the exact effects score one, anything else what scipy says; errors."""

import numpy as np
import pytest
import scipy.stats
from test_build import changed
from test_resume import config_file
from tiny import tiny_run
from typer.testing import CliRunner

from llmattrib.cli import app
from llmattrib.errors import MethodError
from llmattrib.evaluate.lds import agreement_note, reachable, seed_agreement, spearman
from llmattrib.evaluate.leave_one_out import leave_one_out
from llmattrib.games.subset_table import BANZHAF, LEAVE_OUT, draw_rows
from llmattrib.rng import stream

NUM_EXAMPLES, NUM_PROMPTS = 12, 4


@pytest.fixture
def game():
    shares = stream(0, "leave one out test").standard_normal((NUM_PROMPTS, NUM_EXAMPLES))
    rows = draw_rows(LEAVE_OUT, 0, NUM_EXAMPLES, NUM_EXAMPLES + 2, lambda members: members @ shares.T + 7.0)
    return shares, rows


@pytest.mark.parametrize("noise", [0.5, 1.0])
@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_what_can_be_reached_is_what_the_truth_without_noise_has(noise, num_seeds):
    draws = stream(0, "reachable", num_seeds)
    truth = draws.standard_normal((4000, 4))
    seeds = truth + noise * draws.standard_normal((num_seeds, 4000, 4))
    reached = spearman(truth, seeds.mean(axis=0)).mean()
    assert reachable(seed_agreement(seeds), num_seeds) == pytest.approx(reached, abs=0.02)
    assert reachable(0.0, num_seeds) == reachable(-0.2, num_seeds) == 0
    assert reachable(1.0, num_seeds) == pytest.approx(1)


def test_exact_effects_score_one(game):
    shares, rows = game
    per_prompt, low, high = leave_one_out(shares, rows, num_resamples=20)
    np.testing.assert_allclose(per_prompt, 1)
    assert (low, high) == pytest.approx((1, 1))
    assert leave_one_out(-shares, rows, num_resamples=5)[0] == pytest.approx([-1] * NUM_PROMPTS)


def test_it_is_spearman_with_the_drop_of_each_example(game):
    shares, rows = game
    noisy = shares + stream(1, "leave one out test").standard_normal(shares.shape)
    full = rows.utilities[-1]
    for count in (NUM_EXAMPLES, 7):  # all of them, or those that were left out so far
        part = rows.first(count)
        out = [int(np.flatnonzero(~members)[0]) for members in part.members]
        drop = full - part.utilities
        slow = [scipy.stats.spearmanr(noisy[q][out], drop[:, q]).statistic for q in range(NUM_PROMPTS)]
        per_prompt, low, high = leave_one_out(noisy, part)
        np.testing.assert_allclose(per_prompt, slow, rtol=1e-12)
        assert low < per_prompt.mean() < high


def test_what_cannot_be_compared_is_refused(game):
    shares, rows = game
    with pytest.raises(MethodError, match="expected: equal prompts and examples"):
        leave_one_out(shares[:2], rows)
    with pytest.raises(MethodError, match="2 examples were left out"):
        leave_one_out(shares, rows.first(2))
    halves = draw_rows(BANZHAF, 0, NUM_EXAMPLES, 3, lambda members: members @ shares.T)
    with pytest.raises(MethodError, match="0 examples were left out"):
        leave_one_out(shares, halves)


def test_seeds_agree_as_far_as_they_do(game):
    _, rows = game
    assert agreement_note(rows.utilities[None]) == ()
    (note,) = agreement_note(np.array([rows.utilities, rows.utilities * 2]))
    assert "does to 1.00; a score" in note
    assert note.endswith("would have about 1.00")


def test_by_the_command_line(tmp_path, tokenised):
    config = tiny_run(
        tmp_path,
        num_rows=5,
        labels=True,
        reduce={"methods": ["influence"]},
        retraining={"design": "leave_out", "num_subsets": 5, "shard_size": 5},
    )
    config = changed(config, values={"data": str(config.data.train), "limit": 2})
    path = str(config_file(config, tmp_path))
    for stage in ("retrain", "build", "reduce"):
        done = CliRunner().invoke(app, [stage, path])
        assert done.exit_code == 0, done.output
    tokenised.clear()
    done = CliRunner().invoke(app, ["evaluate", "leave-one-out", path])
    assert done.exit_code == 0, done.output
    assert tokenised.count(5) == 1
    assert "spearman" in done.stdout
    assert "5 of 5 examples left out, 1 fine-tunes each" in done.stdout
    done = CliRunner().invoke(app, ["evaluate", "all", path, "--only", "lds"])
    assert "skipped lds: retraining.design is leave_out" in done.output
