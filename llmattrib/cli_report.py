"""The command `llmattrib report`: everything that was measured of a run, on one page."""

import typer

from llmattrib.cli_options import Config, Debug, Overrides, Quiet


def report(config: Config, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write run_dir/report.html: what `evaluate` and `values` found, with pictures, in one file. Needs matplotlib."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.report.page import write_report

        path = write_report(load_config(config, overrides or ()))
        if not quiet:
            typer.echo(f"wrote {path}")
