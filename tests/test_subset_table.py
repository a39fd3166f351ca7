"""Subset tables: designs draw what they say, rows do not depend on who draws them, the kernel game fills them."""

import numpy as np
import oracles
import pytest
from test_build import contents

from llmattrib.errors import FingerprintMismatchError, MethodError, StoreNotFoundError
from llmattrib.games import kernel_subsets
from llmattrib.games.kernel import KernelGame
from llmattrib.games.kernel_subsets import KernelUtility
from llmattrib.games.subset_table import (
    ATTRIBUTION,
    BANZHAF,
    SHAPLEY,
    SIZES,
    Design,
    SubsetTable,
    draw_rows,
    pack,
    size_chances,
    unpack,
)
from llmattrib.memory import require_memory

DESIGNS = [ATTRIBUTION, SHAPLEY, BANZHAF, SIZES]


def weigh(members):
    """Two utilities of 11 players: a weighted count, and whether players 0 and 1 are both there."""
    return np.stack([members @ np.arange(11.0), (members[:, 0] & members[:, 1]).astype(float)], axis=1)


def make(path, **changes):
    settings = {"num_players": 11, "num_utilities": 2, "seed": 3, "game": {"name": "test"}, "shard_size": 8}
    return SubsetTable.create(str(path), **{**settings, **changes})


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 100])
def test_masks_are_packed_and_come_back(n):
    members = np.arange(5 * n).reshape(5, n) % 3 == 0
    assert pack(members).shape == (5, -(-n // 8))
    np.testing.assert_array_equal(unpack(pack(members), n), members)
    assert pack(np.eye(9, dtype=bool))[[0, 8]].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_players_are_in_as_often_as_p_says(design):
    rows = draw_rows(design, 0, 20, 4000, lambda members: np.zeros((len(members), 1)))
    excess = rows.members - rows.p[:, None]
    error = np.sqrt(np.mean(rows.p * (1 - rows.p)) / len(rows.p))
    assert np.abs(excess.mean(axis=0)).max() < 4.5 * error
    if not design.by_size:
        dummies = rows.dummies()
        assert np.abs((dummies - rows.p[:, None]).mean(axis=0)).max() < 4.5 * error
        agree = (dummies == rows.members).mean() - np.mean(rows.p**2 + (1 - rows.p) ** 2)
        assert abs(agree) < 4.5 * 0.5 / np.sqrt(dummies.size)


def test_each_design_draws_p_as_it_says():
    def p_of(design):
        return draw_rows(design, 1, 12, 3000, lambda members: np.zeros((len(members), 1))).p

    assert set(p_of(BANZHAF)) == {0.5}
    points, counts = np.unique(p_of(ATTRIBUTION), return_counts=True)
    assert points.tolist() == [0.2, 0.4, 0.6, 0.8]
    assert np.abs(counts - 750).max() < 4.5 * np.sqrt(3000 * 3 / 16)
    p = p_of(SHAPLEY)
    place = (np.log(p / (1 - p)) / np.log(99) + 1) / 2
    assert 0 <= place.min() < 0.01 < 0.99 < place.max() <= 1
    assert np.abs(np.quantile(place, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.04
    sizes = np.rint(12 * p_of(SIZES)).astype(int)
    chances = size_chances(12)
    assert np.abs(np.bincount(sizes, minlength=12)[1:] / 3000 - chances).max() < 4.5 * np.sqrt(0.25 / 3000)
    np.testing.assert_allclose(chances[0] / chances[5], np.sqrt(36 / 11))


def test_a_row_is_the_same_whoever_draws_it(tmp_path):
    table = make(tmp_path)
    table.extend(ATTRIBUTION, 10)
    table.extend(BANZHAF, 8)
    table.extend(ATTRIBUTION, 24)
    for shard in reversed(table.pending()):
        table.fill_shard(shard, weigh)
    rows = SubsetTable.open(str(tmp_path)).rows(ATTRIBUTION)
    expected = draw_rows(ATTRIBUTION, 3, 11, 24, weigh)
    for name in ("members", "p", "draw", "utilities"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
    np.testing.assert_array_equal(rows.dummies(), expected.dummies())
    np.testing.assert_array_equal(rows.first(5).members, expected.members[:5])


def test_a_broken_and_resumed_table_has_the_bytes_of_one_run(tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    whole = make(tmp_path / "whole")
    whole.extend(SHAPLEY, 40)
    whole.fill(weigh)
    broken = make(tmp_path / "broken")
    broken.extend(SHAPLEY, 20)
    with pytest.raises(KeyboardInterrupt):
        broken.fill(weigh, stop)
    resumed = make(tmp_path / "broken")
    assert len(resumed.pending()) == 1
    assert len(resumed.rows(SHAPLEY).p) == 16
    resumed.extend(SHAPLEY, 40)
    calls = []
    resumed.fill(weigh, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_extending_to_fewer_rows_does_nothing(tmp_path):
    table = make(tmp_path)
    table.extend(SIZES, 9)
    table.extend(SIZES, 12)
    assert table.num_rows(SIZES) == 16
    assert table.num_rows(BANZHAF) == 0
    assert table.designs == [SIZES]


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"no table at .*\n.*\n.*SubsetTable.create"):
        SubsetTable.open(str(tmp_path / "none"))
    table = make(tmp_path)
    with pytest.raises(MethodError, match=r"no finished rows of the design banzhaf\n.*: none"):
        table.rows(BANZHAF)
    table.extend(SHAPLEY, 8)
    with pytest.raises(MethodError, match=r"(?s)no finished rows of the design shapley.*retraining\.design=shapley"):
        table.rows(SHAPLEY)
    with pytest.raises(MethodError, match="another design named shapley"):
        table.extend(Design("shapley", truncation=0.1), 8)
    with pytest.raises(FingerprintMismatchError, match="num_players: stored 11, now 12"):
        make(tmp_path, num_players=12)
    for ways in ({}, {"points": (0.5,), "by_size": True}, {"points": (0.0,)}, {"truncation": 0.5}):
        with pytest.raises(MethodError, match="design bad is "):
            Design("bad", **ways)
    with pytest.raises(MethodError, match="no independent copies"):
        draw_rows(SIZES, 0, 11, 2, weigh).dummies()


@pytest.mark.parametrize(("n", "p"), [(12, 4), (9, 9), (8, 30)])
def test_kernel_values_equal_ridge_regression_on_each_subset(n, p):
    features, responses = oracles.random_game(n, p, 5, c=2)
    queries = oracles.random_game(3, p, 6)[0]
    game = KernelGame.relative(features, responses, 0.05)
    members = draw_rows(ATTRIBUTION, 0, n, 30, lambda m: np.zeros((len(m), 1))).members
    members[:3] = [[False] * n, [True] * n, [True] + [False] * (n - 1)]
    expected = [
        queries @ oracles.subset_weights(features, responses, game.ridge, list(np.flatnonzero(row))).T
        for row in members
    ]
    found = KernelUtility(game, queries)(members).reshape(30, 3, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_kernel_matrix_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_subsets, "require_memory", lambda size, what, fix: require_memory(size, what, fix, 100))
    features, responses = oracles.random_game(20, 20, 0)
    utility = KernelUtility(KernelGame(features, responses, 1.0), features[:1])
    with pytest.raises(MethodError, match="the kernel matrix of 20 examples needs"):
        utility(np.arange(20)[None] < 3)
