import numpy as np
import oracles
import pytest

from llmattrib import memory
from llmattrib.errors import MethodError
from llmattrib.games.kernel import (
    FeatureRows,
    KernelGame,
    array_blocks,
    form_gram,
    leave_one_out_errors,
    mean_square,
    row_space,
)
from llmattrib.memory import available_memory, require_memory

SHAPES = [(7, 3), (7, 7), (6, 20)]  # more, as many and fewer players than dimensions


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_value_is_ridge_regression_on_the_members(n, p):
    features, responses = oracles.random_game(n, p, 0, c=2)
    queries = oracles.random_game(4, p, 1)[0]
    game = KernelGame.relative(features, responses, 0.3)
    members = np.arange(n) % 3 != 0
    expected = oracles.subset_weights(features, responses, game.ridge, list(np.flatnonzero(members)))
    np.testing.assert_allclose(game.value(members, queries), queries @ expected.T, rtol=1e-10)
    np.testing.assert_allclose(game.weights(members), expected, rtol=1e-9, atol=1e-12)


def test_value_of_the_empty_set_is_zero():
    features, responses = oracles.random_game(5, 3, 0)
    assert not KernelGame(features, responses, 1.0).value(np.zeros(5, bool), features).any()


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_marginals_equal_refitting_with_and_without_each_player(n, p):
    features, responses = oracles.random_game(n, p, 2, c=2)
    game = KernelGame.relative(features, responses, 0.1)
    members = np.arange(n) % 2 == 0
    for player, found in enumerate(game.marginals(members)):
        others = set(np.flatnonzero(members)) - {player}
        inside, outside = (
            oracles.subset_weights(features, responses, game.ridge, sorted(chosen))
            for chosen in (others | {player}, others)
        )
        np.testing.assert_allclose(found, inside - outside, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_leave_one_out_equals_leaving_out(n, p):
    features, responses = oracles.random_game(n, p, 3, c=2)
    game = KernelGame.relative(features, responses, 1.0)
    ridges = [game.ridge * factor for factor in (0.01, 1.0, 10.0)]
    expected = [np.mean(oracles.leave_one_out_residuals(features, responses, lam) ** 2) for lam in ridges]
    np.testing.assert_allclose(FeatureRows.of(features).leave_one_out_errors(responses, ridges), expected, rtol=1e-9)


def test_leave_one_out_streams_blocks_to_the_same_curve():
    features, responses = oracles.random_game(11, 4, 4, c=2)
    curves = [
        leave_one_out_errors(blocks, responses, form_gram(blocks, 4), [0.1, 3.0])
        for blocks in (array_blocks(features, 3), array_blocks(features))
    ]
    np.testing.assert_allclose(*curves, rtol=1e-12)


def test_leave_one_out_bottoms_out_where_the_noise_is():
    """Responses of a linear model plus noise: a ridge far too small or too large predicts worse."""
    draws = np.random.default_rng(0)
    features = draws.standard_normal((60, 30))
    responses = features @ draws.standard_normal((30, 1)) + 6 * draws.standard_normal((60, 1))
    game = KernelGame.relative(features, responses, 1.0)
    ridges = [game.ridge * factor for factor in (1e-4, 1.0, 1e4)]
    curve = FeatureRows.of(features).leave_one_out_errors(responses, ridges)
    assert curve[1] < min(curve[0], curve[2])


@pytest.mark.parametrize("rank", [2, 5])
def test_row_space_is_an_exact_rotation_at_any_rank(rank):
    draws = np.random.default_rng(rank)
    features = draws.standard_normal((5, rank)) @ draws.standard_normal((rank, 9))
    space = row_space(features)
    assert space.coordinates.shape == (5, 5)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(5), atol=1e-13)
    np.testing.assert_allclose(space.lift(space.coordinates), features, atol=1e-13)
    np.testing.assert_allclose(space.project(features), space.coordinates, atol=1e-13)


def test_rank_deficient_features_need_no_special_case():
    draws = np.random.default_rng(1)
    features = draws.standard_normal((8, 2)) @ draws.standard_normal((2, 12))
    features[3] = 0
    responses = np.ones((8, 1))
    game = KernelGame.relative(features, responses, 0.01)
    expected = oracles.subset_weights(features, responses, game.ridge, list(range(8)))
    np.testing.assert_allclose(game.weights(np.ones(8, bool)), expected, rtol=1e-9, atol=1e-12)


def test_row_space_of_many_rows_is_the_identity():
    features = np.ones((4, 2), np.float32)
    space = row_space(features)
    assert space.basis is None
    assert space.coordinates.dtype == np.float64
    assert space.lift(features) is features
    assert space.project(features) is features


def test_gram_of_blocks_keeps_float64():
    features = oracles.random_game(100, 6, 0)[0].astype(np.float32)
    wide = features.astype(np.float64)
    np.testing.assert_allclose(form_gram(array_blocks(features, 7), 6), wide.T @ wide, rtol=1e-13, atol=1e-12)
    assert mean_square(features) == pytest.approx(np.mean(np.sum(wide**2, axis=1)), rel=1e-12)


def test_relative_ridge_is_in_units_of_the_mean_squared_norm():
    features, responses = oracles.random_game(9, 3, 0)
    assert KernelGame.relative(2 * features, responses, 0.1).ridge == pytest.approx(
        4 * KernelGame.relative(features, responses, 0.1).ridge
    )


def test_memory_beyond_the_limit_is_an_error():
    with pytest.raises(MethodError, match=r"the matrix needs 4\.0 GiB of memory\n  expected: at most 1\.0 GiB"):
        require_memory(2**32, "the matrix", "use less", limit=2**30)
    require_memory(2**30, "the matrix", "use less", limit=2**30)


def test_memory_available_is_that_of_the_machine_or_its_group(monkeypatch):
    texts = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100",
        "/sys/fs/cgroup/memory.current": "1100",
        "/sys/fs/cgroup/memory.max": "3000",
    }

    def read_text(path):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(memory.Path, "read_text", read_text)
    assert available_memory() == 2000
    texts["/sys/fs/cgroup/memory.max"] = "max"
    assert available_memory() == 4000 * 1024
    del texts["/proc/meminfo"]
    assert available_memory() > 4000 * 1024
