"""The linear datamodelling score against scipy and plain arithmetic; baselines against slow definitions."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from llmattrib.errors import MethodError
from llmattrib.evaluate.lds import lds, spearman
from llmattrib.evaluate.scores import bm25_scores
from llmattrib.games.subset_table import BANZHAF, draw_rows
from llmattrib.rng import stream

NUM_EXAMPLES, NUM_SUBSETS, NUM_PROMPTS = 20, 60, 4


def game(noise):
    draws = stream(0, "lds test")
    scores = draws.standard_normal((NUM_PROMPTS, NUM_EXAMPLES))

    def utility(members):
        return members @ scores.T + noise * draws.standard_normal((len(members), NUM_PROMPTS))

    return scores, draw_rows(BANZHAF, 0, NUM_EXAMPLES, NUM_SUBSETS, utility)


def test_an_additive_game_scores_one_and_its_negative_minus_one():
    scores, rows = game(0.0)
    found = lds(scores, rows, num_resamples=20)
    assert (found.lds, found.low, found.high) == pytest.approx((1, 1, 1))
    assert lds(-scores, rows, num_resamples=20).lds == pytest.approx(-1)
    assert lds(np.zeros_like(scores), rows, num_resamples=20).lds == 0  # says nothing


def test_it_is_the_mean_of_spearman_over_prompts_and_the_interval_covers():
    scores, rows = game(2.0)
    found = lds(scores, rows)
    slow = [
        scipy.stats.spearmanr([scores[q][inside].sum() for inside in rows.members], rows.utilities[:, q]).statistic
        for q in range(NUM_PROMPTS)
    ]
    np.testing.assert_allclose(found.per_prompt, slow, rtol=1e-12)
    assert found.lds == pytest.approx(np.mean(slow))
    assert found.low < found.lds < found.high
    again = lds(scores, rows)
    assert (again.low, again.high) == (found.low, found.high)


def test_what_the_size_of_subsets_explains_is_taken_out():
    """Utilities are size plus a little: ones score high, and nothing beyond size."""
    scores, rows = game(0.0)
    size = rows.members.sum(axis=1, keepdims=True).astype(float)
    rows = dataclasses.replace(rows, utilities=10 * size + rows.utilities)
    ones = lds(np.ones_like(scores), rows, num_resamples=20)
    assert ones.lds > 0.9
    assert ones.beyond_size == 0
    found = lds(scores, rows, num_resamples=20)
    assert found.beyond_size == pytest.approx(1)
    design = np.column_stack([np.ones(NUM_SUBSETS), size])

    def left(values):
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    noisy = stream(1, "lds test").standard_normal(scores.shape)
    slow = spearman(left(rows.members @ noisy.T), left(rows.utilities)).mean()
    assert lds(noisy, rows, num_resamples=20).beyond_size == pytest.approx(slow)


def test_ties_are_averaged_and_constants_undefined():
    one = np.array([[1.0, 1.0], [1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    other = np.array([[0.0, 5.0], [1.0, 5.0], [1.0, 5.0], [4.0, 5.0]])
    found = spearman(one, other)
    assert found[0] == pytest.approx(scipy.stats.spearmanr(one[:, 0], other[:, 0]).statistic)
    assert math.isnan(found[1])


def test_other_shapes_are_refused():
    scores, rows = game(0.0)
    for wrong in (scores[:2], scores[:, :5]):
        with pytest.raises(MethodError, match="expected: equal prompts and examples"):
            lds(wrong, rows)


def test_bm25_is_its_definition():
    train = ["a red river runs", "red red stone", "the green tree by the river bank is old", "stone"]
    asked = ["red river", "stone stone tree", "nothing known"]
    words = [text.split() for text in train]
    mean = sum(map(len, words)) / len(words)
    slow = np.zeros((3, 4))
    for q, query in enumerate(asked):
        for i, text in enumerate(words):
            for word in query.split():
                df = sum(word in other for other in words)
                rarity = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                tf = text.count(word)
                slow[q, i] += rarity * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(text) / mean))
    np.testing.assert_allclose(bm25_scores(train, asked), slow, rtol=1e-12)
