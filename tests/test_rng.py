"""Streams are pure functions of their names, independent of each other, and the same on every machine."""

import subprocess
import sys

import numpy as np
import pytest

from llmattrib.rng import stream


def test_same_names_give_the_same_numbers() -> None:
    np.testing.assert_array_equal(stream(3, "a", 1).standard_normal(100), stream(3, "a", 1).standard_normal(100))


@pytest.mark.parametrize(
    "other",
    [(4, "a", "b"), (3, "b", "a"), (3, "a"), (3, "a", "b", ""), (3, "ab"), (3, "a b")],
    ids=["seed", "order", "prefix", "empty name", "joined", "blank"],
)
def test_any_difference_in_the_names_gives_other_numbers(other: tuple[int | str, ...]) -> None:
    seed, *names = other
    first, second = stream(3, "a", "b").integers(1 << 62, size=8), stream(int(seed), *names).integers(1 << 62, size=8)
    assert not (first == second).any()


def test_drawing_from_one_stream_does_not_shift_another() -> None:
    expected = stream(0, "b").integers(1 << 62, size=4)
    one, two = stream(0, "a"), stream(0, "b")
    one.standard_normal(1000)
    np.testing.assert_array_equal(two.integers(1 << 62, size=4), expected)


def test_numbers_are_those_recorded_so_no_release_changes_old_runs() -> None:
    assert stream(0, "sketch", "model.layers.0", "B").integers(1000, size=5).tolist() == RECORDED


def test_numbers_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    draw = "stream(0, 'sketch', 'model.layers.0', 'B').integers(1000, size=5).tolist()"
    code = f"from llmattrib.rng import stream; print({draw})"
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == str(RECORDED)


def test_streams_are_uncorrelated() -> None:
    draws = np.stack([stream(seed, "x", name).standard_normal(4000) for seed in range(4) for name in "abcd"])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


RECORDED = [349, 602, 948, 78, 364]
