"""The exclusive right to write a store: a file beside it that names its holder.

The file is created in one step with its content. A holder that is known to be dead (its process on this host is
gone, or Slurm has restarted the very job that held it) loses the lock to the next comer. The lock is advisory and
cannot tell whether a process on another host lives: then a person decides, and the message says how.

Jobs that build one store together (`Part`) hold a lock each, at `<store>.part-2-of-4.lock`, and that of the store only
for the moment in which they prepare it. Who wants the store for itself is refused while one of them may be alive.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmattrib.errors import ConfigError, StoreAccessError, StoreLockedError
from llmattrib.signals import ending
from llmattrib.storage import PARTIAL, list_names, local_path, named_errors, read_bytes, remote, remove

PATIENCE = 600.0
"""Seconds that a part waits for the others to prepare their store."""
_BETWEEN = 0.2
"""Seconds between two looks at a lock."""


def _started(pid: int) -> str:
    """Boot and start time of a process, so that a reused pid is not taken for its former owner; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot}:{fields[19]}"
    except OSError:
        return ""


def _owner(is_passing: bool = False) -> dict[str, str | int]:
    return {
        "passing": is_passing,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _is_stale(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Say whether the holder of a lock is known to be dead."""
    same_job = owner.get("slurm_job") and owner["slurm_job"] == me["slurm_job"]
    if same_job and owner.get("slurm_restart", 0) < me["slurm_restart"]:
        return True  # Slurm requeued the job, perhaps to another host
    if owner.get("host") != me["host"] or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(owner.get("started")) and owner["started"] != _started(owner["pid"])


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if "pid" in owner and "host" in owner else "another process"


def holder(path: str) -> tuple[str, bool] | None:
    """Return who holds the lock of the store at `path`, and whether it may be alive; None when it is free."""
    try:
        owner = _parse_owner(read_bytes(lock_path(path)))
    except FileNotFoundError:
        return None
    return _name(owner), not _is_stale(owner, _owner())


def lock_path(path: str) -> str:
    """Return the lock file of the store at `path`."""
    return path.rstrip("/") + ".lock"


def _locked_error(path: str, lock: str, who: str) -> StoreLockedError:
    return StoreLockedError(
        f"{path} is being written by {who}",
        expected="one build on a store at a time",
        fix=f"wait for it to end; if that process is known to be gone, delete {lock}",
    )


def _parse_owner(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _take_local(lock: Path, mine: bytes) -> dict[str, Any] | None:
    """Create `lock` with its content in one step, or take it over from a dead holder.

    Returns:
        Nothing when it was taken, else what is known of its holder.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    partial = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}{PARTIAL}")
    partial.write_bytes(mine)
    try:
        os.link(partial, lock)
        return None
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    with contextlib.suppress(FileNotFoundError), lock.open("r+b") as file:
        # flock: of several processes that find the same dead holder, one replaces its name and the others see that.
        fcntl.flock(file, fcntl.LOCK_EX)
        owner = _parse_owner(file.read())
        if not _is_stale(owner, json.loads(mine)) or os.fstat(file.fileno()).st_nlink == 0:
            return owner
        file.seek(0)
        file.write(mine)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        return None
    return {}  # freed between the two steps: as good as locked, a rerun takes it


def _take_remote(lock: str, mine: bytes) -> dict[str, Any] | None:
    """Do what `_take_local` does, with a put that fails where there is a file."""
    filesystem, inner = remote(lock)
    owner: dict[str, Any] = {}
    with contextlib.suppress(FileExistsError):
        filesystem.pipe_file(inner, mine, mode="create")
        return None
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        held = bytes(filesystem.cat_file(inner))
        owner = _parse_owner(held)
        if _is_stale(owner, json.loads(mine)):
            owner = {}
            # Of several processes that find the same dead holder, one at a time may replace its name.
            claim = f"{inner}.{hashlib.blake2b(held, digest_size=8).hexdigest()}"
            filesystem.pipe_file(claim, mine, mode="create")
            try:
                if filesystem.cat_file(inner) == held:
                    filesystem.pipe_file(inner, mine)
                    return None
            finally:
                filesystem.rm_file(claim)
    return owner


@contextlib.contextmanager
def locked(path: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the exclusive right to write the store at `path`; the lock file lies beside it, at `path` + `.lock`.

    While it is held, signals to stop end the process by `SystemExit`, so that the lock is given back. SIGKILL leaves
    it, and the next process on this host takes it over.

    Args:
        path: the store.
        wait_seconds: how long to wait for holders that wait as well, and so hold it for a moment only. Such a holder
            may write beside parts; without waiting, it is refused while a part may be alive.

    Raises:
        StoreLockedError: a live process, or one on another host, holds it.
        StoreAccessError: the lock file cannot be written.
    """
    lock, mine = lock_path(path), json.dumps(_owner(wait_seconds > 0), sort_keys=True).encode()
    local, deadline = local_path(lock), time.monotonic() + wait_seconds
    with named_errors(lock):
        while (owner := _take_remote(lock, mine) if local is None else _take_local(local, mine)) is not None:
            if not owner.get("passing", not owner) or time.monotonic() >= deadline:
                raise _locked_error(path, lock, _name(owner))
            time.sleep(_BETWEEN)
    try:
        with ending():
            if not wait_seconds:
                _refuse(path, live_parts(path))
            yield
    except BaseException:
        with contextlib.suppress(StoreAccessError):  # what failed first is what a user must know
            _release(lock, mine)
        raise
    _release(lock, mine)


def _release(lock: str, mine: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if read_bytes(lock) == mine:
            remove(lock)


@dataclass(frozen=True)
class Part:
    """One of the jobs that build a store together: it computes every count-th shard, from its own number on.

    Attributes:
        number: from 1.
        count: jobs in all.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `2/4`, the second of four.

        Raises:
            ConfigError: it is no such text.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"the part is {text!r}", expected="K/N with K from 1 to N, such as 2/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    def has(self, shard: int) -> bool:
        """Say whether a shard is this part's."""
        return shard % self.count == self.number - 1

    def place(self, path: str) -> str:
        """Return what this part of the store at `path` locks."""
        return f"{path}.part-{self.number}-of-{self.count}"

    @contextlib.contextmanager
    def joining(self, path: str) -> Iterator[bool]:
        """Hold the store at `path` while this part prepares its work and locks its own place.

        Yields:
            Whether other parts may be writing the store.

        Raises:
            StoreLockedError: a build holds it that is no part, this part is alive, or parts of another count are.
        """
        with locked(path, wait_seconds=PATIENCE):
            others = live_parts(path)
            _refuse(path, [(other, who) for other, who in others if other.count != self.count or other == self])
            yield bool(others)


def _refuse(path: str, held: list[tuple[Part, str]]) -> None:
    """Raise when there are such parts."""
    for part, who in held:
        raise _locked_error(path, lock_path(part.place(path)), f"{part} ({who})")


def parts(path: str) -> list[Part]:
    """Return the parts of the store at `path` that have a lock, of a live process or a dead one."""
    folder, _, name = path.rpartition("/")
    pattern = re.compile(rf"{re.escape(name)}\.part-(\d+)-of-(\d+)\.lock")
    found = (pattern.fullmatch(item) for item in list_names(folder or "."))
    return [Part(int(match[1]), int(match[2])) for match in found if match]


def live_parts(path: str) -> list[tuple[Part, str]]:
    """Return the parts of the store at `path` that may be alive, and the process of each."""
    held = [(part, holder(part.place(path))) for part in parts(path)]
    return [(part, found[0]) for part, found in held if found is not None and found[1]]
