"""Several adapters in one run: training them, taking features at them, and scores that are means over members."""

import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
from test_build import changed, contents
from tiny import tiny_run

from llmattrib import train
from llmattrib.build import build_features
from llmattrib.config import RunConfig
from llmattrib.coordinates import Transform
from llmattrib.errors import ConfigError, MethodError, ModelNotFoundError
from llmattrib.estimators.mean_field import MeanField
from llmattrib.extraction import run_adapters
from llmattrib.finetune import FineTuning
from llmattrib.games.kernel import KernelGame
from llmattrib.index import build_index
from llmattrib.plan.run import plan_run
from llmattrib.query import Query, Run
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.train import adapter_paths, train_adapter
from llmattrib.verify import verify_run

GRADIENT = ("influence", "trak", "datainf", "spectral(20,0.5)", "grad_dot")


def small(folder: Path, **sections: dict[str, object]) -> RunConfig:
    sections["train"] = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 4, "dtype": "float32"} | dict(
        sections.get("train", {})
    )
    sections["features"] = {
        "linearisation": "trained",
        "output": "log_odds",
        "sketch": {"kind": "none"},
        "dtype": "float32",
        "shard_size": 4,
    } | dict(sections.get("features", {}))
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
    config = tiny_run(folder, num_rows=9, **sections)
    return changed(config, model={"lora": lora})


def adapter_files(config: RunConfig) -> dict[str, bytes]:
    """All adapters, but for the place of the run."""
    return {
        f"{Path(path).name}/{name}": data for path in adapter_paths(config) for name, data in contents(path).items()
    }


# ------------------------------------------------------------------------------------------------------ training


def test_names_and_epochs_of_what_is_trained(tmp_path: Path) -> None:
    config = small(tmp_path, train={"num_adapters": 2, "checkpoints": 3, "epochs": 7}, seed=5)
    names = [Path(path).name for path in adapter_paths(config)]
    assert names == [
        "adapter",
        "adapter-epoch5",
        "adapter-epoch2",
        "adapter-seed6",
        "adapter-seed6-epoch5",
        "adapter-seed6-epoch2",
    ]
    with pytest.raises(ConfigError, match="checkpoints=5 is more than epochs=4"):
        small(tmp_path, train={"checkpoints": 5})


def test_each_is_what_its_own_run_would_have(tmp_path: Path) -> None:
    config = small(tmp_path, train={"num_adapters": 2, "checkpoints": 2})
    seen: list[tuple[int, int]] = []
    result = train_adapter(config, lambda done, total: seen.append((done, total)))
    assert result.paths == tuple(adapter_paths(config))
    assert result.path == config.layout.adapter
    assert not result.reused
    assert seen[-1] == (2 * 4 * 9, 2 * 4 * 9)
    assert seen == sorted(seen)
    for number, path in ((0, "adapter"), (1, "adapter-seed1")):
        alone = changed(config, tmp_path / f"alone{number}", train={"num_adapters": 1, "checkpoints": 1})
        alone = alone.model_copy(update={"seed": number})
        assert contents(train_adapter(alone).path) == contents(Path(config.run_dir, path))
    assert train_adapter(config).reused
    assert not list(Path(config.run_dir).glob("*.state.safetensors"))


def test_checkpoints_that_are_asked_for_later_are_trained_up_to_the_last_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = small(tmp_path / "once", train={"checkpoints": 2})
    train_adapter(once)
    config = changed(once, tmp_path / "later", train={"checkpoints": 1})
    train_adapter(config)
    epochs, epoch = [], FineTuning.epoch
    monkeypatch.setattr(FineTuning, "epoch", lambda self, *a, **k: epochs.append(a[2]) or epoch(self, *a, **k))
    more = changed(config, train={"checkpoints": 2})
    train_adapter(more)
    assert epochs == [0, 1]
    assert adapter_files(more) == adapter_files(once)


@pytest.mark.parametrize("stops_at", [1, 2, 3, 6])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int) -> None:
    """Killed when it would save its state, before or after a checkpoint; or in the second seed."""
    whole = small(tmp_path, train={"num_adapters": 2, "checkpoints": 2})
    train_adapter(whole)
    config, saved, save = changed(whole, tmp_path / "killed"), [], train._save_state

    def killed(*arguments: object) -> None:
        saved.append(1)
        if len(saved) == stops_at:
            raise KeyboardInterrupt
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "_save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(config)
    monkeypatch.setattr(train, "_save_state", save)
    train_adapter(config)
    assert adapter_files(config) == adapter_files(whole)


# ---------------------------------------------------------------------------------------------- features, scores


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with four adapters: two seeds, and an earlier epoch of each."""
    config = small(tmp_path_factory.mktemp("made"), train={"num_adapters": 2, "checkpoints": 2})
    config = changed(config, reduce={"methods": [*GRADIENT, "shapley"], "ensemble": "members", "certificate_draws": 0})
    train_adapter(config)
    build_features(config)
    reduce_run(config)
    return config


def scores(config: RunConfig, method: str) -> np.ndarray:
    """[q, n] of features of the training examples as queries."""
    rows = RowStore.open(config.layout.features).read(0, 9)[:, 0].astype(np.float64)
    return rows[:4] @ RowStore.open(config.layout.representers(method)).read(0, 9)[:, 0].T


def test_features_are_taken_at_all_of_them(made: RunConfig) -> None:
    assert run_adapters(made) == adapter_paths(made)
    assert run_adapters(changed(made, features={"linearisation": "init"})) == [made.layout.adapter]
    named = changed(made, made.run_dir + "-named", model={"adapters": adapter_paths(made)})
    build_features(named)
    assert contents(named.layout.features) == contents(made.layout.features)
    assert verify_run(made, ["R"]) == []


def test_members_are_scored_as_their_own_runs_and_averaged(made: RunConfig) -> None:
    alone = []
    for number, path in enumerate(adapter_paths(made)):
        own = changed(made, f"{made.run_dir}-{number}", model={"adapters": [path]}, reduce={"ensemble": "kernel"})
        build_features(own)
        reduce_run(own)
        alone.append(own)
    for method in GRADIENT:
        if method in ("trak", "spectral(20,0.5)"):  # their weights are of the mean log-odds: compared below
            continue
        expected = np.mean([scores(own, method) for own in alone], axis=0)
        np.testing.assert_allclose(scores(made, method), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    odds = [RowStore.open(own.layout.features).column("log_odds").astype(np.float64) for own in (*alone, made)]
    weights = [1 / (1 + np.exp(column)) for column in odds]
    parts = [scores(own, "trak") / weight for own, weight in zip(alone, weights[:-1], strict=True)]
    np.testing.assert_allclose(
        scores(made, "trak"), np.mean(parts, axis=0) * weights[-1], rtol=1e-3, atol=1e-4 * np.abs(parts[0]).max()
    )
    root, parts = np.sqrt(weights[-1] * (1 - weights[-1]))[:, None], []
    for own in alone:
        rows = RowStore.open(own.layout.features).read(0, 9)[:, 0].astype(np.float64)
        descended = oracles.descend(root * rows, 0.5 / np.sum((root * rows) ** 2), 20) / root
        parts.append(rows[:4] @ (weights[-1][:, None] * descended).T)
    expected = np.mean(parts, axis=0)
    np.testing.assert_allclose(
        scores(made, "spectral(20,0.5)"), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


def test_the_mean_kernel_is_another_thing_and_semivalues_keep_it(made: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(made.run_dir, tmp_path / "run")
    config = changed(made, tmp_path / "run", reduce={"ensemble": "kernel"})
    before = {method: scores(config, method) for method in (*GRADIENT, "shapley")}
    reused = {result.method: result.is_reused for result in reduce_run(config)}
    assert {method for method, is_reused in reused.items() if is_reused} == {"grad_dot", "shapley"}
    rows = RowStore.open(config.layout.features).read(0, 9)[:, 0].astype(np.float64)
    ridge = 0.1 * np.mean((rows**2).sum(1))
    joint = rows[:4] @ np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T)
    np.testing.assert_allclose(scores(config, "influence"), joint, rtol=1e-3, atol=1e-5)
    assert not np.allclose(before["influence"], joint, rtol=0.01)


def test_unit_norm_is_of_each_adapter(made: RunConfig, tmp_path: Path) -> None:
    """Of grad_cos, its exact values and the kernel game, with one adapter's gradients far larger than the others'."""
    shutil.copytree(made.run_dir, tmp_path / "run")
    config = changed(made, tmp_path / "run", reduce={"methods": ["grad_cos", "shapley"], "ridge": 1.0, "center": False})
    reduce_run(config)
    store = RowStore.open(config.layout.features)
    rows = store.read(0, 9)[:, 0].astype(np.float64)
    parts = np.split(rows, len(adapter_paths(made)), axis=1)
    assert np.ptp([np.linalg.norm(part) for part in parts]) > 0.1 * np.linalg.norm(rows)
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    kernel = np.mean([unit @ unit.T for unit in units], axis=0)
    found = RowStore.open(config.layout.representers("grad_cos")).read(0, 9)[:, 0].astype(np.float64)
    np.testing.assert_allclose(found @ found.T, kernel, rtol=1e-4, atol=1e-5)
    game = KernelGame.relative(np.concatenate(units, axis=1) / len(parts) ** 0.5, np.ones((9, 1)), 1.0)
    values = RowStore.open(config.layout.representers("shapley"))
    expected = MeanField(form="pairs").init(game).representers
    assert oracles.relative_error(values.read(0, 9), expected) < 1e-4
    assert Transform.of(values).members == (len(parts[0][0]),) * len(parts)
    own = np.einsum("np,np->n", Transform.of(values)(rows[:, None].astype(np.float32))[:, 0], expected[:, 0])
    np.testing.assert_allclose(own, np.einsum("np,np->n", game.features, expected[:, 0]), rtol=1e-3)
    build_index(config, "grad_cos")
    query = Query.of("what is the colour of a stone 3?", "green blue")
    plain, exact = (Run(config).query_many([query], methods=["grad_cos"], top=9, rerank=k)[0] for k in (0, 9))
    values_of = [{hit.row: hit.value for hit in (*hits.helpful, *hits.harmful)} for hits in (plain, exact)]
    np.testing.assert_allclose(*([found[row] for row in range(9)] for found in values_of), rtol=1e-3, atol=1e-5)


def test_a_query_is_one_inner_product(made: RunConfig) -> None:
    build_index(made, "influence")
    run = Run(made)
    query = Query.of("what is the colour of a stone 3?", "green blue")
    hits = run.query_many([query], methods=["influence"], top=9)[0]
    answered = run.answers([query])
    phi = run.features(answered, [run._encode(answered[0])])[0, 0].astype(np.float64)
    values = RowStore.open(made.layout.representers("influence")).read(0, 9)[:, 0] @ phi
    found = {hit.row: hit.value for hit in (*hits.helpful, *hits.harmful)}
    np.testing.assert_allclose([found[row] for row in range(9)], values, rtol=1e-3, atol=1e-6)


def test_a_missing_adapter_is_named(made: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(made.run_dir, tmp_path / "run")
    config = changed(made, tmp_path / "run")
    shutil.rmtree(adapter_paths(config)[-1])
    with pytest.raises(ModelNotFoundError, match=r"adapter-seed1-epoch2 does not exist[\s\S]*the 4 adapters"):
        build_features(config)
    (finding,) = verify_run(config, ["R"])
    assert (finding.place, finding.rerun) == ("adapter-seed1-epoch2", "llmattrib train R")
    train_adapter(config)
    assert verify_run(config, ["R"]) == []


def test_members_that_share_columns_are_refused(tmp_path: Path) -> None:
    config = small(tmp_path, features={"linearisation": "init", "num_inits": 2})
    config = changed(config, reduce={"methods": ["influence"], "ensemble": "members"})
    build_features(config)
    with pytest.raises(MethodError, match=r"the members share columns: 2 initialisations[\s\S]*ensemble=kernel"):
        reduce_run(config)
    with pytest.raises(MethodError, match=r"ensemble=members and reduce.normalize=true"):
        reduce_run(changed(config, reduce={"normalize": True}))


def test_the_plan_counts_them(tmp_path: Path) -> None:
    one, four = small(tmp_path / "a"), small(tmp_path / "b", train={"num_adapters": 2, "checkpoints": 2})
    plans = [plan_run(config) for config in (one, four)]
    assert plans[1].train_flops == 2 * plans[0].train_flops
    assert plans[1].flops["forward"] == 4 * plans[0].flops["forward"]
    assert plans[1].flops["lora"] == 4 * plans[0].flops["lora"]
