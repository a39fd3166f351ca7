import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from test_build import contents

from llmattrib import reduce as reduce_module
from llmattrib.config import RunConfig, validate_config
from llmattrib.errors import (
    CorruptShardError,
    IncompleteStoreError,
    MethodError,
    StoreLockedError,
    StoreNotFoundError,
)
from llmattrib.estimators.certificate import certify, sample_queries
from llmattrib.estimators.enumeration import Enumeration
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import LOO_GRID, FeatureRows, KernelGame, mean_square
from llmattrib.lock import locked
from llmattrib.reduce import reduce_run
from llmattrib.scorers.gradient import unit_rows
from llmattrib.sections import ReduceConfig
from llmattrib.semivalues import mean_field as mean_field_of
from llmattrib.semivalues import semivalue_of
from llmattrib.settings import resolve
from llmattrib.store import Manifest, RowStore

COLUMNS = ("norm", "loss", "log_odds", "label")


def make_run(tmp_path: Path, words: tuple[str, ...] = (), **reduce: Any) -> RunConfig:
    return validate_config(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"name": "none"},
            "data": {"train": "none.jsonl", "label_words": list(words)},
            "reduce": reduce,
        }
    )


def write_features(
    config: RunConfig, phi: np.ndarray, output: str = "loss", *, shards: int | None = None, seed: int = 0
):
    """A feature store of `phi` [n, c, p] in shards of 8, in exact float32."""
    n, c, p = phi.shape
    fingerprint = {
        "features": {"output": output},
        "encoding": {"label_words": list(config.data.label_words)},
        "seed": seed,
    }
    manifest = Manifest("features", n, c, p, "float32", 8, COLUMNS, fingerprint, {})
    store = RowStore.create(config.layout.features, manifest)
    columns = columns_of(n)
    for shard in range(store.num_shards if shards is None else shards):
        start, stop = store.shard_range(shard)
        store.write_shard(shard, phi[start:stop], {name: values[start:stop] for name, values in columns.items()})
    return store


def columns_of(n: int) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(5)
    columns = {name: draws.standard_normal(n).astype(np.float32) for name in COLUMNS}
    columns["label"] = draws.integers(0, 3, n).astype(np.float32)
    return columns


def draw(n: int, p: int, c: int = 1, seed: int = 0) -> np.ndarray:
    games = [oracles.gradient_like_game(n, p, seed + output)[0] for output in range(c)]
    return (3 * np.stack(games, axis=1)).astype(np.float32)


def representers(config: RunConfig, method: str) -> tuple[RowStore, np.ndarray]:
    store = RowStore.open(config.layout.representers(method))
    store.require_complete()
    return store, store.read(0, store.manifest.num_rows)


@pytest.mark.parametrize(("method", "form"), [("shapley", "pairs"), ("shapley", "streamed"), ("influence", "auto")])
def test_ridge_lost_in_rounding_is_an_error(tmp_path, method, form):
    config = make_run(tmp_path, methods=[method], form=form, center=False, certificate_draws=0)
    write_features(config, np.ones((20, 1, 4), np.float32))
    tiny = config.reduce.model_copy(update={"ridge": 1e-20})  # the config refuses it
    with pytest.raises(MethodError, match=r"(.|\n)*to fix: take a larger reduce\.ridge"):
        reduce_run(config.model_copy(update={"reduce": tiny}))


@pytest.mark.parametrize(("n", "p"), [(30, 6), (20, 50)])
def test_gradient_methods_take_raw_features_and_equal_their_oracles(tmp_path, n, p):
    config = make_run(tmp_path, methods=["influence", "trak", "grad_dot", "grad_cos"])
    phi = draw(n, p)
    write_features(config, phi, output="log_odds")
    rows, lam = phi[:, 0].astype(np.float64), 0.1 * mean_square(phi[:, 0])
    expected = {
        "influence": oracles.influence(rows, lam),
        "trak": oracles.trak(rows, lam, columns_of(n)["log_odds"]),
        "grad_dot": rows,
        "grad_cos": rows / np.linalg.norm(rows, axis=1, keepdims=True),
    }
    results = reduce_run(config)
    assert [result.method for result in results] == list(expected)
    for result in results:
        store, found = representers(config, result.method)
        assert oracles.relative_error(found[:, 0], expected[result.method]) < 1e-5
        assert not store.read_vector("mean").any()
        np.testing.assert_allclose(
            store.read_vector("total"), found.sum(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-5
        )
        assert store.manifest.info["normalize"] == (result.method == "grad_cos")
        assert result.ridge == (0.1 if result.method in ("influence", "trak") else None)
        assert result.sum_rule_error is None
        assert result.num_examples == n


def test_trak_of_a_loss_is_not_weighted_again(tmp_path):
    config = make_run(tmp_path, methods=["influence", "trak"])
    write_features(config, draw(20, 4), output="loss")
    notes = {result.method: result.notes for result in reduce_run(config)}
    np.testing.assert_array_equal(representers(config, "trak")[1], representers(config, "influence")[1])
    assert any("trak equals influence" in note for note in notes["trak"])
    assert not notes["influence"]


def test_label_words_are_those_of_the_features_not_of_the_config(tmp_path):
    write_features(make_run(tmp_path), draw(20, 4))
    reduce_run(make_run(tmp_path, words=("yes", "no"), methods=["shapley"]))
    info = representers(make_run(tmp_path), "shapley")[0].manifest.info
    assert (info["center"], info["ridge"], info["response"]) == (True, 0.1, "unit")


@pytest.mark.parametrize(("n", "p"), [(30, 6), (20, 50)])
def test_shapley_of_generation_is_centred_and_of_unit_norm(tmp_path, n, p):
    config = make_run(tmp_path, methods=["shapley"])
    phi = draw(n, p)
    write_features(config, phi)
    (result,) = reduce_run(config)
    rows = phi[:, 0].astype(np.float64)
    rows -= rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = MeanField(form="pairs").init(KernelGame.relative(rows, np.ones((n, 1)), 0.1))
    store, found = representers(config, "shapley")
    assert oracles.relative_error(found, expected.representers) < 1e-4
    np.testing.assert_allclose(store.read_vector("mean"), phi.mean(axis=0), rtol=1e-5, atol=1e-6)
    info = store.manifest.info
    assert (info["center"], info["normalize"], info["response"], info["form"]) == (True, True, "unit", "pairs")
    assert result.sum_rule_error == info["sum_rule_error"] <= 1e-3
    assert result.ridge == 0.1
    full = oracles.subset_weights(rows, np.ones((n, 1)), 0.1, list(range(n)))
    np.testing.assert_allclose(store.read_vector("total"), full, rtol=1e-2, atol=1e-3)


def test_shapley_of_label_words_is_not_centred_and_chooses_its_ridge(tmp_path):
    """Features of a margin carry the sign of the label, so the response is 1: as g with responses of -1 and 1."""
    config = make_run(tmp_path, words=("no", "yes"), methods=["shapley"])
    signs = np.where(np.random.default_rng(1).random(30) < 0.5, -1, 1)
    unsigned = draw(30, 6)
    write_features(config, unsigned * signs[:, None, None].astype(np.float32), output="margin")
    (result,) = reduce_run(config)
    rows = unit_rows(unsigned[:, 0]).astype(np.float64)
    responses = signs[:, None].astype(np.float64)
    curve = [np.mean(oracles.leave_one_out_residuals(rows, responses, ridge) ** 2) for ridge in LOO_GRID]
    assert [ridge for ridge, _ in result.loo_curve] == list(LOO_GRID)
    np.testing.assert_allclose([error for _, error in result.loo_curve], curve, rtol=1e-5)
    assert result.ridge == LOO_GRID[int(np.argmin(curve))]
    game = KernelGame.relative(rows, responses, result.ridge)
    expected = MeanField(form="pairs").init(game).representers
    assert oracles.relative_error(representers(config, "shapley")[1], expected) < 1e-4
    assert representers(config, "shapley")[0].manifest.info["ridge"] == result.ridge


@pytest.mark.parametrize(("scale", "side"), [(0.0, "smallest"), (100.0, "largest")])
def test_minimum_at_the_edge_of_the_grid_is_noted(tmp_path, scale, side):
    """Equal features explain a response of 1 without error; noise explains nothing."""
    config = make_run(tmp_path, methods=["influence"], ridge="loo")
    noise = scale * np.random.default_rng(0).standard_normal((40, 1, 8))
    write_features(config, (1 + noise).astype(np.float32))
    (result,) = reduce_run(config)
    assert f"the {side} of its grid" in result.notes[0]
    assert result.ridge == {"smallest": LOO_GRID[0], "largest": LOO_GRID[-1]}[side]
    assert len(result.loo_curve) == len(LOO_GRID)


def test_residual_response_is_one_minus_p(tmp_path):
    config = make_run(tmp_path, methods=["shapley"], response="residual", center=False, normalize=False, ridge=1.0)
    phi = draw(20, 5)
    write_features(config, phi)
    reduce_run(config)
    residual = 1 - 1 / (1 + np.exp(-columns_of(20)["log_odds"].astype(np.float64)))
    game = KernelGame.relative(phi[:, 0].astype(np.float64), residual[:, None], 1.0)
    expected = MeanField(form="pairs").init(game).representers
    assert oracles.relative_error(representers(config, "shapley")[1], expected) < 1e-5


@pytest.mark.parametrize(("n", "p"), [(20, 5), (12, 40)])
def test_logits_play_one_game_per_class(tmp_path, n, p):
    config = make_run(tmp_path, words=("a", "b", "c"), methods=["shapley"], ridge=0.1, normalize=False)
    phi = draw(n, p, c=3)
    write_features(config, phi, output="logits")
    (result,) = reduce_run(config)
    labels = columns_of(n)["label"].astype(int)
    found = representers(config, "shapley")[1]
    assert found.shape == (n, 3, p)
    for label in range(3):
        response = (labels == label)[:, None] - 1 / 3
        game = KernelGame.relative(phi[:, label].astype(np.float64), response, 0.1)
        expected = MeanField(form="pairs").init(game)
        assert oracles.relative_error(found[:, label], expected.representers[:, 0]) < 1e-4
        assert result.sum_rule_error >= 0.99 * expected.sum_rule_error


def test_streamed_semivalues_of_logits_are_near_the_total_gradient_and_cannot_be_followed(tmp_path):
    methods = ["shapley", "banzhaf"]
    found = {}
    for form in ("streamed", "total_gradient"):
        config = make_run(tmp_path / form, words=("a", "b", "c"), methods=methods, ridge=0.3, form=form)
        write_features(config, draw(60, 5, c=3), output="logits")
        results = reduce_run(config)
        found[form] = [representers(config, method)[1] for method in methods]
        info = [representers(config, method)[0].manifest.info for method in methods]
        assert [item["form"] for item in info] == [form, form]
        assert [item["precision"] for item in info] == ["float64", "float64"]
        assert results[0].sum_rule_error <= 1e-3
        assert results[1].sum_rule_error is None
        assert all(result.certificate.num_draws == 32 for result in results)
    for near, exact in zip(*found.values(), strict=True):
        assert 1e-6 < oracles.relative_error(near, exact) < 0.03
    settings = resolve(ReduceConfig(form="streamed"), "shapley", "loss", False, 10, 4)
    with pytest.raises(MethodError, match=r"not kept by the streamed form(.|\n)*reduce.form=total_gradient or cavity"):
        mean_field_of(settings)


def test_notes_of_a_class_name_it(tmp_path):
    config = make_run(tmp_path, words=("a", "b", "c"), methods=["shapley"], ridge=0.1, form="cavity")
    write_features(config, draw(20, 5, c=3), output="logits")
    (result,) = reduce_run(config)
    assert any(note.startswith("class 2: the cavity form does not keep the sum rule") for note in result.notes)


def test_bias_of_the_mean_field_is_measured_and_kept(tmp_path):
    config = make_run(tmp_path, methods=["shapley", "influence"], normalize=False, center=False)
    phi = draw(30, 6)
    write_features(config, phi)
    results = reduce_run(config)
    found = results[0].certificate
    assert (found.num_draws, found.num_queries) == (32, 32)
    game = KernelGame.relative(phi[:, 0].astype(np.float64), np.ones((30, 1)), 0.1)
    queries = sample_queries(FeatureRows.of(game.features), 32, 0)
    expected = certify(game, MeanField().init(game), queries, Subset(num_draws=32)).summary()
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-3, abs=1e-6)
    assert 0 <= found.bias <= found.upper < 0.5
    assert results[1].certificate is None
    assert representers(config, "shapley")[0].manifest.info["certificate"] == dataclasses.asdict(found)
    assert reduce_run(config)[0].certificate == found
    (without,) = reduce_run(make_run(tmp_path, methods=["shapley"], certificate_draws=0))
    assert without.certificate is None


SEMIVALUES = ["shapley", "beta_shapley(4,1)", "banzhaf", "weighted_banzhaf(0.3)", "ame(0.3,0.5)", "leave_one_out"]


def test_semivalues_of_a_run_share_a_sweep_and_have_the_bytes_they_have_alone(tmp_path, monkeypatch):
    together = make_run(tmp_path / "together", methods=["influence", *SEMIVALUES], certificate_draws=8)
    write_features(together, draw(20, 5))
    sweeps = []
    sweep = MeanField.sweep
    monkeypatch.setattr(MeanField, "sweep", lambda *args: sweeps.append(args[2]) or sweep(*args))
    results = reduce_run(together)
    assert [len(semivalues) for semivalues in sweeps] == [6]
    assert [result.method for result in results] == ["influence", *SEMIVALUES]
    assert [result.sum_rule_error is not None for result in results] == [False, True, *[False] * 5]
    assert all(result.certificate.num_draws == 8 for result in results[1:])
    assert results[-1].certificate.upper < 1e-4, "leave-one-out is exact"
    for method in SEMIVALUES:
        alone = make_run(tmp_path / "alone", methods=[method], certificate_draws=8)
        if not Path(alone.layout.features).exists():
            write_features(alone, draw(20, 5))
        reduce_run(alone)
        assert contents(alone.layout.representers(method)) == contents(together.layout.representers(method))
    assert Path(together.layout.representers("beta_shapley(4,1)")).name == "beta_shapley_4_1.zarr"


def test_semivalues_are_near_enumeration_and_finished_ones_are_reused(tmp_path):
    phi = draw(9, 5)
    config = make_run(tmp_path, methods=["shapley"], normalize=False, center=False, certificate_draws=0)
    write_features(config, phi)
    reduce_run(config)
    longer = make_run(tmp_path, methods=SEMIVALUES, normalize=False, center=False, certificate_draws=0)
    assert [result.is_reused for result in reduce_run(longer)] == [True, *[False] * 5]
    game = KernelGame.relative(phi[:, 0].astype(np.float64), np.ones((9, 1)), 0.1)
    for method in SEMIVALUES:
        truth = Enumeration(semivalue_of(method)).init(game).representers
        assert oracles.relative_error(representers(longer, method)[1], truth) < 0.06
    assert all(result.is_reused for result in reduce_run(longer))


def test_classes_share_a_certificate_and_a_large_bias_is_noted(tmp_path):
    """The cavity form of few dimensions is far off."""
    settings = {"words": ("a", "b", "c"), "methods": ["shapley"], "ridge": 0.01, "form": "cavity"}
    config = make_run(tmp_path, **settings, certificate_draws=200)
    write_features(config, draw(12, 2, c=3), output="logits")
    (result,) = reduce_run(config)
    assert result.certificate.lower > 0.05
    assert f"the mean field is off: {result.certificate}" in result.notes[-1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_representers_are_stored_in_the_dtype_and_shards_asked_for(tmp_path, dtype):
    config = make_run(tmp_path, methods=["grad_dot"], dtype=dtype)
    phi = draw(20, 5)
    write_features(config, phi)
    reduce_run(config)
    store, found = representers(config, "grad_dot")
    assert (store.manifest.dtype, store.manifest.shard_size, store.manifest.kind) == (dtype, 8, "representers")
    np.testing.assert_allclose(found, phi, rtol=1e-3)


def test_equal_representers_are_reused_and_others_replaced(tmp_path):
    config = make_run(tmp_path, methods=["influence", "shapley"])
    features = write_features(config, draw(20, 5))
    first = reduce_run(config)
    before = {method: contents(config.layout.representers(method)) for method in config.reduce.methods}
    again = reduce_run(config)
    assert [result.is_reused for result in first + again] == [False, False, True, True]
    for old, new in zip(first, again, strict=True):
        assert dataclasses.replace(new, is_reused=False, seconds=old.seconds) == old
    other = make_run(tmp_path, methods=["influence", "shapley"], form="cavity")
    assert [result.is_reused for result in reduce_run(other)] == [True, False]  # influence has no form
    assert [result.is_reused for result in reduce_run(config)] == [True, False]
    assert before == {method: contents(config.layout.representers(method)) for method in config.reduce.methods}
    reduce_module.storage.remove(features.path)
    write_features(config, draw(20, 5, seed=9))
    assert [result.is_reused for result in reduce_run(config)] == [False, False]


@pytest.mark.parametrize("method", ["influence", "shapley"])
def test_damaged_features_are_named_and_what_was_there_is_kept(tmp_path, method):
    config = make_run(tmp_path, methods=[method])
    features = write_features(config, draw(20, 5))
    reduce_run(config)
    before = contents(config.layout.representers(method))
    shard = Path(features.path, "rows/c.1.0.0")
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(bytes(data))
    assert reduce_run(config)[0].is_reused, "the records are the same, and nothing is read again"
    other = make_run(tmp_path, methods=[method], center=method != "shapley")
    with pytest.raises(CorruptShardError, match=r"shard 1 of .*features\.zarr[\s\S]*delete .*commits/000001-"):
        reduce_run(other)
    assert contents(config.layout.representers(method)) == before


def test_representers_that_cannot_be_computed_leave_those_that_are_there(tmp_path, monkeypatch):
    config = make_run(tmp_path, methods=["shapley"])
    write_features(config, draw(20, 5))
    reduce_run(config)
    before = contents(config.layout.representers("shapley"))
    monkeypatch.setattr("llmattrib.memory.available_memory", lambda: 10)
    with pytest.raises(MethodError, match=r"needs .* GiB of memory"):
        reduce_run(make_run(tmp_path, methods=["shapley"], ridge=0.5))
    assert contents(config.layout.representers("shapley")) == before


@pytest.mark.parametrize(("method", "form"), [("influence", "auto"), ("shapley", "pairs"), ("shapley", "streamed")])
def test_killed_reduce_is_finished_to_the_same_bytes(tmp_path, method, form, monkeypatch):
    config = make_run(tmp_path, methods=[method], form=form)
    write_features(config, draw(30, 5))
    reduce_run(config)
    whole = contents(config.layout.representers(method))
    reduce_module.storage.remove(config.layout.representers(method))
    write_shard = RowStore.write_shard

    def write_two(store, shard, rows, scalars):
        if shard == 2:
            raise KeyboardInterrupt
        write_shard(store, shard, rows, scalars)

    monkeypatch.setattr(RowStore, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        reduce_run(config)
    monkeypatch.undo()
    assert RowStore.open(config.layout.representers(method)).pending() == [2, 3]
    (result,) = reduce_run(config)
    assert not result.is_reused
    assert contents(config.layout.representers(method)) == whole


def test_progress_rises_to_its_end(tmp_path):
    config = make_run(tmp_path)
    write_features(config, draw(20, 5))
    seen: list[tuple[int, int]] = []
    reduce_run(config, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (500, 500)
    assert {total for _, total in seen} == {500}
    assert all(0 <= done <= 500 for done, _ in seen)


def test_features_must_be_there_complete_and_not_in_other_hands(tmp_path):
    config = make_run(tmp_path, methods=["grad_dot"])
    with pytest.raises(StoreNotFoundError, match="llmattrib build"):
        reduce_run(config)
    write_features(config, draw(20, 5), shards=2)
    with pytest.raises(IncompleteStoreError, match="lacks 1 of 3 shards"):
        reduce_run(config)
    write_features_rest = RowStore.open(config.layout.features, read_only=False)
    columns = {name: values[16:] for name, values in columns_of(20).items()}
    write_features_rest.write_shard(2, draw(20, 5)[16:], columns)
    with locked(config.layout.path("representers")), pytest.raises(StoreLockedError, match="is being written by"):
        reduce_run(config)
    assert len(reduce_run(config)) == 1


def test_one_example_cannot_be_centred(tmp_path):
    config = make_run(tmp_path, methods=["shapley"])
    write_features(config, draw(1, 5))
    with pytest.raises(MethodError, match=r"all features are zero(.|\n)*reduce\.center=false"):
        reduce_run(config)


@pytest.mark.parametrize("method", ["influence", "trak", "grad_dot", "grad_cos"])
def test_gradient_methods_refuse_logits(method):
    with pytest.raises(
        MethodError, match=rf"{method} needs one gradient per example(.|\n)*reduce\.methods=\[shapley\]"
    ):
        resolve(ReduceConfig(), method, "logits", True, 10, 4)


@pytest.mark.parametrize(
    ("response", "output", "has_labels", "message"),
    [
        ("labels", "loss", False, r"reduce\.response=labels needs label words"),
        ("labels", "pntk", True, "features of output pntk are the same for every label"),
        ("unit", "logits", True, r"reduce\.response=unit gives every class the same response"),
        ("residual", "logits", True, r"reduce\.response=residual gives every class the same response"),
    ],
)
def test_responses_that_do_not_fit_the_features_are_errors(response, output, has_labels, message):
    with pytest.raises(MethodError, match=message):
        resolve(ReduceConfig(response=response), "shapley", output, has_labels, 10, 4)


@pytest.mark.parametrize("output", ["loss", "log_odds", "margin", "pntk"])
def test_spectral_of_unit_rows_is_an_error(output):
    with pytest.raises(MethodError, match=r"spectral\(7,0\.9\) is what descent along gradients as they are.*unit norm"):
        resolve(ReduceConfig(normalize=True), "spectral(7,0.9)", output, True, 10, 4)
    for normalize in ("auto", False):
        assert not resolve(ReduceConfig(normalize=normalize), "spectral(7,0.9)", output, True, 10, 4).normalize


def test_auto_settings_follow_the_task_and_explicit_ones_win():
    def chosen(method, has_labels, num_rows=10, dim=4, is_whitened=False, **settings):
        found = resolve(ReduceConfig(**settings), method, "loss", has_labels, num_rows, dim, is_whitened)
        return found.center, found.normalize, found.ridge, found.response, found.form

    assert chosen("shapley", False) == (True, True, 0.1, "unit", "pairs")
    assert chosen("shapley", True) == (False, True, "loo", "labels", "pairs")
    assert chosen("shapley", False, 2049) == (True, True, 0.1, "unit", "total_gradient")
    assert chosen("shapley", False, 20_001) == (True, True, 0.1, "unit", "streamed")
    assert chosen("shapley", False, 20_001, 1251) == (True, True, 0.1, "unit", "total_gradient")
    pntk = resolve(ReduceConfig(), "shapley", "pntk", True, 10, 4)
    for has_labels, response in ((False, "unit"), (True, "labels")):
        assert chosen("shapley", has_labels, is_whitened=True) == (False, True, 10.0, response, "pairs")
        assert chosen("shapley", has_labels, is_whitened=True, center=True, ridge=1)[:3] == (True, True, 1)
    assert chosen("influence", False, is_whitened=True)[:3] == (False, False, 0.1)
    assert pntk.response == "unit", "it has no label in it"
    for method, normalize, ridge in (
        ("influence", False, 0.1),
        ("trak", False, 0.1),
        ("grad_dot", False, None),
        ("grad_cos", True, None),
    ):
        assert chosen(method, True) == chosen(method, False) == (False, normalize, ridge, None, None)
    assert chosen("shapley", True, center=True, normalize=False, ridge=3.0, response="unit", form="cavity") == (
        (True, False, 3.0, "unit", "cavity")
    )
    assert chosen("grad_cos", False, normalize=False, center=True) == (True, True, None, None, None)
    assert chosen("influence", True, ridge="loo") == (False, False, "loo", "labels", None)
