"""The public surface: its names, what importing costs, and the house rules that can be counted."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmattrib

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "llmattrib").rglob("*.py"))
SURFACE = {
    "Hit",
    "Hits",
    "LlmattribError",
    "Query",
    "Run",
    "RunConfig",
    "build_features",
    "build_index",
    "compute_values",
    "load_config",
    "reduce_run",
    "train_adapter",
}
HEAVY = ("torch", "transformers", "peft", "zarr", "faiss", "datasets", "numpy", "pydantic", "rich", "typer")


def test_the_public_names_are_these() -> None:
    assert set(llmattrib.__all__) == SURFACE
    assert set(dir(llmattrib)) >= SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(llmattrib, name)
    assert value.__name__ == name
    assert value.__doc__


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'llmattrib' has no attribute 'Rnu'"):
        llmattrib.Rnu  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, llmattrib; print([name for name in {HEAVY!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_version_is_the_one_in_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == llmattrib.__version__


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_modules_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 450
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, node.name
