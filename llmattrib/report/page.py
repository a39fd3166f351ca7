"""One self-contained HTML page of a run: what was measured, its settings, its most and least valuable examples.

    run_dir/report.html              nothing outside it is loaded: pictures are data, there are no scripts and no links
    run_dir/evaluation/<name>.png    the same pictures

All text is escaped by Jinja2, and the page forbids scripts and connections besides, so a training example cannot act on
its reader. Only what is on disk is shown: nothing is computed and no model is loaded. The same run gives the same page.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2

from llmattrib import storage
from llmattrib.config import RunConfig, config_to_yaml
from llmattrib.errors import LlmattribError, StoreNotFoundError
from llmattrib.evaluate.record import Record, Row, read_record
from llmattrib.evaluate.suite import EVALUATIONS
from llmattrib.report.plots import interval_of, is_method, picture
from llmattrib.store import RowStore
from llmattrib.values.result import ValuesResult, read_values

EXAMPLES, MAX_TEXT = 5, 400
CEILINGS = ("best of these",)
"""Rows that no ranking can exceed: no baselines."""
READING = {
    "lds": "1 ranks what the sub-models say perfectly, 0 is chance. Random subsets differ in size, and a model trained "
    "on more data may be surer of everything: where the row “size” is not near 0, read “beyond size”.",
    "leave_one_out": "1 ranks the examples exactly as leaving each out does, 0 is chance. With one fine-tune for each "
    "example most of the truth is noise.",
    "curves": "How much the mean log-odds of the prompts' answers change when a model is trained for real on what is "
    "left. Dashed black lines are random rankings: what lies between them is noise.",
    "mislabel": "The chance that a wrong example looks more suspicious than a right one; 0.5 is guessing. “value” is "
    "minus the mean score over the prompts, “self” an example's score for itself; the rest needs no attribution.",
    "planted": "Recall at k is the share of prompts whose teaching example is among the first k.",
    "tail_patch": "The mean change of the log-probability of the answers after one more gradient step on each of the "
    "examples ranked first.",
    "signs": "The share of helpful and harmful signs that stay when half of the examples are not there; 0.5 is chance. "
    "A score that looks at its own example alone cannot change: stable is not right.",
    "gold": "The cosine of the scores with what leaving each example out of so many more steps of training does: 1 "
    "says the same, 0 is chance. “spectral” knows the number of steps; “one_seed” is how well the truth agrees with "
    "itself.",
    "sketch": "How far inner products of the stored, compressed features are from those of exact gradients: no method "
    "can be more exact than what it is made from.",
}


@dataclass(frozen=True)
class Goal:
    """A number by which methods are compared with baselines.

    Attributes:
        key: of the rows.
        title: in words.
        is_higher_better: the direction.
    """

    key: str
    title: str
    is_higher_better: bool = True


GOALS: dict[str, tuple[Goal, ...]] = {
    "lds": (Goal("lds", "linear datamodelling score"),),
    "leave_one_out": (Goal("spearman", "rank correlation with leave-one-out"),),
    "curves": (
        Goal("remove_highest", "log-odds lost without the highest", is_higher_better=False),
        Goal("remove_lowest", "log-odds kept without the lowest"),
        Goal("keep_highest", "log-odds on the highest alone"),
        Goal("keep_lowest", "log-odds on the lowest alone", is_higher_better=False),
    ),
    "mislabel": (Goal("auroc", "AUROC of wrong labels"),),
    "planted": (Goal("mrr", "mean reciprocal rank of the teaching example"),),
    "tail_patch": (Goal("change", "change of log p by one more step"),),
}


@dataclass(frozen=True)
class Glance:
    """The best method beside the best baseline, by one number."""

    title: str
    anchor: str
    method: str
    method_value: str
    baseline: str
    baseline_value: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """One evaluation on the page."""

    name: str
    question: str
    reading: str
    columns: Sequence[str]
    rows: Sequence[tuple[bool, Sequence[str]]]
    notes: Sequence[str]
    is_stale: bool
    png: bytes | None = field(repr=False)

    @property
    def image(self) -> str:
        """The picture as a data URI."""
        return "" if self.png is None else "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_report(config: RunConfig) -> str:
    """Write the page of a run and the pictures on it.

    Returns:
        Its path.

    Raises:
        StoreNotFoundError: the run has no features.
        ConfigError: matplotlib is not installed (when this module is imported).
        DiskSpaceError, StoreError: it cannot be written.
    """
    page, sections = render(config)
    for section in sections:
        if section.png is not None:
            storage.atomic_write(config.layout.path("evaluation", f"{section.name}.png"), section.png)
    path = config.layout.path("report.html")
    storage.atomic_write(path, page.encode())
    return path


def render(config: RunConfig) -> tuple[str, list[Section]]:
    """Return the page and its sections.

    Raises:
        StoreNotFoundError: the run has no features.
    """
    features = RowStore.open(config.layout.features)
    digest = features.digest()
    found = {name: read_record(config, name, digest) for name in EVALUATIONS}
    records = {name: pair for name, pair in found.items() if pair is not None}
    methods = config.reduce.methods
    sections = [section_of(record, methods, not is_current) for record, is_current in records.values()]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((files("llmattrib") / "assets" / "report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=config.run_dir.rstrip("/").rpartition("/")[2],
        facts=facts_of(config, features),
        representers=_representers(config),
        glances=[glance for record, _ in records.values() for glance in glances_of(record, methods)],
        sections=sections,
        missing=[(name, EVALUATIONS[name].question) for name in EVALUATIONS if name not in records],
        values=[_values(result) for result in stored_values(config)],
        yaml=config_to_yaml(config),
    )
    return page, sections


def facts_of(config: RunConfig, features: RowStore) -> list[tuple[str, str]]:
    """Return the settings that a reader needs, in words."""
    manifest, sketch = features.manifest, config.features.sketch
    width = f"{manifest.dim:,} numbers ({'exact' if sketch.kind == 'none' else f'sketch {sketch.kind}'})"
    point = {"init": "the untrained model with fresh LoRA matrices", "trained": "the trained adapter"}
    return [
        ("Model", config.model.name),
        ("Training examples", f"{manifest.num_rows:,} of {config.data.train}"),
        ("Validation prompts", config.values.data or "none (values.data is not set)"),
        ("Label words", ", ".join(config.data.label_words) or "none: generated text"),
        ("Features", f"gradients of {config.features.output} at {point[config.features.linearisation]}"),
        ("A feature", f"{width}, {manifest.dtype}"),
        ("Seed", str(config.seed)),
    ]


def _representers(config: RunConfig) -> list[tuple[str, str]]:
    """Return each method with what was chosen for it."""
    found = []
    for method in config.reduce.methods:
        try:
            info: Any = RowStore.open(config.layout.representers(method)).manifest.info
        except StoreNotFoundError:
            found.append((method, "not reduced"))
            continue
        ridge = info.get("ridge")
        parts = [f"ridge {ridge:g}" if isinstance(ridge, int | float) else "no ridge"]
        parts += [word for word, key in (("centred", "center"), ("unit norm", "normalize")) if info.get(key)]
        error = info.get("sum_rule_error")
        parts += [f"sum-rule error {error:.1e}"] if isinstance(error, float) else []
        found.append((method, ", ".join(parts)))
    return found


def section_of(record: Record, methods: Sequence[str], is_stale: bool) -> Section:
    """Lay out one evaluation."""
    keys = [key for key in (record.rows[0] if record.rows else {}) if not key.endswith(("low", "high"))]
    rows = [(is_method(str(row.get("method")), methods), [_cell(row, key) for key in keys]) for row in record.rows]
    return Section(
        name=record.name,
        question=EVALUATIONS[record.name].question,
        reading=READING[record.name],
        columns=[key.replace("_", " ") for key in keys],
        rows=rows,
        notes=record.notes,
        is_stale=is_stale,
        png=picture(record, methods),
    )


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"
    return "undefined" if value is None else str(value)


def _cell(row: Row, key: str) -> str:
    """Return a number with its interval."""
    ends = interval_of(row, key)
    value = _number(row.get(key))
    return value if ends is None else f"{value}  [{_number(ends[0])}, {_number(ends[1])}]"


def glances_of(record: Record, methods: Sequence[str]) -> list[Glance]:
    """Compare the best method with the best baseline, by each goal of an evaluation.

    The verdict looks at intervals: `above` and `below` mean that they do not overlap.
    """
    found = []
    for goal in GOALS.get(record.name, ()):
        rows = [row for row in record.rows if isinstance(row.get(goal.key), int | float)]
        groups: tuple[list[Row], list[Row]] = ([], [])
        for row in rows:
            if row["method"] not in CEILINGS:
                groups[0 if is_method(str(row["method"]), methods) else 1].append(row)
        if not all(groups):
            continue
        sign = 1 if goal.is_higher_better else -1
        ours, theirs = (max(group, key=lambda row: sign * float(row[goal.key] or 0)) for group in groups)
        found.append(
            Glance(
                goal.title,
                record.name,
                str(ours["method"]),
                _cell(ours, goal.key),
                str(theirs["method"]),
                _cell(theirs, goal.key),
                _verdict(ours, theirs, goal),
            )
        )
    return found


def _verdict(ours: Row, theirs: Row, goal: Goal) -> str:
    mine, other = interval_of(ours, goal.key), interval_of(theirs, goal.key)
    if mine is None or other is None:
        return "no interval"
    if not goal.is_higher_better:
        mine, other = (-mine[1], -mine[0]), (-other[1], -other[0])
    if mine[0] > other[1]:
        return "better"
    return "worse" if mine[1] < other[0] else "no clear difference"


def stored_values(config: RunConfig) -> list[ValuesResult]:
    """Return the data values of a run, by name."""
    found = []
    for name in sorted(storage.list_names(config.layout.path("values"))):
        if name.endswith(".csv"):
            place = config.layout.path("values", name)
            try:
                result = read_values(place, place.removesuffix("csv") + "parquet")
            except LlmattribError:
                continue  # what is broken is for `verify` to say
            found += [] if result is None else [result]
    return found


def _values(result: ValuesResult) -> dict[str, Any]:
    """Lay out the highest and the lowest examples."""
    signs = {item.index: item.sign for item in result.values}
    return {
        "method": result.method,
        "utility": result.utility.replace("_", " "),
        "count": f"{len(result.values):,}",
        "prompts": f"{result.num_validation:,}",
        "total": f"{result.total:+.3g}",
        "signs": [(sign, f"{result.count(sign):,}") for sign in ("helpful", "harmful", "undetermined")],
        "notes": result.notes,
        "ends": [
            (
                title,
                [
                    (f"{hit.value:+.3g}", signs[hit.row], hit.id, _short(hit.prompt), _short(hit.completion))
                    for hit in hits
                ],
            )
            for title, hits in (
                ("Most valuable", result.highest(EXAMPLES)),
                ("Least valuable", result.lowest(EXAMPLES)),
            )
        ],
    }


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
