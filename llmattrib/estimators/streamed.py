"""The mean field of the kernel game in passes over the features, shared out over processes: for very many examples.

Same fixed point, quadrature and results as `mean_field`; nothing of size n x p is held. What is iterated is the matrix

    G = lam I + sum_i c_i phi_i phi_i^T,   s_i = phi_i^T G^-1 phi_i,   d_i from s_i,   c_i from d_i

so a round of the fixed point is one pass: each process reads its rows, and p x p sums are added up. Anderson
acceleration mixes matrices G in the coordinates where that of q = 1 is the identity.

Derivative. The total gradient is V = (q(1-q))^-1/2 N^-1 b U (docs/methods.md section 3). N = I - E differs from I by
one large eigenvalue and a bulk of hundredths. Here N^-1 is exact on the first few vectors of a Lanczos basis Q of E and
the identity outside of it:

    N^-1 = I + Q ((I - H)^-1 - I) Q^T,   H = Q^T E Q

(E x)_i = b_i phi_i^T P M P phi_i - (b_i s_i)^2 x_i with M = sum_j b_j x_j phi_j phi_j^T is again one pass. The basis
starts at the vector of ones: sum_i V_i = (q(1-q))^-1/2 1^T N^-1 b U, so what it gets right first is the sum rule, and
with it the values of queries along what the rows share. Left out is what the bulk does: about 1 % of all values.

Error against the total gradient, n = 160-400 real features and n = 1,500 in 64 dimensions, ridge 0.1, in brackets of
the cavity form: all values 0.5-1.5 % (0.7-1.8), values of the rows' own queries 0.6-2.6 % (0.7-16), of their mean
0.1-3 % (0.7-22), sum rule 1e-6-8e-4 (0.03-0.6), by 4 vectors; 8 add little.

Copies are players of their own; their values are equal. Grams and factors are float64; products with rows float64 up
to 2,048 rows, float32 beyond. Memory: 8 p^2 bytes for each node and some 30 p^2 numbers more, 4 numbers a row and node,
two chunks. Time: 6 to 8 passes a node, of 4 to 6 n p^2 flops each. Results depend on the number of processes by
rounding only.
Source: Saad 2003 (Lanczos); Walker and Ni 2011 (Anderson acceleration).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.estimators.fixed_point import accelerate, interpolate
from llmattrib.estimators.quadrature import SHIFT_FACTOR, NestedRule, Semivalue
from llmattrib.estimators.streamed_node import Derivative, Node, StreamedGame, add_gram, mirror, site
from llmattrib.games.kernel import FeatureRows
from llmattrib.memory import require_memory
from llmattrib.progress import Progress, silent

WIDE = 2048
"""Rows above which products with them are float32."""
_SAMPLED = 4096
"""Rows, evenly spaced, on which the size of the values is measured."""


@dataclass(frozen=True)
class StreamedResult:
    """A semivalue as a weighted sum over nodes.

    Attributes:
        terms: nodes with their weights.
        responses: [n] y.
        semivalue: its name.
        sum_rule_error: as of `MeanFieldResult`; the size of the values is taken from evenly spaced rows.
        quadrature_error: likewise.
        num_nodes: q-nodes evaluated.
        num_iterations: rounds of the fixed point.
        precision: dtype of products with rows.
        notes: what a reader of the values should know.
    """

    terms: tuple[tuple[float, Node], ...]
    responses: Float[np.ndarray, " n"]
    semivalue: str
    sum_rule_error: float | None
    quadrature_error: float | None
    num_nodes: int
    num_iterations: int
    precision: str
    notes: tuple[str, ...]

    def representers(self, start: int, rows: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "m p"]:
        """Return the representers of a chunk of this process's rows.

        Args:
            start: its first row.
            rows: the chunk whole.
        """
        return _values(self.terms, start, rows.astype(self.precision), self.responses[start : start + len(rows)])

    def products(
        self, start: int, rows: Float[np.ndarray, "m p"], queries: Float[np.ndarray, "q p"]
    ) -> Float[np.ndarray, "q m"]:
        """Return the values of a chunk's players for query features."""
        rows, responses = rows.astype(self.precision), self.responses[start : start + len(rows)]
        found = np.zeros((len(queries), len(rows)))
        for weight, node in self.terms:
            turned = (queries @ node.inverse.T.astype(np.float64)).astype(rows.dtype)
            found += weight * (turned @ node.white_values(start, rows, responses).T)
        return found


def _values(
    terms: Sequence[tuple[float, Node]],
    start: int,
    rows: Float[np.ndarray, "m p"],
    responses: Float[np.ndarray, " m"],
) -> Float[np.ndarray, "m p"]:
    values = np.zeros_like(rows)
    for weight, node in terms:
        values += weight * (node.white_values(start, rows, responses) @ node.inverse)
    return values


@dataclass(frozen=True)
class StreamedField:
    """The estimator.

    Attributes:
        tolerance: sum-rule error (Shapley) or quadrature error (else) to refine the nodes to.
        max_level: refinements allowed; level k has 8 * 2^k - 1 inner nodes.
        num_vectors: of the Lanczos basis; 0 is the cavity form.
        fixed_point_tolerance: largest relative change of G - lam I in the last round.
        max_iterations: rounds allowed for one node.
        max_bytes: memory allowed to a process; what is available when None.
    """

    tolerance: float = 1e-3
    max_level: int = 4
    num_vectors: int = 4
    fixed_point_tolerance: float = 1e-5
    max_iterations: int = 60
    max_bytes: int | None = None

    def sweep(
        self,
        features: FeatureRows,
        responses: Float[np.ndarray, " n"],
        ridge: float,
        semivalues: Sequence[Semivalue],
        progress: Progress = silent,
    ) -> list[StreamedResult]:
        """Solve the nodes of several semivalues, called by all processes; see `MeanField.sweep`.

        Args:
            features: the rows, of which this process has some; chunks are the same for any number of processes.
            responses: y of all rows.
            ridge: lam, absolute.
            semivalues: the measures over q.
            progress: called with (nodes done, nodes of the present rule).

        Raises:
            MethodError: it does not fit the memory, or the mean field does not converge.
        """
        run = _Run(self, features, responses.astype(np.float64), ridge, progress)
        items = [_Integral(NestedRule(semivalue, run.shift)) for semivalue in semivalues]
        run.refine([item for item in items if item.rule.semivalue.beta is not None])
        run.solve_points([item for item in items if item.rule.semivalue.beta is None])
        return [run.result(item) for item in items]

    def num_flops(self, num_rows: int, dim: int, num_rounds: int) -> int:
        """Return the FLOPs of one node: rounds, the basis, and the last pass."""
        return (3 * num_rounds + 4 + 6 * (self.num_vectors - 1) + 4) * num_rows * dim**2

    def num_bytes(self, num_rows: int, dim: int, num_nodes: int) -> int:
        """Return the memory that a process with some of the rows takes, chunks left out."""
        wide = 8 if num_rows <= WIDE else 4
        return dim**2 * (2 * wide * num_nodes + 8 * (20 + self.num_vectors)) + num_rows * (
            16 + wide * self.num_vectors * (num_nodes + 1)
        )


class _Integral:
    """Nodes of one semivalue, and its error.

    Attributes:
        rule: its measure and nodes.
        terms: (level, index, node); of points (-1, place among them, node).
        error: sum-rule error (Shapley) or that of the quadrature; None before the second level.
        change: of the sum of all values by the last refinement, relative.
        is_done: whether the tolerance is met.
    """

    def __init__(self, rule: NestedRule) -> None:
        self.rule = rule
        self.terms: list[tuple[int, int, Node]] = []
        self.error: float | None = None
        self.change: float | None = None
        self.is_done = False
        self._sum: np.ndarray | None = None

    def weighted(self, level: int) -> tuple[tuple[float, Node], ...]:
        """Return the nodes with their weights in the rule of a level."""
        points = self.rule.semivalue.points
        return tuple(
            (points[index][1] if at < 0 else self.rule.weight(at, index, level), node) for at, index, node in self.terms
        )

    def close(self, level: int, full: Float[np.ndarray, " p"], size: float) -> None:
        """Measure the error at a level."""
        total = sum(weight * node.total for weight, node in self.weighted(level))
        scale = max(float(np.linalg.norm(full)), 1e-3 * size) or 1.0
        self.change = None if self._sum is None else float(np.linalg.norm(total - self._sum)) / scale
        self._sum = np.asarray(total)
        self.error = float(np.linalg.norm(total - full)) / scale if self.rule.semivalue.is_shapley else self.change


class _Run:
    """One evaluation: the rows, and the fields solved so far."""

    def __init__(
        self,
        estimator: StreamedField,
        features: FeatureRows,
        responses: Float[np.ndarray, " n"],
        ridge: float,
        progress: Progress,
    ) -> None:
        self.estimator, self.features, self.ridge, self.progress = estimator, features, ridge, progress
        self.dim, self.num_rows = features.dim, features.num_rows
        self.dtype = np.dtype(np.float64 if features.num_rows <= WIDE else np.float32)
        self.game = StreamedGame(features, responses, ridge, self.dtype)
        self._require_memory(9)

        def visit(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
            wide = rows.astype(np.float64)
            norms = np.einsum("mp,mp->m", wide, wide) / ridge
            add_gram(sums[0], wide)
            add_gram(sums[1], wide / np.sqrt(1 + norms)[:, None])
            sums[2] += wide.T @ self.game.y(start, rows)

        gram, empty, moment = self.features.sums(visit, (self.dim, self.dim), (self.dim, self.dim), (self.dim,))
        gram, empty = mirror(gram), mirror(empty)
        factor = np.linalg.cholesky(self._regular(gram))
        self.metric = scipy.linalg.solve_triangular(factor, np.eye(self.dim), lower=True)
        self.full = scipy.linalg.cho_solve((factor, True), moment)
        self.shift = SHIFT_FACTOR * ridge / _largest(gram)
        self.known = {0.0: empty.astype(self.dtype), 1.0: gram.astype(self.dtype)}  # u -> (G - lam I)/q

    def refine(self, items: list[_Integral]) -> None:
        """Refine the nested rules of densities until each meets the tolerance; `MeanField` explains the order."""
        for level in range(self.estimator.max_level + 1):
            pending = [item for item in items if not item.is_done]
            nodes = pending[0].rule.nodes(level) if pending else []
            self._require_memory(len(self.known) + len(nodes))
            for done, (index, u) in enumerate(nodes):
                node = self._node(pending[0].rule.q(u), u, self.known)
                for item in pending:
                    item.terms.append((level, index, node))
                self.progress(done + 1, len(nodes))
            for item in pending:
                item.close(level, self.full, self._size(item.weighted(level)))
                item.is_done = item.error is not None and item.error <= self.estimator.tolerance

    def solve_points(self, items: list[_Integral]) -> None:
        """Solve the points of measures, each from the ends alone."""
        points = sorted({q for item in items for q, _ in item.rule.semivalue.points})
        for done, q in enumerate(points):
            ends = {u: self.known[u] for u in (0.0, 1.0)}
            node = self._node(q, items[0].rule.u(q), ends)
            for item in items:
                places = [place for place, (point, _) in enumerate(item.rule.semivalue.points) if point == q]
                item.terms += [(-1, place, node) for place in places]
            self.progress(done + 1, len(points))

    def result(self, item: _Integral) -> StreamedResult:
        """Gather what was found of one semivalue."""
        level = max((at for at, _, _ in item.terms), default=0)
        error, tolerance = item.error, self.estimator.tolerance
        notes = ["streamed: copies are not joined, and the total gradient is exact on a few directions only"]
        if error is not None and error > tolerance:
            notes.append(
                f"the q-axis is not resolved: error {error:.1e} above the tolerance {tolerance:.0e} "
                f"with {len(item.terms)} nodes; take a larger ridge"
            )
        return StreamedResult(
            terms=item.weighted(level),
            responses=self.game.responses,
            semivalue=item.rule.semivalue.name,
            sum_rule_error=error if item.rule.semivalue.is_shapley else None,
            quadrature_error=item.change,
            num_nodes=len(item.terms),
            num_iterations=sum(node.num_rounds for _, _, node in item.terms),
            precision=self.dtype.name,
            notes=tuple(notes),
        )

    def _size(self, terms: Sequence[tuple[float, Node]]) -> float:
        """Return the Frobenius norm of all values, from evenly spaced rows."""
        step = max(1, self.num_rows // _SAMPLED)

        def visit(sums: list[np.ndarray], start: int, rows: np.ndarray) -> None:
            values = np.zeros((len(range(-start % step, len(rows), step)), self.dim))
            for weight, node in terms:
                basis = {start: node.basis[start][-start % step :: step]} if node.basis else {}
                thin = Node(node.q, node.inverse, node.weights, basis, node.mixed, node.total, 0)
                chosen, wanted = rows[-start % step :: step].astype(self.dtype), self.game.y(start, rows)
                values += weight * (thin.white_values(start, chosen, wanted[-start % step :: step]) @ node.inverse)
            sums[0] += np.sum(values**2)

        return float(np.sqrt(step * self.features.sums(visit, (1,))[0][0]))

    def _regular(self, moment: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
        matrix = moment.copy()
        matrix[np.diag_indices(self.dim)] += self.ridge
        return matrix

    def _inverse(self, moment: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
        """Return L^-1 of lam I + moment = L L^T."""
        factor = np.linalg.cholesky(self._regular(moment))
        inverse: np.ndarray = scipy.linalg.solve_triangular(factor, np.eye(self.dim), lower=True)
        return inverse

    def _require_memory(self, num_nodes: int) -> None:
        size = self.estimator.num_bytes(self.num_rows, self.dim, num_nodes)
        what = f"a streamed mean field of {self.num_rows} examples in {self.dim} dimensions"
        require_memory(size, what, "use a smaller features.sketch.dim", self.estimator.max_bytes)

    def _solve(self, q: float, guess: Float[np.ndarray, "p p"]) -> tuple[np.ndarray, np.ndarray, int]:
        """Return L^-1 and the sum of c y phi at q, and the rounds it took."""
        moment = guess
        points: list[np.ndarray] = []
        steps: list[np.ndarray] = []
        for rounds in range(1, self.estimator.max_iterations + 1):
            try:
                inverse = self._inverse(moment)
            except np.linalg.LinAlgError:  # neither mixed nor interpolated matrices need be positive definite
                moment = self._unturn(points[-1] + steps[-1]) if points else self._safe_guess(q)
                inverse = self._inverse(moment)
            narrow = inverse.astype(self.dtype)

            def visit(sums: list[np.ndarray], start: int, rows: np.ndarray, narrow: np.ndarray = narrow) -> None:
                white = rows.astype(self.dtype) @ narrow.T
                weight = site(np.einsum("mp,mp->m", white, white), q).weight
                scaled = np.sqrt(weight)[:, None] * rows
                add_gram(sums[0], scaled)
                sums[1] += scaled.T @ (np.sqrt(weight) * self.game.y(start, rows))

            following, target = self.features.sums(visit, (self.dim, self.dim), (self.dim,))
            following = mirror(following)
            points, steps = [*points, self._turn(moment)][-4:], [*steps, self._turn(following - moment)][-4:]
            if np.linalg.norm(steps[-1]) <= self.estimator.fixed_point_tolerance * np.linalg.norm(
                points[-1] + steps[-1]
            ):
                return self._inverse(following), target, rounds
            moment = self._unturn(accelerate(points, steps))
        raise MethodError(
            f"the mean field at q = {q:.3g} has not converged after {self.estimator.max_iterations} rounds",
            expected=f"a relative change below {self.estimator.fixed_point_tolerance:g}",
            fix="take a larger reduce.ridge",
        )

    def _safe_guess(self, q: float) -> Float[np.ndarray, "p p"]:
        """Return a positive semidefinite matrix to start from: that of the end of the q-axis whose side q is on."""
        return q * self.known[0.0 if q < self.shift else 1.0].astype(np.float64)

    def _turn(self, matrix: Float[np.ndarray, "p p"]) -> Float[np.ndarray, " k"]:
        return np.asarray(self.metric @ matrix @ self.metric.T).ravel()

    def _unturn(self, turned: Float[np.ndarray, " k"]) -> Float[np.ndarray, "p p"]:
        left = scipy.linalg.solve_triangular(self.metric, turned.reshape(self.dim, self.dim), lower=True)
        matrix: np.ndarray = scipy.linalg.solve_triangular(self.metric, left.T, lower=True)
        return np.asarray((matrix + matrix.T) / 2)

    def _node(self, q: float, u: float, known: dict[float, np.ndarray]) -> Node:
        """Solve the mean field at q, and add its matrix to those known; the ends are, exactly."""
        guess = q * interpolate(u, known).astype(np.float64)
        inverse, target, rounds = self._solve(q, guess)
        if u not in known:
            found = scipy.linalg.solve_triangular(inverse, np.eye(self.dim), lower=True)
            moment = found @ found.T
            moment[np.diag_indices(self.dim)] -= self.ridge
            known[u] = (moment / q).astype(self.dtype)
        return Derivative(self.game, self.estimator.num_vectors, q, inverse.astype(self.dtype), inverse @ target).node(
            rounds
        )


def _largest(gram: Float[np.ndarray, "p p"]) -> float:
    """Return the largest eigenvalue by power iteration; a few per cent suffice."""
    vector = gram[np.argmax(np.diag(gram))]
    for _ in range(20):
        vector = gram @ (vector / np.linalg.norm(vector))
    return float(np.linalg.norm(vector))
