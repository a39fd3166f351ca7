"""The exclusive right to write a store: a file beside it that names its holder.

The file is created in one step with its content. A holder that is known to be dead (its process on this host is
gone, or Slurm has restarted the very job that held it) loses the lock to the next comer. The lock is advisory and
cannot tell whether a process on another host lives: then a person decides, and the message says how.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmattrib.errors import StoreAccessError, StoreLockedError
from llmattrib.signals import ending
from llmattrib.storage import PARTIAL, local_path, named_errors, read_bytes, remote, remove


def _started(pid: int) -> str:
    """Boot and start time of a process, so that a reused pid is not taken for its former owner; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot}:{fields[19]}"
    except OSError:
        return ""


def _owner() -> dict[str, str | int]:
    return {
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


def _locked_error(path: str, lock: str, owner: dict[str, Any]) -> StoreLockedError:
    return StoreLockedError(
        f"{path} is being written by {_name(owner)}",
        expected="one build on a store at a time",
        fix=f"wait for it to end; if that process is known to be gone, delete {lock}",
    )


def _parse_owner(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _take_local(path: str, lock: Path, mine: bytes) -> None:
    """Create `lock` with its content in one step, or take it over from a dead holder."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    partial = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}{PARTIAL}")
    partial.write_bytes(mine)
    try:
        os.link(partial, lock)
        return
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    with contextlib.suppress(FileNotFoundError), lock.open("r+b") as file:
        # flock: of several processes that find the same dead holder, one replaces its name and the others see that.
        fcntl.flock(file, fcntl.LOCK_EX)
        owner = _parse_owner(file.read())
        if not _is_stale(owner, json.loads(mine)) or os.fstat(file.fileno()).st_nlink == 0:
            raise _locked_error(path, str(lock), owner)
        file.seek(0)
        file.write(mine)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        return
    raise _locked_error(path, str(lock), {})  # freed between the two steps: as good as locked, a rerun takes it


def _take_remote(path: str, lock: str, mine: bytes) -> None:
    """Create `lock` in one put, or take it over from a dead holder."""
    filesystem, inner = remote(lock)
    owner: dict[str, Any] = {}
    with contextlib.suppress(FileExistsError):
        filesystem.pipe_file(inner, mine, mode="create")
        return
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
                    return
            finally:
                filesystem.rm_file(claim)
    raise _locked_error(path, lock, owner)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the exclusive right to write the store at `path`; the lock file lies beside it, at `path` + `.lock`.

    While it is held, signals to stop end the process by `SystemExit`, so that the lock is given back. SIGKILL leaves
    it, and the next process on this host takes it over.

    Raises:
        StoreLockedError: a live process, or one on another host, holds it.
        StoreAccessError: the lock file cannot be written.
    """
    lock, mine = lock_path(path), json.dumps(_owner(), sort_keys=True).encode()
    local = local_path(lock)
    with named_errors(lock):
        if local is None:
            _take_remote(path, lock, mine)
        else:
            _take_local(path, local, mine)
    try:
        with ending():
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
