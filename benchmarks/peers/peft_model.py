"""The model of a case as peers that know nothing of adapters take it: a plain module, its A and B linear layers."""

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.lora_case import Case, padded
from llmattrib.encoding import Encoded

Batch = dict[str, torch.Tensor]
"""`input_ids`, `labels` (-100 where nothing is to be predicted) and, where wanted, `attention_mask`."""


def load_peft(case: Case) -> PeftModel:
    """Load base model and adapter in float32; A and B can be trained, nothing else."""
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, case.adapter, is_trainable=True).eval()


def adapter_layers(model: PeftModel) -> list[str]:
    """Return the names of the linear layers that A and B are."""
    return [
        name
        for name, module in model.named_modules()
        if ("lora_A" in name or "lora_B" in name) and isinstance(module, torch.nn.Linear)
    ]


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed loss of completion tokens; logits are computed at all positions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def collate(examples: list[Encoded]) -> Batch:
    """Pad examples."""
    return dict(zip(("input_ids", "labels", "attention_mask"), padded(examples), strict=True))


def loader(case: Case) -> DataLoader:
    """Return the batches of the case, each a piece of data of its own, as dattri counts batches of one size."""
    return DataLoader(case.batches, batch_size=1, collate_fn=lambda batches: collate(*batches))
