"""`python -m benchmarks` runs every benchmark, names those that fail, and goes on where it was stopped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks"
SCRIPT = """
from pathlib import Path
if __name__ == "__main__":
    name = Path(__file__).stem
    with open("ran.txt", "a") as file:
        file.write(f"{name} ")
    assert not Path(f"{name}.fails").exists()
"""


def run(folder: Path, *names: str) -> tuple[int, list[str], str]:
    """Return the exit status, what ran, and what was written."""
    (folder / "ran.txt").write_text("")
    command = [sys.executable, "-m", "benchmarks", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PATH": ""})
    return done.returncode, (folder / "ran.txt").read_text().split(), done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of three benchmarks and the tables that are made of them."""
    (tmp_path / "llmattrib").mkdir()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "peers").mkdir()
    for name in ("__main__.py", "_process.py"):
        shutil.copy(SOURCE / name, tmp_path / "benchmarks" / name)
    for name in ("one", "two", "peers/bergson_lds", "render", "systems"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text(SCRIPT)
    return tmp_path


def test_what_failed_is_named_and_runs_again_alone(folder: Path) -> None:
    (folder / "one.fails").touch()
    status, ran, text = run(folder)
    assert status == 1
    assert "failed: one" in text
    assert ran == ["one", "two", "bergson_lds", "render", "systems"]
    (folder / "one.fails").unlink()
    assert run(folder)[:2] == (0, ["one", "render", "systems"])
    assert run(folder)[1] == ["one", "two", "bergson_lds", "render", "systems"]  # all had run: from the start


def test_other_code_runs_from_the_start(folder: Path) -> None:
    (folder / "two.fails").touch()
    assert run(folder)[0] == 1
    (folder / "two.fails").unlink()
    (folder / "llmattrib" / "store.py").write_text("CHANGED = True\n")
    assert run(folder)[1] == ["one", "two", "bergson_lds", "render", "systems"]


def test_what_is_asked_for_runs_and_leaves_the_rest(folder: Path) -> None:
    (folder / "one.fails").touch()
    run(folder)
    assert run(folder, "two")[:2] == (0, ["two", "render", "systems"])
    assert run(folder)[1] == ["one", "render", "systems"]
    status, ran, text = run(folder, "three")
    assert (status, ran) == (1, [])
    assert "no benchmark is called three; there are one, two, peers.bergson_lds" in text
