"""The ground truth as data: which subsets were trained and what each sub-model answered.

    llmattrib retrain benchmarks/truth/sms.yaml                 # hours; resumes
    python -m benchmarks.truth.margins                          # tables -> benchmarks/truth/<task>_margins.npz

Each file holds `members` [m, n], packed along n, and `margins` [seeds, m, q] in float32: log-odds of each query's
answer. Seeds that are not finished are left out, and the sub-models that all kept seeds share are kept.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Float

from llmattrib.config import load_config
from llmattrib.errors import LlmattribError
from llmattrib.games.subset_table import BANZHAF, SubsetRows, SubsetTable, pack, unpack
from llmattrib.retrain import MADE_BY

HERE = Path(__file__).parent
TINY = ("sms", "facts")
"""Tasks of the 1M-parameter Llama."""
TASKS = (*TINY, "smollm2")


def path_of(task: str) -> Path:
    """Return the data file of a task."""
    return HERE / f"{task}_margins.npz"


def export(task: str) -> str:
    """Write the data file of a task from the tables of its run; return what was found."""
    config = load_config(HERE / f"{task}.yaml")
    seeds: list[SubsetRows] = []
    for seed in range(config.retraining.num_seeds):
        path = config.layout.path("retraining", f"seed{config.seed + seed}.zarr")
        try:
            rows = SubsetTable.open(path, made_by=MADE_BY).rows(BANZHAF)
        except LlmattribError:
            break
        if len(rows.p) < config.retraining.num_subsets and seeds:
            break
        seeds.append(rows)
    count = min(len(rows.p) for rows in seeds)
    margins = np.array([rows.utilities[:count] for rows in seeds], np.float32)
    members = seeds[0].members[:count]
    np.savez_compressed(path_of(task), members=pack(members), num_examples=members.shape[1], margins=margins)
    return f"{task}: {len(seeds)} seeds x {count} subsets x {margins.shape[2]} queries"


def load(task: str) -> tuple[SubsetRows, Float[np.ndarray, "k m q"]]:
    """Return the sub-models of a task, utilities the mean over seeds; and the margins of each seed."""
    with np.load(path_of(task)) as stored:
        members = unpack(stored["members"], int(stored["num_examples"]))
        margins = stored["margins"].astype(np.float64)
    count = len(members)
    rows = SubsetRows(BANZHAF, 0, members, np.full(count, 0.5), np.arange(count), margins.mean(axis=0))
    return rows, margins


def main() -> None:
    """Export what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    for task in parser.parse_args().tasks:
        print(export(task))


if __name__ == "__main__":
    main()
