"""The kernel game's estimators against published algorithms.

    python -m benchmarks.kernel_game [--sizes 500 2000] [--prompts 100] [--rounds 5] [--only mean_field_scaling]

`permutation_speedup`: `Permutation` against a plain restatement of the published incremental inverse (Wang et al. 2024,
FreeShap, vinfo/entks/ntk_regression.py): for each permutation the inverse of K_S + lam I grows by block inversion, one
player at a time, and every prefix predicts all prompts. The restatement does what the published code does at every
prefix: gather the sub-matrix, add lam I, join four blocks into a new inverse once for each class, and start from a
fresh inverse at every 500th player. The kernel matrices are given to it; ours is given the game as `reduce` holds it,
in the coordinates of its row space, and timed with its kernel matrix and moments, over its default of 200 permutations.
Two classes, one-hot labels, one thread, CPU time, float64; values are asserted equal. Two stronger versions are
measured beside it: `one_inverse` inverts once, not once for each class; `lean` is the algorithm as favourably as we can
write it, with one array that is updated in place and matrices sorted once.

`mean_field_scaling`: `MeanField` to its default tolerance, one response, 512 dimensions, ridge 0.1, a process of two
threads for each row: wall and CPU seconds of `init`, peak memory of the process (the game's making included), sum-rule
error, products of E at all nodes (`estimators.response`) and the machine's load when it began. `slope` is d log CPU
seconds / d log n of the cavity form by least squares; `slope_a_round` the same of seconds a fixed-point round, since
the number of nodes varies.

Results are merged by key into benchmarks/results/kernel_game.json; its tables are written into docs/kernel_game.md.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill
from benchmarks._process import measured, peak_bytes
from llmattrib.estimators import response
from llmattrib.estimators.mean_field import MeanField
from llmattrib.estimators.permutation import Permutation
from llmattrib.games.kernel import KernelGame, row_space
from llmattrib.rng import stream

RESULT = Path(__file__).parent / "results" / "kernel_game.json"
PAGE = Path(__file__).parents[1] / "docs" / "kernel_game.md"
BEGIN, END = "<!-- scaling:begin -->\n", "<!-- scaling:end -->\n"
SPEED_BEGIN, SPEED_END = "<!-- permutation:begin -->\n", "<!-- permutation:end -->\n"


def merge(key: str, value: Any) -> None:
    """Set one key of the result file."""
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(tree | {key: value}, indent=2) + "\n")


def make_game(num_players: int, dim: int, num_prompts: int) -> tuple[KernelGame, np.ndarray]:
    """Unit rows with a decaying spectrum and a shared direction, labels that they partly explain."""
    draws = stream(0, "benchmark", "kernel_game", num_players)
    features = draws.standard_normal((num_players + num_prompts, dim)) * np.arange(1, dim + 1) ** -0.5 + 0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    label = features @ draws.standard_normal(dim) + 0.3 * draws.standard_normal(len(features)) > 0
    responses = np.stack([label, ~label], axis=1).astype(np.float64)
    space = row_space(features[:num_players])
    game = KernelGame.relative(space.coordinates, responses[:num_players], 0.1)
    return game, space.project(features[num_players:])


class Published:
    """One prefix after the other by block inversion.

    Args:
        game: its features give the kernel matrix.
        queries: prompts.
        every_class: whether the inverse is computed once for each class, as published.
    """

    def __init__(self, game: KernelGame, queries: np.ndarray, every_class: bool) -> None:
        self.kernel, self.cross = game.features @ game.features.T, queries @ game.features.T
        self.ridge, self.responses, self.every_class = game.ridge, game.responses, every_class
        self.inverse: np.ndarray | None = None

    def gains(self, order: np.ndarray) -> np.ndarray:
        """Gains of a permutation: [prompts, players, classes]."""
        gains = np.empty((*self.cross.shape, self.responses.shape[1]))
        before = np.zeros((len(self.cross), self.responses.shape[1]))
        for size in range(1, len(order) + 1):
            prediction = self.predict(order[:size])
            gains[:, order[size - 1]] = prediction - before
            before = prediction
        return gains

    def predict(self, members: np.ndarray) -> np.ndarray:
        """Predict all prompts from a prefix, given the inverse of the one before."""
        kernel = self.kernel[members[:, None], members]
        kernel = kernel + np.eye(len(members)) * self.ridge
        grown = None
        predictions = []
        for wanted in self.responses[members].T:
            if grown is None or self.every_class:
                grown = self.grow(kernel)
            predictions.append(self.cross[:, members] @ (grown @ wanted))
        self.inverse = grown
        return np.stack(predictions, axis=1)

    def grow(self, kernel: np.ndarray) -> np.ndarray:
        """Invert by blocks; afresh at the first and every 500th player."""
        k = len(kernel) - 1
        if k == 0 or (k + 1) % 500 == 0:
            return np.linalg.inv(kernel)
        b, c, d, inverse = kernel[:k, k:], kernel[k:, :k], kernel[k:, k:], self.inverse
        rest = d - c @ (inverse @ b)
        upper = [inverse + (inverse @ b) @ (np.linalg.inv(rest) @ (c @ inverse)), -inverse @ (b @ np.linalg.inv(rest))]
        lower = [-(np.linalg.inv(rest) @ c) @ inverse, np.linalg.inv(rest)]
        return np.concatenate([np.concatenate(upper, axis=1), np.concatenate(lower, axis=1)], axis=0)


def lean_gains(game: KernelGame, queries: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The same with one array and rank-one updates in place: [prompts, players, classes]."""
    features, responses, n = game.features[order], game.responses[order], len(order)
    kernel, cross = features @ features.T + game.ridge * np.eye(n), np.asfortranarray(queries @ features.T)
    inverse = np.zeros((n, n), order="F")
    predictions = np.zeros((n + 1, len(queries), responses.shape[1]))
    for k in range(n):
        column = inverse[:k, :k] @ kernel[:k, k]
        rest = 1 / (kernel[k, k] - kernel[k, :k] @ column)
        inverse[:k, :k] += np.outer(rest * column, column)
        inverse[:k, k] = inverse[k, :k] = -rest * column
        inverse[k, k] = rest
        predictions[k + 1] = cross[:, : k + 1] @ (inverse[: k + 1, : k + 1] @ responses[: k + 1])
    gains = np.empty((len(queries), n, responses.shape[1]))
    gains[:, order] = np.moveaxis(np.diff(predictions, axis=0), 0, 1)
    return gains


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call and what it returned."""
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def permutation_speedup(
    num_players: int, dim: int, num_prompts: int, rounds: int, published_rounds: int
) -> dict[str, Any]:
    """Time a permutation by each algorithm."""
    game, queries = make_game(num_players, dim, num_prompts)
    order = stream(0, "permutation", 0).permutation(num_players)
    slow = {
        "published": lambda: Published(game, queries, True).gains(order),
        "one_inverse": lambda: Published(game, queries, False).gains(order),
        "lean": lambda: lean_gains(game, queries, order),
    }
    many = Permutation()
    load, count = os.getloadavg()[0], many.num_permutations
    ours = Permutation(num_permutations=1, antithetic=False).measure(game, queries).mean  # also wakes the BLAS
    times: dict[str, list[float]] = {name: [] for name in ("ours", *slow)}
    difference = 0.0
    for number in range(rounds):
        times["ours"].append(cpu_seconds(lambda: many.measure(game, queries))[0] / count)
        for name, run in slow.items() if number < published_rounds else ():
            seconds, found = cpu_seconds(run)
            times[name].append(seconds)
            difference = max(difference, float(np.abs(found - ours).max() / np.abs(ours).max()))
    assert difference < 1e-8, difference
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    row = {
        "num_players": num_players,
        "dim": dim,
        "num_prompts": num_prompts,
        "path": type(many._solver(game, queries)).__name__.strip("_").lower(),
        "rounds": rounds,
        "published_rounds": published_rounds,
        "num_permutations": count,
        "load_average_before": load,
        "cpu_seconds_a_permutation": seconds,
        "range": {name: [min(values), max(values)] for name, values in times.items()},
        "speedup": {name: seconds[name] / seconds["ours"] for name in slow},
        "largest_relative_difference": difference,
    }
    print(json.dumps(row, indent=2))
    return row


def mean_field_row(form: str, num_players: int) -> dict[str, Any]:
    """Time one mean field, in this process."""
    both, _ = make_game(num_players, 512, 1)
    game = KernelGame(both.features, both.responses[:, :1], both.ridge)
    solvers: list[response.Iterative] = []
    solve = response.Iterative.solve

    def recorded(solver: response.Iterative, sides: np.ndarray) -> np.ndarray:
        solvers.append(solver)
        return solve(solver, sides)

    response.Iterative.solve = recorded  # type: ignore[method-assign]
    load, begin = os.getloadavg()[0], time.perf_counter()
    cpu, result = cpu_seconds(lambda: MeanField(form=form).init(game))  # type: ignore[arg-type]
    return {
        "form": form,
        "num_players": num_players,
        "wall_seconds": time.perf_counter() - begin,
        "cpu_seconds": cpu,
        "load_average_before": load,
        "peak_memory_bytes": peak_bytes(),
        "sum_rule_error": result.sum_rule_error,
        "quadrature_error": result.quadrature_error,
        "num_nodes": result.num_nodes,
        "num_rounds": result.num_iterations,
        "num_products": [solver.num_products for solver in solvers],
        "residual": max((solver.residual for solver in solvers), default=None),
    }


def mean_field_scaling(gradient_sizes: list[int], cavity_sizes: list[int]) -> dict[str, Any]:
    """Time the mean field at growing sizes, each in a process of two threads."""
    rows = []
    for form, sizes in (("total_gradient", gradient_sizes), ("cavity", cavity_sizes)):
        for size in sizes:
            rows.append(measured("kernel_game", form, str(size), threads=2))
            print(json.dumps(rows[-1]), flush=True)
    cavity = [row for row in rows if row["form"] == "cavity"]
    size = np.log([row["num_players"] for row in cavity])
    seconds = np.array([row["cpu_seconds"] for row in cavity])
    rounds = np.array([row["num_rounds"] for row in cavity])
    return {
        "slope": float(np.polyfit(size, np.log(seconds), 1)[0]),
        "slope_a_round": float(np.polyfit(size, np.log(seconds / rounds), 1)[0]),
        "rows": rows,
    }


def scaling_table(result: dict[str, Any]) -> str:
    """Render the scaling for docs/kernel_game.md."""
    lines = [
        "| form | examples | wall seconds, 2 threads | CPU seconds | fixed-point rounds | peak memory | sum rule |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['form']} | {row['num_players']:,} | {row['wall_seconds']:.0f} | {row['cpu_seconds']:.0f} "
            f"| {row['num_rounds']} | {row['peak_memory_bytes'] / 1e9:.2f} GB | {row['sum_rule_error']:.1e} |"
        )
    slopes = f"{result['slope']:.2f} in all, {result['slope_a_round']:.2f} a round"
    return "\n".join([*lines, "", f"CPU seconds of the cavity form grow with the power {slopes}, of n."]) + "\n"


def speed_table(speedup: dict[str, Any], pydvl: dict[str, Any]) -> str:
    """Render the times of a permutation, and the comparison with pyDVL, for docs/kernel_game.md."""
    names = ("ours", "published", "one_inverse", "lean")
    lines = ["| examples | ours | published | one inverse | lean |", "|---|---|---|---|---|"]
    for row in speedup["rows"]:
        seconds, ratio = row["cpu_seconds_a_permutation"], {"ours": 1.0} | row["speedup"]
        cells = (f"{seconds[name]:.2g} ({ratio[name]:,.0f} x)" for name in names)
        lines.append(f"| {row['num_players']:,} | {' | '.join(cells)} |")
    theirs, ours, field = pydvl["pydvl"], pydvl["permutation"], pydvl["mean_field"]
    size = pydvl["root_mean_square_value"]
    lines += [
        "",
        f"pyDVL's antithetic permutations of the same kernel ridge utility, {theirs['num_permutations']} of 500 "
        f"examples for one query, take {theirs['cpu_seconds']:.0f} s. Their root-mean-square error is "
        f"{theirs['error'] / size:.0%} of the values' root mean square (values of zero would have 100%); ours reach it "
        f"in {ours['cpu_seconds']:.2g} s ({ours['num_permutations']} permutations, {ours['error'] / size:.0%}): "
        f"{pydvl['speedup_to_same_error']:,.0f} times quicker to an error of {theirs['error'] / size:.0%}. The mean "
        f"field has {field['error'] / size:.0%} after {field['cpu_seconds']:.2g} s.",
    ]
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """Write the tables of what is measured into their page; pyDVL is by `benchmarks.kernel_accuracy`."""
    result = json.loads(RESULT.read_text())
    if "mean_field_scaling" in result:
        fill(PAGE, BEGIN, scaling_table(result["mean_field_scaling"]), END)
    if {"permutation_speedup", "pydvl_n500"} <= set(result):
        fill(PAGE, SPEED_BEGIN, speed_table(result["permutation_speedup"], result["pydvl_n500"]), SPEED_END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many")
    parser.add_argument("--published-rounds", type=int, default=2, help="of the published ones from 2,000")
    parser.add_argument("--gradient-sizes", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--cavity-sizes", type=int, nargs="+", default=[1_000, 3_000, 10_000, 30_000, 100_000])
    parser.add_argument("--only", choices=["permutation_speedup", "mean_field_scaling"])
    parser.add_argument("--work", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        form, size = options.work
        print(json.dumps(mean_field_row(form, int(size))))
        return
    if options.only != "mean_field_scaling":
        rows = [
            permutation_speedup(
                size,
                options.dim,
                options.prompts,
                options.rounds,
                options.rounds if size < 2000 else options.published_rounds,
            )
            for size in options.sizes
        ]
        speedups = {f"n{row['num_players']}": row["speedup"]["published"] for row in rows}
        merge("permutation_speedup", speedups | {"rows": rows})
    if options.only != "permutation_speedup":
        merge("mean_field_scaling", mean_field_scaling(options.gradient_sizes, options.cavity_sizes))
    write_docs()


if __name__ == "__main__":
    main()
