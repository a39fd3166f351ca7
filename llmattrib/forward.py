"""The forward pass that training and features share: logits only where something reads them.

At a vocabulary of 50,000 to 150,000 the output layer is a large part of a small model's cost, and completions are a
small part of the tokens. A forward pre-hook on the output embedding keeps the wanted positions as one [1, m, d]
row, which any Hugging Face causal LM passes through. When the output embedding itself is a LoRA target its hooks
must see whole sequences, so all logits are computed and then selected.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from llmattrib.encoding import Batch
from llmattrib.model import LoadedModel

FLOAT16_LOSS_SCALE = 1024.0


def loss_scale(loaded: LoadedModel) -> float:
    """Return what a scalar is multiplied by before its backward pass, and its gradients are divided by after it.

    Gradients of examples that a model is sure of are below what float16 can hold; float32 and bfloat16 need no scale.
    A power of two, so it costs no digits.
    """
    return FLOAT16_LOSS_SCALE if loaded.fingerprint["dtype"] == "float16" else 1.0


def position_logits(model: nn.Module, batch: Batch, positions: Bool[Tensor, "b t"]) -> Float[Tensor, "m v"]:
    """Run the model and return its next-token logits at some positions.

    Args:
        model: a causal LM, bare or with LoRA layers.
        batch: padded examples on the model's device. Position ids are passed for left padding only, where they are
            needed; models that do not take them read the attention mask.
        positions: the m positions wanted, true where wanted.

    Returns:
        Logits, float32 (float64 of a model in float64), in row-major order of `positions`, attached to the graph.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.side == "left" and "position_ids" in _forward_parameters(model):
        inputs["position_ids"] = batch.position_ids
    head = _selectable_head(model)
    if head is None:
        return _wide(model(**inputs).logits[positions])
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][positions].unsqueeze(0), *args[1:]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    assert logits.shape[:2] == (1, int(positions.sum())), f"the output layer gave {tuple(logits.shape)}"
    return _wide(logits[0])


def completion_logits(
    model: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "m v"], Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Run the model and return the logits that predict completion tokens.

    Args:
        model: a causal LM, bare or with LoRA layers.
        batch: padded examples on the model's device.

    Returns:
        For the m completion tokens of the batch, example by example in order: logits as of `position_logits`;
        the example's row in the batch; the token to predict.
    """
    predicted = batch.completion_mask.clone()
    predicted[:, 0] = False  # nothing predicts the first token; a completion never starts there
    positions = torch.zeros_like(predicted)
    positions[:, :-1] = predicted[:, 1:]
    return position_logits(model, batch, positions), predicted.nonzero()[:, 0], batch.input_ids[predicted]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(_base(model).forward).parameters)


def _selectable_head(model: nn.Module) -> nn.Module | None:
    """Return the output embedding, or None when there is none or LoRA wraps it."""
    head: nn.Module | None = _base(model).get_output_embeddings()
    return None if head is None or hasattr(head, "lora_A") else head


def _base(model: Any) -> Any:
    """Return the transformers model inside a PeftModel, whose own forward takes any argument."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
