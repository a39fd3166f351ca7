"""What is asked and what is answered, as plain values: queries from a file, hits, their JSON.

Knows nothing of models, stores or indices.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmattrib.data import Example, Message, check_text, parse_json, read_messages, user_message
from llmattrib.errors import EmptyDatasetError, MissingFieldError
from llmattrib.sections import DataConfig
from llmattrib.storage import atomic_write


@dataclass(frozen=True)
class Query:
    """A prompt, and the answer to trace.

    Attributes:
        prompt: the chat turns before the answer.
        completion: the answer; the model generates one when it is None. Of an empty one the end of turn is traced.
        id: a name of the caller's.
    """

    prompt: tuple[Message, ...]
    completion: str | None = None
    id: str = ""

    @classmethod
    def of(cls, prompt: str | Sequence[Message], completion: str | None = None) -> "Query":
        """Make a query of a plain prompt or of chat turns."""
        return cls(user_message(prompt) if isinstance(prompt, str) else tuple(prompt), completion)

    def answered(self, completion: str, is_whole: bool = True, name: str = "query") -> Example:
        """Return the query with `completion`, cut off unless `is_whole`, as an example to encode, `name` its id."""
        return Example(0, name, self.prompt, completion, is_whole)


@dataclass(frozen=True)
class Explanation:
    """The words through which an example acts on a query.

    Attributes:
        words: (word, value) of each word that the example shares with the query, the largest first; the values sum to
            that of the example. Tokens that count as one word are joined by `/`.
        prompt: the example's prompt as (text, value of its word) token by token, 0 where a word has no value.
        completion: the same of its completion.
    """

    words: tuple[tuple[str, float], ...]
    prompt: tuple[tuple[str, float], ...]
    completion: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Hit:
    """One training example and its value for a query.

    Attributes:
        rank: 1 is the most helpful, or the most harmful.
        row: row in the run's stores.
        id: the example's id.
        prompt: its prompt, for display.
        completion: what it taught.
        value: attribution; positive is helpful: training on it raises the query's output (log-odds, margin, or
            minus the loss).
        share: value / sum of |value| over all training examples.
        explanation: the words it acts through, where they were asked for.
    """

    rank: int
    row: int
    id: str
    prompt: str
    completion: str
    value: float
    share: float
    explanation: Explanation | None = None


@dataclass(frozen=True)
class Hits:
    """The answer to one query by one method.

    Attributes:
        prompt: the prompt, for display.
        completion: the answer that was traced.
        generated: whether the model generated it.
        is_cut: whether it was cut at `query.max_new_tokens`; it is then traced without an end of turn.
        method: whose values these are.
        helpful: the largest positive values, largest first.
        harmful: the most negative values, most negative first.
        total: sum of the values of all training examples (for Shapley: what training changed in all).
        num_examples: number of training examples.
        shares_exact: whether the denominator of the shares sums over all of them, or over a fixed random sample.
        reranked: whether the values are of exact, unsketched gradients (`total` and the denominator of
            the shares were not).
        id: the query's id.
    """

    prompt: str
    completion: str
    generated: bool
    is_cut: bool
    method: str
    helpful: tuple[Hit, ...]
    harmful: tuple[Hit, ...]
    total: float
    num_examples: int
    shares_exact: bool
    reranked: bool
    id: str = ""

    def to_json(self) -> str:
        """Return one line of JSON; without `explanation` where there is none."""
        tree = asdict(self)
        for hit in (*tree["helpful"], *tree["harmful"]):
            if hit["explanation"] is None:
                del hit["explanation"]
        return json.dumps(tree, ensure_ascii=False)


def read_queries(path: str | Path, config: DataConfig) -> list[Query]:
    """Read queries from a JSON Lines file.

    Args:
        path: rows have `prompt` (text or chat turns), optionally `completion` and `id`; or the names that the
            config's data section gives these fields, which go first. Of chat `messages` (its `data.messages`) a last
            assistant turn is the completion.
        config: the run's data section.

    Raises:
        EmptyDatasetError: there is no such file, or it has no rows.
        MissingFieldError, DataError: a row is not usable; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EmptyDatasetError(
            f"{path} cannot be read ({error})", expected="a JSON Lines file of prompts", fix="check --prompts"
        ) from error
    queries = [_query(f"{path} line {n}", line, config) for n, line in enumerate(lines, start=1) if line.strip()]
    if not queries:
        raise EmptyDatasetError(f"{path} has no rows", expected="one prompt a line", fix="check --prompts")
    return queries


def write_hits(hits: Sequence[Hits], path: str | Path) -> None:
    """Write one line of JSON for each, atomically."""
    atomic_write(str(path), "".join(item.to_json() + "\n" for item in hits).encode())


def check_queries(queries: Sequence[Query]) -> list[str]:
    """Check the texts of queries.

    Returns:
        What errors call each: `query` and its id, or its number from 1 where it has none.

    Raises:
        MissingFieldError: a prompt is empty.
        DataError: a text holds half of a character.
    """
    names = [f"query {query.id or number}" for number, query in enumerate(queries, start=1)]
    for name, query in zip(names, queries, strict=True):
        _check(name, query)
    return names


def _check(place: str, query: Query) -> None:
    if not any(turn["content"].strip() for turn in query.prompt):
        raise MissingFieldError(f"{place} has an empty prompt", expected="some text")
    parts = (part for turn in query.prompt for part in (turn["role"], turn["content"]))
    check_text(place, query.id, query.completion or "", *parts)


def _query(place: str, line: str, config: DataConfig) -> Query:
    row = parse_json(line, place, '{"prompt": "...", ...}')
    if not isinstance(row, dict):
        raise MissingFieldError(f"{place} is a {type(row).__name__}", expected='{"prompt": "...", ...}')
    names = dict.fromkeys((*filter(None, [config.messages]), config.prompt, "prompt"))
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise MissingFieldError(
            f"{place} has no prompt (fields: {', '.join(row) or 'none'})",
            expected=f"text or a list of {{role, content}} in a field {' or '.join(names)}",
            fix="correct the line",
        )
    is_chat = name == config.messages
    prompt = user_message(row[name]) if isinstance(row[name], str) and not is_chat else read_messages(row, name, place)
    completion = _field(row, config.completion, "completion")
    identifier = _field(row, config.id or "id", "id")
    if is_chat and prompt[-1]["role"] == "assistant":
        prompt, completion = prompt[:-1], prompt[-1]["content"]
    if completion is not None and not (isinstance(completion, str) and completion.strip()):
        raise MissingFieldError(
            f"{place}: the completion is {completion!r}", expected="some text, or none to have the model generate it"
        )
    query = Query(prompt, completion, "" if identifier is None else str(identifier))
    _check(place, query)
    return query


def _field(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
