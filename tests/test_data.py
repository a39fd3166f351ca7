"""Reading, checking and saving of examples."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmattrib.data import (
    Example,
    Message,
    data_fingerprint,
    label_word,
    load_examples,
    read_examples,
    save_examples,
    user_message,
)
from llmattrib.errors import DataError, EmptyDatasetError, LabelWordError, MissingFieldError
from llmattrib.sections import DataConfig
from tests.tiny import tiny_jsonl, tiny_rows

ROWS = [{"id": "a", "prompt": "one?", "completion": "1"}, {"id": "b", "prompt": 'tw"o, 2?\n', "completion": "zwei ü"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, rows: list) -> str:
    """Write rows in the format of the suffix."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    config = DataConfig(train=write(tmp_path / f"data{suffix}", ROWS), id="id")
    assert load_examples(config) == [
        Example(0, "a", user_message("one?"), "1"),
        Example(1, "b", user_message('tw"o, 2?\n'), "zwei ü"),
    ]


def test_a_datasets_name_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "a_data_set"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    examples = load_examples(DataConfig(train=str(folder), id="id"))
    assert [(example.id, example.completion) for example in examples] == [("a", "1"), ("b", "zwei ü")]
    with pytest.raises(EmptyDatasetError, match=r"(?s)`datasets` cannot load it.*split 'validation'"):
        load_examples(DataConfig(train=str(folder), split="validation"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("broken.py", "x = 1", "Dataset scripts are no longer supported"),
        ("train.jsonl", "{", "An error occurred while generating the dataset"),
    ],
)
def test_a_data_set_that_datasets_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, message: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / file).write_text(text)
    with pytest.raises(EmptyDatasetError, match=f"(?s)broken is no file, and `datasets` cannot load it: {message}"):
        load_examples(DataConfig(train=str(tmp_path / "broken")))


def test_an_unknown_datasets_name_is_an_error() -> None:
    with pytest.raises(EmptyDatasetError, match=r"(?s)no/such-data-set is no file.*check data.train"):
        load_examples(DataConfig(train="no/such-data-set"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_chat_messages(tmp_path: Path, suffix: str) -> None:
    turns = [{"role": "system", "content": "be kind"}, *CHAT]
    cell = json.dumps(turns) if suffix == ".csv" else turns
    config = DataConfig(train=write(tmp_path / f"data{suffix}", [{"turns": cell}]), messages="turns")
    (example,) = load_examples(config)
    assert example.prompt == (Message(role="system", content="be kind"), Message(role="user", content="hi"))
    assert (example.completion, example.prompt_text, example.id) == ("hello", "hi", "0")


def test_a_prompt_and_completion_of_messages(tmp_path: Path) -> None:
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    (example,) = load_examples(DataConfig(train=write(tmp_path / "data.json", rows)))
    assert (example.prompt, example.completion) == (user_message("hi"), "hello")


def test_prompt_text_without_a_user_turn_joins_all() -> None:
    turns = (Message(role="system", content="a"), Message(role="context", content="b"))
    assert Example(0, "x", turns, "c").prompt_text == "a\nb"


def test_limit_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) + "\n" for row in tiny_rows(5)), encoding="utf-8")
    assert [example.id for example in load_examples(DataConfig(train=str(path), id="id"))] == [
        f"row-{i}" for i in range(5)
    ]
    assert [example.id for example in load_examples(DataConfig(train=str(path), limit=2))] == ["0", "1"]


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n", encoding="utf-8")
    assert len(load_examples(DataConfig(train=str(path), limit=1))) == 1


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.jsonl", "", EmptyDatasetError, "a.jsonl has no rows"),
        ("a.json", "[]", EmptyDatasetError, "a.json has no rows"),
        ("a.csv", "prompt,completion\n", EmptyDatasetError, "a.csv has no rows"),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n\n{"prompt": "p"', DataError, "a.jsonl line 3 is not JSON"),
        ("a.jsonl", "[" * 100_000, DataError, "a.jsonl line 1 is not JSON that can be read: maximum recursion depth"),
        ("a.json", "[" * 100_000, DataError, "a.json is not JSON that can be read: maximum recursion depth"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", DataError, "a.jsonl line 1 is not JSON that can be read: Exceeds"),
        ("a.jsonl", "[1]\n", MissingFieldError, "a.jsonl line 1 is a list"),
        ("a.json", '[{"a": 1},\n{]', DataError, "a.json is not JSON that can be read: .* line 2"),
        ("a.json", '{"a": 1}', DataError, "a.json holds a dict"),
        ("a.json", "[1]", MissingFieldError, "a.json item 1 is a int"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", DataError, "a.csv line 3 has more cells"),
        ("a.csv", 'prompt,completion\n"a"x,b\n', DataError, "a.csv line 2 is not CSV"),
        (
            "a.csv",
            "prompt,completion,,,prompt\na,b,,,c\n",
            DataError,
            "a.csv line 1 names the column 'prompt' 2 times",
        ),
        ("a.csv", "prompt,completion\na\n", MissingFieldError, "a.csv line 2: the field 'completion' is null"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd,\n', MissingFieldError, "a.csv line 4 has an empty completion"),
        ("a.parquet", "PAR", DataError, "a.parquet is not a Parquet file"),
        ("a.txt", "hello", DataError, "a.txt has the suffix '.txt'"),
        (
            "a.jsonl",
            '{"prompt": "p"}\n',
            MissingFieldError,
            r"line 1: the field 'completion' is missing \(fields: prompt",
        ),
        ("a.jsonl", '{"prompt": "p", "completion": 3}\n', MissingFieldError, "line 1: 'completion' is a int"),
        ("a.jsonl", '{"prompt": "p", "completion": " "}\n', MissingFieldError, "line 1 has an empty completion"),
        ("a.jsonl", '{"prompt": "", "completion": "c"}\n', MissingFieldError, "line 1 has an empty prompt"),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "so sad \\ud83d"}\n',
            DataError,
            r"line 1 holds '\\ud83d', half of a character, after 'so sad '",
        ),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "c"}\n', DataError, r"line 1 holds '\\ud83d'"),
        ("a.jsonl", '{"prompt": 3, "completion": "c"}\n', MissingFieldError, "line 1: 'prompt' holds no messages"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user"}], "completion": "c"}\n',
            MissingFieldError,
            "turn 1 of 'prompt' is {'role': 'user'}",
        ),
    ],
)
def test_unusable_files_and_rows(tmp_path: Path, name: str, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message) as caught:
        load_examples(DataConfig(train=str(path)))
    assert type(caught.value) is error


def test_long_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [ROWS[0] | {"prompt": "x" * 200_000}])
    assert len(load_examples(DataConfig(train=path))[0].prompt_text) == 200_000


def test_a_url_is_no_data_set() -> None:
    with pytest.raises(DataError, match=r"(?s)data\.train is s3://bucket/train\.jsonl.*copy it here"):
        load_examples(DataConfig(train="s3://bucket/train.jsonl"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(EmptyDatasetError, match=r"there is no file nowhere/train.jsonl"):
        load_examples(DataConfig(train="nowhere/train.jsonl"))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        load_examples(DataConfig(train=path))


def test_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "ü", "completion": "c"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_examples(DataConfig(train=str(path)))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (CHAT[:1], r"has the roles \['user'\]"),
        (CHAT[1:], r"has the roles \['assistant'\]"),
        ("not json", "holds no messages"),
        ([], "holds no messages"),
        ("[" * 100_000, "holds no messages"),
    ],
)
def test_unusable_messages(tmp_path: Path, turns: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": turns}])
    with pytest.raises(MissingFieldError, match=f"line 2: 'messages' {message}"):
        load_examples(DataConfig(train=path, messages="messages"))


def test_ids_must_be_unique_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0] | {"prompt": "other"}])
    with pytest.raises(DataError, match=r"line 3 has the id 'a' of .*line 1"):
        load_examples(DataConfig(train=path, id="id"))
    path = write(tmp_path / "b.jsonl", [ROWS[0] | {"id": [1]}])
    with pytest.raises(MissingFieldError, match=r"'id' is \[1\]"):
        load_examples(DataConfig(train=path, id="id"))
    path = write(tmp_path / "b.jsonl", [ROWS[0] | {"id": "so sad \ud83d"}])
    with pytest.raises(DataError, match=r"line 1 holds '\\ud83d', half of a character, after 'so sad '"):
        load_examples(DataConfig(train=path, id="id"))
    path = write(tmp_path / "c.jsonl", [ROWS[0] | {"id": 7}])
    assert load_examples(DataConfig(train=path, id="id"))[0].id == "7"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_completions_become_label_words(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"p{n}", "completion": text} for n, text in enumerate(["spam", "ham ", "junk"])]
    label_map = {"spam": "Yes", "ham": "No", "junk": "Yes"}
    config = DataConfig(train=write(tmp_path / f"data{suffix}", rows), label_map=label_map)
    assert [example.completion for example in load_examples(config)] == ["Yes", "No", "Yes"]
    as_words = write(
        tmp_path / f"words{suffix}", [row | {"completion": label_map[row["completion"].strip()]} for row in rows]
    )
    assert load_examples(config) == load_examples(DataConfig(train=as_words))
    assert data_fingerprint(load_examples(config)) == data_fingerprint(load_examples(DataConfig(train=as_words)))
    plain = config.model_copy(update={"label_map": {}})
    assert data_fingerprint(load_examples(config)) != data_fingerprint(load_examples(plain))


def test_last_turns_become_label_words(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    (example,) = load_examples(DataConfig(train=path, messages="messages", label_map={"hello": "A", "bye": "B"}))
    assert (example.completion, example.prompt_text) == ("A", "hi")


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line 2"), (".json", "item 2"), (".csv", "line 3")])
def test_a_completion_that_the_map_lacks(tmp_path: Path, suffix: str, place: str) -> None:
    path = write(tmp_path / f"data{suffix}", [ROWS[0] | {"completion": text} for text in ("spam", "Spam")])
    with pytest.raises(
        LabelWordError, match=rf"data{suffix} {place} has the completion 'Spam'\n  expected: one of \['spam', 'ham'\]"
    ):
        load_examples(DataConfig(train=path, label_map={"spam": "Yes", "ham": "No"}))
    with pytest.raises(LabelWordError, match="has the completion 'Yes'"):  # words are for queries only
        label_word("here", "Yes", DataConfig(train=path, label_map={"spam": "Yes", "ham": "No"}))


def test_saved_examples_read_back_and_bytes_repeat(tmp_path: Path) -> None:
    examples = load_examples(DataConfig(train=tiny_jsonl(tmp_path), id="id"))
    save_examples(examples, tmp_path / "deep" / "examples.parquet")
    save_examples(examples, tmp_path / "again.parquet")
    assert read_examples(tmp_path / "deep" / "examples.parquet") == examples
    first, second = ((tmp_path / name).read_bytes() for name in ("deep/examples.parquet", "again.parquet"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["examples.parquet"]


def test_saved_examples_by_url() -> None:
    examples = [Example(0, "x", user_message("p"), "c")]
    save_examples(examples, "memory://run/examples.parquet")
    assert read_examples("memory://run/examples.parquet") == examples


def test_rows_of_saved_examples_are_their_index(tmp_path: Path) -> None:
    kept = [Example(7, "x", user_message("p"), "c")]
    save_examples(kept, tmp_path / "examples.parquet")
    assert read_examples(tmp_path / "examples.parquet")[0].index == 0


def test_reading_what_was_not_saved_here(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match=r"(?s)there is no file.*run `llmattrib build` first"):
        read_examples(tmp_path / "examples.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_examples(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has the columns \['a'\]"):
        read_examples(tmp_path / "other.parquet")


def test_fingerprint_sees_content_and_order_only() -> None:
    first, second = Example(0, "a", user_message("p"), "c"), Example(1, "b", user_message("q"), "d")
    base = data_fingerprint([first, second])
    assert base == data_fingerprint([Example(5, "a", user_message("p"), "c"), second])
    others = [
        [second, first],
        [first],
        [Example(0, "z", first.prompt, "c"), second],
        [Example(0, "a", user_message("P"), "c"), second],
        [Example(0, "a", (Message(role="system", content="p"),), "c"), second],
        [Example(0, "a", first.prompt, "C"), second],
    ]
    assert len({base, *map(data_fingerprint, others)}) == 1 + len(others)
