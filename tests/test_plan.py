"""Plans against what really happens: counts, FLOPs, files and memory."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks._peak import measured_peak
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.config import RunConfig, load_config, validate_config
from llmattrib.data import load_examples
from llmattrib.encoding import length_batches
from llmattrib.errors import ConfigError, ModelNotFoundError
from llmattrib.extraction import calibration_batches, encode_examples, load_extractor
from llmattrib.features.extract import COLUMNS
from llmattrib.features.sketch import Sketch
from llmattrib.index import build_index
from llmattrib.index_record import index_bytes
from llmattrib.manifest import Manifest
from llmattrib.plan import cost
from llmattrib.plan.run import HEAP_FACTOR, PEAK_FLOPS, plan_run
from llmattrib.plan.shape import BatchShape, batch_peak, empty_model
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.sections import FeaturesConfig, WordsConfig
from llmattrib.settings import resolve
from llmattrib.store import RowStore
from tests.tiny import FAMILIES, tiny_adapter_dir, tiny_run

ROOT = Path(__file__).parent.parent


def folder_bytes(path: str) -> int:
    """All files below but the metadata of arrays and groups."""
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file() and f.name != "zarr.json")


def test_parameters_of_the_worked_examples_are_those_published() -> None:
    small = plan_run(load_config(ROOT / "configs/llama3_8b.yaml"))
    large = plan_run(load_config(ROOT / "configs/llama3_70b_zero3.yaml"))
    assert small.shape.num_parameters == 8_030_261_248
    assert large.shape.num_parameters == 70_553_706_496
    # rank 16: q, k, v, o, gate, up, down of 80 layers
    assert large.gradient_dim == 16 * 80 * (8192 + 1024 + 1024 + 8192 + 28672 + 28672 + 8192)
    assert large.memory.weights == 2 * large.shape.num_parameters + 4 * 2 * 64  # and the rotary frequencies, twice
    assert large.memory.gpu_zero3 < large.memory.gpu - large.memory.weights // 2
    assert small.notes == ("adapters/my-llama3-lora is not here: LoRA has the shape of model.lora",)
    nodes = plan_run(load_config(ROOT / "configs/llama3_8b_multi_node.yaml"))
    assert nodes.shape.num_parameters == small.shape.num_parameters
    assert (nodes.num_gpus, nodes.tokens.num_examples) == (32, 10**6)
    tiny = plan_run(load_config(ROOT / "configs/tiny_cpu.yaml"))
    assert tiny.shape.num_parameters == 134_515_008


def test_word_gradients_are_noted(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, reduce={"methods": ["grad_dot", "tracin_we"]})
    (note,) = plan_run(config).notes[-1:]
    assert note.startswith("the word gradients of tracin_we are not counted: ")
    assert note.endswith(" and 1,280 bytes an example")
    every = config.model_copy(update={"words": WordsConfig(top_positions=None, dtype="float32")})
    assert plan_run(every).notes[-1].endswith("and 256 bytes a word of an example")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linearisation", ["init", "trained"])
def test_counts_are_those_of_the_loaded_model(tmp_path: Path, family: str, linearisation: str) -> None:
    config = tiny_run(tmp_path, family, features={"linearisation": linearisation})
    config = with_adapter(config, tmp_path, family)
    extractor = load_extractor(config)
    encoded = encode_examples(config, extractor, load_examples(config.data)).encoded
    plan = plan_run(config)
    base: Any = extractor.loaded.model.get_base_model()
    assert plan.shape.num_parameters == sum(p.numel() for k, p in base.named_parameters() if "lora_" not in k)
    assert [block.size for block in plan.shape.blocks] == [block.size for block in extractor.blocks]
    assert [block.name for block in plan.shape.blocks] == [block.name for block in extractor.blocks]
    assert plan.tokens_are_exact
    assert plan.tokens.num_tokens == sum(map(len, encoded))
    assert plan.tokens.completion == sum(len(item) - item.completion_start for item in encoded)


def with_adapter(config: RunConfig, tmp_path: Path, family: str) -> RunConfig:
    """The run with an adapter that is not its `model.lora`."""
    path = tiny_adapter_dir(tmp_path, config.model.name, rank=2, target_modules="all-linear")
    return config.model_copy(update={"model": config.model.model_copy(update={"adapters": (path,)})})


@pytest.mark.parametrize("linearisation", ["init", "trained"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_that_torch_counts(tmp_path: Path, family: str, linearisation: str) -> None:
    config = tiny_run(
        tmp_path, family, model={"attn_implementation": "eager"}, features={"linearisation": linearisation}
    )
    config = with_adapter(config, tmp_path, family)
    plan = plan_run(config)
    extractor = load_extractor(config)
    encoded = encode_examples(config, extractor, load_examples(config.data)).encoded
    sketch = Sketch(extractor.plan("none", 0, 1, []))
    size = config.features.shard_size
    with FlopCounterMode(display=False) as counter:
        for start in range(0, len(encoded), size):
            shard = encoded[start : start + size]
            for rows in length_batches(list(map(len, shard)), config.features.tokens_per_batch):
                extractor.extract([shard[row] for row in rows], sketch)
    planned = sum(flops for part, flops in plan.flops.items() if part != "sketch")  # the sketch has no product
    # The inputs of the lowest layers get no gradient; the plan counts whole blocks, and there are two here.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert planned >= counter.get_total_flops()


def test_whitening_and_the_fit_of_a_curvature_are_counted(tmp_path: Path) -> None:
    features = {"preconditioner": "ekfac", "max_eigen_side": 64, "sketch": {"kind": "none"}}
    config = tiny_run(tmp_path, model={"attn_implementation": "eager"}, features=features)
    plan, plain = plan_run(config), plan_run(tiny_run(tmp_path))
    extractor = load_extractor(config)
    encoded = encode_examples(config, extractor, load_examples(config.data)).encoded
    assert len(encoded) <= config.features.sketch.calibration_examples
    assert list(plan.shape.shapes) == list(extractor.shapes)
    assert plan.memory.gpu - plain.memory.gpu >= plan.memory.curvature > 0 == plain.memory.curvature
    with FlopCounterMode(display=False) as fit:
        extractor.fit_curvature(calibration_batches(config, encoded))
    assert plan.flops["curvature"] == pytest.approx(fit.get_total_flops(), rel=0.15)
    sketch, whitening = Sketch(extractor.plan("none", 0, 1, [])), []
    for curvature in (extractor.whitening, None):
        extractor.whitening, extractor._config = curvature, features_of(config, curvature is not None)
        with FlopCounterMode(display=False) as counter:
            extractor.extract(encoded, sketch)
        whitening.append(counter.get_total_flops())
    assert plan.flops["whitening"] == whitening[0] - whitening[1]


def features_of(config: RunConfig, is_whitened: bool) -> FeaturesConfig:
    return config.features if is_whitened else config.features.model_copy(update={"preconditioner": "none"})


def test_a_backward_that_stops_higher_costs_less(tmp_path: Path) -> None:
    whole = plan_run(tiny_run(tmp_path, model={"lora": {"rank": 4, "layers": "0-1"}}))
    upper = plan_run(tiny_run(tmp_path, model={"lora": {"rank": 4, "layers": "1-1"}}))
    assert upper.flops["forward"] == whole.flops["forward"]
    assert upper.flops["backward"] < 0.7 * whole.flops["backward"]
    assert upper.memory.batch < whole.memory.batch


def test_storage_of_a_real_run_is_within_one_per_cent(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        num_rows=96,
        features={"sketch": {"dim": 1536, "calibration_examples": 4}, "shard_size": 16},
        reduce={"methods": ["grad_cos", "influence"]},
    )
    build_features(config)
    reduce_run(config)
    now = plan_run(config).scales[0]
    assert now.features_bytes == pytest.approx(folder_bytes(config.layout.features), rel=0.01)
    for method in config.reduce.methods:
        build_index(config, method)
        assert now.representers_bytes == pytest.approx(folder_bytes(config.layout.representers(method)), rel=0.01)
        stored = sum(Path(f).stat().st_size for f in (config.layout.index(method), config.layout.index_sample(method)))
        assert now.index_bytes == pytest.approx(stored, rel=0.01)


def fill(store: RowStore, rows: np.ndarray) -> None:
    for shard in store.pending():
        store.write_shard(shard, rows[slice(*store.shard_range(shard))], {})


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_storage_of_a_larger_store_is_within_one_per_cent(tmp_path: Path, kind: str) -> None:
    n, dim = 10_100, 64
    config = tiny_run(
        tmp_path,
        features={"shard_size": 256},
        index={"kind": kind, "ivf_lists": 32, "pq_subquantizers": 16, "hnsw_ef_construction": 16},
        reduce={"methods": ["grad_dot"]},
    )
    rows = stream(0, "test", "plan").standard_normal((n, 1, dim)).astype(np.float32)
    fingerprint = {"features": {"output": "loss"}, "encoding": {"label_words": []}}
    features = Manifest("features", n, 1, dim, "float32", 256, fingerprint=fingerprint)
    source = RowStore.create(config.layout.features, features)
    fill(source, rows)
    info = asdict(resolve(config.reduce, "grad_dot", "loss", False, n, dim))
    kept = Manifest("representers", n, 1, dim, "float32", 256, fingerprint={"features": source.digest()}, info=info)
    store = RowStore.create(config.layout.representers("grad_dot"), kept)
    fill(store, rows)
    store.write_vector("mean", rows[0])
    store.write_vector("total", rows[0])
    assert cost.representers_bytes(config, n, dim) == pytest.approx(folder_bytes(store.path), rel=0.01)
    result = build_index(config, "grad_dot")
    sample = Path(config.layout.index_sample("grad_dot")).stat().st_size
    assert index_bytes(config.index, n, dim) == pytest.approx(result.num_bytes + sample, rel=0.01)


def test_the_columns_of_the_features_are_those_of_build(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    assert cost.features_manifest(config, 10, 8).columns == COLUMNS


def small_llama(folder: Path) -> str:
    """A random Llama of 7 million parameters, large enough to be seen in the memory of a process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=512, **shape)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("linearisation", ["init", "trained"])
def test_memory_is_within_a_quarter_of_what_a_process_takes(tmp_path: Path, linearisation: str) -> None:
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": small_llama(tmp_path / "model"), "device": "cpu"},
        "data": {"train": "none"},
        "features": {"linearisation": linearisation, "sketch": {"dim": 1024}, "shard_size": 1},
    }
    if linearisation == "trained":
        tree["model"]["adapters"] = [tiny_adapter_dir(tmp_path, tree["model"]["name"], rank=8)]
    file, batch = tmp_path / "config.yaml", BatchShape(32, 96, 256)
    file.write_text(json.dumps(tree))
    config = validate_config(tree | {"plan": {"num_examples": 32, "tokens_per_example": 96}})
    peak = batch_peak(empty_model(config), config, batch)
    plan = plan_run(config)
    beside = plan.memory.cpu - round(HEAP_FACTOR * plan.memory.batch)
    assert beside + peak == pytest.approx(measured_peak(file, batch), rel=0.25)


def test_without_data_or_stated_tokens_the_plan_says_what_to_set(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data={"train": str(tmp_path / "absent.jsonl")})
    with pytest.raises(ConfigError, match=r"the tokens of .* are not known: there is no such file here"):
        plan_run(config)
    stated = validate_config(config.model_dump() | {"plan": {"num_examples": 1000, "tokens_per_example": 40}})
    plan = plan_run(stated)
    assert not plan.tokens_are_exact
    assert (plan.tokens.num_tokens, plan.tokens.completion) == (40_000, 10_000)


def test_a_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, model={"name": str(tmp_path / "absent")})
    with pytest.raises(ModelNotFoundError, match=r"the architecture of .*absent cannot be read"):
        plan_run(config)
    tokenizer = validate_config(
        config.model_dump() | {"plan": {"architecture": str(ROOT / "configs/architectures/llama3_8b.json")}}
    )
    with pytest.raises(ModelNotFoundError, match=r"the tokenizer of .*absent cannot be read"):
        plan_run(tokenizer)


def test_more_examples_cost_in_proportion_and_hours_follow_the_efficiency(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, plan={"efficiency": 0.5})
    plan = plan_run(config)
    million, hundred, billion = plan.scales[1:]
    assert [scale.num_examples for scale in plan.scales[1:]] == [10**6, 10**8, 10**9]
    assert billion.build_flops == pytest.approx(10 * hundred.build_flops, rel=1e-6)
    assert billion.features_bytes == pytest.approx(1000 * million.features_bytes, rel=1e-3)
    assert million.hours["H100"] == pytest.approx(million.build_flops / (0.5 * 989e12 * 3600))
    assert set(million.hours) == set(PEAK_FLOPS)
    memory = {item["method"]: item["memory_bytes"] for item in million.reduce}
    assert memory["grad_dot"] < memory["influence"] < memory["shapley"]


def test_the_command_prints_a_table_or_exact_json(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    table = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["plan", str(file)])
    assert table.exit_code == 0, table.output
    assert "for an efficiency of 0.35 of its dense peak" in " ".join(table.output.split())
    rows = [line.split() for line in table.output.splitlines() if line.lstrip().startswith("1,000,000,000")]
    assert "…" not in " ".join(rows[0]), "a number is cut on a narrow terminal"
    plain = CliRunner().invoke(app, ["plan", str(file), "--json", "plan.efficiency=0.7"])
    tree = json.loads(plain.stdout)
    overridden = config.model_copy(update={"plan": config.plan.model_copy(update={"efficiency": 0.7})})
    assert tree == json.loads(json.dumps(asdict(plan_run(overridden))))


def test_the_command_shows_an_error_in_three_parts(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data={"train": str(tmp_path / "absent.jsonl")})
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert result.exit_code == 2
    assert "plan.tokens_per_example" in result.stderr
