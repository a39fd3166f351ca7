"""The commands that ask a run: `llmattrib query` and `llmattrib profile`. Mounted in cli.py."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmattrib.cli_options import Config, Debug, Overrides, Quiet

if TYPE_CHECKING:
    from llmattrib.hits import Query
    from llmattrib.sections import DataConfig


Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="What the model was asked.")]
Completion = Annotated[
    str | None, typer.Option("--completion", "-c", help="Its answer; the model generates one when left out.")
]


def _queries(data: "DataConfig", prompt: str | None, completion: str | None, prompts: Path | None) -> "list[Query]":
    """Return what is asked."""
    from llmattrib.errors import ConfigError
    from llmattrib.hits import Query, check_queries, read_queries

    if completion is not None and not completion.strip():
        raise ConfigError("--completion is empty", expected="some text", fix="leave it out to have the model answer")
    if prompt is not None and prompts is None:
        queries = [Query.of(prompt, completion)]
        check_queries(queries)
        return queries
    if prompts is not None and prompt is None and completion is None:
        return read_queries(prompts, data)
    raise ConfigError(
        "what to ask is not clear",
        expected="--prompt with or without --completion, or --prompts alone",
        fix="completions of several prompts belong into the file of --prompts",
    )


def query(
    config: Config,
    overrides: Overrides = None,
    prompt: Prompt = None,
    completion: Completion = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON Lines of prompt and optional completion, instead of --prompt.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write JSON Lines to this file instead; a path or URL.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", "-k", min=1, help="Examples of either kind to show.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="May be given several times.", show_default=False)
    ] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="Recompute the first N with exact gradients (grad_dot, grad_cos, tracin_we).")
    ] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the words through which each example acts (tracin_we).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt and method.")] = False,
    debug: Debug = False,
) -> None:
    """Show the training examples that helped and hindered an answer most."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.hits import write_hits
        from llmattrib.storage import check_writable

        loaded = load_config(config, overrides or ())
        queries = _queries(loaded.data, prompt, completion, prompts)
        if output is not None:
            check_writable(output)
        # what can be wrong so far is said before the seconds that torch takes
        from llmattrib.query import Run

        opened = Run(loaded)
        chosen = opened.methods(method)
        with redirect_stdout(sys.stderr):  # libraries that log to stdout would spoil --json
            hits = opened.query_many(queries, top=top, methods=chosen, rerank=rerank, explain=explain)
        if output is not None:
            write_hits(hits, output)
            if not as_json:
                typer.echo(f"wrote {output}: {len(queries):,} prompts, {', '.join(chosen)}")
        elif as_json:
            for item in hits:
                typer.echo(item.to_json())
        else:
            for number, item in enumerate(hits):
                if number:
                    typer.echo()
                console.print_hits(item)


def profile(
    config: Config,
    example: Annotated[
        list[str], typer.Option("--example", "-e", help="Id of a training example; may be given several times.")
    ],
    overrides: Overrides = None,
    prompt: Prompt = None,
    completion: Completion = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON Lines of prompt and optional completion; their mean is shown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each example, all nodes.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where on the q-axis an example earns its Shapley value: beside few other examples, or beside nearly all."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config

        loaded = load_config(config, overrides or ())
        queries = _queries(loaded.data, prompt, completion, prompts)
        from llmattrib.query import Run

        with redirect_stdout(sys.stderr), console.bar("profile, nodes", show=not quiet) as progress:
            found = Run(loaded).q_profile(queries, example, progress).mean()
        if as_json:
            for row, name in enumerate(example):
                columns = {"values": found.values, "earned": found.earned}
                lists = {key: array[:, 0, row, 0].tolist() for key, array in columns.items()}
                typer.echo(json.dumps({"id": name, "q": found.q.tolist(), "weights": found.weights.tolist(), **lists}))
        else:
            shares = found.shares()
            console.print_profile(
                found.q.tolist(),
                {
                    name: (found.values[:, 0, k, 0].tolist(), shares[:, 0, k, 0].tolist())
                    for k, name in enumerate(example)
                },
            )
