import weakref

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.games.kernel import FeatureRows, array_blocks, mean_square
from llmattrib.scorers.gradient import GradCos, GradDot, Influence, Trak, absolute_ridge, unit_rows

SHAPES = [(12, 5), (6, 6), (7, 30)]  # more, as many and fewer rows than dimensions


def draw(n, p, seed=0):
    features = oracles.gradient_like_game(n, p, seed)[0].astype(np.float32)
    return features, np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def rows_of(features, max_rows=4, **settings):
    return FeatureRows(array_blocks(features, max_rows), *features.shape, **settings)


def score(scorer, features, log_odds, max_rows=4):
    """Representers, block by block."""
    state = scorer.init(rows_of(features, max_rows))
    blocks = array_blocks(features, max_rows)()
    return np.concatenate([scorer.compute(state, rows, log_odds[at : at + len(rows)]) for at, rows in blocks])


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_influence_equals_the_explicit_inverse(n, p, ridge):
    features, log_odds = draw(n, p)
    expected = oracles.influence(features.astype(np.float64), ridge * mean_square(features))
    found = score(Influence(ridge), features, log_odds)
    assert found.dtype == np.float32
    assert oracles.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_trak_is_weighted_by_one_minus_p(n, p):
    features, log_odds = draw(n, p)
    lam = 0.1 * mean_square(features)
    expected = oracles.trak(features.astype(np.float64), lam, log_odds)
    assert oracles.relative_error(score(Trak(0.1), features, log_odds), expected) < 1e-5
    # Gradients of a loss hold the factor already.
    unweighted = score(Trak(0.1, weighted=False), features, log_odds)
    np.testing.assert_array_equal(unweighted, score(Influence(0.1), features, log_odds))


def test_trak_of_certain_examples_is_zero_not_nan():
    features, _ = draw(4, 3)
    log_odds = np.array([200.0, -200.0, 0.0, 30.0], np.float32)
    found = score(Trak(0.1), features, log_odds)
    expected = oracles.influence(features.astype(np.float64), 0.1 * mean_square(features))
    np.testing.assert_allclose(np.linalg.norm(found[0]), 0, atol=1e-30)
    np.testing.assert_allclose(found[1:3], expected[1:3] * [[1], [0.5]], rtol=1e-5)


def test_grad_dot_and_grad_cos_are_inner_products_and_cosines():
    features, log_odds = draw(12, 5)
    queries = draw(3, 5, seed=1)[0]
    products = [[float(np.dot(query, row)) for row in features] for query in queries]
    np.testing.assert_allclose(queries @ score(GradDot(), features, log_odds).T, products, rtol=1e-5)
    found = unit_rows(queries) @ score(GradCos(), features, log_odds).T
    np.testing.assert_allclose(found, oracles.grad_cos_scores(features, queries), rtol=1e-5, atol=1e-6)


def test_unit_rows_leave_zeros():
    rows = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(unit_rows(rows), [[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(unit_rows(rows, (1, 1)), [[0.5**0.5, 0.5**0.5], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1.0, 1e25])
@pytest.mark.parametrize("members", [(), (40, 60)])
def test_unit_rows_of_any_size_equal_those_of_float64(scale, members):
    wide = scale * np.random.default_rng(0).standard_normal((5, 100))
    rows = wide.astype(np.float32)
    found = unit_rows(rows, members)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit_rows(rows.astype(np.float64), members), atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_unit_rows_of_several_sizes_side_by_side():
    rows = np.random.default_rng(0).standard_normal((2, 4, 100)).astype(np.float32)
    found = unit_rows(rows * np.array([[[1], [1e-30], [0], [1e25]]], np.float32))
    np.testing.assert_array_equal(found[:, 0], rows[:, 0] / np.linalg.norm(rows[:, 0], axis=-1, keepdims=True))
    np.testing.assert_allclose(found[:, [1, 3]], unit_rows(rows[:, [1, 3]]), atol=1e-7)
    assert not found[:, 2].any()


def test_products_of_unit_rows_of_several_adapters_are_means_of_their_cosines():
    rows, queries = draw(12, 7)[0], draw(3, 7, seed=1)[0]
    rows[:, :2] *= 1000  # one adapter's gradients are much larger than the other's
    cosines = [oracles.grad_cos_scores(rows[:, part], queries[:, part]) for part in (slice(2), slice(2, 7))]
    found = unit_rows(queries[:, None], (2, 5))[:, 0] @ score(GradCos((2, 5)), rows, draw(12, 7)[1]).T
    np.testing.assert_allclose(found, np.mean(cosines, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("scorer", [GradDot(), GradCos(), Influence(0.1), Trak(0.1)], ids=lambda s: type(s).__name__)
def test_block_size_does_not_matter(scorer, n, p):
    features, log_odds = draw(n, p)
    one, many = (score(scorer, features, log_odds, max_rows) for max_rows in (1, 100))
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_ridge_is_relative_so_scale_does_not_matter(factor):
    features, log_odds = draw(12, 5)
    found = score(Influence(0.1), features * np.float32(factor), log_odds) * factor
    assert oracles.relative_error(found, score(Influence(0.1), features, log_odds)) < 1e-5


@pytest.mark.parametrize("scorer", [Influence(0.1), Trak(0.1)], ids=lambda s: type(s).__name__)
def test_features_that_are_all_zero_are_an_error(scorer):
    with pytest.raises(MethodError, match="all features are zero"):
        scorer.init(rows_of(np.zeros((4, 2), np.float32)))


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_shared_statistics_match_the_array(n, p):
    features, _ = draw(n, p)
    rows = rows_of(features)
    wide = features.astype(np.float64)
    assert rows.mean_square == pytest.approx(mean_square(features))
    assert absolute_ridge(rows, 0.3) == pytest.approx(0.3 * mean_square(features))
    gram = rows.gram if rows.basis is None else rows.basis @ rows.gram @ rows.basis.T
    np.testing.assert_allclose(gram, wide.T @ wide, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows.space.lift(rows.space.coordinates), wide, rtol=1e-9, atol=1e-12)
    responses = np.sign(wide[:, :1])
    expected = np.mean(oracles.leave_one_out_residuals(wide, responses, 0.5) ** 2)
    assert rows.leave_one_out_errors(responses, [0.5]) == pytest.approx([expected])


def test_tall_features_are_never_held_at_once():
    made: list[weakref.ref[np.ndarray]] = []

    def blocks():
        for start in range(0, 40, 4):
            assert sum(block() is not None for block in made) <= 2
            block = np.full((4, 3), start + 1, np.float32)
            made.append(weakref.ref(block))
            yield start, block

    rows = FeatureRows(blocks, 40, 3, max_bytes=24 * 9)  # no room for 40 rows
    assert rows.gram[0, 0] == pytest.approx(sum(4 * (start + 1) ** 2 for start in range(0, 40, 4)))
    with pytest.raises(MethodError, match="holding 40 rows of 3 features needs"):
        _ = rows.space


def test_gram_beyond_the_memory_is_an_error():
    with pytest.raises(MethodError, match="the Gram matrix of 5 features needs"):
        _ = rows_of(draw(12, 5)[0], max_bytes=100).gram
