"""Training examples: read from files or `datasets`, kept in order, saved with a run.

An example is a prompt (chat messages; a plain prompt is one user message) and a completion, both text. This module
knows nothing of tokens (see encoding.py). JSON Lines, JSON (an array of objects), CSV and Parquet files are read
whole into memory; a name that is no file goes to `datasets.load_dataset`. A row that cannot be used is an error
that names the file and the line; only blank lines of a JSON Lines file are passed over.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from llmattrib.errors import ConfigError, DataError, EmptyDatasetError, LabelWordError, MissingFieldError, first_line
from llmattrib.sections import DataConfig, ValuesConfig
from llmattrib.storage import atomic_write, read_bytes

MAX_CELL = 2**31 - 1
"""Characters of a CSV cell; Python's own limit of 131,072 is less than some documents and chats have."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_ABSENT = object()
_ROW_GROUP = 1024
_SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("completion", pa.string())])


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One training example.

    Args:
        index: its row in the data set it was read from, from 0.
        id: its unique name.
        prompt: the turns before the completion, at least one.
        completion: the text that was trained on.
        is_whole: whether the completion ends there. A generated answer may be cut off; no end of turn follows it.
    """

    index: int
    id: str
    prompt: tuple[Message, ...]
    completion: str
    is_whole: bool = True

    @property
    def prompt_text(self) -> str:
        """The prompt for display: its last user turn, or all turns joined when there is none."""
        for message in reversed(self.prompt):
            if message["role"] == "user":
                return message["content"]
        return "\n".join(message["content"] for message in self.prompt)


def user_message(text: str) -> tuple[Message, ...]:
    """Return a plain prompt as messages."""
    return (Message(role="user", content=text),)


def load_examples(config: DataConfig) -> list[Example]:
    """Read the training examples that `config` names.

    Args:
        config: `train` is a file or the name of a `datasets` data set, `NAME` or `NAME:CONFIGURATION`.

    Returns:
        The first `limit` examples (all when null), in the order of the file.

    Raises:
        EmptyDatasetError: there is no such file or data set, or it has no rows.
        MissingFieldError: a row has no usable prompt, completion, messages or id.
        LabelWordError: a completion is not in `label_map`.
        DataError: the file cannot be read or parsed, or two rows have the same id.
    """
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, row in islice(_rows(config), config.limit):
        example = _example(len(examples), place, row, config)
        if example.id in places:
            raise DataError(
                f"{place} has the id {example.id!r} of {places[example.id]}",
                expected="a unique id for each row",
                fix="correct the ids, or set data.id to null to number the rows",
            )
        places[example.id] = place
        examples.append(example)
    if not examples:
        raise EmptyDatasetError(
            f"{config.train} has no rows", expected="one or more rows", fix="check data.train and data.split"
        )
    return examples


def load_validation_examples(data: DataConfig, values: ValuesConfig) -> list[Example]:
    """Read the validation set of `values` by the settings of the data section.

    Raises:
        ConfigError: `values.data` is not set.
        DataError: as `load_examples`.
    """
    if values.data is None:
        raise ConfigError(
            "values.data is not set",
            expected="a validation set: a file with the fields of the data section, or a data set",
            fix="set values.data=path/to/validation.jsonl",
        )
    try:
        return load_examples(
            data.model_copy(update={"train": values.data, "split": values.split, "limit": values.limit})
        )
    except DataError as error:  # the reader knows one data set, by the names of its settings
        parts = [
            part.replace("data.train", "values.data").replace("data.split", "values.split")
            for part in (error.found, error.expected, error.fix)
        ]
        raise type(error)(parts[0], expected=parts[1], fix=parts[2]) from error


def read_column(data: DataConfig, name: str) -> dict[str, Any]:
    """Read one more column of the data set of `data`.

    Returns:
        Id of each example -> what the column holds, None where it is empty or null.

    Raises:
        MissingFieldError: no row has the column.
        DataError: as `load_examples`.
    """
    rows = islice(_rows(data), data.limit)
    found = {_example(k, place, row, data).id: row.get(name, _ABSENT) for k, (place, row) in enumerate(rows)}
    if all(value is _ABSENT for value in found.values()):
        raise MissingFieldError(
            f"{data.train} has no field {name!r}", expected="it in the rows that have something there"
        )
    return {key: None if value in (_ABSENT, "") else value for key, value in found.items()}


def save_examples(examples: Sequence[Example], path: str | Path) -> None:
    """Write examples to a Parquet file (columns id, prompt as JSON messages, completion), atomically.

    The same examples give the same bytes.

    Args:
        examples: what to save.
        path: local path or fsspec URL.

    Raises:
        DiskSpaceError, StoreError: the file cannot be written.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
        for start in range(0, len(examples), _ROW_GROUP):  # all at once would hold their texts three times
            some = examples[start : start + _ROW_GROUP]
            columns = {
                "id": [example.id for example in some],
                "prompt": [json.dumps(example.prompt, ensure_ascii=False) for example in some],
                "completion": [example.completion for example in some],
            }
            writer.write_table(pa.table(columns, schema=_SCHEMA))
    atomic_write(str(path), buffer.getvalue())


def read_examples(path: str | Path) -> list[Example]:
    """Read what `save_examples` wrote; `index` is the row in that file.

    Raises:
        EmptyDatasetError: there is no such file.
        DataError: it is not such a file.
    """
    try:
        table = pq.read_table(io.BytesIO(read_bytes(str(path))))
    except FileNotFoundError as error:
        raise EmptyDatasetError(f"there is no file {path}", fix="run `llmattrib build` first") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}", fix="delete it and build again") from error
    if table.schema.remove_metadata() != _SCHEMA:
        raise DataError(
            f"{path} has the columns {table.column_names}",
            expected=f"text columns {_SCHEMA.names}",
            fix="delete it and build again",
        )
    return [
        Example(index, row["id"], tuple(json.loads(row["prompt"])), row["completion"])
        for index, row in enumerate(table.to_pylist())
    ]


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Return the sha256 (hex) over ids, prompts and completions in order."""
    state = hashlib.sha256()
    for example in examples:
        row = [example.id, [[turn["role"], turn["content"]] for turn in example.prompt], example.completion]
        state.update(json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return state.hexdigest()


def _rows(config: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place to name in errors, row)."""
    path = Path(config.train)
    if "://" in config.train:
        raise DataError(
            f"data.train is {config.train}", expected="a local file or the name of a data set", fix="copy it here first"
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path} has the suffix {path.suffix!r}", expected=f"one of {', '.join(SUFFIXES)}", fix="convert it"
            )
        try:
            yield from _READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error})", fix="convert it to UTF-8") from error
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error})", fix="check its permissions"
            ) from error
    elif path.suffix in SUFFIXES:
        raise EmptyDatasetError(f"there is no file {path}", fix="check data.train; paths are relative to where you are")
    else:
        yield from _hub_rows(config)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path} line {number}"
                yield place, _mapping(parse_json(line, place, "one JSON object a line"), place)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = parse_json(path.read_text(encoding="utf-8-sig"), str(path), "an array of objects")
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}", expected="an array of objects")
    for number, row in enumerate(rows, start=1):
        place = f"{path} item {number}"
        yield place, _mapping(row, place)


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(MAX_CELL)
        reader = csv.DictReader(file, strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name]
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                raise DataError(
                    f"{path} line 1 names the column {twice[0]!r} {names.count(twice[0])} times",
                    expected="different names",
                    fix="rename or remove the column that is not meant",
                )
            for row in reader:
                place = f"{path} line {reader.line_num}"
                if None in row:
                    raise DataError(f"{place} has more cells than the header", expected=f"{len(row) - 1} cells")
                yield place, row
        except csv.Error as error:
            raise DataError(
                f"{path} line {reader.reader.line_num} is not CSV: {error}", fix="correct the quoting"
            ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}", fix="check data.train") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


_READERS = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(config: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # noqa: PLC0415  (a second to import, and files do not need it)

    name, _, configuration = config.train.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise EmptyDatasetError(
            f"{config.train} is no file, and `datasets` cannot load it: {first_line(error)}",
            expected=f"a {', '.join(SUFFIXES)} file or the name of a data set with a split {config.split!r}",
            fix="check data.train, data.split and the network",
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{config.train} row {number}", row


def parse_json(text: str, place: str, expected: str) -> Any:
    """Read JSON.

    Raises:
        DataError: it is none, or it is nested deeper or has longer numbers than Python reads.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON that can be read: {error}", expected=expected) from error


def _mapping(row: object, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise MissingFieldError(f"{place} is a {type(row).__name__}", expected="a JSON object with named fields")
    return row


def _example(index: int, place: str, row: Mapping[str, Any], config: DataConfig) -> Example:
    if config.messages is not None:
        turns = read_messages(row, config.messages, place)
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise MissingFieldError(
                f"{place}: {config.messages!r} has the roles {[turn['role'] for turn in turns]}",
                expected="one or more turns, then the assistant turn that was trained on",
            )
        prompt, completion = turns[:-1], turns[-1]["content"]
    else:
        prompt = _prompt(row, config.prompt, place)
        completion = _completion(row, config.completion, place)
    if not completion.strip() or not any(turn["content"].strip() for turn in prompt):
        which = "prompt" if completion.strip() else "completion"
        raise MissingFieldError(f"{place} has an empty {which}", expected="some text", fix="correct or remove the row")
    check_text(place, completion, *(part for turn in prompt for part in (turn["role"], turn["content"])))
    completion = label_word(place, completion, config)
    if config.id is None:
        return Example(index, str(index), prompt, completion)
    identifier = _field(row, config.id, place)
    if not isinstance(identifier, str | int) or not str(identifier).strip():
        raise MissingFieldError(f"{place}: {config.id!r} is {identifier!r}", expected="text or a whole number")
    check_text(place, str(identifier))
    return Example(index, str(identifier), prompt, completion)


def check_text(place: str, *texts: str) -> None:
    """Refuse halves of characters (lone surrogates), which JSON can hold and no tokenizer takes.

    Raises:
        DataError: names the place and what stands before the half.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place} holds {text[error.start]!a}, half of a character, after {text[: error.start][-20:]!r}",
                expected="whole Unicode characters",
                fix="correct it; text that was cut inside an emoji is the usual cause",
            ) from error


def label_word(place: str, completion: str, config: DataConfig, *, or_word: bool = False) -> str:
    """Return the label word of a completion, which is the completion itself without `config.label_map`.

    Space around the completion does not count.

    Args:
        place: to name in the error.
        completion: as it stands in the data.
        config: the data section.
        or_word: accept a label word too, as a query may say what hits print.

    Raises:
        LabelWordError: the map does not have it.
    """
    if not config.label_map:
        return completion
    words = {text.strip(): word for text, word in config.label_map.items()}
    if or_word:
        words |= {word.strip(): word for word in config.label_words}
    if completion.strip() not in words:
        raise LabelWordError(
            f"{place} has the completion {completion!r}",
            expected=f"one of {list(words)}",
            fix="correct the row, or add the completion to data.label_map",
        )
    return words[completion.strip()]


def _field(row: Mapping[str, Any], name: str, place: str) -> Any:
    if row.get(name) is None:
        state = "is null" if name in row else "is missing"
        raise MissingFieldError(
            f"{place}: the field {name!r} {state} (fields: {', '.join(map(str, row)) or 'none'})",
            expected="every row to have it",
            fix="correct the row, or name the right field in the config's data section",
        )
    return row[name]


def _prompt(row: Mapping[str, Any], name: str, place: str) -> tuple[Message, ...]:
    value = _field(row, name, place)
    return user_message(value) if isinstance(value, str) else read_messages(row, name, place)


def _completion(row: Mapping[str, Any], name: str, place: str) -> str:
    value = _field(row, name, place)
    if isinstance(value, list) and len(value) == 1:  # the conversational form: one assistant turn
        return read_messages(row, name, place)[0]["content"]
    if not isinstance(value, str):
        raise MissingFieldError(f"{place}: {name!r} is a {type(value).__name__}", expected="text", fix="quote it")
    return value


def read_messages(row: Mapping[str, Any], name: str, place: str) -> tuple[Message, ...]:
    """Return the chat turns of a row.

    Args:
        row: of a file.
        name: of the field.
        place: to name in the error.

    Raises:
        MissingFieldError: there is no such field, or it holds none.
    """
    value = _field(row, name, place)
    if isinstance(value, str):  # CSV cells hold messages as JSON
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise MissingFieldError(f"{place}: {name!r} holds no messages", expected="a list of {role, content}")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise MissingFieldError(f"{place}: turn {number} of {name!r} is {turn!r}", expected="text role and content")
        turns.append(Message(role=turn["role"], content=turn["content"]))
    return tuple(turns)
