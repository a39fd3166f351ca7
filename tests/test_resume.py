"""Real processes: a build killed in the middle and run again, and two ranks, give the bytes of one unbroken run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_build import changed, contents
from test_distributed import ROOT, launch, launch_command, launch_env
from tiny import tiny_run

from llmattrib.build import build_features
from llmattrib.config import config_to_yaml
from llmattrib.errors import StoreLockedError
from llmattrib.store import RowStore

NUM_ROWS, SHARD_SIZE = 60, 2


def settings(folder):
    config = tiny_run(folder, num_rows=NUM_ROWS)
    return changed(config, features={"shard_size": SHARD_SIZE, "tokens_per_batch": 64})


@pytest.fixture
def run(tmp_path):
    return settings(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a build by one process without interruption, in another place."""
    config = settings(tmp_path_factory.mktemp("whole"))
    build_features(config)
    return contents(config.layout.features)


def config_file(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    return path


def start(config, tmp_path):
    """Start launch/build.py in a process of its own, without a launcher."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch/build.py"), str(config_file(config, tmp_path))]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_commits(config, count, process, seconds=120):
    """Wait until `count` shards are committed."""
    records = Path(config.layout.features, "commits")
    deadline = time.monotonic() + seconds
    while len(list(records.glob("[0-9]*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_and_run_again_gives_the_bytes_of_an_unbroken_run(run, whole, tmp_path):
    num_shards = NUM_ROWS // SHARD_SIZE
    process = start(run, tmp_path)
    wait_for_commits(run, 5, process)
    with pytest.raises(StoreLockedError, match=f"is being written by process {process.pid} on "):
        build_features(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    store = RowStore.open(run.layout.features)
    pending = store.pending()
    assert 0 < len(pending) <= num_shards - 5
    committed = set(range(num_shards)) - set(pending)
    before = {shard: Path(store.path, f"rows/c.{shard}.0.0").stat().st_mtime_ns for shard in committed}
    again = build_features(run)
    assert again.num_shards_done == len(pending)
    assert {shard: Path(store.path, f"rows/c.{shard}.0.0").stat().st_mtime_ns for shard in committed} == before
    assert contents(run.layout.features) == whole
    assert not Path(run.layout.features + ".lock").exists()


@pytest.mark.distributed
def test_two_machines_write_the_bytes_of_one(run, whole, tmp_path):
    """A launcher each, as launch/multi_node.yaml says; here both have the same address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    commands = [
        launch_command(
            ROOT / "launch/build.py",
            config_file(run, tmp_path),
            "seed=0",
            config="multi_node.yaml",
            options=["--machine_rank", str(machine), "--main_process_port", port],
        )
        for machine in (0, 1)
    ]
    places = {"env": launch_env(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen(command, **places) for command in commands]
    printed = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert contents(run.layout.features) == whole
    told = [re.findall(r"(\d+) shards computed now", out) for out, _ in printed]
    assert told == [[str(NUM_ROWS // SHARD_SIZE)], []]  # printed once
    assert not Path(run.layout.features + ".lock").exists()


@pytest.mark.distributed
def test_an_error_under_the_launcher_is_printed_once(run, tmp_path):
    build_features(run)
    before = contents(run.run_dir)
    ended = launch("launch/build.py", config_file(run, tmp_path), "seed=1")
    assert ended.returncode != 0
    assert " ".join(ended.stderr.split()).count("was made with other settings") == 1
    assert "seed: stored 0, now 1" in " ".join(ended.stderr.split())
    assert contents(run.run_dir) == before
