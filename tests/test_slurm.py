"""The Slurm scripts are shell, and call what exists. A cluster is not started here."""

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from llmattrib.cli import app

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_every_stage_that_a_cluster_runs_has_a_script() -> None:
    assert [script.stem for script in SCRIPTS] == ["build", "index", "reduce"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_valid_shell_and_calls_what_exists(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    commands = get_command(app).commands  # type: ignore[attr-defined]
    called = re.findall(r"^srun .*\bllmattrib (\w+)", text, re.MULTILINE)
    launched = re.findall(r"launch/\w+\.(?:py|yaml)", text)
    assert called or launched
    assert all(command in commands for command in called)
    assert all((ROOT / path).is_file() for path in launched)
