"""Queries from a file, checks of their texts, hits written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmattrib.data import user_message
from llmattrib.errors import DataError, EmptyDatasetError, MissingFieldError
from llmattrib.hits import Hit, Hits, Query, check_queries, read_queries, write_hits
from llmattrib.sections import DataConfig

CONFIG = DataConfig(train="x")
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\u2028v"}]
ANSWER = {"role": "assistant", "content": "w"}


def written(tmp_path: Path, *rows: Any, encoding: str = "utf-8") -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding=encoding)
    return path


@pytest.mark.parametrize(
    "row",
    [
        r'{"prompt": "so sad \ud83d"}',
        r'{"prompt": "x", "completion": "so sad \ud83d"}',
        r'{"prompt": [{"role": "user", "content": "so sad \ud83d"}]}',
        r'{"prompt": "x", "id": "so sad \ud83d"}',
    ],
)
def test_half_of_a_character_in_a_query_names_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"line 2 holds '\\ud83d', half of a character, after 'so sad '"):
        read_queries(path, CONFIG)


def test_queries_are_named_by_their_ids_or_numbers() -> None:
    named = Query(user_message("b"), None, "7th")
    assert check_queries([Query.of("a", ""), named]) == ["query 1", "query 7th"]
    with pytest.raises(DataError, match=r"query 2 holds '\\ud83d', half of a character, after 'so '"):
        check_queries([named, Query.of("so \ud83d")])
    with pytest.raises(DataError, match=r"query 1 holds '\\udc00', half of a character"):
        check_queries([Query.of("a", "\udc00")])
    with pytest.raises(MissingFieldError, match="query 2 has an empty prompt"):
        check_queries([named, Query.of(" ")])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_queries_from_a_file(tmp_path: Path, encoding: str) -> None:
    rows = [
        {"prompt": "a"},
        {"question": "b", "answer": "c", "key": 3},
        {"prompt": CHAT, "completion": "d"},
        {"question": "e", "prompt": "of a column beside it", "answer": "f", "completion": "g", "key": "h", "id": "i"},
    ]
    config = DataConfig(train="x", prompt="question", completion="answer", id="key")
    assert read_queries(written(tmp_path, *rows, encoding=encoding), config) == [
        Query.of("a"),
        Query(user_message("b"), "c", "3"),
        Query.of(CHAT, "d"),  # type: ignore[arg-type]
        Query(user_message("e"), "f", "h"),
    ]


def test_queries_as_chats(tmp_path: Path) -> None:
    rows = [
        {"turns": CHAT},
        {"turns": [*CHAT, ANSWER]},
        {"turns": CHAT, "completion": "c"},
        {"prompt": "a", "id": 1},
        {"turns": json.dumps([*CHAT, ANSWER])},
    ]
    asked = read_queries(written(tmp_path, *rows), DataConfig(train="x", messages="turns"))
    assert asked == [
        Query.of(CHAT),  # type: ignore[arg-type]
        Query.of(CHAT, "w"),  # type: ignore[arg-type]
        Query.of(CHAT, "c"),  # type: ignore[arg-type]
        Query(user_message("a"), None, "1"),
        Query.of(CHAT, "w"),  # type: ignore[arg-type]
    ]
    with pytest.raises(MissingFieldError, match=r"line 1 has no prompt \(fields: messages\)\n.* field turns or prompt"):
        read_queries(written(tmp_path, {"messages": CHAT}), DataConfig(train="x", messages="turns"))
    with pytest.raises(MissingFieldError, match="line 1 has an empty prompt"):
        read_queries(written(tmp_path, {"turns": [ANSWER]}), DataConfig(train="x", messages="turns"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON"),
        ('{"prompt": ' + "[" * 100_000, r"line 2 is not JSON that can be read: maximum recursion depth"),
        ('{"prompt": "x", "n": ' + "9" * 5000 + "}", r"line 2 is not JSON that can be read: Exceeds the limit"),
        ("[]", r"line 2 is a list"),
        ('{"text": "x"}', r"line 2 has no prompt \(fields: text\)"),
        ('{"prompt": " "}', r"line 2 has an empty prompt"),
        ('{"prompt": [{"role": "user"}]}', r"line 2: turn 1 of 'prompt' is \{'role': 'user'\}"),
        ('{"prompt": [{"role": "user", "content": 1}]}', r"line 2: turn 1 of 'prompt' is"),
        ('{"prompt": "x", "completion": 3}', r"line 2: the completion is 3"),
        ('{"prompt": "x", "completion": ""}', r"line 2: the completion is ''\n  expected: some text, or none"),
    ],
)
def test_unusable_query_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_queries(path, CONFIG)


def test_file_of_queries_that_is_absent_or_empty(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match=r"absent\.jsonl cannot be read"):
        read_queries(tmp_path / "absent.jsonl", CONFIG)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EmptyDatasetError, match=r"empty\.jsonl has no rows"):
        read_queries(tmp_path / "empty.jsonl", CONFIG)


def test_hits_round_trip_through_json(tmp_path: Path) -> None:
    hit = Hit(1, 4, "é", "p\n", "c", 0.5, 0.25)
    hits = Hits("p", "c", False, False, "trak", (hit,), (), 0.5, 9, True, False, "a")
    write_hits([hits, hits], tmp_path / "new" / "hits.jsonl")
    lines: Sequence[str] = (tmp_path / "new" / "hits.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        tree = json.loads(line)
        helpful = tuple(Hit(**row) for row in tree.pop("helpful"))
        assert Hits(**{**tree, "helpful": helpful, "harmful": tuple(tree["harmful"])}) == hits
    assert len(lines) == 2
