"""The demo on its real model, smaller: every stage runs, the scoreboard is right, a second run reuses the first."""

import json
from contextlib import nullcontext
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import llmattrib.demo as demo_module
from llmattrib.cli import app
from llmattrib.config import load_config
from llmattrib.demo import TFIDF, DemoSize, run_demo
from llmattrib.errors import FingerprintMismatchError, ModelNotFoundError
from llmattrib.narration import ConsoleNarrator
from llmattrib.progress import silent
from llmattrib.sections import METHODS

needs_model = pytest.mark.skipif(find_spec(demo_module.PACKAGE) is None, reason="the demo's model is not installed")
SMALL = DemoSize(num_facts=12, num_swapped=2, num_held_out=3, epochs=12)


class Listener(ConsoleNarrator):
    """A narrator that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Console(record=True, width=100, file=StringIO()))
        self.stages: list[str] = []

    def stage(self, title: str, why: str) -> None:
        self.stages.append(title)

    def progress(self, description: str) -> Any:
        return nullcontext(silent)


@needs_model
@pytest.mark.slow
def test_demo_traces_a_swapped_fact_and_reuses_its_stages(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    first = Listener()
    scores = run_demo(run_dir, 0, first, SMALL)
    assert first.stages == ["train", "build", "reduce", "index", "ask", "query"]
    saved = json.loads((tmp_path / "run" / "scoreboard.json").read_text())
    assert saved["default_method"] == load_config(f"{run_dir}/config.yaml").query.method
    assert set(saved["methods"]) == {*METHODS, TFIDF}
    for row in saved["methods"].values():
        assert set(row["swapped"]) == {"recall@1", "recall@5", "count"}
        assert row["held_out"]["count"] == 3
        assert 0 <= row["swapped"]["recall@1"] <= row["swapped"]["recall@5"] <= 1
    assert scores.methods[scores.default_method]["swapped"]["count"] >= 2, "the model repeats what it was taught"
    assert scores.methods[scores.default_method]["swapped"]["recall@1"] == 1
    text = first.console.export_text()
    assert "we taught" in text
    assert "tf-idf" in text
    assert f"llmattrib query {run_dir}" in text.replace("\n", " ")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features.zarr").rglob("*")}
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = Listener()
    assert run_demo(run_dir, 0, again, SMALL) == scores
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features.zarr").rglob("*")} == before
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert "kept from an earlier run" in again.console.export_text()


@needs_model
def test_demo_of_another_seed_leaves_the_facts_that_are_there(tmp_path: Path) -> None:
    facts = tmp_path / "train.jsonl"
    facts.write_text("facts of another seed\n")
    with pytest.raises(FingerprintMismatchError, match="those of seed 1"):
        run_demo(str(tmp_path), 1, Listener(), SMALL)
    assert facts.read_text() == "facts of another seed\n"


def test_demo_without_its_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFoundError, match="make demo"):
        run_demo(str(tmp_path), 0, Listener())
    result = CliRunner().invoke(app, ["demo", "--run-dir", str(tmp_path)])
    assert result.exit_code == 2
