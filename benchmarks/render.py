"""Write docs/benchmarks.md and its plots from benchmarks/results/*.json. Nothing on the page's tables is typed by hand.

    python -m benchmarks.render

The text of the page is kept; what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is replaced by the table
of that name.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _stage_tables
from benchmarks._pages import fill

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
PLOTS = {"fidelity": PAGE.parent / "fidelity.png", "features": PAGE.parent / "features.png"}
LABELS = {
    "gemm": "the matrix products of the base model alone",
    "plain": "plain forward + backward (the limit)",
    "ours_init": "**llmattrib**, `init`",
    "ours_trained": "**llmattrib**, `trained`",
    "untuned_trained": "**llmattrib**, `trained`, products in the order of their formulas",
    "batch_of_one": "autograd, one example at a time, not projected",
    "less": "the same, projected to 4,096 dimensions as LESS does",
    "bergson_p16": "bergson, 16 x 16 a module (its default)",
    "bergson_p8": "bergson, 8 x 8 a module",
    "bergson_p3": "bergson, 3 x 3 a module (as many dimensions as ours)",
    "bergson_p0": "bergson, not projected",
    "bergson_joint": "bergson, all entries to 4,096 dimensions as ours",
    "dattri_p8": "dattri LoGra, 8 x 8 a module",
    "kronfluence": "kronfluence, gradients and their norms only",
    "traker": "traker, dense projection to 4,096 dimensions",
}
TITLES = {
    "tiny_r8": "Llama of 1M parameters, LoRA rank 8",
    "tiny_r16": "Llama of 1M parameters, LoRA rank 16",
    "smollm2_r8": "SmolLM2-135M, LoRA rank 8",
    "smollm2_r16": "SmolLM2-135M, LoRA rank 16",
    "smollm2_r8_joint": "SmolLM2-135M, LoRA rank 8, one projection of all entries",
}
STAGES = {"model": "forward and backward", "products": "gradients of the examples", "sketch": "sketch and norms"}
SKETCHES = {
    "float16": "ours, float16",
    "int8": "ours, int8",
    "int4": "ours, int4",
    "equal": "float16, equal widths",
    "size": "float16, widths by size",
    "joint": "float16, one block",
    "bergson": "bergson, p x p a module",
    "bergson_joint": "bergson, one projection",
}
WRITE_STEPS = {
    "whole": "whole",
    "quantise": "quantise, look for NaN",
    "crc32c": "crc32c",
    "checksum": "XXH3",
    "files": "two files, forced to disk",
    "record": "record",
}
READ_STEPS = {"whole": "whole", "file": "file", "crc32c": "crc32c", "rest": "convert, scale"}


def result(name: str) -> Any:
    """Read a result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def ratio_text(cell: dict[str, Any] | None) -> str:
    """Render a median ratio and its range."""
    return f"{cell['ratio']:.2f} ({cell['range'][0]:.2f}-{cell['range'][1]:.2f})" if cell else ""


def features(found: dict[str, Any]) -> str:
    """Render feature building: a table a case."""
    lines = []
    for name, case in found["cases"].items():
        size = f"{case['examples']} examples, {case['tokens']:,} tokens"
        lines += [
            f"**{TITLES[name]}** ({size})",
            "",
            "| | tokens a CPU second | `init` over this | `trained` over this | rounds |",
            "|---|---|---|---|---|",
        ]
        for row, cell in case["rows"].items():
            ratios = [ratio_text(cell.get(f"{own}_over_this")) for own in ("ours_init", "ours_trained")]
            lines.append(
                f"| {LABELS[row]} | {cell['tokens_per_cpu_second']:,.0f} | {' | '.join(ratios)} | {cell['rounds']} |"
            )
        lines.append("")
        for point, shares in case.get("shares", {}).items():
            parts = [f"{STAGES[stage]} {100 * max(share, 0):.0f} %" for stage, share in shares.items()]
            lines += [f"Of the time of `{point}`: {', '.join(parts)}.", ""]
    return "\n".join(lines)


def range_text(cell: dict[str, Any]) -> str:
    """Render the range of an error over seeds."""
    return f" ({cell['range'][0]:.3f}-{cell['range'][1]:.3f})"


def fidelity(found: dict[str, Any]) -> str:
    """Render the errors of inner products: a table a linearisation point."""
    lines = []
    for point, cases in found["points"].items():
        size = f"{cases['gradient_dim']:,} entries in {cases['blocks']} blocks"
        what = f"{cases['examples']} examples of {size}; widths by {cases['calibrated_on']} other examples"
        sizes = list(cases["kilobytes"])
        lines += [
            f"**`{point}`** ({what}; relative error, then rank correlation, means of {cases['seeds']} seeds)",
            "",
            "| | " + " | ".join(f"{size} KB" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for name, label in SKETCHES.items():
            cells = [cases["kilobytes"][size].get(name) for size in sizes]
            if any(cells):
                texts = [f"{cell['frobenius_error']:.3f}; {cell['spearman']:.3f}" if cell else "" for cell in cells]
                fewer = {cell["seeds"] for cell in cells if cell and "seeds" in cell} - {cases["seeds"]}
                label += "".join(f" ({seeds} seeds)" for seeds in fewer)
                lines.append(f"| {label} | " + " | ".join(texts) + " |")
        lines.append("")
    lines += [
        "| relative error (range over seeds) at dimensions | float32 | float16 | int8 | bergson, one projection |",
        "|---|---|---|---|---|",
    ]
    for point, cases in found["points"].items():
        theirs = [cells["bergson_joint"] for cells in cases["kilobytes"].values() if "bergson_joint" in cells]
        for dim, cells in cases["rounding"].items():
            texts = [f"{cell['frobenius_error']:.4f}" for cell in cells.values()]
            texts[0] += range_text(cells["float32"])
            texts += [
                f"{cell['frobenius_error']:.4f}{range_text(cell)}" for cell in theirs if cell["dim"] == int(dim)
            ] or [""]
            lines.append(f"| `{point}`, {int(dim):,} | " + " | ".join(texts) + " |")
    lines.append("")
    return "\n".join(lines)


def store(found: dict[str, Any]) -> str:
    """Render bandwidths, their ratio to the memmap's, and what a shard and a store of many take."""
    lines = [
        f"Shards of 256 rows of {found['dim']:,}; MB of rows a CPU second, and how many times as long the others take",
        "",
        "| | | MB/s | memmap that converts | its wall time | memmap that copies bytes | zarr | without torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dtype, case in found["bandwidth"].items():
        for name, peers in case["times_as_long"].items():
            columns = [("numpy", "cpu"), ("numpy", "wall"), ("bytes", "cpu"), ("zarr", "cpu"), ("without_torch", "cpu")]
            cells = [ratio_text(peers[peer][clock]) if peer in peers else "" for peer, clock in columns]
            label = "read ahead" if name == "blocks" else name
            lines.append(f"| {dtype} | {label} | {case['mb_per_second']['cpu'][name]:,} | " + " | ".join(cells) + " |")
    if cold := found["cold_wall_seconds"]:
        took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in cold.items())
        lines += ["", f"From a cold cache, float32, with 10 ms of work after each shard: {took}."]
    for name, steps in (("write", WRITE_STEPS), ("read", READ_STEPS)):
        lines += [
            "",
            f"| CPU ms to {name} a shard | " + " | ".join(steps.values()) + " |",
            "|---" * (1 + len(steps)) + "|",
        ]
        for dtype, case in found["shard_cpu_milliseconds"].items():
            lines.append(f"| {dtype} | " + " | ".join(f"{case[name][step]:.2f}" for step in steps) + " |")
    lines += ["", f"| of {found['shards']:,} shards | CPU s | wall s |", "|---|---|---|"]
    times = found["milliseconds"]
    for case in ("open_warm", "open_cold", "digest_warm", "digest_cold"):
        if f"{case}_cpu" in times:
            name, _, cache = case.partition("_")
            cells = [f"{times[f'{case}_{clock}'] / 1e3:.2f}" for clock in ("cpu", "wall")]
            lines.append(f"| {name}, {cache} cache | " + " | ".join(cells) + " |")
    lines += ["", "| zstd, level 1 | bytes kept | encodes, MB/s | decodes, MB/s |", "|---|---|---|---|"]
    for dtype, case in found["zstd"].items():
        lines.append(f"| {dtype} | {case['kept']:.1%} | {case['encode_mb_s']:,} | {case['decode_mb_s']:,} |")
    lines += ["", f"Load of the machine before: {found['load_before']['bandwidth']}, on two cores."]
    return "\n".join(lines) + "\n\n"


SECTIONS: dict[str, Callable[[Any], str]] = {
    "features": features,
    "fidelity": fidelity,
    "store": store,
    "kernel_game": _stage_tables.kernel,
    "end_to_end": _stage_tables.end_to_end,
    "query": _stage_tables.search,
    "memory": _stage_tables.memory,
    "durations": _stage_tables.durations,
}
"""Sections by the name of their marks and of their result."""


def marks(name: str) -> tuple[str, str]:
    """Return the lines around a table."""
    return f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"


def plot_fidelity(found: dict[str, Any]) -> None:
    """Draw error against bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found["points"]), figsize=(9, 3.6), sharey=True, squeeze=False)
    for axis, (point, cases) in zip(axes[0], found["points"].items(), strict=True):
        for name, style in (("bergson", "s--"), ("bergson_joint", "^--"), ("float16", "o-"), ("int8", "o-")):
            cells = {int(size): row[name] for size, row in cases["kilobytes"].items() if name in row}
            axis.plot(list(cells), [cell["frobenius_error"] for cell in cells.values()], style, label=SKETCHES[name])
        axis.set(xscale="log", yscale="log", title=point, xlabel="KB an example")
    axes[0][0].set_ylabel("relative error of inner products")
    axes[0][-1].legend()
    save(figure, "fidelity")


def plot_features(found: dict[str, Any]) -> None:
    """Draw tokens a CPU second."""
    from matplotlib import pyplot

    cases = {name: case for name, case in found["cases"].items() if "joint" not in name}
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 3.6), squeeze=False)
    for axis, (name, case) in zip(axes[0], cases.items(), strict=True):
        rows = dict(reversed(case["rows"].items()))
        speeds = [cell["tokens_per_cpu_second"] for cell in rows.values()]
        colours = ["tab:orange" if row.startswith("ours") else "tab:grey" for row in rows]
        axis.barh(list(rows), speeds, color=colours)
        axis.set(title=TITLES[name], xlabel="tokens a CPU second")
    save(figure, "features")


def save(figure: Any, name: str) -> None:
    """Write a plot, the same bytes each time."""
    figure.tight_layout()
    figure.savefig(PLOTS[name], dpi=110, metadata={"Software": None})


def main() -> None:
    """Write the page."""
    for name, table in SECTIONS.items():
        begin, end = marks(name)
        fill(PAGE, begin, table(result(name)), end)
    plot_fidelity(result("fidelity"))
    plot_features(result("features"))


if __name__ == "__main__":
    main()
