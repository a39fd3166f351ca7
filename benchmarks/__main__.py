"""Run benchmarks one after the other, then write docs/benchmarks.md and the table of systems in README.md.

    python -m benchmarks [NAME ...]

A name is a module of this folder, `peers.bergson_lds` among them; without names all run, which takes hours. Stopped and
started again, that goes on with what has not run with this very code (runs/bench.json, which goes when all have). A
failed one is named at the end and the others run. Each is a process of its own, one thread unless it says otherwise, no
GPU, no network. Tables of what several benchmarks measured are written last, whatever ran. What each took goes to
benchmarks/results/durations.json.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._process import children_seconds

HERE = Path(__file__).parent
ROOT = HERE.parent
PROGRESS = ROOT / "runs" / "bench.json"
DURATIONS = HERE / "results" / "durations.json"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
LAST = ("peers.bergson_lds",)
"""Adds to what another one wrote."""
TABLES = ("render", "systems")
"""Measure nothing: they write what several benchmarks have measured."""


def names() -> list[str]:
    """Return the benchmarks: every module here that is a script."""
    scripts = [path for path in sorted(HERE.glob("[a-z]*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    return [path.stem for path in scripts if path.stem not in TABLES] + list(LAST)


def record(name: str, wall: float, cpu: float) -> None:
    """Write the seconds that a benchmark took beside those of the others."""
    found = json.loads(DURATIONS.read_text("utf-8")) if DURATIONS.exists() else {}
    found[name] = {"cpu_minutes": round(cpu / 60, 1), "wall_minutes": round(wall / 60, 1)}
    DURATIONS.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def code_digest() -> str:
    """Return the checksum of the code that is measured and of the versions of packages."""
    files = [*sorted((ROOT / "llmattrib").rglob("*.py")), *sorted(HERE.rglob("*.py")), ROOT / "constraints.txt"]
    files += sorted(HERE.glob("*.txt"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def finished(code: str) -> list[str]:
    """Return what a run of everything that was stopped has done with this code."""
    found = json.loads(PROGRESS.read_text("utf-8")) if PROGRESS.exists() else {}
    return list(found["done"]) if found.get("code") == code else []


def main() -> None:
    """Run what is asked for, or everything that has not run."""
    unknown = sorted(set(sys.argv[1:]) - set(names()))
    if unknown:
        sys.exit(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(names())}")
    everything, code = not sys.argv[1:], code_digest()
    done = finished(code) if everything else []
    if done:
        print(f"went before with this code: {', '.join(done)}", flush=True)
    failed = []
    for name in sys.argv[1:] or [name for name in names() if name not in done]:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        began, before = time.perf_counter(), children_seconds()
        if subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT).returncode:
            failed.append(name)
        else:
            record(name, time.perf_counter() - began, children_seconds() - before)
            done.append(name)
            if everything:
                PROGRESS.parent.mkdir(exist_ok=True)
                PROGRESS.write_text(json.dumps({"code": code, "done": done}), encoding="utf-8")
    for name in TABLES:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if everything:
        PROGRESS.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
