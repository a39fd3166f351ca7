"""Checks that a large array fits before it is made. Knows Linux's /proc and cgroup v2; elsewhere physical memory."""

import os
from pathlib import Path

from llmattrib.errors import LlmattribError, MethodError


def available_memory() -> int:
    """Return the bytes this process could still use: the machine's, or what its cgroup leaves."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])  # cache can be dropped
        limit = int((group / "memory.max").read_text()) - used
    except (OSError, KeyError, ValueError):  # no cgroup v2, or no limit ("max")
        return available
    return max(0, min(available, limit))


def require_memory(
    num_bytes: int, what: str, fix: str, limit: int | None = None, kind: type[LlmattribError] = MethodError
) -> None:
    """Raise unless `num_bytes` fit.

    Args:
        num_bytes: bytes needed.
        what: what needs them, for the message.
        fix: what the user can do.
        limit: bytes allowed; what is available when None.
        kind: of the error.

    Raises:
        MethodError, or `kind`: they do not fit.
    """
    allowed = available_memory() if limit is None else limit
    if num_bytes > allowed:
        raise kind(
            f"{what} needs {num_bytes / 2**30:.1f} GiB of memory",
            expected=f"at most {allowed / 2**30:.1f} GiB",
            fix=fix,
        )
