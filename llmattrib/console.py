"""What the command line shows: errors in three parts, progress bars, tables of hits and methods.

Progress and errors go to stderr, results to stdout, so that `--json` can be piped. Text from data sets is shown with
control characters replaced, so a training example cannot drive the terminal. Knows nothing of models or stores.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from llmattrib.catalogue import METHOD_NOTES, VALUES_NOTES
from llmattrib.errors import LlmattribError, StoppedError
from llmattrib.hits import Explanation, Hit, Hits
from llmattrib.progress import Progress, silent
from llmattrib.signals import EXIT_CODE as STOPPED

if TYPE_CHECKING:
    from llmattrib.plan.run import Plan
    from llmattrib.verify import Finding

EXIT_CODE = 2
INTERRUPTED = 130
MIN_TEXT_WIDTH = 20
SHOWN_WORDS = 6


def print_error(error: LlmattribError, console: Console) -> None:
    """Print what was found, what was expected and what to do."""
    kind = ("stopped: ", "bold yellow") if isinstance(error, StoppedError) else ("error: ", "bold red")
    console.print(Text.assemble(kind, printable(error.found, keep_newlines=True)))
    for label, part in (("expected: ", error.expected), ("to fix: ", error.fix)):
        if part:
            console.print(Text.assemble("  ", (label, "bold"), printable(part, keep_newlines=True)))


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn an error the package raised on purpose into a message and exit code; any other one is a bug and passes.

    Args:
        debug: print the traceback too.
    """
    try:
        yield
    except LlmattribError as error:
        console = Console(stderr=True)
        if debug:
            console.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
        print_error(error, console)
        raise typer.Exit(STOPPED if isinstance(error, StoppedError) else EXIT_CODE) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("\nStopped. What was finished is kept: the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None


def print_findings(findings: Sequence["Finding"], is_repaired: bool, *, as_json: bool) -> bool:
    """Print what is wrong with a run and, at the end, the commands that make it right, each once.

    Returns:
        Whether the run is sound now.
    """
    console = Console()
    left = [finding for finding in findings if not (is_repaired and finding.is_leftover)]
    if as_json:
        tree = {"is_sound": not left, "is_repaired": is_repaired, "findings": [vars(finding) for finding in findings]}
        typer.echo(json.dumps(tree))
        return not left
    for finding in findings:
        place = finding.place
        if finding.shards is not None:
            first, last = finding.shards
            place += f", shard {first}" if first == last else f", shards {first} to {last}"
        if finding.rows is not None:
            place += f" (rows {finding.rows[0]} to {finding.rows[1] - 1})"
        state = " [removed]" if is_repaired and finding.removable else ""
        console.print(Text.assemble((printable(place), "bold"), ": ", printable(finding.what), state), soft_wrap=True)
    if not left:
        console.print("sound: every checksum, fingerprint and number of rows is right")
        return True
    is_repairable = not is_repaired and any(finding.removable for finding in findings)
    console.print("to run:" if not is_repairable else "to run, after this command with --repair:")
    for command in dict.fromkeys(finding.rerun for finding in left if not finding.is_leftover):
        console.print(Text(f"  {printable(command)}"), soft_wrap=True)
    return False


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s" if speed < 100 else f"{speed:,.0f}/s", style="cyan")


@contextmanager
def bar(description: str, *, show: bool) -> Iterator[Progress]:
    """Show a progress bar with rate and time left on stderr while a stage runs.

    Args:
        description: what is counted, e.g. "build, examples".
        show: false gives a silent callback; so does a stderr that is no terminal.

    Yields:
        The callback to give to the stage.
    """
    with bars(show=show) as add:
        yield add(description)


@contextmanager
def bars(*, show: bool) -> Iterator[Callable[[str], Progress]]:
    """Show progress bars on stderr, one for each description that the yielded function is called with.

    Args:
        show: false gives silent callbacks; so does a stderr that is no terminal.
    """
    if not show or not sys.stderr.isatty():
        yield lambda _: silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as progress:

        def add(description: str) -> Progress:
            task = progress.add_task(description, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield add


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """Return `text` with control characters, and newlines unless kept, replaced by a blank."""
    return "".join(c if c.isprintable() or (keep_newlines and c == "\n") else " " for c in text)


def example_text(prompt: str, completion: str, width: int) -> Text:
    """Return `prompt → completion` in at most `width` cells, the completion marked.

    The completion keeps at least half of the room it needs; the prompt loses its beginning, which examples of a data
    set often share.
    """
    prompt, completion = " ".join(printable(prompt).split()), " ".join(printable(completion).split())
    tail = Text(completion, style="bold underline")
    room = max(width, MIN_TEXT_WIDTH) - 3
    head = Text(prompt)
    if head.cell_len + tail.cell_len > room:
        tail.truncate(max(room // 2, room - head.cell_len), overflow="ellipsis")
        cells = room - tail.cell_len
        while head.cell_len > cells:
            head = Text("…" + head.plain.removeprefix("…")[max(1, head.cell_len - cells) :])
    return Text.assemble(head, (" → ", "dim"), tail)


def print_hits(hits: Hits) -> None:
    """Print the tables of the most helpful and the most harmful examples of one query."""
    console = Console()
    width = console.width
    asked = example_text(hits.prompt, hits.completion, width - len(hits.origin) - 3)
    console.print(asked, f"[dim]({hits.origin})[/dim]", highlight=False)
    shares = "shares of the sum of |value|" + ("" if hits.shares_exact else ", estimated from a sample")
    console.print(
        f"[bold]{hits.method}[/bold]{', exact gradients' if hits.reranked else ''}: "
        f"values of {hits.num_examples:,} examples sum to {hits.total:+.3g}; {shares}",
        highlight=False,
    )
    for title, style, rows in (("helpful", "green", hits.helpful), ("harmful", "red", hits.harmful)):
        if rows and rows[0].explanation is not None:
            console.print(Text(f"Most {title}", style=f"bold {style}"))
            for hit in rows:
                _print_explained(console, hit, hit.explanation, style)
        elif rows:
            console.print(_hits_table(f"Most {title}", style, rows, width))
        else:
            console.print(f"No {title} examples.")


def _hits_table(title: str, style: str, rows: Sequence[Hit], width: int) -> Table:
    table = Table(title=title, title_style=f"bold {style}", title_justify="left", box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("value", justify="right", style=style)
    table.add_column("share", justify="right")
    id_width = min(max(len("id"), *(cell_len(printable(hit.id)) for hit in rows)), max(width // 4, 8))
    table.add_column("id", width=id_width, no_wrap=True, overflow="ellipsis")
    table.add_column("example", no_wrap=True, overflow="ellipsis")
    used = 2 * 4 + max(len(str(len(rows))), 1) + 9 + 6 + id_width
    for hit in rows:
        text = example_text(hit.prompt, hit.completion, width - used)
        table.add_row(str(hit.rank), f"{hit.value:+.3g}", f"{hit.share:+.1%}", Text(printable(hit.id)), text)
    return table


def _print_explained(console: Console, hit: Hit, explanation: Explanation | None, style: str) -> None:
    """Print an example with its words coloured by their values, and the values of the strongest."""
    assert explanation is not None
    console.print(Text.assemble(f"{hit.rank:>2}  ", (f"{hit.value:+.3g}", style), f"  {printable(hit.id)}"))
    largest = max((abs(value) for _, value in explanation.words), default=0.0)
    (answer, worth), *rest = explanation.completion or (("", 0.0),)
    pieces = [
        Text.assemble(*((printable(text), word_style(value, largest)) for text, value in part))
        for part in (explanation.prompt, ((answer.lstrip(), worth), *rest))
    ]
    text = Text.assemble(pieces[0], (" → ", "dim"), pieces[1])
    console.print(Padding(text, (0, 0, 0, 4)))
    shown = [
        Text.assemble(f"{printable(word).strip()} ", (f"{value:+.2g}", word_style(value, largest)))
        for word, value in explanation.words[:SHOWN_WORDS]
    ]
    left = len(explanation.words) - len(shown)
    through = Text(", ").join(shown) if shown else Text("no word that both have")
    console.print(Padding(Text.assemble(("through ", "dim"), through, f", {left} more" if left else ""), (0, 0, 0, 4)))


def word_style(value: float, largest: float) -> str:
    """Return the colour of a word: green where it helps and red where it harms, strong from half of the largest on."""
    if value == 0 or largest == 0:
        return ""
    colour = "green" if value > 0 else "red"
    return f"bold {colour}" if abs(value) >= largest / 2 else colour if abs(value) >= largest / 20 else ""


def print_values(lowest: Sequence[Hit], highest: Sequence[Hit]) -> None:
    """Print the examples of the lowest and of the highest values."""
    console = Console()
    for title, style, rows in (("Highest values", "green", highest), ("Lowest values", "red", lowest)):
        console.print(_hits_table(title, style, rows, console.width))


def print_methods() -> None:
    """Print the tables of methods."""
    caption = "n examples, p dimensions of the sketch"
    for title, notes in (
        ("reduce.methods: representers, asked by `query`", METHOD_NOTES),
        ("values.method: these too, over a validation set", VALUES_NOTES),
    ):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption=caption)
        table.caption_justify = "left"
        for heading in ("method", "value of an example", "needs", "cost", "do not trust it when"):
            table.add_column(heading, style="bold" if heading == "method" else "", no_wrap=heading == "method")
        for method, row in notes.items():
            table.add_row(method, *row)
        Console().print(table)


def _print_whole(table: Table) -> None:
    """Print a table of numbers as wide as it is: lines that wrap can be read, numbers that are cut cannot."""
    console = Console()
    endless = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, endless, table).maximum)
    console.print(table)


def print_profile(q: Sequence[float], columns: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Print values along the q-axis.

    Args:
        q: the nodes.
        columns: example -> value at each node, share of its Shapley value earned below each node.
    """
    table = Table(box=None, pad_edge=False, caption="share: part of the Shapley value earned below q")
    table.add_column("q", justify="right")
    for name in columns:
        table.add_column(Text(f"{printable(name)}: value at q"), justify="right")
        table.add_column("share", justify="right")
    step = max(1, (len(q) - 1) // 16)
    for node in range(0, len(q), step):
        cells = (f(column[node]) for pair in columns.values() for f, column in zip((_value, _share), pair, strict=True))
        table.add_row(f"{q[node]:.4g}", *cells)
    _print_whole(table)


def _value(value: float) -> str:
    return f"{value:+.3g}"


def _share(share: float) -> str:
    return f"{share:.1%}"


def print_records(records: Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    """Print rows with the same keys as a table, or one JSON object a line."""
    if as_json:
        for record in records:
            typer.echo(json.dumps(record))
        return
    table = Table(box=None, pad_edge=False)
    for key in records[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for record in records:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in record.values()))
    _print_whole(table)


def print_evaluation(rows: Sequence[Mapping[str, object]], notes: Sequence[str], *, as_json: bool) -> None:
    """Print the rows of an evaluation, intervals in the cells of their numbers, and what to know of them."""
    print_records(rows if as_json else [_with_intervals(row) for row in rows], as_json=as_json)
    for note in () if as_json else notes:
        typer.echo(f"  {note}")


def _with_intervals(row: Mapping[str, object]) -> dict[str, object]:
    """Join `x`, `x_low` and `x_high`; plain `low` and `high` belong to the column before."""
    cells: dict[str, object] = {}
    last = ""
    for key, value in row.items():
        if key in ("low", f"{last}_low"):
            cells[last] = f"{_cell(cells[last])} ({_cell(value)}"
        elif key in ("high", f"{last}_high"):
            cells[last] = f"{cells[last]} .. {_cell(value)})"
        else:
            cells[last := key] = value
    return cells


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_plan(plan: "Plan") -> None:
    """Print what a run takes: its sizes, then what other numbers of examples would take."""
    console, shape, tokens, memory = Console(), plan.shape, plan.tokens, plan.memory
    source = "counted" if plan.tokens_are_exact else "stated in plan"
    batch = f"{plan.batch.num_examples:,} x {plan.batch.width:,} tokens"
    build = ", ".join(f"{part} {flops:.2e}" for part, flops in plan.flops.items())
    rows = {
        "model": f"{plan.name}: {shape.architecture}, {shape.num_parameters:,} parameters, {_bytes(memory.weights)}",
        "gradient": f"{plan.gradient_dim:,} entries in {len(shape.blocks):,} LoRA factors, kept as {plan.feature_dim:,}"
        + (f" for each of {plan.num_outputs} outputs" if plan.num_outputs > 1 else ""),
        "tokens": f"{tokens.num_tokens:,} in {tokens.num_examples:,} examples ({source}); {tokens.padded:,} with "
        f"padding, {tokens.completion:,} to predict",
        "FLOPs": f"train {plan.train_flops:.2e}; build: {build}",
        "memory": f"one GPU {_bytes(memory.gpu)}; each of {plan.num_gpus} with ZeRO-3 {_bytes(memory.gpu_zero3)}; "
        f"CPU process {_bytes(memory.cpu)}",
        "of it": f"largest batch ({batch}) {_bytes(memory.batch)}, LoRA {_bytes(memory.lora)}, "
        f"sketch tables {_bytes(memory.sketch)}"
        + (f", curvature {_bytes(memory.curvature)}" if memory.curvature else ""),
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in rows.items():
        table.add_row(name, Text(printable(text)))
    console.print(table)
    for part in (_scale_table(plan), _reduce_table(plan)):
        console.print()
        _print_whole(part)
    console.print()
    console.print(
        f"Hours are of build on one device, for an efficiency of {plan.efficiency:g} of its dense peak "
        "(A100 312, H100 989, CPU of 16 cores 1.5 TFLOP/s): computed, not measured.",
        *(Text("Note: " + printable(note)) for note in plan.notes),
        sep="\n",
        highlight=False,
    )


def _scale_table(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for heading in ("examples", "tokens", "A100 h", "H100 h", "CPU h", "features"):
        table.add_column(heading, justify="right")
    table.add_column(f"representers x {plan.num_methods}", justify="right")
    table.add_column(f"index x {plan.num_methods}", justify="right")
    table.add_column("query FLOPs", justify="right")
    for scale in plan.scales:
        sizes = scale.features_bytes, plan.num_methods * scale.representers_bytes, plan.num_methods * scale.index_bytes
        table.add_row(
            f"{scale.num_examples:,}",
            f"{scale.num_tokens:.2g}",
            *(
                f"{scale.hours[device]:,.2g}" if scale.hours[device] < 10 else f"{scale.hours[device]:,.0f}"
                for device in scale.hours
            ),
            *map(_bytes, sizes),
            f"{scale.index_search_flops:.1e}",
        )
    return table


def _reduce_table(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("reduce: FLOPs, host memory")
    for scale in plan.scales:
        table.add_column(f"{scale.num_examples:,}", justify="right")
    for costs in zip(*(scale.reduce for scale in plan.scales), strict=True):
        form = " -> ".join(dict.fromkeys(cost["form"] for cost in costs if cost["form"]))
        name = costs[0]["method"] + (f" ({form})" if form else "")
        table.add_row(name, *(f"{cost['flops']:.1e}, {_bytes(cost['memory_bytes'])}" for cost in costs))
    return table


def _bytes(count: int) -> str:
    """Return a number of bytes in a decimal unit, three digits."""
    unit = next(unit for unit in (10**15, 10**12, 10**9, 10**6, 10**3, 1) if count >= unit or unit == 1)
    name = {10**15: "PB", 10**12: "TB", 10**9: "GB", 10**6: "MB", 10**3: "kB", 1: "B"}[unit]
    return f"{count / unit:,.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
