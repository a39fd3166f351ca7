"""How near the estimators of the kernel game come to the truth, and at what cost, on features of a real model.

    python -m benchmarks.kernel_accuracy [--only mean_field pydvl error_against_cost]

`mean_field_n5000_p512`: Shapley representers of 5,000 text messages (`_sms_game`) by the mean field on two threads,
in a process of its own, against a long sampled reference for 64 held-out messages. `relative_error` holds the noise of
the reference too; `bias` is free of it (products of independent shards, as in the certificate of `reduce`). Top-10
overlap is of the ten largest values of each query; that of two halves of the reference is given beside it.

`pydvl_n500`: pyDVL's antithetic permutation sampling of scikit-learn's kernel ridge regression on 500 of the messages,
for one query, against ours: CPU seconds to the root-mean-square error that pyDVL reaches. In the environment of
`make bench`.

`error_against_cost_n1000`: mean field (three forms), random subsets, antithetic and plain permutations on 1,000 of the
messages.

Results are merged by key into benchmarks/results/kernel_game.json; docs/kernel_game.md and its plot are written.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernel_game
from benchmarks._pages import fill
from benchmarks._process import measured, peak_bytes
from benchmarks._sms_game import FOLDER, SmsFeatures, load_features, reference
from benchmarks.kernel_game import RESULT, cpu_seconds, merge
from llmattrib.estimators.certificate import Certificate
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.moments import Moments
from llmattrib.estimators.permutation import Permutation
from llmattrib.estimators.quadrature import SHAPLEY
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import KernelGame

HERE = Path(__file__).parent
PLOT, PAGE = HERE.parent / "docs" / "kernel_game.png", HERE.parent / "docs" / "kernel_game.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
TOP = 10
THREADS = 2


def merged(shards: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [m, n] and standard error of shards together; the game has one response."""
    total = functools.reduce(Moments.merge, shards)
    return total.mean[..., 0], total.standard_error[..., 0]


def relative_error(values: np.ndarray, truth: np.ndarray, noise: np.ndarray) -> float:
    """Root of the squared error over all queries and players, relative, without what the noise of the truth adds."""
    square = np.sum((values - truth) ** 2) - np.sum(noise**2)
    size = np.sum(truth**2) - np.sum(noise**2)
    return float(np.sqrt(max(square, 0.0) / size))


def overlap(values: np.ndarray, others: np.ndarray) -> float:
    """Mean share of the largest values of a query that two [m, n] arrays have in common."""
    first, second = (np.argsort(-array, axis=1)[:, :TOP] for array in (values, others))
    return float(np.mean([len(set(a) & set(b)) / TOP for a, b in zip(first.tolist(), second.tolist(), strict=True)]))


def solve(made: Path, found: Path) -> dict[str, Any]:
    """Read a game, write its representers, and return what that took of this process."""
    tree, imported = np.load(made), peak_bytes()
    game = KernelGame(tree["features"], tree["responses"], float(tree["ridge"]))
    seconds, result = cpu_seconds(lambda: MeanField(form="total_gradient").init(game))
    np.save(found, result.representers)
    return {
        "seconds": result.seconds,
        "cpu_seconds": seconds,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "imported_bytes": imported,
        "peak_memory_bytes": peak_bytes(),
        "sum_rule_error": result.sum_rule_error,
        "num_nodes": result.num_nodes,
        "num_groups": result.num_groups,
    }


def mean_field(features: SmsFeatures, num_draws: int) -> dict[str, Any]:
    """Time the mean field of all messages and hold it to the reference."""
    game, found, made = features.game(), FOLDER / "mean_field.npy", FOLDER / "game.npz"
    np.savez(made, features=game.features, responses=game.responses, ridge=game.ridge)
    row: dict[str, Any] = measured("kernel_accuracy", str(made), str(found), threads=THREADS)
    values = features.queries @ np.load(found)[:, 0].T
    shards = list(reference(features, len(game.features), num_draws))
    gaps = np.stack([(shard.mean[..., 0] - values).ravel() for shard in shards])
    bias = Certificate(gaps @ gaps.T, float(np.sum(values**2)), num_draws, len(values))
    truth, noise = merged(shards)
    halves = [merged(shards[part::2])[0] for part in (0, 1)]
    return row | {
        "relative_error": float(np.linalg.norm(values - truth) / np.linalg.norm(truth)),
        "reference_noise": float(np.linalg.norm(noise) / np.linalg.norm(truth)),
        "bias": bias.bias,
        "bias_at_most_95": bias.upper,
        "top10_overlap": overlap(values, truth),
        "top10_overlap_of_reference_halves": overlap(*halves),
        "mean_correlation": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(values, truth, strict=True)])),
        "num_players": len(game.features),
        "dim": game.features.shape[1],
        "num_queries": len(values),
        "num_reference_draws": num_draws,
    }


def pydvl(features: SmsFeatures, num_permutations: int) -> dict[str, Any]:
    """Time pyDVL and ours to the same root-mean-square error."""
    game, query = features.game(500), features.queries[:32].mean(axis=0).astype(np.float64)
    wide = game.features.astype(np.float64)
    given, found = FOLDER / "pydvl-game.npz", FOLDER / "pydvl-values.npz"
    np.savez(given, features=wide, responses=game.responses[:, 0], query=query, ridge=game.ridge)
    script = HERE / "peers" / "pydvl_shapley.py"
    subprocess.run([sys.executable, script, given, found, str(num_permutations)], check=True)
    theirs = np.load(found)
    truth = Permutation(num_permutations=20_000, seed=2**20).measure(game, query[None])

    def error(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean((values - truth.mean[0, :, 0]) ** 2)))

    wanted, count, rows = error(theirs["values"]), 2, []
    while not rows or rows[-1]["error"] > wanted:
        estimator = Permutation(num_permutations=count)
        seconds, moments = cpu_seconds(lambda estimator=estimator: estimator.measure(game, query[None]))  # type: ignore[misc]
        rows.append({"num_permutations": count, "cpu_seconds": seconds, "error": error(moments.mean[0, :, 0])})
        count = max(count + 2, int(count * 1.25) // 2 * 2)
    seconds, result = cpu_seconds(lambda: MeanField(form="total_gradient").init(game))
    return {
        "pydvl": {"num_permutations": num_permutations, "cpu_seconds": float(theirs["seconds"]), "error": wanted},
        "permutation": rows[-1],
        "mean_field": {"cpu_seconds": seconds, "error": error(result.representers[:, 0] @ query)},
        "speedup_to_same_error": float(theirs["seconds"]) / rows[-1]["cpu_seconds"],
        "root_mean_square_value": float(np.sqrt(np.mean(truth.mean**2))),
    }


def error_against_cost(features: SmsFeatures, num_draws: int = 16_384, num_players: int = 1_000) -> dict[str, Any]:
    """Run every estimator at several budgets."""
    game, queries = features.game(num_players), features.queries
    truth, noise = merged(list(reference(features, num_players, num_draws)))
    values = {name: lambda form=name: fields(form) for name in ("cavity", "total_gradient", "pairs")}

    def fields(form: str) -> np.ndarray:
        representers = MeanField(SHAPLEY, form=form).init(game).representers  # type: ignore[arg-type]
        return np.einsum("mp,ncp->mnc", queries, representers)[..., 0]

    runs: list[tuple[str, int, Callable[[], np.ndarray]]] = [(f"mean field, {k}", 0, run) for k, run in values.items()]
    for count in (16, 64, 256, 1024):
        runs.append(("subset", count, lambda k=count: Subset(num_draws=k).measure(game, queries).mean[..., 0]))
    for name, paired in (("antithetic permutations", True), ("plain permutations", False)):
        for count in (4, 16, 64, 256):
            estimator = Permutation(num_permutations=count, antithetic=paired)
            runs.append((name, count, lambda e=estimator: e.measure(game, queries).mean[..., 0]))
    cpu_seconds(lambda: Permutation(num_permutations=2).measure(game, queries))  # wakes the BLAS
    rows = []
    for name, count, run in runs:
        seconds, found = cpu_seconds(run)
        rows.append(
            {
                "method": name,
                "samples": count,
                "cpu_seconds": seconds,
                "relative_error": relative_error(found, truth, noise),
            }
        )
        print(rows[-1], flush=True)
    share = float(np.linalg.norm(noise) / np.linalg.norm(truth))
    return {"num_players": num_players, "num_queries": len(queries), "reference_noise": share, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Render the comparison for docs/kernel_game.md."""
    lines = ["| method | samples | CPU seconds | relative error |", "|---|---|---|---|"]
    for row in result["rows"]:
        samples = f"{row['samples']:,}" if row["samples"] else "none"
        lines.append(f"| {row['method']} | {samples} | {row['cpu_seconds']:.2f} | {row['relative_error']:.2%} |")
    return "\n".join(lines) + "\n"


def write_docs(result: dict[str, Any]) -> None:
    """Write the plot, and the table into its page."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == name]
        marker = "*" if name.startswith("mean field") else "o"
        axes.loglog(
            [row["cpu_seconds"] for row in rows],
            [100 * max(row["relative_error"], 1e-4) for row in rows],
            marker=marker,
            markersize=13 if marker == "*" else 5,
            label=name,
        )
    axes.set_xlabel("CPU seconds, one thread")
    axes.set_ylabel("relative error, %")
    axes.set_title(f"{result['num_players']:,} text messages, values for {result['num_queries']} queries")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})
    fill(PAGE, BEGIN, table(result), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("mean_field", "pydvl", "error_against_cost")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--draws", type=int, default=6_400, help="of the reference for 5,000 messages")
    parser.add_argument("--permutations", type=int, default=32, help="by pyDVL")
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(solve(*options.work)))
        return
    start, features = time.perf_counter(), load_features()
    print(f"features: {time.perf_counter() - start:.0f} s", flush=True)
    if "mean_field" in options.only:
        merge("mean_field_n5000_p512", mean_field(features, options.draws))
    if "pydvl" in options.only:
        merge("pydvl_n500", pydvl(features, options.permutations))
    if "error_against_cost" in options.only:
        merge("error_against_cost_n1000", error_against_cost(features))
    if found := json.loads(RESULT.read_text()).get("error_against_cost_n1000"):
        write_docs(found)
    kernel_game.write_docs()


if __name__ == "__main__":
    main()
