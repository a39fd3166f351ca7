"""Peak memory of building features, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from llmattrib.plan.shape import BatchShape

_ROOT = Path(__file__).parents[1]
_MEASURE = """
import json, sys
import torch
import transformers.models.llama.modeling_llama
from benchmarks._process import peak_bytes
from llmattrib.extraction import load_extractor
from llmattrib.config import load_config
from llmattrib.encoding import Encoded
from llmattrib.features.sketch import Sketch

torch.set_num_threads(1)
path, count, width, completion = sys.argv[1], *map(int, sys.argv[2:])
config, imported = load_config(path), peak_bytes()
extractor = load_extractor(config)
examples = [Encoded((5,) * (width - (k > 0)), width - (k > 0) - completion // count, -1) for k in range(count)]
sketch = Sketch(extractor.plan("oporp", 0, config.features.sketch.dim, [examples[:1]]))
for _ in range(2):
    extractor.extract(examples, sketch)
print(json.dumps({"peak": peak_bytes() - imported}))
"""


RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc give freed blocks back, so that bytes alive are measured and not the history of the heap."""


def measured_peak(config_file: Path, batch: BatchShape, allocator: dict[str, str] = RETURNING) -> int:
    """Return the peak resident bytes of a process over what its imports take, while a batch becomes features.

    Args:
        config_file: of the run whose model and sketch are loaded.
        batch: its shape.
        allocator: environment of the process.
    """
    shape = [str(number) for number in (batch.num_examples, batch.width, batch.num_completion)]
    env = os.environ | allocator
    command = [sys.executable, "-c", _MEASURE, str(config_file), *shape]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT, env=env).stdout
    return int(json.loads(out)["peak"])
