"""Training-data attribution for LoRA-tuned large language models.

    from llmattrib import Run

    run = Run.open("runs/demo")
    for hit in run.query("What is the highest point of Algeria?").helpful:
        print(hit.rank, f"{hit.share:+.1%}", hit.id, hit.completion)

The names below are the public surface; each is imported when first used, so `import llmattrib` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmattrib.build import build_features
    from llmattrib.config import RunConfig, load_config
    from llmattrib.errors import LlmattribError
    from llmattrib.hits import Hit, Hits, Query
    from llmattrib.index import build_index
    from llmattrib.query import Run
    from llmattrib.reduce import reduce_run
    from llmattrib.train import train_adapter
    from llmattrib.values.stage import compute_values

__version__ = "0.1.0"

__all__ = [
    "Hit",
    "Hits",
    "LlmattribError",
    "Query",
    "Run",
    "RunConfig",
    "build_features",
    "build_index",
    "compute_values",
    "load_config",
    "reduce_run",
    "train_adapter",
]

_MODULES = {
    "Hit": "hits",
    "Hits": "hits",
    "LlmattribError": "errors",
    "Query": "hits",
    "Run": "query",
    "RunConfig": "config",
    "build_features": "build",
    "build_index": "index",
    "compute_values": "values.stage",
    "load_config": "config",
    "reduce_run": "reduce",
    "train_adapter": "train",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
