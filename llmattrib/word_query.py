"""Queries by word: exact values of examples from their stored word gradients, and the words through which they act.

The word gradients of a prompt are computed; those of training examples are read, so no example goes through the model
again. Values are sums over words in float64, and what is shown of a word is its summand.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from llmattrib.config import RunConfig
from llmattrib.data import Example
from llmattrib.encoding import Encoded
from llmattrib.errors import FingerprintMismatchError, MethodError
from llmattrib.extraction import encode_examples
from llmattrib.features.extract import Extractor
from llmattrib.features.words import WordGradients
from llmattrib.hits import Explanation
from llmattrib.manifest import differing
from llmattrib.scorers.tracin_we import WordRows, explain, word_rows
from llmattrib.sections import Method
from llmattrib.store import RowStore
from llmattrib.wording import Wording
from llmattrib.words import METHOD, extract_words, load_word_extractor, stored_wording, stored_words, word_fingerprint


def check_explained(methods: Sequence[Method]) -> None:
    """Check that the methods asked for explain their values by words.

    Raises:
        MethodError: one does not.
    """
    if {*methods} != {METHOD}:
        raise MethodError(
            f"only {METHOD} explains its values by words, and asked were {', '.join(methods)}",
            expected=f"the method {METHOD}",
            fix=f"ask for {METHOD} alone, or leave the explanation out",
        )


class WordQuery:
    """Word gradients of prompts, against those that are stored.

    Args:
        config: the run.
        extractor: its model.
        store: the word gradients of the training examples.

    Raises:
        FingerprintMismatchError: the model is not the one that they were made with.
    """

    def __init__(self, config: RunConfig, extractor: Extractor, store: RowStore) -> None:
        self.config, self.store = config, store
        self._extractor = extractor
        stored = {key: value for key, value in store.manifest.fingerprint.items() if key != "data"}
        keys = differing(stored, word_fingerprint(config, extractor))
        if keys:
            raise FingerprintMismatchError(store.path, keys)
        self._words = load_word_extractor(config, extractor)

    @cached_property
    def _wording(self) -> Wording:
        return stored_wording(self.config, self._extractor, self.store)

    def gradients(self, examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[WordGradients]:
        """Return the word gradients of answered queries."""
        return extract_words(self.config, self._words, self._wording, encoded, examples)

    def values(self, query: WordGradients, rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        """Return the exact values of some training examples; of all of them at the cost of reading the store."""
        asked = word_rows(query.words, query.rows)
        return np.array([sum(explain(asked, own).values()) for own in self._read(rows)], np.float32)

    def all_values(self, queries: Sequence[WordGradients]) -> Float[np.ndarray, "q n"]:
        """Return the exact values of all training examples, in one pass over the store."""
        asked = [word_rows(query.words, query.rows) for query in queries]
        found = np.empty((len(asked), self.store.manifest.num_rows))
        for start, rows in self.store.blocks():
            words = stored_words(self.store, start, start + len(rows))
            for place in range(len(rows)):
                own = word_rows(words[place], rows[place])
                found[:, start + place] = [sum(explain(query, own).values()) for query in asked]
        return found

    def explanation(self, query: WordGradients, example: Example) -> Explanation:
        """Return the words through which a training example acts on a query."""
        (own,) = self._read(np.array([example.index]))
        values = explain(word_rows(query.words, query.rows), own)
        (encoded,) = encode_examples(self.config, self._extractor, [example]).encoded
        words = self._wording.of(example, encoded).tolist()
        texts = token_texts(self._extractor.loaded.tokenizer, encoded.input_ids)
        names: dict[int, dict[str, None]] = {word: {} for word in values}
        pieces = []
        for place, (word, text) in enumerate(zip(words, texts, strict=True)):
            if word in values:
                names[word][text] = None
            if word >= 0:
                pieces.append((place >= encoded.completion_start, (text, values.get(word, 0.0))))
        ranked = sorted(values, key=lambda word: (-abs(values[word]), word))
        return Explanation(
            words=tuple(("/".join(names[word]), values[word]) for word in ranked),
            prompt=tuple(piece for is_completion, piece in pieces if not is_completion),
            completion=tuple(piece for is_completion, piece in pieces if is_completion),
        )

    def _read(self, rows: Int[np.ndarray, " k"]) -> list[WordRows]:
        """Read the word gradients of examples."""
        found = []
        for row in rows.tolist():
            words = stored_words(self.store, row, row + 1)[0]
            found.append(word_rows(words, self.store.read(row, row + 1)[0]))
        return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character whose bytes are spread over tokens is that of the last of them."""
    texts, first, done = [], 0, 0
    for stop in range(1, len(ids) + 1):
        before, after = (str(tokenizer.decode(list(ids[first:end]))) for end in (done, stop))
        if after.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        first, done = done, stop
    return texts
