"""The commands `llmattrib evaluate ...`: how good the attributions of a run are."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated

import typer

from llmattrib.cli_options import Config, Debug, Overrides, Quiet

app = typer.Typer(help="Measure how good the attributions of a run are.", no_args_is_help=True)


@app.command("sketch")
def sketch(
    config: Config,
    overrides: Overrides = None,
    dim: Annotated[
        list[int] | None, typer.Option(min=1, help="Width to try; may be given several times.", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option(min=3, help="Training examples to compare.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each width.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare sketched inner products with exact ones: the error below which no method can go."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.evaluate.sketch import DIMS, sketch_fidelity

        with redirect_stdout(sys.stderr), console.bar("evaluate sketch, examples", show=not quiet) as progress:
            rows = sketch_fidelity(load_config(config, overrides or ()), tuple(dim or DIMS), examples, progress)
        console.print_records([asdict(row) for row in rows], as_json=as_json)


@app.command()
def lds(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each method.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Linear datamodelling score of reduce's methods and of baselines against the sub-models of `retrain`."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.evaluate.lds import lds_of_run

        loaded = load_config(config, overrides or ())
        with redirect_stdout(sys.stderr), console.bar("evaluate lds, steps", show=not quiet) as progress:
            found = lds_of_run(loaded, progress)
        rows = [
            {"method": name, "lds": row.lds, "low": row.low, "high": row.high, "beyond_size": row.beyond_size}
            for name, row in found.items()
        ]
        console.print_records(rows, as_json=as_json)
