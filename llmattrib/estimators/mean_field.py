"""Deterministic Shapley values (and other semivalues) of the kernel game: a mean field integrated over q.

At each q the mean field (`fixed_point`) gives E[w_S] for S ~ Bernoulli(q). The value of player i is the derivative of
E[w_S] in its own probability, averaged over q. Three forms:

- `pairs` first averages every two players exactly (`pairs`), then differentiates through the fixed point. Keeps the
  efficiency axiom, sum_i v_i = w_N, up to quadrature, which the sum-rule error measures; of the bias below it says
  nothing.
- `total_gradient` differentiates the mean field through the fixed point. Keeps the axiom too; 2-5 times quicker.
- `cavity` holds the others' weights fixed: exact at q -> 0 and q = 1, O(n d^2); sums are off by 2-35 %.

The total gradient is written here so that one symmetric positive definite solve does it. With s = phi^T P phi,
U = rows r_i P phi_i, gain and variance as in `fixed_point.Sites`, b = sqrt(variance):

    V = gain b^-1 N^-1 b U,     N_ij = -b_i b_j (phi_i^T P phi_j)^2 off the diagonal, N_ii = 1

Equal to docs/methods.md section 3 (A = diag(gd) + H2 diag(cd) there; the diagonals of H2 cancel). Near-equal players
with equal responses are one group of copies, which stay players of their own.

Relative error against exact enumeration, n = 8-10, 40 games each, median (largest), ridge 0.1: p = 3: pairs 1.0 %
(1.9), total gradient 3.5 % (7.0), cavity 12 % (21); p = 20: 0.1 % (0.5), 0.6 % (1.5), 5 % (9). Ridge 1: pairs below
0.1 %. At n = 1,000, p = 16-1,000, ridge 0.01-1 total gradient and pairs differ by 0.01-0.2 %.

Precision: what a small ridge makes ill-conditioned (Grams, Cholesky factors, leverages) and totals are float64 always;
up to 2,048 groups the solve and the representers too. Above, these are float32, the solve iterative with a residual of
1e-4 (`response`): against float64 they are off by 1e-7 (cavity) and 1e-5 (total gradient) alike for ridges of 0.1 to
1e-6. `precision` of the result says which it was. Memory is checked before it is used.
Limits: n p in float64, no n x n system above 16 d groups; time about 3 n^2 d c flops a node, `pairs` about 12 n^2 d c
and 100 elementwise operations on n^2 more; every round of the fixed point 2 n d^2 in float64, all that `cavity` takes.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from llmattrib.errors import MethodError
from llmattrib.estimators.copies import Groups, group_copies
from llmattrib.estimators.fixed_point import TINY, Field, factorize, interpolate, solve_field
from llmattrib.estimators.pairs import pair_gradient
from llmattrib.estimators.q_profile import QProfile
from llmattrib.estimators.quadrature import SHAPLEY, SHIFT_FACTOR, NestedRule, Semivalue
from llmattrib.estimators.response import Direct, Iterative, response_bytes
from llmattrib.games.kernel import KernelGame
from llmattrib.memory import require_memory
from llmattrib.progress import Progress, silent

Form = Literal["pairs", "total_gradient", "cavity"]
LARGE = 2048
"""Groups above which the solve is iterative, in float32."""


@dataclass(frozen=True)
class MeanFieldResult:
    """Representers and how they came about.

    Attributes:
        representers: [n, c, p]; the value of player i for a query is <phi(query), representers[i]>.
        form: how the derivative was taken.
        semivalue: the measure over q.
        sum_rule_error: |sum_i v_i - w_N| / |w_N|, Frobenius norms over all responses; Shapley only, else None. Where
            values cancel (centred features and equal responses) the divisor is at least a thousandth of |V|.
        quadrature_error: change of sum_i v_i in the last refinement, in the same units; None without refinement.
        num_nodes: q-nodes evaluated.
        num_iterations: mean-field rounds over all nodes.
        num_groups: players after equal ones were joined.
        precision: dtype of the solve and the representers.
        response_residual: the largest of the iterative solves; None where all were direct, or there were none.
        seconds: wall time.
        notes: what a reader of the values should know.
    """

    representers: Float[np.ndarray, "n c p"]
    form: Form
    semivalue: str
    sum_rule_error: float | None
    quadrature_error: float | None
    num_nodes: int
    num_iterations: int
    num_groups: int
    precision: str
    response_residual: float | None
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MeanField:
    """The estimator.

    Attributes:
        semivalue: the measure over q.
        form: `pairs`, `total_gradient` or `cavity`, see the module.
        tolerance: sum-rule error (total gradient, Shapley) or quadrature error (else) to refine the nodes to.
        max_level: refinements allowed; level k has 8 * 2^k - 1 inner nodes.
        duplicate_tolerance: rows nearer than this, relative to their norm, with equal responses, are copies;
            None keeps every player by itself.
        fixed_point_tolerance: largest change of log d in the last round.
        max_iterations: rounds allowed for one node.
        max_bytes: memory allowed; what is available when None.
    """

    semivalue: Semivalue = SHAPLEY
    form: Form = "pairs"
    tolerance: float = 1e-3
    max_level: int = 4
    duplicate_tolerance: float | None = 1e-4
    fixed_point_tolerance: float = 1e-6
    max_iterations: int = 60
    max_bytes: int | None = None

    def init(self, game: KernelGame, progress: Progress = silent) -> MeanFieldResult:
        """Compute the representers of all players.

        Args:
            game: the kernel game.
            progress: called with (nodes done, nodes of the present rule).

        Raises:
            MethodError: it does not fit the memory, or the mean field does not converge.
        """
        return self.sweep(game, (self.semivalue,), progress)[0]

    def sweep(
        self, game: KernelGame, semivalues: Sequence[Semivalue], progress: Progress = silent
    ) -> list[MeanFieldResult]:
        """Compute the representers of several semivalues from one set of q-nodes; `semivalue` is not read.

        Densities share the nodes of their nested rules, and each stops at its own level; equal points are solved once.
        Results have the bytes that each semivalue would have by itself, and the node counts.

        Args:
            game: the kernel game.
            semivalues: the measures over q.
            progress: called with (nodes done, nodes of the present rule).

        Returns:
            One result for each semivalue, `seconds` being those of all together.

        Raises:
            MethodError: it does not fit the memory, or the mean field does not converge.
        """
        begin = time.perf_counter()
        self._check_memory(game, semivalues)
        groups = group_copies(game.space.coordinates, game.responses, self.duplicate_tolerance)
        run = _Run(self, game, groups, progress)
        results = [self._result(run, item, game, groups) for item in run.evaluate(semivalues)]
        return [replace(result, seconds=time.perf_counter() - begin) for result in results]

    def profile(
        self,
        game: KernelGame,
        queries: Float[np.ndarray, "m p"],
        players: Int[np.ndarray, " e"],
        progress: Progress = silent,
    ) -> QProfile:
        """Follow the values of some players along the q-axis, on the nodes that `init` integrates over.

        Args:
            game: the kernel game.
            queries: phi of the queries.
            players: rows of the game.
            progress: called with (nodes done, nodes of the present rule).

        Raises:
            MethodError: the semivalue is not a density, it does not fit the memory, or does not converge.
        """
        if self.semivalue.beta is None:
            raise MethodError(
                f"{self.semivalue.name} has no density over q to follow", expected="shapley or beta_shapley"
            )
        self._check_memory(game, (self.semivalue,))
        groups = group_copies(game.space.coordinates, game.responses, self.duplicate_tolerance)
        chosen, turned = groups.group[players], game.space.project(queries.astype(np.float64, copy=False))
        found: dict[float, np.ndarray] = {}

        def observe(u: float, node: Float[np.ndarray, "g c d"]) -> None:
            found[u] = np.einsum("md,ecd->mec", turned, node[chosen] / groups.counts[chosen, None, None])

        run = _Run(self, game, groups, progress, observe)
        (item,) = run.evaluate((self.semivalue,))
        return QProfile.of(item.rule, found)

    def _result(self, run: "_Run", item: "_Integral", game: KernelGame, groups: Groups) -> MeanFieldResult:
        members = item.sums.pop()
        total = members.sum(axis=0, dtype=np.float64)
        representers = (members / groups.counts[:, None, None].astype(members.dtype))[groups.group]
        semivalue = item.rule.semivalue
        result = MeanFieldResult(
            representers=np.stack([game.space.lift(representers[:, c]) for c in range(representers.shape[1])], axis=1),
            form=self.form,
            semivalue=semivalue.name,
            sum_rule_error=run.sum_rule_error(members, total) if semivalue.is_shapley else None,
            quadrature_error=item.change,
            num_nodes=item.num_nodes,
            num_iterations=item.num_iterations,
            num_groups=len(groups.counts),
            precision=run.dtype.name,
            response_residual=item.residual,
            seconds=0.0,
            notes=(),
        )
        return replace(result, notes=self._notes(result, len(game.features)))

    def _notes(self, result: MeanFieldResult, num_players: int) -> tuple[str, ...]:
        notes = []
        if result.num_groups < num_players:
            notes.append(
                f"{num_players - result.num_groups} of {num_players} examples repeat another one; "
                "copies share their group's value equally"
            )
        error = result.sum_rule_error if self.form != "cavity" else result.quadrature_error
        if error is not None and error > self.tolerance:
            notes.append(
                f"the q-axis is not resolved: error {error:.1e} above the tolerance {self.tolerance:.0e} "
                f"with {result.num_nodes} nodes; take a larger ridge"
            )
        if self.form == "cavity" and result.sum_rule_error is not None and result.sum_rule_error > self.tolerance:
            notes.append(
                f"the cavity form does not keep the sum rule (error {result.sum_rule_error:.1e}): "
                "ranks are reliable, shares of the total are not"
            )
        return tuple(notes)

    def num_bytes(self, n: int, p: int, c: int, semivalues: Sequence[Semivalue] = (SHAPLEY,)) -> int:
        """Return the memory that n players with p features and c responses take."""
        sums = sum(1 if semivalue.beta is None else self.max_level + 1 for semivalue in semivalues)
        wide, d = (8 if n <= LARGE else 4), min(n, p)
        rows = 8 * 4 * n * d + (8 * p * d if n < p else 0)
        rows += wide * n * (d * (c * (sums + 1) + 3) + c * p * len(semivalues))
        return rows + (response_bytes(n, d, wide) if self.form != "cavity" else 0)

    def _check_memory(self, game: KernelGame, semivalues: Sequence[Semivalue]) -> None:
        (n, p), c = game.features.shape, game.responses.shape[1]
        fix = "use a smaller features.sketch.dim"
        if self.form != "cavity":
            fix = "set reduce.form=cavity, which needs no n x n system"
        if len(semivalues) > 1:
            fix = "shorten reduce.methods, and lengthen it again in a second run: what is finished is kept"
        what = f"a mean field of {n} examples in {min(n, p)} dimensions"
        require_memory(self.num_bytes(n, p, c, semivalues), what, fix, self.max_bytes)


class _Integral:
    """What has been summed of one semivalue.

    Attributes:
        rule: its measure and nodes.
        sums: [g, c, d], of a density one for the present and each finer level, of points a single one.
        previous: [c, d] sum over all players at the level before.
        change: of that sum by the last refinement, relative.
        num_nodes: nodes summed.
        num_iterations: rounds they took.
        residual: the largest of their iterative solves.
        is_done: whether its tolerance is met, or no finer level allowed.
    """

    def __init__(self, rule: NestedRule, shape: tuple[int, ...], dtype: np.dtype[Any], num_levels: int) -> None:
        self.rule = rule
        self.sums = [np.zeros(shape, dtype) for _ in range(1 if rule.semivalue.beta is None else num_levels)]
        self.previous: np.ndarray | None = None
        self.change: float | None = None
        self.residual: float | None = None
        self.num_nodes = self.num_iterations = 0
        self.is_done = rule.semivalue.beta is None

    def add(self, weights: Iterable[float], node: "_Node") -> None:
        """Add a node to every sum."""
        for values, weight in zip(self.sums, weights, strict=True):
            values += weight * node.values
        self.num_nodes += 1
        self.num_iterations += node.num_iterations
        self.residual = max((x for x in (self.residual, node.residual) if x is not None), default=None)


class _Node(NamedTuple):
    values: Float[np.ndarray, "g c d"]
    num_iterations: int
    residual: float | None


def _unobserved(u: float, node: Float[np.ndarray, "g c d"]) -> None:
    """Look at no node."""


class _Run:
    """One evaluation: the game in groups, and the fields solved so far."""

    def __init__(
        self,
        estimator: MeanField,
        game: KernelGame,
        groups: Groups,
        progress: Progress,
        observe: Callable[[float, np.ndarray], None] = _unobserved,
    ) -> None:
        self.estimator, self.ridge, self.progress, self.observe = estimator, game.ridge, progress, observe
        self.coordinates = game.space.coordinates[groups.leaders]
        self.responses = game.responses[groups.leaders].astype(np.float64)
        self.counts = groups.counts
        self.dtype = np.dtype(np.float64 if len(groups.counts) <= LARGE else np.float32)
        factor, whitened = factorize(self.coordinates, self.counts.astype(np.float64), self.ridge)
        full = whitened.T @ (self.counts[:, None] * self.responses)
        self.full_weights = scipy.linalg.solve_triangular(factor, full, lower=True, trans="T").T
        leverage = np.einsum("gd,gd->g", whitened, whitened)
        norms = np.einsum("gd,gd->g", self.coordinates, self.coordinates)
        self.ends = {  # u -> log d, exact at both ends
            0.0: np.log(np.maximum(norms / self.ridge, TINY)),
            1.0: np.log(np.maximum(leverage / (1 - self.counts * leverage), TINY)),
        }

    def evaluate(self, semivalues: Sequence[Semivalue]) -> list[_Integral]:
        """Integrate over all measures; the last of each one's sums is its members' representers."""
        shape, shift = (*self.responses.shape, self.coordinates.shape[1]), self._shift()
        num_levels = self.estimator.max_level + 1
        items = [_Integral(NestedRule(semivalue, shift), shape, self.dtype, num_levels) for semivalue in semivalues]
        self._refine([item for item in items if item.rule.semivalue.beta is not None])
        self._points([item for item in items if item.rule.semivalue.beta is None])
        return items

    def _points(self, items: list[_Integral]) -> None:
        """Sum over point masses. Each is solved from the ends alone: its bytes do not depend on other points."""
        points = sorted({q for item in items for q, _ in item.rule.semivalue.points})
        for done, q in enumerate(points):
            node = self._node(q, items[0].rule.u(q), dict(self.ends))
            for item in items:
                for weight in (weight for point, weight in item.rule.semivalue.points if point == q):
                    item.add([weight], node)
            self.progress(done + 1, len(points))

    def _refine(self, items: list[_Integral]) -> None:
        """Integrate densities, refining their nested rules until each meets the tolerance.

        Nodes of a level start from those before, which are the same whichever densities are still open.
        """
        known, max_level = dict(self.ends), self.estimator.max_level
        for level in range(max_level + 1):
            pending = [item for item in items if not item.is_done]
            nodes = pending[0].rule.nodes(level) if pending else []
            for done, (index, u) in enumerate(nodes):
                node = self._node(pending[0].rule.q(u), u, known)
                self.observe(u, node.values)
                for item in pending:
                    item.add([item.rule.weight(level, index, finer) for finer in range(level, max_level + 1)], node)
                self.progress(done + 1, len(nodes))
            for item in pending:
                self._close(item)

    def _close(self, item: _Integral) -> None:
        """Measure the error of the present level: keep its sum alone where it will do, the finer ones otherwise."""
        values, semivalue = item.sums[0], item.rule.semivalue
        total = values.sum(axis=0, dtype=np.float64)
        item.change = None if item.previous is None else self._relative(total - item.previous, values)
        item.previous = total
        exact = self.estimator.form != "cavity" and semivalue.is_shapley
        error = self.sum_rule_error(values, total) if exact else item.change
        item.is_done = len(item.sums) == 1 or (error is not None and error <= self.estimator.tolerance)
        item.sums = [values] if item.is_done else item.sums[1:]

    def sum_rule_error(self, values: np.ndarray, total: np.ndarray) -> float:
        """Compare the sum of all values with the weights of the full model."""
        return self._relative(total - self.full_weights, values)

    def _relative(self, difference: np.ndarray, values: np.ndarray) -> float:
        member = values / np.sqrt(self.counts)[:, None, None]  # k members of V/k have norm V/sqrt(k)
        scale = max(float(np.linalg.norm(self.full_weights)), 1e-3 * float(np.linalg.norm(member)))
        return float(np.linalg.norm(difference)) / scale if scale else 0.0

    def _shift(self) -> float:
        """Return q0 = 30 lam / mu; mu by power iteration, a few per cent suffice."""
        vector = self.coordinates[np.argmax(np.einsum("gd,gd->g", self.coordinates, self.coordinates))]
        for _ in range(20):
            vector = vector / np.linalg.norm(vector)
            vector = self.coordinates.T @ (self.counts * (self.coordinates @ vector))
        return SHIFT_FACTOR * self.ridge / float(np.linalg.norm(vector))

    def _node(self, q: float, u: float, known: dict[float, np.ndarray]) -> _Node:
        """Return the group representers at q, and add its log d to those known."""
        field = solve_field(
            self.coordinates,
            self.counts,
            self.ridge,
            q,
            interpolate(u, known),
            tolerance=self.estimator.fixed_point_tolerance,
            max_iterations=self.estimator.max_iterations,
        )
        known[u] = np.log(field.cavity)
        residual = self.responses - field.whitened @ field.weights(self.responses)
        whitened = field.whitened.astype(self.dtype)
        gradient = _Gradient(field, whitened, self.estimator.form)
        columns = [field.unwhiten(gradient(column)) for column in residual.T.astype(self.dtype)]
        left = None if gradient.plain else gradient.response.residual
        return _Node(np.stack(columns, axis=1), field.num_iterations, left)


class _Gradient:
    """The derivative of E[w_S] in every group's q at one field, for any residual column."""

    def __init__(self, field: Field, whitened: Float[np.ndarray, "g d"], form: Form) -> None:
        self.whitened, self.sites, self.form = whitened, field.sites, form
        self.gain, self.b = (
            array.astype(whitened.dtype)[:, None] for array in (field.sites.gain, np.sqrt(field.sites.variance))
        )
        self.plain = form == "cavity" or not self.b.all()  # nothing scatters at q = 0 and q = 1
        if not self.plain:
            solver = Direct if whitened.dtype == np.float64 else Iterative
            self.response = solver(np.sqrt(self.b) * whitened, field.q)

    def _solve(self, rows: Float[np.ndarray, "g d"]) -> Float[np.ndarray, "g d"]:
        """Return gain b^-1 N^-1 rows."""
        return np.asarray(self.gain / self.b * self.response.solve(rows))

    def __call__(self, residual: Float[np.ndarray, " g"]) -> Float[np.ndarray, "g d"]:
        """Return whitened representers."""
        if self.plain:
            return np.asarray(self.gain * residual[:, None] * self.whitened)
        if self.form == "total_gradient":
            return self._solve(self.b * residual[:, None] * self.whitened)
        pairs, sites, dtype = pair_gradient(self.whitened, self.sites, residual), self.sites, residual.dtype
        per_weight = -1 / (sites.variance * sites.empty**2)  # dd/dc of a site at fixed q
        variance_c, skew_c = per_weight * sites.variance_d, per_weight * sites.skew_d
        along = [
            (derivative[:, None].astype(dtype), total[:, None].astype(dtype), rows)
            for derivative, total, rows in (
                (variance_c, sites.variance_q - sites.gain * variance_c, pairs.variance),
                (skew_c, sites.skew_q - sites.gain * skew_c, pairs.skew),
            )
        ]
        response = self._solve(self.b * (pairs.weight + sum(by_c * rows for by_c, _, rows in along)))
        return np.asarray(response + sum(direct * rows for _, direct, rows in along))
