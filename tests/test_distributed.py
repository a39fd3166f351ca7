"""Ranks: trivial alone; under a launcher they agree on values, sums, failures and exit codes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmattrib.distributed import EXIT_CODE, Ranks, ranks
from llmattrib.errors import LlmattribError

ROOT = Path(__file__).parents[1]


def launch_command(script, *arguments, num_processes=2, config="cpu.yaml", options=()):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / config)]
    return [*command, "--num_processes", str(num_processes), *options, str(script), *map(str, arguments)]


def launch_env():
    """The environment, one thread a process, without what an outer launcher has set."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    env["DS_ACCELERATOR"] = "cpu"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


def rank_environments(num_processes):
    """What a launcher puts into the environment of each rank, for ranks that a test starts by itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def launch(script, *arguments, timeout=300, **settings):
    """Run a script by the real launcher."""
    command = launch_command(script, *arguments, **settings)
    return subprocess.run(command, env=launch_env(), capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = ranks()
    assert alone == Ranks(0, 1, "cpu")
    assert alone.is_main
    assert alone.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert alone.on_main(lambda: "done") == "done"
    assert alone.together(lambda: 3) == 3
    array = np.ones((2, 2))
    assert alone.sum(array) is array
    assert alone.total(lambda: array) is array
    with pytest.raises(ZeroDivisionError):
        alone.on_main(lambda: 1 / 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_a_partition(world_size):
    items = list(range(5))
    shares = [Ranks(rank, world_size).share(items) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_half_set_launcher_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    script = "from llmattrib.distributed import ranks; ranks()"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert f"{LlmattribError.__name__}: WORLD_SIZE is 2 but the processes cannot be joined" in ended.stderr
    assert "launch/cpu.yaml" in ended.stderr


TALK = """
import json, sys
import numpy as np
from pathlib import Path
from llmattrib.distributed import ranks
team = ranks()
shapes = [(), (3,), (2, 3, 4), (0,)]
sums = [team.sum(np.full(shape, team.rank + 0.5)).tolist() for shape in shapes]
own = np.arange(2, dtype=np.float32)
team.sum(own)
long = np.random.default_rng(team.rank).standard_normal((3, 100_001))
found = {
    "place": [team.rank, team.world_size, team.is_main],
    "gather": team.gather({"rank": team.rank, "text": "é" * (1 + 5000 * team.rank), "none": None}),
    "main": team.on_main(lambda: [team.rank, 1.1]),
    "together": team.together(lambda: team.rank),
    "share": list(team.share(range(5))),
    "sums": sums,
    "own": own.tolist(),
    "long": team.total(lambda: long)[:, ::50_000].tolist(),
    "nested": team.together(lambda: team.on_main(lambda: team.rank + 7)),
}
Path(sys.argv[1], f"{team.rank}.json").write_text(json.dumps(found))
if sys.argv[2] == "rank 1 fails":
    team.together(lambda: 1 // 0 if team.rank else team.total(lambda: own))
"""


@pytest.mark.distributed
def test_two_processes_agree_and_fail_together(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(TALK)
    ended = launch(script, tmp_path, "rank 1 fails")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, one in enumerate(found):
        assert one["place"] == [rank, 2, rank == 0]
        assert one["gather"] == [{"rank": k, "text": "é" * (1 + 5000 * k), "none": None} for k in (0, 1)]
        assert one["main"] == [0, 1.1]
        assert one["together"] == rank
        assert one["share"] == list(range(rank, 5, 2))
        assert one["sums"] == [np.full(shape, 2.0).tolist() for shape in [(), (3,), (2, 3, 4), (0,)]]
        assert one["own"] == [0, 1]
        long = [np.random.default_rng(rank).standard_normal((3, 100_001)) for rank in (0, 1)]
        assert one["long"] == (long[0] + long[1])[:, ::50_000].tolist()
        assert one["nested"] == 7
    assert ended.returncode != 0
    assert ended.stderr.count("ZeroDivisionError") == 1
    assert EXIT_CODE == 2


ALONE = """
import atexit, sys
from llmattrib.distributed import _AGREED, Ranks
atexit.register(print, "farewell")
error = ValueError("no room")
if sys.argv[2] == "agreed":
    setattr(error, _AGREED, True)
with Ranks(1, 2, sys.argv[1]).lockstep():
    raise error
"""


@pytest.mark.parametrize(
    ("device", "kind", "farewell"), [("cuda:1", "alone", False), ("cuda:1", "agreed", True), ("cpu", "alone", True)]
)
def test_a_rank_that_fails_alone_on_a_gpu_does_not_wait_for_the_others(device, kind, farewell):
    """NCCL's end is a collective call: the launcher would not see that the rank has failed."""
    command = [sys.executable, "-c", ALONE, device, kind]
    ended = subprocess.run(command, env=launch_env(), capture_output=True, text=True, check=False)
    assert "ValueError: no room" in ended.stderr
    assert ended.returncode == (1 if farewell else EXIT_CODE)
    assert ("farewell" in ended.stdout) == farewell
