"""The command line: help in time, every stage end to end in one process, JSON, errors with exit code 2."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_resume import config_file
from tiny import tiny_run
from typer.testing import CliRunner

from llmattrib import catalogue, console
from llmattrib.cli import app
from llmattrib.config import RunConfig
from llmattrib.data import read_examples
from llmattrib.errors import ConfigError
from llmattrib.hits import Hit, Hits
from llmattrib.methods import GRADIENT_FORMS, SEMIVALUE_FORMS
from llmattrib.sections import METHODS, ValuesConfig

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "submit",
    "status",
    "train",
    "build",
    "reduce",
    "index",
    "run",
    "query",
    "profile",
    "values",
    "methods",
    "demo",
    "verify",
    "evaluate",
    "serve",
)


def llmattrib(*arguments: str) -> Any:
    """Run a command in this process; the result has stdout and stderr apart."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunConfig, Any]:
    """A config file whose stages were all run by `llmattrib run`."""
    tmp_path = tmp_path_factory.mktemp("cli")
    config = tiny_run(tmp_path, query={"max_new_tokens": 4, "top": 3})
    path = str(config_file(config, tmp_path))
    return path, config, llmattrib("run", path)


def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.process_time() + sum(os.times()[2:4])
        out = subprocess.run(
            [sys.executable, "-m", "llmattrib.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(time.process_time() + sum(os.times()[2:4]) - start)
    assert min(seconds) < 0.5, seconds
    assert all(command in out.stdout for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, llmattrib.cli; print([n for n in ('torch', 'numpy', 'pydantic', 'zarr') if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = llmattrib(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_version() -> None:
    assert re.fullmatch(r"llmattrib \d+\.\d+\.\d+\n", llmattrib("--version").stdout)


def test_methods_lists_every_method() -> None:
    assert set(catalogue.METHOD_NOTES) | {"ame(q,...)"} == {*SEMIVALUE_FORMS, *GRADIENT_FORMS}
    out = llmattrib("methods").stdout
    assert all(method in out for method in (*catalogue.METHOD_NOTES, *catalogue.VALUES_NOTES))
    assert all(len(notes) == 4 for notes in (*catalogue.METHOD_NOTES.values(), *catalogue.VALUES_NOTES.values()))
    for method in catalogue.VALUES_NOTES:
        assert ValuesConfig(method=method).method == method


def test_profile_shows_what_is_earned_below_q(done: tuple[str, RunConfig, Any]) -> None:
    path, config, _ = done
    first, second = (example.id for example in read_examples(config.layout.examples)[:2])
    asked = ("profile", path, "-p", "what is the colour of a tree 0?", "-c", "red", "-e", first, "-e", second)
    rows = [json.loads(line) for line in llmattrib(*asked, "--json").stdout.splitlines()]
    assert [row["id"] for row in rows] == [first, second]
    for row in rows:
        integral = sum(weight * value for weight, value in zip(row["weights"], row["values"], strict=True))
        assert row["earned"][-1] == pytest.approx(integral, rel=1e-6, abs=1e-12)
        assert (row["q"][0], row["q"][-1]) == (0, 1)
    lines = llmattrib(*asked).stdout.splitlines()
    assert "share" in lines[0]
    assert any(line.split()[0] == "1" and line.split()[-1] == "100.0%" for line in lines)
    assert "there is no training example 'nobody'" in fails("profile", path, "-p", "x", "-c", "red", "-e", "nobody")


def test_run_does_every_stage_and_names_what_it_wrote(done: tuple[str, RunConfig, Any]) -> None:
    path, config, result = done
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "no bar when stderr is no terminal"
    layout = config.layout
    for written in (layout.adapter, layout.features, *map(layout.representers, METHODS), *map(layout.index, METHODS)):
        assert f"wrote {written}" in result.stdout
        assert Path(written).exists()
    measured = r"sum-rule error \d\.\de-\d\d, bias [\d.]+% \+- [\d.]+% \(at most [\d.]+%, 32 draws\)"
    assert re.search(rf"shapley, ridge [\d.e-]+, {measured}", result.stdout)
    assert result.stdout.rstrip().endswith(f'next: llmattrib query {path} --prompt "..."')


def test_the_query_that_is_next_names_a_method_that_the_run_has(
    done: tuple[str, RunConfig, Any], tmp_path: Path
) -> None:
    path, config, _ = done
    shutil.copytree(config.run_dir, tmp_path / "run")
    overrides = (f"run_dir={tmp_path / 'run'}", "reduce.methods=[trak]")
    last = llmattrib("index", path, *overrides).stdout.splitlines()[-1]
    command = shlex.split(last.removeprefix("next: llmattrib ").replace("...", "what is a tree?"))
    assert command[-4:] == ["--method", "trak", "--prompt", "what is a tree?"]
    assert "trak: values of 12 examples" in llmattrib(*command).stdout


def test_running_again_keeps_what_is_finished(done: tuple[str, RunConfig, Any]) -> None:
    path, config, _ = done

    def contents() -> dict[str, bytes]:
        files = [file for file in Path(config.run_dir).rglob("*") if file.is_file()]
        return {str(file): file.read_bytes() for file in files}

    before = contents()
    result = llmattrib("run", path)
    assert result.exit_code == 0, result.output
    assert contents() == before
    assert f"kept {config.layout.adapter}" in result.stdout
    assert "0 of 3 shards computed now" in result.stdout
    assert f"kept {config.layout.index('shapley')}" in result.stdout


def test_stages_one_by_one_give_the_same_files_as_run(done: tuple[str, RunConfig, Any], tmp_path: Path) -> None:
    path, config, _ = done
    other = str(tmp_path / "other")
    commands = ("train", "build", "reduce", "index")
    for command, following in zip(commands, (*commands[1:], "query"), strict=True):
        result = llmattrib(command, path, f"run_dir={other}")
        assert result.exit_code == 0, result.output
        last = result.stdout.rstrip().splitlines()[-1]
        assert last.startswith(f"next: llmattrib {following} {path} run_dir={other}")
    for kind in ("adapter", "features.zarr", "representers", "index"):
        for file in sorted((Path(config.run_dir) / kind).rglob("*")):
            if file.is_file():
                twin = Path(other) / file.relative_to(config.run_dir)
                assert twin.read_bytes() == file.read_bytes(), file


def test_quiet_says_nothing(done: tuple[str, RunConfig, Any]) -> None:
    path, _, _ = done
    assert llmattrib("build", path, "--quiet").output == ""
    assert llmattrib("index", path, "-q").output == ""


def test_query_prints_the_tables(done: tuple[str, RunConfig, Any]) -> None:
    path, config, _ = done
    for target in (path, config.run_dir):
        result = llmattrib("query", target, "--prompt", "what is the colour of a tree 0?", "--completion", "red")
        assert result.exit_code == 0, result.output
        assert "what is the colour of a tree 0? → red (given)" in result.stdout
        assert "shapley: values of 12 examples sum to" in result.stdout
        assert re.search(r"Most helpful *\n#.*share.*\n1 .*%", result.stdout)


def test_query_generates_an_answer(done: tuple[str, RunConfig, Any]) -> None:
    path, _, _ = done
    out = llmattrib("query", path, "-p", "what is the colour of a tree 0?", "--json").stdout
    hits = json.loads(out)
    assert hits["generated"]
    assert hits["answered_by"] == "adapter"
    assert "(generated by the adapter" in llmattrib("query", path, "-p", hits["prompt"]).stdout
    again = json.loads(llmattrib("query", path, "-p", hits["prompt"], "-c", hits["completion"], "--json").stdout)
    assert (again["completion"], again["generated"], again["is_cut"]) == (hits["completion"], False, False)
    assert again["answered_by"] == ""
    assert (again["helpful"] == hits["helpful"]) == (not hits["is_cut"]), "an answer that was cut has no end of turn"


def test_query_json_is_one_object_a_line_for_each_method(done: tuple[str, RunConfig, Any]) -> None:
    path, _, _ = done
    options = ("-m", "influence", "-m", "grad_cos", "--top", "2", "--json")
    result = llmattrib("query", path, "-p", "what is the colour of a tree 0?", "-c", "red", *options)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["method"] for row in rows] == ["influence", "grad_cos"]
    for row in rows:
        assert len(row["helpful"]) <= 2
        assert set(row["helpful"][0]) == {"rank", "row", "id", "prompt", "completion", "value", "share"}
    assert rows[1]["helpful"][0]["id"] == "row-0", "an example is nearest to itself"


def test_query_of_a_file_of_prompts(done: tuple[str, RunConfig, Any], tmp_path: Path) -> None:
    path, _, _ = done
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "hits.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "what is the colour of a tree 0?", "completion": "red", "id": "a"},
        {"prompt": [{"role": "user", "content": "what is the colour of a stone 9?"}], "completion": "blue", "id": 7},
        {"prompt": "what is the colour of a river?"},
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = ("--prompts", str(prompts), "--output", str(output), "-m", "shapley", "-m", "trak")
    result = llmattrib("query", path, *options)
    assert result.stdout == f"wrote {output}: 3 prompts, shapley, trak\n"
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["method"]) for row in written] == [
        (name, method) for name in ("a", "7", "") for method in ("shapley", "trak")
    ]
    assert [row["generated"] for row in written] == [False] * 4 + [True] * 2
    kept = output.read_bytes()
    output.unlink()
    assert llmattrib("query", path, *options, "--json").stdout == "", "not one object for each prompt and method"
    assert output.read_bytes() == kept


def test_output_that_cannot_be_written_is_found_before_the_work(
    done: tuple[str, RunConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("began")

    monkeypatch.setattr("llmattrib.query.Run.query_many", work)
    asked = ("query", done[0], "-p", "x", "--output")
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "a" / "b", "Not a directory")):
        assert f"{place} could not be read or written ({why})" in fails(*asked, str(place))
    assert "/dev/null could not be read or written (File exists)" in fails(*asked, "/dev/null")
    assert "nowhere://a/b cannot be reached" in fails(*asked, "nowhere://a/b")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "(Permission denied)" in fails(*asked, str(tmp_path / "new" / "hits.jsonl"))
    assert not (tmp_path / "new").exists()


def test_rerank(done: tuple[str, RunConfig, Any]) -> None:
    path, _, _ = done
    options = ("-m", "grad_cos", "--rerank", "5", "--json")
    hits = json.loads(llmattrib("query", path, "-p", "what is the colour of a tree 0?", "-c", "red", *options).stdout)
    assert hits["reranked"]
    assert hits["helpful"][0]["value"] == pytest.approx(1, abs=1e-5), "the cosine of an example with itself"


def test_evaluate_sketch(done: tuple[str, RunConfig, Any]) -> None:
    path, _, _ = done
    result = llmattrib("evaluate", "sketch", path, "--dim", "64", "--examples", "8", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["dim"], row["stored"]) for row in rows] == [(256, True), (64, False)]
    table = llmattrib("evaluate", "sketch", path, "--dim", "64", "--examples", "8").stdout
    assert "frobenius error" in table


def fails(*arguments: str) -> str:
    """Run a command that fails on purpose; return what it says on stderr, unwrapped."""
    result = llmattrib(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def test_stages_out_of_order_name_the_one_to_run(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    path = str(config_file(config, tmp_path))
    assert "run `llmattrib build` first" in fails("reduce", path)
    assert "run `llmattrib reduce` first" in fails("index", path)
    assert "run `llmattrib build` first" in fails("query", path, "-p", "x")


def test_an_error_has_three_parts(tmp_path: Path) -> None:
    text = fails("build", str(tmp_path / "absent.yaml"))
    assert text.startswith("error: config")
    assert re.search(r"absent\.yaml cannot be read .* expected: a YAML file.* to fix: name a YAML file", text)
    assert "Traceback" not in text


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    text = fails("build", str(tmp_path / "absent.yaml"), "--debug")
    assert "Traceback (most recent call last)" in text
    assert "load_config" in text


def test_wrong_override(tmp_path: Path) -> None:
    path = str(config_file(tiny_run(tmp_path), tmp_path))
    assert "features.output: Input should be" in fails("build", path, "features.output=los")
    assert "override 'x' is not understood" in fails("build", path, "x")


def test_missing_field_names_file_and_line(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    Path(config.data.train).write_text('{"id": "a", "prompt": "x", "completion": "y"}\n{"id": "b", "prompt": "x"}\n')
    text = fails("build", str(config_file(config, tmp_path)))
    assert re.search(r"train\.jsonl line 2: the field 'completion' is missing", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "what to ask is not clear"),
        (("-p", "x", "--prompts", "f"), "what to ask is not clear"),
        (("--prompts", "f", "-c", "x"), "what to ask is not clear"),
        (("-p", "x", "-c", " "), "--completion is empty expected: some text to fix: leave it out"),
        (("-p", " "), "query 1 has an empty prompt"),
        (("-p", "so \udcf0"), r"query 1 holds '\\udcf0', half of a character"),
        (("--prompts", "absent.jsonl"), r"absent\.jsonl cannot be read"),
        (("-p", "x", "-m", "shapely"), r"method 'shapely' is not one of this run's expected: one of shapley"),
        (("-p", "x", "--rerank", "20"), "shapley cannot be reranked"),
        (("-p", "x", "-m", "grad_dot", "--rerank", "2"), "rerank of 2 candidates for 3 hits"),
    ],
)
def test_query_that_cannot_be_answered(
    done: tuple[str, RunConfig, Any], options: tuple[str, ...], message: str
) -> None:
    assert re.search(message, fails("query", done[0], *options))


def test_query_with_another_model_is_refused(done: tuple[str, RunConfig, Any]) -> None:
    text = fails("query", done[0], "features.output=pntk", "-p", "x", "-c", "y")
    assert "made with other settings (features.output: stored 'loss', now 'pntk')" in text


def test_unknown_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), console.reporting(debug=False):
        1 / 0  # noqa: B018


def test_interrupt_says_that_work_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, console.reporting(debug=False):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert "the same command goes on from there" in " ".join(capsys.readouterr().err.split())


def test_error_text_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), console.reporting(debug=False):
        raise ConfigError("id '\x1b[2J\x07[red]'", expected="a\nb")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "[red]" in err, "text of data is no markup"


@pytest.mark.parametrize(
    ("prompt", "completion", "width", "expected"),
    [
        ("a b", "c", 40, "a b → c"),
        ("a\nb\x1b[1m", " c\td ", 40, "a b [1m → c d"),
        ("x" * 50, "yes", 30, "…" + "x" * 23 + " → yes"),
        ("x" * 50, "y" * 50, 33, "…" + "x" * 14 + " → " + "y" * 14 + "…"),
        ("q", "y" * 50, 33, "q → " + "y" * 28 + "…"),
        ("", "yes", 30, " → yes"),
    ],
)
def test_example_text_fits_and_keeps_the_completion(prompt: str, completion: str, width: int, expected: str) -> None:
    text = console.example_text(prompt, completion, width)
    assert text.plain == expected
    assert text.cell_len <= width
    marked = [span for span in text.spans if "underline" in str(span.style)]
    assert marked
    assert text.plain[marked[0].start : marked[0].end] == expected.split(" → ")[1]


def test_wide_characters_are_counted_in_cells() -> None:
    text = console.example_text("中" * 40, "文" * 4, 40)
    assert text.cell_len <= 40
    assert text.plain.endswith("文" * 4)


def test_short_and_wide_ids_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("7", "行一"):
        rows = [Hit(1, 7, name, "p", "c", 1.0, 1.0)]
        console.print_values(rows, rows)
        heading, row = capsys.readouterr().out.splitlines()[-2:]
        assert heading.split() == ["#", "value", "share", "id", "example"]
        assert row.split() == ["1", "+1", "+100.0%", name, "p", "→", "c"]


def test_ids_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    hits = tuple(Hit(rank, rank, id, "p", "c", 1.0, 0.5) for rank, id in enumerate(("[/b] x", "[red]y"), start=1))
    console.print_hits(Hits("p", "c", True, True, "trak", hits, (), 1.0, 2, True, False, "", "base model"))
    shown = capsys.readouterr().out
    assert "[/b] x" in shown
    assert "[red]y" in shown
    assert "(generated by the base model, cut off)" in shown


def test_bar_is_silent_without_a_terminal_and_drawn_on_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.bar("build, examples", show=True) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with console.bar("build, examples", show=True) as progress:
        progress(1, 2)
        progress(2, 2)
    drawn = capsys.readouterr().err
    assert "build, examples" in drawn
    assert "2/2" in drawn
    with console.bar("build, examples", show=False) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


def test_ci_and_makefile_call_the_same_commands() -> None:
    ci, makefile = (ROOT / ".ci" / "run").read_text(), (ROOT / "Makefile").read_text()
    assert re.findall(r"^make .*", ci, flags=re.MULTILINE) == ["make lint", "make test"]
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "install", "lint", "bench"} <= targets


def test_config_that_run_saved_replays(done: tuple[str, RunConfig, Any]) -> None:
    _, config, _ = done
    saved = yaml.safe_load(Path(config.layout.config).read_text())
    assert saved["seed"] == config.seed
    assert llmattrib("build", config.run_dir).exit_code == 0
