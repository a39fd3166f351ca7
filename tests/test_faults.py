"""Real builds that are killed, stopped, doubled or out of disk: nothing committed is lost, all bytes come out equal.

`LLMATTRIB_TORTURE_ROUNDS` sets the number of kill rounds (20; `make torture` takes 200).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from records import recorded
from test_build import changed, contents
from test_distributed import ROOT, rank_environments
from test_resume import config_file
from tiny import tiny_run

from llmattrib.index import build_index
from llmattrib.plan.cost import features_manifest
from llmattrib.reduce import reduce_run
from llmattrib.signals import EXIT_CODE as STOPPED
from llmattrib.store import RowStore
from llmattrib.verify import verify_run

ROUNDS = int(os.environ.get("LLMATTRIB_TORTURE_ROUNDS", "20"))
NUM_ROWS, SHARD_SIZE = 40, 2
NUM_SHARDS = NUM_ROWS // SHARD_SIZE
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The config that every test builds, each in a directory of its own."""
    config = tiny_run(tmp_path_factory.mktemp("base"), num_rows=NUM_ROWS, reduce={"methods": ["shapley", "trak"]})
    return changed(config, features={"shard_size": SHARD_SIZE, "tokens_per_batch": 64})


class Place:
    """A run directory, and the command line on it."""

    def __init__(self, zygote, base, folder, run_dir=None):
        self.zygote, self.folder = zygote, folder
        self.config = changed(base, run_dir=run_dir or folder / "run")
        self.file = config_file(self.config, folder)
        self.features = self.config.layout.features
        self.num_started = 0

    def start(self, *command, **env):
        self.num_started += 1
        return self.zygote.start(self.folder / f"{self.num_started}.log", command[0], self.file, *command[1:], **env)

    def start_two(self):
        """Start a build of two ranks."""
        return [self.start("build", **env) for env in rank_environments(2)]

    def run(self, *command):
        return self.start(*command).wait()

    def wait_for_commits(self, count, child):
        records = Path(self.features, "commits")
        while len(list(records.glob("[0-9]*"))) < count:
            assert child.poll() is None, child.wait()
            time.sleep(0.001)

    def chunks(self):
        """What is committed: shard -> when its rows were written, and its bytes."""
        files = {shard: Path(self.features, f"rows/c.{shard}.0.0") for shard in recorded(self.features)}
        return {shard: (file.stat().st_mtime_ns, file.read_bytes()) for shard, file in files.items()}

    def finish(self, whole):
        """Build to the end and compare with an unbroken build: nothing committed was computed again."""
        before = self.chunks()
        code, printed = self.run("build")
        assert code == 0, printed
        after = self.chunks()
        assert {shard: after[shard] for shard in before} == before
        assert contents(self.features) == whole

    def verify(self, *options):
        code, printed = self.run("verify", "--json", *options)
        assert code in (0, 1), printed
        return json.loads(printed)


@pytest.fixture
def place(zygote, base, tmp_path):
    return Place(zygote, base, tmp_path)


@pytest.fixture(scope="module")
def unbroken(zygote, base, tmp_path_factory):
    """The seconds of an unbroken build, and its run directory."""
    place = Place(zygote, base, tmp_path_factory.mktemp("unbroken"))
    place.run("build")
    shutil.rmtree(place.config.run_dir)
    began = time.monotonic()
    code, printed = place.run("build")
    assert code == 0, printed
    return time.monotonic() - began, place


@pytest.fixture(scope="module")
def whole(unbroken):
    """The bytes of an unbroken build."""
    return contents(unbroken[1].features)


def leftovers(config):
    return [path for path in Path(config.run_dir).rglob("*") if path.name.endswith((".partial", ".lock"))]


def stop_as_a_launcher(children):
    """A launcher that loses a rank asks the others to leave, and kills those that do not."""
    deadline = time.monotonic() + 5
    for child in children:
        child.send(signal.SIGTERM)
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline:
            for child in children:
                child.send(signal.SIGKILL)
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------ killed


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_a_random_time_the_store_ends_equal(place, unbroken, whole, number):
    """Every fourth round has two ranks, of which one is hit."""
    draw = random.Random(f"faults {number}")
    seconds = unbroken[0]
    for _ in range(draw.choice((1, 1, 2))):
        before = leftovers(place.config)
        children = place.start_two() if number % 4 == 3 else [place.start("build")]
        time.sleep(draw.uniform(0.05, 1.0) * seconds)
        victim, number_of_signal = draw.choice(children), draw.choice(SIGNALS)
        victim.send(number_of_signal)
        if len(children) == 2:
            if number_of_signal == signal.SIGKILL:
                stop_as_a_launcher(children)
            else:
                limit = time.monotonic() + 20
                while all(child.poll() is None for child in children) and time.monotonic() < limit:
                    time.sleep(0.002)
                stop_as_a_launcher(children)
            continue
        code, printed = victim.wait()
        if number_of_signal == signal.SIGKILL:
            assert code in (0, -signal.SIGKILL), printed
        else:  # before the lock is taken there is nothing to give back
            assert code in (0, STOPPED, 128 + number_of_signal, -number_of_signal), printed
        if code == STOPPED:
            assert set(leftovers(place.config)) <= set(before)
    found = verify_run(place.config, [str(place.file)], repair=True)
    assert [item for item in found if item.removable and not item.is_leftover] == []  # all that is committed is sound
    assert not leftovers(place.config)
    place.finish(whole)
    assert verify_run(place.config, [str(place.file)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_the_shard_is_finished_and_the_command_goes_on(place, whole, number):
    child = place.start("build")
    place.wait_for_commits(3, child)
    before = len(place.chunks())
    child.send(number)
    code, printed = child.wait()
    assert code == STOPPED == 75
    done = len(place.chunks())
    assert before <= done < NUM_SHARDS
    words = " ".join(printed.split())
    assert f"has stopped after shard {done - 1}: {done} of {NUM_SHARDS} shards are finished" in words
    assert "run the same command again: it goes on from there" in words
    assert not leftovers(place.config)
    place.finish(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("asked", [0, 1])
def test_one_of_two_ranks_asked_to_stop_both_do(place, whole, asked):
    children = place.start_two()
    place.wait_for_commits(3, children[0])
    children[asked].send(signal.SIGTERM)
    code, printed = children[0].wait()
    assert code == STOPPED, printed
    children[1].send(signal.SIGTERM)  # as the launcher does; it would leave by itself a little later
    assert "stopped" not in children[1].wait()[1]
    assert "has stopped after shard" in " ".join(printed.split())
    assert 3 <= len(place.chunks()) < NUM_SHARDS
    assert not leftovers(place.config)
    place.finish(whole)


@pytest.mark.slow
def test_the_command_itself_is_stopped_and_goes_on(place, whole):
    """Without the zygote: `python -m llmattrib.cli build`."""
    command = [sys.executable, "-m", "llmattrib.cli", "build", str(place.file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(place.chunks()) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert "stopped: " in errors
    assert "Traceback" not in errors
    place.finish(whole)


# ------------------------------------------------------------------------------------------------ two builds


@pytest.mark.slow
def test_two_builds_on_one_store_do_not_harm_it(place, whole):
    children = [place.start("build"), place.start("build")]
    ends = [child.wait() for child in children]
    codes = sorted(code for code, _ in ends)
    assert codes in ([0, 2], [0, 0])  # both succeed when one began after the other's end
    for child, (code, printed) in zip(children, ends, strict=True):
        if code:
            other = next(item.pid for item in children if item is not child)
            words = " ".join(printed.split())
            assert f"is being written by process {other} on" in words
            assert "wait for it to end" in words
    assert contents(place.features) == whole
    assert not leftovers(place.config)


@pytest.mark.slow
def test_a_second_build_beside_a_live_one_is_refused_and_so_is_a_repair(place, whole):
    first = place.start("build")
    place.wait_for_commits(2, first)
    first.send(signal.SIGSTOP)
    try:
        for command in (("build",), ("verify", "--repair")):
            code, printed = place.run(*command)
            assert code == 2
            assert f"is being written by process {first.pid} on" in " ".join(printed.split())
        found = place.verify()
        assert not found["is_sound"]
        assert found["findings"][0]["place"] == "features.zarr.lock"
        assert found["findings"][0]["rerun"].startswith("wait for it to end")
    finally:
        first.send(signal.SIGCONT)
    assert first.wait()[0] == 0
    assert contents(place.features) == whole


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def finished(unbroken, zygote, base, tmp_path):
    """A copy of the unbroken run."""
    shutil.copytree(unbroken[1].config.run_dir, tmp_path / "run")
    return Place(zygote, base, tmp_path)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x10
    file.write_bytes(bytes(data))


def rename(record):
    record.rename(record.with_name(record.name[:-4] + "0000"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (cut, "rows/c.3.0.0", "cannot be decoded"),
        (flip, "rows/c.3.0.0", "cannot be decoded"),
        (flip, "columns/c.3.0", "cannot be decoded"),
        (Path.unlink, "rows/c.3.0.0", "has no data on disk"),
        (Path.unlink, "commits/000003-*", "is not committed"),
        (rename, "commits/000003-*", "commit record"),
    ],
)
def test_one_broken_shard_is_named_and_alone_computed_again(finished, whole, damage, file, what):
    others = {shard: chunk for shard, chunk in finished.chunks().items() if shard != 3}
    (path,) = Path(finished.features).glob(file)
    damage(path)
    report = finished.verify("--repair")
    (finding,) = report["findings"]
    assert what in finding["what"]
    assert (finding["place"], finding["shards"], finding["rows"]) == ("features.zarr", [3, 3], [6, 8])
    assert finding["rerun"] == f"llmattrib build {finished.file}"
    assert not report["is_sound"]
    assert RowStore.open(finished.features).pending() == [3]
    assert finished.chunks() == others
    finished.finish(whole)
    assert finished.verify() == {"is_sound": True, "is_repaired": False, "findings": []}


# ------------------------------------------------------------------------------------------------ disks


def mount(folder, *options):
    """Mount a small file system in memory; only root may."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.decode().strip()}")


def fill(file):
    while True:
        file.write(bytes(4096))


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    mount(folder, "size=2m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_commits_nothing_broken(zygote, base, tmp_path, disk, whole):
    place = Place(zygote, base, tmp_path, disk / "run")
    child = place.start("build")
    place.wait_for_commits(3, child)
    child.send(signal.SIGSTOP)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        fill(file)
    child.send(signal.SIGCONT)
    code, printed = child.wait()
    words = " ".join(printed.split())
    assert code == 2, printed
    assert "could not be written (No space left on device)" in words
    assert "free space or raise the quota, then run the stage again: finished shards are kept" in words
    before = place.chunks()
    code, printed = place.run("build")  # still full
    assert code == 2
    assert "No space left" in printed or "GB are free" in printed
    assert place.chunks() == before
    assert len(before) >= 3
    ballast.unlink()
    assert [item.what for item in verify_run(place.config, ["x"], repair=True) if not item.is_leftover] == [
        "is not committed"
    ]
    assert not leftovers(place.config)
    place.finish(whole)


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_the_first_row(zygote, base, tmp_path, disk):
    subprocess.run(["mount", "-o", "remount,size=32k", disk], check=True)
    place = Place(zygote, changed(base, features={"dtype": "float32"}), tmp_path, disk / "run")
    assert features_manifest(place.config, NUM_ROWS, place.config.features.sketch.dim).num_bytes > 1 << 15
    code, printed = place.run("build")
    assert code == 2
    assert re.search(r"needs [\d.]+ GB more and [\d.]+ GB are free", " ".join(printed.split()))
    assert not place.chunks()


@pytest.mark.slow
def test_a_disk_that_became_read_only(zygote, base, tmp_path, disk, whole):
    place = Place(zygote, base, tmp_path, disk / "run")
    child = place.start("build")
    place.wait_for_commits(3, child)
    child.send(signal.SIGTERM)
    assert child.wait()[0] == STOPPED
    before = contents(place.config.run_dir)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        for command in (("build",), ("verify", "--repair")):
            code, printed = place.run(*command)
            words = " ".join(printed.split())
            assert code == 2, printed
            assert "could not be read or written (Read-only file system)" in words
            assert "check the path, its permissions and that its disk is mounted for writing" in words
        assert [item["what"] for item in place.verify()["findings"]] == ["is not committed"]
        assert contents(place.config.run_dir) == before
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    place.finish(whole)


@pytest.mark.slow
def test_what_follows_a_broken_shard_stays_and_is_right_again(finished, whole):
    config = finished.config
    reduce_run(config)
    for method in config.reduce.methods:
        build_index(config, method)
    before = contents(config.layout.path("representers")) | contents(config.layout.path("index"))
    flip(Path(finished.features, "rows/c.7.0.0"))
    assert [item["place"] for item in finished.verify("--repair")["findings"]] == ["features.zarr"]
    finished.finish(whole)
    assert finished.verify()["is_sound"]
    assert contents(config.layout.path("representers")) | contents(config.layout.path("index")) == before
