"""What is asked and what is answered, as plain values: queries from a file, hits, their JSON.

Knows nothing of models, stores or indices.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmattrib.data import Example, Message, check_text, user_message
from llmattrib.errors import EmptyDatasetError, MissingFieldError
from llmattrib.sections import DataConfig
from llmattrib.storage import atomic_write


@dataclass(frozen=True)
class Query:
    """A prompt, and the answer to trace.

    Attributes:
        prompt: the chat turns before the answer.
        completion: the answer; the model generates one when it is None.
        id: a name of the caller's.
    """

    prompt: tuple[Message, ...]
    completion: str | None = None
    id: str = ""

    @classmethod
    def of(cls, prompt: str | Sequence[Message], completion: str | None = None) -> "Query":
        """Make a query of a plain prompt or of chat turns."""
        return cls(user_message(prompt) if isinstance(prompt, str) else tuple(prompt), completion)

    def answered(self, completion: str, is_whole: bool = True) -> Example:
        """Return the query with `completion`, cut off unless `is_whole`, as an example to encode."""
        return Example(0, self.id or "query", self.prompt, completion, is_whole)


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
            config's data section gives these fields.
        config: the run's data section.

    Raises:
        EmptyDatasetError: there is no such file, or it has no rows.
        MissingFieldError, DataError: a row is not usable; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
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


def _query(place: str, line: str, config: DataConfig) -> Query:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise MissingFieldError(f"{place} is not JSON: {error}", expected='{"prompt": "...", ...}') from error
    if not isinstance(row, dict):
        raise MissingFieldError(f"{place} is a {type(row).__name__}", expected='{"prompt": "...", ...}')
    prompt = _field(row, "prompt", config.prompt)
    completion = _field(row, "completion", config.completion)
    identifier = _field(row, "id", config.id or "id")
    if not (isinstance(completion, str) or completion is None):
        raise MissingFieldError(f"{place}: the completion is {completion!r}", expected="text, or none to generate it")
    if isinstance(prompt, str) and prompt.strip():
        prompt = user_message(prompt)
    elif not _is_chat(prompt):
        raise MissingFieldError(
            f"{place}: the prompt is {prompt!r} (fields: {', '.join(row) or 'none'})",
            expected="a field `prompt` with text or a list of {role, content}",
            fix="correct the line",
        )
    check_text(place, completion or "", *(part for turn in prompt for part in turn.values()))
    return Query(tuple(prompt), completion, "" if identifier is None else str(identifier))


def _field(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} == set(turn) for turn in value)
        and all(isinstance(part, str) for turn in value for part in turn.values())
    )
