"""Queries against slow, plain computations: values, shares, totals, answers, classes, exact reranking, refusals."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from test_build import changed
from tiny import LABEL_WORDS, tiny_rows, tiny_run
from transformers import AutoModelForCausalLM

from llmattrib.build import build_features
from llmattrib.config import RunConfig
from llmattrib.data import Example, user_message
from llmattrib.encoding import encode, encode_prompt
from llmattrib.errors import (
    ConfigError,
    DataError,
    FingerprintMismatchError,
    LabelWordError,
    MethodError,
    OverlongExampleError,
    StaleIndexError,
    StoreNotFoundError,
)
from llmattrib.extraction import encode_examples, load_extractor
from llmattrib.features.sketch import Sketch, SketchPlan
from llmattrib.hits import Hit, Hits, Query
from llmattrib.index import build_index
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.sections import METHODS
from llmattrib.store import RowStore
from llmattrib.train import train_adapter

NUM_ROWS = 12
PROMPT, COMPLETION = "what is the colour of a stone house?", "green blue"
FLAVOURS: dict[str, dict[str, Any]] = {
    "init": {"query": {"max_new_tokens": 5}},
    "trained": {"features": {"linearisation": "trained", "output": "log_odds"}, "query": {"max_new_tokens": 5}},
    "margin": {"labels": True, "features": {"output": "margin"}},
    "logits": {
        "labels": True,
        "features": {"output": "logits"},
        "reduce": {"methods": ["shapley"]},
    },
}


def finish(config: RunConfig) -> RunConfig:
    """Run all stages."""
    train_adapter(config)
    build_features(config)
    reduce_run(config)
    for method in config.reduce.methods:
        build_index(config, method)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunConfig]:
    """Returns the finished run of a flavour, made once."""
    made: dict[str, RunConfig] = {}

    def get(flavour: str) -> RunConfig:
        if flavour not in made:
            settings = {"num_rows": NUM_ROWS} | FLAVOURS[flavour]
            made[flavour] = finish(tiny_run(tmp_path_factory.mktemp(flavour), **settings))
        return made[flavour]

    return get


def copied(config: RunConfig, tmp_path: Path) -> RunConfig:
    """Copy a run, to be damaged."""
    shutil.copytree(config.run_dir, tmp_path / "copy")
    return config.model_copy(update={"run_dir": str(tmp_path / "copy")})


def slow_values(config: RunConfig, method: str, prompt: str, completion: str) -> np.ndarray:
    """The values of all examples for one query, the long way: one example, no index, float64."""
    extractor = load_extractor(config)
    store = RowStore.open(config.layout.features)
    sketch = Sketch(SketchPlan.from_json(dict(store.manifest.info["sketch_plan"])))
    example = Example(0, "q", user_message(prompt), completion)
    encoded = encode(example, extractor.loaded.tokenizer, config.data, max_length=extractor.loaded.max_length)
    phi = extractor.extract([encoded], sketch).phi[0].astype(np.float64)
    representers = RowStore.open(config.layout.representers(method))
    query = phi - representers.read_vector("mean")
    row = query[encoded.label] if config.features.output == "logits" else query[0]
    if representers.manifest.info["normalize"]:
        row = row / np.linalg.norm(row)
    slot = encoded.label if config.features.output == "logits" else 0
    return np.array([row @ representers.read(i, i + 1)[0, slot] for i in range(store.manifest.num_rows)])


@pytest.mark.parametrize("flavour", ["init", "logits"])
def test_profile_integrates_to_the_values_of_a_query(finished, flavour):
    config = finished(flavour)
    run = Run(config)
    answer = COMPLETION if flavour == "init" else LABEL_WORDS[1]
    ids = [run.examples[row].id for row in (3, 0)]
    profile = run.q_profile([Query.of(PROMPT, answer)], ids)
    values = slow_values(config, "shapley", PROMPT, answer)[[3, 0]]
    assert profile.values.shape == (len(profile.q), 1, 2, 1)
    np.testing.assert_allclose(profile.earned[-1, 0, :, 0], values, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(profile.weights @ profile.values[:, 0, :, 0], values, rtol=1e-3, atol=1e-6)
    with pytest.raises(ConfigError, match="there is no training example 'nobody'"):
        run.q_profile([Query.of(PROMPT, answer)], ["nobody"])


def test_profile_of_several_classes_is_refused(finished):
    run = Run(finished("logits"))
    queries = [Query.of(PROMPT, word) for word in LABEL_WORDS[:2]]
    with pytest.raises(MethodError, match="answered by several classes"):
        run.q_profile(queries, [run.examples[0].id])


def test_methods_are_named_in_any_spelling(finished, tmp_path):
    config = changed(copied(finished("init"), tmp_path), reduce={"methods": ["beta_shapley(4.0, 1)"]})
    reduce_run(config)
    build_index(config, "beta_shapley(4,1)")
    hits = Run(config).query(PROMPT, COMPLETION, method="beta_shapley(4,1.0)")
    assert hits.method == "beta_shapley(4,1)"
    expected = slow_values(config, "beta_shapley(4,1)", PROMPT, COMPLETION)
    assert hits.helpful[0].value == pytest.approx(expected.max(), rel=1e-3)


def by_row(hits: Hits) -> dict[int, Hit]:
    return {hit.row: hit for hit in (*hits.helpful, *hits.harmful)}


CASES = [(flavour, method) for flavour in ("init", "trained", "margin") for method in METHODS] + [("logits", "shapley")]


@pytest.mark.parametrize(("flavour", "method"), CASES)
def test_hits_equal_plain_inner_products(finished: Callable[[str], RunConfig], flavour: str, method: Any) -> None:
    config = finished(flavour)
    completion = LABEL_WORDS[1] if flavour in ("margin", "logits") else COMPLETION
    exact = slow_values(config, method, PROMPT, completion)
    hits = Run.open(config.run_dir).query(PROMPT, completion, top=NUM_ROWS, method=method)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(
        [hit.value for hit in by_row(hits).values()], exact[list(by_row(hits))], atol=1e-5 * scale
    )
    assert len(by_row(hits)) == NUM_ROWS, "every example is helpful or harmful"
    order = sorted(range(NUM_ROWS), key=lambda row: -exact[row])
    assert [hit.row for hit in hits.helpful] == [row for row in order if exact[row] > 0]
    assert [hit.row for hit in hits.harmful] == [row for row in order[::-1] if exact[row] < 0]
    assert [hit.rank for hit in hits.helpful] == list(range(1, len(hits.helpful) + 1))
    assert hits.total == pytest.approx(exact.sum(), abs=1e-4 * scale)
    assert hits.shares_exact
    for row, hit in by_row(hits).items():
        assert hit.share == pytest.approx(exact[row] / np.abs(exact).sum(), abs=1e-5)
    assert sum(abs(hit.share) for hit in by_row(hits).values()) == pytest.approx(1, abs=1e-5)


def test_hits_carry_the_texts_of_their_examples(finished: Callable[[str], RunConfig]) -> None:
    hits = Run.open(finished("init").run_dir).query(PROMPT, COMPLETION, top=NUM_ROWS)
    rows = tiny_rows(NUM_ROWS)
    for row, hit in by_row(hits).items():
        assert (hit.id, hit.prompt, hit.completion) == (rows[row]["id"], rows[row]["prompt"], rows[row]["completion"])
    assert (hits.prompt, hits.completion, hits.num_examples) == (PROMPT, COMPLETION, NUM_ROWS)


def test_an_example_finds_itself(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    for row in tiny_rows(NUM_ROWS):
        hits = run.query(row["prompt"], row["completion"], method="grad_cos", top=1)
        assert hits.helpful[0].id == row["id"]
        assert hits.helpful[0].value == pytest.approx(1, abs=1e-3)


def test_many_queries_are_answered_as_one_by_one(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    queries = [Query.of(row["prompt"] + " " + PROMPT * k, row["completion"]) for k, row in enumerate(tiny_rows(3))]
    together = run.query_many(queries, methods=["shapley", "grad_dot"], top=4)
    assert [(hits.prompt, hits.method) for hits in together] == [
        (query.prompt[0]["content"], method) for query in queries for method in ("shapley", "grad_dot")
    ]
    for hits in together:
        alone = run.query(hits.prompt, hits.completion, method=hits.method, top=4)  # type: ignore[arg-type]
        assert [hit.row for hit in alone.helpful] == [hit.row for hit in hits.helpful]
        scale = max(abs(hit.value) for hit in by_row(alone).values())
        for row, hit in by_row(hits).items():
            assert hit.value == pytest.approx(by_row(alone)[row].value, abs=1e-4 * scale)


def test_no_queries_give_no_hits(finished: Callable[[str], RunConfig]) -> None:
    assert Run.open(finished("init").run_dir).query_many([]) == []


def test_same_query_gives_the_same_bytes(finished: Callable[[str], RunConfig]) -> None:
    config = finished("init")
    answers = {Run.open(config.run_dir).query(PROMPT, COMPLETION).to_json() for _ in range(2)}
    assert len(answers) == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks for the old name
def test_the_trained_adapter_answers_also_when_features_are_at_init(finished: Callable[[str], RunConfig]) -> None:
    config = finished("init")
    run = Run.open(config.run_dir)
    hits = run.query(PROMPT)
    assert hits.generated
    loaded = run.extractor.loaded
    ids = encode_prompt(user_message(PROMPT), loaded.tokenizer, config.data)
    tuned = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model.name), config.layout.adapter
    )
    for _ in range(config.query.max_new_tokens):
        with torch.no_grad():
            token = int(tuned(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    prompt_length = len(encode_prompt(user_message(PROMPT), loaded.tokenizer, config.data))
    answer = ids[prompt_length:]
    if loaded.tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(loaded.tokenizer.eos_token_id)]
    text = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    assert hits.completion == text.rstrip("\ufffd"), "half a character at the cut is left out"
    assert hits.is_cut == (len(answer) == config.query.max_new_tokens)
    if not hits.is_cut:
        given = run.query(PROMPT, hits.completion)
        assert given.helpful == hits.helpful, "a generated answer is traced as if it were given"
        assert not given.generated


def test_without_the_adapter_the_base_model_answers_and_says_so(
    finished: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    config = copied(finished("init"), tmp_path)
    shutil.rmtree(config.layout.adapter)
    hits = Run(config).query(PROMPT)
    assert (hits.answered_by, hits.origin.split(",")[0]) == ("base model", "generated by the base model")


def test_an_answer_that_was_cut_is_traced_without_an_end(finished: Callable[[str], RunConfig]) -> None:
    run = Run(changed(finished("init"), query={"max_new_tokens": 1}))
    cut = run.query(PROMPT, method="grad_dot", top=NUM_ROWS)
    assert cut.generated
    assert cut.is_cut
    whole = run.query(PROMPT, cut.completion, method="grad_dot", top=NUM_ROWS)
    assert not whole.is_cut
    assert cut.total != pytest.approx(whole.total, rel=1e-3), "the end of turn is part of the second only"
    (example,) = run.answers([Query.of(PROMPT)])
    tokenizer, data = run.extractor.loaded.tokenizer, run.config.data
    with_end = encode(replace(example, is_whole=True), tokenizer, data, max_length=128).input_ids
    assert encode(example, tokenizer, data, max_length=128).input_ids == with_end[:-1]


@pytest.mark.parametrize("flavour", ["margin", "logits"])
def test_label_runs_answer_with_the_likeliest_label(finished: Callable[[str], RunConfig], flavour: str) -> None:
    run = Run.open(finished(flavour).run_dir)
    answers = run.answers([Query.of(row["prompt"]) for row in tiny_rows(6)])
    for row, example in zip(tiny_rows(6), answers, strict=True):
        answer = example.completion
        loaded = run.extractor.loaded
        loaded.use(loaded.adapter_names[0])
        ids = encode_prompt(user_message(row["prompt"]), loaded.tokenizer, run.config.data)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids])).logits[0, -1]
        wanted = max(LABEL_WORDS, key=lambda word: float(logits[loaded.tokenizer(word)["input_ids"][0]]))
        assert answer == wanted


def test_completion_that_is_no_label_is_refused(finished: Callable[[str], RunConfig]) -> None:
    with pytest.raises(LabelWordError, match="has the completion 'maybe'"):
        Run.open(finished("margin").run_dir).query(PROMPT, "maybe")


@pytest.mark.parametrize("flavour", ["init", "trained", "margin"])
@pytest.mark.parametrize("method", ["grad_dot", "grad_cos"])
def test_rerank_gives_exact_inner_products(finished: Callable[[str], RunConfig], flavour: str, method: Any) -> None:
    config = finished(flavour)
    completion = LABEL_WORDS[0] if flavour == "margin" else COMPLETION
    run = Run.open(config.run_dir)
    extractor = load_extractor(config)
    sketch = Sketch(extractor.plan("none", 0, 1, []))
    query = Example(0, "q", user_message(PROMPT), completion)
    encoded = encode_examples(config, extractor, [query, *run.examples]).encoded
    gradients = np.stack([extractor.extract([item], sketch).phi[0, 0] for item in encoded]).astype(np.float64)
    if method == "grad_cos":
        gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    exact = gradients[1:] @ gradients[0]
    hits = run.query(PROMPT, completion, method=method, top=NUM_ROWS, rerank=NUM_ROWS)
    assert hits.reranked
    order = sorted(range(NUM_ROWS), key=lambda row: -exact[row])
    assert [hit.row for hit in hits.helpful] == [row for row in order if exact[row] > 0]
    assert [hit.row for hit in hits.harmful] == [row for row in order[::-1] if exact[row] < 0]
    for row, hit in by_row(hits).items():
        assert hit.value == pytest.approx(exact[row], abs=1e-5 * np.abs(exact).max())
    sketched = run.query(PROMPT, completion, method=method, top=NUM_ROWS)
    assert any(abs(by_row(sketched)[row].value - exact[row]) > 1e-4 * np.abs(exact).max() for row in by_row(sketched))


def test_rerank_keeps_to_its_shortlist(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    shortlist = {hit.row for hit in run.query(PROMPT, COMPLETION, method="grad_cos", top=4).helpful}
    hits = run.query(PROMPT, COMPLETION, method="grad_cos", top=2, rerank=4)
    assert len(hits.helpful) == 2
    assert {hit.row for hit in hits.helpful} <= shortlist


@pytest.mark.parametrize("method", ["shapley", "influence", "trak"])
def test_methods_that_weigh_by_the_whole_set_cannot_be_reranked(
    finished: Callable[[str], RunConfig], method: Any
) -> None:
    with pytest.raises(MethodError, match=f"{method} cannot be reranked.*\n  expected: one of grad_dot, grad_cos"):
        Run.open(finished("init").run_dir).query(PROMPT, COMPLETION, method=method, rerank=20)


def test_rerank_of_fewer_than_top_and_of_centred_features(finished: Callable[[str], RunConfig], tmp_path: Path) -> None:
    config = finished("init")
    with pytest.raises(MethodError, match="rerank of 3 candidates for 5 hits"):
        Run.open(config.run_dir).query(PROMPT, COMPLETION, method="grad_dot", top=5, rerank=3)
    centred = changed(copied(config, tmp_path), reduce={"methods": ["grad_dot"], "center": True})
    reduce_run(centred)
    build_index(centred, "grad_dot")
    with pytest.raises(MethodError, match="rerank of centred features"):
        Run(centred).query(PROMPT, COMPLETION, method="grad_dot", top=5, rerank=5)


def test_unknown_method_is_refused(finished: Callable[[str], RunConfig]) -> None:
    with pytest.raises(MethodError, match="method 'trak' is not one of this run's\n  expected: one of shapley"):
        Run.open(finished("logits").run_dir).query(PROMPT, "yes", method="trak")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"features": {"output": "pntk"}}, "features.output"),
        ({"features": {"linearisation": "trained"}}, "features.linearisation"),
        ({"features": {"sketch": {"kind": "none"}}}, "features.sketch.kind"),
        ({"data": {"system": "be brief"}}, "encoding.system"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ],
)
def test_another_model_or_setting_than_the_stored_one_is_refused(
    finished: Callable[[str], RunConfig], change: dict[str, Any], key: str
) -> None:
    with pytest.raises(FingerprintMismatchError, match="was made with other settings") as caught:
        Run(changed(finished("init"), **change)).query(PROMPT, COMPLETION)
    assert key in caught.value.differing


def test_another_adapter_is_refused_where_features_depend_on_it(
    finished: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    config = copied(finished("trained"), tmp_path)
    shutil.rmtree(config.layout.adapter)
    train_adapter(changed(config, train={"epochs": 1}))
    with pytest.raises(FingerprintMismatchError) as caught:
        Run(config).query(PROMPT, COMPLETION)
    assert list(caught.value.differing) == ["model.adapters"]


def test_representers_of_other_features_are_stale(finished: Callable[[str], RunConfig], tmp_path: Path) -> None:
    config = copied(finished("init"), tmp_path)
    shutil.rmtree(config.layout.features)
    build_features(changed(config, features={"output": "log_odds"}))
    with pytest.raises(StaleIndexError, match=r"shapley\.zarr was made from other features.*\n.*\n.*llmattrib reduce"):
        Run(config).query(PROMPT, COMPLETION)


def test_index_older_than_its_representers_is_stale(finished: Callable[[str], RunConfig], tmp_path: Path) -> None:
    config = changed(copied(finished("init"), tmp_path), reduce={"ridge": 0.5})
    reduce_run(config)
    with pytest.raises(StaleIndexError, match=r"influence\.faiss was built from other representers"):
        Run(config).query(PROMPT, COMPLETION, method="influence")
    hits = Run(config).query(PROMPT, COMPLETION, method="grad_dot")
    assert hits.helpful, "grad_dot has no ridge, so its representers are the same"


def test_missing_stages_are_named(finished: Callable[[str], RunConfig], tmp_path: Path) -> None:
    config = copied(finished("init"), tmp_path)
    shutil.rmtree(Path(config.layout.index("trak")).parent)
    with pytest.raises(StoreNotFoundError, match="run `llmattrib index` first"):
        Run(config).query(PROMPT, COMPLETION)
    shutil.rmtree(config.layout.features)
    with pytest.raises(StoreNotFoundError, match="run `llmattrib build` first"):
        Run(config)


def test_a_run_can_be_moved(finished: Callable[[str], RunConfig], tmp_path: Path) -> None:
    config = finished("init")
    moved = Run.open(copied(config, tmp_path).run_dir).query(PROMPT, COMPLETION)
    assert moved == Run.open(config.run_dir).query(PROMPT, COMPLETION)


def test_prompt_longer_than_the_context(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    asked = [Query.of(PROMPT), Query.of(PROMPT * 40), Query.of(PROMPT * 50)]
    with pytest.raises(OverlongExampleError, match=r"(?s)'query 2' has \d+ tokens.*at most 128.*to fix: shorten it"):
        run.query_many([replace(query, completion=COMPLETION) for query in asked])
    with pytest.raises(OverlongExampleError, match=r"query 3: a prompt has \d+ tokens and 5 are to be generated"):
        run.query_many(asked)
    with pytest.raises(OverlongExampleError, match=r"query long: a prompt has \d+ tokens"):
        run.query_many([asked[0], replace(asked[1], id="long")])


def test_no_examples_are_no_answer(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    for top in (0, -3):
        with pytest.raises(ConfigError, match=f"top is {top}\n  expected: 1 or more"):
            run.query(PROMPT, COMPLETION, top=top)


def test_texts_that_no_tokenizer_takes_are_named(finished: Callable[[str], RunConfig]) -> None:
    run = Run.open(finished("init").run_dir)
    with pytest.raises(DataError, match=r"query 2 holds '\\ud83d', half of a character, after 'so sad '"):
        run.query_many([Query.of(PROMPT), Query.of("so sad \ud83d")])
    with pytest.raises(DataError, match=r"query 1 holds '\\ud83d'"):
        run.query(PROMPT, "\ud83d")
    refuse = "{{ raise_exception('no turns of a bard') if messages[0]['role'] == 'bard' }}"
    tokenizer = run.extractor.loaded.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, refuse + tokenizer.chat_template
    bard = Query.of([{"role": "bard", "content": PROMPT}])
    with pytest.raises(DataError, match=r"query 2: the chat template rejects the roles \['bard'\]: no turns of"):
        run.query_many([Query.of(PROMPT), bard])
    with pytest.raises(DataError, match=r"'query 1': the chat template rejects the roles \['bard'\]"):
        run.query_many([replace(bard, completion=COMPLETION)])
    tokenizer.chat_template = kept
