"""The one fine-tuning loop: LoRA factors in float32 over a frozen base, loss on completion tokens only.

AdamW, linear warm-up and decay, gradient clipping; batches are drawn afresh each epoch from the run's streams,
whatever their lengths. The state is saved after every epoch, so a killed run goes on from its last epoch and ends in
the same bytes as an unbroken one (on the same machine and thread count). One process trains; there is no gradient
accumulation and no checkpointing of activations. Several seeds, and earlier epochs of each, are adapters in folders of
their own (`adapter_paths`), made one seed after the other. A finished adapter carries the fingerprint of everything it
was trained with: an equal run reuses it, another one is refused.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llmattrib.adapters import ADAPTER_WEIGHTS, RECORD
from llmattrib.config import RunConfig
from llmattrib.data import Example, data_fingerprint, load_examples
from llmattrib.device import resolve_device
from llmattrib.encoding import Encoded, EncodedSet, encode_all, encoded_fingerprint
from llmattrib.errors import ConfigError, FingerprintMismatchError
from llmattrib.finetune import FineTuning
from llmattrib.model import LoadedModel, prepare_trainable, save_adapter
from llmattrib.progress import Progress, silent
from llmattrib.storage import atomic_write, check_writable, named_errors, require_space
from llmattrib.weight_files import file_digest, read_json, weights_fingerprint
from llmattrib.weights import (
    context_length,
    load_tokenizer,
    new_folder,
    resolve_base,
    tokenizer_fingerprint,
)

_OTHERS = ("num_adapters", "checkpoints")
"""Settings of `train` that no adapter depends on: they say which others there are."""
_STATE = ("factor", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainResult:
    """A trained adapter, the first of the run.

    Args:
        path: its PEFT folder.
        num_steps: optimizer steps.
        losses: mean loss of each epoch, in nats a completion token.
        num_examples: examples trained on.
        num_truncated: of these, examples whose prompt was cut.
        num_skipped: examples left out as too long.
        reused: it was there already, and all others.
        seconds: wall time of this call.
        paths: folders of all adapters of the run, this one first.
    """

    path: str
    num_steps: int
    losses: tuple[float, ...]
    num_examples: int
    num_truncated: int
    num_skipped: int
    reused: bool
    seconds: float
    paths: tuple[str, ...]


def adapter_paths(config: RunConfig) -> list[str]:
    """Return the folders of all adapters that a run trains, seed by seed, the last epoch first."""
    return [path for number in range(config.train.num_adapters) for path in _seed_paths(config, number).values()]


def _seed_paths(config: RunConfig, number: int) -> dict[int, str]:
    """Return epoch -> folder of the adapters of one seed, the last epoch first."""
    train, path = config.train, config.layout.adapter + (f"-seed{config.seed + number}" if number else "")
    epochs = sorted(
        {round(train.epochs * k / train.checkpoints) for k in range(1, train.checkpoints + 1)}, reverse=True
    )
    return {epoch: path if epoch == train.epochs else f"{path}-epoch{epoch}" for epoch in epochs}


def train_adapter(config: RunConfig, progress: Progress = silent) -> TrainResult:
    """Fine-tune the LoRA adapter of a run on its examples and save it as `run_dir/adapter`; and others, if asked for.

    Args:
        config: the run; reads `seed`, `model`, `data` and `train`.
        progress: told the sequences done and in all, over all epochs.

    Returns:
        The adapter, trained now or found from an equal run.

    Raises:
        ConfigError: the run names adapters of its own, or its run_dir is not local.
        FingerprintMismatchError: there is an adapter of another run.
        NonFiniteGradientError: a gradient is NaN or infinite.
        DeviceMemoryError: a batch does not fit on the device.
        DiskSpaceError, StoreError: the adapter cannot be written.
        DataError, ModelError: the data or the model cannot be used.
    """
    started = time.perf_counter()
    if config.model.adapters:
        raise ConfigError(
            f"model.adapters names {', '.join(config.model.adapters)}, so there is nothing to train",
            fix="go on with `llmattrib build`, or remove model.adapters",
        )
    if "://" in config.run_dir:
        raise ConfigError(
            f"run_dir is {config.run_dir}", expected="a local folder for training", fix="copy it afterwards"
        )
    encoded, fingerprint = training_inputs(config)
    ids = [example.id for example in encoded.examples]
    records: list[Mapping[str, Any]] = []
    reused = True
    for number in range(config.train.num_adapters):
        own = config.model_copy(update={"seed": config.seed + number})
        prints = {**fingerprint, "seed": own.seed}
        targets = {epoch: Path(path) for epoch, path in _seed_paths(config, number).items()}
        found = {epoch: _matching_record(path, prints) for epoch, path in targets.items() if path.is_dir()}
        missing = {epoch: path for epoch, path in targets.items() if epoch not in found}
        if missing:
            reused = False
            state = Path(f"{targets[config.train.epochs]}.state.safetensors")
            found |= _train(own, encoded.encoded, ids, prints, missing, state, _of_seed(progress, number, config))
        records.append(found[config.train.epochs])
    return TrainResult(
        path=config.layout.adapter,
        num_steps=int(records[0]["num_steps"]),
        losses=tuple(records[0]["losses"]),
        num_examples=len(encoded.encoded),
        num_truncated=encoded.num_truncated,
        num_skipped=encoded.num_skipped,
        reused=reused,
        seconds=time.perf_counter() - started,
        paths=tuple(adapter_paths(config)),
    )


def _of_seed(progress: Progress, number: int, config: RunConfig) -> Progress:
    """Tell of one seed's sequences as a part of those of all."""
    return lambda done, total: progress(number * total + done, config.train.num_adapters * total)


def encode_without_weights(config: RunConfig, examples: Sequence[Example]) -> EncodedSet:
    """Tokenise examples as training and `build` do; only the tokenizer and the config of the model are read.

    Raises:
        DataError, ModelError: the examples or the model cannot be used.
    """
    return _encode(config, *_tokenizer(config), examples)


def _tokenizer(config: RunConfig) -> tuple[Path, Any]:
    """Return the base model's folder and the run's tokenizer."""
    model = config.model
    folder = resolve_base(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return folder, load_tokenizer(folder, [*map(Path, model.adapters)], trust_remote_code=model.trust_remote_code)


def _encode(config: RunConfig, folder: Path, tokenizer: Any, examples: Sequence[Example]) -> EncodedSet:
    context = context_length(folder, tokenizer, trust_remote_code=config.model.trust_remote_code)
    return encode_all(examples, tokenizer, config.data, context)


def training_inputs(config: RunConfig, examples: EncodedSet | None = None) -> tuple[EncodedSet, dict[str, Any]]:
    """Tokenise the examples and fingerprint all that decides the adapter, without loading weights.

    Args:
        config: the run.
        examples: of `data.train`, where they are tokenised already.

    Raises:
        DataError, ModelError: the examples or the model cannot be used.
    """
    model, (folder, tokenizer) = config.model, _tokenizer(config)
    encoded = _encode(config, folder, tokenizer, load_examples(config.data)) if examples is None else examples
    return encoded, {
        "base_model": weights_fingerprint(folder),
        **tokenizer_fingerprint(tokenizer),
        "data": data_fingerprint(encoded.examples),
        "tokens": encoded_fingerprint(encoded.encoded),
        "seed": config.seed,
        "attn_implementation": model.attn_implementation,
        **{f"lora.{key}": value for key, value in model.lora.model_dump(mode="json").items()},
        **{f"train.{key}": value for key, value in config.train.model_dump(mode="json").items() if key not in _OTHERS},
    }


def _matching_record(folder: Path, fingerprint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record beside an adapter, or raise FingerprintMismatchError when it is of another run."""
    if not (folder / RECORD).is_file():
        _compare(folder, {RECORD: "none: not trained here"}, {RECORD: "a record of this run"})
    record = read_json(folder / RECORD)
    _compare(folder, record.get("fingerprint", {}), fingerprint)
    return record


def _compare(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    keys = [key for key in sorted({*stored, *now}) if stored.get(key) != now.get(key)]
    if keys:
        kept = "; to keep it, name it in model.adapters: rows added at the end of the data then get features at it"
        raise FingerprintMismatchError(
            str(path),
            {key: (stored.get(key), now.get(key)) for key in keys},
            expected="the same base model, data, seed and settings of train and model.lora; nothing is added to what "
            "is trained",
            fix=f"restore those, or delete {path} to train again, or name another run_dir{kept * path.is_dir()}",
        )


def _train(
    config: RunConfig,
    encoded: Sequence[Encoded],
    ids: Sequence[str],
    fingerprint: dict[str, Any],
    targets: Mapping[int, Path],
    state_file: Path,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Train up to the last epoch of `targets`, from the saved state if it is early enough; return their records."""
    check_writable(str(state_file))
    dtype = training_dtype(config.train.dtype, resolve_device(config.model.device))
    loaded = prepare_trainable(config.model, dtype, config.seed)
    tuning = FineTuning(loaded, config.train, config.model.lora.dropout, config.seed)
    _require_space(targets[max(targets)], tuning.factors, len(targets))
    state = fingerprint | {"train.dtype": dtype}  # what `auto` is may be another one on another machine
    losses = _restore(state_file, tuning, state)
    if min(targets) <= len(losses):  # the state is past an epoch that is wanted now
        tuning.restart(config.seed)
        losses = []
    records = {}
    progress(len(losses) * len(encoded), config.train.epochs * len(encoded))
    for epoch in range(len(losses), max(targets)):
        losses.append(tuning.epoch(encoded, ids, epoch, progress))
        if epoch + 1 in targets:
            records[epoch + 1] = {
                "fingerprint": fingerprint,
                "num_steps": (epoch + 1) * -(-len(encoded) // config.train.batch_size),
                "losses": list(losses),
                "dtype": dtype,
            }
            _save(loaded, targets[epoch + 1], config.model.name, records[epoch + 1])
        if epoch + 1 < max(targets):
            _save_state(state_file, tuning, state, losses)
    state_file.unlink(missing_ok=True)
    return records


def training_dtype(dtype: str, device: torch.device) -> str:
    """Return the dtype that `auto` stands for on a device, or `dtype` itself."""
    if dtype != "auto":
        return dtype
    is_quick = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_quick else "float32"


def _require_space(target: Path, factors: Mapping[str, Tensor], num_adapters: int) -> None:
    """Check that the adapters and the state of an unfinished run would fit, before a step is taken."""
    num_bytes = (num_adapters + len(_STATE)) * sum(
        factor.numel() * factor.element_size() for factor in factors.values()
    )
    require_space(str(target), num_bytes, "free space, set run_dir on a larger disk, or lower model.lora.rank")


def _save(loaded: LoadedModel, target: Path, base_name: str, record: Mapping[str, Any]) -> None:
    """Write the adapter and its record, whole or not at all."""
    with named_errors(str(target)), new_folder(target) as folder:
        try:
            save_adapter(loaded, folder, base_name)
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(str(error)) from error
        record = {**record, "weights": file_digest(folder / ADAPTER_WEIGHTS)}
        (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _save_state(path: Path, tuning: FineTuning, fingerprint: Mapping[str, Any], losses: Sequence[float]) -> None:
    """Write factors and optimizer moments, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, factor in tuning.factors.items():
        moments = tuning.optimizer.state[factor]
        values = (factor, moments["exp_avg"], moments["exp_avg_sq"])
        tensors |= {f"{name}.{kind}": value.detach().cpu() for kind, value in zip(_STATE, values, strict=True)}
        steps = float(moments["step"])
    state = {"fingerprint": dict(fingerprint), "losses": list(losses), "steps": steps}
    atomic_write(str(path), save(tensors, {"state": json.dumps(state)}))


@torch.no_grad()
def _restore(path: Path, tuning: FineTuning, fingerprint: Mapping[str, Any]) -> list[float]:
    """Read the state of an interrupted run; return the losses of its finished epochs (none without a state)."""
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        _compare(path, state["fingerprint"], fingerprint)
        for name, factor in tuning.factors.items():
            values = [file.get_tensor(f"{name}.{kind}").to(factor.device) for kind in _STATE]
            factor.copy_(values[0])
            tuning.optimizer.state[factor] = {
                "step": torch.tensor(state["steps"]),
                "exp_avg": values[1],
                "exp_avg_sq": values[2],
            }
    losses: list[float] = state["losses"]
    return losses
