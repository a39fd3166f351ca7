"""Tokens, completion boundaries, label words, batches."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmattrib.data import Example, Message, user_message
from llmattrib.encoding import (
    Encoded,
    collate,
    encode,
    encode_all,
    encode_prompt,
    encoded_fingerprint,
    end_of_turn_id,
    label_token_ids,
    length_batches,
)
from llmattrib.errors import ConfigError, DataError, EmptyDatasetError, LabelWordError, OverlongExampleError
from llmattrib.sections import DataConfig
from tests.tiny import tiny_tokenizer

CONFIG = DataConfig(train="unused.jsonl")
PLAIN = DataConfig(train="unused.jsonl", chat_template="none")
LABELS = DataConfig(train="unused.jsonl", label_words=("yes", "no"))
EOS = 2


def example(prompt: str = "what is a tree", completion: str = "green", name: str = "x") -> Example:
    return Example(0, name, user_message(prompt), completion)


def test_chat_template_then_completion_then_end_of_turn() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(example(), tokenizer, CONFIG, max_length=100)
    text = tokenizer.decode(encoded.input_ids)
    assert text == "<|im_start|>user\nwhat is a tree<|im_end|>\n<|im_start|>assistant\ngreen<|im_end|>"
    assert tokenizer.decode(encoded.input_ids[encoded.completion_start :]) == "green<|im_end|>"
    assert encoded.label == -1


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_tokenizer(chat_template=False)])
def test_without_template_text_then_eos(tokenizer) -> None:  # type: ignore[no-untyped-def]
    encoded = encode(example(), tokenizer, PLAIN, max_length=100)
    assert tokenizer.decode(encoded.input_ids) == "what is a treegreen<|im_end|>"
    assert tokenizer.decode(encoded.input_ids[: encoded.completion_start]) == "what is a tree"


def test_bos_comes_once_and_only_where_the_tokenizer_puts_it() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    plain = encode(example(), tokenizer, PLAIN, max_length=100)
    assert plain.input_ids[0] == tokenizer.bos_token_id
    assert plain.input_ids.count(tokenizer.bos_token_id) == 1
    chat = encode(example(), tokenizer, CONFIG, max_length=100)  # the template writes <|im_start|> itself
    assert chat.input_ids == encode(example(), tiny_tokenizer(), CONFIG, max_length=100).input_ids


def test_an_eos_that_the_tokenizer_appends_to_prompts_is_removed() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat_template=False)
    expected = encode_prompt(user_message("what"), tokenizer, PLAIN)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", EOS)]
    )
    assert tokenizer("what")["input_ids"] == [*expected, EOS]
    assert encode_prompt(user_message("what"), tokenizer, PLAIN) == expected


def test_a_query_prompt_has_the_tokens_it_had_in_training() -> None:
    tokenizer = tiny_tokenizer()
    for config in (CONFIG, PLAIN):
        encoded = encode(example(), tokenizer, config, max_length=100)
        assert encode_prompt(example().prompt, tokenizer, config) == list(encoded.input_ids[: encoded.completion_start])


def test_the_system_text_goes_first_unless_there_is_one() -> None:
    tokenizer = tiny_tokenizer()
    config = DataConfig(train="x", system="be kind")
    assert "<|im_start|>system\nbe kind<|im_end|>" in tokenizer.decode(
        encode_prompt(user_message("?"), tokenizer, config)
    )
    own = (Message(role="system", content="be curt"), *user_message("?"))
    assert encode_prompt(own, tokenizer, config) == encode_prompt(own, tokenizer, CONFIG)
    plain = DataConfig(train="x", system="be kind", chat_template="none")
    assert tokenizer.decode(encode_prompt(user_message("?"), tokenizer, plain)) == "be kind\n?"


def test_the_end_of_turn_is_the_templates_own() -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_turn_id(tokenizer, CONFIG) == EOS
    tokenizer.eos_token = "<pad>"  # as in models whose turns end with another token than texts
    assert end_of_turn_id(tokenizer, CONFIG) == EOS
    assert end_of_turn_id(tokenizer, PLAIN) == tokenizer.pad_token_id
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert end_of_turn_id(tokenizer, CONFIG) == tokenizer.pad_token_id


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        encode(example(), tokenizer, CONFIG, max_length=100)


def test_a_template_that_rejects_the_turns_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match=r"rejects the roles \['user'\]: no system turns"):
        encode(example(), tokenizer, CONFIG, max_length=100)


def test_a_template_that_reads_the_date_gets_a_fixed_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}"
    )
    assert tokenizer.decode(encode_prompt(user_message("?"), tokenizer, CONFIG)) == "26 Jul 2024"


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="has no tokens"):
        encode_prompt(user_message(""), tiny_tokenizer(), PLAIN)


def test_label_words() -> None:
    tokenizer = tiny_tokenizer()
    ids = label_token_ids(tokenizer, LABELS)
    assert tokenizer.convert_ids_to_tokens(ids) == ["yes", "no"]
    encoded = encode(example(completion=" no"), tokenizer, LABELS, max_length=100)
    assert encoded.label == 1
    assert encoded.input_ids[encoded.completion_start :] == (ids[1],)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("yes", "elephant"), "label word 'elephant' is .* tokens"),
        (("yes", "yes"), "not distinct"),
        (("yes", " yes"), "not distinct"),
    ],
)
def test_unusable_label_words(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(LabelWordError, match=message):
        encode_all([example(completion="yes")], tiny_tokenizer(), DataConfig(train="x", label_words=words), 100)


def test_a_completion_that_is_no_label_word() -> None:
    with pytest.raises(LabelWordError, match="example 'seven' has the completion 'maybe'"):
        encode(example(completion="maybe", name="seven"), tiny_tokenizer(), LABELS, max_length=100)


def examples_of_three_lengths() -> list[Example]:
    return [example("a", "b", "short"), example("a tree " * 20, "b", "long"), example("a tree " * 30, "b", "longer")]


def overlong(policy: str, **more: int) -> DataConfig:
    return DataConfig(train="x", chat_template="none", overlong=policy, **more)  # type: ignore[arg-type]


def test_overlong_examples_are_counted_and_the_first_is_named() -> None:
    with pytest.raises(OverlongExampleError, match=r"(?s)2 examples are longer than 40 tokens, the first 'long' with"):
        encode_all(examples_of_three_lengths(), tiny_tokenizer(), overlong("error"), 40)
    with pytest.raises(OverlongExampleError, match=r"(?s)'long' has \d+ tokens, prompt and completion .*at most 40"):
        encode(examples_of_three_lengths()[1], tiny_tokenizer(), overlong("skip"), max_length=40)


def test_no_library_warns_of_what_the_overlong_policy_speaks_of() -> None:
    tokenizer = tiny_tokenizer()
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.tokenization_utils_base.logger.warning", warned.append)
        encode(example("tree " * 200), tokenizer, overlong("truncate"), max_length=100)
    assert warned == []


def test_overlong_examples_are_skipped_and_counted() -> None:
    kept = encode_all(examples_of_three_lengths(), tiny_tokenizer(), overlong("skip"), 40)
    assert [item.id for item in kept.examples] == ["short"]
    assert (len(kept.encoded), kept.num_skipped, kept.num_truncated) == (1, 2, 0)
    with pytest.raises(EmptyDatasetError, match="all 2 examples are longer than 40 tokens"):
        encode_all(examples_of_three_lengths()[1:], tiny_tokenizer(), overlong("skip"), 40)


@pytest.mark.parametrize("bos", [False, True])
def test_truncation_cuts_the_prompt_from_the_left(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    whole = encode_all(examples_of_three_lengths(), tokenizer, overlong("error"), 1000)
    cut = encode_all(examples_of_three_lengths(), tokenizer, overlong("truncate"), 40)
    assert (cut.num_truncated, cut.num_skipped, len(cut.encoded)) == (2, 0, 3)
    assert cut.encoded[0] == whole.encoded[0]
    for short, full in zip(cut.encoded[1:], whole.encoded[1:], strict=True):
        assert len(short) == 40
        assert short.input_ids[bos:] == full.input_ids[-(40 - bos) :]
        assert not bos or short.input_ids[0] == tokenizer.bos_token_id
        assert short.input_ids[short.completion_start :] == full.input_ids[full.completion_start :]


def test_a_completion_that_leaves_no_room_for_a_prompt() -> None:
    config, tokenizer = overlong("truncate"), tiny_tokenizer()
    item = example("a tree", "green " * 5)
    length = len(tokenizer("green " * 5)["input_ids"]) + 1
    assert encode(item, tokenizer, config, max_length=length + 1).completion_start == 1
    with pytest.raises(OverlongExampleError, match=f"completion of example 'x' alone has {length} tokens"):
        encode(item, tokenizer, config, max_length=length)


def test_max_length_of_the_config_may_not_exceed_the_context() -> None:
    with pytest.raises(OverlongExampleError, match="longer than 30"):
        encode_all(examples_of_three_lengths(), tiny_tokenizer(), overlong("error", max_length=30), 40)
    with pytest.raises(ConfigError, match=r"(?s)data.max_length is 50.*context of 40"):
        encode_all(examples_of_three_lengths(), tiny_tokenizer(), overlong("error", max_length=50), 40)


def test_encode_all_equals_encode() -> None:
    items = [example(f"what is a {word}", word) for word in ("tree", "stone", "river")]
    together = encode_all(items, tiny_tokenizer(), CONFIG, 100)
    assert together.encoded == [encode(item, tiny_tokenizer(), CONFIG, max_length=100) for item in items]
    assert together.examples == items


def test_a_token_is_one_object_in_all_examples() -> None:
    """Python makes a new object of 28 bytes for each number above 256 that a tokenizer returns."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "benchmarks" / "truth" / "llama_1m")
    texts = [example("the highest mountain of the country"), example("the highest mountain of the country", name="y")]
    first, second = encode_all(texts, tokenizer, PLAIN, 100).encoded
    assert any(token > 256 for token in first.input_ids)
    assert all(one is other for one, other in zip(first.input_ids, second.input_ids, strict=True))


def test_fingerprint_of_tokens() -> None:
    one, other = Encoded((5, 6, 7), 1, -1), Encoded((5, 6), 1, 0)
    prints = [[one, other], [other, one], [one], [Encoded((5, 6, 7), 2, -1), other], [Encoded((5, 6, 7), 1, 0), other]]
    assert len({encoded_fingerprint(items) for items in prints}) == len(prints)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate(side: str) -> None:
    items = [Encoded((5, 6, 7), 2, 1), Encoded((8,), 1, -1), Encoded((9, 9, 2, 2, 2), 3, 0)]
    batch = collate(items, pad_id=2, side=side)  # type: ignore[arg-type]
    assert batch.input_ids.shape == (3, 5)
    for row, item in enumerate(items):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == list(item.input_ids)
        assert batch.position_ids[row][real].tolist() == list(range(len(item)))
        assert batch.completion_mask[row][real].tolist() == [t >= item.completion_start for t in range(len(item))]
        assert not batch.completion_mask[row][~real].any()
        assert (batch.input_ids[row][~real] == 2).all()
        assert bool(real[0 if side == "right" else -1])
    assert batch.labels.tolist() == [1, -1, 0]
    assert batch.to("cpu").side == side
    assert torch.equal(batch.to(torch.device("cpu")).input_ids, batch.input_ids)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_length_batches(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all((lengths[i], i) < (lengths[j], j) for i, j in pairwise(order))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    for first, second in pairwise(batches):  # no batch could have taken one more
        assert (len(first) + 1) * lengths[second[0]] > budget
