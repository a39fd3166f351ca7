"""The demo's story on a terminal."""

from contextlib import AbstractContextManager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmattrib.console import bar, example_text, printable
from llmattrib.demo import TFIDF, Scoreboard
from llmattrib.facts import Fact, Probe
from llmattrib.hits import Hits
from llmattrib.progress import Progress

SHOWN_HITS = 3
GROUPS = {
    "swapped": "wrong answer repeated",
    "held_out": "held-out, new words",
    "held_out_as_taught": "of these, as taught",
}


class ConsoleNarrator:
    """Tells the demo's story with Rich.

    Args:
        console: where to print.
        quiet: no progress bars.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet

    def say(self, text: str) -> None:
        """Print one paragraph."""
        self.console.print(text, markup=False, highlight=False)

    def stage(self, title: str, why: str) -> None:
        """Print a heading and the reason for it."""
        self.console.print()
        self.console.print(Text.assemble((title, "bold cyan"), "  ", (why, "dim")))

    def progress(self, description: str) -> AbstractContextManager[Progress]:
        """Show a bar while a stage runs."""
        return bar(description, show=not self.quiet)

    def hits(self, probe: Probe, fact: Fact, hits: Hits) -> None:
        """Print a prompt, the answer and the examples behind it, the teaching one marked."""
        self.console.print()
        self.console.print(example_text(probe.prompt, hits.completion, self.console.width))
        if fact.is_swapped:
            note = f"we taught {printable(fact.taught)!r}; the truth is {printable(fact.true)!r}"
            self.console.print(Text("  " + note, style="red"))
        for hit in hits.helpful[:SHOWN_HITS]:
            is_teacher = hit.row == probe.target
            lead = Text.assemble(
                ("  ✔ " if is_teacher else "    ", "bold green"), (f"{hit.value:+8.3f} {hit.share:+7.1%}  ", "green")
            )
            self.console.print(lead + example_text(hit.prompt, hit.completion, self.console.width - lead.cell_len))

    def scoreboard(self, scores: Scoreboard) -> None:
        """Print recall of every method beside tf-idf."""
        self.console.print()
        table = Table(
            title="Is the example that taught the answer ranked first?", title_justify="left", box=None, pad_edge=False
        )
        table.add_column("method")
        groups = next(iter(scores.methods.values()))
        for group, heading in GROUPS.items():
            table.add_column(f"{heading}\n{groups[group]['count']} prompts\nrecall@1 / @5", justify="right")
        for method, row in scores.methods.items():
            name = {scores.default_method: f"{method} (default)", TFIDF: "tf-idf (prompt + answer)"}.get(method, method)
            cells = [f"{row[group]['recall@1']:.2f} / {row[group]['recall@5']:.2f}" for group in GROUPS]
            table.add_row(name, *cells, style="bold" if method == scores.default_method else "")
        self.console.print(table)
        repeated = groups["swapped"]["count"]
        self.say(
            f"The model repeated the wrong answer in {repeated} of {scores.num_swapped_prompts} prompts about "
            f"{scores.num_swapped} swapped facts. These questions name their country, so text search finds them too: "
            "judge every method beside tf-idf."
        )
