"""How well do sketched kernels match exact inner products? The floor of everything built on them.

Takes the exact gradients of a sample of training examples, sketches them at several widths, and compares
off-diagonal kernel entries: relative Frobenius error and Spearman rank correlation. The width the store was built
with is read back from the store itself, so its dtype and its bytes are part of the test. Holds the exact gradients of
the sample in memory (m times the LoRA size, float32).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

from llmattrib.config import RunConfig
from llmattrib.data import Example, read_examples
from llmattrib.encoding import Encoded
from llmattrib.errors import FeatureError, MethodError
from llmattrib.evaluate.record import Record
from llmattrib.extraction import calibration_batches, encode_examples, extract_rows
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch, SketchPlan
from llmattrib.progress import Progress, silent
from llmattrib.quantize import quantize
from llmattrib.query import Run
from llmattrib.store import RowStore

MAX_EXACT_BYTES = 4 << 30
DIMS = (1024, 4096, 16384)


@dataclass(frozen=True)
class SketchFidelity:
    """Fidelity at one width.

    Attributes:
        kind: sketch.
        dim: dimensions.
        bytes_per_example: stored size of a feature.
        frobenius_error: |K_sketch - K| / |K| over off-diagonal entries.
        spearman: rank correlation of the same entries.
        stored: whether this row was read from the run's own store.
    """

    kind: str
    dim: int
    bytes_per_example: int
    frobenius_error: float
    spearman: float
    stored: bool


def kernel_error(found: Float[np.ndarray, "m m"], exact: Float[np.ndarray, "m m"]) -> tuple[float, float]:
    """Return off-diagonal relative Frobenius error and Spearman correlation of two kernels."""
    upper = np.triu_indices(len(exact), 1)
    error = np.linalg.norm(found[upper] - exact[upper]) / np.linalg.norm(exact[upper])
    return float(error), float(spearmanr(found[upper], exact[upper]).statistic)


def sketch_fidelity(
    config: RunConfig, dims: Sequence[int] = DIMS, num_examples: int = 100, progress: Progress = silent
) -> list[SketchFidelity]:
    """Compare sketched with exact kernels on the first `num_examples` of a built run; save evaluation/sketch.json.

    Args:
        config: a run whose features are complete and have one output.
        dims: widths to try besides the store's own.
        num_examples: sample size m, three or more.
        progress: told of examples done.

    Returns:
        The store's own row first, then one row a width.

    Raises:
        FeatureError: the exact gradients of the sample do not fit in memory, or the sample is too small.
        MethodError: the store has several outputs an example.
        StoreNotFoundError, IncompleteStoreError: features are not built, or not all.
        FingerprintMismatchError: the model is not the one they were made with.
    """
    store = RowStore.open(config.layout.features)
    if store.manifest.num_outputs > 1:
        raise MethodError(
            "this store has one feature row a class", expected="one output", fix="use features.output=margin"
        )
    extractor = Run(config).extractor
    kept = encode_examples(config, extractor, read_examples(config.layout.examples))
    encoded, examples = kept.encoded[:num_examples], kept.examples[:num_examples]
    exact = exact_features(config, extractor, encoded, examples, progress)
    kernel = exact @ exact.T
    plan = SketchPlan.from_json(dict(store.manifest.info["sketch_plan"]))
    dtype, size = store.manifest.dtype, np.dtype(store.manifest.dtype).itemsize
    stored = store.read(0, len(encoded))[:, 0]
    rows = [SketchFidelity(plan.kind, plan.dim, plan.dim * size, *kernel_error(stored @ stored.T, kernel), stored=True)]
    calibration = calibration_batches(config, encoded)
    for dim in dims:
        if dim != plan.dim:
            tried = extractor.plan("oporp", config.seed, dim, calibration)
            codes, scale = quantize(sketch_rows(tried, exact)[:, None], dtype)
            phi = codes[:, 0].astype(np.float32) * scale[:, None]
            fidelity = kernel_error(phi @ phi.T, kernel)
            rows.append(SketchFidelity("oporp", tried.dim, tried.dim * size, *fidelity, stored=False))
    Record(
        "sketch",
        [asdict(row) for row in rows],
        (f"off-diagonal inner products of {len(encoded):,} examples, {exact.shape[1]:,} numbers in an exact gradient",),
        {"num_examples": len(encoded), "gradient_dim": exact.shape[1]},
    ).save(config, store.digest(), is_of_representers=False)
    return rows


def exact_features(
    config: RunConfig,
    extractor: Extractor,
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    progress: Progress,
) -> Float[np.ndarray, "m size"]:
    """Return unsketched gradients of a sample."""
    plan = extractor.plan("none", config.seed, 1, ())
    needed = 4 * plan.dim * len(encoded)
    if needed > MAX_EXACT_BYTES or len(encoded) < 3:
        raise FeatureError(
            f"exact gradients of {len(encoded)} examples need {needed / 2**30:.1f} GiB",
            expected=f"3 or more examples in at most {MAX_EXACT_BYTES / 2**30:.0f} GiB",
            fix=f"take up to {MAX_EXACT_BYTES // (4 * plan.dim)} examples with --examples",
        )
    sketch = Sketch(plan, extractor.loaded.device)
    return extract_rows(config, extractor, sketch, encoded, examples, progress)[0][:, 0]


def sketch_rows(plan: SketchPlan, exact: Float[np.ndarray, "m size"]) -> Float[np.ndarray, "m p"]:
    """Sketch whole gradients."""
    sketch, start = Sketch(plan), 0
    phi = torch.zeros(len(exact), plan.dim)
    for number, block in enumerate(plan.blocks):
        sketch.add(phi, number, torch.from_numpy(exact[:, start : start + block.size]))
        start += block.size
    return phi.numpy()
