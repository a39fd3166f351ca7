"""Runs on an object store: a real S3 server (moto's, a process of its own), real processes, equal bytes and answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import s3fs
from test_build import changed, contents
from test_faults import Place
from tiny import tiny_rows, tiny_run

from llmattrib.build import build_features
from llmattrib.errors import StoreAccessError, StoreLockedError
from llmattrib.index import build_index
from llmattrib.lock import locked
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.values.stage import compute_values
from llmattrib.verify import verify_run

NUM_ROWS, GROWN = 18, 23  # rows; in shards of 4 the last one is not full, before and after
NUM_SHARDS = 5
METHOD = "influence"


class Server:
    """moto's S3 on a free port of this machine, with one bucket."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self):
        deadline = time.monotonic() + 60
        while True:
            try:
                return urllib.request.urlopen(f"{self.url}/moto-api/").close()
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                assert self._process.poll() is None
                time.sleep(0.05)

    def refuse_after(self, count):
        """Answer so many more requests, then refuse these credentials, as when a token expires."""
        body, plain = str(count).encode(), {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", body, plain)).close()

    def close(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server():
    running = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        try:
            running.wait()
            yield running
        finally:
            running.close()


@pytest.fixture(scope="module")
def files(server):
    return s3fs.S3FileSystem(use_listings_cache=False)


@pytest.fixture
def url(server, files, tmp_path):
    """The run directory of a test, in a bucket of its own."""
    bucket = tmp_path.name.replace("_", "-")[:40].rstrip("-").lower()
    files.mkdir(bucket)
    yield f"s3://{bucket}/some/run"
    server.refuse_after("inf")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("base"), num_rows=NUM_ROWS, reduce={"methods": [METHOD]})


@pytest.fixture(scope="module")
def whole(base):
    """The features of a local build."""
    build_features(base)
    return contents(base.layout.features)


class Remote(Place):
    """A run directory on the server, and the command line on it."""

    def __init__(self, server, *place):
        super().__init__(*place)
        self.server = server

    def start(self, *command, **env):
        return super().start(*command, **self.server.environment | env)


@pytest.fixture
def place(server, zygote, base, tmp_path, url):
    return Remote(server, zygote, base, tmp_path, url)


def keys(files, url):
    """Return what `contents` returns of a folder."""
    root = url.removeprefix("s3://") + "/"
    return {name.removeprefix(root): files.cat_file(name) for name in files.find(root)}


def times(files, config):
    """Return when shards were committed, to the second."""
    found = files.find(config.layout.path("features.zarr/commits"), detail=True)
    return {name.rpartition("/")[2]: item["LastModified"] for name, item in found.items() if item["type"] == "file"}


def finish(config):
    """All stages after build, and what they are asked; the file of the config alone names its place."""
    reduce_run(config)
    build_index(config, METHOD)
    return Run.open(config.run_dir).query("what is the colour of a tree", completion="red", method=METHOD, top=5)


def without_place(found):
    return {name: data for name, data in found.items() if name != "config.yaml"}


# ------------------------------------------------------------------------------------------------ the whole chain


@pytest.mark.slow
def test_bytes_and_answers_are_those_of_a_local_run_and_data_may_grow(tmp_path, files, url):
    local = tiny_run(tmp_path, num_rows=NUM_ROWS, reduce={"methods": [METHOD]}, values={"method": METHOD})
    remote = changed(local, url)
    for num_rows in (NUM_ROWS, GROWN):
        Path(local.data.train).write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(num_rows)))
        first, second = build_features(local), build_features(remote)
        assert first.num_shards_done == second.num_shards_done
        assert second.num_appended == (GROWN - NUM_ROWS if num_rows == GROWN else 0)
        assert finish(remote) == finish(local)
        found = keys(files, url)
        assert {"config.yaml", "examples.parquet", "index/influence.faiss"} < set(found)
        assert without_place(found) == without_place(contents(local.run_dir))
    assert verify_run(remote, [url]) == []
    with_values = {"values": {"data": local.data.train}}
    here, there = (compute_values(changed(config, **with_values)) for config in (local, remote))
    assert [item.value for item in there.values] == [item.value for item in here.values]
    assert without_place(keys(files, url)) == without_place(contents(local.run_dir))


# ------------------------------------------------------------------------------------------------ broken off


@pytest.mark.slow
@pytest.mark.distributed
def test_after_a_kill_two_ranks_finish_with_the_same_bytes(place, files, whole):
    child = place.start("build")
    while len(times(files, place.config)) < 2:
        assert child.poll() is None, child.wait()
    child.send(signal.SIGKILL)
    child.wait()
    assert len(times(files, place.config)) < NUM_SHARDS
    assert files.exists(place.features + ".lock")
    (finding, *_) = place.verify()["findings"]
    assert finding["place"] == "features.zarr.lock"
    assert f"was left by process {child.pid}" in finding["what"]
    for rank in place.start_two():
        code, printed = rank.wait()
        assert code == 0, printed
    assert keys(files, place.features) == whole
    assert not files.exists(place.features + ".lock")


@pytest.mark.slow
def test_credentials_that_expire_in_the_middle_lose_nothing(place, files, server, whole):
    server.refuse_after(68)
    code, printed = place.run("build")
    assert code == 2, printed
    assert re.search(r"error: s3://\S+ could not be read or written \(", " ".join(printed.split()))
    server.refuse_after("inf")
    before = times(files, place.config)
    assert 0 < len(before) < NUM_SHARDS
    code, printed = place.run("build")
    assert code == 0, printed
    assert f"{NUM_SHARDS - len(before)} of {NUM_SHARDS} shards computed now" in " ".join(printed.split())
    assert before.items() <= times(files, place.config).items()
    assert keys(files, place.features) == whole


@pytest.mark.slow
def test_a_repair_removes_the_record_of_a_broken_shard_and_none_that_it_cannot_read(place, files, server, whole):
    build_features(place.config)
    chunk = f"{place.features}/rows/c.2.0.0"
    data = bytearray(files.cat_file(chunk))
    data[len(data) // 3] ^= 0x10
    files.pipe_file(chunk, bytes(data))
    before = times(files, place.config)
    for count in (25, 55):
        server.refuse_after(count)
        code, printed = place.run("verify", "--repair")
        server.refuse_after("inf")
        assert code == 2, printed
        assert times(files, place.config) == before
    report = place.verify("--repair")
    (finding,) = [item for item in report["findings"] if item["place"] == "features.zarr"]
    assert "cannot be decoded" in finding["what"]
    assert finding["shards"] == [2, 2]
    assert RowStore.open(place.features).pending() == [2]
    build_features(place.config)
    assert keys(files, place.features) == whole


# ------------------------------------------------------------------------------------------------ locks


def test_of_many_that_find_a_dead_holder_one_takes_its_lock(files, url):
    store = f"{url}/features.zarr"
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "", "slurm_job": "", "slurm_restart": 0}
    files.pipe_file(store + ".lock", json.dumps(dead).encode())
    held = [locked(store) for _ in range(4)]
    ends, ready = [], threading.Barrier(len(held))

    def take(lock):
        ready.wait()
        try:
            lock.__enter__()
        except StoreLockedError:
            ends.append("refused")
        else:
            ends.append("taken")

    threads = [threading.Thread(target=take, args=(lock,)) for lock in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["refused"] * 3 + ["taken"]
    assert json.loads(files.cat_file(store + ".lock"))["pid"] == os.getpid()
    assert [name.rpartition("/")[2] for name in files.find(url)] == ["features.zarr.lock"]


# ------------------------------------------------------------------------------------------------ messages


NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
NO_SERVER = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "environment", "why"),
    [
        (("build",), {}, r"The AWS Access Key Id you provided does not exist in our records\."),
        (("verify",), {}, "Forbidden"),
        (("build",), NO_KEYS, "Unable to locate credentials"),
        (("status",), NO_KEYS, "Unable to locate credentials"),
        (("query", "--prompt", "x", "--completion", "y"), NO_SERVER, "Could not connect to the endpoint URL: .*"),
    ],
)
def test_a_store_that_cannot_be_reached_is_an_error_that_says_why(place, server, command, environment, why):
    if not environment:
        server.refuse_after(0)
    code, printed = place.start(*command, **environment).wait()
    assert code == 2, printed
    words = " ".join(printed.split())
    assert re.search(rf"error: {place.config.run_dir}/\S+ could not be read or written \({why}\)", words), printed
    assert "to fix: check the URL, that its bucket exists, the network and the credentials in the environment" in words


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        (
            "s3://no-such-bucket/run",
            r"could not be read or written \(.*bucket does not exist\)[\s\S]*its bucket exists",
        ),
        ("gs://bucket/run", r"cannot be reached: .*gcsfs[\s\S]*install the package that fsspec names"),
    ],
)
def test_a_bucket_or_package_that_is_missing_is_named(server, base, run_dir, message):
    with pytest.raises(StoreAccessError, match=message):
        build_features(changed(base, run_dir))
