"""Resolving base models, conversion of GGUF files, fingerprints of weights and tokenizers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmattrib.errors import DiskSpaceError, ModelNotFoundError, StoreError, TokenizerMismatchError
from llmattrib.weight_files import read_json, weight_files, weights_fingerprint
from llmattrib.weights import (
    cache_dir,
    check_tokenizer,
    context_length,
    load_architecture,
    load_tokenizer,
    load_tokenizer_alone,
    new_folder,
    quiet_loading,
    resolve_base,
    tokenizer_fingerprint,
)
from tests.tiny import CONTEXT, tiny_model, tiny_model_dir, tiny_tokenizer


def write_gguf(path: Path) -> torch.nn.Module:
    """Write a tiny Llama as a float32 GGUF file; return it. Heads are permuted as llama.cpp's converter does."""
    model = tiny_model("llama")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = tiny_tokenizer()
    tokens = [
        tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else f"<unused{i}>" for i in range(config.vocab_size)
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        assert new is not None, name
        writer.add_tensor(new, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMATTRIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_base(str(tmp_path / "tiny.gguf"))
    assert folder.parent == cache / "gguf"
    assert [path.name for path in (cache / "gguf").iterdir()] == [folder.name]
    with quiet_loading():
        converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not hasattr(converted.config, "quantization_config")
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer("what is a tree")["input_ids"] == tiny_tokenizer()("what is a tree")["input_ids"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("converted again"))
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "copy.gguf")
    assert resolve_base(str(tmp_path / "copy.gguf")) == folder


def test_a_broken_gguf_file_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelNotFoundError, match=r"transformers cannot read .*bad\.gguf"):
        resolve_base(str(tmp_path / "bad.gguf"))
    assert list((cache / "gguf").iterdir()) == []


def test_parts_of_a_gguf_file_are_named(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    part = tmp_path / "part.gguf"
    part.write_bytes((tmp_path / "whole.gguf").read_bytes()[:1000])
    with pytest.raises(ModelNotFoundError, match=r"(?s)cannot read .*part\.gguf: unpack_from.*expected: a whole GGUF"):
        resolve_base(str(part))
    with pytest.raises(ModelNotFoundError, match=r"the architecture of .*part\.gguf cannot be read: unpack_from"):
        load_architecture(str(part))
    with pytest.raises(ModelNotFoundError, match=r"the tokenizer of .*part\.gguf cannot be read: unpack_from"):
        load_tokenizer_alone(str(part))


def test_a_gguf_file_needs_its_package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"(?s)needs the package gguf.*pip install gguf"):
        resolve_base(str(tmp_path / "a.gguf"))


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMATTRIB_CACHE", "/a/b")
    assert cache_dir() == Path("/a/b")
    monkeypatch.delenv("LLMATTRIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/llmattrib")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llmattrib"


def test_files_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    tiny_model_dir(package)
    (tmp_path / "secret").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_base("package:carrier/llama-0") == package / "llama-0"
    with pytest.raises(ModelNotFoundError, match="package 'carrier' holds no 'other'"):
        resolve_base("package:carrier/other")
    with pytest.raises(ModelNotFoundError, match=r"package 'carrier' holds no '\.\./secret'"):
        resolve_base("package:carrier/../secret")
    for name in ("package:absent/model", "package:carrier", "package:not a name/x", "package:json.decoder/x"):
        with pytest.raises(ModelNotFoundError, match="no package"):
            resolve_base(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder"),
        ("/nowhere/at/all", "there is no folder"),
        ("nowhere.gguf", "there is no file"),
        (
            "nobody/nothing-at-all",
            r"(?s)'nobody/nothing-at-all' is no folder or file here, and the hub does not give it",
        ),
        ("not a/hub/id", "is no folder or file here"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_base(name)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"config\.json is not JSON"):
        weights_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match=r"(?s)has no safetensors weights.*pickled weights are not read"):
        resolve_base(str(tmp_path))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 of 2 weight files, the first model-2\.safetensors"):
        resolve_base(str(tmp_path))
    (tmp_path / "model-2.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def test_an_index_without_files(tmp_path: Path) -> None:
    for text in ("{}", '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelNotFoundError, match=r"(?s)index\.json names no files.*download the model again"):
            weight_files(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is no whole safetensors file: it has 0 bytes"),
        (lambda data: data[:100], "is no whole safetensors file: it has 100 bytes"),
        (lambda data: data[:-1], r"it holds ([\d,]+) bytes by its header and has [\d,]+"),
        (lambda data: b"\x02" + bytes(7) + b"[]", "it has 10 bytes"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"(?s)model\.safetensors is a pointer of git-lfs.*to fix: run `git lfs pull`",
        ),
    ],
)
def test_weights_that_are_not_whole(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    folder = Path(tiny_model_dir(tmp_path))
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ModelNotFoundError, match=message):
        weights_fingerprint(folder)


def test_weights_fingerprint_sees_weights_and_config(tmp_path: Path) -> None:
    folder = Path(tiny_model_dir(tmp_path))
    before = weights_fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere", "transformers_version": "9"}))
    assert weights_fingerprint(copy) == before
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_fingerprint(copy) != before
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        changed = {key: value + (0.5 if key == name else 0.0) for key, value in weights.items()}
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        assert weights_fingerprint(copy) != before, name


def test_tokenizer_fingerprint(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer())
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer)["tokenizer"] == before["tokenizer"]
    assert tokenizer_fingerprint(tokenizer)["chat_template"] != before["chat_template"]
    assert tokenizer_fingerprint(tiny_tokenizer(chat_template=False))["chat_template"] == "none"
    assert tokenizer_fingerprint(tiny_tokenizer(bos=True))["tokenizer"] != before["tokenizer"]


def test_loading_tokenizers(tmp_path: Path) -> None:
    base = Path(tiny_model_dir(tmp_path))
    own, same, other = tmp_path / "own", tmp_path / "same", tmp_path / "other"
    tiny_tokenizer(chat_template=False).save_pretrained(own)
    tiny_tokenizer(chat_template=False).save_pretrained(same)
    tiny_tokenizer().save_pretrained(other)
    (tmp_path / "bare").mkdir()
    assert load_tokenizer(base).chat_template is not None
    assert load_tokenizer(base, [tmp_path / "bare"]).chat_template is not None
    assert load_tokenizer(base, [tmp_path / "bare", own, same]).chat_template is None
    with pytest.raises(TokenizerMismatchError, match="bring different tokenizers"):
        load_tokenizer(base, [own, other])
    (other / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    for broken in (other, tmp_path / "bare"):
        with pytest.raises(ModelNotFoundError, match="has no usable tokenizer"):
            load_tokenizer(broken)


def test_tokens_beyond_the_embedding() -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(TokenizerMismatchError, match=rf"(?s)ids up to {len(tokenizer) - 1}.*ids below 300"):
        check_tokenizer(tokenizer, 300)


def test_context_length(tmp_path: Path) -> None:
    assert context_length(Path(tiny_model_dir(tmp_path, "llama")), tiny_tokenizer()) == CONTEXT
    assert context_length(Path(tiny_model_dir(tmp_path, "gpt2")), tiny_tokenizer()) == CONTEXT
    bloom = tmp_path / "bloom"  # attention biases instead of positions: no limit of its own
    bloom.mkdir()
    (bloom / "config.json").write_text('{"model_type": "bloom"}')
    assert context_length(bloom, tiny_tokenizer()) == tiny_tokenizer().model_max_length


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target) as folder:
        (folder / "file").write_text("1")
        assert not target.exists()
    assert (target / "file").read_text() == "1"
    with new_folder(target) as folder:  # another process was first: its folder stays
        (folder / "file").write_text("2")
    assert (target / "file").read_text() == "1"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "deep" / "never"):
        raise ZeroDivisionError
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_copy_that_would_not_fit_or_may_not_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"(?s)GB are free.*LLMATTRIB_CACHE"):
        resolve_base(str(tmp_path / "tiny.gguf"))
    assert list((cache / "gguf").iterdir()) == []
    monkeypatch.setenv("LLMATTRIB_CACHE", str(tmp_path / "tiny.gguf"))
    with pytest.raises(StoreError, match=r"(?s)could not be read or written.*check the path"):
        resolve_base(str(tmp_path / "tiny.gguf"))


def test_read_json(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no .*a\.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="is not JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ModelNotFoundError, match="holds a list"):
        read_json(tmp_path / "a.json")
