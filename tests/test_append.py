"""Data that grew at its end: the store, the representers and the index follow, and old rows are not computed again."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from records import record
from test_build import changed, contents
from test_resume import config_file
from tiny import tiny_rows, tiny_run
from typer.testing import CliRunner

from llmattrib import storage
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.data import read_examples
from llmattrib.errors import FingerprintMismatchError, StaleIndexError
from llmattrib.features.extract import Extractor
from llmattrib.index import build_index
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore

BEFORE, AFTER = 10, 17  # shards of 4: two full ones and one of two rows; then four full ones and one of one row


def write_rows(config, rows):
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def grow(config, num_rows=AFTER):
    write_rows(config, tiny_rows(num_rows))


def identities(store, shards):
    """Inode and times of the files of shards and of their records."""
    names = [name for shard in shards for name in (f"rows/c.{shard}.0.0", f"columns/c.{shard}.0")]
    names += [f"commits/{record(store, shard).name}" for shard in shards]
    stats = {name: Path(store, name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def expected(config, folder, num_rows=AFTER):
    """Build all rows at once in another place, with the sketch plan and the note on it that `config` has."""
    whole = changed(config, folder)
    write_rows(config, tiny_rows(BEFORE))
    build_features(whole)
    store = RowStore.open(whole.layout.features)
    info = store.manifest.info
    storage.remove(whole.layout.features)
    grow(config, num_rows)
    with pytest.MonkeyPatch.context() as patch:
        from llmattrib.features.sketch import SketchPlan
        from llmattrib.products import LoraProduct

        plan = SketchPlan.from_json(dict(info["sketch_plan"]))
        patch.setattr(LoraProduct, "plan", lambda product, _: product.__dict__.update(_plan=plan, _curvature=None))
        build_features(whole)
    made = RowStore.open(whole.layout.features, read_only=False)
    made._save(replace(made.manifest, info={**made.manifest.info, "sketch_rows": info["sketch_rows"]}))
    return contents(whole.layout.features)


@pytest.fixture
def run(tmp_path):
    """A run of the first rows, built."""
    config = tiny_run(tmp_path, num_rows=BEFORE, reduce={"methods": ["grad_dot", "influence"]})
    build_features(config)
    return config


# ------------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("num_rows", [11, 12, 13, AFTER])
def test_an_extended_store_has_the_bytes_of_a_whole_build_and_full_shards_are_untouched(run, tmp_path, num_rows):
    whole = expected(run, tmp_path / "whole", num_rows)
    before = identities(run.layout.features, [0, 1])
    result = build_features(run)
    num_shards = -(-num_rows // 4)
    assert (result.num_examples, result.num_appended) == (num_rows, num_rows - BEFORE)
    assert (result.num_shards, result.num_shards_done) == (num_shards, num_shards - 2)
    assert identities(run.layout.features, [0, 1]) == before
    assert contents(run.layout.features) == whole
    assert [example.id for example in read_examples(run.layout.examples)] == [row["id"] for row in tiny_rows(num_rows)]
    assert RowStore.open(run.layout.features).verify() == []


def test_a_last_shard_that_was_full_is_kept_too(tmp_path):
    config = tiny_run(tmp_path, num_rows=8)
    build_features(config)
    before = identities(config.layout.features, [0, 1])
    grow(config, 9)
    assert build_features(config).num_shards_done == 1
    assert identities(config.layout.features, [0, 1]) == before


def test_only_rows_of_new_and_open_shards_pass_through_the_model(run, monkeypatch):
    seen = []
    real = Extractor.extract

    def extract(self, batch, sketch):
        seen.append(len(batch))
        return real(self, batch, sketch)

    monkeypatch.setattr(Extractor, "extract", extract)
    monkeypatch.setattr(Extractor, "plan", lambda *_: pytest.fail("calibrated again"))
    grow(run)
    build_features(run)
    assert sum(seen) == AFTER - 8
    assert build_features(run).num_appended == 0
    assert sum(seen) == AFTER - 8


def test_appending_twice_is_appending_once(run, tmp_path):
    whole = expected(run, tmp_path / "whole")
    for num_rows in (11, 14, AFTER):
        grow(run, num_rows)
        build_features(run)
    assert contents(run.layout.features) == whole
    assert RowStore.open(run.layout.features).manifest.info["sketch_rows"] == BEFORE


def test_raising_the_limit_appends(tmp_path):
    config = tiny_run(tmp_path, num_rows=BEFORE)
    build_features(changed(config, data={"limit": 6}))
    assert build_features(config).num_appended == 4


def test_examples_that_are_skipped_are_counted_anew(tmp_path):
    config = changed(tiny_run(tmp_path, num_rows=BEFORE), data={"max_length": 24, "overlong": "skip"})
    first = build_features(config)
    grow(config)
    second = build_features(config)
    assert second.num_skipped > first.num_skipped > 0
    assert second.num_appended == second.num_examples - first.num_examples
    assert RowStore.open(config.layout.features).manifest.info["num_skipped"] == second.num_skipped


def test_an_unfinished_store_can_grow(run, tmp_path):
    whole = expected(run, tmp_path / "whole")
    record(run.layout.features, 1).unlink()
    assert build_features(run).num_shards_done == 4
    assert contents(run.layout.features) == whole


# ----------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    """The process is gone: nothing catches it and nothing is cleaned up."""


def steps(monkeypatch, at=None):
    """Count what is written to the disk, each before it happens; at number `at` the process is killed."""
    count = []

    def watch(owner, name):
        real = getattr(owner, name)

        def step(*args, **kwargs):
            if len(count) == at:
                raise Killed(name)
            count.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    watch(zarr.Array, "resize")
    watch(zarr.core.attributes.Attributes, "update")
    for name in ("remove", "atomic_write", "_create", "_sync_folder", "create_empty"):
        watch(storage, name)
    watch(sys.modules["llmattrib.build"], "atomic_write")
    watch(sys.modules["llmattrib.data"], "atomic_write")
    return count


def test_a_kill_before_any_write_leaves_the_old_store_or_one_that_goes_on(run, tmp_path):
    whole = expected(run, tmp_path / "whole")
    old_rows = RowStore.open(run.layout.features).read(0, BEFORE)
    start, last = tmp_path / "start", 0
    shutil.copytree(run.run_dir, start)
    with pytest.MonkeyPatch.context() as patch:
        last = len(steps(patch))
        count = steps(patch)
        build_features(run)
        last = len(count)
    assert {"resize", "update", "remove", "atomic_write", "_create", "_sync_folder", "create_empty"} == set(count)
    for at in range(last):
        shutil.rmtree(run.run_dir)
        shutil.copytree(start, run.run_dir)
        with pytest.MonkeyPatch.context() as patch:
            steps(patch, at)
            with pytest.raises(Killed):
                build_features(run)
        store = RowStore.open(run.layout.features)
        if store.manifest.num_rows == BEFORE:
            assert store.is_complete
            assert store.verify() == []
            np.testing.assert_array_equal(store.read(0, BEFORE), old_rows)
            assert len(store.column("norm")) == BEFORE
        else:
            assert store.manifest.num_rows == AFTER
            assert not {0, 1} & set(store.pending())
            committed = set(range(store.num_shards)) - set(store.pending())
            assert {problem.shard for problem in store.verify()} == set(store.pending())
            for shard in committed:
                assert len(store.read(*store.shard_range(shard))) > 0
        build_features(run)
        assert contents(run.layout.features) == whole, at
        assert len(read_examples(run.layout.examples)) == AFTER


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_extension_that_was_killed_can_be_followed_by_a_larger_one_or_given_up(run, tmp_path, at):
    before = contents(run.layout.features)
    whole = expected(run, tmp_path / "whole")
    grow(run, 11)
    with pytest.MonkeyPatch.context() as patch:
        steps(patch, at)
        with pytest.raises(Killed):
            build_features(run)
    is_old = RowStore.open(run.layout.features).manifest.num_rows == BEFORE
    if is_old:
        grow(run, BEFORE)
        assert build_features(run).num_shards_done == 0
        assert contents(run.layout.features) == before
    grow(run)
    assert build_features(run).num_appended == (AFTER - BEFORE if is_old else AFTER - 11)
    assert contents(run.layout.features) == whole


def test_a_process_that_is_killed_while_it_extends(run, tmp_path):
    whole = expected(run, tmp_path / "whole")
    settings = config_file(run, tmp_path)
    code = """
import os, signal, sys
from llmattrib import storage
from llmattrib.build import build_features
from llmattrib.config import load_config
storage.remove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build_features(load_config(sys.argv[1]))
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, "-c", code, str(settings)], env=env, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    store = RowStore.open(run.layout.features)
    assert (store.manifest.num_rows, store.pending()) == (AFTER, [2, 3, 4])  # the record of shard 2 lies there still
    assert record(store.path, 2).exists()
    build_features(run)
    assert contents(run.layout.features) == whole


# ------------------------------------------------------------------------------------------------ old rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[3].update(completion="blue"),
            r"completion of row 3 \(id 'row-3'\): stored '.*', now 'blue'",
        ),
        (lambda rows: rows[9].update(prompt="who?"), r"prompt of row 9 \(id 'row-9'\)"),
        (lambda rows: rows[0].update(id="other"), r"id of row 0 \(id 'row-0'\): stored 'row-0', now 'other'"),
        (lambda rows: rows.pop(4), r"id of row 4 \(id 'row-4'\): stored 'row-4', now 'row-5'"),
        (lambda rows: rows.insert(0, rows.pop()), r"id of row 0 \(id 'row-0'\): stored 'row-0', now 'row-16'"),
        (lambda rows: rows.__delitem__(slice(8, None)), r"row 8 \(id 'row-8'\): stored 'there', now 'gone'"),
    ],
)
def test_an_old_row_that_was_changed_or_removed_is_named(run, change, message):
    before = contents(run.run_dir)
    rows = tiny_rows(AFTER)
    change(rows)
    write_rows(run, rows)
    with pytest.raises(FingerprintMismatchError, match=rf"(?s)data.*{message}.*rows may be added at its end"):
        build_features(run)
    assert contents(run.run_dir) == before


def test_without_the_saved_texts_the_hashes_alone_are_compared(run):
    rows = tiny_rows(AFTER)
    rows[3]["completion"] = "blue"
    write_rows(run, rows)
    Path(run.layout.examples).unlink()
    with pytest.raises(FingerprintMismatchError) as caught:
        build_features(run)
    assert set(caught.value.differing) == {"fingerprint.data.examples", "fingerprint.data.tokens"}


def test_other_settings_are_refused_with_grown_data_too(run):
    before = contents(run.run_dir)
    grow(run)
    with pytest.raises(FingerprintMismatchError) as caught:
        build_features(changed(run, features={"output": "log_odds"}))
    assert set(caught.value.differing) == {"fingerprint.features.output"}
    assert contents(run.run_dir) == before


# ------------------------------------------------------------------------------------------------ end to end


def test_representers_index_and_query_follow(run, monkeypatch):
    methods = run.reduce.methods
    reduce_run(run)
    for method in methods:
        build_index(run, method)
    question = tiny_rows(AFTER)[14]
    old = Run(run).query(question["prompt"], question["completion"], top=BEFORE, method="grad_dot")
    grow(run)
    build_features(run)
    with pytest.raises(StaleIndexError, match="llmattrib reduce"):
        Run(run).query(question["prompt"], question["completion"], method="grad_dot")
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "__init__", lambda *_: pytest.fail("the model was loaded"))
        assert [result.is_reused for result in reduce_run(run)] == [False, False]
        with pytest.raises(StaleIndexError, match="llmattrib index"):
            Run(run).query(question["prompt"], question["completion"], method="grad_dot")
        assert [build_index(run, method).num_rows for method in methods] == [AFTER, AFTER]
    new = Run(run).query(question["prompt"], question["completion"], top=AFTER, method="grad_dot")
    assert "row-14" in [hit.id for hit in new.helpful]
    assert not {hit.id for hit in old.helpful} & {f"row-{row}" for row in range(BEFORE, AFTER)}
    rows = RowStore.open(run.layout.representers("grad_dot"))
    assert rows.manifest.num_rows == AFTER
    np.testing.assert_allclose(rows.read_vector("total"), rows.read(0, AFTER).sum(0), rtol=1e-4, atol=1e-5)


def test_the_commands_follow_data_that_grew(run, tmp_path):
    """build, reduce, index, query and verify as a person types them, before and after."""
    settings = config_file(run, tmp_path)

    def say(command, *options, code=0):
        said = CliRunner().invoke(app, [command, str(settings), *options])
        assert said.exit_code == code, said.output
        return " ".join(said.output.split())

    say("reduce")
    say("index")
    question = tiny_rows(AFTER)[14]
    ask = ("--prompt", question["prompt"], "--completion", question["completion"], "--method", "grad_dot", "--json")
    assert "row-14" not in say("query", *ask)
    before = identities(run.layout.features, [0, 1])
    grow(run)
    said = say("build")
    assert "17 examples (7 of them new)" in said
    assert "3 of 5 shards computed now" in said
    assert "new" not in say("build")
    assert "llmattrib reduce" in say("query", *ask, code=2)
    said = say("verify", code=1)
    assert "representers/grad_dot.zarr: was made from other features than are there now" in said
    say("reduce")
    say("index")
    assert "row-14" in say("query", *ask)
    assert "sound" in say("verify")
    assert identities(run.layout.features, [0, 1]) == before
