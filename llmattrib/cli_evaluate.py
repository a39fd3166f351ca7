"""The commands `llmattrib evaluate ...`: how good the attributions of a run are."""

import json
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


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for each row.")]


def _add(name: str, text: str) -> None:
    """Add the command that runs one evaluation of suite.py and prints its rows."""

    @app.command(name.replace("_", "-"), help=text)
    def measure(
        config: Config, overrides: Overrides = None, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
    ) -> None:
        from llmattrib import console

        with console.reporting(debug):
            from llmattrib.config import load_config
            from llmattrib.evaluate.scores import RunScores
            from llmattrib.evaluate.suite import EVALUATIONS

            loaded = load_config(config, overrides or ())
            with redirect_stdout(sys.stderr), console.bar(f"evaluate {name}", show=not quiet) as progress:
                record = EVALUATIONS[name].measure(RunScores(loaded, progress), progress)
            console.print_evaluation(record.rows, () if quiet else record.notes, as_json=as_json)


for _name, _text in {
    "lds": "Linear datamodelling score of reduce's methods and of baselines against the sub-models of `retrain`.",
    "leave_one_out": "Rank correlation with training without each example: needs `retrain` with "
    "retraining.design=leave_out.",
    "curves": "Retrain without the examples ranked highest or lowest, or on the highest alone. Resumes.",
    "mislabel": "How well wrongly labelled examples are found: needs evaluate.mislabeled or "
    "evaluate.mislabeled_column.",
    "planted": "How often the example that taught an answer is ranked first: needs evaluate.source, a column of "
    "values.data.",
    "tail_patch": "What one more gradient step on the first examples of each prompt does to its answer: needs one "
    "adapter.",
    "signs": "Share of signs that stay when random halves of the examples are reduced again.",
}.items():
    _add(_name, _text)


@app.command()
def gold(
    config: Config, overrides: Overrides = None, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Cosine with further training of the final model, with and without examples: trains it. Resumes."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.distributed import ranks
        from llmattrib.evaluate.gold import gold_of_run
        from llmattrib.evaluate.scores import RunScores
        from llmattrib.further_training import train_further

        loaded, team = load_config(config, overrides or ()), ranks()
        show = team.is_main and not quiet
        with redirect_stdout(sys.stderr), console.bars(show=show) as bars:
            scores = RunScores(loaded, bars("validation features"))
            team.on_main(lambda: len(scores.table()))  # before the long part, so that what is missing is missed now
            examples = team.together(scores.require_training)
            train_further(loaded, team, bars("evaluate gold, trainings"), examples)
            if not team.is_main:
                return
            record = gold_of_run(scores)
        console.print_evaluation(record.rows, () if quiet else record.notes, as_json=as_json)


@app.command("all")
def every(
    config: Config,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="An evaluation to run; may be given several times.", show_default=False)
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="An evaluation to leave out; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each evaluation.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run every evaluation that this run has the truth for, and say why others are skipped."""
    from llmattrib import console

    with console.reporting(debug):
        from llmattrib.config import load_config
        from llmattrib.evaluate.scores import RunScores
        from llmattrib.evaluate.suite import EVALUATIONS, evaluate_all

        loaded = load_config(config, overrides or ())
        with redirect_stdout(sys.stderr), console.bars(show=not quiet) as bars:
            scores = RunScores(loaded, bars("validation features"))
            outcome = evaluate_all(scores, skip or (), lambda name: bars(f"evaluate {name}"), only or ())
        for record in outcome.records:
            if as_json:
                typer.echo(json.dumps({"evaluation": record.name, "rows": record.rows, "notes": record.notes}))
            else:
                typer.echo(f"\n{record.name}: {EVALUATIONS[record.name].question}")
                console.print_evaluation(record.rows, () if quiet else record.notes, as_json=False)
        for name, reason in outcome.skipped.items():
            typer.echo(f"skipped {name}: {reason}", err=as_json)
