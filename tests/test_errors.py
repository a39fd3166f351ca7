"""The error tree is whole, documented, and every message keeps its three parts."""

import inspect

import pytest

import llmattrib.errors as errors
from llmattrib.errors import ConfigError, FingerprintMismatchError, LlmattribError, first_line

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, Exception) and cls.__module__ == errors.__name__
]


def test_message_has_three_parts_and_keeps_them_apart() -> None:
    error = ConfigError("found a", expected="b", fix="do c")
    assert str(error) == "found a\n  expected: b\n  to fix: do c"
    assert (error.found, error.expected, error.fix) == ("found a", "b", "do c")


def test_empty_parts_are_left_out() -> None:
    assert str(LlmattribError("found a")) == "found a"
    assert str(LlmattribError("found a", fix="do c")) == "found a\n  to fix: do c"


def test_first_line_of_what_a_library_says() -> None:
    assert first_line(OSError("\n  no such file\nmore")) == "no such file"
    assert first_line(OSError()) == "OSError"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_in_the_tree_and_in_its_drawing(cls: type[Exception]) -> None:
    assert issubclass(cls, LlmattribError)
    assert cls.__name__ in (errors.__doc__ or "")


def test_the_drawing_has_no_error_that_is_gone() -> None:
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    assert drawn == {cls.__name__ for cls in CLASSES}


def test_fingerprint_mismatch_lists_every_differing_key_with_both_values() -> None:
    error = FingerprintMismatchError("runs/x/features.zarr", {"lora": ("r=8", "r=16"), "output": ("loss", "pntk")})
    assert error.differing == {"lora": ("r=8", "r=16"), "output": ("loss", "pntk")}
    assert "lora: stored 'r=8', now 'r=16'; output: stored 'loss', now 'pntk'" in error.found
    assert error.found.startswith("runs/x/features.zarr was made with other settings")
    assert "delete the store" in error.fix
