"""Adapter folders, checked from their files alone: plain LoRA, made for this base model, fitting each other.

An adapter that `train` wrote carries the fingerprint of its base's weights and is compared by it; for others the
last part of the base's name is compared, so a model that moved between hub and disk passes. The shape of every
factor is compared with the base's layers.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmattrib.errors import AdapterMismatchError, ModelNotFoundError, UnsupportedAdapterError, memory_errors
from llmattrib.storage import exists, read_bytes
from llmattrib.weight_files import read_json, safetensors_header

ADAPTER_WEIGHTS = "adapter_model.safetensors"
RECORD = "llmattrib.json"
"""What `train` leaves beside an adapter: the fingerprint of everything it was trained with, and of its weights."""
PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
)
_PLAIN_VARIANTS = ("use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change base weights


def check_adapter(path: Path, base_name: str, base_print: str) -> None:
    """Check an adapter's folder before anything large is loaded.

    Args:
        path: the PEFT folder.
        base_name: `model.name`.
        base_print: `weights_fingerprint` of the base.

    Raises:
        ModelNotFoundError: a file is missing, or the weights are not whole.
        UnsupportedAdapterError: it is not plain LoRA.
        AdapterMismatchError: it was made for another base.
    """
    settings = read_json(path / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{path} is a {settings.get('peft_type')} adapter", expected="LORA", fix="train a LoRA adapter"
        )
    variants = {key for key in settings if key.startswith("use_") or key.endswith("_config")} - set(_PLAIN_VARIANTS)
    extras = [key for key in (*_UNSUPPORTED, *sorted(variants)) if settings.get(key)]
    if settings.get("bias", "none") != "none":
        extras.append(f"bias={settings['bias']}")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        extras.append(f"init_lora_weights={settings['init_lora_weights']}")
    if extras:
        raise UnsupportedAdapterError(
            f"{path} uses {', '.join(extras)}",
            expected="plain LoRA: A and B of linear layers over unchanged base weights",
            fix="train an adapter without it, or convert it to plain LoRA with PEFT",
        )
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelNotFoundError(
            f"{path} has no {ADAPTER_WEIGHTS}",
            expected="safetensors; pickled adapters are not read",
            fix="save it again",
        )
    safetensors_header(path / ADAPTER_WEIGHTS)
    _check_base(path, settings, base_name, base_print)


def _check_base(path: Path, settings: Mapping[str, Any], base_name: str, base_print: str) -> None:
    made_for: str | None
    if (path / RECORD).is_file():
        recorded = read_json(path / RECORD).get("fingerprint", {}).get("base_model")
        matches, made_for = recorded == base_print, f"weights {recorded}"
    else:
        made_for = settings.get("base_model_name_or_path")
        matches = not made_for or _last_part(made_for) == _last_part(base_name)
    if not matches:
        raise AdapterMismatchError(
            f"{path} was made for {made_for}",
            expected=f"an adapter of {base_name} (weights {base_print})",
            fix="set model.name to the adapter's base; if it is the same model under another name, correct "
            "base_model_name_or_path in adapter_config.json",
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def adapter_faults(folders: Sequence[str], stored: str | None) -> Iterator[tuple[str, str, bool]]:
    """Yield each adapter's folder that is not sound, what is wrong, and whether only the features are of another one.

    Args:
        folders: PEFT folders, local or fsspec URLs.
        stored: what features that were made at them keep of them, see `LoadedModel.fingerprint`; None for none.

    Raises:
        StoreAccessError: one cannot be reached.
    """
    digests = stored.split("+") if stored else [None] * len(folders)
    if len(digests) != len(folders):
        yield folders[0], f"is one of {len(folders)} adapters, and the features were made at {len(digests)}", True
        return
    for folder, digest in zip(folders, digests, strict=True):
        what, found = _fault(folder)
        if what:
            yield folder, what, False
        elif digest not in (None, found[:32]):
            yield folder, "has other weights than the features were made at", True


def _fault(folder: str) -> tuple[str, str]:
    """Return what is wrong with a folder by itself, or nothing and the digest of its weights."""
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not exists(f"{folder}/{name}"):
            return (f"has no {name}" if exists(folder) else "is missing, and queries need it"), ""
    found, record = hashlib.sha256(read_bytes(f"{folder}/{ADAPTER_WEIGHTS}")).hexdigest(), f"{folder}/{RECORD}"
    try:
        written = json.loads(read_bytes(record)).get("weights", found) if exists(record) else found
    except (ValueError, AttributeError) as error:
        return f"has a {RECORD} that cannot be read ({error})", ""
    return ("" if written == found else "has other weights than train wrote"), found


def check_shapes(paths: Sequence[Path], base: Any) -> None:
    """Check that adapters fit the base model's layers and each other.

    Raises:
        AdapterMismatchError: a layer is missing or has another width, or adapters differ in layers or ranks.
        UnsupportedAdapterError: there are tensors besides A and B of linear layers.
    """
    shapes = [_adapter_shapes(path) for path in paths]
    modules = dict(base.named_modules())
    for path, tensors in zip(paths, shapes, strict=True):
        for key, shape in tensors.items():
            _check_factor(path, key, shape, modules)
    for path, tensors in zip(paths[1:], shapes[1:], strict=True):
        if tensors != shapes[0]:
            odd = sorted(set(tensors.items()) ^ set(shapes[0].items()))[0][0]
            raise AdapterMismatchError(
                f"{path} and {paths[0]} differ in layers or ranks, first at {odd}",
                expected="the same layers and ranks in adapters that are used together",
                fix="use them in separate runs",
            )


def check_tensors(path: Path, layers: Sequence[str]) -> None:
    """Check that an adapter holds the factors of the layers that its config puts LoRA on, all and no others.

    Args:
        path: the PEFT folder.
        layers: their names, as PEFT writes them.

    Raises:
        AdapterMismatchError: some are missing, which PEFT would leave as drawn, or too many, which it would leave out.
    """
    wanted = {f"{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")}
    found = _adapter_shapes(path).keys()
    for what, odd in (("lacks", wanted - found), ("holds beyond its config", found - wanted)):
        if odd:
            raise AdapterMismatchError(
                f"{path / ADAPTER_WEIGHTS} {what} {len(odd)} tensors, such as {', '.join(sorted(odd)[:3])}",
                expected=f"the {len(wanted)} factors of the layers that adapter_config.json puts LoRA on",
                fix="save the adapter again, or correct target_modules and layers_to_transform in adapter_config.json",
            )


@contextmanager
def adapter_errors(path: Path) -> Iterator[None]:
    """Turn what PEFT says of an adapter that it cannot load into an error that names its folder.

    Raises:
        AdapterMismatchError: its tensors do not have the shapes of its config, or its config cannot be used.
        DeviceMemoryError: it does not fit on the device.
    """
    try:
        with memory_errors(str(path), expected="room for the adapter", fix="take a larger device"):
            yield
    except (ValueError, TypeError, KeyError, RuntimeError, re.error) as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise AdapterMismatchError(
            f"PEFT cannot put {path} on the base model: {said}",
            expected="tensors, and adapter_config.json, of one adapter of this model",
            fix="save the adapter again",
        ) from error


def _check_factor(path: Path, key: str, shape: tuple[int, ...], modules: Mapping[str, Any]) -> None:
    """Check the width of one factor: d_in of A, d_out of B."""
    name, _, factor = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
    if factor not in ("lora_A", "lora_B"):
        raise UnsupportedAdapterError(
            f"{path} holds {key}",
            expected="A and B of linear layers only",
            fix="train an adapter without it; a mere copy of the base's embeddings is left out by "
            "save_pretrained(..., save_embedding_layers=False)",
        )
    widths = _widths(modules.get(name))
    if widths is None or len(shape) != 2 or (widths[0] != shape[1] if factor == "lora_A" else widths[1] != shape[0]):
        found = "no such linear layer" if widths is None else f"a layer of {widths[0]} inputs and {widths[1]} outputs"
        raise AdapterMismatchError(
            f"{path} holds {key} of shape {shape}, and the base model has {found}",
            expected="an adapter of this base model",
            fix="set model.name to the adapter's base",
        )


def _adapter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(row["shape"]) for key, row in safetensors_header(path / ADAPTER_WEIGHTS)[1].items()}


def _widths(module: Any) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear layer."""
    if isinstance(module, Conv1D):
        d_in, d_out = getattr(module.weight, "ds_shape", module.weight.shape)  # as a whole, under ZeRO-3
        return int(d_in), int(d_out)
    return (int(module.in_features), int(module.out_features)) if hasattr(module, "in_features") else None


def linear_modules(base: Any) -> list[tuple[str, nn.Module]]:
    """Return the linear layers of a base model by name, but for the output embedding."""
    head = base.get_output_embeddings()
    return [(n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
