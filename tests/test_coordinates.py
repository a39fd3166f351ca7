"""Coordinates of the codes of an index against plain formulas."""

from pathlib import Path

import numpy as np
import pytest

from llmattrib.coordinates import Transform, balance, second_moments
from llmattrib.manifest import Manifest
from llmattrib.rng import stream
from llmattrib.store import RowStore


def draw(name: str, *shape: int) -> np.ndarray:
    return stream(0, "test coordinates", name).standard_normal(shape).astype(np.float32)


def stored(path: Path, rows: np.ndarray) -> RowStore:
    store = RowStore.create(str(path), Manifest("features", *rows.shape, "float32", 8))  # type: ignore[arg-type]
    for shard in store.pending():
        store.write_shard(shard, rows[slice(*store.shard_range(shard))], {})
    return store


@pytest.mark.parametrize("normalize", [False, True])
def test_moments_are_those_of_transformed_rows(tmp_path: Path, normalize: bool) -> None:
    rows = draw("rows", 37, 2, 5) + 1
    store, transform = stored(tmp_path / "s", rows), Transform(rows.mean(axis=0), normalize, ())
    found = second_moments(store, transform, 1000, stream(0, "t"))
    moved = transform(rows).astype(np.float64)
    for output in range(2):
        expected = sum(np.outer(row, row) for row in moved[:, output]) / len(rows)
        np.testing.assert_allclose(found[output], expected, rtol=1e-5, atol=1e-7)
    part = second_moments(store, transform, 9, stream(0, "t"))
    assert not np.allclose(part, found), "nine rows are two of five shards"


def test_whole_coordinates_keep_inner_products_and_weigh_alike() -> None:
    queries, rows = draw("q", 4000, 2, 6) * np.geomspace(1, 0.1, 6), draw("v", 500, 2, 6) * np.geomspace(1, 9, 6)
    moments = np.einsum("qcp,qck->cpk", queries, queries) / len(queries)
    maps = balance(moments, rows.astype(np.float32), 0.0, 1, stream(0, "t"))
    flat_rows, flat_queries = rows.reshape(500, -1), queries.reshape(4000, -1)
    ours = (flat_queries @ maps.of_queries) @ (flat_rows @ maps.of_rows).T
    np.testing.assert_allclose(ours, flat_queries @ flat_rows.T, rtol=1e-3, atol=1e-3 * np.abs(ours).max())
    for output in range(2):  # of queries about one output: white within it, nothing outside
        part = queries * (np.arange(2) == output)[:, None]
        moved = part.reshape(4000, -1) @ maps.of_queries
        values = np.linalg.eigvalsh(moved.T @ moved / len(moved))
        np.testing.assert_allclose(values, [0] * 6 + [1] * 6, atol=0.02)


@pytest.mark.parametrize("dim", [6, 7])
def test_what_is_dropped_is_at_most_the_tail(dim: int) -> None:
    queries, rows = draw("q", 3000, 1, dim), draw("v", 2000, 1, dim) * (2.0 ** -np.arange(dim))
    moments = np.einsum("qcp,qck->cpk", queries, queries) / len(queries)
    whole = queries[:, 0] @ rows[:, 0].T
    for tail in (0.0, 0.01, 0.3):
        maps = balance(moments, rows.astype(np.float32), tail, 2, stream(0, "t"))
        assert maps.of_rows.shape[1] % 2 == 0
        kept = (queries[:, 0] @ maps.of_queries) @ (rows[:, 0] @ maps.of_rows).T
        lost = np.mean((whole - kept) ** 2) / np.mean(whole**2)
        assert lost == pytest.approx(maps.dropped, abs=1e-3)
        assert maps.dropped <= tail
    assert maps.of_rows.shape[1] == 2, "two of geometric parts hold more than seven tenths"


@pytest.mark.parametrize(
    ("tail", "multiple", "width"), [(0.0, 1, 7), (0.0, 5, 10), (0.3, 4, 4), (0.3, 3, 3), (0.3, 9, 9)]
)
def test_width_is_a_multiple_and_filled_with_axes_before_zeros(tail: float, multiple: int, width: int) -> None:
    queries, rows = draw("q", 3000, 1, 7), draw("v", 2000, 1, 7) * (2.0 ** -np.arange(7))
    moments = np.einsum("qcp,qck->cpk", queries, queries) / len(queries)
    maps = balance(moments, rows.astype(np.float32), tail, multiple, stream(0, "t"))
    assert maps.of_rows.shape == maps.of_queries.shape == (7, width)
    assert np.linalg.matrix_rank(maps.of_rows) == min(width, 7)
    assert not maps.of_rows[:, 7:].any()
    if width >= 7:
        whole, kept = queries[:, 0] @ rows[:, 0].T, (queries[:, 0] @ maps.of_queries) @ (rows[:, 0] @ maps.of_rows).T
        np.testing.assert_allclose(kept, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())
