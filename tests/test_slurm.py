"""Slurm: scripts that call what exists, the commands of a chain, its record and progress, and a real cluster."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slurm_cluster import Cluster, missing, until
from test_build import contents
from test_resume import config_file
from tiny import tiny_adapter_dir, tiny_run
from typer.main import get_command
from typer.testing import CliRunner

from llmattrib import slurm
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.config import RunConfig, load_config
from llmattrib.errors import ConfigError, SlurmError
from llmattrib.index import build_index, open_index
from llmattrib.reduce import reduce_run
from llmattrib.store import RowStore
from llmattrib.train import train_adapter

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SLOW_DISK = Path(__file__).parent / "slow_disk"
NUM_ROWS, SHARD_SIZE = 60, 2
COMMANDS = ("sbatch", "squeue", "scancel")


def llmattrib(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run_of(folder: Path, **sections: Any) -> RunConfig:
    features = {"sketch": {"dim": 256, "calibration_examples": 4}, "tokens_per_batch": 64, "shard_size": SHARD_SIZE}
    return tiny_run(folder, num_rows=NUM_ROWS, features=features, **sections)


def test_every_stage_that_a_cluster_runs_has_a_script() -> None:
    assert {script.stem for script in SCRIPTS} == set(slurm.STAGES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_valid_shell_and_calls_what_exists(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "set -eo pipefail" in text
    commands = get_command(app).commands  # type: ignore[attr-defined]
    called = re.findall(r"^srun .*\bllmattrib (\w+)", text, re.MULTILINE)
    launched = re.findall(r"launch/\w+\.(?:py|yaml)", text)
    assert called or launched
    assert all(command in commands for command in called)
    assert all((ROOT / path).is_file() for path in launched)


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put commands of Slurm that are shell scripts of the test alone on PATH."""
    for name in COMMANDS:
        (folder / name).unlink(missing_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def path(tmp_path: Path) -> str:
    section = {"partition": "gpu", "time": "4:00:00", "sbatch": ["--mem=8G"], "setup": ["module load cuda", "true"]}
    return str(config_file(run_of(tmp_path, slurm=section), tmp_path))


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def test_dry_run_prints_commands_that_shell_understands(path: str, tmp_path: Path) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "8", "--partition", "big one", "--dry-run")
    result = llmattrib("submit", path, "seed=3", *options)
    assert result.exit_code == 0, result.output
    text = result.stdout.replace("$(", "").replace(")\n", "\n")
    assignments = [re.match(r"(\w+)=(.*)", part, re.DOTALL) for part in re.split(r"\n(?=\w+=LLM)", text.strip())]
    words = {match[1]: shlex.split(match[2]) for match in assignments if match}
    assert list(words) == ["train", "build", "reduce", "index"]
    for before, (stage, line) in zip((None, *words), words.items(), strict=False):
        assert line[0] == f"LLMATTRIB_ROOT={ROOT}"
        assert line[1] == "LLMATTRIB_SETUP=module load cuda\ntrue"
        assert line[2] == "sbatch"
        assert {"--partition=big one", "--time=4:00:00", "--mem=8G", "--kill-on-invalid-dep=yes"} <= set(line)
        assert (f"--dependency=afterok:${before}" in line) == (before is not None)
        assert line[-3:] == [str(ROOT / "slurm" / f"{stage}.sbatch"), path, "seed=3"]
        assert f"--output={tmp_path}/run/slurm/{stage}-%j.log" in line
        assert f"--nodes={2 if stage == 'build' else 1}" in line
    assert [next((word for word in line if "gpus" in word), "") for line in words.values()] == [
        "--gpus-per-node=1",
        "--gpus-per-node=8",
        "",
        "",
    ]
    assert not (tmp_path / "run").exists()


def test_train_is_for_runs_without_an_adapter_and_cpu_nodes_have_one_process_each(tmp_path: Path) -> None:
    config = run_of(tmp_path, slurm={"gpus_per_node": 0, "cpus_per_task": 4})
    jobs = slurm.plan_jobs(config, "c.yaml")
    assert [job.stage for job in jobs] == ["train", "build", "reduce", "index"]
    assert not any("gpus" in word for job in jobs for word in job.command)
    assert all("--cpus-per-task=4" in job.command for job in jobs)
    assert jobs[1].environment["LAUNCH"].endswith("launch/cpu.yaml")
    assert jobs[1].environment["PROCESSES_PER_NODE"] == "1"
    own = run_of(tmp_path, model={"name": config.model.name, "adapters": ["mine"]})
    assert [job.stage for job in slurm.plan_jobs(own, "c.yaml")] == ["build", "reduce", "index"]


def test_an_array_is_of_build_alone_and_each_task_has_its_log(path: str, tmp_path: Path) -> None:
    result = llmattrib("submit", path, "--array", "4", "--nodes", "2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("--array=1-4") == 1
    config = run_of(tmp_path, slurm={"nodes": 2, "array": 4})
    jobs = {job.stage: job for job in slurm.plan_jobs(config, "c.yaml")}
    assert {"--array=1-4", "--nodes=2"} <= set(jobs["build"].command)
    assert jobs["build"].log == f"{tmp_path}/run/slurm/build-%A_%a.log"
    assert not any("--array" in word for stage, job in jobs.items() if stage != "build" for word in job.command)
    assert "--array" not in llmattrib("submit", path, "slurm.array=1", "--dry-run").stdout


def test_launch_and_reduce_nodes_of_the_config_reach_their_jobs(tmp_path: Path) -> None:
    config = run_of(tmp_path, slurm={"gpus_per_node": 8, "launch": "fsdp2", "reduce_nodes": 3})
    jobs = {job.stage: job for job in slurm.plan_jobs(config, "c.yaml")}
    assert jobs["build"].environment["LAUNCH"] == str(ROOT / "launch" / "fsdp2.yaml")
    assert [stage for stage, job in jobs.items() if "LAUNCH" in job.environment] == ["build"]
    assert [stage for stage, job in jobs.items() if "--nodes=3" in job.command] == ["reduce"]
    plain = slurm.plan_jobs(run_of(tmp_path), "c.yaml")
    assert not any("LAUNCH" in job.environment for job in plain)  # so that one of the user's own is kept


def test_a_time_that_yaml_reads_as_a_number_is_refused(path: str) -> None:
    result = llmattrib("submit", path, "slurm.time=4:00:00", "--dry-run")
    assert result.exit_code == 2
    assert "slurm.time: is no text: write one, in quotes (found 14400)" in " ".join(result.stderr.split())


def test_logs_need_a_local_run_dir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_dir is memory://x"):
        slurm.plan_jobs(run_of(tmp_path).model_copy(update={"run_dir": "memory://x"}), "c.yaml")


def test_without_slurm_the_error_says_so(path: str, bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(bin_folder, monkeypatch)
    result = llmattrib("submit", path)
    assert result.exit_code == 2
    assert "there is no sbatch on this machine" in " ".join(result.stderr.split())


def test_a_chain_is_submitted_whole_or_not_at_all(
    path: str, tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = f'echo "$@" >> {bin_folder}/log; n=0; while read -r _; do n=$((n+1)); done < {bin_folder}/log; '
    refuse = 'if ((n == 3)); then echo "sbatch: error: invalid partition" >&2; exit 1; fi; '
    fake(
        bin_folder, monkeypatch, sbatch=sbatch + refuse + "echo $((100 + n))", scancel=f'echo "$@" > {bin_folder}/gone'
    )
    result = llmattrib("submit", path)
    assert result.exit_code == 2
    assert "sbatch says: sbatch: error: invalid partition" in " ".join(result.stderr.split())
    assert (bin_folder / "gone").read_text() == "101 102\n"
    (bin_folder / "log").unlink()
    fake(bin_folder, monkeypatch, sbatch=sbatch + "echo $((100 + n))';cluster'", squeue="echo '101|N/A|CANCELLED|None'")
    result = llmattrib("submit", path)
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "run/slurm/jobs.json").read_text())["jobs"]
    assert [(job["stage"], job["id"]) for job in recorded] == list(
        zip(slurm.STAGES, ("101", "102", "103", "104"), strict=True)
    )
    assert recorded[1]["log"] == f"{tmp_path}/run/slurm/build-102.log"
    lines = (bin_folder / "log").read_text().splitlines()
    assert [re.findall(r"afterok:(\d+)", line) for line in lines] == [[], ["101"], ["102"], ["103"]]
    ended = "; ".join(f"echo '{number}|N/A|COMPLETED|None'" for number in range(101, 109))
    fake(bin_folder, monkeypatch, sbatch=sbatch + "echo $((100 + n))", squeue=ended)
    result = llmattrib("submit", path, "--wait")
    assert result.exit_code == 0, result.output
    assert re.findall(r"^(\w+) \d+: COMPLETED$", result.stdout, re.MULTILINE) == list(slurm.STAGES)
    fake(bin_folder, monkeypatch, squeue="echo '106|N/A|RUNNING|None'")
    result = llmattrib("submit", path)
    assert result.exit_code == 2
    assert re.search(r"are in the queue: build 106 .*scancel 106", " ".join(result.stderr.split()))


def job(stage: str, id: str, folder: Path) -> slurm.Job:
    return slurm.Job(stage, id, str(folder / f"{stage}.log"), "2026-01-01T00:00:00+00:00")


def test_wait_follows_states_and_ends_with_the_log_of_a_failed_job(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, told = [job("build", "7", tmp_path), job("reduce", "8", tmp_path)], []
    (tmp_path / "build.log").write_text("\n".join(f"line {number}" for number in range(100)))
    count = f"n=0; [ -f {bin_folder}/n ] && read -r n < {bin_folder}/n; echo $((n+1)) > {bin_folder}/n; "
    states = "build=(PENDING NODE_FAIL PENDING RUNNING {end}); b=${{build[$((n > 4 ? 4 : n))]}}; "
    rows = '((n == 2)) && { echo "no contact" >&2; exit 1; }; echo "7|N/A|$b|None"; echo "8|N/A|{other}|Dependency"'
    fake(bin_folder, monkeypatch, squeue=count + states.format(end="FAILED") + rows.replace("{other}", "PENDING"))
    with pytest.raises(
        SlurmError, match=r"job 7 \(build\) ended as FAILED(?s:.*)line 80\n(?s:.*)line 99\n  exp"
    ) as caught:
        slurm.wait(jobs, told.append, seconds=0.01)
    assert "line 79" not in caught.value.found
    assert told[:1] == ["build 7: PENDING"]
    assert "build 7: NODE_FAIL" in told, "seen once, as a requeued job shows it, it is no end"
    (bin_folder / "n").unlink()
    fake(bin_folder, monkeypatch, squeue=count + states.format(end="COMPLETED") + rows.replace("{other}", "COMPLETED"))
    slurm.wait(jobs, told.append, seconds=0.01)
    fake(bin_folder, monkeypatch, squeue="echo 'no contact' >&2; exit 1")
    with pytest.raises(SlurmError, match="squeue says: no contact"):
        slurm.wait(jobs, told.append, seconds=0.01, patience=2)
    fake(bin_folder, monkeypatch, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    slurm.wait(jobs, told.append, seconds=0.01)
    assert told[-1] == "reduce 8: GONE"


def test_status_is_of_the_store_and_needs_no_slurm(
    path: str, tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    fake(bin_folder, monkeypatch)
    assert llmattrib("status", path).stdout == "build: no shards yet\n"
    config = run_of(tmp_path)
    build_features(config)
    records = sorted(Path(config.layout.features, "commits").glob("[0-9]*"))
    for record in records[10:]:
        record.unlink()
    now = time.time()
    for number, record in enumerate(records[:10]):
        os.utime(record, (now, now - 300 + 20 * number))  # two rows every 20 s
    shown = json.loads(llmattrib("status", str(run_dir), "--json").stdout)
    assert (shown["num_shards"], shown["num_shards_done"], shown["jobs"]) == (30, 10, [])
    assert shown["rows_per_second"] == pytest.approx(0.1, rel=1e-3)
    assert shown["seconds_left"] == pytest.approx(400, rel=1e-3)
    assert shown["seconds_since"] == pytest.approx(120, abs=30)
    (run_dir / "slurm").mkdir()
    record = {"jobs": [{"stage": "build", "id": "5", "log": "build.log", "submitted": "2026-01-01T00:00:00+00:00"}]}
    (run_dir / "slurm" / "jobs.json").write_text(json.dumps(record))
    text = llmattrib("status", str(run_dir)).stdout
    assert re.search(
        r"^build: 10 of 30 shards, 0\.1 examples/s, 6 min 40 s left; the newest 2 min \d+ s ago$", text, re.M
    )
    assert "build 5: UNKNOWN (there is no squeue on this machine), build.log" in text
    fake(bin_folder, monkeypatch, squeue="echo '5|N/A|PENDING|Priority'")
    assert "build 5: PENDING (Priority), build.log" in llmattrib("status", str(run_dir)).stdout


@pytest.mark.parametrize(
    ("tasks", "shown"),
    [
        (["RUNNING", "COMPLETED", "PENDING"], "RUNNING (1 COMPLETED, 1 PENDING, 1 RUNNING)"),
        (["COMPLETED", "PENDING", "COMPLETED"], "PENDING (2 COMPLETED, 1 PENDING)"),
        (["COMPLETED", "COMPLETED", "COMPLETED"], "COMPLETED (3 COMPLETED)"),
        (["RUNNING", "FAILED", "COMPLETED"], "FAILED (1 COMPLETED, 1 FAILED, 1 RUNNING)"),
    ],
)
def test_the_state_of_an_array_is_that_of_its_tasks(
    path: str, tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[str], shown: str
) -> None:
    rows = "; ".join(f"echo '9|{number}|{state}|None'" for number, state in enumerate(tasks, start=1))
    fake(bin_folder, monkeypatch, sbatch="echo 9", squeue=rows, scancel="true")
    logs = tmp_path / "run" / "slurm"
    logs.mkdir(parents=True)
    (logs / "build-9_2.log").write_text("it was the second\n")
    array = slurm.Job("build", "9", str(logs / "build-9_*.log"), "2026-01-01T00:00:00+00:00")
    (logs / "jobs.json").write_text(json.dumps({"jobs": [vars(array)]}))
    assert f"build 9: {shown}, {array.log}" in llmattrib("status", path).stdout
    if "FAILED" in tasks:
        with pytest.raises(SlurmError, match=r"ended as FAILED; the end of .*build-9_2\.log:\nit was the second"):
            slurm.wait([array], str, seconds=0.01)
    if {"RUNNING", "PENDING"} & {*tasks}:
        assert "are in the queue: build 9" in " ".join(llmattrib("submit", path).stderr.split())
    else:
        assert llmattrib("submit", path).exit_code == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if missing():
        pytest.skip(missing())
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(SLOW_DISK), prepend=os.pathsep)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return cluster


def committed(config: RunConfig) -> int:
    return len(list(Path(config.layout.features, "commits").glob("[0-9]*")))


def requeued(cluster: Cluster, number: str, log: str) -> None:
    """Wait until a job is in the queue again, and have it start soon; Slurm alone would let minutes pass.

    Not at once: an srun of before would end the new step, which has the same number, and a node refuses what was
    signed in the second in which it ended the job.
    """

    def what() -> str:
        return cluster.run("scontrol", "show", "job", number) + Path(log).read_text() + cluster.logs()

    until(lambda: cluster.state(number) == "PENDING", 120, what)
    until(lambda: not cluster.processes(number), 120, what)
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")


def test_the_slow_disk_is_slow(tmp_path: Path) -> None:
    code = "import sys, time; from llmattrib.commits import commit; import numpy as np; began = time.monotonic(); "
    code += "commit(sys.argv[1], 0, np.ones(3)); print(time.monotonic() - began)"
    store = tmp_path / "features.zarr"
    (store / "commits").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": f"{SLOW_DISK}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, str(store)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert float(out) >= 1


@pytest.mark.slurm
@pytest.mark.slow
def test_a_chain_that_loses_a_node_and_is_warned_ends_with_the_bytes_of_a_local_run(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of(tmp_path, reduce={"methods": ["influence", "grad_dot"]}, slurm={"reduce_nodes": 2})
    options = ("--nodes", "2", "--gpus-per-node", "0")
    result = llmattrib("submit", str(config_file(config, tmp_path)), *options)
    assert result.exit_code == 0, result.output
    jobs = slurm.recorded(config.layout)
    build = jobs[1]

    def state() -> str:
        logs = [Path(item.log).read_text() for item in jobs if Path(item.log).exists()]
        return "\n".join([on_cluster.run("squeue", "--states=all"), *logs, on_cluster.logs()])

    until(lambda: committed(config) >= 4, 300, state)
    on_cluster.kill_node("n2", build.id)
    before = committed(config)
    assert before < NUM_ROWS // SHARD_SIZE
    requeued(on_cluster, build.id, build.log)
    on_cluster.start_node("n2")
    until(lambda: committed(config) >= before + 4, 300, state)
    on_cluster.run("scancel", "--batch", "--signal=USR1", build.id)
    until(lambda: "finishing shards" in Path(build.log).read_text(), 20, state)
    requeued(on_cluster, build.id, build.log)
    assert committed(config) < NUM_ROWS // SHARD_SIZE
    assert "asked to stop" in Path(build.log).read_text()
    told: list[str] = []
    slurm.wait(jobs, told.append, seconds=0.5)
    assert told[-1] == f"index {jobs[-1].id}: COMPLETED"
    shown = llmattrib("status", config.run_dir).stdout
    assert "build: 30 of 30 shards" in shown
    assert all(f"{item.stage} {item.id}: COMPLETED" in shown for item in jobs)
    local = config.model_copy(update={"run_dir": str(tmp_path / "local")})
    train_adapter(local)
    build_features(local)
    assert contents(config.layout.features) == contents(local.layout.features)
    assert not Path(config.layout.features + ".lock").exists()
    reduce_run(local)
    for method in config.reduce.methods:  # of two processes on two nodes, and of one
        stores = [RowStore.open(run.layout.representers(method)) for run in (config, local)]
        rows, wanted = (store.read(0, NUM_ROWS) for store in stores)
        assert np.abs(rows - wanted).max() <= 1e-6 * np.abs(wanted).max()
        build_index(local, method)
        queries = wanted[:4, 0]
        found, expected = (open_index(run, method).search(queries, 5)[1] for run in (config, local))
        np.testing.assert_array_equal(found, expected)
    assert on_cluster.run("squeue", "-h", "--states=all", f"--jobs={jobs[2].id}", "-o%D").strip() == "2"


@pytest.mark.slurm
def test_wait_fails_with_the_log_of_the_job_that_failed(on_cluster: Cluster, tmp_path: Path) -> None:
    config = run_of(tmp_path, slurm={"gpus_per_node": 0, "setup": ["echo no module loaded >&2", "false"]})
    result = llmattrib("submit", str(config_file(config, tmp_path)), "--wait")
    assert result.exit_code == 2
    text = " ".join(result.stderr.split())
    assert re.search(r"job \d+ \(train\) ended as FAILED; the end of .* no module loaded", text)


@pytest.mark.slurm
@pytest.mark.slow
def test_an_array_of_jobs_shares_the_shards_and_one_that_is_warned_goes_on(on_cluster: Cluster, tmp_path: Path) -> None:
    """With an adapter of one's own, by settings on the command line."""
    config = run_of(tmp_path, slurm={"gpus_per_node": 0, "array": 3}, reduce={"methods": ["grad_dot"]})
    adapter = tiny_adapter_dir(tmp_path, config.model.name)
    settings = [f"model.adapters=[{adapter}]", "features.linearisation=trained"]
    path = str(config_file(config, tmp_path))
    own = load_config(path, settings)
    result = llmattrib("submit", path, *settings)
    assert result.exit_code == 0, result.output
    jobs = slurm.recorded(own.layout)
    assert [item.stage for item in jobs] == ["build", "reduce", "index"]
    array = jobs[0]

    def state() -> str:
        logs = [path.read_text() for path in Path(own.layout.path("slurm")).glob("*.log")]
        return "\n".join([on_cluster.run("squeue", "--states=all", "--array"), *logs, on_cluster.logs()])

    def identity(task: int) -> str:
        """The number of a task's own job, as its processes know it."""
        listing = on_cluster.run("squeue", "-h", "--array", "--states=all", f"--jobs={array.id}_{task}", "-o%A")
        return listing.strip()

    until(lambda: committed(own) >= 3, 300, state)
    warned = next(task for task in (1, 2, 3) if on_cluster.state(f"{array.id}_{task}") == "RUNNING")
    log = array.log.replace("*", str(warned))
    number = identity(warned)
    on_cluster.run("scancel", "--batch", "--signal=USR1", f"{array.id}_{warned}")
    until(lambda: "finishing shards" in Path(log).read_text(), 20, state)
    requeued(on_cluster, number, log)
    slurm.wait(jobs, str, seconds=0.5)
    assert "asked to stop" in Path(log).read_text()
    shown = llmattrib("status", own.run_dir).stdout
    assert "build: 30 of 30 shards" in shown
    assert f"build {array.id}: COMPLETED (3 COMPLETED), {array.log}" in shown
    for task in (1, 2, 3):
        assert f"(part {task} of 3)" in Path(array.log.replace("*", str(task))).read_text()
    local = own.model_copy(update={"run_dir": str(tmp_path / "local")})
    build_features(local)
    assert contents(own.layout.features) == contents(local.layout.features)
    assert not list(Path(own.run_dir).glob("*.lock"))
    assert Path(own.layout.index("grad_dot")).exists()
    assert "linearisation: trained" in Path(own.layout.config).read_text()
