"""Examples to tokens: chat template, completion mask, label words, padded batches.

The prompt and the completion are tokenised apart and joined, so the first completion token is known exactly and a
query's prompt has the tokens it had in training. With a chat template the prompt is rendered up to the assistant's
turn and the completion is followed by the token that ends that turn; without one the prompt's text is used as it
is and the completion is followed by EOS. With label words the completion is that one token and nothing follows.
Templates that print today's date get a fixed one, so that tokens do not depend on the day; one that reads the
clock itself still does, and `encoded_fingerprint` shows it. Tool calls and images are not supported.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmattrib.data import Example, Message
from llmattrib.errors import ConfigError, DataError, EmptyDatasetError, LabelWordError, OverlongExampleError
from llmattrib.sections import DataConfig

Side = Literal["left", "right"]
"""Where padding goes."""
TEMPLATE_DATE = "26 Jul 2024"  # the date that Llama 3 templates fall back to
_SENTINEL = "\u2063completion\u2063"  # invisible separators: no template contains it


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised example.

    Args:
        input_ids: prompt tokens, then completion tokens.
        completion_start: tokens from here on are completion; at least 1.
        label: index into `label_words`, -1 without label words.
    """

    input_ids: tuple[int, ...]
    completion_start: int
    label: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedSet:
    """Tokenised examples, and what the overlong policy did.

    Args:
        encoded: one for each kept example.
        examples: the kept examples, in order.
        num_truncated: examples whose prompt was cut.
        num_skipped: examples left out.
    """

    encoded: list[Encoded]
    examples: list[Example]
    num_truncated: int
    num_skipped: int


@dataclass(frozen=True)
class Batch:
    """Padded examples as tensors.

    Args:
        input_ids: tokens, `pad_id` where there are none.
        attention_mask: 1 on tokens, 0 on padding.
        position_ids: position of each token in its example; 0 on padding.
        completion_mask: true on completion tokens.
        labels: index into `label_words`, -1 without.
        side: where the padding is.
    """

    input_ids: Int64[Tensor, "b t"]
    attention_mask: Int64[Tensor, "b t"]
    position_ids: Int64[Tensor, "b t"]
    completion_mask: Bool[Tensor, "b t"]
    labels: Int64[Tensor, " b"]
    side: Side

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def uses_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    return config.chat_template == "auto" and bool(tokenizer.chat_template)


def render_prompt(
    prompt: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[str, bool]:
    """Return the text of a prompt up to where the completion begins, and whether the tokenizer adds BOS to it.

    `config.system` becomes the first turn when the prompt has no system turn. Without a template the turns'
    texts are joined by newlines, and BOS is added when the tokenizer does so.

    Raises:
        DataError: the template rejects the turns.
    """
    turns = list(prompt)
    if config.system is not None and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, Message(role="system", content=config.system))
    if uses_template(tokenizer, config):
        return _render(tokenizer, turns, add_generation_prompt=True), False
    return "\n".join(turn["content"] for turn in turns), True


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in errors about a text which text it is."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{name}: {error.found}", expected=error.expected, fix=error.fix) from error


def encode_prompt(prompt: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Tokenise what `render_prompt` returns.

    Returns:
        Token ids, at least one.

    Raises:
        DataError: the template rejects the turns, or no token comes out.
    """
    text, with_bos = render_prompt(prompt, tokenizer, config)
    ids = _ids(tokenizer, text, with_bos)
    if with_bos and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # tokenizers that end every text
        ids.pop()
    if not ids:
        raise DataError(f"the prompt {list(prompt)!r} has no tokens", expected="one or more", fix="give it some text")
    return ids


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> int:
    """Return the token that ends a completion: the template's end of turn, or EOS.

    Raises:
        DataError: the tokenizer has no EOS token where one is needed.
    """
    if uses_template(tokenizer, config):
        end = _template_end(tokenizer, str(tokenizer.chat_template))
        if end is not None:
            return end
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no EOS token",
            expected="a token that ends completions",
            fix="set eos_token in its tokenizer_config.json",
        )
    return tokenizer.eos_token_id


def label_token_ids(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Return the token of each label word, as it stands right after the prompt.

    Raises:
        LabelWordError: a word is not exactly one token, or two words are the same.
    """
    ids: list[int] = []
    for word in config.label_words:
        tokens = _ids(tokenizer, word)
        if len(tokens) != 1:
            raise LabelWordError(
                f"label word {word!r} is {len(tokens)} tokens: {tokenizer.convert_ids_to_tokens(tokens)}",
                expected="one token for each of data.label_words",
                fix="choose words that are one token; a leading space or a capital may decide",
            )
        ids.append(tokens[0])
    if len(set(ids)) != len(ids) or len({word.strip() for word in config.label_words}) != len(ids):
        raise LabelWordError(f"label words {list(config.label_words)} are not distinct", expected="different words")
    return ids


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, max_length: int) -> Encoded:
    """Tokenise one example.

    Args:
        example: what to tokenise.
        tokenizer: the model's tokenizer.
        config: template, label words and overlong policy.
        max_length: tokens of the model's context; `config.max_length` may ask for fewer.

    Returns:
        The tokens; the prompt is cut from the left (BOS stays) if they are too many and the policy is `truncate`.

    Raises:
        OverlongExampleError: too long and the policy is not `truncate`, or the completion alone is too long.
        LabelWordError: there are label words and the completion is none of them.
    """
    prefix, completion, label = _parts(example, tokenizer, config)
    limit = length_limit(config, max_length)
    excess = len(prefix) + len(completion) - limit
    if excess > 0:
        if config.overlong != "truncate":
            raise OverlongExampleError(
                f"{example.id!r} has {len(prefix) + len(completion)} tokens, prompt and completion together",
                expected=f"at most {limit} tokens",
                fix="shorten it, or set data.overlong to truncate, which cuts its prompt from the left",
            )
        keep = 1 if prefix[0] == tokenizer.bos_token_id else 0
        if len(prefix) - excess <= keep:
            raise OverlongExampleError(
                f"the completion of example {example.id!r} alone has {len(completion)} tokens",
                expected=f"at most {limit - 1 - keep}, so that some of the prompt stays in {limit}",
                fix="shorten it, raise data.max_length, or (of training examples) set data.overlong to skip",
            )
        prefix = prefix[:keep] + prefix[keep + excess :]
    return Encoded((*prefix, *completion), len(prefix), label)


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> EncodedSet:
    """Tokenise examples under the overlong policy; see `encode`.

    Raises:
        OverlongExampleError: the policy is `error` and some are too long: how many, and the first.
        EmptyDatasetError: all were skipped.
    """
    limit = length_limit(config, max_length)
    label_token_ids(tokenizer, config)
    encoded: list[Encoded] = []
    token: dict[int, int] = {}  # one object for each token of the vocabulary, 8 bytes a place instead of 36
    kept: list[Example] = []
    overlong: list[Example] = []
    lengths: list[int] = []
    for example in examples:
        prefix, completion, label = _parts(example, tokenizer, config)
        length = len(prefix) + len(completion)
        if length > limit:
            overlong.append(example)
            lengths.append(length)
            if config.overlong != "truncate":
                continue
            item = encode(example, tokenizer, config, max_length=max_length)
        else:
            item = Encoded((*prefix, *completion), len(prefix), label)
        encoded.append(replace(item, input_ids=tuple(token.setdefault(k, k) for k in item.input_ids)))
        kept.append(example)
    if overlong and config.overlong == "error":
        raise _overlong(overlong, lengths, limit)
    if not kept:
        raise EmptyDatasetError(
            f"all {len(overlong)} examples are longer than {limit} tokens and were skipped",
            expected="one or more that fit",
            fix="raise data.max_length, or set data.overlong to truncate",
        )
    truncated = len(overlong) if config.overlong == "truncate" else 0
    return EncodedSet(encoded, kept, truncated, len(overlong) - truncated)


def length_limit(config: DataConfig, max_length: int) -> int:
    """Return the most tokens an example may have: `config.max_length`, or the model's context `max_length`.

    Raises:
        ConfigError: the config asks for more than the context.
    """
    if config.max_length is None:
        return max_length
    if config.max_length > max_length:
        raise ConfigError(
            f"data.max_length is {config.max_length}", expected=f"at most the model's context of {max_length} tokens"
        )
    return config.max_length


def encoded_fingerprint(encoded: Sequence[Encoded]) -> str:
    """Return the sha256 (hex) over the tokens, completion starts and labels in order.

    It changes with the tokenizer, template, system text, label words and overlong policy.
    """
    state = hashlib.sha256()
    for item in encoded:
        state.update(np.array([len(item), item.completion_start, item.label, *item.input_ids], "<i8").tobytes())
    return state.hexdigest()


def collate(batch: Sequence[Encoded], pad_id: int, side: Side = "right") -> Batch:
    """Pad tokenised examples to one length.

    Args:
        batch: one or more examples.
        pad_id: the token on padding; masks come from lengths, so it may also be EOS.
        side: where the padding goes.
    """
    width = max(len(item) for item in batch)
    input_ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    position_ids = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, item in enumerate(batch):
        start = width - len(item) if side == "left" else 0
        stop = start + len(item)
        input_ids[row, start:stop] = torch.tensor(item.input_ids)
        attention_mask[row, start:stop] = 1
        position_ids[row, start:stop] = torch.arange(len(item))
        completion_mask[row, start + item.completion_start : stop] = True
    labels = torch.tensor([item.label for item in batch], dtype=torch.int64)
    return Batch(input_ids, attention_mask, position_ids, completion_mask, labels, side)


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group examples of similar length.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: most tokens of a batch, padding included; a longer example is a batch of its own.

    Returns:
        Indices, each once, sorted by (length, index).
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _parts(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[int], list[int], int]:
    """Return prompt tokens, completion tokens and label."""
    with naming(repr(example.id)):
        prefix = encode_prompt(example.prompt, tokenizer, config)
    if not config.label_words:
        completion = _ids(tokenizer, example.completion)
        if example.is_whole or not completion:
            completion.append(end_of_turn_id(tokenizer, config))
        return prefix, completion, -1
    words = [word.strip() for word in config.label_words]
    if example.completion.strip() not in words:
        raise LabelWordError(
            f"example {example.id!r} has the completion {example.completion!r}",
            expected=f"one of data.label_words {list(config.label_words)}",
            fix="correct the example or the label words",
        )
    label = words.index(example.completion.strip())
    return prefix, [label_token_ids(tokenizer, config)[label]], label


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, with_bos: bool = False) -> list[int]:
    # not verbose: it would warn of texts longer than the context, which the overlong policy speaks of
    return list(tokenizer(text, add_special_tokens=with_bos, verbose=False)["input_ids"])


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": turn["role"], "content": turn["content"]} for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=TEMPLATE_DATE,
            )
        )
    except Exception as error:  # a template is a program and raises what it likes
        raise DataError(
            f"the chat template rejects the roles {[turn['role'] for turn in turns]}: {error}",
            fix="correct the turns, or set data.chat_template to none",
        ) from error


@lru_cache(maxsize=8)
def _template_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """Return the special token that `template` puts right after an assistant turn, if any."""
    turns = [Message(role="user", content="?"), Message(role="assistant", content=_SENTINEL)]
    _, found, after = _render(tokenizer, turns, add_generation_prompt=False).rpartition(_SENTINEL)
    tokens = _ids(tokenizer, after.lstrip()) if found else []
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def _overlong(examples: Sequence[Example], lengths: Sequence[int], limit: int) -> OverlongExampleError:
    return OverlongExampleError(
        f"{len(examples)} example{'s are' if len(examples) > 1 else ' is'} longer than {limit} tokens, "
        f"the first {examples[0].id!r} with {lengths[0]}",
        expected=f"at most {limit} tokens, prompt and completion together",
        fix="set data.overlong to truncate or skip, or shorten the examples",
    )
