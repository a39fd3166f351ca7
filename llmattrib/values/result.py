"""Values of the training examples as rows: CSV and Parquet files, a JSON of what they are, the lowest and the highest.

    values/<method>.csv       id, index, value, standard_error, lower, upper, sign, prompt, completion
    values/<method>.parquet   the same, numbers as float64; empty cells are nulls
    values/<method>.json      written last: settings, sums, counts of signs, notes and the fingerprint

Numbers in CSV are the shortest decimals that read back to the same float64.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmattrib import storage
from llmattrib.estimators.moments import Sign
from llmattrib.hits import Hit

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("index", pa.int64()),
        *((name, pa.float64()) for name in ("value", "standard_error", "lower", "upper")),
        *((name, pa.string()) for name in ("sign", "prompt", "completion")),
    ]
)


@dataclass(frozen=True)
class DataValue:
    """The value of one training example.

    Attributes:
        id: its id.
        index: its row in the run's stores.
        value: mean over the validation prompts; positive is helpful.
        standard_error: of what was sampled; None where nothing was, or the estimator has none.
        lower: lower end of the interval; infinite below 16 samples.
        upper: upper end.
        sign: `helpful`, `harmful` or `undetermined`.
        prompt: for display.
        completion: what it taught.
    """

    id: str
    index: int
    value: float
    standard_error: float | None
    lower: float | None
    upper: float | None
    sign: Sign
    prompt: str
    completion: str


@dataclass(frozen=True)
class ValuesResult:
    """What `compute_values` did.

    Attributes:
        csv_path: the CSV file.
        parquet_path: the Parquet file.
        method: whose values.
        utility: what they are values in.
        num_validation: validation examples.
        expected_total: U(everybody) - U(nobody), where values should sum to it; None otherwise.
        values: one for each training example, in the order of the stores.
        notes: what a reader of the values should know.
        is_reused: whether equal values were there.
        seconds: from start to end.
    """

    csv_path: str
    parquet_path: str
    method: str
    utility: str
    num_validation: int
    expected_total: float | None
    values: tuple[DataValue, ...]
    notes: tuple[str, ...]
    is_reused: bool
    seconds: float

    @property
    def total(self) -> float:
        """Sum of the values."""
        return sum(item.value for item in self.values)

    def count(self, sign: Sign) -> int:
        """Return the number of examples of a sign."""
        return sum(item.sign == sign for item in self.values)

    def lowest(self, k: int) -> tuple[Hit, ...]:
        """Return the examples of the k lowest values, lowest first, equal ones by row."""
        return self._hits(sorted(self.values, key=lambda item: item.value)[:k])

    def highest(self, k: int) -> tuple[Hit, ...]:
        """Return the examples of the k highest values, highest first, equal ones by row."""
        return self._hits(sorted(self.values, key=lambda item: -item.value)[:k])

    def _hits(self, chosen: Sequence[DataValue]) -> tuple[Hit, ...]:
        magnitude = sum(abs(item.value) for item in self.values) or 1.0
        return tuple(
            Hit(rank, item.index, item.id, item.prompt, item.completion, item.value, item.value / magnitude)
            for rank, item in enumerate(chosen, start=1)
        )

    def summary(self) -> dict[str, Any]:
        """Return what the JSON file says besides settings and fingerprint."""
        return {
            "method": self.method,
            "utility": self.utility,
            "num_examples": len(self.values),
            "num_validation": self.num_validation,
            "total": self.total,
            "expected_total": self.expected_total,
            "signs": {sign: self.count(sign) for sign in ("helpful", "harmful", "undetermined")},
            "notes": list(self.notes),
        }

    def to_json(self, top: int) -> str:
        """Return one line of JSON with the summary and the `top` lowest and highest examples."""
        ends = {"lowest": list(map(asdict, self.lowest(top))), "highest": list(map(asdict, self.highest(top)))}
        tree = {"csv": self.csv_path, "parquet": self.parquet_path, **self.summary(), **ends}
        return json.dumps(tree, ensure_ascii=False)


def manifest_path(csv_path: str) -> str:
    """Return the JSON file beside a CSV file of values."""
    return csv_path.removesuffix(".csv") + ".json"


def write_values(result: ValuesResult, settings: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Write the three files, each atomically; the JSON last.

    Raises:
        DiskSpaceError, StoreError: they cannot be written.
    """
    path = manifest_path(result.csv_path)
    storage.remove(path)
    rows = [asdict(item) for item in result.values]
    text = io.StringIO()
    writer = csv.DictWriter(text, _SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.atomic_write(result.csv_path, text.getvalue().encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd", use_dictionary=False)
    storage.atomic_write(result.parquet_path, buffer.getvalue())
    tree = {**result.summary(), "settings": settings, "fingerprint": fingerprint}
    storage.atomic_write(path, (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())


def read_values(csv_path: str, parquet_path: str, fingerprint: Mapping[str, Any] | None = None) -> ValuesResult | None:
    """Return the values that are there, or None when there are none of this fingerprint (of any, when None)."""
    try:
        tree = json.loads(storage.read_bytes(manifest_path(csv_path)))
        rows = pq.read_table(io.BytesIO(storage.read_bytes(parquet_path)), schema=_SCHEMA).to_pylist()
    except (FileNotFoundError, ValueError):  # not whole: as good as none
        return None
    if not storage.exists(csv_path) or fingerprint not in (None, tree.get("fingerprint")):
        return None
    return ValuesResult(
        csv_path=csv_path,
        parquet_path=parquet_path,
        method=tree["method"],
        utility=tree["utility"],
        num_validation=tree["num_validation"],
        expected_total=tree["expected_total"],
        values=tuple(DataValue(**row) for row in rows),
        notes=tuple(tree["notes"]),
        is_reused=True,
        seconds=0.0,
    )
