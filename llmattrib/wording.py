"""Which word each token of an example stands for, and which tokens are no words of it.

A word is a token, or a cluster of tokens whose embeddings are near (synonyms). Special tokens (padding, BOS, EOS, turn
marks) and, by default, what the chat template and the system text add are left out: they stand in every example, so
their gradients tell examples apart by nothing but position. Which part of a prompt is the template's is found by
rendering it with placeholders for the turns' texts. Knows nothing of models or gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmattrib.data import Example, Message
from llmattrib.encoding import Encoded, encode_prompt, render_prompt
from llmattrib.errors import ConfigError, DataError
from llmattrib.sections import DataConfig, WordsConfig

NO_WORD = -1
CLUSTER_BLOCK = 1024
"""Tokens whose cosines are computed at a time."""


@dataclass(frozen=True)
class Wording:
    """Which word each token of an example is.

    Attributes:
        tokenizer: of the model.
        data: template and system text.
        words: what is left out.
        clusters: word of each token; None where each token is a word of its own.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    words: WordsConfig
    clusters: Int[np.ndarray, " v"] | None = None
    _special: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look up the special tokens once."""
        object.__setattr__(self, "_special", special_ids(self.tokenizer))

    def of(self, example: Example, encoded: Encoded) -> Int[np.ndarray, " t"]:
        """Return the word at each position of an example, -1 where there is none.

        Args:
            example: its texts.
            encoded: the same, tokenised.

        Raises:
            DataError: the template changes the texts, so what is its own cannot be told.
            ConfigError: the tokenizer does not say where in a text its tokens are.
        """
        tokens = np.array(encoded.input_ids, np.int64)
        is_word = np.ones(len(tokens), bool)
        if self.words.exclude != "none":
            is_word &= ~np.isin(tokens, list(self._special))
        if self.words.exclude == "template":
            is_word[: encoded.completion_start] &= self._own_text(example, encoded)
        words = tokens if self.clusters is None else self.clusters[tokens]
        return np.where(is_word, words, NO_WORD)

    def _own_text(self, example: Example, encoded: Encoded) -> Bool[np.ndarray, " t"]:
        """Say of each prompt token whether it holds text of the example's turns."""
        is_own = own_text(example.prompt, self.tokenizer, self.data)
        excess = len(is_own) - encoded.completion_start
        if excess > 0:  # cut from the left, after BOS
            first = encode_prompt(example.prompt, self.tokenizer, self.data)[0]
            keep = 1 if first == self.tokenizer.bos_token_id else 0
            is_own = np.concatenate([is_own[:keep], is_own[keep + excess :]])
        return is_own


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that stand for no text: padding, BOS, EOS and the like, and marks of turns."""
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids)
    added = (token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special)
    return frozenset(int(token) for token in (*named, *added) if isinstance(token, int))


def own_text(
    prompt: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Bool[np.ndarray, " t"]:
    """Say of each token of a prompt whether it holds text of its turns: not of the template or `config.system` alone.

    Raises:
        DataError, ConfigError: see `Wording.of`.
    """
    text, with_bos = render_prompt(prompt, tokenizer, config)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} does not say which token is which part of a text",
            expected="a fast tokenizer for words.exclude=template",
            fix="set words.exclude=special",
        )
    found = tokenizer(text, add_special_tokens=with_bos, return_offsets_mapping=True)
    num_tokens = len(encode_prompt(prompt, tokenizer, config))
    is_own = np.zeros(len(text) + 1, np.int64)
    for start, stop in _spans(text, prompt, tokenizer, config):
        is_own[start + 1 : stop + 1] = 1
    before = np.cumsum(is_own)  # characters of turns before a place
    return np.array([before[stop] > before[start] for start, stop in found["offset_mapping"][:num_tokens]], bool)


def _spans(
    text: str, prompt: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[tuple[int, int]]:
    """Return where the texts of the turns stand in a rendered prompt."""
    marks = [f"\u2063turn {number}\u2063" for number in range(len(prompt))]
    marked = [Message(role=turn["role"], content=mark) for turn, mark in zip(prompt, marks, strict=True)]
    frame, _ = render_prompt(marked, tokenizer, config)
    contents = [turn["content"] for turn in prompt]
    for texts in (contents, [content.strip() for content in contents]):  # many templates trim
        rest, spans, place = frame, [], 0
        for mark, content in zip(marks, texts, strict=True):
            before, _, rest = rest.partition(mark)
            place += len(before)
            spans.append((place, place + len(content)))
            place += len(content)
        rendered = frame
        for mark, content in zip(marks, texts, strict=True):
            rendered = rendered.replace(mark, content, 1)
        if rendered == text:
            return spans
    raise DataError(
        f"the chat template changes the texts of the turns, as of {contents[-1][:60]!r}, so its own cannot be told",
        expected="a template that puts the texts in as they are, for words.exclude=template",
        fix="set words.exclude=special",
    )


def synonym_clusters(embedding: Float[Tensor, "v d"], cosine: float) -> Int[np.ndarray, " v"]:
    """Group tokens whose embeddings have a cosine of `cosine` or more with the first token of the group.

    A token joins the first group that it fits, in the order of tokens, so groups do not grow into chains. Costs a
    product of the matrix with the embeddings of the groups: v^2 d at most.

    Args:
        embedding: one row a token; rows of zeros stay alone.
        cosine: above 0.

    Returns:
        For each token the first token of its group.
    """
    rows = torch.nn.functional.normalize(embedding.detach().float().cpu(), dim=1)
    clusters = np.arange(len(rows))
    leaders: list[int] = []
    for start in range(0, len(rows), CLUSTER_BLOCK):
        block = rows[start : start + CLUSTER_BLOCK]
        is_near = (block @ rows[torch.tensor(leaders, dtype=torch.int64)].T >= cosine).numpy()
        is_like = (block @ block.T >= cosine).numpy()
        fresh: list[int] = []  # leaders within this block, by their place in it
        for place in range(len(block)):
            old, new = np.flatnonzero(is_near[place]), [other for other in fresh if is_like[place, other]]
            if len(old):
                clusters[start + place] = leaders[old[0]]
            elif new:
                clusters[start + place] = start + new[0]
            else:
                fresh.append(place)
        leaders += [start + place for place in fresh]
    return clusters
