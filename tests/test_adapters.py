"""Checks of adapter folders: what is refused, and with which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmattrib.adapters import ADAPTER_WEIGHTS, RECORD, check_adapter, check_shapes
from llmattrib.errors import AdapterMismatchError, ModelNotFoundError, UnsupportedAdapterError
from llmattrib.model import load_model
from llmattrib.sections import ModelConfig
from llmattrib.weight_files import weights_fingerprint
from tests.tiny import tiny_adapter_dir, tiny_model, tiny_model_dir


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("adapters")
    base = tiny_model_dir(path)
    return base, tiny_adapter_dir(path, base)


def edited(tmp_path: Path, adapter: str, **changes: Any) -> Path:
    """Copy an adapter and change keys of its config."""
    copy = Path(shutil.copytree(adapter, tmp_path / "edited"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "is a PROMPT_TUNING adapter"),
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "lora_only"}, "uses bias=lora_only"),
        ({"bias": "all"}, "uses bias=all"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights=pissa"),
        ({"target_parameters": ["experts"]}, "uses target_parameters"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"use_some_new_variant": True}, "uses use_some_new_variant"),
        ({"some_new_config": {"a": 1}}, "uses some_new_config"),
    ],
)
def test_what_is_not_plain_lora(
    tmp_path: Path, folders: tuple[str, str], changes: dict[str, Any], message: str
) -> None:
    base, adapter = folders
    path = edited(tmp_path, adapter, **changes)
    with pytest.raises(UnsupportedAdapterError, match=message):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(path)])


def test_plain_variants_pass(tmp_path: Path, folders: tuple[str, str]) -> None:
    base, adapter = folders
    path = edited(tmp_path, adapter, init_lora_weights="gaussian", use_rslora=True, loftq_config={"loftq_bits": 4})
    check_adapter(path, base, "print")


def test_missing_files(tmp_path: Path, folders: tuple[str, str]) -> None:
    base, adapter = folders
    with pytest.raises(ModelNotFoundError, match=r"there is no .*nowhere/adapter_config\.json"):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(tmp_path / "nowhere")])
    path = edited(tmp_path, adapter)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(
        ModelNotFoundError, match=r"(?s)has no adapter_model\.safetensors.*pickled adapters are not read"
    ):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(path)])


def test_folders_that_peft_cannot_load(tmp_path: Path, folders: tuple[str, str]) -> None:
    base, adapter = folders

    def load(path: Path) -> None:
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(path)])

    weights = Path(adapter, ADAPTER_WEIGHTS)
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json cannot be read: Not a directory"):
        load(weights)
    path = edited(tmp_path, adapter)
    (path / ADAPTER_WEIGHTS).write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelNotFoundError, match=r"is no whole safetensors file: it holds [\d,]+ bytes by its header"):
        load(path)
    with pytest.raises(AdapterMismatchError, match=r"PEFT cannot put .*: Error.* size mismatch for .*lora_A"):
        load(edited(tmp_path / "rank", adapter, r=3))
    with pytest.raises(AdapterMismatchError, match=r"PEFT cannot put .*: unterminated character set"):
        load(edited(tmp_path / "regex", adapter, target_modules="[a"))
    path, flat = edited(tmp_path / "flat", adapter), load_file(weights)
    save_file({key: tensor.ravel() for key, tensor in flat.items()}, path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterMismatchError, match=r"of shape \(\d+,\), and the base model has a layer of"):
        load(path)


def test_an_adapter_of_another_base_by_name(tmp_path: Path, folders: tuple[str, str]) -> None:
    path = edited(tmp_path, folders[1], base_model_name_or_path="meta-llama/Some-Other-8B")
    with pytest.raises(
        AdapterMismatchError, match=r"(?s)made for meta-llama/Some-Other-8B.*correct base_model_name_or_path"
    ):
        check_adapter(path, folders[0], "print")
    check_adapter(path, "/models/some-other-8b/", "print")  # the same model, moved
    path = edited(tmp_path / "b", folders[1], base_model_name_or_path=None)
    check_adapter(path, "anything", "print")


def test_an_adapter_of_another_base_by_weights(tmp_path: Path, folders: tuple[str, str]) -> None:
    base, adapter = folders
    path = edited(tmp_path, adapter, base_model_name_or_path="any/name")
    own = weights_fingerprint(Path(base))
    (path / RECORD).write_text(json.dumps({"fingerprint": {"base_model": own}}))
    check_adapter(path, base, own)
    with pytest.raises(AdapterMismatchError, match=f"(?s)made for weights {own}.*weights another"):
        check_adapter(path, base, "another")


def test_an_adapter_of_other_shapes(tmp_path: Path, folders: tuple[str, str]) -> None:
    adapter = Path(folders[1])
    with pytest.raises(AdapterMismatchError, match=r"model\.layers\.0.*and the base model has no such linear layer"):
        check_shapes([adapter], tiny_model("gpt2"))
    shallow = tiny_model("llama", num_layers=1)
    with pytest.raises(AdapterMismatchError, match=r"model\.layers\.1.*no such linear layer"):
        check_shapes([adapter], shallow)
    wide = tiny_model("llama")
    projection = wide.model.layers[0].mlp.up_proj
    projection.out_features += 1
    with pytest.raises(
        AdapterMismatchError, match=r"up_proj\.lora_B.* of shape \(128, 4\), .*a layer of 64 inputs and 129 outputs"
    ):
        check_shapes([adapter], wide)
    projection.out_features, projection.in_features = 128, 63
    with pytest.raises(
        AdapterMismatchError, match=r"up_proj\.lora_A.* of shape \(4, 64\), .*a layer of 63 inputs and 128 outputs"
    ):
        check_shapes([adapter], wide)


def test_tensors_are_those_of_the_layers_in_the_config(tmp_path: Path, folders: tuple[str, str]) -> None:
    base, adapter = folders
    path = edited(tmp_path, adapter, target_modules=["q_proj"])
    with pytest.raises(AdapterMismatchError, match=r"holds beyond its config 24 tensors, such as .*down_proj"):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(path)])
    path = edited(tmp_path / "b", adapter)
    tensors = load_file(path / ADAPTER_WEIGHTS)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterMismatchError, match=rf"(?s)lacks 1 tensors, such as {lost}.*expected: the 28 factors"):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[str(path)])


@pytest.mark.parametrize("lora", [{"rank": 2}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 3}}])
def test_adapters_used_together_must_agree(tmp_path: Path, folders: tuple[str, str], lora: dict[str, Any]) -> None:
    base, adapter = folders
    other = tiny_adapter_dir(tmp_path, base, name="other", **lora)
    with pytest.raises(AdapterMismatchError, match="differ in layers or ranks, first at base_model"):
        load_model(ModelConfig(name=base, device="cpu"), adapters=[adapter, other])


def test_lora_on_embeddings_is_refused(tmp_path: Path, folders: tuple[str, str]) -> None:
    adapter = tiny_adapter_dir(tmp_path, folders[0], target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(
        UnsupportedAdapterError, match=r"holds base_model\.model\.model\.embed_tokens\.lora_embedding_A"
    ):
        load_model(ModelConfig(name=folders[0], device="cpu"), adapters=[adapter])
