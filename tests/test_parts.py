"""Jobs that build one store together, each a part of its shards: real processes, equal bytes, no one in the way."""

import json
import signal
from pathlib import Path

import pytest
from records import recorded
from test_build import changed, contents
from test_faults import STOPPED, Place, leftovers
from tiny import tiny_rows, tiny_run

from llmattrib.build import build_features
from llmattrib.errors import ConfigError, FingerprintMismatchError, StoreLockedError
from llmattrib.lock import Part, live_parts, locked, parts
from llmattrib.store import RowStore

NUM_ROWS, SHARD_SIZE = 40, 2
NUM_SHARDS = NUM_ROWS // SHARD_SIZE


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that one job builds."""
    config = tiny_run(tmp_path_factory.mktemp("alone"), num_rows=NUM_ROWS, reduce={"methods": ["grad_dot"]})
    return changed(config, features={"shard_size": SHARD_SIZE, "tokens_per_batch": 64})


@pytest.fixture(scope="module")
def whole(alone):
    """Its bytes."""
    build_features(alone)
    return contents(alone.layout.features)


@pytest.fixture
def base(alone, tmp_path):
    """The same elsewhere, with data of its own."""
    train = tmp_path / "train.jsonl"
    train.write_bytes(Path(alone.data.train).read_bytes())
    return changed(alone, tmp_path / "run", data={"train": str(train)})


@pytest.fixture
def place(zygote, base, tmp_path):
    return Place(zygote, base, tmp_path)


def committed(config):
    return recorded(config.layout.features)


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/4/2", "-1/4"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=f"the part is '{text}'[\\s\\S]*such as 2/4"):
        Part.parse(text)


def test_parts_share_all_numbers_once():
    owners = [[number for number in (1, 2, 3) if Part(number, 3).has(shard)] for shard in range(5)]
    assert owners == [[1], [2], [3], [1], [2]]


def test_each_part_computes_its_shards_alone_and_all_of_them_a_whole(base, whole):
    for number, shards in ((2, {1, 4, 7, 10, 13, 16, 19}), (1, {0, 3, 6, 9, 12, 15, 18}), (3, {*range(2, 20, 3)})):
        before = committed(base) if number != 2 else set()
        result = build_features(base, part=Part(number, 3))
        assert committed(base) == before | shards
        assert (result.num_shards_done, result.num_shards) == (len(shards), NUM_SHARDS)
    assert contents(base.layout.features) == whole
    assert not leftovers(base)


@pytest.mark.slow
def test_parts_that_begin_at_once_write_what_one_job_writes(place, whole):
    children = [place.start("build", "--part", f"{number}/3") for number in (1, 2, 3)]
    for number, child in enumerate(children, start=1):
        code, printed = child.wait()
        assert code == 0, printed
        words = " ".join(printed.split())
        assert f"of {NUM_SHARDS} shards computed now (part {number} of 3)" in words
        assert "next:" not in words
    assert contents(place.features) == whole
    assert not leftovers(place.config)
    assert place.verify()["is_sound"]


@pytest.mark.slow
@pytest.mark.parametrize("number_of_signal", [signal.SIGKILL, signal.SIGTERM])
def test_a_part_that_dies_takes_nothing_of_the_others_and_goes_on(place, whole, number_of_signal):
    children = [place.start("build", "--part", f"{number}/2") for number in (1, 2)]
    place.wait_for_commits(2, children[0])
    children[0].send(number_of_signal)
    code, printed = children[0].wait()
    assert code in ((-signal.SIGKILL,) if number_of_signal == signal.SIGKILL else (0, STOPPED)), printed
    assert children[1].wait()[0] == 0
    before = place.chunks()
    assert {*range(1, NUM_SHARDS, 2)} <= set(before)
    code, printed = place.run("build", "--part", "1/2")
    assert code == 0, printed
    assert before.items() <= place.chunks().items()
    assert contents(place.features) == whole
    assert not leftovers(place.config)


@pytest.mark.slow
def test_beside_a_live_part_only_another_of_its_count_may_write(place, whole):
    first = place.start("build", "--part", "1/2")
    place.wait_for_commits(2, first)
    first.send(signal.SIGSTOP)
    try:
        for command in (("build",), ("build", "--part", "1/2"), ("build", "--part", "2/3"), ("verify", "--repair")):
            code, printed = place.run(*command)
            words = " ".join(printed.split())
            assert code == 2, printed
            assert f"is being written by part 1 of 2 (process {first.pid} on" in words
            assert "part-1-of-2.lock" in words
        config = changed(place.config, data={"train": str(place.folder / "more.jsonl")})
        rows = "".join(json.dumps(row) + "\n" for row in tiny_rows(NUM_ROWS + 3))
        Path(config.data.train).write_text(rows)
        with pytest.raises(FingerprintMismatchError, match=f"num_rows: stored {NUM_ROWS}, now {NUM_ROWS + 3}"):
            build_features(config, part=Part(2, 2))
        found = place.verify()["findings"][0]
        assert found["place"] == "features.zarr.part-1-of-2.lock"
        assert f"is being written by process {first.pid}" in found["what"]
        code, printed = place.run("build", "--part", "2/2")
        assert code == 0, printed
        assert {*range(1, NUM_SHARDS, 2)} <= committed(place.config)
        assert len(committed(place.config)) < NUM_SHARDS
    finally:
        first.send(signal.SIGCONT)
    assert first.wait()[0] == 0
    assert contents(place.features) == whole
    assert not leftovers(place.config)


def test_a_part_is_refused_beside_a_whole_build_and_waits_for_one_that_prepares(tmp_path, monkeypatch):
    path = str(tmp_path / "features.zarr")
    with locked(path), pytest.raises(StoreLockedError, match="is being written by process"), Part(1, 2).joining(path):
        pass
    monkeypatch.setattr("llmattrib.lock.PATIENCE", 0.5)
    with (
        Part(1, 2).joining(path) as has_others,
        pytest.raises(StoreLockedError, match="is being written by process"),
        Part(2, 2).joining(path),
    ):
        pass
    assert not has_others
    with locked(Part(1, 2).place(path)), Part(2, 2).joining(path) as has_others:
        assert has_others
        assert [str(part) for part, _ in live_parts(path)] == ["part 1 of 2"]
    assert parts(path) == []


def test_data_that_has_grown_is_appended_by_parts(base, tmp_path):
    build_features(base)
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows(NUM_ROWS + 5))
    Path(base.data.train).write_text(rows)
    results = [build_features(base, part=Part(number, 2)) for number in (1, 2)]
    assert [result.num_appended for result in results] == [5, 0]
    assert sum(result.num_shards_done for result in results) == 3
    store = RowStore.open(base.layout.features)
    assert store.is_complete
    assert store.verify() == []
