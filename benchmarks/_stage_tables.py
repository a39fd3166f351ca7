"""Tables of docs/benchmarks.md about Shapley values, queries and memory."""

from typing import Any

from benchmarks import __main__ as every
from llmattrib.index_record import resolve_kind
from llmattrib.sections import IndexConfig

CASES = {
    "llama_1m": "Llama of 1M parameters",
    "smollm2": "SmolLM2-135M, LoRA in its last four layers",
}
STEPS = {
    "start": "start (imports)",
    "build": "features of {examples:,} examples, model loaded",
    "reduce": "Shapley representers, with the certificate",
    "index": "index",
    "loaded": "model, texts and index opened",
    "answers": "answers to {prompts:,} prompts",
    "prompt_features": "features of {prompts:,} prompts",
    "search": "{prompts:,} searches, {top} of either side, with texts",
}
GIVEN = ("reduce", "index", "search")
"""What is left once all features are there."""
FEWEST_SEARCHED = 100_000
"""Searches of fewer examples add next to nothing to a query."""
STAGES = {
    "train": "`train`",
    "build": "`build`",
    "reduce_influence": "`reduce`, `influence`",
    "reduce_streamed": "`reduce`, `shapley`, `streamed`",
    "reduce_memory": "`reduce`, `shapley`, in memory",
    "index_flat": "`index`, `flat`",
    "index_scan": "`index`, `scan`",
    "query_flat": "`query`, `flat`",
    "query_scan": "`query`, `scan`",
    "values": "`values` of `shapley`",
}


def kernel(found: dict[str, Any]) -> str:
    """Render what the estimators of the kernel game cost, and how near they come."""
    lines = ["| | examples | CPU seconds | relative error |", "|---|---|---|---|"]
    mean = found["mean_field_n5000_p512"]
    lines.append(
        f"| **mean field, total_gradient**: all representers, on two threads | {mean['num_players']:,} "
        f"| {mean['cpu_seconds']:.0f} | {mean['bias_at_most_95']:.1%} or less (95 %) |"
    )
    game = found["error_against_cost_n1000"]
    for row in game["rows"]:
        samples = f", {row['samples']:,}" if row["samples"] else ""
        lines.append(
            f"| {row['method']}{samples} | {game['num_players']:,} | {row['cpu_seconds']:.1f} "
            f"| {row['relative_error']:.1%} |"
        )
    for row in found["permutation_speedup"]["rows"]:
        for name, label in (("published", "published incremental inverse"), ("ours", "**ours**")):
            seconds = row["cpu_seconds_a_permutation"][name]
            lines.append(f"| one permutation, {label} | {row['num_players']:,} | {seconds:.2g} | the same values |")
    pydvl = found["pydvl_n500"]
    size = pydvl["root_mean_square_value"]
    for name, label in (("pydvl", "pyDVL"), ("permutation", "**ours**"), ("mean_field", "**mean field**")):
        row = pydvl[name]
        count = f", {row['num_permutations']} permutations" if "num_permutations" in row else ""
        lines.append(f"| one query, {label}{count} | 500 | {row['cpu_seconds']:.2g} | {row['error'] / size:.0%} |")
    return "\n".join(lines) + "\n"


def end_to_end(found: dict[str, Any]) -> str:
    """Render the stages of each case, their sum, and what of it does not depend on the model."""
    lines = []
    for name, case in found.items():
        lines += [f"**{CASES[name]}**", "", "| | CPU seconds | wall seconds |", "|---|---|---|"]
        stages = case["stages"]
        for stage, label in STEPS.items():
            wall = stages[stage].get("wall_seconds")
            lines.append(
                f"| {label.format(**case)} | {stages[stage]['cpu_seconds']:.1f} "
                f"| {'' if wall is None else f'{wall:.1f}'} |"
            )
        for label, names in (("everything", tuple(STEPS)), ("of this, given the features", GIVEN)):
            cpu = sum(stages[stage]["cpu_seconds"] for stage in names)
            wall = sum(stages[stage].get("wall_seconds", 0) for stage in names)
            lines.append(f"| **{label}** | {cpu:.1f} | {wall:.1f} |")
        lines += ["", f"Load of the machine before: {case['load_before']:.1f}.", ""]
    return "\n".join(lines)


def search(found: dict[str, Any]) -> str:
    """Render searches, what a warm query adds, and where a cold one goes."""
    lines = [
        "| rows | kind | search, ms | CPU ms | two threads, ms | recall@10 | recall@100 | build, CPU s | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["search"]["rows"]:
        recall = [f"{row[name]:.3f}" if name in row else "1" for name in ("recall_at_10", "recall_at_100")]
        two = f"{row['threads_2']['search_ms']:.1f}" if "threads_2" in row else "-"
        one = row["threads_1"]
        lines.append(
            f"| {row['rows']:,} | `{row['kind']}` | {one['search_ms']:.1f} | {one['search_cpu_ms']:.1f} | {two} "
            f"| {' | '.join(recall)} | {row['build_cpu_seconds']:,.0f} | {row['load_before']:.1f} |"
        )
    return "\n".join([*lines, "", *_warm(found), "", *_cold(found)]) + "\n"


def _warm(found: dict[str, Any]) -> list[str]:
    """Render what a warm query adds to forward and backward, and what searching more examples than its run has adds."""
    warm, dim = found["warm"], found["search"]["dim"]
    plain, (low, high) = warm["plain_cpu_seconds"], warm["added_range"]
    lines = [
        f"| a query of SmolLM2-135M, {warm['tokens']} tokens | CPU ms | adds |",
        "|---|---|---|",
        f"| forward and backward of its tokens | {1e3 * plain:.0f} | |",
        f"| **warm**, of a run with {warm['examples']:,} examples (median of {warm['rounds']} rounds, their range) "
        f"| {1e3 * warm['query_cpu_seconds']:.0f} | {warm['added']:.1%} ({low:.1%} to {high:.1%}) |",
    ]
    for row in found["search"]["rows"]:
        kind = resolve_kind(IndexConfig(), row["rows"], dim)
        if row["rows"] >= FEWEST_SEARCHED and row["kind"] in ("flat", kind):
            one = row["threads_1"]
            milliseconds = one.get("both_sides_cpu_ms", 2 * one["search_cpu_ms"])
            how = "both sides" if "both_sides_cpu_ms" in one else "two searches"
            default = ", the default" if row["kind"] == kind else ""
            lines.append(
                f"| and of {row['rows']:,} examples, `{row['kind']}`{default}: {how} "
                f"| {milliseconds:.1f} | {milliseconds / 1e3 / plain:.1%} more |"
            )
    return lines


def _cold(found: dict[str, Any]) -> list[str]:
    """Render where a query in a new process goes."""
    cold = found["cold"]
    parts = cold["profile_cpu_seconds"]
    total = sum(parts.values())
    imports = sum(seconds for part, seconds in parts.items() if part.startswith("import"))
    return [
        "| a query in a new process | CPU seconds |",
        "|---|---|",
        f"| **cold**: the command | {cold['query_cpu_seconds']:.1f} |",
        *(f"| - {part} | {seconds:.2f} |" for part, seconds in parts.items()),
        f"| these parts together, {imports / total:.0%} of them imports | {total:.1f} |",
        f"| `llmattrib --help` | {cold['help_cpu_seconds']:.2f} |",
    ]


def memory(found: dict[str, Any]) -> str:
    """Render peak memory against the number of examples."""
    sizes = list(next(iter(found["stages"].values())))
    lines = [
        "| peak memory, MB | " + " | ".join(f"{int(size):,} examples" for size in sizes) + " | of it imports "
        "| bytes an example more |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    missing = [label for name, label in STAGES.items() if name not in found["stages"]]
    for name, label in STAGES.items():
        if label in missing:
            continue
        row = found["stages"][name]
        peaks = " | ".join(f"{row[size]['peak_bytes'] / 1e6:,.0f}" if size in row else "-" for size in sizes)
        last_but_one, last = list(row)[-2:]  # below, batches of every length have not been seen yet
        grown = (row[last]["peak_bytes"] - row[last_but_one]["peak_bytes"]) / (int(last) - int(last_but_one))
        lines.append(f"| {label} | {peaks} | {row[last]['imported_bytes'] / 1e6:,.0f} | {max(grown, 0):,.0f} |")
    lines += ["", f"Not measured yet: {'; '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def durations(found: dict[str, Any]) -> str:
    """Render what each benchmark took, and which have not been timed."""
    lines = ["| `ROWS=` | CPU minutes | wall minutes |", "|---|---|---|"]
    lines += [f"| `{name}` | {took['cpu_minutes']:.1f} | {took['wall_minutes']:.1f} |" for name, took in found.items()]
    missing = [f"`{name}`" for name in every.names() if name not in found]
    lines += ["", f"Not timed yet: {', '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"
