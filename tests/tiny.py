"""Small real things that tests are built on: a tokenizer, models, adapters, data and a config. Plain functions."""

import json
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from llmattrib.config import RunConfig, validate_config

FAMILIES = ("llama", "gpt2", "qwen2", "qwen3")
CONTEXT = 128
VOCAB_SIZE = 336  # a few more rows than tokens, as real models have
LABEL_WORDS = ("yes", "no")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = "yes no ham spam user assistant system red green blue tree stone river what is the colour of a"


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=356,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for word in TEXT.split() for text in (word, " " + word)] * 4, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(chat_template: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 340 tokens; `yes`, `no`, `ham`, `spam` are one token each.

    `<|im_end|>` is EOS, `<pad>` the padding. With `bos`, texts get a leading `<|im_start|>` as Llama's do.
    """
    backend = Tokenizer.from_str(_tokenizer_json())
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token=AddedToken("<|im_start|>", special=True) if bos else None,
        model_max_length=CONTEXT,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    if chat_template:
        tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config_of(family: str, vocab_size: int, num_layers: int = 2) -> PreTrainedConfig:
    """The transformers config of a tiny model: width 64, 4 heads (2 of keys and values), context 128."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=64,
            n_layer=num_layers,
            n_head=4,
            n_positions=CONTEXT,
            initializer_range=0.15,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ends,
        )
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "tie_word_embeddings": family != "llama",
    }
    if family == "llama":
        return LlamaConfig(**shape, **ends)
    if family == "qwen2":
        return Qwen2Config(**shape, **ends)
    if family == "qwen3":
        return Qwen3Config(**shape, head_dim=16, **ends)
    raise ValueError(family)


def tiny_model(family: str = "llama", vocab_size: int | None = None, num_layers: int = 2, seed: int = 0) -> Any:
    """A random model, in eval mode; biases and norms are random too. Leaves torch's random state as it was."""
    config = tiny_config_of(family, vocab_size or VOCAB_SIZE, num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def tiny_model_dir(
    tmp_path: Path, family: str = "llama", *, chat_template: bool = True, num_layers: int = 2, seed: int = 0
) -> str:
    """Save a tiny model and its tokenizer as a safetensors folder; return the folder."""
    path = tmp_path / f"{family}-{seed}"
    tiny_model(family, num_layers=num_layers, seed=seed).save_pretrained(path)
    tiny_tokenizer(chat_template).save_pretrained(path)
    return str(path)


def tiny_adapter_dir(
    tmp_path: Path,
    model_dir: str,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    use_rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
    name: str = "adapter",
    **lora: Any,
) -> str:
    """Save a LoRA adapter of the model in `model_dir` whose B is random, not zero; return the folder.

    `lora` goes to `peft.LoraConfig` (`rank_pattern`, `use_dora`, `bias`, ...).
    """
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        use_rslora=use_rslora,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=base.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
        **lora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT 0.21 asks for the old name
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 / math.sqrt(parameter.shape[1]))
    path = tmp_path / name
    model.save_pretrained(path, save_embedding_layers=False)
    return str(path)


def tiny_rows(num_rows: int = 12, labels: bool = False) -> list[dict[str, str]]:
    """Rows of prompt, completion and id, of several lengths; completions are `yes` or `no` with `labels`."""
    colours, things = ("red", "green", "blue"), ("tree", "stone", "river", "house")
    rows = []
    for i in range(num_rows):
        prompt = "what is the colour of a " + " ".join(things[(i + k) % 4] for k in range(1 + i % 3)) + f" {i}?"
        completion = LABEL_WORDS[i % 2] if labels else " ".join(colours[(i + k) % 3] for k in range(1 + i % 4))
        rows.append({"id": f"row-{i}", "prompt": prompt, "completion": completion})
    return rows


def tiny_jsonl(tmp_path: Path, num_rows: int = 12, *, labels: bool = False, name: str = "train.jsonl") -> str:
    """Save `tiny_rows` as JSON Lines; return the file."""
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(num_rows, labels)), encoding="utf-8")
    return str(path)


def tiny_run(
    tmp_path: Path, family: str = "llama", *, labels: bool = False, num_rows: int = 12, **sections: dict[str, Any]
) -> RunConfig:
    """A whole run config over a tiny model and tiny data; `sections` are merged over the defaults.

    Example: `tiny_run(tmp_path, features={"output": "log_odds"})`.
    """
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": tiny_model_dir(tmp_path, family), "device": "cpu", "lora": {"rank": 4, "alpha": 8.0}},
        "data": {"train": tiny_jsonl(tmp_path, num_rows, labels=labels), "id": "id"},
        "train": {"epochs": 2, "learning_rate": 5e-3, "batch_size": 4, "dtype": "float32"},
        "features": {"sketch": {"dim": 256, "calibration_examples": 4}, "tokens_per_batch": 256, "shard_size": 4},
    }
    if labels:
        tree["data"]["label_words"] = LABEL_WORDS
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return validate_config(tree)
