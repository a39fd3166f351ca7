"""README and docs/ against the repository: links, settings, commands, and the sections that code refers to."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llmattrib.catalogue import METHOD_NOTES, VALUES_NOTES
from llmattrib.cli import app
from llmattrib.config import RunConfig, validate_config
from llmattrib.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if path.is_file())
CODE = sorted(path for folder in ("llmattrib", "launch") for path in (ROOT / folder).rglob("*.py"))
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4,}.*\n(?:\n(?= {4}))?)+")
YAML = re.compile(r"^```ya?ml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
SECTIONS = "|".join(RunConfig.model_fields)
SETTING = re.compile(rf"(?P<key>(?:{SECTIONS})(?:\.[a-z_]+)+)(?:(?:=|: +)(?P<value>.+))?")
FILE_SUFFIXES = {"py", "md", "yaml", "json", "jsonl", "parquet", "zarr", "faiss"}  # `reduce.py` is no setting
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z]+")  # stands for a value of the reader's own
BUILTIN_OPTIONS = {"--help"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)}


def broken_links(text: str, place: Path) -> list[str]:
    """Relative links to files, and to headings of files, that are not there."""
    found = []
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        target = place.parent / file if file else place
        if re.match(r"[a-z]+:", link):
            continue
        content = text if target == place else target.read_text() if target.suffix == ".md" and target.is_file() else ""
        if (file and not target.exists()) or (anchor and anchor not in anchors(content)):
            found.append(link)
    return found


def field_of(key: str) -> FieldInfo | None:
    """The field of RunConfig that `section.key` names."""
    model: Any = RunConfig
    field = None
    for name in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        model = field.annotation
    return field


def wrong_settings(words: list[str]) -> list[str]:
    """Words like `section.key`, with or without `=value` or `: value`, that the config does not accept."""
    found = []
    for word in words:
        match = SETTING.fullmatch(word)
        if match is None or match["key"].rpartition(".")[2] in FILE_SUFFIXES:
            continue
        field, value = field_of(match["key"]), match["value"]
        if field is None:
            found.append(word)
        elif value is not None and not PLACEHOLDER.fullmatch(value):
            try:
                TypeAdapter(Annotated[field.annotation, field]).validate_python(yaml.safe_load(value))
            except ValidationError:
                found.append(word)
    return found


def wrong_configs(text: str) -> list[str]:
    """What is not accepted of blocks of YAML, taken as runs or as parts of runs."""
    found = []
    for block in YAML.findall(text):
        tree = yaml.safe_load(block)
        needed = {"model": {"name": "m"} | tree.get("model", {}), "data": {"train": "t"} | tree.get("data", {})}
        try:
            validate_config({"run_dir": "r"} | tree | needed)
        except ConfigError as error:
            found.append(error.found)
    return found


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `llmattrib` of every command in a block of code or in backticks, without comments."""
    blocks = [match.group() for pattern in (FENCE, INDENTED) for match in pattern.finditer(text)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    for line in [*lines, *SPAN.findall(FENCE.sub("", text))]:
        if match := re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?llmattrib (.*)", line):
            yield shlex.split(match[1], comments=True)


def wrong_commands(text: str) -> list[str]:
    """Commands, and options of commands, that the command line does not have."""
    found = []
    for words in command_lines(text):
        command: Any = typer.main.get_command(app)
        arguments = list(words)
        while arguments and hasattr(command, "commands") and arguments[0] in command.commands:
            command = command.commands[arguments.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        no_such_command = hasattr(command, "commands") and arguments and not asked
        if no_such_command or asked - options - BUILTIN_OPTIONS:
            found.append(" ".join(words))
        found += wrong_settings(arguments)
    return found


def spans(text: str) -> list[str]:
    return [span.strip() for span in SPAN.findall(FENCE.sub("", text))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(), path) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_settings_exist_and_take_the_values_named(path: Path) -> None:
    assert wrong_settings(spans(path.read_text())) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(path: Path) -> None:
    assert wrong_commands(path.read_text()) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_configs_are_accepted(path: Path) -> None:
    assert wrong_configs(path.read_text()) == []


def test_the_docs_are_found_and_name_something() -> None:
    texts = {path.name: path.read_text() for path in DOCS}
    assert {"methods.md", "architecture.md"} <= set(texts)
    everything = "\n".join(texts.values())
    assert len(LINK.findall(everything)) > 10
    assert sum(field_of(span) is not None for span in spans(everything)) > 10
    assert len(list(command_lines(everything))) > 3


def test_sections_that_code_refers_to_exist() -> None:
    references = [
        (path, name, section)
        for path in CODE
        for name, section in re.findall(r"docs/(\w+\.md)(?:\s+section\s+(\d+))?", path.read_text())
    ]
    assert references
    for path, name, section in references:
        text = (ROOT / "docs" / name).read_text()
        assert not section or re.search(rf"^## {section}\. ", text, re.MULTILINE), f"{path}: {name} section {section}"


BAD = """# A title

See [this](nothing.md), [that](architecture.md#no-such-part), [web](https://example.org/x.md), [it](#a-title).

Set `features.sketch.dims`, `reduce.ridge=-1`, `reduce.ridge=loo`, `features.output: los`,
`features.sketch.dim=N`; read `reduce.py`.

```sh
llmattrib rduce runs/demo
llmattrib query runs/demo --promt "what?"  # llmattrib nothing
$ llmattrib build c.yaml features.output=los \\
    features.dtype=float32
llmattrib evaluate skech runs/demo
llmattrib evaluate sketch runs/demo --dim 64
llmattrib --version
llmattrib --help
```

or

    llmattrib nothing runs/demo

and `llmattrib demo --sed 3`.

```yaml
data: {prompt: question}
features: {sketch: {dims: 3}}
```
"""


def test_faults_are_found() -> None:
    place = ROOT / "docs" / "page.md"
    assert broken_links(BAD, place) == ["nothing.md", "architecture.md#no-such-part"]
    assert wrong_settings(spans(BAD)) == ["features.sketch.dims", "reduce.ridge=-1", "features.output: los"]
    assert [found.partition("; ")[0] for found in wrong_configs(BAD)] == [
        "config is not accepted: features.sketch.dims: is no setting, did you mean dim? (found 3)"
    ]
    assert wrong_commands(BAD) == [
        "rduce runs/demo",
        "query runs/demo --promt what?",
        "features.output=los",
        "evaluate skech runs/demo",
        "nothing runs/demo",
        "demo --sed 3",
    ]


def test_the_one_table_of_methods_is_that_of_the_command_line() -> None:
    lines = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    for method, row in (METHOD_NOTES | VALUES_NOTES).items():
        assert f"| `{method}` | {' | '.join(row)} |" in lines
