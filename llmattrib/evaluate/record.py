"""What an evaluation found, as it is printed, saved and reported: run_dir/evaluation/<name>.json.

    {"evaluation", "rows": [a flat record each], "notes": [sentences], "details": what plots need, "features": digest,
     "reduce": its settings but the methods, null where representers have no part}

Numbers that are not defined (a correlation with a constant) are null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib.config import RunConfig
from llmattrib.rng import stream
from llmattrib.storage import atomic_write, read_bytes

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Record:
    """The result of one evaluation.

    Attributes:
        name: of the evaluation, and of its file.
        rows: one for each method or baseline, best first; all with the same keys.
        notes: what a reader should know.
        details: further JSON, read by the report.
    """

    name: str
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, config: RunConfig, features: str, *, is_of_representers: bool = True) -> "Record":
        """Write the JSON file, atomically.

        Args:
            config: of the run.
            features: digest of the features that the scores were made from.
            is_of_representers: whether it depends on the settings of `reduce`.

        Raises:
            DiskSpaceError, StoreError: it cannot be written.
        """
        tree = {
            "evaluation": self.name,
            "features": features,
            "reduce": _reduce_settings(config) if is_of_representers else None,
            "notes": list(self.notes),
            "rows": list(self.rows),
            "details": dict(self.details),
        }
        text = json.dumps(_finite(tree), indent=1, ensure_ascii=False)
        atomic_write(config.layout.path("evaluation", f"{self.name}.json"), (text + "\n").encode())
        return self


def _reduce_settings(config: RunConfig) -> dict[str, Any]:
    return config.reduce.model_dump(mode="json", exclude={"methods"})


def read_record(config: RunConfig, name: str, features: str) -> tuple[Record, bool] | None:
    """Return a saved record and whether it is of the present features and settings, or None when there is none.

    Args:
        config: the run, with the settings of `reduce` that representers have now.
        name: of the evaluation.
        features: digest of the features that are there now.
    """
    try:
        tree = json.loads(read_bytes(config.layout.path("evaluation", f"{name}.json")))
        record = Record(tree["evaluation"], tree["rows"], tuple(tree["notes"]), tree["details"])
        is_current = tree["features"] == features and tree.get("reduce") in (None, _reduce_settings(config))
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return record, is_current


def interval(samples: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of bootstrap samples."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def bootstrap_mean(
    values: Float[np.ndarray, "m *k"], seed: int, name: str, num_resamples: int
) -> tuple[Float[np.ndarray, "*k"], Float[np.ndarray, "*k"]]:
    """Return the ends of the 95 % interval of a mean over the first axis, that axis resampled."""
    draws = stream(seed, "evaluate", name).integers(0, len(values), (num_resamples, len(values)))
    counts = np.stack([np.bincount(draw, minlength=len(values)) for draw in draws]) / len(values)
    low, high = np.percentile(np.tensordot(counts, values, axes=1), (2.5, 97.5), axis=0)
    return np.asarray(low), np.asarray(high)


def _finite(tree: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
