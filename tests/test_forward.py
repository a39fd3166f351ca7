"""Logits at chosen positions equal the plain forward pass of one example at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from llmattrib.encoding import Encoded, collate
from llmattrib.forward import completion_logits, position_logits
from llmattrib.model import load_model
from llmattrib.sections import ModelConfig
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_adapter_dir, tiny_model, tiny_model_dir

ITEMS = [Encoded(tuple(range(3, 3 + n)), start, -1) for n, start in ((9, 4), (5, 1), (12, 11), (5, 3))]


def one_at_a_time(model: torch.nn.Module, items: list[Encoded]) -> tuple[torch.Tensor, list[int], list[int]]:
    """Return the logits before each completion token, with row and target, by plain forward passes."""
    logits, rows, targets = [], [], []
    for row, item in enumerate(items):
        whole = model(input_ids=torch.tensor([item.input_ids])).logits[0]
        for place in range(item.completion_start, len(item)):
            logits.append(whole[place - 1])
            rows.append(row)
            targets.append(item.input_ids[place])
    return torch.stack(logits), rows, targets


def check(model: torch.nn.Module, side: Any, pad_id: int = 2) -> None:
    with torch.no_grad():
        expected, rows, targets = one_at_a_time(model, ITEMS)
        logits, example, target = completion_logits(model, collate(ITEMS, pad_id, side))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (example.tolist(), target.tolist()) == (rows, targets)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_completion_logits_of_bare_models(family: str, side: str) -> None:
    check(tiny_model(family), side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_without_position_ids(side: str) -> None:
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    check(model, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_completion_logits_of_adapters(tmp_path: Path, targets: str | list[str], side: str) -> None:
    base = tiny_model_dir(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, base, target_modules=targets)
    loaded = load_model(ModelConfig(name=base, device="cpu"), adapters=[adapter])
    check(loaded.model, side, loaded.pad_id)
    with loaded.base_only():
        check(loaded.model, side, loaded.pad_id)


def test_the_output_layer_sees_the_wanted_positions_only(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name=tiny_model_dir(tmp_path), device="cpu"))
    seen: list[tuple[int, ...]] = []
    head = loaded.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    completion_logits(loaded.model, collate(ITEMS, 0))
    assert seen == [(1, sum(len(item) - item.completion_start for item in ITEMS), 64)]


def test_the_output_layer_is_left_as_it_was(tmp_path: Path) -> None:
    model, batch = tiny_model(), collate(ITEMS, 0)
    positions = torch.zeros_like(batch.completion_mask)
    positions[0, 0] = positions[3, 4] = True
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        torch.testing.assert_close(position_logits(model, batch, positions), whole[[0, 3], [0, 4]])
        with pytest.raises(IndexError):
            position_logits(model, collate([Encoded((VOCAB_SIZE + 5, 1), 1, -1)], 0), torch.tensor([[True, False]]))
        assert not model.lm_head._forward_pre_hooks
        assert torch.equal(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, whole)


def test_gradients_flow_and_low_precision_gives_float32_logits() -> None:
    model = tiny_model().to(torch.bfloat16)
    logits, _, target = completion_logits(model, collate(ITEMS, 0))
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
