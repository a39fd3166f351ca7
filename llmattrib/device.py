"""Where a model's weights are held, and in how many bits: the device a config names, quantisation by bitsandbytes.

Quantised weights are for a GPU; the embeddings and what is no linear layer keep `model.dtype`, and so do products. In 8
bits bitsandbytes looks for outliers in a whole batch, so an example depends a little on the others of its batch.
"""

import importlib.util
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from llmattrib.errors import ConfigError
from llmattrib.sections import ModelConfig

_DEVICES = "auto, cpu, cuda or cuda:N"


def resolve_device(name: str) -> torch.device:
    """Return the device a config names; `auto` is the current GPU, or the CPU without one, and `cuda` the current GPU.

    Raises:
        ConfigError: there is no such device, or it is the GPU of another process of the job.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name if name != "auto" else "cuda" if num_gpus else "cpu")
    except RuntimeError as error:
        raise ConfigError(f"model.device is {name!r}", expected=_DEVICES) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"model.device is {name!r}", expected=_DEVICES)
    if not num_gpus:
        raise ConfigError(f"model.device is {name!r} and there is no GPU", fix="set model.device to cpu or auto")
    mine = torch.cuda.current_device()
    if device.index is not None and device.index >= num_gpus:
        raise ConfigError(f"model.device is {name!r}", expected=f"a number below {num_gpus}, the GPUs that are here")
    if device.index not in (None, mine) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"model.device is {name!r} in a process that was given the GPU {mine}",
            expected="each process of a job on a GPU of its own",
            fix="set model.device=auto",
        )
    return torch.device("cuda", mine if device.index is None else device.index)


def fix_order(device: torch.device, is_fixed: bool) -> None:
    """Let PyTorch take, on a GPU, only what gives the same bytes each time, or whatever is quickest, from now on.

    The backward pass of fused attention, among others, otherwise adds in the order in which threads come to an end.

    Args:
        device: nothing is changed for another than a GPU.
        is_fixed: whether the order is.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch asks for it; cuBLAS reads it once
        torch.use_deterministic_algorithms(is_fixed)
        # else every new tensor is written twice; nothing reads one before it is written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def quantisation(config: ModelConfig, dtype: str, device: torch.device, *, is_shared: bool = False) -> dict[str, Any]:
    """Return what `from_pretrained` needs besides to hold linear layers in few bits; nothing without `quantization`.

    Args:
        config: the model's section.
        dtype: what products are computed in.
        device: of the weights.
        is_shared: whether ranks share the weights (ZeRO-3, FSDP2).

    Raises:
        ConfigError: there is no GPU or no bitsandbytes, or ranks share the weights.
    """
    if config.quantization is None:
        return {}
    setting = f"model.quantization is {config.quantization}"
    if is_shared:
        found = f"{setting} and the launcher lets ranks share the weights"
        raise ConfigError(found, expected="one of the two", fix="set model.quantization=null")
    if device.type != "cuda":
        raise ConfigError(f"{setting} on the device {device}", expected="a GPU", fix="set model.quantization=null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{setting} and bitsandbytes is not installed", fix="pip install bitsandbytes")
    if config.quantization == "8bit":
        bits = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    else:
        bits = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return {"quantization_config": bits, "device_map": {"": device}}
