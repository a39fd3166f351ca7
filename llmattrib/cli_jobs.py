"""The commands that hand a run to Slurm: `submit` and `status`. Mounted in cli.py."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmattrib.cli_options import Config, Debug, Overrides

if TYPE_CHECKING:
    from llmattrib.slurm import Progress


def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of build.", show_default=False)] = None,
    array: Annotated[
        int | None, typer.Option(min=1, help="Jobs that share build, each on --nodes nodes.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="Processes a node of build; 0 for CPU nodes.", show_default=False)
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each job on each node.", show_default=False)
    ] = None,
    partition: Annotated[str | None, typer.Option(show_default=False)] = None,
    account: Annotated[str | None, typer.Option(show_default=False)] = None,
    time: Annotated[str | None, typer.Option(help="Limit of each job, e.g. 4:00:00.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until all jobs have ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and submit nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Do all stages as Slurm jobs, one after another. Options replace the slurm section of the config."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib import slurm
        from llmattrib.config import load_config

        loaded = load_config(config, overrides or ())
        given = {
            "nodes": nodes,
            "array": array,
            "gpus_per_node": gpus_per_node,
            "cpus_per_task": cpus_per_task,
            "partition": partition,
            "account": account,
            "time": time,
        }
        chosen = loaded.slurm.model_copy(update={key: value for key, value in given.items() if value is not None})
        loaded = loaded.model_copy(update={"slurm": chosen})
        submissions = slurm.plan_jobs(loaded, config, overrides or ())
        if dry_run:
            before = None
            for item in submissions:
                typer.echo(item.shell(before))
                before = item.stage
            return
        jobs = slurm.submit(loaded, submissions)
        for job in jobs:
            typer.echo(f"{job.stage} {job.id}: {job.log}")
        typer.echo(f"next: llmattrib status {loaded.run_dir}")
        if wait:
            slurm.wait(jobs, typer.echo)


def status(
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show how many shards of a run are done, their rate, the time left, and its Slurm jobs."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib import slurm
        from llmattrib.config import load_config
        from llmattrib.layout import RunLayout

        layout = RunLayout(config) if Path(config).is_dir() else load_config(config).layout
        progress = slurm.watch(layout)
        if as_json:
            typer.echo(json.dumps(asdict(progress)))
            return
        typer.echo(_shards(progress))
        for job in progress.jobs:
            reason = f" ({job['reason']})" if job["reason"] else ""
            typer.echo(f"{job['stage']} {job['id']}: {job['state']}{reason}, {job['log']}")


def _shards(progress: "Progress") -> str:
    if not progress.num_shards:
        return "build: no shards yet"
    text = f"build: {progress.num_shards_done:,} of {progress.num_shards:,} shards"
    if progress.rows_per_second is not None and progress.seconds_left:
        text += f", {progress.rows_per_second:,.3g} examples/s, {_duration(progress.seconds_left)} left"
    if progress.seconds_since is not None:
        text += f"; the newest {_duration(progress.seconds_since)} ago"
    return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
