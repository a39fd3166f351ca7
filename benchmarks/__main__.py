"""Run benchmarks one after the other, then write docs/benchmarks.md.

    python -m benchmarks [NAME ...]

A name is a module of this folder, `peers.bergson_lds` among them; without names all run, which takes hours. A failed
one is named at the end and the others run. Each is a process of its own, one thread, no GPU, no network. What each took
goes to benchmarks/results/durations.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._process import children_seconds

HERE = Path(__file__).parent
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


def names() -> list[str]:
    """Return the benchmarks: every module here that is a script."""
    scripts = [path for path in sorted(HERE.glob("[a-z]*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    return [path.stem for path in scripts if path.stem != "render"] + list(LAST)


def record(name: str, wall: float, cpu: float) -> None:
    """Write the seconds that a benchmark took beside those of the others."""
    found = json.loads(DURATIONS.read_text("utf-8")) if DURATIONS.exists() else {}
    found[name] = {"cpu_minutes": round(cpu / 60, 1), "wall_minutes": round(wall / 60, 1)}
    DURATIONS.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is asked for."""
    asked = sys.argv[1:] or names()
    unknown = sorted(set(asked) - set(names()))
    if unknown:
        sys.exit(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(names())}")
    failed = []
    for name in asked:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        began, before = time.perf_counter(), children_seconds()
        if subprocess.run(command, cwd=HERE.parent, env=os.environ | ENVIRONMENT).returncode:
            failed.append(name)
        else:
            record(name, time.perf_counter() - began, children_seconds() - before)
    subprocess.run([sys.executable, "-m", "benchmarks.render"], cwd=HERE.parent, check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
