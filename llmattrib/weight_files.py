"""Files of a model's or an adapter's folder: which hold weights, whether these are whole, fingerprints of them.

Of safetensors files the header is checked against the size; no tensor is loaded. Fingerprints sample the files: 4 KB of
each tensor and 256 KB of each file, so a changed byte elsewhere in a file of the same size and header goes unseen.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmattrib.errors import ModelNotFoundError

_NUM_BLOCKS, _BLOCK_SIZE = 64, 4096
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_POINTER = b"version "
"""What the text begins with that git-lfs leaves in place of a file; as a length of a header, far too much."""


def weight_files(folder: Path) -> list[Path]:
    """Return a model folder's safetensors files, sorted by name.

    Raises:
        ModelNotFoundError: there are none, or some that its index names are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ModelNotFoundError(
                f"{index} names no files", expected="a weight_map of tensors to files", fix="download the model again"
            )
        names = sorted(set(map(str, files.values())))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelNotFoundError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, the first {missing[0]}",
                fix="download the model again",
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelNotFoundError(
            f"{folder} has no safetensors weights",
            expected="model.safetensors; pickled weights are not read",
            fix="convert the model with save_pretrained",
        )
    return files


def safetensors_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return what precedes the data of a safetensors file, and name -> description of each tensor.

    Raises:
        ModelNotFoundError: the file is cut, empty or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(8)
        if int.from_bytes(raw, "little") <= size:
            raw += file.read(int.from_bytes(raw, "little"))
    try:
        tensors = {name: row for name, row in json.loads(raw[8:]).items() if name != "__metadata__"}
        expected = len(raw) + max((row["data_offsets"][1] for row in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        tensors, expected = {}, -1
    if size != expected:
        is_pointer = raw == _POINTER
        what = f"holds {expected:,} bytes by its header and has {size:,}" if expected > 0 else f"has {size:,} bytes"
        raise ModelNotFoundError(
            f"{path} is a pointer of git-lfs" if is_pointer else f"{path} is no whole safetensors file: it {what}",
            expected="the weights themselves",
            fix="run `git lfs pull` in its folder" if is_pointer else "download or save it again",
        )
    return raw, tensors


def weights_fingerprint(folder: Path) -> str:
    """Return a hash (hex) over a model folder's config and samples of its weight files.

    Of each file: size, header, the first 4 KB of every tensor, and 64 evenly spaced blocks of 4 KB.

    Raises:
        ModelNotFoundError: a file is missing or not whole.
    """
    config = read_json(folder / "config.json")
    state = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode())
    for path in weight_files(folder):
        header, tensors = safetensors_header(path)
        size, start = path.stat().st_size, len(header)
        state.update(size.to_bytes(8, "little") + header)
        blocks = [
            (begin, min(end - begin, _BLOCK_SIZE))
            for begin, end in sorted(row["data_offsets"] for row in tensors.values())
        ]
        last = max(size - start - _BLOCK_SIZE, 0)
        blocks += [(last * number // (_NUM_BLOCKS - 1), _BLOCK_SIZE) for number in range(_NUM_BLOCKS)]
        with path.open("rb") as file:
            for begin, length in blocks:
                file.seek(start + begin)
                state.update(file.read(length))
    return state.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object from a model's or adapter's folder.

    Raises:
        ModelNotFoundError: there is no such file, or it is not a JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        raise ModelNotFoundError(
            f"there is no {path}" if is_absent else f"{path} cannot be read: {error.strerror}",
            expected=f"a folder with {path.name}",
            fix="check model.name and model.adapters",
        ) from error
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not JSON: {error}", fix="save the model again") from error
    if not isinstance(tree, dict):
        raise ModelNotFoundError(f"{path} holds a {type(tree).__name__}", expected="a JSON object")
    return tree
