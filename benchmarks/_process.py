"""Figures of a benchmark's work in a process of its own, so that memory and imports of one piece are not another's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]


def measured(module: str, *words: str, threads: int = 1) -> Any:
    """Run `python -m benchmarks.MODULE --work WORDS` on so many threads; return the JSON that it prints last."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--work", *words]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Return this process's largest resident set; `ru_maxrss` would begin at that of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def children_seconds() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system
