"""Every stage that runs the model does so on a pretended GPU, without mixing devices, to the numbers of the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_build import changed

import llmattrib.games.retraining
import llmattrib.model
import llmattrib.train
from llmattrib.build import build_features
from llmattrib.config import RunConfig
from llmattrib.errors import ConfigError
from llmattrib.evaluate.scores import RunScores
from llmattrib.evaluate.tail_patch import tail_patch_of_run
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Block, Sketch, make_plan
from llmattrib.further_training import gold_scores, train_further
from llmattrib.index import build_index
from llmattrib.model import load_model
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.retrain import retrain, retrained_seeds
from llmattrib.store import RowStore
from llmattrib.train import train_adapter
from tests.pretended_gpu import GPU, MixedDevicesError, pretended_gpu
from tests.tiny import tiny_adapter_dir, tiny_run


@contextmanager
def on_gpu() -> Iterator[None]:
    """Load models onto the pretended GPU."""
    with pytest.MonkeyPatch.context() as patch, pretended_gpu():
        for module in (llmattrib.model, llmattrib.train, llmattrib.games.retraining):
            patch.setattr(module, "resolve_device", lambda _: GPU)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True


def everything(config: RunConfig, read: Callable[[RunConfig], Any]) -> tuple[Any, Any]:
    """Return what `read` says of the run on the pretended GPU, and of the same run on the CPU."""
    with on_gpu():
        found = read(changed(config, f"{config.run_dir}-gpu"))
    return found, read(changed(config, f"{config.run_dir}-cpu"))


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu():
        here, there = torch.ones(3, requires_grad=True), torch.ones(3, device="cuda")
        assert (here.device.type, there.device, (there + 1).device, there.cpu().device.type) == ("cpu", GPU, GPU, "cpu")
        assert here.to(there).is_cuda
        assert (there[torch.tensor([0, 2])] * torch.tensor(2.0)).is_cuda
        for mixed in (lambda: here + there, lambda: here[there.long()], lambda: torch.stack([here, there])):
            with pytest.raises(MixedDevicesError):
                mixed()
        with pytest.raises(TypeError, match="cuda:0"):
            there.numpy()
        product = here.to(GPU) * 2
        product.register_hook(lambda gradient: gradient + here.detach())
        with pytest.raises(MixedDevicesError):
            product.sum().backward()


@pytest.mark.parametrize(
    ("family", "dtype", "features"),
    [
        ("llama", "float32", {"num_inits": 2}),
        ("gpt2", "bfloat16", {"output": "pntk", "preconditioner": "ekfac"}),
        ("gpt2", "float32", {"output": "logits", "sketch": {"kind": "rademacher", "dim": 64}}),
        ("llama", "float16", {"linearisation": "trained"}),
        ("gpt2", "float32", {"linearisation": "trained", "preconditioner": "ekfac", "sketch": {"kind": "none"}}),
    ],
)
def test_features(tmp_path: Path, family: str, dtype: str, features: dict[str, Any]) -> None:
    config = tiny_run(tmp_path, family, labels=features.get("output") == "logits", features=features)
    adapters = []
    if "linearisation" in features:
        adapters = [tiny_adapter_dir(tmp_path, config.model.name, seed=seed, name=f"a{seed}") for seed in (0, 1)]

    def rows(run: RunConfig) -> np.ndarray:
        build_features(run)
        store = RowStore.open(run.layout.features)
        return store.read(0, store.manifest.num_rows)

    found, wanted = everything(changed(config, model={"dtype": dtype, "adapters": adapters}), rows)
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found).max() > 0.1


def test_a_gpu_adds_in_a_fixed_order_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, features={"sketch": {"kind": "none"}})

    def refuse(*_: Any) -> None:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    load_model(config.model)
    assert not torch.are_deterministic_algorithms_enabled()  # of a CPU nothing is asked
    with on_gpu():
        load_model(config.model)
        assert torch.are_deterministic_algorithms_enabled()
        load_model(config.model.model_copy(update={"deterministic": False}))
        assert not torch.are_deterministic_algorithms_enabled()
        monkeypatch.setattr(Extractor, "extract", refuse)
        with pytest.raises(ConfigError, match=r"cumsum_cuda_kernel has no way[\s\S]*set model\.deterministic=false"):
            build_features(config)


@pytest.mark.gpu
@pytest.mark.parametrize("linearisation", ["init", "trained"])
def test_two_runs_on_a_gpu_give_the_same_bytes(tmp_path: Path, linearisation: str) -> None:
    config = tiny_run(tmp_path, model={"device": "cuda", "dtype": "bfloat16"}, num_rows=64)
    config = changed(config, features={"linearisation": linearisation})
    for name in ("one", "two"):
        run = changed(config, tmp_path / name)
        train_adapter(run)
        build_features(run)
    for part in ("adapter", "features.zarr/rows"):
        files = [path for path in sorted((tmp_path / "one" / part).rglob("*")) if path.is_file()]
        assert files
        for path in files:
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_tables_of_a_sketch_are_on_the_gpu_alone() -> None:
    with pretended_gpu():
        sketch = Sketch(make_plan("rademacher", 0, 8, [Block("layer", "B", 16)], [1.0]), GPU)
        sketch.add(torch.zeros(2, 8, device=GPU), 0, torch.ones(2, 16, device=GPU))
        assert all(table.is_cuda for tables in sketch._tables.values() for table in tables)


def test_dropout_forks_the_numbers_of_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU that is touched costs hundreds of MB on it, and so does one that is another process's."""
    touched = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: touched.append(device) or torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    config = tiny_run(tmp_path, model={"lora": {"rank": 2, "dropout": 0.5}}, train={"epochs": 1})
    for train in (on_gpu, nullcontext):
        with train():
            train_adapter(changed(config, tmp_path / train.__name__))
    assert {*touched} == {GPU}


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_from_training_to_answers(tmp_path: Path, labels: bool) -> None:
    config = tiny_run(
        tmp_path,
        labels=labels,
        features={"linearisation": "trained"},
        reduce={"methods": ["grad_dot", "tracin_we"]},
        words={"synonym_cosine": 0.9},
        evaluate={"tail_patch_top": 2, "num_resamples": 10},
    )
    config = changed(config, values={"data": config.data.train, "limit": 3})

    def answers(run: RunConfig) -> list[Any]:
        train_adapter(run)
        build_features(run)
        reduce_run(run)
        found: list[Any] = []
        for method in run.reduce.methods:
            build_index(run, method)
            hits = Run(run).query("what is the colour of a tree?", method=method, rerank=4, top=3)
            found += [hits.completion, [(hit.id, round(hit.value, 4)) for hit in (*hits.helpful, *hits.harmful)]]
        patched = tail_patch_of_run(RunScores(run))
        return [*found, [(row["method"], round(float(row["change"] or 0), 5)) for row in patched.rows]]

    found, wanted = everything(config, answers)
    assert found == wanted


@pytest.mark.slow
def test_sub_models_and_further_training(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        num_rows=6,
        train={"epochs": 1},
        retraining={"num_subsets": 2, "shard_size": 2, "num_seeds": 1},
        gold={"steps": [1], "num_examples": 2, "num_seeds": 1, "shard_size": 2, "dtype": "float64"},
    )
    config = changed(config, values={"data": config.data.train, "limit": 2})

    def read(run: RunConfig) -> list[np.ndarray]:
        train_adapter(run)
        retrain(run)
        train_further(run)
        return [retrained_seeds(run)[1], gold_scores(run)[1]]

    for found, wanted in zip(*everything(config, read), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
