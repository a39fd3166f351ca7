"""tracin_we through the stages: the same bytes whatever happens, queries that equal brute force, words that explain."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_build import changed, contents
from test_distributed import launch
from test_resume import config_file, start
from test_tracin_we import value_of
from tiny import tiny_adapter_dir, tiny_jsonl, tiny_run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmattrib import console
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.config import RunConfig
from llmattrib.data import Example, load_examples, user_message
from llmattrib.encoding import encode_all
from llmattrib.errors import ConfigError, FingerprintMismatchError, MethodError, StaleIndexError, StoreNotFoundError
from llmattrib.evaluate.mislabel import self_scores
from llmattrib.evaluate.scores import RunScores, method_scores
from llmattrib.evaluate.signs import signs_of_run
from llmattrib.hits import Explanation
from llmattrib.index import build_index
from llmattrib.lock import Part
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.values.stage import compute_values
from llmattrib.values.validation import load_validation
from llmattrib.verify import verify_run
from llmattrib.word_query import token_texts
from llmattrib.wording import Wording
from llmattrib.words import stored_words

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = {"methods": ["grad_dot", "tracin_we"]}
PROMPT, COMPLETION = "what is the colour of a stone house?", "green blue"


def run_of(tmp_path: Path, **sections: Any) -> RunConfig:
    return tiny_run(tmp_path, **({"num_rows": 10, "reduce": METHODS} | sections))


def finish(config: RunConfig) -> RunConfig:
    build_features(config)
    reduce_run(config)
    build_index(config, "tracin_we")
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of exact words, all positions, found by a small sketch."""
    words = {"top_positions": None, "dtype": "float32", "sketch_dim": 128}
    return finish(run_of(tmp_path_factory.mktemp("words"), words=words))


def slow_values(config: RunConfig, model: Any, prompt: str, completion: str) -> np.ndarray:
    """All values of one query from matrices of token gradients, masked to words, one example at a time."""
    tokenizer = Run(config).extractor.loaded.tokenizer
    examples = [*load_examples(config.data), Example(0, "q", user_message(prompt), completion)]
    wording, matrices = Wording(tokenizer, config.data, config.words), []
    for example, encoded in zip(examples, encode_all(examples, tokenizer, config.data, 128).encoded, strict=True):
        ids = torch.tensor([encoded.input_ids])
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        value = value_of(model(inputs_embeds=embeds).logits[0], encoded, "loss")
        (gradient,) = torch.autograd.grad(value, embeds)
        matrix = np.zeros((model.config.vocab_size, embeds.shape[2]))
        for word, row in zip(wording.of(example, encoded), gradient[0].double().numpy(), strict=True):
            if word >= 0:
                matrix[word] += row
        matrices.append(matrix)
    return np.array([np.sum(matrix * matrices[-1]) for matrix in matrices[:-1]])


# ----------------------------------------------------------------------------------------------------- the store


def test_words_are_built_beside_the_features_and_only_when_asked_for(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    plain = build_features(changed(config, tmp_path / "plain", reduce={"methods": ["grad_dot"]}))
    assert plain.words is None
    assert not (tmp_path / "plain" / "words.zarr").exists()
    result = build_features(config)
    assert result.words is not None
    assert (result.words.path, result.words.num_examples, result.words.num_shards_done) == (config.layout.words, 10, 3)
    assert contents(config.layout.features) == contents(plain.path)
    store = RowStore.open(config.layout.words)
    assert (store.manifest.kind, store.manifest.num_outputs, store.manifest.dim) == ("words", 10, 64)
    words = stored_words(store, 0, 10)
    assert ((words >= 0).sum(axis=1) >= 4).all()
    assert (np.abs(store.read(0, 10)).sum(axis=2) > 0)[words >= 0].all()
    assert (store.read(0, 10)[words < 0] == 0).all()
    rows = np.linalg.norm(store.read(0, 10), axis=(1, 2))
    assert (rows <= 1.5 * store.column("norm")).all()
    again = build_features(config)
    assert again.words is not None
    assert (again.num_shards_done, again.words.num_shards_done) == (0, 0)


@pytest.mark.slow
def test_killed_words_and_parts_and_ranks_give_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    config = run_of(tmp_path, num_rows=60, features={"shard_size": 2, "tokens_per_batch": 64})
    whole = changed(config, tmp_path / "whole")
    build_features(whole)
    expected = contents(whole.layout.words)
    process = start(config, tmp_path)
    records = Path(config.layout.words, "commits")
    while len(list(records.glob("[0-9]*"))) < 4:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    pending = RowStore.open(config.layout.words).pending()
    assert 0 < len(pending) <= 26
    again = build_features(config)
    assert again.words is not None
    assert (again.num_shards_done, again.words.num_shards_done) == (0, len(pending))
    assert contents(config.layout.words) == expected
    parts = changed(config, tmp_path / "parts")
    for number in (2, 1):
        build_features(parts, part=Part(number, 2))
    assert contents(parts.layout.words) == expected
    assert contents(config.layout.words) == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_the_words_and_representers_of_one(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    whole = finish(changed(config, tmp_path / "whole"))
    for script in ("launch/build.py", "launch/reduce.py"):
        ended = launch(script, config_file(config, tmp_path), "seed=0")
        assert ended.returncode == 0, ended.stderr
    assert contents(config.layout.words) == contents(whole.layout.words)
    one, two = (RowStore.open(item.layout.representers("tracin_we")) for item in (whole, config))
    assert (one.read(0, 10) == two.read(0, 10)).all()
    assert one.digest() == two.digest()


def test_new_data_extends_the_words(tmp_path: Path) -> None:
    config = run_of(tmp_path, num_rows=6)
    build_features(config)
    tiny_jsonl(tmp_path, 11)
    result = build_features(config)
    assert result.words is not None
    assert (result.words.num_appended, result.words.num_shards_done) == (5, 2)
    whole = changed(config, tmp_path / "whole")
    build_features(whole)
    grown, fresh = (RowStore.open(item.layout.words) for item in (config, whole))
    assert (grown.read(0, 11) == fresh.read(0, 11)).all()
    assert (stored_words(grown, 0, 11) == stored_words(fresh, 0, 11)).all()


def test_other_settings_of_words_do_not_mix(tmp_path: Path) -> None:
    config = finish(run_of(tmp_path))
    for words, key in (
        ({"top_positions": 3}, r"words\.top_positions: stored 10, now 3"),
        ({"exclude": "none"}, r"words\.exclude: stored 'template', now 'none'"),
        ({"synonym_cosine": 0.9}, r"words\.synonym_cosine: stored None, now 0\.9"),
    ):
        other = changed(config, words=words)
        with pytest.raises(FingerprintMismatchError, match=key):
            build_features(other)
        with pytest.raises(FingerprintMismatchError, match=key):
            Run(other).query(PROMPT, COMPLETION, method="tracin_we")
        assert any("was made with other settings" in item.what for item in verify_run(other, ["x"]))
    (first, second) = (reduce_run(changed(config, words={"sketch_dim": dim}))[1] for dim in (8192, 64))
    assert (first.is_reused, second.is_reused) == (True, False)  # the sketch is no matter of build
    with pytest.raises(StaleIndexError, match="was built from other representers"):
        Run(config).query(PROMPT, COMPLETION, method="tracin_we")


def test_damage_to_words_is_found_and_repaired_to_the_same_bytes(tmp_path: Path) -> None:
    config = finish(run_of(tmp_path, words={"synonym_cosine": 0.7}))
    before = contents(config.run_dir)
    assert verify_run(config, ["R"]) == []
    file = Path(config.layout.words, "rows/c.1.0.0")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (found,) = verify_run(config, ["R"], repair=True)
    assert (found.place, found.rerun, found.shards) == ("words.zarr", "llmattrib build R", (1, 1))
    again = build_features(config)
    assert again.words is not None
    assert again.words.num_shards_done == 1
    assert contents(config.run_dir) == before
    os.remove(Path(config.layout.words, "vectors/clusters/c.0.0"))
    (found,) = verify_run(config, ["R"], repair=True)
    assert "clusters" in found.what
    build_features(config)
    assert contents(config.run_dir) == before
    other = changed(config, tmp_path / "other", words={"dtype": "float32"})
    build_features(other)
    Path(config.layout.words).rename(tmp_path / "old")
    Path(other.layout.words).rename(config.layout.words)
    places = [item.place for item in verify_run(config, ["R"])]
    assert places == ["representers/tracin_we.zarr", "index/tracin_we.faiss"]


# ---------------------------------------------------------------------------------------------------- the query


def test_a_query_equals_brute_force_and_its_words_sum_to_the_values(finished: RunConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.model.name).eval()
    slow = slow_values(finished, model, PROMPT, COMPLETION)
    run = Run(finished)
    hits = run.query(PROMPT, COMPLETION, method="tracin_we", top=10, explain=True)
    found = {hit.row: hit for hit in (*hits.helpful, *hits.harmful)}
    assert sorted(found) == list(range(10))
    np.testing.assert_allclose([found[row].value for row in range(10)], slow, rtol=1e-4, atol=1e-4 * np.abs(slow).max())
    assert [hit.row for hit in hits.helpful] == [row for row in np.argsort(-slow) if slow[row] > 0]
    assert [hit.row for hit in hits.harmful] == [row for row in np.argsort(slow) if slow[row] < 0]
    assert hits.reranked
    for hit in found.values():
        assert hit.explanation is not None
        assert sum(value for _, value in hit.explanation.words) == pytest.approx(hit.value, rel=1e-5)
        sizes = [abs(value) for _, value in hit.explanation.words]
        assert sizes == sorted(sizes, reverse=True)
        assert "".join(text for text, _ in hit.explanation.prompt) == hit.prompt
        assert "".join(text for text, _ in hit.explanation.completion) == hit.completion
        named = {(text, value) for text, value in (*hit.explanation.prompt, *hit.explanation.completion) if value}
        assert named == set(hit.explanation.words)
    without = run.query(PROMPT, COMPLETION, method="tracin_we", top=10)
    assert [hit.value for hit in without.helpful] == [hit.value for hit in hits.helpful]
    assert without.helpful[0].explanation is None
    assert "explanation" not in without.to_json()


def test_a_short_list_is_found_by_the_sketch_and_valued_exactly(finished: RunConfig) -> None:
    exact = Run(finished).query(PROMPT, COMPLETION, method="tracin_we", top=10)
    values = {hit.row: hit.value for hit in (*exact.helpful, *exact.harmful)}
    few = Run(finished).query(PROMPT, COMPLETION, method="tracin_we", top=2, rerank=3)
    assert len(few.helpful) == 2
    assert all(hit.value == values[hit.row] for hit in (*few.helpful, *few.harmful))


def test_scores_of_a_validation_set_are_exact(finished: RunConfig, tmp_path: Path) -> None:
    place = tiny_jsonl(tmp_path, 3, name="asked.jsonl")
    config = changed(finished, values={"data": place})
    run = Run(config)
    scores = method_scores(run, "tracin_we", load_validation(run))
    rows = [json.loads(line) for line in Path(place).read_text().splitlines()]
    for row, asked in enumerate(rows):
        hits = run.query(asked["prompt"], asked["completion"], method="tracin_we", top=10)
        for hit in (*hits.helpful, *hits.harmful):
            assert scores[row, hit.row] == pytest.approx(hit.value, rel=1e-3, abs=1e-4 * np.abs(scores).max())


def test_evaluations_know_that_words_are_a_store_of_their_own(finished: RunConfig, tmp_path: Path) -> None:
    place = tiny_jsonl(tmp_path, 3, name="asked.jsonl")
    scores = RunScores(changed(finished, values={"data": place}, evaluate={"sign_resamples": 2}))
    example = scores.examples[4]
    hits = scores.run.query(example.prompt_text, example.completion, method="tracin_we", top=10)
    (own,) = [hit.value for hit in (*hits.helpful, *hits.harmful) if hit.row == 4]
    assert self_scores(scores, "tracin_we")[4] == pytest.approx(own, rel=1e-4)
    rows = {row["method"]: row for row in signs_of_run(scores).rows}
    assert rows["tracin_we"]["agreement"] == 1.0
    assert {"grad_dot", "tracin_we"} <= set(rows)


def test_several_adapters_and_methods_side_by_side(tmp_path: Path) -> None:
    config = run_of(tmp_path, num_rows=6)
    adapters = [tiny_adapter_dir(tmp_path, config.model.name, seed=seed, name=f"adapter-{seed}") for seed in (1, 2)]
    weights = {"adapter_weights": [0.5, 2.0], "top_positions": None, "dtype": "float32"}
    both = changed(config, model={"adapters": adapters}, features={"linearisation": "trained"}, words=weights)
    finish(both)
    build_index(both, "grad_dot")
    expected = np.zeros(6)
    for adapter, weight in zip(adapters, (0.5, 2.0), strict=True):
        one = changed(both, tmp_path / Path(adapter).name, model={"adapters": [adapter]}, words={"adapter_weights": []})
        finish(one)
        hits = Run(one).query(PROMPT, COMPLETION, method="tracin_we", top=6)
        for hit in (*hits.helpful, *hits.harmful):
            expected[hit.row] += weight * hit.value
    run = Run(both)
    by_words, by_features = run.query_many([run_query()], top=6, methods=["tracin_we", "grad_dot"])
    for hit in (*by_words.helpful, *by_words.harmful):
        assert hit.value == pytest.approx(expected[hit.row], rel=1e-3, abs=1e-3 * np.abs(expected).max())
    assert by_features.method == "grad_dot"
    assert not by_features.reranked


def run_query() -> Any:
    from llmattrib.hits import Query

    return Query.of(PROMPT, COMPLETION)


def test_synonyms_act_through_each_other(tmp_path: Path) -> None:
    config = run_of(tmp_path, words={"top_positions": None, "synonym_cosine": 0.7})
    tokenizer = Run(build_of(config)).extractor.loaded.tokenizer
    red, blue = (tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in ("tree", "river"))
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[blue] = 2 * weight[red] + 0.1 * weight[blue]
    model.save_pretrained(config.model.name)
    again = finish(changed(config, tmp_path / "again"))
    plain = finish(changed(config, tmp_path / "plain", words={"synonym_cosine": None}))
    asked = "what is the colour of a tree?", "blue"
    names = [
        {word for hit in (*hits.helpful, *hits.harmful) for word, _ in hit.explanation.words}  # type: ignore[union-attr]
        for hits in (Run(item).query(*asked, method="tracin_we", top=10, explain=True) for item in (again, plain))
    ]
    assert " river" in names[0]
    assert " tree/ river" in names[0] or " river/ tree" in names[0]
    assert " river" not in names[1]


def build_of(config: RunConfig) -> RunConfig:
    build_features(config)
    return config


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused(tmp_path: Path, finished: RunConfig) -> None:
    run = Run(finished)
    with pytest.raises(MethodError, match="only tracin_we explains its values by words, and asked were grad_dot"):
        run.query(PROMPT, COMPLETION, method="grad_dot", explain=True)
    with pytest.raises(MethodError, match="tracin_we is of word gradients as they are"):
        reduce_run(changed(finished, reduce={"center": True}))
    with pytest.raises(MethodError, match=r"values\.method=tracin_we asks for one number of a whole set"):
        compute_values(changed(finished, values={"method": "tracin_we", "data": finished.data.train}))
    labels = run_of(tmp_path, labels=True, features={"output": "logits"})
    with pytest.raises(MethodError, match="tracin_we needs one gradient per example"):
        build_features(labels)
    fresh = changed(finished, tmp_path / "fresh", words={"adapter_weights": [1.0, 2.0]})
    with pytest.raises(ConfigError, match=r"words\.adapter_weights has 2 numbers, and gradients are taken at 1 points"):
        build_features(fresh)
    features = changed(finished, tmp_path / "features", reduce={"methods": ["grad_dot"]})
    build_features(features)
    with pytest.raises(StoreNotFoundError, match=r"there is no store at .*words\.zarr"):
        reduce_run(changed(features, reduce=METHODS))


def test_synonyms_under_zero3_are_refused(tmp_path: Path) -> None:
    from llmattrib.products import WordProduct

    config = run_of(tmp_path, words={"synonym_cosine": 0.7})
    product = WordProduct.__new__(WordProduct)
    product.config = config
    with pytest.raises(MethodError, match=r"words\.synonym_cosine needs the whole embedding matrix"):
        product._check(is_cut=True)


def test_non_finite_word_gradients_name_their_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmattrib.errors import NonFiniteGradientError
    from llmattrib.features.words import WordExtractor
    from llmattrib.words import extract_words, load_word_extractor

    config = run_of(tmp_path, num_rows=3)
    run = Run(build_of(config))
    words, extractor = load_word_extractor(config, run.extractor), run.extractor
    with torch.no_grad():
        extractor.loaded.model.get_input_embeddings().weight[:] = float("nan")
    encoded = encode_all(run.examples, extractor.loaded.tokenizer, config.data, 128).encoded
    wording = Wording(extractor.loaded.tokenizer, config.data, config.words)
    with pytest.raises(NonFiniteGradientError, match="the gradient of example 'row-0'"):
        extract_words(config, words, wording, encoded, run.examples)
    assert isinstance(words, WordExtractor)


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_line_explains(finished: RunConfig) -> None:
    asked = ["query", finished.run_dir, "-p", PROMPT, "-c", COMPLETION, "-m", "tracin_we", "--explain", "-k", "2"]
    ended = CliRunner().invoke(app, [*asked, "--json"])
    assert ended.exit_code == 0, ended.output
    tree = json.loads(ended.stdout)
    first = tree["helpful"][0]
    assert sum(value for _, value in first["explanation"]["words"]) == pytest.approx(first["value"], rel=1e-5)
    assert "".join(text for text, _ in first["explanation"]["prompt"]) == first["prompt"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert f"through {first['explanation']['words'][0][0].strip()} +" in " ".join(shown.stdout.split())
    refused = CliRunner().invoke(app, [*asked, "-m", "grad_dot"])
    assert refused.exit_code == 2


def test_words_are_coloured_by_their_values(finished: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = Run(finished).query(PROMPT, COMPLETION, method="tracin_we", top=1, explain=True)
    out = io.StringIO()
    colours = Console(file=out, force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr(console, "Console", lambda: colours)
    console.print_hits(hits)
    assert "\x1b[1;32m" in out.getvalue()
    styles = [console.word_style(value, 1.0) for value in (0.6, 0.2, 0.01, 0.0, -0.2, -0.6)]
    assert styles == ["bold green", "green", "", "", "red", "bold red"]
    nothing = Explanation((), (("a", 0.0),), ((" b", 0.0),))
    console._print_explained(colours, hits.helpful[0], nothing, "green")
    assert "no word that both have" in out.getvalue()


def test_texts_of_tokens_join_to_the_text(finished: RunConfig) -> None:
    tokenizer = Run(finished).extractor.loaded.tokenizer
    for text in ("what is the colour?", "größer 東京 🙂 red", " leading"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text
