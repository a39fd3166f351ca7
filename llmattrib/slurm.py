"""A run as a chain of Slurm jobs, and how far it is.

`submit` hands the scripts of slurm/ to sbatch, each to start when the one before has succeeded, and notes the jobs in
`run_dir/slurm/jobs.json`; logs lie beside it. `watch` reads the feature store and asks squeue; it needs no Slurm.
Speaks to Slurm through its commands (22.05 or later). Knows nothing of what a job computes.
"""

import collections
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llmattrib import storage
from llmattrib.commits import committed, record_path
from llmattrib.config import RunConfig
from llmattrib.errors import ConfigError, SlurmError, StoreNotFoundError
from llmattrib.layout import RunLayout
from llmattrib.sections import SlurmConfig
from llmattrib.store import RowStore

ROOT = Path(__file__).parents[1]
FAILED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "SPECIAL_EXIT",
        "TIMEOUT",
    ]
)
STAGES = ("train", "build", "reduce", "index")
GONE = "GONE"
"""State of a job that squeue knows no more: it has ended some minutes ago."""
ENDED = FAILED | {"COMPLETED", GONE}
RECENT_SHARDS = 64
"""The rate is that of so many newest shards."""
LOG_LINES = 20


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a run.

    Attributes:
        stage: train, build, reduce or index.
        id: Slurm's number, of an array that of the whole.
        log: its log file; of an array with `*` for the number of the task.
        submitted: time of submission, ISO 8601, UTC.
    """

    stage: str
    id: str
    log: str
    submitted: str


@dataclasses.dataclass(frozen=True)
class Submission:
    """One call of sbatch.

    Attributes:
        stage: what the job does.
        command: sbatch with its arguments, but for the dependency.
        environment: variables that the script reads.
        log: log file as sbatch takes it, with `%j` for the number of the job, or `%A` and `%a` for array and task.
    """

    stage: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: str

    def after(self, job: str | None) -> list[str]:
        """Return the command with the dependency on a job."""
        dependency = [] if job is None else [f"--dependency=afterok:{job}"]
        return [self.command[0], *dependency, *self.command[1:]]

    def shell(self, before: str | None) -> str:
        """Return the command as a line of shell that keeps the job's number in a variable named like the stage."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words += [self.command[0]] + ([] if before is None else [f"--dependency=afterok:${before}"])
        return f"{self.stage}=$({' '.join(words)} {shlex.join(self.command[1:])})"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        num_shards: shards of the feature store; 0 before it is made.
        num_shards_done: of these, committed.
        rows_per_second: rate of the newest shards, None when unknown (fewer than two, or not on a local disk).
        seconds_left: pending rows at this rate.
        seconds_since: since the newest shard was committed.
        jobs: stage, id, state, reason and log of each job, in order.
    """

    num_shards: int
    num_shards_done: int
    rows_per_second: float | None
    seconds_left: float | None
    seconds_since: float | None
    jobs: tuple[dict[str, str], ...]


def plan_jobs(config: RunConfig, target: str, overrides: Sequence[str] = ()) -> list[Submission]:
    """Return the calls of sbatch that compute a run, in order: `train` only when the run brings no adapter.

    Args:
        config: the run; reads `run_dir`, `model.adapters` and `slurm`.
        target: the YAML file or run directory that the jobs are given.
        overrides: settings that the jobs are given.

    Raises:
        ConfigError: run_dir is not local.
        SlurmError: the scripts are not there.
    """
    slurm = config.slurm
    logs = _folder(config.layout)
    if not (ROOT / "slurm" / "build.sbatch").is_file():
        raise SlurmError(
            f"{ROOT / 'slurm'} does not hold the scripts of the jobs",
            expected="llmattrib installed from its repository by `pip install -e`",
            fix="install it so, or copy the folders slurm/ and launch/ of the repository there",
        )
    environment = {"LLMATTRIB_ROOT": str(ROOT)}
    if slurm.setup:
        environment["LLMATTRIB_SETUP"] = "\n".join(slurm.setup)
    launched: dict[str, str] = {}
    if not slurm.gpus_per_node:
        launched = {"LAUNCH": str(ROOT / "launch" / "cpu.yaml"), "PROCESSES_PER_NODE": "1"}
    elif slurm.launch != "multi_gpu":
        launched = {"LAUNCH": str(ROOT / "launch" / f"{slurm.launch}.yaml")}
    sizes = {
        "train": (1, min(1, slurm.gpus_per_node)),
        "build": (slurm.nodes, slurm.gpus_per_node),
        "reduce": (slurm.reduce_nodes, 0),
    }
    submissions = []
    for stage in STAGES[bool(config.model.adapters) :]:
        nodes, gpus = sizes.get(stage, (1, 0))
        is_array = stage == "build" and slurm.array > 1
        log = str(logs / f"{stage}-{'%A_%a' if is_array else '%j'}.log")
        command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", f"--nodes={nodes}", f"--output={log}"]
        command += [f"--array=1-{slurm.array}"] * is_array
        command += [f"--gpus-per-node={gpus}"] * (gpus > 0) + _options(slurm)
        command += [str(ROOT / "slurm" / f"{stage}.sbatch"), target, *overrides]
        extra = launched if stage == "build" else {}
        submissions.append(Submission(stage, tuple(command), environment | extra, log))
    return submissions


def _options(slurm: SlurmConfig) -> list[str]:
    """Return the options of sbatch that all jobs share."""
    named = {
        "cpus-per-task": slurm.cpus_per_task,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
    }
    return [*(f"--{name}={value}" for name, value in named.items() if value is not None), *slurm.sbatch]


def _folder(layout: RunLayout) -> Path:
    local = storage.local_path(layout.path("slurm"))
    if local is None:
        raise ConfigError(
            f"run_dir is {layout.run_dir}", expected="a local folder that all nodes see, for the logs of jobs"
        )
    return local.absolute()


def submit(config: RunConfig, submissions: Sequence[Submission]) -> list[Job]:
    """Submit a chain of jobs and note them in `run_dir/slurm/jobs.json`; all of them or none.

    Raises:
        SlurmError: sbatch is missing or refuses a job, or jobs of this run are in the queue.
    """
    folder = _folder(config.layout)
    known = recorded(config.layout)
    active = [job for job, state in zip(known, _states(known), strict=True) if state.is_active]
    if active:
        ids = " ".join(job.id for job in active)
        raise SlurmError(
            f"jobs of {config.run_dir} are in the queue: {', '.join(f'{job.stage} {job.id}' for job in active)}",
            expected="one chain of jobs a run at a time",
            fix=f"wait for them, or `scancel {ids}`; a new chain goes on where they stopped",
        )
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for item in submissions:
        try:
            printed = _call(item.after(jobs[-1].id if jobs else None), item.environment)
        except SlurmError:
            if jobs:
                _call(["scancel", *(job.id for job in jobs)])
            raise
        number = printed.strip().partition(";")[0]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        log = item.log.replace("%j", number).replace("%A", number).replace("%a", "*")
        jobs.append(Job(item.stage, number, log, now))
        record = json.dumps({"jobs": [dataclasses.asdict(job) for job in jobs]}, indent=1)
        storage.atomic_write(str(folder / "jobs.json"), record.encode() + b"\n")
    return jobs


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        ended = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine",
            expected="the commands of Slurm on PATH",
            fix="log in to a node of the cluster that submits jobs, or run the stages here: `llmattrib run`",
        ) from error
    if ended.returncode:
        raise SlurmError(
            f"{command[0]} says: {' '.join(ended.stderr.split()) or f'exit code {ended.returncode}'}",
            expected=f"Slurm to accept `{shlex.join(command)}`",
            fix="correct the slurm section of the config or the options; --dry-run prints the commands",
        )
    return ended.stdout


def recorded(layout: RunLayout) -> list[Job]:
    """Return the jobs that were last submitted for a run; none if there were none."""
    try:
        record = storage.read_bytes(layout.path("slurm", "jobs.json"))
    except FileNotFoundError:
        return []
    return [Job(**job) for job in json.loads(record)["jobs"]]


class _State(NamedTuple):
    """What squeue knows of a job.

    Attributes:
        name: its state; of an array that of a task which failed, else of one that runs, else of one that waits.
        reason: why it waits; of an array how many tasks are in which state.
        is_active: whether it, or a task of it, has not ended.
        task: of an array, the number of the task whose state this is.
    """

    name: str
    reason: str
    is_active: bool
    task: str


def _states(jobs: Sequence[Job]) -> list[_State]:
    """Return the states of jobs."""
    if not jobs:
        return []
    try:
        ids = ",".join(job.id for job in jobs)
        listing = _call(["squeue", "--noheader", "--array", "--states=all", f"--jobs={ids}", "--format=%F|%K|%T|%r"])
    except SlurmError as error:
        if "Invalid job id" not in error.found:
            raise
        listing = ""
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for line in listing.splitlines():
        number, task, name, reason = line.split("|", 3)
        tasks.setdefault(number, []).append((name, task, "" if reason == "None" else reason))
    return [_joined(tasks.get(job.id, [(GONE, "", "")])) for job in jobs]


def _joined(tasks: Sequence[tuple[str, str, str]]) -> _State:
    """Return the state of a job from (state, number, reason) of its tasks."""
    counts = collections.Counter(name for name, _, _ in tasks)
    order = (*sorted(FAILED), "RUNNING", *sorted({*counts} - ENDED), "COMPLETED", GONE)
    name, task, reason = min(tasks, key=lambda item: order.index(item[0]))
    if len(tasks) > 1:
        reason = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return _State(name, reason, not {*counts} <= ENDED, task)


def wait(jobs: Sequence[Job], tell: Callable[[str], None], seconds: float = 10.0, patience: int = 30) -> None:
    """Wait until all jobs have ended.

    Args:
        jobs: from `submit`.
        tell: called with a line whenever a job changes its state.
        seconds: between two looks at the queue.
        patience: so many looks in a row may fail.

    Raises:
        SlurmError: a job failed; with the end of its log. Or squeue does not answer.
    """
    before: dict[str, str] = {}
    num_silent = 0
    while True:
        try:
            states = {job.id: state for job, state in zip(jobs, _states(jobs), strict=True)}
        except SlurmError:
            num_silent += 1
            if num_silent >= patience:
                raise
            time.sleep(seconds)
            continue
        num_silent = 0
        for job in jobs:
            if states[job.id].name != before.get(job.id):
                tell(f"{job.stage} {job.id}: {states[job.id].name}")
        for job in jobs:
            state = states[job.id]
            if state.name in FAILED and before.get(job.id) == state.name:  # twice: a requeued job is not lost
                raise _failure(job, state)
        if all(state.name in ENDED - FAILED for state in states.values()):
            return
        before = {number: state.name for number, state in states.items()}
        time.sleep(seconds)


def _failure(job: Job, state: _State) -> SlurmError:
    log = Path(job.log.replace("*", state.task))
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "(there is no log)"
    tail = "\n".join(text.splitlines()[-LOG_LINES:])
    return SlurmError(
        f"job {job.id} ({job.stage}) ended as {state.name}; the end of {log}:\n{tail}",
        expected="COMPLETED",
        fix="mend what the log names and submit again: what is finished is kept",
    )


def watch(layout: RunLayout) -> Progress:
    """Say how far a run is, from its store and, where Slurm and jobs are, squeue.

    Raises:
        StoreError: the store cannot be read.
        SlurmError: squeue refuses to answer.
    """
    jobs = recorded(layout)
    try:
        states = _states(jobs)
    except SlurmError as error:
        states = [_State("UNKNOWN", error.found, True, "")] * len(jobs)
    rows = tuple(
        {"stage": job.stage, "id": job.id, "state": state.name, "reason": state.reason, "log": job.log}
        for job, state in zip(jobs, states, strict=True)
    )
    try:
        store = RowStore.open(layout.features)
    except StoreNotFoundError:
        return Progress(0, 0, None, None, None, rows)
    done = committed(layout.features)
    times = sorted(_committed_at(layout.features, done))[-RECENT_SHARDS:]
    sizes = {shard: stop - start for shard in done for start, stop in (store.shard_range(shard),)}
    rate = left = None
    if len(times) > 1 and times[-1][0] > times[0][0]:
        rate = sum(sizes[shard] for _, shard in times[1:]) / (times[-1][0] - times[0][0])
        left = (store.manifest.num_rows - sum(sizes.values())) / rate
    since = time.time() - times[-1][0] if times else None
    return Progress(store.num_shards, len(done), rate, left, since, rows)


def _committed_at(path: str, shards: Mapping[int, str]) -> list[tuple[float, int]]:
    """Return when shards were committed, in seconds since 1970; nothing for a store that is not on a local disk."""
    if storage.local_path(path) is None:
        return []
    records = {shard: record_path(path, shard, checksum) for shard, checksum in shards.items()}
    return [(Path(record.removeprefix("file://")).stat().st_mtime, shard) for shard, record in records.items()]
