"""How near sketched inner products are to exact ones, byte for byte.

    python -m benchmarks.fidelity [--examples 12] [--seeds 8] [--points init trained] [--parts sizes rounding]

Exact per-example gradients of SmolLM2-135M (configs/smollm2.yaml: the demo's facts, LoRA of rank 8 on all linear
layers), at `init` and at an adapter after 2 epochs of facts, those that are scored and as many more as a run calibrates
a sketch on. Widths of blocks are planned from the gradients of these others alone. Every sketch is given 1, 4, 16 and
64 KB an example; recorded are the relative Frobenius error and the Spearman correlation of the off-diagonal inner
products, means over seeds of the sketch, and the range of the error:

    float16, int8, int4   ours: block widths by gradient norm; stored rows, with a float32 scale each
    equal, size           float16 with blocks of equal width, or as wide as their share of the entries
    joint                 float16, one permutation over all entries instead of one a block
    bergson               its projection per module, p x p for A and for B, in float32 as it stores them: its own
                          matrices on the same gradients. Its sizes come in steps, so log error is interpolated in log
                          bytes between the p below and the p above; where p = 1 is above already, that one counts
    bergson_joint         its projection of all entries together, float32; at 1 and 4 KB alone and of fewer seeds (a
                          matrix of signs for every dimension has to be drawn)

`rounding`: the same errors at 1,024, 4,096 and 16,384 dimensions, whose rows are stored as float32, float16 and int8;
the table has bergson's one projection beside those of as many dimensions, 4 KB of float32 being 1,024.

Writes benchmarks/results/fidelity.json, point by point.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmattrib.config import RunConfig, load_config
from llmattrib.data import load_examples
from llmattrib.evaluate.sketch import exact_features, kernel_error, sketch_rows
from llmattrib.extraction import calibration_batches, encode_examples, load_extractor
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Block, SketchPlan, make_plan
from llmattrib.quantize import quantize
from llmattrib.train import train_adapter

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "fidelity.json"
KILOBYTES = (1, 4, 16, 64)
SCALE_BYTES = 4
BITS = {"float16": 16, "int8": 8, "int4": 4}
SKETCHES = (*BITS, "equal", "size", "joint")
MAX_JOINT_KB, JOINT_SEEDS = 4, 4
DIMS = (1024, 4096, 16384)
PARTS = ("sizes", "rounding")
EPOCHS = 2


def run_of(point: str, num_scored: int) -> RunConfig:
    """Return the run of one linearisation point, of the examples to score and to calibrate on; trains its adapter."""
    file, common = ROOT / "configs" / "smollm2.yaml", [f"train.epochs={EPOCHS}", "model.device=cpu"]
    limit = num_scored + load_config(file).features.sketch.calibration_examples
    config = load_config(file, [*common, f"data.limit={limit}", f"run_dir=runs/fidelity-{limit}"])
    if point == "init":
        return config
    adapter = train_adapter(config).path
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"adapters": (adapter,)}),
            "features": config.features.model_copy(update={"linearisation": "trained"}),
        }
    )


def stored(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Return rows as they are read back after storing."""
    if dtype != "int4":
        codes, scale = quantize(rows[:, None], dtype)  # type: ignore[arg-type]
        return codes[:, 0].astype(np.float32) * scale[:, None]
    top = 2 ** (BITS[dtype] - 1) - 1
    scale = np.abs(rows).max(axis=1, keepdims=True) / top
    return (np.rint(rows / scale) * scale).astype(np.float32)


def ours(name: str, kilobytes: int, seed: int, exact: np.ndarray, blocks: tuple[Block, ...], norms: np.ndarray) -> Any:
    """Return rows of one of our sketches, or None if the blocks do not fit."""
    dtype = name if name in BITS else "float16"
    dim = (kilobytes * 1024 - SCALE_BYTES) * 8 // BITS[dtype]
    if name == "joint":
        blocks, norms = (Block("all", "B", exact.shape[1]),), np.ones(1)
    if dim < len(blocks):
        return None
    weights = {"equal": np.ones(len(blocks)), "size": np.array([block.size for block in blocks])}.get(name, norms)
    plan: SketchPlan = make_plan("oporp", seed, dim, blocks, weights.tolist())
    return stored(sketch_rows(plan, exact), dtype)


def two_sided(p: int, seed: int, exact: np.ndarray, layers: list[tuple[str, int, int]]) -> np.ndarray:
    """Return rows of bergson's projection per module."""
    from bergson.collector.collector import create_module_projection_matrix

    parts, start = [], 0
    for name, d_out, d_in in layers:
        gradient = torch.from_numpy(exact[:, start : start + d_out * d_in]).reshape(-1, d_out, d_in)
        left, right = (
            create_module_projection_matrix(
                name, role, p, size, torch.float32, torch.device("cpu"), "rademacher", "jl", seed
            )
            for role, size in (("left", d_out), ("right", d_in))
        )
        parts.append((left @ gradient @ right.T).flatten(1))
        start += d_out * d_in
    return torch.cat(parts, dim=1).numpy()


def interpolated(size: int, cells: dict[int, dict[str, Any]], num_modules: int) -> dict[str, float]:
    """Return bergson's error at a number of kilobytes from those of p below and above."""
    logs = {p: np.log(4 * num_modules * p * p / 1024) for p in cells}
    ordered = sorted(cells)
    places, wanted = [logs[p] for p in ordered], np.log(size)
    error = np.exp(np.interp(wanted, places, [np.log(cells[p]["frobenius_error"]) for p in ordered]))
    rank = np.interp(wanted, places, [cells[p]["spearman"] for p in ordered])
    return {"p": ordered, "frobenius_error": round(float(error), 5), "spearman": round(float(rank), 5)}  # type: ignore[dict-item]


def one_matrix(kilobytes: int, seed: int, exact: np.ndarray, layers: list[tuple[str, int, int]]) -> np.ndarray:
    """Return rows of bergson's projection of all entries together."""
    from bergson.collector.collector import project_global

    rows, start = torch.zeros(len(exact), kilobytes * 256), 0
    for name, d_out, d_in in layers:
        part = torch.from_numpy(exact[:, start : start + d_out * d_in])
        rows += project_global(f"{name}/single/seed{seed}", part, rows.shape[1], "rademacher")
        start += d_out * d_in
    return rows.numpy()


def matrices(extractor: Extractor) -> list[tuple[str, int, int]]:
    """Return name and shape of each block: B is [d_out, r], A is [r, d_in]."""
    shapes = []
    for layer in extractor.loaded.layers:
        a, b, _ = layer.factors(extractor.loaded.adapter_names[0])
        shapes += [(f"{layer.name}.lora_A", *a.shape), (f"{layer.name}.lora_B", *b.shape)]
    kept = [shape for shape in shapes if len(extractor.blocks) == len(shapes) or shape[0].endswith("lora_B")]
    assert [rows * columns for _, rows, columns in kept] == [block.size for block in extractor.blocks]
    return kept


def mean_error(
    rows_of: Callable[[int], np.ndarray | None], exact_kernel: np.ndarray, seeds: int
) -> dict[str, Any] | None:
    """Return the means over seeds of error and rank correlation, and the range of the error."""
    found, rows = [], None
    for seed in range(seeds):
        rows = rows_of(seed)
        if rows is None:
            return None
        found.append(kernel_error(rows @ rows.T, exact_kernel))
    error, rank = np.mean(found, axis=0)
    errors = [single for single, _ in found]
    return {
        "dim": rows.shape[1],
        "seeds": seeds,
        "frobenius_error": round(float(error), 5),
        "range": [round(min(errors), 5), round(max(errors), 5)],
        "spearman": round(float(rank), 5),
    }


def rounding(exact: np.ndarray, blocks: tuple[Block, ...], norms: np.ndarray, seeds: int) -> dict[str, Any]:
    """Return the errors of sketches of equal dimensions by the dtype their rows are stored in."""

    def rows(dim: int, dtype: str, seed: int) -> np.ndarray:
        return stored(sketch_rows(make_plan("oporp", seed, dim, blocks, norms.tolist()), exact), dtype)

    kernel = exact @ exact.T
    return {
        str(dim): {
            dtype: mean_error(partial(rows, dim, dtype), kernel, seeds) for dtype in ("float32", "float16", "int8")
        }
        for dim in DIMS
    }


def measure(point: str, num_examples: int, seeds: int, parts: Sequence[str]) -> dict[str, Any]:
    """Return the errors of every sketch and size at one linearisation point."""
    config = run_of(point, num_examples)
    extractor = load_extractor(config)
    kept = encode_examples(config, extractor, load_examples(config.data))
    encoded, examples = kept.encoded[:num_examples], kept.examples[:num_examples]
    exact = exact_features(config, extractor, encoded, examples, lambda done, total: None)
    others = calibration_batches(config, kept.encoded[num_examples:])
    norms = sum(extractor._block_norms(batch) for batch in others)
    kernel, layers = exact @ exact.T, matrices(extractor)
    rounded = {"rounding": rounding(exact, extractor.blocks, np.asarray(norms), seeds)} if "rounding" in parts else {}
    if "sizes" not in parts:
        return rounded
    rows: dict[str, Any] = {}
    for size in KILOBYTES:
        tried: dict[str, Callable[[int], np.ndarray | None]] = {
            name: partial(ours, name, size, exact=exact, blocks=extractor.blocks, norms=norms) for name in SKETCHES
        }
        found = {name: mean_error(rows_of, kernel, seeds) for name, rows_of in tried.items()}
        above = next(p for p in range(1, 1000) if 4 * len(layers) * p * p >= size * 1024)
        cells = {
            p: mean_error(partial(two_sided, p, exact=exact, layers=layers), kernel, seeds)
            for p in (max(1, above - 1), above)
        }
        found["bergson"] = interpolated(size, {p: cell for p, cell in cells.items() if cell}, len(layers))
        if size <= MAX_JOINT_KB:
            joint = partial(one_matrix, size, exact=exact, layers=layers)
            found["bergson_joint"] = mean_error(joint, kernel, min(seeds, JOINT_SEEDS))
        rows[str(size)] = {name: cell for name, cell in found.items() if cell}
        print(point, size, json.dumps(rows[str(size)]), flush=True)
    size_of = {
        "examples": len(encoded),
        "calibrated_on": sum(map(len, others)),
        "seeds": seeds,
        "gradient_dim": exact.shape[1],
        "blocks": len(layers),
    }
    return {**rounded, **size_of, "kilobytes": rows}


def summary(points: dict[str, Any]) -> dict[str, Any]:
    """Return by how much our error is below bergson's: the smallest ratio over points and sizes."""
    cells = [cells for point in points.values() for cells in point["kilobytes"].values()]
    return {
        name: round(min(cell["bergson"]["frobenius_error"] / cell[name]["frobenius_error"] for cell in cells), 2)
        for name in ("float16", "int8")
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--points", nargs="+", choices=("init", "trained"), default=("init", "trained"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for point in options.points:
        found = measure(point, options.examples, options.seeds, options.parts)
        known = json.loads(RESULT.read_text())["points"] if RESULT.exists() else {}
        points = known | {point: known.get(point, {}) | found}
        result = {"bergson_error_over_ours": summary(points), "points": points}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
