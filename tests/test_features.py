"""Features against one-example-at-a-time autograd through peft, and their invariances."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmattrib.encoding import Batch, Encoded
from llmattrib.errors import FeatureError
from llmattrib.features.capture import Tap, capture
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.forward import completion_logits
from llmattrib.model import load_model, lora_a_init
from llmattrib.sections import FeaturesConfig, LoraConfig, ModelConfig
from tests.tiny import FAMILIES, tiny_adapter_dir, tiny_model_dir

# peft 0.21 asks transformers 5.23 for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
    "qwen3": ["k_proj", "o_proj", "down_proj"],
}
LABEL_IDS = (7, 11, 40)


def examples(count: int, labels: bool = False, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        start = int(rng.integers(2, 12))
        length = start + (1 if labels else int(rng.integers(1, 7)))
        ids = [int(token) for token in rng.integers(3, 300, length)]
        label = int(rng.integers(3)) if labels else -1
        if labels:
            ids[start] = LABEL_IDS[label]
        made.append(Encoded(tuple(ids), start, label))
    return made


def oracle_outputs(kind: str, logits: Tensor, example: Encoded, label_ids: Sequence[int]) -> list[Tensor]:
    """The output functions by their definitions, for one example's logits [t, v]."""
    read = logits[example.completion_start - 1 : -1]
    targets = torch.tensor(example.input_ids[example.completion_start :])
    if kind == "pntk":
        return [
            (read[:, list(label_ids)] if label_ids else read).sum(1).mean() / (len(label_ids) or read.shape[1]) ** 0.5
        ]
    if label_ids:
        words = read[0, list(label_ids)]
        logp = torch.log_softmax(words, 0)[example.label]
        if kind == "logits":
            return list(words)
    else:
        logp = torch.log_softmax(read, 1)[torch.arange(len(targets)), targets].mean()
    return [-logp] if kind == "loss" else [logp - torch.log(-torch.expm1(logp))]


def oracle(model: torch.nn.Module, roles: str, example: Encoded, kind: str, label_ids: Sequence[int]) -> list[Tensor]:
    """Gradients by autograd, a batch of one without padding; factor by factor in the extractor's order."""
    parameters = []
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parameters += [getattr(module, f"lora_{role}")["default"].weight for role in roles]
            assert name
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids).logits[0]
    rows = []
    for output in oracle_outputs(kind, logits, example, label_ids):
        gradients = torch.autograd.grad(output, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return rows


def features(extractor: Extractor, batches: Sequence[Sequence[Encoded]], side: str = "right") -> np.ndarray:
    sketch = Sketch(extractor.plan("none", 0, 1, ()))
    return np.concatenate([extractor.extract(batch, sketch, side).phi for batch in batches])


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative error of every row in the 2-norm."""
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= tolerance, error.max()


def trained_pair(
    tmp_path: Path, family: str, rank: int, alpha: float, use_rslora: bool, kind: str, label_ids: Sequence[int] = ()
) -> tuple[Extractor, torch.nn.Module]:
    """An extractor at a random adapter, and the same adapter as a plain trainable peft model."""
    base = tiny_model_dir(tmp_path, family)
    adapter = tiny_adapter_dir(
        tmp_path, base, rank=rank, alpha=alpha, use_rslora=use_rslora, target_modules=TARGETS[family]
    )
    loaded = load_model(ModelConfig(name=base, device="cpu"), adapters=[adapter])
    extractor = Extractor(loaded, FeaturesConfig(output=kind, linearisation="trained"), 0, label_ids)  # type: ignore[arg-type]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    return extractor, model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rank", "alpha", "use_rslora"), [(1, 2.0, False), (4, 8.0, True), (16, 16.0, False)])
def test_trained_features_equal_autograd(
    tmp_path: Path, family: str, rank: int, alpha: float, use_rslora: bool
) -> None:
    extractor, model = trained_pair(tmp_path, family, rank, alpha, use_rslora, "loss")
    batch = examples(7)
    expected = np.stack([oracle(model, "AB", example, "loss", ())[0].numpy() for example in batch])
    for side in ("right", "left"):
        assert_close(features(extractor, [batch], side)[:, 0], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_inits", [1, 3])
def test_init_features_equal_autograd(tmp_path: Path, family: str, num_inits: int) -> None:
    base = tiny_model_dir(tmp_path, family)
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=tuple(TARGETS[family]))
    loaded = load_model(ModelConfig(name=base, device="cpu", lora=lora), adapters=[])
    extractor = Extractor(loaded, FeaturesConfig(num_inits=num_inits), 5)
    batch = examples(6)
    found = features(extractor, [batch])[:, 0]
    plain = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2"),
    ).eval()
    layers = [m for m in plain.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    kernel = np.zeros((6, 6))
    for init in range(num_inits):
        for layer, module in zip(loaded.layers, layers, strict=True):
            module.lora_A["default"].weight.data = lora_a_init(5, layer, 4, init)
        rows = np.stack([oracle(plain, "B", example, "loss", ())[0].numpy() for example in batch])
        if num_inits == 1:
            assert_close(found, rows)
        a_rows = oracle(plain, "A", batch[0], "loss", ())[0]
        assert not a_rows.any(), "every gradient of A vanishes where B = 0"
        kernel += rows @ rows.T / num_inits
    assert_close(found @ found.T, kernel)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("linearisation", ["init", "trained"])
@pytest.mark.parametrize("certainty", [0.0, 16.0])
def test_low_precision_stays_close_also_where_the_answer_is_nearly_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, linearisation: str, certainty: float
) -> None:
    """A large logit of the target makes losses and their gradients smaller than float16 holds without a scale."""
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base)

    def surer(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, example, target = completion_logits(model, batch)
        return logits + certainty * torch.nn.functional.one_hot(target, logits.shape[1]), example, target

    monkeypatch.setattr("llmattrib.features.extract.completion_logits", surer)
    rows = []
    for precision in ("float32", dtype):
        loaded = load_model(ModelConfig(name=base, device="cpu", dtype=precision), adapters=[adapter])  # type: ignore[arg-type]
        extractor = Extractor(loaded, FeaturesConfig(linearisation=linearisation), 0)  # type: ignore[arg-type]
        rows.append(features(extractor, [examples(5)])[:, 0])
    assert_close(rows[1], rows[0], {"bfloat16": 0.1, "float16": 0.02}[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_an_adapter_is_off(tmp_path: Path, dropout: float) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base)
    settings = Path(adapter) / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_dropout": dropout}))
    loaded = load_model(ModelConfig(name=base, device="cpu"), adapters=[adapter])
    extractor = Extractor(loaded, FeaturesConfig(linearisation="trained"), 0)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    expected = np.stack([oracle(model.eval(), "AB", example, "loss", ())[0].numpy() for example in examples(3)])
    assert_close(features(extractor, [examples(3)])[:, 0], expected)


@pytest.mark.parametrize("kind", ["loss", "log_odds", "pntk"])
def test_generation_outputs_equal_autograd(tmp_path: Path, kind: str) -> None:
    extractor, model = trained_pair(tmp_path, "llama", 4, 8.0, False, kind)
    batch = examples(5)
    expected = np.stack([torch.stack(oracle(model, "AB", example, kind, ())).numpy() for example in batch])
    assert_close(features(extractor, [batch]), expected)


@pytest.mark.parametrize("kind", ["loss", "log_odds", "margin", "logits", "pntk"])
def test_label_word_outputs_equal_autograd(tmp_path: Path, kind: str) -> None:
    extractor, model = trained_pair(tmp_path, "qwen2", 4, 8.0, False, kind, LABEL_IDS)
    batch = examples(5, labels=True)
    expected = np.stack([torch.stack(oracle(model, "AB", example, kind, LABEL_IDS)).numpy() for example in batch])
    assert extractor.num_outputs == expected.shape[1] == (3 if kind == "logits" else 1)
    assert_close(features(extractor, [batch]), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_features_do_not_depend_on_batches_order_or_padding(tmp_path: Path, batch_size: int) -> None:
    extractor, _ = trained_pair(tmp_path, "llama", 2, 4.0, False, "loss")
    everything = examples(32, seed=3)
    alone = features(extractor, [[example] for example in everything])
    order = np.random.default_rng(0).permutation(32)
    batches = [[everything[k] for k in order[start : start + batch_size]] for start in range(0, 32, batch_size)]
    for side in ("right", "left"):
        found = features(extractor, batches, side)
        assert_close(found[np.argsort(order), 0], alone[:, 0])


def test_several_adapters_concatenate_and_average_their_kernels(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    folders = [tiny_adapter_dir(tmp_path, base, seed=seed, name=f"adapter-{seed}") for seed in (0, 1)]
    config, batch = FeaturesConfig(linearisation="trained"), examples(5)
    single = [
        features(Extractor(load_model(ModelConfig(name=base, device="cpu"), adapters=[folder]), config, 0), [batch])
        for folder in folders
    ]
    both = Extractor(load_model(ModelConfig(name=base, device="cpu"), adapters=folders), config, 0)
    found = features(both, [batch])[:, 0]
    assert_close(found, np.concatenate([rows[:, 0] for rows in single], axis=1) / math.sqrt(2))
    assert len({(block.name, block.role) for block in both.blocks}) == len(both.blocks)


def test_columns_hold_exact_norm_loss_and_log_odds(tmp_path: Path) -> None:
    extractor, model = trained_pair(tmp_path, "llama", 4, 8.0, False, "loss")
    batch = examples(4)
    made = extractor.extract(batch, Sketch(extractor.plan("oporp", 0, 64, [batch])))
    rows = torch.stack([oracle(model, "AB", example, "loss", ())[0] for example in batch])
    np.testing.assert_allclose(made.columns["norm"], rows.norm(dim=1), rtol=1e-5)
    for row, example in enumerate(batch):
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        loss, odds = (float(oracle_outputs(kind, logits, example, ())[0].detach()) for kind in ("loss", "log_odds"))
        assert made.columns["loss"][row] == pytest.approx(loss, rel=1e-5)
        assert made.columns["log_odds"][row] == pytest.approx(odds, rel=1e-5)
    assert made.columns["label"].tolist() == [-1.0] * 4


def test_sketched_features_are_the_sketch_of_exact_features(tmp_path: Path) -> None:
    extractor, _ = trained_pair(tmp_path, "gpt2", 4, 8.0, False, "loss")
    batch = examples(4)
    plan = extractor.plan("oporp", 1, 64, [batch])
    exact = torch.from_numpy(features(extractor, [batch])[:, 0])
    expected, start, sketch = torch.zeros(4, plan.dim), 0, Sketch(plan)
    for number, block in enumerate(plan.blocks):
        sketch.add(expected, number, exact[:, start : start + block.size])
        start += block.size
    assert_close(extractor.extract(batch, Sketch(plan)).phi[:, 0], expected.numpy())


def test_calibration_gives_width_in_proportion_to_squared_norm(tmp_path: Path) -> None:
    extractor, _ = trained_pair(tmp_path, "llama", 4, 8.0, False, "loss")
    batch = examples(8)
    plan = extractor.plan("oporp", 0, 500, [batch[:4], batch[4:]])
    exact = features(extractor, [batch])[:, 0].astype(np.float64)
    ends = np.cumsum([block.size for block in plan.blocks])
    norms = np.array([np.square(part).sum() for part in np.split(exact, ends[:-1], axis=1)])
    assert plan.dim == 500
    free = [k for k, (width, block) in enumerate(zip(plan.widths, plan.blocks, strict=True)) if 1 < width < block.size]
    assert len(free) > 5
    ratio = np.array(plan.widths)[free] / norms[free]
    assert np.abs(ratio / np.median(ratio) - 1).max() < 0.6  # rounding to whole widths
    assert np.corrcoef(np.array(plan.widths)[free], norms[free])[0, 1] > 0.999


def test_no_base_weight_or_embedding_gradient_is_formed(tmp_path: Path) -> None:
    extractor, _ = trained_pair(tmp_path, "llama", 4, 8.0, False, "loss")
    features(extractor, [examples(3)])
    assert all(not p.requires_grad and p.grad is None for p in extractor.loaded.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_for_a_batch_that_stops_at_the_lowest_lora_layer(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)
    loaded = load_model(ModelConfig(name=base, device="cpu", lora=LoraConfig(layers="1-1")), adapters=[])
    extractor = Extractor(loaded, FeaturesConfig(num_inits=3), 0)
    model = loaded.model.get_base_model()
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, (output if name else output.logits).requires_grad))

    for name, module in (("embedding", model.get_input_embeddings()), ("block 0", blocks[0]), ("block 1", blocks[1])):
        module.register_forward_hook(note(name))
    model.register_forward_hook(note(""))
    features(extractor, [examples(5)])
    assert seen == [("embedding", False), ("block 0", False), ("block 1", True), ("", True)]


def test_non_finite_rows_are_named(tmp_path: Path) -> None:
    extractor, _ = trained_pair(tmp_path, "llama", 4, 8.0, False, "loss")
    batch = examples(3)
    with torch.no_grad():
        extractor.loaded.model.get_input_embeddings().weight[batch[1].input_ids[0]] = float("nan")
    made = extractor.extract(batch, Sketch(extractor.plan("none", 0, 1, ())))
    assert 1 in made.nonfinite_rows()
    clean = [row for row in range(3) if batch[1].input_ids[0] not in batch[row].input_ids]
    assert not set(clean) & set(made.nonfinite_rows())


def test_a_layer_that_mixes_examples_is_an_error() -> None:
    layer = torch.nn.Linear(4, 3)
    tap = Tap("experts.0", layer, torch.zeros(2, 4), 1.0, 0)
    with capture([tap], lambda block, gradient: None), pytest.raises(FeatureError, match=r"experts\.0 receives"):
        layer(torch.zeros(5, 4))
