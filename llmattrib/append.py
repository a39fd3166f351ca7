"""Data that may have changed since its features were computed: check that the old rows are as they were.

A store keeps hashes of its examples and of their tokens. When it has n rows and there are more examples now, the
hashes of the first n decide whether the store can be extended; what else changes numbers must agree as ever. The
texts saved with the run serve only to name the row that was changed or removed. What trains on the data to judge the
features asks for the same rows, none added.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llmattrib.data import Example, data_fingerprint, read_examples
from llmattrib.encoding import Encoded, EncodedSet, encoded_fingerprint
from llmattrib.errors import DataError, FingerprintMismatchError
from llmattrib.manifest import Manifest, differing
from llmattrib.store import RowStore

SHOWN = 60  # characters of a text in a message


def content_fingerprint(examples: Sequence[Example], encoded: Sequence[Encoded]) -> dict[str, str]:
    """Return the hashes of examples and of their tokens, as a manifest keeps them."""
    return {"examples": data_fingerprint(examples), "tokens": encoded_fingerprint(encoded)}


def extend(store: RowStore, manifest: Manifest, encoded: EncodedSet, saved: str) -> int:
    """Extend a store when the data has grown at its end; its sketch plan, and all else in `info`, is kept.

    Args:
        store: the features that are there; opened for writing.
        manifest: what they would be made with now.
        encoded: the examples of now.
        saved: the file with the texts of the stored examples.

    Returns:
        Rows that were added; 0 when the data is as it was.

    Raises:
        FingerprintMismatchError: an old row was changed or removed, which is named, or a setting was.
        DiskSpaceError: the new rows would not fit.
    """
    stored = store.manifest
    first = slice(min(stored.num_rows, manifest.num_rows))
    content = content_fingerprint(encoded.examples[first], encoded.encoded[first])
    fingerprint = {**manifest.fingerprint, "data": content}
    as_before = dataclasses.replace(
        manifest, num_rows=len(encoded.encoded[first]), fingerprint=fingerprint, info=stored.info
    )
    keys = differing(stored.compared(), as_before.compared())
    if keys:
        raise FingerprintMismatchError(
            store.path,
            keys | _first_changed(stored, encoded.examples, saved),
            expected="the same model, adapter, data (rows may be added at its end), output function, linearisation "
            "point, sketch and dtype",
        )
    num_new = manifest.num_rows - stored.num_rows
    if num_new:
        counts = {name: manifest.info[name] for name in ("num_truncated", "num_skipped")}
        store.extend(dataclasses.replace(manifest, info={**stored.info, **counts}))
    return num_new


def require_data(store: RowStore, encoded: EncodedSet, saved: str) -> None:
    """Refuse examples that are not those of a store, row by row.

    Args:
        store: the features.
        encoded: the examples of now.
        saved: the file with the texts of the stored examples.

    Raises:
        FingerprintMismatchError: a row was added, changed, moved or removed; the first that was is named.
    """
    stored = store.manifest
    now = {"num_rows": len(encoded.encoded), "data": content_fingerprint(encoded.examples, encoded.encoded)}
    keys = differing({"num_rows": stored.num_rows, "data": stored.fingerprint["data"]}, now)
    if keys:
        raise FingerprintMismatchError(
            store.path,
            keys | _first_changed(stored, encoded.examples, saved),
            expected="features of the examples that training reads now",
            fix="run `llmattrib build` and what follows if rows were only added at the end of the data, else restore "
            "the data, or name another run_dir",
        )


def _first_changed(stored: Manifest, now: Sequence[Example], saved: str) -> dict[str, tuple[Any, Any]]:
    """Return the first stored example that is another one now, or is gone; nothing when its text is not at hand."""
    try:
        before = read_examples(saved)
    except DataError:
        return {}
    if data_fingerprint(before) != stored.fingerprint["data"]["examples"]:
        return {}
    for row, old in enumerate(before):
        if row >= len(now):
            return {f"row {row} (id {old.id!r})": ("there", "gone")}
        new = now[row]
        for name, was, is_now in (
            ("id", old.id, new.id),
            ("prompt", old.prompt, new.prompt),
            ("completion", old.completion, new.completion),
        ):
            if was != is_now:
                return {f"{name} of row {row} (id {old.id!r})": (_short(was), _short(is_now))}
    return {}


def _short(value: object) -> object:
    return value if len(str(value)) <= SHOWN else str(value)[:SHOWN] + "..."
