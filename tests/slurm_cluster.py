"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, on ports of their own.

Needs root and the packages slurm-wlm and munge. All files lie in one folder; `stop` ends every daemon and job.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout=300
KillWait=5
MinJobAge=36000
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    absent = [command for command in COMMANDS if not _which(command)]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else ""


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def until(holds: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Wait until `holds`, or fail with what `what` says."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


class Cluster:
    """The daemons, and the environment in which Slurm's commands find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        self._conf = folder / "slurm.conf"
        self._conf.write_text(CONFIG.format(host=socket.gethostname(), ports=_free_ports(3), folder=folder))
        self.environment = {"SLURM_CONF": str(self._conf), "MASTER_ADDR": "127.0.0.1"}

    def start(self) -> None:
        """Start everything; return when both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}={self.folder}/munge.{end}" for name, end in MUNGE_FILES.items()]
        self._start("munged", ["--foreground", "--force", "--num-threads=2", f"--key-file={key}", *munge])
        until((self.folder / "munge.socket").exists, 20, self.logs)
        self._start("slurmctld", ["-D", "-f", str(self._conf)])
        for node in NODES:
            self.start_node(node)
        until(lambda: self.run("sinfo", "-hN", "-o%t").split() == ["idle"] * 2, 60, self.logs)

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self._start(f"slurmd-{node}", ["-D", "-f", str(self._conf), "-N", node])

    def _start(self, name: str, arguments: list[str]) -> None:
        command = _which(name.partition("-")[0])
        assert command
        with (self.folder / f"{name}.out").open("ab") as out:
            environment = {**os.environ, **self.environment}
            self._daemons[name] = subprocess.Popen([command, *arguments], env=environment, stdout=out, stderr=out)

    def run(self, *command: str) -> str:
        """Run a command of Slurm; "" while the controller does not answer."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    def state(self, job: str) -> str:
        """State of a job, as squeue spells it."""
        return self.run("squeue", "-h", "--states=all", f"--jobs={job}", "-o%T").strip()

    def processes(self, job: str, *more: str) -> list[int]:
        """Processes of a job, known by their environment; `more` are variables that they have besides."""
        wanted = {item.encode() for item in (f"SLURM_CONF={self._conf}", f"SLURM_JOB_ID={job}", *more)}
        return [pid for pid, environment in self._environments() if wanted <= environment]

    def kill_node(self, node: str, job: str) -> None:
        """Lose a node: its daemon and what `job` runs there die, and the controller notices."""
        daemon = self._daemons.pop(f"slurmd-{node}")
        daemon.kill()
        daemon.wait()
        for pid in self.processes(job, f"SLURM_NODEID={NODES.index(node)}", "SLURM_STEP_ID=0"):
            _kill(pid)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def _environments(self) -> list[tuple[int, set[bytes]]]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                found.append((int(entry.name), set((entry / "environ").read_bytes().split(b"\0"))))
            except OSError:
                continue
        return found

    def logs(self) -> str:
        """The ends of all logs."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {file.name}\n" + file.read_text(errors="replace")[-1500:] for file in files)

    def stop(self) -> None:
        """End jobs and daemons."""
        self.run("scancel", "--user=root")
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError):
                until(lambda: not self.run("squeue", "-h"), 20, str)
        for daemon in reversed(list(self._daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        mine = f"SLURM_CONF={self._conf}".encode()
        for pid, environment in self._environments():
            if mine in environment and pid != os.getpid():
                _kill(pid)


MUNGE_FILES = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
