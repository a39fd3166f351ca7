"""Pictures of evaluations as PNG bytes: numbers with their intervals, and curves.

What a run's methods do is blue, what baselines do is grey, so that a glance tells them apart; random rankings are
dashed. Nothing here reads or writes files; the same record gives the same bytes with the same matplotlib.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmattrib.errors import ConfigError
from llmattrib.evaluate.curves import BY_CHANCE
from llmattrib.evaluate.record import Record, Row

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as missing:
    raise ConfigError(
        "matplotlib is not installed",
        expected="it, for the pictures of a report",
        fix="install llmattrib with the extra `plots`",
    ) from missing

INK, MUTED, GRID = "#1d2733", "#8492a2", "#e4e8ed"
METHOD_COLORS = ("#1f5fd1", "#c2410c", "#0f8a6d", "#8a2bb5", "#b58900", "#0b7285", "#d6336c", "#5c5f66")
BASELINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (4, 1.5, 1, 1.5)), (0, (2, 2)), "-")
KIND_TITLES = {
    "remove_highest": "without the highest\n(lower is better)",
    "remove_lowest": "without the lowest\n(higher is better)",
    "keep_highest": "on the highest alone\n(higher is better)",
    "keep_lowest": "on the lowest alone\n(lower is better)",
}


@dataclass(frozen=True)
class Column:
    """One number of a record, to be drawn.

    Attributes:
        key: of the rows; `key`_low and `key`_high, or plain low and high, are its interval.
        title: of the axis.
        chance: where nothing is known; None without such a place.
    """

    key: str
    title: str
    chance: float | None = None


COLUMNS: dict[str, tuple[Column, ...]] = {
    "lds": (Column("lds", "linear datamodelling score", 0.0), Column("beyond_size", "beyond the size of subsets", 0.0)),
    "leave_one_out": (Column("spearman", "rank correlation with leaving out", 0.0),),
    "mislabel": (Column("auroc", "AUROC of wrong labels", 0.5),),
    "planted": (Column("mrr", "mean reciprocal rank"), Column("recall@1", "recall at 1")),
    "tail_patch": (Column("change", "change of log p by one step", 0.0),),
    "signs": (
        Column("agreement", "share of signs that stay", 0.5),
        Column("agreement_top", "of the largest tenth", 0.5),
    ),
}
"""Evaluation -> what is drawn of it; curves have a picture of their own."""


def is_method(name: str, methods: Sequence[str]) -> bool:
    """Return whether a row is of a method of the run, in whatever use, and not of a baseline."""
    plain = name.removeprefix("value, ").removeprefix("self, ").removesuffix(", own")
    return plain in methods


def interval_of(row: Row, key: str) -> tuple[float, float] | None:
    """Return the interval of a number, if it has one."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None and list(row)[1] == key:
        low, high = row.get("low"), row.get("high")
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def picture(record: Record, methods: Sequence[str]) -> bytes | None:
    """Draw an evaluation; None where a table says all.

    Args:
        record: what was found.
        methods: of the run; the others are baselines.
    """
    if record.name == "curves":
        return curves_picture({record.name: record.details}, methods)
    columns = [column for column in COLUMNS.get(record.name, ()) if any(column.key in row for row in record.rows)]
    if not columns:
        return None
    names = [str(row["method"]) for row in record.rows]
    figure = Figure(figsize=(9.2, 0.8 + 0.24 * len(names)), dpi=150, layout="constrained")
    for place, column in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), place + 1)
        _dots(axes, record.rows, column, methods)
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_color(METHOD_COLORS[0] if is_method(name, methods) else INK)
    return _png(figure)


def _dots(axes: Axes, rows: Sequence[Row], column: Column, methods: Sequence[str]) -> None:
    """Draw one number of all rows, first row on top."""
    _plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    if column.chance is not None:
        axes.axvline(column.chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for place, row in enumerate(rows):
        value = row.get(column.key)
        if not isinstance(value, int | float):
            continue
        color = METHOD_COLORS[0] if is_method(str(row["method"]), methods) else MUTED
        ends = interval_of(row, column.key)
        if ends is not None:
            axes.plot(ends, (place, place), color=color, linewidth=2.6, alpha=0.35, solid_capstyle="round")
        axes.plot((value,), (place,), "o", color=color, markersize=5.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(column.title, color=INK, fontsize=9)


def curves_picture(tasks: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> bytes:
    """Draw removal and selection curves.

    Args:
        tasks: name -> details of a record of curves; a row of panels each, titled when there are several.
        methods: of the runs.
    """
    kinds = list(dict.fromkeys(kind for details in tasks.values() for curves in details.values() for kind in curves))
    figure = Figure(figsize=(9.2, 0.9 + 2.9 * len(tasks)), dpi=150, layout="constrained")
    names = list(dict.fromkeys(name for details in tasks.values() for name in details))
    styles = _styles(names, methods)
    for row, (task, details) in enumerate(tasks.items()):
        for column, kind in enumerate(kinds):
            if not any(kind in curves for curves in details.values()):
                continue
            axes = figure.add_subplot(len(tasks), len(kinds), 1 + row * len(kinds) + column)
            _plain(axes)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for name in sorted(details, key=lambda name: is_method(name, methods)):
                curve = details[name][kind]
                percent = [100 * fraction for fraction in curve["fractions"]]
                axes.plot(percent, curve["change"], **styles[name])
            title = KIND_TITLES[kind]
            axes.set_title(f"{task}: {title}" if len(tasks) > 1 else title, color=INK, fontsize=9)
            axes.set_xlabel("% of the examples", color=INK, fontsize=8)
            if column == 0:
                axes.set_ylabel("change of the log-odds", color=INK, fontsize=8)
    handles: dict[str, Artist] = {}
    for axes in figure.get_axes():
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    ordered = [name for name in names if name in handles]
    figure.legend(
        handles=[handles[name] for name in ordered],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    return _png(figure)


def _styles(names: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how each curve is drawn."""
    styles: dict[str, dict[str, Any]] = {}
    num_methods = num_baselines = 0
    for name in names:
        if is_method(name, methods):
            color = METHOD_COLORS[num_methods % len(METHOD_COLORS)]
            styles[name] = {"color": color, "linewidth": 2, "marker": "o", "markersize": 4, "zorder": 3}
            num_methods += 1
        elif name in BY_CHANCE:
            dashes = (2, 2) if name == BY_CHANCE[0] else (6, 2)
            styles[name] = {"color": INK, "linewidth": 1.3, "linestyle": (0, dashes), "zorder": 2}
        else:
            style = BASELINE_STYLES[num_baselines % len(BASELINE_STYLES)]
            styles[name] = {"color": MUTED, "linewidth": 1.3, "linestyle": style, "zorder": 1}
            num_baselines += 1
        styles[name]["label"] = name
    return styles


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
