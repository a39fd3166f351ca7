"""The answers that queries are traced by: those given, and for the others what the model says.

The run's first adapter answers, or the base model where there is none: greedily, or with label words by the likeliest
of them. Knows nothing of features or of what is done with an answer.
"""

from collections.abc import Sequence

import torch

from llmattrib.config import RunConfig
from llmattrib.data import Example, label_word
from llmattrib.encoding import Encoded, collate, encode_prompt, end_of_turn_id, length_batches, naming
from llmattrib.extraction import batch_memory
from llmattrib.forward import completion_logits
from llmattrib.hits import Query, check_queries
from llmattrib.model import LoadedModel


def answer(config: RunConfig, loaded: LoadedModel, label_ids: Sequence[int], queries: Sequence[Query]) -> list[Example]:
    """Return each query with its completion.

    Args:
        config: the run.
        loaded: its model.
        label_ids: the token of each label word.
        queries: what is asked; a given completion may be a label word or what `data.label_map` makes one.

    Raises:
        MissingFieldError, DataError: a text is empty, or no text.
        OverlongExampleError: a prompt leaves no room for an answer.
        LabelWordError: a completion is no label word.
    """
    names = check_queries(queries)
    given = {
        row: (label_word(names[row], query.completion, config.data, or_word=True), True)
        for row, query in enumerate(queries)
        if query.completion is not None
    }
    prompts = {}
    for row, query in enumerate(queries):
        if row not in given:
            with naming(names[row]):
                prompts[row] = encode_prompt(query.prompt, loaded.tokenizer, config.data)
    if prompts:
        loaded.use(loaded.adapter_names[0])
        if config.data.label_words:
            found = [(label, True) for label in _likeliest_labels(config, loaded, label_ids, list(prompts.values()))]
        else:
            longest = max(prompts, key=lambda row: len(prompts[row]))
            with naming(names[longest]):  # the prompt that an error about their length speaks of
                found = _generate(config, loaded, list(prompts.values()))
        given |= dict(zip(prompts, found, strict=True))
    return [query.answered(*given[row], name=names[row]) for row, query in enumerate(queries)]


def answered_by(loaded: LoadedModel, query: Query) -> str:
    """Return who generates the answer to a query, see `Hits`; nothing where it is given."""
    if query.completion is not None:
        return ""
    return "base model" if loaded.fingerprint["adapters"] == "none" else "adapter"


def _generate(config: RunConfig, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Return answers, and whether each ended by itself."""
    stop_ids, limit = [end_of_turn_id(loaded.tokenizer, config.data)], config.query.max_new_tokens
    answers = loaded.generate(prompts, limit, stop_ids)
    texts = [str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers]
    is_whole = [len(tokens) < limit for tokens in answers]
    return [(text if whole else text.rstrip("\ufffd"), whole) for text, whole in zip(texts, is_whole, strict=True)]


def _likeliest_labels(
    config: RunConfig, loaded: LoadedModel, label_ids: Sequence[int], prompts: Sequence[Sequence[int]]
) -> list[str]:
    encoded = [Encoded((*prompt, label_ids[0]), len(prompt), 0) for prompt in prompts]
    labels = [0] * len(prompts)
    for rows in length_batches(list(map(len, encoded)), config.features.tokens_per_batch):
        batch = collate([encoded[row] for row in rows], loaded.pad_id).to(loaded.device)
        with torch.inference_mode(), batch_memory(config, len(rows)):
            logits, _, _ = completion_logits(loaded.model, batch)
        for row, label in zip(rows, logits[:, list(label_ids)].argmax(1).tolist(), strict=True):
            labels[row] = label
    return [config.data.label_words[label] for label in labels]
