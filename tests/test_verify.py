"""`llmattrib verify`: a sound run has no findings; every kind of damage has one that names it and its command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from records import record
from test_build import changed, contents
from test_resume import config_file
from tiny import tiny_jsonl, tiny_run
from typer.testing import CliRunner

from llmattrib.adapters import ADAPTER_WEIGHTS, RECORD
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.commits import checksum, record_path
from llmattrib.config import load_config
from llmattrib.errors import StoreLockedError
from llmattrib.index import build_index
from llmattrib.lock import locked
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.train import train_adapter
from llmattrib.values.stage import compute_values
from llmattrib.verify import verify_run

METHODS = ("shapley", "trak", "beta_shapley(4,1.5)")
KINDS = ("flat", "hnsw", "ivfpq")


def every_stage(config):
    build_features(config)
    reduce_run(config)
    for method in config.reduce.methods:
        build_index(config, method)
    compute_values(config)
    compute_values(changed(config, values={"method": "shapley"}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with everything in it: values of a table and of representers, three indices."""
    folder = tmp_path_factory.mktemp("made")
    data = tiny_jsonl(folder, 5, name="validation.jsonl")
    values = {"data": data, "method": "msr_banzhaf", "num_samples": 64}
    config = tiny_run(folder, num_rows=14, reduce={"methods": METHODS}, values=values)
    every_stage(config)
    return config


@pytest.fixture
def run(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made.run_dir, tmp_path / "run")
    return changed(made, run_dir=tmp_path / "run")


def verify(run, repair=False):
    return verify_run(run, ["R"], repair=repair)


def flip(file, place=3):
    data = bytearray(Path(file).read_bytes())
    data[len(data) // place] ^= 0x10
    Path(file).write_bytes(bytes(data))


def data_of(run):
    """Bytes of everything but the copy of the config, which holds the directory."""
    return {name: data for name, data in contents(run.run_dir).items() if name != "config.yaml"}


def test_a_sound_run_has_no_findings_and_is_not_touched(run):
    before = {path: path.stat().st_mtime_ns for path in Path(run.run_dir).rglob("*")}
    assert verify(run) == []
    assert {path: path.stat().st_mtime_ns for path in Path(run.run_dir).rglob("*")} == before
    assert verify(run, repair=True) == []
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }


REDUCE = "llmattrib reduce R"
VALUES = "llmattrib values R"
DAMAGE = [
    ("features.zarr/rows/c.2.0.0", "features.zarr", "cannot be decoded", "llmattrib build R", (2, 2)),
    ("validation.zarr/rows/c.1.0.0", "validation.zarr", "cannot be decoded", VALUES, (1, 1)),
    ("representers/trak.zarr/rows/c.3.0.0", "representers/trak.zarr", "cannot be decoded", REDUCE, (3, 3)),
    ("representers/shapley.zarr/vectors/mean/c.0.0", "representers/shapley.zarr", "vector 'mean'", REDUCE, None),
    ("representers/shapley.zarr/vectors/total/c.0.0", "representers/shapley.zarr", "vector 'total'", REDUCE, None),
    ("representers/shapley.zarr/zarr.json", "representers/shapley.zarr", "", REDUCE, None),
    ("index/beta_shapley_4_1.5.faiss", "index/beta_shapley_4_1.5.faiss", "checksums", "llmattrib index R", None),
    ("index/trak.sample.npy", "index/trak.faiss", "does not match the checksums", "llmattrib index R", None),
    ("values/subsets.zarr/utilities/c.1.0", "values/subsets.zarr", "cannot be decoded", VALUES, (1, 1)),
    ("values/msr_banzhaf.csv", "values/msr_banzhaf.csv", "", VALUES, None),
    ("values/shapley.parquet", "values/shapley.csv", "", f"{VALUES} values.method=shapley", None),
    ("examples.parquet", "examples.parquet", "", "llmattrib build R", None),
]


@pytest.mark.parametrize("damage", [flip, os.unlink], ids=["flip", "missing"])
@pytest.mark.parametrize(("file", "place", "what", "rerun", "shards"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_damage_is_named_and_repaired_to_the_same_bytes(run, made, damage, file, place, what, rerun, shards):
    if file.endswith("zarr.json"):
        Path(run.run_dir, file).write_text("{")
    elif file.endswith(".csv") and damage is flip:
        text = Path(run.run_dir, file).read_text().splitlines(keepends=True)
        Path(run.run_dir, file).write_text("".join(text[:-1]))
    else:
        damage(Path(run.run_dir, file))
    if "subsets" in file:
        rerun = f"rm {run.run_dir}/values/msr_banzhaf.json && {VALUES}"
    hurt = contents(run.run_dir)
    found = verify(run)
    assert contents(run.run_dir) == hurt
    assert {(item.place, item.rerun, item.shards) for item in found} == {(place, rerun, shards)}
    if damage is flip:
        assert what in found[0].what
    if shards is not None:
        assert found[0].rows == (shards[0] * (32 if "subsets" in file else 4), found[0].rows[1])
    assert verify(run, repair=True) == found
    after = contents(run.run_dir)
    removed = {str(Path(path).relative_to(run.run_dir)) for item in found for path in item.removable}
    gone = {name for name in hurt if any(name == path or name.startswith(path + "/") for path in removed)}
    assert after == {name: data for name, data in hurt.items() if name not in gone}
    left = verify(run, repair=True)
    assert contents(run.run_dir) == after  # what a repair leaves, another one leaves too
    assert all(item.rerun == rerun for item in left)
    if rerun.startswith("rm "):
        Path(run.run_dir, "values/msr_banzhaf.json").unlink()
    every_stage(run)
    assert verify(run) == []
    assert data_of(run) == data_of(made)


@pytest.mark.parametrize("part", ["scale", "rows"])
def test_rows_that_are_not_finite_are_found_under_a_matching_checksum(run, part):
    path = run.layout.features if part == "scale" else run.layout.representers("trak")  # of int8, and of float32
    store = RowStore.open(path, read_only=False)
    rows, columns = store._rows[4:8], store._columns[4:8]
    if part == "scale":
        columns[1, 0] = np.inf
    else:
        rows[1, 0, 5] = np.inf
    store._rows[4:8], store._columns[4:8] = rows, columns
    of_shard = Path(record_path(path, 1, checksum(rows, columns)))
    record(path, 1).rename(of_shard)
    finding = next(item for item in verify(run) if item.place == str(Path(path).relative_to(run.run_dir)))
    assert finding.what == "holds row 5, which is not finite"
    assert (finding.shards, finding.rows, finding.removable) == ((1, 1), (4, 8), (str(of_shard),))


def test_shards_that_are_pending_are_told_in_one_line(run):
    for shard in (1, 2):
        record(run.layout.features, shard).unlink()
    (finding,) = verify(run)
    assert (finding.what, finding.shards, finding.rows) == ("is not committed", (1, 2), (4, 12))
    assert finding.removable == ()


def test_a_record_beyond_the_last_shard_is_a_leftover(run):
    beyond = Path(record_path(run.layout.features, 9, "0" * 32))
    beyond.touch()
    (finding,) = verify(run, repair=True)
    assert finding.is_leftover
    assert not beyond.exists()
    assert verify(run) == []


def test_what_other_features_made_is_stale(run, tmp_path):
    """The features are built again from other settings; all that was made from the old ones goes."""
    other = changed(run, features={"num_inits": 2})
    shutil.rmtree(run.layout.features)
    build_features(other)
    found = verify(other)
    names = ("beta_shapley_4_1.5", "shapley", "trak")
    assert [item.place for item in found] == [
        "validation.zarr",
        *(f"representers/{name}.zarr" for name in names),
        *(f"index/{name}.faiss" for name in names),
        "values/subsets.zarr",
        "values/msr_banzhaf.csv",
        "values/shapley.csv",
    ]
    assert all("other features" in item.what or "other settings" in item.what for item in found)
    verify(other, repair=True)
    assert verify(other) == []
    assert {path.name for path in Path(run.run_dir, "values").iterdir()} == set()
    every_stage(other)
    assert verify(other) == []


def test_a_config_that_is_not_the_one_of_the_features(run):
    (finding,) = verify(changed(run, features={"output": "log_odds"}))
    assert "features.output: stored 'loss', now 'log_odds'" in finding.what
    assert finding.rerun.startswith("restore these settings, or: rm -r ")
    assert finding.removable == ()


def test_examples_that_are_not_those_of_the_features(run):
    table = pq.read_table(run.layout.examples)
    pq.write_table(table.slice(0, 5), run.layout.examples)
    assert [item.what for item in verify(run)] == ["holds 5 examples, and the features are of 14"]
    texts = ["another", *table["completion"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, "completion", pa.array(texts)), run.layout.examples)
    assert [item.what for item in verify(run)] == ["holds other texts than the features were made from"]
    build_features(run)
    assert verify(run) == []


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_index_of_other_vectors_is_found(run, kind):
    """Its own checksums agree: another index was put in its place, file by file."""
    one = changed(run, index={"kind": kind})
    for method in METHODS:
        build_index(one, method)
    assert verify(one) == []
    for end in ("faiss", "sample.npy"):
        shutil.copy(Path(run.run_dir, f"index/trak.{end}"), Path(run.run_dir, f"index/shapley.{end}"))
    manifests = [json.loads(Path(run.run_dir, f"index/{name}.json").read_text()) for name in ("shapley", "trak")]
    Path(run.run_dir, "index/shapley.json").write_text(
        json.dumps({**manifests[0], "checksums": manifests[1]["checksums"]})
    )
    (finding,) = verify(one)
    assert (finding.place, finding.what) == (
        "index/shapley.faiss",
        "holds other vectors than the representers, from row 0 on",
    )


def test_values_beside_long_texts_are_sound_and_broken_csv_is_found(run):
    file = Path(run.run_dir, "values/shapley.csv")
    text = file.read_text()
    file.write_text(text.removesuffix("\n") + "x" * 200_000 + "\n")
    csv.field_size_limit(131_072)  # Python's own, as in a process that has read no CSV before
    assert verify(run) == []
    file.write_text(text.replace("\n", "\rx\n", 1))
    (found,) = verify(run)
    assert found.place == "values/shapley.csv"
    assert "cannot be read (new-line character seen in unquoted field" in found.what


def test_an_index_without_representers(run):
    shutil.rmtree(run.layout.representers("trak"))
    (finding,) = verify(run, repair=True)
    assert (finding.place, finding.what) == ("index/trak.faiss", "its representers are missing")
    assert finding.rerun == "llmattrib reduce R"
    reduce_run(run)
    assert verify(run) == []


def test_methods_that_the_config_does_not_name_are_named_in_the_command(run):
    flip(Path(run.run_dir, "representers/beta_shapley_4_1.5.zarr/rows/c.0.0.0"))
    (finding,) = verify(changed(run, reduce={"methods": ["shapley"]}))
    assert finding.rerun == """llmattrib reduce R 'reduce.methods=["beta_shapley(4,1.5)"]'"""


def test_temporary_files_and_dead_locks_are_leftovers(run):
    root = Path(run.run_dir)
    Path(run.layout.features, "rows/.0.12.partial").write_bytes(b"?")
    (root / "index/.trak.faiss.7.partial").write_bytes(b"?")
    (root / ".adapter.x7").mkdir()
    (root / ".adapter.x7/.a.partial").write_bytes(b"?")
    lock = f"held = locked({run.layout.path('representers')!r}); held.__enter__()"
    script = f"import os; from llmattrib.lock import locked; {lock}; os._exit(0)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    found = verify(run)
    assert sorted(item.place for item in found) == [
        ".adapter.x7",
        "features.zarr/rows/.0.12.partial",
        "index/.trak.faiss.7.partial",
        "representers.lock",
    ]
    assert all(item.is_leftover and item.rerun == "llmattrib verify R --repair" for item in found)
    assert verify(run, repair=True) == found
    assert verify(run) == []


@pytest.mark.parametrize("name", ["features.zarr", "representers", "index", "values"])
def test_a_live_lock_is_told_and_no_repair_is_made_beside_it(run, name):
    partial = Path(run.layout.features, ".x.partial")
    partial.write_bytes(b"?")
    with locked(run.layout.path(name)):
        (finding,) = verify(run)
        assert finding.place == f"{name}.lock"
        assert f"{name} is being written by process {os.getpid()}" in finding.what
        assert not finding.is_leftover
        with pytest.raises(StoreLockedError, match="is being written by process"):
            verify(run, repair=True)
        assert partial.exists()
    assert [item.place for item in verify(run)] == ["features.zarr/.x.partial"]


def test_metadata_of_features_that_cannot_be_read_is_left_to_a_person(run):
    Path(run.layout.features, "rows/zarr.json").write_text("{")
    (finding, *others) = verify(run, repair=True)
    assert others == []
    assert finding.rerun == f"rm -r {run.layout.features} && llmattrib build R"
    assert record(run.layout.features, 0).exists()


@pytest.mark.parametrize("linearisation", ["init", "trained"])
def test_adapters_that_are_gone_or_changed_are_found(tmp_path, linearisation):
    run = tiny_run(tmp_path, num_rows=4, features={"linearisation": linearisation}, train={"epochs": 1})
    train_adapter(run)
    build_features(run)
    assert verify(run) == []
    weights, folder = Path(run.layout.adapter, ADAPTER_WEIGHTS), Path(run.layout.adapter)
    sound = weights.read_bytes()
    flip(weights, 2)
    (finding,) = verify(run)
    assert (finding.place, finding.what) == ("adapter", "has other weights than train wrote")
    assert "&& llmattrib train R" in finding.rerun
    (folder / RECORD).unlink()  # as of an adapter that was not trained here
    features = ["has other weights than the features were made at"] if linearisation == "trained" else []
    assert [finding.what for finding in verify(run)] == features
    weights.unlink()
    assert [finding.what for finding in verify(run)] == [f"has no {ADAPTER_WEIGHTS}"]
    weights.write_bytes(sound)
    (folder / RECORD).write_text("[")
    assert f"has a {RECORD} that cannot be read (" in verify(run)[0].what
    shutil.rmtree(folder)
    assert [finding.what for finding in verify(run)] == ["is missing, and queries need it"]
    named = changed(run, model={"adapters": [str(tmp_path / "a"), str(tmp_path / "b")]})
    found = [finding.what for finding in verify(named)]
    if linearisation == "init":
        assert found == ["is missing, and queries need it"] * 2
    else:
        assert found == ["is one of 2 adapters, and the features were made at 1"]


def test_a_run_that_never_had_an_adapter_is_sound(tmp_path):
    run = tiny_run(tmp_path, num_rows=4)
    build_features(run)
    assert verify(run) == []


def test_the_command_line(run, tmp_path):
    def command(*arguments):
        result = CliRunner().invoke(app, ["verify", *arguments], catch_exceptions=False)
        return result.exit_code, result.stdout

    path = config_file(run, tmp_path)
    assert command(str(path)) == (0, "sound: every checksum, fingerprint and number of rows is right\n")
    flip(Path(run.layout.features, "rows/c.1.0.0"))
    code, printed = command(str(path), "seed=0")
    assert code == 1
    assert printed.startswith("features.zarr, shard 1 (rows 4 to 7): cannot be decoded")
    assert printed.endswith(f"to run, after this command with --repair:\n  llmattrib build {path} seed=0\n")
    code, printed = command(str(path), "--repair")
    assert code == 1
    assert "[removed]" in printed
    assert printed.endswith(f"to run:\n  llmattrib build {path}\n")
    code, printed = command(str(path), "--json")
    assert code == 1
    tree = json.loads(printed)
    assert not tree["is_sound"]
    assert tree["findings"][0]["what"] == "is not committed"
    build_features(run)
    Path(run.run_dir, ".x.partial").write_bytes(b"?")
    assert command(str(path))[0] == 1
    assert command(run.run_dir, "--repair")[0] == 0  # by now config.yaml names this directory
    assert command(run.run_dir)[0] == 0
    assert load_config(run.run_dir).run_dir == run.run_dir


def test_before_the_first_build(tmp_path):
    run = tiny_run(tmp_path)
    (finding,) = verify(run)
    assert (finding.place, finding.what) == ("features.zarr", "there is no finished store")
    assert finding.rerun == "llmattrib build R"
