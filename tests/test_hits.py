"""Queries from a file: text that no tokenizer takes (what else they may hold is in test_query.py)."""

from pathlib import Path

import pytest

from llmattrib.errors import DataError
from llmattrib.hits import read_queries
from llmattrib.sections import DataConfig


@pytest.mark.parametrize(
    "row",
    [
        r'{"prompt": "so sad \ud83d"}',
        r'{"prompt": "x", "completion": "so sad \ud83d"}',
        r'{"prompt": [{"role": "user", "content": "so sad \ud83d"}]}',
    ],
)
def test_half_of_a_character_in_a_query_names_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"line 2 holds '\\ud83d', half of a character, after 'so sad '"):
        read_queries(path, DataConfig(train="x"))
