"""Word gradients against plain autograd on embeddings, their laws, their sketch, and which tokens are words."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import FAMILIES, tiny_adapter_dir, tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmattrib.data import Example, user_message
from llmattrib.encoding import Encoded, encode
from llmattrib.errors import ConfigError, DataError
from llmattrib.features.words import WordExtractor, WordGradients, sum_words
from llmattrib.model import load_model
from llmattrib.rng import stream
from llmattrib.scorers.tracin_we import WordSketch, explain, word_rows
from llmattrib.sections import DataConfig, FeaturesConfig, ModelConfig, WordsConfig
from llmattrib.wording import NO_WORD, Wording, own_text, special_ids, synonym_clusters

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LABEL_IDS = (7, 11, 40)
VOCAB = 336


def examples(count: int, labels: bool = False, seed: int = 0, num_tokens: int = 40) -> list[Encoded]:
    """Random tokens out of few, so that examples share words and words repeat."""
    draws, made = stream(seed, "test words"), []
    for _ in range(count):
        start = int(draws.integers(2, 12))
        ids = draws.integers(3, num_tokens, start + (1 if labels else int(draws.integers(2, 7)))).tolist()
        label = int(draws.integers(3)) if labels else -1
        if labels:
            ids[start] = LABEL_IDS[label]
        made.append(Encoded(tuple(ids), start, label))
    return made


def words_of(batch: Sequence[Encoded]) -> list[np.ndarray]:
    return [np.array(item.input_ids, np.int64) for item in batch]


def value_of(logits: torch.Tensor, example: Encoded, kind: str) -> torch.Tensor:
    """The output function, from its definition, of the logits [t, v] of one example."""
    targets = list(example.input_ids[example.completion_start :])
    read = logits[example.completion_start - 1 : -1]
    if example.label >= 0:
        logp = torch.log_softmax(read[0, list(LABEL_IDS)], 0)[example.label]
    else:
        logp = torch.log_softmax(read, 1)[torch.arange(len(targets)), targets].mean()
    return -logp if kind == "loss" else logp - torch.log(-torch.expm1(logp))


def oracle(model: Any, example: Encoded, kind: str) -> np.ndarray:
    """The matrix of token gradients [v, d] of one example: autograd on embeddings that are passed in."""
    ids = torch.tensor([example.input_ids])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    value = value_of(model(inputs_embeds=embeds).logits[0], example, kind)
    (gradient,) = torch.autograd.grad(value, embeds)
    matrix = np.zeros((VOCAB, embeds.shape[2]))
    for token, row in zip(example.input_ids, gradient[0].double().numpy(), strict=True):
        matrix[token] += row
    return matrix


def matrix_of(found: WordGradients, size: int = VOCAB) -> np.ndarray:
    matrix = np.zeros((size, found.rows.shape[1]))
    matrix[found.words] = found.rows
    return matrix


def value(query: WordGradients, example: WordGradients) -> float:
    return sum(explain(word_rows(query.words, query.rows), word_rows(example.words, example.rows)).values())


def at_init(tmp_path: Path, family: str, output: str, labels: bool = False) -> tuple[WordExtractor, Any]:
    base = tiny_model_dir(tmp_path, family)
    loaded = load_model(ModelConfig(name=base, device="cpu"))
    features = FeaturesConfig.model_validate({"output": output})
    return WordExtractor(loaded, features, label_ids=LABEL_IDS if labels else ()), AutoModelForCausalLM.from_pretrained(
        base
    ).eval()


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("output", "labels"), [("loss", False), ("log_odds", False), ("margin", True)])
def test_word_gradients_equal_autograd_on_embeddings(tmp_path: Path, family: str, output: str, labels: bool) -> None:
    extractor, model = at_init(tmp_path, family, output, labels)
    batch = examples(6, labels)
    found = extractor.extract(batch, words_of(batch), None)
    matrices = [oracle(model, item, output) for item in batch]
    for one, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(matrix_of(one), matrix, rtol=1e-4, atol=1e-5 * np.abs(matrix).max())
    # the sum over shared words is the Frobenius inner product of the matrices of token gradients
    for a in range(6):
        for b in range(6):
            scale = np.linalg.norm(matrices[a]) * np.linalg.norm(matrices[b])
            assert abs(value(found[a], found[b]) - np.sum(matrices[a] * matrices[b])) <= 1e-5 * scale


def test_several_adapters_add_with_their_weights(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    adapters = [tiny_adapter_dir(tmp_path, base, seed=seed, name=f"adapter-{seed}") for seed in (1, 2)]
    loaded = load_model(ModelConfig(name=base, device="cpu"), adapters=adapters)
    features, batch = FeaturesConfig(linearisation="trained"), examples(4)
    found = WordExtractor(loaded, features, (0.3, 2.0)).extract(batch, words_of(batch), None)
    expected = np.zeros((4, 4))
    for weight, adapter in zip((0.3, 2.0), adapters, strict=True):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        rows = np.stack([oracle(model, item, "loss").ravel() for item in batch])
        expected += weight * rows @ rows.T
    kernel = np.array([[value(a, b) for b in found] for a in found])
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    alike = WordExtractor(loaded, features).extract(batch, words_of(batch), None)
    halves = WordExtractor(loaded, features, (0.5, 0.5)).extract(batch, words_of(batch), None)
    assert all((a.rows == b.rows).all() for a, b in zip(alike, halves, strict=True))
    with pytest.raises(ConfigError, match=r"words\.adapter_weights has 3 numbers, and gradients are taken at 2 points"):
        WordExtractor(loaded, features, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # tied
def test_a_word_gradient_of_tied_embeddings_is_a_finite_difference_of_the_input_alone(
    tmp_path: Path, family: str
) -> None:
    extractor, model = at_init(tmp_path, family, "loss")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    batch = examples(1, seed=3)
    (found,) = extractor.extract(batch, words_of(batch), None)
    model, embedding = model.double(), model.get_input_embeddings()
    ids = torch.tensor([batch[0].input_ids])
    word = int(max(set(batch[0].input_ids[:-1]), key=batch[0].input_ids.count))
    direction = torch.from_numpy(stream(0, "direction").standard_normal(found.rows.shape[1]))

    def at(step: float) -> float:
        moved = embedding(ids).detach()
        moved[ids == word] += step * direction
        return float(value_of(model(inputs_embeds=moved).logits[0], batch[0], "loss").detach())

    slope = (at(1e-3) - at(-1e-3)) / 2e-3  # norms are in float32 even here
    assert found.rows[found.words.tolist().index(word)] @ direction.numpy() == pytest.approx(slope, rel=1e-3)
    both = embedding.weight.detach().clone()  # the weight itself moves the output side too: another number
    with torch.no_grad():
        losses = []
        for step in (1e-3, -1e-3):
            embedding.weight[word] = both[word] + step * direction
            losses.append(float(value_of(model(input_ids=ids).logits[0], batch[0], "loss")))
    assert (losses[0] - losses[1]) / 2e-3 != pytest.approx(slope, rel=1e-2)


def test_no_gradient_of_a_weight_is_formed(tmp_path: Path) -> None:
    extractor, _ = at_init(tmp_path, "qwen2", "loss")
    batch = examples(3)
    extractor.extract(batch, words_of(batch), 10)
    assert all(not p.requires_grad and p.grad is None for p in extractor.loaded.model.parameters())
    assert extractor.num_batches == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_padding_and_order_do_not_matter(tmp_path: Path, family: str) -> None:
    extractor, _ = at_init(tmp_path, family, "log_odds")
    batch = examples(5)
    alone = [extractor.extract([item], words_of([item]), 6)[0] for item in batch]
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        shuffled = [batch[k] for k in order]
        for side in ("right", "left"):
            found = extractor.extract(shuffled, words_of(shuffled), 6, side)  # type: ignore[arg-type]
            for k, one in zip(order, found, strict=True):
                assert one.words.tolist() == alone[k].words.tolist()
                np.testing.assert_allclose(one.rows, alone[k].rows, rtol=1e-3, atol=1e-5 * np.abs(one.rows).max())
                assert one.norm == pytest.approx(alone[k].norm, rel=1e-4)


def test_non_finite_gradients_are_told(tmp_path: Path) -> None:
    extractor, _ = at_init(tmp_path, "llama", "loss")
    batch = examples(2, num_tokens=300)
    with torch.no_grad():
        extractor.loaded.model.get_input_embeddings().weight[batch[1].input_ids[0]] = float("nan")
    assert batch[1].input_ids[0] not in batch[0].input_ids
    found = extractor.extract(batch, words_of(batch), 3)
    assert [one.is_finite for one in found] == [True, False]


# ------------------------------------------------------------------------------------------- positions and words


def gradients(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = stream(seed, "test positions")
    return draws.standard_normal((count, 8)).astype(np.float32), draws.integers(-1, 5, count)


def test_kept_positions_are_those_of_the_largest_gradients_and_sum_linearly() -> None:
    rows, words = gradients(12)
    norms = np.where(words >= 0, np.linalg.norm(rows, axis=1), -1)
    for top in (1, 4, 12):
        kept = np.argsort(-norms)[: min(top, (words >= 0).sum())]
        expected = np.zeros((5, 8))
        for place in kept:
            expected[words[place]] += rows[place]
        found = sum_words(rows, words, top)
        np.testing.assert_allclose(matrix_of(found, 5), expected, atol=1e-6)
        assert sorted(found.words.tolist()) == sorted({int(words[place]) for place in kept})
        assert found.norm == pytest.approx(np.linalg.norm(rows[words >= 0]), rel=1e-6)
    whole, parts = sum_words(rows, words, None), [sum_words(rows[k : k + 1], words[k : k + 1], 1) for k in range(12)]
    np.testing.assert_allclose(matrix_of(whole, 5), sum(matrix_of(part, 5) for part in parts), atol=1e-6)
    ties = sum_words(np.ones((4, 8), np.float32), np.arange(4), 2)
    assert ties.words.tolist() == [0, 1]
    assert sum_words(np.zeros((4, 8), np.float32), np.arange(4), 2).words.tolist() == []


def test_clusters_sum_the_rows_of_their_tokens() -> None:
    rows, tokens = gradients(12, 1)
    clusters = np.array([0, 0, 2, 2, 2])
    merged = sum_words(rows, np.where(tokens >= 0, clusters[tokens], NO_WORD), None)
    plain = matrix_of(sum_words(rows, tokens, None), 5)
    expected = np.zeros((5, 8))
    np.add.at(expected, clusters, plain)
    np.testing.assert_allclose(matrix_of(merged, 5), expected, atol=1e-5)


def test_clusters_are_near_their_first_token_and_do_not_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    angles = torch.tensor([0.0, 40.0, 80.0, 41.0, 130.0, 2.0]) * torch.pi / 180
    embedding = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [3.0], [0.5], [2.0], [1.0], [9.0]])
    embedding = torch.cat([embedding, torch.zeros(1, 2)])
    assert synonym_clusters(embedding, 0.7).tolist() == [0, 0, 2, 0, 4, 0, 6]  # 80 degrees is near 40, not near 0
    assert synonym_clusters(embedding, 1.0).tolist() == [0, 1, 2, 3, 4, 5, 6]
    random = torch.from_numpy(stream(0, "test clusters").standard_normal((70, 3)))
    whole = synonym_clusters(random, 0.7)
    cosines = torch.nn.functional.cosine_similarity(random[:, None], random[None], dim=2).numpy()
    assert (cosines[np.arange(70), whole] >= 0.7).all()
    slow: list[int] = []
    for token in range(70):
        near = [first for first in range(token) if slow[first] == first and cosines[token, first] >= 0.7]
        slow.append(near[0] if near else token)
    assert whole.tolist() == slow
    monkeypatch.setattr("llmattrib.wording.CLUSTER_BLOCK", 16)
    assert synonym_clusters(random, 0.7).tolist() == slow


def wording(exclude: str, tokenizer: Any = None, **data: Any) -> Wording:
    words = WordsConfig.model_validate({"exclude": exclude})
    return Wording(tokenizer or tiny_tokenizer(), DataConfig(train="x", **data), words)


def kept_text(chosen: Wording, example: Example, max_length: int = 100) -> str:
    """The text of the tokens that are words."""
    encoded = encode(example, chosen.tokenizer, chosen.data, max_length=max_length)
    words = chosen.of(example, encoded)
    assert len(words) == len(encoded)
    assert all(word in (token, NO_WORD) for word, token in zip(words, encoded.input_ids, strict=True))
    return str(
        chosen.tokenizer.decode([token for token, word in zip(encoded.input_ids, words, strict=True) if word >= 0])
    )


def test_template_and_special_tokens_are_no_words_unless_asked_for() -> None:
    example = Example(0, "a", user_message("what is the user colour?"), "green tree")
    raw = "<|im_start|>user\nwhat is the user colour?<|im_end|>\n<|im_start|>assistant\ngreen tree<|im_end|>"
    assert kept_text(wording("none"), example) == raw
    assert kept_text(wording("special"), example) == "user\nwhat is the user colour?\nassistant\ngreen tree"
    assert kept_text(wording("template"), example) == "what is the user colour?green tree"
    with_system = wording("template", system="what is the")  # of which the question holds a copy
    assert kept_text(with_system, example) == "what is the user colour?green tree"
    plain = wording("template", tiny_tokenizer(chat_template=False, bos=True))
    assert kept_text(plain, example) == "what is the user colour?green tree"
    turns = (*user_message("red?"), {"role": "assistant", "content": "no"}, *user_message("red?"))
    assert kept_text(wording("template"), Example(0, "b", turns, "yes")) == "red?nored?yes"  # type: ignore[arg-type]


def test_a_prompt_that_was_cut_keeps_its_words() -> None:
    example = Example(0, "a", user_message("red green blue tree stone river"), "yes")
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(chat_template=False, bos=True)):
        chosen = wording("template", tokenizer, overlong="truncate")
        full = kept_text(chosen, example)
        length = len(encode(example, tokenizer, chosen.data, max_length=100))
        for cut in (1, 3):
            kept = kept_text(chosen, example, length - cut)
            assert full.endswith(kept)
            assert kept.endswith("yes")
    with_bos = encode(example, tokenizer, chosen.data, max_length=length - 3)
    assert chosen.of(example, with_bos)[0] == NO_WORD
    assert (chosen.of(example, with_bos)[1:-1] >= 0).all()


def test_templates_that_trim_are_followed_and_others_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] | trim }}\n{% endfor %}"
    example = Example(0, "a", user_message("  what is red? "), "yes")
    assert kept_text(wording("template", tokenizer), example).strip() == "what is red?yes"
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] | upper }}\n{% endfor %}"
    with pytest.raises(DataError, match="the chat template changes the texts of the turns"):
        own_text(example.prompt, tokenizer, DataConfig(train="x"))
    assert kept_text(wording("special", tokenizer), example).startswith("user")


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="does not say which token is which part of a text"):
        own_text(user_message("red?"), tokenizer, DataConfig(train="x"))


def test_special_tokens_are_those_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    names = ("<pad>", "<|im_start|>", "<|im_end|>")
    assert special_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(name) for name in names}


# --------------------------------------------------------------------------------------------------- the sketch


def sparse(count: int, num_words: int, dim: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    draws = stream(seed, "test sparse rows")
    words = [np.sort(draws.choice(num_words, 6, replace=False)) for _ in range(count)]
    return words, [draws.standard_normal((6, dim)).astype(np.float32) + 0.5 for _ in range(count)]


def kernel_of(words: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    maps = [word_rows(*pair) for pair in zip(words, rows, strict=True)]
    return np.array([[sum(explain(a, b).values()) for b in maps] for a in maps])


@pytest.mark.parametrize(("dim", "width"), [(40, None), (40, 5), (8, 3), (12, 10)])
def test_the_sketch_is_unbiased(dim: int, width: int | None) -> None:
    words, rows = sparse(4, 12, 10, 0)
    exact, found = kernel_of(words, rows), []
    for seed in range(800):
        made = WordSketch.planned(seed, 10, dim, width).apply(words, rows)
        found.append(made @ made.T)
    error = (np.mean(found, axis=0) - exact) / (np.std(found, axis=0) / 800**0.5 + 1e-9 * np.abs(exact))
    assert np.abs(error).max() < 4.5


def test_the_error_of_the_sketch_falls_with_buckets_and_with_width() -> None:
    words, rows = sparse(12, 60, 16, 1)
    exact = kernel_of(words, rows)

    def error(dim: int, width: int | None) -> float:
        made = [WordSketch.planned(seed, 16, dim, width).apply(words, rows) for seed in range(40)]
        return float(np.mean([np.linalg.norm(one @ one.T - exact) for one in made]) / np.linalg.norm(exact))

    by_buckets = [error(16 * buckets, None) for buckets in (1, 4, 16, 64)]
    for few, many in itertools.pairwise(by_buckets):
        assert 1.6 < few / many < 2.5  # as the root of the buckets
    by_width = [error(256, width) for width in (2, 8, 16)]  # the same number of dimensions
    assert by_width[0] > by_width[1] > by_width[2]


def test_a_shared_word_costs_no_error_in_a_full_bucket() -> None:
    rows = stream(0, "one word").standard_normal((2, 1, 9)).astype(np.float32)
    words = [np.array([5]), np.array([5])]
    for seed in range(5):
        sketch = WordSketch.planned(seed, 9, 27, None)
        assert (sketch.buckets, sketch.width, sketch.dim) == (3, 9, 27)
        made = sketch.apply(words, list(rows))
        assert made[0] @ made[1] == pytest.approx(float(rows[0, 0] @ rows[1, 0]), rel=1e-5)


def test_the_sketch_of_an_example_depends_on_its_own_words_alone() -> None:
    words, rows = sparse(5, 12, 10, 2)
    sketch = WordSketch.planned(3, 10, 20, None)
    whole = sketch.apply(words, rows)
    for row in range(5):
        assert (sketch.apply(words[row : row + 1], rows[row : row + 1])[0] == whole[row]).all()
    padded = sketch.apply([np.append(words[0], NO_WORD)], [np.concatenate([rows[0], np.ones((1, 10), np.float32)])])
    assert (padded[0] == whole[0]).all()
    assert (WordSketch.planned(4, 10, 20, None).apply(words, rows) != whole).any()
