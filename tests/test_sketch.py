"""Sketch laws: linear, unbiased, a pure function of seed and block, and widths that obey their budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmattrib.errors import SketchError
from llmattrib.features.sketch import Block, Sketch, SketchPlan, allocate_widths, make_plan

BLOCKS = (Block("layer.0", "B", 60), Block("layer.0", "A", 40), Block("layer.1", "B", 7))
NORMS = (4.0, 1.0, 0.2)


def project(plan: SketchPlan, gradient: torch.Tensor) -> torch.Tensor:
    """Sketch whole gradients [b, sum of sizes]."""
    sketch, start = Sketch(plan), 0
    phi = torch.zeros(len(gradient), plan.dim)
    for number, block in enumerate(plan.blocks):
        sketch.add(phi, number, gradient[:, start : start + block.size])
        start += block.size
    return phi


@pytest.mark.parametrize("kind", ["oporp", "rademacher", "none"])
def test_sketch_is_the_linear_map_of_its_matrix(kind: str) -> None:
    plan = make_plan(kind, 3, 30, BLOCKS, NORMS)
    gradient = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 107), dtype=np.float32))
    matrix = project(plan, torch.eye(107))
    torch.testing.assert_close(project(plan, gradient), gradient @ matrix, rtol=1e-5, atol=1e-5)


def test_oporp_matrix_has_one_sign_per_entry_and_equal_bins() -> None:
    plan = make_plan("oporp", 3, 30, BLOCKS, NORMS)
    matrix = project(plan, torch.eye(107))
    assert torch.equal((matrix != 0).sum(1), torch.ones(107, dtype=torch.long))
    assert set(matrix[matrix != 0].tolist()) == {-1.0, 1.0}
    per_bin = (matrix[:60] != 0).sum(0)[: plan.widths[0]]
    assert per_bin.max() - per_bin.min() <= 1


@pytest.mark.parametrize("kind", ["oporp", "rademacher"])
def test_sketch_is_unbiased(kind: str) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((1, 107), dtype=np.float32))
    y = x + 0.5 * torch.from_numpy(rng.standard_normal((1, 107), dtype=np.float32))
    estimates = []
    for seed in range(600):
        phi = project(make_plan(kind, seed, 30, BLOCKS, NORMS), torch.cat([x, y]))
        estimates.append(float(phi[0] @ phi[1]))
    error = np.mean(estimates) - float(x[0] @ y[0])
    assert abs(error) < 4 * np.std(estimates) / 600**0.5
    assert np.std(estimates) > 0


def test_none_keeps_the_gradient() -> None:
    gradient = torch.arange(214, dtype=torch.float32).reshape(2, 107)
    assert torch.equal(project(make_plan("none", 0, 5, BLOCKS, NORMS), gradient), gradient)


def test_tables_depend_on_seed_and_name_only() -> None:
    plan = make_plan("oporp", 3, 30, BLOCKS, NORMS)
    gradient = torch.ones(1, 60)
    backwards = Sketch(plan)
    first, second = torch.zeros(1, 30), torch.zeros(1, 30)
    backwards.add(torch.zeros(1, 30), 2, torch.ones(1, 7))
    backwards.add(first, 0, gradient)
    Sketch(plan).add(second, 0, gradient)
    assert torch.equal(first, second)
    other = torch.zeros(1, 30)
    Sketch(make_plan("oporp", 4, 30, BLOCKS, NORMS)).add(other, 0, gradient)
    assert not torch.equal(first, other)


def test_plan_survives_json() -> None:
    plan = make_plan("oporp", 3, 30, BLOCKS, NORMS)
    assert SketchPlan.from_json(plan.to_json()) == plan


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1e6)), min_size=1, max_size=12),
    st.integers(0, 2000),
)
@settings(max_examples=200, deadline=None)
def test_widths_obey_their_budget(blocks: list[tuple[int, float]], extra: int) -> None:
    sizes, norms = zip(*blocks, strict=True)
    dim = len(sizes) + extra
    widths = allocate_widths(sizes, norms, dim)
    assert sum(widths) == min(dim, sum(sizes))
    assert all(1 <= width <= size for width, size in zip(widths, sizes, strict=True))


def test_widths_follow_squared_norms() -> None:
    assert allocate_widths((1000, 1000, 1000), (6.0, 3.0, 1.0), 100) == (60, 30, 10)
    assert allocate_widths((10, 1000, 1000), (6.0, 3.0, 1.0), 110) == (10, 75, 25)


def test_too_few_dimensions_is_an_error() -> None:
    with pytest.raises(SketchError, match="cannot hold 3 blocks"):
        make_plan("oporp", 0, 2, BLOCKS, NORMS)


def test_dense_sketch_too_large_is_an_error() -> None:
    with pytest.raises(SketchError, match=r"needs .* GiB"):
        make_plan("rademacher", 0, 1 << 16, (Block("x", "B", 1 << 20),), (1.0,))
