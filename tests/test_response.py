"""The iterative response against a dense solve in float64, on the systems that the mean field meets."""

import numpy as np
import oracles
import pytest

from llmattrib.errors import MethodError
from llmattrib.estimators import mean_field, response
from llmattrib.estimators.fixed_point import solve_field
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.response import Direct, Iterative
from llmattrib.games.kernel import KernelGame


def field_rows(n, d, ridge, q, copies=1):
    """Rows w of N and right-hand sides b U of a mean field, float64; some groups have copies."""
    features, responses = oracles.gradient_like_game(n, d, 0)
    game = KernelGame.relative(features, responses, ridge)
    counts = np.where(np.arange(n) % 3 == 0, copies, 1)
    field = solve_field(game.space.coordinates, counts, game.ridge, q, np.zeros(n), tolerance=1e-9, max_iterations=200)
    b = np.sqrt(field.sites.variance)[:, None]
    residual = responses - field.whitened @ field.weights(responses)
    return np.sqrt(b) * field.whitened, b * residual * field.whitened


def dense(rows):
    """N, entry by entry."""
    system = np.eye(len(rows))
    for i in range(len(rows)):
        for j in range(i):
            system[i, j] = system[j, i] = -((rows[i] @ rows[j]) ** 2)
    return system


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("q", [1e-3, 0.01, 0.05, 0.3, 0.9])
def test_iterations_equal_a_dense_solve(monkeypatch, q, ridge, copies, kept):
    monkeypatch.setattr(response, "_KEPT", 100 if kept else 0)
    monkeypatch.setattr(response, "_STRIP", 70)
    rows, sides = field_rows(310, 24, ridge, q, copies)
    system = dense(rows)
    assert np.linalg.eigvalsh(system)[0] > 0
    narrow = sides.astype(np.float32)
    solver = Iterative(rows.astype(np.float32), q)
    found = solver.solve(narrow)
    assert found.dtype == np.float32
    left = np.linalg.norm(sides - system @ found) / np.linalg.norm(sides)
    assert left <= 1.5e-4  # two random combinations measure it
    assert solver.residual <= 1e-4
    assert 0.5 * left - 1e-6 <= solver.residual
    assert oracles.relative_error(found, np.linalg.solve(system, sides)) <= 5e-4
    assert solver.num_products <= 6


def test_the_hard_region_is_met():
    """Somewhere on the axis the largest eigenvalue of E is near one half, above it nothing converges at once."""
    largest = [1 - np.linalg.eigvalsh(dense(field_rows(310, 24, 0.01, q)[0]))[0] for q in (1e-3, 0.01, 0.05)]
    assert max(largest) > 0.4


@pytest.mark.parametrize("kept", [True, False])
def test_a_spectrum_that_the_low_rank_part_misses_takes_more_products(monkeypatch, kept):
    """Blocks of near-copies: as many large eigenvalues of E as blocks."""
    monkeypatch.setattr(response, "_KEPT", 100 if kept else 0)
    draws = np.random.default_rng(0)
    centers = np.linalg.qr(draws.standard_normal((40, 40)))[0] * np.linspace(0.3, 0.57, 40)[:, None]
    rows = np.repeat(centers, 10, axis=0) + 0.01 * draws.standard_normal((400, 40))
    system, sides = dense(rows), draws.standard_normal((400, 7))
    assert 0 < np.linalg.eigvalsh(system)[0] < 0.1
    solver = Iterative(rows.astype(np.float32), 0.1, tolerance=1e-5)
    found = solver.solve(sides.astype(np.float32))
    assert np.linalg.norm(sides - system @ found) <= 2e-5 * np.linalg.norm(sides)
    assert solver.num_products > 2
    with pytest.raises(MethodError, match=r"q = 0\.1 has a residual of .* after 2 products(.|\n)*at most 1e-05"):
        Iterative(rows.astype(np.float32), 0.1, tolerance=1e-5, max_products=2).solve(sides.astype(np.float32))


def test_the_direct_solver_equals_a_dense_solve():
    rows, sides = field_rows(120, 10, 0.1, 0.05)
    np.testing.assert_allclose(Direct(rows, 0.05).solve(sides), np.linalg.solve(dense(rows), sides), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_an_indefinite_system_is_an_error(dtype):
    """One large eigenvalue of E, which the low-rank part finds."""
    rows = field_rows(200, 10, 0.1, 0.05)[0] * 2
    assert np.linalg.eigvalsh(dense(rows))[0] < 0
    solver = Direct if dtype == np.float64 else Iterative
    with pytest.raises(MethodError, match=r"not stable at q = 0\.05(.|\n)*positive definite(.|\n)*reduce\.form=cavity"):
        solver(rows.astype(dtype), 0.05)


def test_an_indefinite_direction_that_the_low_rank_part_misses_is_an_error():
    sizes = np.linspace(0.3, 0.57, 40)
    sizes[-1] = 0.579
    rows = np.repeat(np.diag(sizes), 10, axis=0)
    assert -0.1 < np.linalg.eigvalsh(dense(rows))[0] < 0
    solver = Iterative(rows.astype(np.float32), 0.2)
    with pytest.raises(MethodError, match=r"not stable at q = 0\.2"):
        solver.solve(np.random.default_rng(0).standard_normal((400, 7)).astype(np.float32))


def test_rows_and_sides_of_zeros():
    assert not Iterative(np.zeros((30, 3), np.float32), 0.1).solve(np.zeros((30, 2), np.float32)).any()
    rows, sides = (array.astype(np.float32) for array in field_rows(100, 8, 0.1, 0.1))
    rows[5], sides[5], sides[:, 2] = 0, 0, 0
    found = Iterative(rows, 0.1).solve(sides)
    assert not found[5].any()
    assert not found[:, 2].any()


def test_equal_systems_give_equal_bytes():
    rows, sides = (array.astype(np.float32) for array in field_rows(300, 20, 0.1, 0.01))
    assert Iterative(rows, 0.01).solve(sides).tobytes() == Iterative(rows, 0.01).solve(sides).tobytes()


@pytest.mark.parametrize("form", ["pairs", "total_gradient"])
@pytest.mark.parametrize("ridge", [0.03, 0.3])
def test_values_of_a_large_game_do_not_depend_on_the_solver(monkeypatch, form, ridge):
    features, responses = oracles.gradient_like_game(600, 16, 3)
    game = KernelGame.relative(features, responses, ridge)
    direct = MeanField(form=form).init(game)
    monkeypatch.setattr(mean_field, "LARGE", 100)
    iterative = MeanField(form=form).init(game)
    assert (direct.precision, iterative.precision) == ("float64", "float32")
    assert oracles.relative_error(iterative.representers, direct.representers) < 3e-4
    assert iterative.sum_rule_error == pytest.approx(direct.sum_rule_error, abs=2e-4)
    assert iterative.num_nodes == direct.num_nodes
