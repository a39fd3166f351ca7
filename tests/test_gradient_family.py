"""DataInf, iterative and T-step influence: equal to loops, to each other at their ends, over blocks and ranks."""

import shutil

import numpy as np
import oracles
import pytest
from test_distributed import launch
from test_reduce import columns_of, make_run, representers
from test_reduce_ranks import WORK, config_file
from test_scorers import SHAPES, draw, rows_of, score

from llmattrib.errors import MethodError
from llmattrib.features.sketch import Block, make_plan
from llmattrib.games.kernel import mean_square
from llmattrib.reduce import reduce_run
from llmattrib.scorers.datainf import ColumnBlock, DataInf
from llmattrib.scorers.gradient import GradDot, Influence
from llmattrib.scorers.iterative import TOLERANCE, InfluenceCg, InfluenceLissa, curvature_product, largest_eigenvalue
from llmattrib.scorers.spectral import Spectral, descent_filter
from llmattrib.sections import ReduceConfig
from llmattrib.settings import resolve
from llmattrib.store import Manifest, RowStore

METHODS = ("datainf", "influence_cg", "influence_lissa", "spectral(7,0.9)")


def blocks_of(p):
    """Three blocks, one of them exact and one sketched from many parameters."""
    return [ColumnBlock(2, 2), ColumnBlock(p - 3, 50), ColumnBlock(1, 7)]


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_datainf_equals_its_loop(n, p, ridge):
    features, log_odds = draw(n, p)
    expected = oracles.datainf(features.astype(np.float64), ridge, [(b.width, b.size) for b in blocks_of(p)])
    found = score(DataInf(ridge, blocks_of(p)), features, log_odds)
    assert found.dtype == np.float32
    assert oracles.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("p", [5, 30])
def test_datainf_of_one_example_is_influence_in_each_block(p):
    features, log_odds = draw(1, p)
    found, start = score(DataInf(0.1, blocks_of(p)), features, log_odds), 0
    for block in blocks_of(p):
        part = slice(start, start + block.width)
        own = features[:, part].astype(np.float64)
        expected = oracles.influence(own, 0.1 * mean_square(own) / block.size)
        assert oracles.relative_error(found[:, part], expected) < 1e-5
        start = part.stop


def test_datainf_leaves_out_blocks_without_gradients():
    features, log_odds = draw(12, 5)
    features[:, :2] = 0
    found = score(DataInf(0.1, blocks_of(5)), features, log_odds)
    assert not found[:, :2].any()
    rest = score(DataInf(0.1, blocks_of(5)[1:]), features[:, 2:], log_odds)
    np.testing.assert_allclose(found[:, 2:], rest, rtol=1e-6)


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("scorer", [InfluenceCg, InfluenceLissa])
def test_iterations_converge_to_influence(scorer, n, p):
    features, log_odds = draw(n, p)
    expected = score(Influence(0.1), features, log_odds)
    assert oracles.relative_error(score(scorer(0.1, 5000), features, log_odds), expected) < 10 * TOLERANCE


def test_conjugate_gradients_that_are_cut_off_are_an_error():
    features, log_odds = draw(12, 30)
    with pytest.raises(MethodError, match=r"leave a residual of .* after 2 iterations(.|\n)*raise reduce\.iterations"):
        score(InfluenceCg(0.01, 2), features, log_odds)


def test_rows_that_are_zero_solve_at_once():
    features, log_odds = draw(6, 4)
    features[2] = 0
    found = score(InfluenceCg(0.1, 100), features, log_odds)
    assert not found[2].any()
    assert found[[0, 1, 3]].any(axis=1).all()


def test_lissa_that_is_cut_off_leaves_no_more_than_it_says():
    features, log_odds = draw(12, 5)
    lissa, wide = InfluenceLissa(0.01, 30), features.astype(np.float64)
    state = lissa.init(rows_of(features))
    assert state.iterations == 30
    solution = score(lissa, features, log_odds).astype(np.float64)
    residual = wide - solution @ (wide.T @ wide + state.lam * np.eye(5))
    shares = np.linalg.norm(residual, axis=1) / np.linalg.norm(wide, axis=1)
    assert TOLERANCE < shares.max() <= state.residual
    assert InfluenceLissa(0.01, 10**6).init(rows_of(features)).residual <= TOLERANCE


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_curvature_is_applied_without_being_formed(n, p):
    features, _ = draw(n, p)
    rows, wide = rows_of(features, max_bytes=0), features.astype(np.float64)
    vectors = np.random.default_rng(0).standard_normal((3, p))
    np.testing.assert_allclose(curvature_product(rows, vectors), vectors @ wide.T @ wide, rtol=1e-9)
    largest = np.linalg.eigvalsh(wide.T @ wide)[-1]
    assert 0.95 * largest < largest_eigenvalue(rows) <= largest * (1 + 1e-12)
    for scorer in (InfluenceCg(1.0, 100), InfluenceLissa(1.0, 100)):
        state = scorer.init(rows)  # with no memory for any matrix
        assert np.isfinite(scorer.compute(state, features, np.zeros(n, np.float32))).all()


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize(("steps", "rate"), [(1, 0.5), (2, 1.0), (40, 1.0), (300, 0.7)])
def test_spectral_is_gradient_descent(n, p, steps, rate):
    features, log_odds = draw(n, p)
    wide = features.astype(np.float64)
    expected = oracles.descend(wide, rate / np.sum(wide**2), steps)
    assert oracles.relative_error(score(Spectral(steps, rate), features, log_odds), expected) < 1e-5


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_spectral_begins_as_grad_dot_and_ends_as_influence_without_ridge(n, p):
    features, log_odds = draw(n, p)
    wide = features.astype(np.float64)
    first = score(Spectral(1, 0.3), features, log_odds)
    np.testing.assert_allclose(first, score(GradDot(), features, log_odds) * 0.3 / np.sum(wide**2), rtol=1e-5)
    last = score(Spectral(10**9, 1.0), features, log_odds)
    assert oracles.relative_error(last, np.linalg.pinv(wide).T) < 1e-4


def test_spectral_is_about_influence_with_a_ridge_of_its_own():
    """lam = 1/(eta T): the two filters differ by less than a third of the larger at every eigenvalue."""
    h, eta, steps = np.logspace(-8, 0, 400), 0.1, 1000
    filtered, ridge = descent_filter(h, eta, steps), 1 / (h + 1 / (eta * steps))
    assert np.all(np.abs(filtered - ridge) < filtered / 3)
    np.testing.assert_allclose(descent_filter(np.array([0.0, 1e-14, 1.0]), eta, 3), [0.3, 0.3, 1 - 0.9**3])


def test_a_descent_that_diverges_is_an_error():
    features, log_odds = draw(12, 5)
    largest = np.linalg.eigvalsh(features.astype(np.float64).T @ features)[-1]
    limit = 2 * np.sum(features.astype(np.float64) ** 2) / largest
    score(Spectral(50, 0.999 * limit), features, log_odds)
    with pytest.raises(MethodError, match=rf"diverges at rate .*\n  expected: at most {limit:.6g}"):
        score(Spectral(50, 1.001 * limit), features, log_odds)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_block_size_and_scale_do_not_matter(n, p):
    features, log_odds = draw(n, p)
    for scorer in (DataInf(0.1, blocks_of(p)), InfluenceCg(0.1, 500), InfluenceLissa(0.1, 500), Spectral(7, 0.9)):
        one, many = (score(scorer, features, log_odds, max_rows) for max_rows in (1, 100))
        assert oracles.relative_error(one, many) < 1e-5
        scaled = score(scorer, features * np.float32(1e3), log_odds) * 1e3
        assert oracles.relative_error(scaled, many) < 1e-4


def test_features_that_are_all_zero_are_an_error():
    for scorer in (DataInf(0.1, blocks_of(4)), InfluenceCg(0.1, 9), InfluenceLissa(0.1, 9), Spectral(7, 0.9)):
        with pytest.raises(MethodError, match="all features are zero"):
            scorer.init(rows_of(np.zeros((6, 4), np.float32)))


def write(config, phi, kind="oporp"):
    """A feature store with a sketch plan of the blocks."""
    n, c, p = phi.shape
    sizes = [(block.width, block.size) for block in blocks_of(p)]
    plan = make_plan("none", 0, p, [Block(f"layer{k}", "B", size) for k, (_, size) in enumerate(sizes)], []).to_json()
    plan |= {"kind": kind, "dim": p, "widths": [width for width, _ in sizes] if kind == "oporp" else [p] * 3}
    fingerprint = {"features": {"output": "loss"}, "encoding": {"label_words": []}, "seed": 0}
    manifest = Manifest("features", n, c, p, "float32", 8, tuple(columns_of(n)), fingerprint, {"sketch_plan": plan})
    store = RowStore.create(config.layout.features, manifest)
    for shard in range(store.num_shards):
        rows = slice(*store.shard_range(shard))
        store.write_shard(shard, phi[rows], {name: values[rows] for name, values in columns_of(n).items()})


def made(folder, phi, **settings):
    config = make_run(folder, methods=list(METHODS), **settings)
    write(config, phi)
    return config


def descended(wide, rate, steps):
    """Of features of a loss: descent with the Gauss-Newton curvature of the log-odds that the store holds."""
    root = np.exp(columns_of(len(wide))["log_odds"].astype(np.float64) / 2)[:, None]
    return oracles.descend(root * wide, rate / np.sum((root * wide) ** 2), steps) / root


@pytest.mark.parametrize(("n", "p"), [(45, 6), (20, 50)])
def test_reduce_makes_them(tmp_path, n, p):
    phi = draw(n, p)[0][:, None]
    config = made(tmp_path, phi, iterations=60)
    wide = phi[:, 0].astype(np.float64)
    influence = oracles.influence(wide, 0.1 * mean_square(wide))
    expected = {
        "datainf": oracles.datainf(wide, 0.1, [(block.width, block.size) for block in blocks_of(p)]),
        "influence_cg": influence,
        "influence_lissa": influence,
        "spectral(7,0.9)": descended(wide, 0.9, 7),
    }
    for result in reduce_run(config):
        store, found = representers(config, result.method)
        info = store.manifest.info
        assert (info["center"], info["normalize"]) == (False, False)
        assert info["ridge"] == result.ridge == (None if result.method.startswith("spectral") else 0.1)
        assert info["iterations"] == (60 if result.method.startswith("influence_") else None)
        if result.method == "influence_lissa":
            assert len(result.notes) == 1
            assert "LiSSA stops after 60 iterations with residuals of up to" in result.notes[0]
            assert 1e-4 < oracles.relative_error(found[:, 0], influence) < 1
        else:
            assert not result.notes
            assert oracles.relative_error(found[:, 0], expected[result.method]) < 1e-4


def test_a_dense_sketch_is_one_block(tmp_path):
    phi = draw(20, 6)[0][:, None]
    config = make_run(tmp_path, methods=["datainf"])
    write(config, phi, kind="rademacher")
    reduce_run(config)
    expected = oracles.datainf(phi[:, 0].astype(np.float64), 0.1, [(6, 59)])
    assert oracles.relative_error(representers(config, "datainf")[1][:, 0], expected) < 1e-5


def test_datainf_has_no_ridge_to_choose():
    with pytest.raises(MethodError, match="datainf has a damping for each block"):
        resolve(ReduceConfig(ridge="loo"), "datainf", "loss", False, 10, 4)


@pytest.mark.distributed
def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    shared = [made(tmp_path / name, draw(n, p)[0][:, None]) for name, n, p in (("tall", 45, 6), ("wide", 20, 50))]
    ended = launch(script, "whole", *map(config_file, shared))
    assert ended.returncode == 0, ended.stderr
    for config in shared:
        alone = config.model_copy(update={"run_dir": config.run_dir + "_alone"})
        shutil.copytree(config.layout.features, alone.layout.features)
        for result in reduce_run(alone):
            found, expected = representers(config, result.method)[1], representers(alone, result.method)[1]
            assert oracles.relative_error(found, expected) < 1e-5
