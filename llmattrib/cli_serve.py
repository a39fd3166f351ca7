"""The command that answers queries over HTTP. Mounted in cli.py."""

from contextlib import suppress
from typing import Annotated

import typer

from llmattrib.cli_options import Config, Debug, Overrides


def serve(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="LLMATTRIB_TOKEN", help="What every query must bring.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Answer queries over HTTP, with a page to type them; the model stays loaded."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib import web
        from llmattrib.config import load_config
        from llmattrib.query import Run

        loaded = load_config(config, overrides or ())
        web.check_access(host, token)
        with web.bind(host, port) as place:
            run = Run(loaded)
            run.load()
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"serving {run.config.run_dir} at http://{shown}:{place.getsockname()[1]}/ (Ctrl-C stops)")
            with suppress(KeyboardInterrupt):  # nothing is left unfinished
                web.serve(run, place, token)
