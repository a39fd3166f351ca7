"""The command line. Every command is one stage or one question; all take a config or a run directory.

Heavy imports stand inside the commands, so that `--help` answers at once. Only cli*.py and console.py print:
results to stdout, progress and errors to stderr. Under `accelerate launch` the first rank alone prints.
"""

import json
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llmattrib import __version__, cli_evaluate, cli_jobs, cli_query, cli_report, cli_serve
from llmattrib.cli_options import Config, Debug, Overrides, Part, Quiet

if TYPE_CHECKING:
    from llmattrib.config import RunConfig

app = typer.Typer(
    name="llmattrib",
    help="Which training examples made a LoRA-tuned LLM say this?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(cli_evaluate.app, name="evaluate", rich_help_panel="Results")
app.command(rich_help_panel="Results")(cli_query.query)
app.command(rich_help_panel="Results")(cli_query.profile)
app.command(rich_help_panel="Results")(cli_report.report)
for command in (cli_jobs.submit, cli_jobs.status):
    app.command(rich_help_panel="On a cluster")(command)
app.command(rich_help_panel="Results")(cli_serve.serve)


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"llmattrib {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    pass


def _say(quiet: bool, *lines: str) -> None:
    if not quiet:
        for line in lines:
            typer.echo(line)


def _verb(is_reused: bool) -> str:
    return "kept" if is_reused else "wrote"


def _dropped(num_truncated: int, num_skipped: int) -> str:
    """Return what the overlong policy did, if anything."""
    counts = {"prompts cut to fit": num_truncated, "skipped as too long": num_skipped}
    return "".join(f", {count:,} {what}" for what, count in counts.items() if count)


def _next(command: str, target: str, overrides: list[str] | None) -> str:
    """Return the line that names the next command."""
    return "next: " + shlex.join(["llmattrib", command, target, *(overrides or [])])


def _next_query(run: "RunConfig", target: str, overrides: list[str] | None) -> str:
    """Return the line that names a query; with a method where this run was not reduced by the default one."""
    methods = run.reduce.methods
    method = [] if run.query.method in methods else ["--method", methods[0]]
    return _next("query", target, [*(overrides or []), *method]) + ' --prompt "..."'


def _load(target: str, overrides: list[str] | None) -> "RunConfig":
    from llmattrib.config import load_config

    return load_config(target, overrides or ())


@app.command(rich_help_panel="Stages")
def train(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Fine-tune a LoRA adapter, or several (skip this when you bring your own)."""
    from llmattrib import console

    with console.reporting(debug):
        _train(_load(config, overrides), quiet)
        _say(quiet, _next("build", config, overrides))


def _train(run: "RunConfig", quiet: bool) -> None:
    from llmattrib import console
    from llmattrib.train import train_adapter

    with console.bar("train, sequences", show=not quiet) as progress:
        result = train_adapter(run, progress)
    others = f" and {len(result.paths) - 1} more" if len(result.paths) > 1 else ""
    losses = f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    _say(
        quiet,
        f"{_verb(result.reused)} {result.path}{others}: {result.num_examples:,} examples"
        f"{_dropped(result.num_truncated, result.num_skipped)}, {result.num_steps:,} steps, {losses}, "
        f"{result.seconds:.1f} s",
    )


@app.command(rich_help_panel="Stages")
def build(
    config: Config, overrides: Overrides = None, part: Part = None, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Compute the gradient features of every training example. Goes on where a stopped build ended.

    Examples added at the end of the data since are appended; those that are there are not computed again.
    """
    from llmattrib import console

    with console.reporting(debug):
        if _build(_load(config, overrides), quiet, part):
            _say(quiet, _next("reduce", config, overrides))


def _build(run: "RunConfig", quiet: bool, part: str | None = None) -> bool:
    """Build on all ranks and say what was done; return whether the next stage can follow, on the first."""
    from llmattrib import console, lock
    from llmattrib.build import build_features
    from llmattrib.distributed import ranks

    mine, team = None if part is None else lock.Part.parse(part), ranks()
    with console.bar("build, examples", show=team.is_main and not quiet) as progress:
        result = build_features(run, team, progress, mine)
    if team.is_main:
        for store in (result, *filter(None, [result.words])):
            _say(
                quiet,
                f"{_verb(store.num_shards_done == 0)} {store.path}: {store.num_examples:,} examples"
                f"{f' ({store.num_appended:,} of them new)' if store.num_appended else ''}"
                f"{_dropped(store.num_truncated, store.num_skipped)}, {store.num_tokens:,} tokens, "
                f"{store.num_shards_done} of {store.num_shards} shards computed now"
                f"{f' ({mine})' if mine else ''}, {store.seconds:.1f} s",
            )
    return team.is_main and mine is None


@app.command(rich_help_panel="Stages")
def retrain(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Fine-tune sub-models on random subsets of the examples, for AME and `evaluate`. Resumes; needs no features."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.distributed import ranks
        from llmattrib.retrain import retrain as train_subsets

        loaded, team = _load(config, overrides), ranks()
        with console.bar("retrain, sub-models", show=team.is_main and not quiet) as progress:
            result = train_subsets(loaded, team, progress)
        if team.is_main:
            _say(
                quiet,
                f"{_verb(result.num_done == 0)} {result.path}: {result.num_subsets:,} subsets ({result.design}), "
                f"{result.num_seeds} seeds each, {result.num_queries:,} prompts; "
                f"{result.num_done:,} sub-models trained now, {result.seconds:.1f} s",
            )


@app.command(rich_help_panel="Stages")
def reduce(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Turn features into representers, one store for each method."""
    from llmattrib import console

    with console.reporting(debug):
        if _reduce(_load(config, overrides), quiet):
            _say(quiet, _next("index", config, overrides))


def _reduce(run: "RunConfig", quiet: bool) -> bool:
    from llmattrib import console
    from llmattrib.distributed import ranks
    from llmattrib.reduce import reduce_run

    team = ranks()
    with console.bar("reduce, steps", show=team.is_main and not quiet) as progress:
        results = reduce_run(run, team, progress)
    if team.is_main:
        for result in results:
            error = "" if result.sum_rule_error is None else f", sum-rule error {result.sum_rule_error:.1e}"
            ridge = "" if result.ridge is None else f", ridge {result.ridge:g}"
            bias = "" if result.certificate is None else f", {result.certificate}"
            line = f"{result.path}: {result.method}{ridge}{error}{bias}, {result.seconds:.1f} s"
            _say(quiet, f"{_verb(result.is_reused)} {line}", *(f"  {note}" for note in result.notes))
    return team.is_main


@app.command(rich_help_panel="Stages")
def index(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Index the representers for fast queries."""
    from llmattrib import console

    with console.reporting(debug):
        loaded = _load(config, overrides)
        _index(loaded, quiet)
        _say(quiet, _next_query(loaded, config, overrides))


def _index(run: "RunConfig", quiet: bool) -> None:
    from llmattrib import console
    from llmattrib.index import build_index

    for method in run.reduce.methods:
        with console.bar(f"index {method}, examples", show=not quiet) as progress:
            result = build_index(run, method, progress)
        size = f"{result.num_rows:,} x {result.dim:,}, {result.num_bytes / 1e6:,.1f} MB"
        _say(quiet, f"{_verb(result.is_reused)} {result.path}: {result.kind}, {size}, {result.seconds:.1f} s")


@app.command(rich_help_panel="Stages")
def run(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Do all stages, train to index; finished ones are kept. A given adapter (model.adapters) skips train."""
    from llmattrib import console

    with console.reporting(debug):
        loaded = _load(config, overrides)
        if not loaded.model.adapters:
            _train(loaded, quiet)
        _build(loaded, quiet)
        _reduce(loaded, quiet)
        _index(loaded, quiet)
        _say(quiet, _next_query(loaded, config, overrides))


@app.command(rich_help_panel="Start here")
def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with exact numbers.")] = False,
    debug: Debug = False,
) -> None:
    """Compute FLOPs, memory, storage and hours of a run from its config alone, and of 10^6 to 10^9 examples."""
    from llmattrib import console

    with console.reporting(debug):
        loaded = _load(config, overrides)
        from llmattrib.plan.run import plan_run

        with redirect_stdout(sys.stderr):
            planned = plan_run(loaded)
        if as_json:
            typer.echo(json.dumps(asdict(planned)))
        else:
            console.print_plan(planned)


@app.command(rich_help_panel="Results")
def values(
    config: Config,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Examples of either end to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Value every training example over a validation set (values.data); write CSV and Parquet."""
    from llmattrib import console

    with console.reporting(debug):
        loaded = _load(config, overrides)
        from llmattrib.values.stage import compute_values

        with redirect_stdout(sys.stderr), console.bar("values", show=not quiet) as progress:
            result = compute_values(loaded, progress)
        if as_json:
            typer.echo(result.to_json(top))
            return
        signs = ", ".join(f"{result.count(sign):,} {sign}" for sign in ("helpful", "harmful", "undetermined"))
        due = "" if result.expected_total is None else f" (of {result.expected_total:+.3g})"
        _say(
            quiet,
            f"{_verb(result.is_reused)} {result.csv_path} and {result.parquet_path}: {result.method} values of "
            f"{len(result.values):,} examples in {result.utility} over {result.num_validation:,} prompts, "
            f"{result.seconds:.1f} s",
            f"  {signs}; sum {result.total:+.3g}{due}",
            *(f"  {note}" for note in result.notes),
        )
        if not quiet:
            console.print_values(result.lowest(top), result.highest(top))


@app.command(rich_help_panel="Results")
def verify(
    config: Config,
    overrides: Overrides = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is broken: it will be computed again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Read all of a run, check it, and say what to run again. Exit code 1 when there is anything."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.verify import verify_run

        findings = verify_run(_load(config, overrides), [config, *(overrides or [])], repair=repair)
        if not console.print_findings(findings, repair, as_json=as_json):
            raise typer.Exit(1)


@app.command(rich_help_panel="Start here")
def demo(
    run_dir: Annotated[str, typer.Option(help="Where everything goes; finished stages are kept.")] = "runs/demo",
    seed: Annotated[int, typer.Option(min=0, help="Of the facts, the adapter and the sketch.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Teach a small real model 100 facts, ten of them wrong, and trace its answers. Four to seven CPU minutes."""
    from llmattrib import console

    with console.reporting(debug):
        from rich.console import Console

        from llmattrib.demo import run_demo
        from llmattrib.narration import ConsoleNarrator

        run_demo(run_dir, seed, ConsoleNarrator(Console(), quiet))


@app.command(rich_help_panel="Results")
def methods() -> None:
    """List the methods, what each needs and what it costs."""
    from llmattrib import console

    console.print_methods()


if __name__ == "__main__":
    main()
