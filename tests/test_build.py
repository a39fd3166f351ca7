"""The build: the same features whatever the ranks, batches and interruptions; errors name the cause."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from records import record
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, tiny_adapter_dir, tiny_rows, tiny_run, tiny_tokenizer

from llmattrib import extraction
from llmattrib.build import build_features
from llmattrib.config import config_to_yaml, load_config, validate_config
from llmattrib.data import load_examples, read_examples
from llmattrib.errors import (
    ConfigError,
    DeviceMemoryError,
    DiskSpaceError,
    EmptyDatasetError,
    FingerprintMismatchError,
    LabelWordError,
    ModelNotFoundError,
    NonFiniteGradientError,
    OverlongExampleError,
    StoreLockedError,
)
from llmattrib.extraction import calibration_batches, encode_examples, load_extractor, resolved_config
from llmattrib.features.extract import COLUMNS, Extractor
from llmattrib.features.sketch import Sketch, SketchPlan
from llmattrib.lock import locked
from llmattrib.storage import atomic_write
from llmattrib.store import RowStore


def contents(folder):
    """Every file below `folder`: relative name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def changed(config, run_dir=None, **sections):
    """Return the run with other settings, and in another directory."""
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        tree[section] = tree[section] | values
    return validate_config(tree | ({"run_dir": str(run_dir)} if run_dir else {}))


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path, num_rows=10)


# ------------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize(
    ("labels", "features"),
    [
        (False, {}),
        (False, {"dtype": "float16"}),
        (False, {"dtype": "float32", "sketch": {"kind": "none"}, "output": "log_odds"}),
        (False, {"num_inits": 2, "sketch": {"kind": "rademacher", "dim": 64}}),
        (True, {"output": "logits", "dtype": "float32"}),
        (True, {"output": "margin"}),
    ],
)
def test_rows_are_the_features_of_each_example_alone(tmp_path, labels, features):
    config = tiny_run(tmp_path, labels=labels, num_rows=7)
    config = changed(config, features=features)
    result = build_features(config)
    store = RowStore.open(result.path)
    extractor = load_extractor(config)
    encoded = encode_examples(config, extractor, load_examples(config.data)).encoded
    sketch = Sketch(SketchPlan.from_json(dict(store.manifest.info["sketch_plan"])))
    alone = [extractor.extract([item], sketch) for item in encoded]
    phi = np.concatenate([one.phi for one in alone])
    rows = store.read(0, 7)
    assert rows.shape == (7, 2 if features.get("output") == "logits" else 1, sketch.dim)
    error = np.abs(rows - phi).max(axis=(1, 2)) / np.abs(phi).max(axis=(1, 2))
    assert store.manifest.dtype == features.get("dtype", "int8")
    assert error.max() < {"float32": 1e-5, "float16": 6e-4, "int8": 1 / 253}[store.manifest.dtype]
    assert store.manifest.columns == COLUMNS
    for name in COLUMNS:
        np.testing.assert_allclose(
            store.column(name), np.concatenate([one.columns[name] for one in alone]), rtol=1e-4, atol=1e-5
        )


def test_the_result_says_what_was_done(run):
    seen = []
    result = build_features(run, progress=lambda done, total: seen.append((done, total)))
    encoded = encode_examples(run, load_extractor(run), load_examples(run.data)).encoded
    assert (result.num_examples, result.num_tokens) == (10, sum(map(len, encoded)))
    assert (result.num_shards, result.num_shards_done) == (3, 3)
    assert (result.num_truncated, result.num_skipped) == (0, 0)
    assert result.seconds > 0
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


def test_examples_and_config_lie_beside_the_features(run):
    build_features(run)
    assert [example.id for example in read_examples(run.layout.examples)] == [row["id"] for row in tiny_rows(10)]
    saved = load_config(run.run_dir)
    assert saved == run
    again = build_features(saved)
    assert again.num_shards_done == 0


def test_saved_paths_are_absolute_when_they_exist(tmp_path, monkeypatch):
    config = tiny_run(tmp_path)
    adapter = tiny_adapter_dir(tmp_path, config.model.name)
    monkeypatch.chdir(tmp_path)
    relative = changed(
        config, model={"name": "llama-0", "adapters": ["adapter", "not/here"]}, data={"train": "train.jsonl"}
    )
    saved = resolved_config(relative)
    assert (saved.model.name, saved.data.train) == (config.model.name, config.data.train)
    assert saved.model.adapters == (adapter, "not/here")
    assert resolved_config(changed(config, model={"name": "org/model"})).model.name == "org/model"
    assert "llama-0" in config_to_yaml(saved)


def test_calibration_takes_evenly_spaced_examples(run):
    encoded = encode_examples(run, load_extractor(run), load_examples(run.data)).encoded
    sample = {id(item) for batch in calibration_batches(run, encoded) for item in batch}
    assert sample == {id(encoded[row]) for row in (0, 3, 6, 9)}


def test_info_tells_what_a_query_needs(tmp_path):
    config = tiny_run(tmp_path, labels=True, features={"output": "margin", "sketch": {"dim": 64}, "shard_size": 4})
    build_features(config)
    info = RowStore.open(config.layout.features).manifest.info
    tokenizer = tiny_tokenizer()
    assert info["label_ids"] == [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    assert SketchPlan.from_json(info["sketch_plan"]).dim == 64
    assert info["versions"]["torch"] == torch.__version__


# --------------------------------------------------------------------------------------------- the same bytes


def test_bytes_do_not_depend_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    whole = changed(run, tmp_path / "whole")
    build_features(whole)
    written = []
    real = RowStore.write_shard

    def failing(self, shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        real(self, shard, *args)

    monkeypatch.setattr(RowStore, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build_features(run)
    assert not Path(run.layout.features + ".lock").exists()
    monkeypatch.setattr(RowStore, "write_shard", real)
    seen = []
    result = build_features(run, progress=lambda done, total: seen.append((done, total)))
    assert (result.num_shards, result.num_shards_done) == (3, 1)
    assert seen[0] == (8, 10)
    assert seen[-1] == (10, 10)
    assert contents(run.layout.features) == contents(whole.layout.features)


def test_a_stored_sketch_plan_is_kept(run, monkeypatch):
    build_features(run)
    monkeypatch.setattr(Extractor, "plan", lambda *_: pytest.fail("calibrated again"))
    record(run.layout.features, 1).unlink()
    assert build_features(run).num_shards_done == 1


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("features", {"output": "log_odds"}, "fingerprint.features.output"),
        ("features", {"num_inits": 2}, "fingerprint.features.num_inits"),
        ("features", {"sketch": {"dim": 128, "calibration_examples": 4}}, "fingerprint.features.sketch.dim"),
        ("features", {"sketch": {"dim": 256, "calibration_examples": 5}}, "calibration_examples: stored 4, now 5"),
        ("features", {"sketch": {"kind": "none"}}, "fingerprint.features.sketch.kind: stored 'oporp', now 'none'"),
        ("features", {"dtype": "float32"}, "dtype: stored 'int8', now 'float32'"),
        ("features", {"shard_size": 5}, "shard_size: stored 4, now 5"),
        ("data", {"limit": 9}, "num_rows: stored 10, now 9"),
        ("data", {"system": "Be brief."}, "fingerprint.encoding.system: stored None, now 'Be brief.'"),
        ("data", {"chat_template": "none"}, "fingerprint.encoding.chat_template"),
        ("model", {"lora": {"rank": 2}}, "fingerprint.model.lora"),
        ("model", {"dtype": "bfloat16"}, "fingerprint.model.dtype"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(run, section, values, key):
    build_features(run)
    before = contents(run.run_dir)
    with pytest.raises(FingerprintMismatchError) as error:
        build_features(changed(run, **{section: values}))
    assert key in str(error.value)
    assert contents(run.run_dir) == before


def test_another_seed_or_text_is_refused(run):
    build_features(run)
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint\.seed: stored 0, now 1"):
        build_features(type(run).model_validate(run.model_dump() | {"seed": 1}))
    file = Path(run.data.train)
    file.write_text(file.read_text().replace("green", "blue", 1))
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint\.data\.examples.*fingerprint\.data\.tokens"):
        build_features(run)


def test_settings_that_do_not_change_numbers_are_accepted(run):
    build_features(run)
    assert build_features(changed(run, features={"tokens_per_batch": 64})).num_shards_done == 0
    assert build_features(changed(run, data={"overlong": "skip", "max_length": CONTEXT})).num_shards_done == 0


def test_the_adapter_counts_at_trained_only(tmp_path):
    config = tiny_run(tmp_path, num_rows=5)
    adapters = [tiny_adapter_dir(tmp_path, config.model.name, seed=seed, name=f"a{seed}") for seed in (1, 2)]
    first, second = (changed(config, model={"adapters": [adapter]}) for adapter in adapters)
    build_features(first)
    assert build_features(second).num_shards_done == 0
    first, second = (
        changed(one, tmp_path / "trained", features={"linearisation": "trained"}) for one in (first, second)
    )
    build_features(first)
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint\.model\.adapters"):
        build_features(second)
    assert not np.allclose(RowStore.open(first.layout.features).column("loss"), 0)


def test_the_adapter_that_was_trained_here_is_found(tmp_path):
    config = tiny_run(tmp_path, num_rows=5, features={"linearisation": "trained", "sketch": {"dim": 64}})
    with pytest.raises(ModelNotFoundError, match=r"there is no adapter[\s\S]*run `llmattrib train` first"):
        build_features(config)
    given = changed(config, tmp_path / "given", model={"adapters": [tiny_adapter_dir(tmp_path, config.model.name)]})
    tiny_adapter_dir(tmp_path / "run", config.model.name)
    build_features(config)
    build_features(given)
    assert contents(config.layout.features) == contents(given.layout.features)


def test_the_adapter_of_a_run_at_a_url(tmp_path, run):
    adapter = Path(tiny_adapter_dir(tmp_path / "run", run.model.name))
    at_url = run.model_copy(update={"run_dir": f"file://{run.run_dir}"})
    assert extraction.run_adapters(at_url) == extraction.run_adapters(run) == [str(adapter)]
    remote = run.model_copy(update={"run_dir": f"memory://{tmp_path.name}"})
    assert extraction.run_adapters(remote) == []
    atomic_write(remote.layout.adapter + "/adapter_config.json", b"{}")
    with pytest.raises(ModelNotFoundError, match=r"is at memory://[\s\S]*name the copy in model\.adapters"):
        extraction.run_adapters(remote)


# ------------------------------------------------------------------------------------------------ errors


def test_a_nonfinite_gradient_names_the_example(run):
    token = tiny_tokenizer().encode("7?", add_special_tokens=False)[0]
    file = Path(run.model.name, "model.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteGradientError, match=r"example 'row-7' \(row 7\) is NaN or infinite; its loss is nan"):
        build_features(changed(run, features={"sketch": {"kind": "none"}}))
    assert RowStore.open(run.layout.features).pending() == [1, 2]


@pytest.mark.parametrize(
    ("fails", "tokens", "advice"),
    [
        ("cuda", 256, "set features.tokens_per_batch=128"),
        ("cuda", 1, "the batch is one example already"),
        ("cpu", 256, "set features.tokens_per_batch=128"),
    ],
)
def test_running_out_of_memory_names_the_batch_size_to_try(run, monkeypatch, fails, tokens, advice):
    def extract(*_):
        if fails == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return torch.empty(1 << 60)  # the CPU allocator's own failure

    monkeypatch.setattr(Extractor, "extract", extract)
    with pytest.raises(DeviceMemoryError, match=rf"tokens_per_batch is {tokens}\)[\s\S]*{advice}"):
        build_features(changed(run, features={"tokens_per_batch": tokens}))
    assert not Path(run.layout.features + ".lock").exists()


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ("__init__", r"llama-0 does not fit[\s\S]*more or larger devices"),
        ("_differentiate", r"a batch of 4 examples[\s\S]*set features\.tokens_per_batch=128"),
    ],
    ids=["weights are taken to devices", "the sketch is planned"],
)
def test_running_out_of_memory_before_the_first_row_says_of_what(run, monkeypatch, step, match):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Extractor, step, fail)
    with pytest.raises(DeviceMemoryError, match=match):
        build_features(run)
    assert not Path(run.layout.features).exists()


def test_other_runtime_errors_pass(run, monkeypatch):
    def extract(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Extractor, "extract", extract)
    with pytest.raises(RuntimeError, match="a bug"):
        build_features(run)


def test_overlong_examples_are_refused_cut_or_skipped_and_counted(run):
    short = changed(run, data={"max_length": 24})
    with pytest.raises(OverlongExampleError, match="longer than 24 tokens"):
        build_features(short)
    assert not Path(run.layout.features).exists()
    skipped = build_features(changed(short, data={"overlong": "skip"}))
    assert skipped.num_skipped > 0
    assert skipped.num_examples == 10 - skipped.num_skipped == len(read_examples(run.layout.examples))
    cut = build_features(changed(short, str(run.run_dir) + "-cut", data={"overlong": "truncate"}))
    assert (cut.num_truncated, cut.num_examples) == (skipped.num_skipped, 10)


def test_mistakes_leave_nothing_behind(run):
    cases = [
        (changed(run, data={"train": "nothing.jsonl"}), EmptyDatasetError),
        (changed(run, model={"name": "/no/such/model"}), ModelNotFoundError),
        (changed(run, data={"label_words": ["what is", "no"]}), LabelWordError),
        (changed(run, data={"max_length": 10 * CONTEXT}), ConfigError),
        (changed(run, features={"shard_size": 10**12, "sketch": {"kind": "none"}}), DiskSpaceError),
    ]
    for config, error in cases:
        with pytest.raises(error):
            build_features(config)
        assert not Path(run.layout.features).exists()
        assert not Path(run.layout.features + ".lock").exists()


def test_a_store_that_is_being_written_is_left_alone(run, monkeypatch):
    monkeypatch.setattr(extraction, "load_model", lambda *_, **__: pytest.fail("a model was loaded in vain"))
    with locked(run.layout.features), pytest.raises(StoreLockedError, match="is being written by process"):
        build_features(run)


def test_bytes_are_free_of_time_and_place(tmp_path, run):
    build_features(run)
    text = json.dumps([data.decode("latin1") for data in contents(run.layout.features).values()])
    assert str(tmp_path) not in text
