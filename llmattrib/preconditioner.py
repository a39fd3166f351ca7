"""The curvature of a run: fitted once on its training examples, kept as a file, loaded by whatever makes features.

run_dir/curvature.safetensors holds the tensors of features/curvature.py, and as metadata what they were fitted with.
The features' manifest keeps the file's digest, so that every stage whitens with the curvature that its features have,
or stops. It is not fitted again when the data grows: old rows stay as they are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from llmattrib.config import RunConfig
from llmattrib.encoding import Encoded
from llmattrib.errors import CurvatureError
from llmattrib.extraction import batch_memory, model_fingerprint, spaced_batches
from llmattrib.features.curvature import Curvature, fit_bytes
from llmattrib.features.extract import Extractor
from llmattrib.memory import available_memory, require_memory
from llmattrib.storage import checksum, read_bytes

CURVATURE = "curvature"
"""Key of the digest in the `info` of a manifest of features."""
_ABSENT = (FileNotFoundError, NotADirectoryError)


def fit_curvature(config: RunConfig, extractor: Extractor, encoded: Sequence[Encoded]) -> bytes:
    """Fit the curvature on training examples; the extractor whitens with it from now on.

    Args:
        config: the run; reads `features`.
        extractor: of the run.
        encoded: the training examples.

    Returns:
        The content of the file.

    Raises:
        CurvatureError: it does not fit the memory.
        FeatureError: a layer is used several times in a forward.
        NonFiniteGradientError: a gradient is NaN or infinite.
        DeviceMemoryError: a batch does not fit on the device.
    """
    features, device = config.features, extractor.loaded.device
    require_memory(
        fit_bytes(extractor.shapes, features.max_eigen_side),
        f"the curvature (sides up to features.max_eigen_side, {features.max_eigen_side}, of {len(extractor.shapes)} "
        "LoRA factors)",
        "lower features.max_eigen_side, or adapt fewer layers (model.lora.layers, model.lora.target_modules)",
        limit=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory(),
        kind=CurvatureError,
    )
    sample = spaced_batches(config, encoded, features.curvature_examples)
    with batch_memory(config, max(map(len, sample))):
        curvature = extractor.fit_curvature(sample)
    settings = {
        "fingerprint": model_fingerprint(config, extractor),
        "num_examples": sum(map(len, sample)),
        "blocks": [
            [block.name, block.role, *shape] for block, shape in zip(extractor.blocks, extractor.shapes, strict=True)
        ],
    }
    return save(curvature.to_tensors(), {"settings": json.dumps(settings, sort_keys=True)})


def curvature_digest(content: bytes) -> str:
    """Return what a manifest keeps of the file, as `storage.checksum` gives it."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def load_curvature(config: RunConfig, extractor: Extractor, info: Mapping[str, Any]) -> None:
    """Let an extractor whiten as the stored features are, if they are.

    Args:
        config: the run.
        extractor: whose settings are those of the stored features.
        info: of the manifest of the stored features.

    Raises:
        CurvatureError: the file is missing or another one.
    """
    if config.features.preconditioner == "none":
        return
    path = config.layout.curvature
    try:
        content = read_bytes(path)
    except _ABSENT:
        content = b""
    if curvature_digest(content) != info.get(CURVATURE):
        raise CurvatureError(
            f"{path} " + ("is not the curvature that the features were whitened with" if content else "is missing"),
            expected="the file that was written with the features",
            fix=f"restore it, or delete {config.layout.features} and run `llmattrib build`",
        )
    extractor.whiten(Curvature.from_tensors(load(content)))


def wrong_curvature(path: str, info: Mapping[str, Any]) -> str:
    """Say what is wrong with the file of whitened features; nothing when all is well, or they are not whitened.

    Args:
        path: the file.
        info: of the manifest of the features.
    """
    if CURVATURE not in info:
        return ""
    try:
        found = checksum(path)
    except _ABSENT:
        return "is missing, and queries are whitened with it"
    return "" if found == info[CURVATURE] else "is not the curvature that the features were whitened with"
