"""Reduce by several real processes: as by one to rounding, twice the same bytes, ending together, going on after."""

import shutil
import signal
from pathlib import Path

import numpy as np
import oracles
import pytest
from test_build import contents
from test_distributed import launch, rank_environments
from test_reduce import draw, make_run, representers, write_features

from llmattrib.config import config_to_yaml
from llmattrib.distributed import GRACE_SECONDS, Ranks
from llmattrib.reader import FeatureReader
from llmattrib.reduce import reduce_run
from llmattrib.settings import resolve
from llmattrib.store import RowStore

METHODS = ("influence", "trak", "grad_dot", "grad_cos")
NUM_ROWS, DIM = 45, 6  # six shards of 8

WORK = """
import os, signal, sys
from llmattrib.config import load_config
from llmattrib.distributed import ranks
from llmattrib.errors import StoreError
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
team, write_shard = ranks(), RowStore.write_shard
how, files = sys.argv[1], sys.argv[2:]

def failing(store, shard, rows, scalars):
    if shard == 3:
        assert team.rank == 1, "its own shards alone are written by a rank"
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise StoreError("shard 3 broke")
    write_shard(store, shard, rows, scalars)

if how != "whole":
    RowStore.write_shard = failing
try:
    for file in files:
        reduce_run(load_config(file), team)
except StoreError as error:
    print("rank", team.rank, error, file=sys.stderr)
    sys.exit(2)
"""


def config_file(config):
    path = Path(config.run_dir, "reduce.yaml")
    path.write_text(config_to_yaml(config))
    return path


def reduce_by_two(zygote, config, folder):
    """Reduce as two ranks; return what they print."""
    places = enumerate(rank_environments(2))
    file = config_file(config)
    ranks = [zygote.start(folder / f"rank{rank}.log", "reduce", file, **env) for rank, env in places]
    ended = [rank.wait() for rank in ranks]
    assert [code for code, _ in ended] == [0, 0], ended
    return "".join(printed for _, printed in ended)


def centred(folder):
    """A run of everything that ranks add up: mean, Gram, leave-one-out errors, totals."""
    config = make_run(folder, methods=list(METHODS), ridge="loo", center=True)
    write_features(config, draw(NUM_ROWS, DIM), output="log_odds")
    return config


def semivalues(folder):
    config = make_run(folder, methods=["shapley", "banzhaf"], form="streamed", certificate_draws=16)
    write_features(config, draw(NUM_ROWS, DIM), output="log_odds")
    return config


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The script and runs that two processes have reduced: two equal ones, one of n < p, one of streamed semivalues."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "work.py"
    script.write_text(WORK)
    wide = make_run(folder / "wide", methods=["influence", "trak"], ridge="loo")
    write_features(wide, draw(20, 50), output="log_odds")
    runs = [centred(folder / "first"), centred(folder / "second"), wide, semivalues(folder / "semivalues")]
    ended = launch(script, "whole", *map(config_file, runs))
    assert ended.returncode == 0, ended.stderr
    return script, *runs


@pytest.mark.distributed
def test_two_processes_agree_with_one_to_rounding(work, tmp_path):
    _, first, _, wide, streamed = work
    for shared in (first, wide, streamed):
        alone = make_run(tmp_path / Path(shared.run_dir).parent.name, methods=list(shared.reduce.methods))
        alone = alone.model_copy(update={"reduce": shared.reduce})
        shutil.copytree(shared.layout.features, alone.layout.features)
        results = reduce_run(alone)
        for result in results:
            store, expected = representers(alone, result.method)
            other, found = representers(shared, result.method)
            assert oracles.relative_error(found, expected) < 1e-6
            for name in ("mean", "total"):
                np.testing.assert_allclose(other.read_vector(name), store.read_vector(name), rtol=1e-6, atol=1e-6)
            info, expected_info = dict(other.manifest.info), dict(store.manifest.info)
            curve = np.array(info.pop("loo_curve"))
            np.testing.assert_allclose(curve, np.array(expected_info.pop("loo_curve")), rtol=1e-9)
            if result.certificate is not None:
                for name in ("sum_rule_error", "certificate"):
                    value, expected_value = info.pop(name), expected_info.pop(name)
                    assert value == expected_value is None or value == pytest.approx(expected_value, rel=1e-4, abs=1e-6)
            assert info == expected_info
            assert other.manifest.fingerprint == store.manifest.fingerprint
            assert other.verify() == []


@pytest.mark.distributed
def test_two_processes_give_the_same_bytes_twice(work):
    _, first, second, _, _ = work
    for method in METHODS:
        assert contents(first.layout.representers(method)) == contents(second.layout.representers(method))


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_rank_that_ends_takes_the_others_along_and_the_rest_is_done_later(work, zygote, tmp_path, how):
    script, first, *_ = work
    config = centred(tmp_path)
    ended = launch(script, how, config_file(config), timeout=GRACE_SECONDS + 60)
    assert ended.returncode != 0
    if how == "error":
        assert ended.stderr.count("rank 1 shard 3 broke") == 1
        assert "rank 0" not in ended.stderr
    else:
        assert signal.SIGKILL.name in ended.stderr or "-9" in ended.stderr
    assert not Path(config.layout.path("representers") + ".lock").exists() or how == "kill"
    pending = RowStore.open(config.layout.representers("influence")).pending()
    assert {3, 5} <= set(pending), "the last shard waits for all others"
    assert 1 not in pending
    assert reduce_by_two(zygote, config, tmp_path).count(": trak, ridge") == 1
    for method in METHODS:
        assert contents(config.layout.representers(method)) == contents(first.layout.representers(method))


@pytest.mark.distributed
def test_semivalues_held_in_memory_are_the_first_ranks_and_keep_their_bytes(zygote, tmp_path):
    config = make_run(tmp_path, methods=["influence", "shapley"])
    write_features(config, draw(5, 4))  # one shard: the second rank has none
    reduce_run(config)
    alone = {method: contents(config.layout.representers(method)) for method in config.reduce.methods}
    shutil.rmtree(config.layout.path("representers"))
    assert reduce_by_two(zygote, config, tmp_path).count("sum-rule error") == 1
    assert alone == {method: contents(config.layout.representers(method)) for method in config.reduce.methods}


class _Part(Ranks):
    """A rank by itself, whose sums are its own part."""

    def total(self, part):
        return part()


@pytest.mark.parametrize("num_rows", [NUM_ROWS, 10])
def test_ranks_read_each_shard_once(tmp_path, num_rows):
    """10 rows are two shards, so one of three ranks has none."""
    config = make_run(tmp_path)
    phi = draw(num_rows, DIM)
    store = write_features(config, phi)
    settings = resolve(config.reduce, "influence", "loss", False, num_rows, DIM)
    readers = [FeatureReader(store, _Part(rank, 3)) for rank in range(3)]
    parts = [reader.features(settings).gram for reader in readers]
    rows = phi[:, 0].astype(np.float64)
    np.testing.assert_allclose(sum(parts), rows.T @ rows, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sum(reader.mean for reader in readers), phi.mean(axis=0), rtol=1e-5, atol=1e-6)
    read = [start for reader in readers for start, _ in reader.blocks(settings)]
    assert sorted(read) == list(range(0, num_rows, 8))
    assert readers[0].alone().ranks.world_size == 1
