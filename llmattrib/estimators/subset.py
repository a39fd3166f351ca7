"""Unbiased semivalues of the kernel game from random subsets: one solve gives the marginals of all players.

A draw is a probability q and a subset S with every player in it with probability q. Then, for every player i,

    v(S+i) - v(S-i) = phi(x)^T P_S phi_i r_i / (1 + h_i)  (i outside S)   or / (1 - h_i)  (i in S)

is an unbiased sample of its value at q; the semivalue is the mean over q. Draws are stratified in u, uniform on [0, 1]:
for Shapley q = u^2 with weight 2 sqrt(q), which puts draws where most happens; for Beta densities q is the inverse
distribution function at u; for point masses the points are met in proportion to their weights. Draws come in blocks
with one draw per stratum, in random order: every draw by itself, and so any number of them, is unbiased. Draw k
depends on the seed and k only, so workers take ranges of k and merge.

A subset below d = min(n, p) players is solved by its own kernel matrix (dual), a larger one in d dimensions (primal):
about n d^2 flops and the Gram of |S| rows. Errors shrink as 1/sqrt(draws), at any ridge; one Shapley draw of
n = 400 gives about what 4-5 permutations do. Copies are players of their own here.
Source: docs/methods.md section 3.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float
from scipy.special import betaincinv

from llmattrib.estimators.moments import Moments
from llmattrib.estimators.quadrature import SHAPLEY, Semivalue
from llmattrib.games.kernel import KernelGame
from llmattrib.memory import require_memory
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream


@dataclass(frozen=True)
class Draw:
    """One random subset.

    Attributes:
        q: the probability its players were drawn with.
        weight: importance weight of q.
        members: [n] who is in it.
    """

    q: float
    weight: float
    members: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class SubsetResult:
    """Mean representers.

    Attributes:
        representers: [n, c, p]; the estimate for player i and a query is <phi(query), representers[i]>.
        semivalue: the measure over q.
        num_draws: subsets solved.
        seconds: wall time.
    """

    representers: Float[np.ndarray, "n c p"]
    semivalue: str
    num_draws: int
    seconds: float


@dataclass(frozen=True)
class Subset:
    """The estimator.

    Attributes:
        semivalue: the measure over q.
        num_draws: subsets.
        seed: of the draws.
        first_draw: number of the first one; disjoint ranges are samples that can be merged.
        num_strata: draws in a block, one for each stratum of u.
        max_bytes: memory allowed; what is available when None.
    """

    semivalue: Semivalue = SHAPLEY
    num_draws: int = 256
    seed: int = 0
    first_draw: int = 0
    num_strata: int = 16
    max_bytes: int | None = None

    def init(self, game: KernelGame, progress: Progress = silent) -> SubsetResult:
        """Estimate the representers of all players.

        Args:
            game: the kernel game.
            progress: called with (draws done, draws).

        Raises:
            MethodError: it does not fit the memory.
        """
        begin = time.perf_counter()
        (n, d), c = game.space.coordinates.shape, game.responses.shape[1]
        self._check_memory(8 * n * ((c + 3) * d + c * game.features.shape[1]))
        total = np.zeros((n, c, d))
        for done, draw in enumerate(self.draws(n)):
            solved = SolvedSubset(game, draw.members)
            total += (draw.weight / self.num_draws) * solved.factors[:, :, None] * solved.representers()[:, None, :]
            progress(done + 1, self.num_draws)
        lifted = np.stack([game.space.lift(total[:, output]) for output in range(c)], axis=1)
        return SubsetResult(lifted, self.semivalue.name, self.num_draws, time.perf_counter() - begin)

    def measure(self, game: KernelGame, queries: Float[np.ndarray, "m p"], progress: Progress = silent) -> Moments:
        """Estimate the values of all players for query features, with their uncertainty.

        Args:
            game: the kernel game.
            queries: phi of the queries.
            progress: called with (draws done, draws).

        Returns:
            Moments of shape [m, n, c].

        Raises:
            MethodError: it does not fit the memory.
        """
        shape = (len(queries), *game.responses.shape)
        self._check_memory(8 * (7 * int(np.prod(shape)) + 3 * game.space.coordinates.size))
        return Moments.of(self.samples(game, queries, progress), shape)

    def samples(
        self, game: KernelGame, queries: Float[np.ndarray, "m p"], progress: Progress = silent
    ) -> Iterator[Float[np.ndarray, "m n c"]]:
        """Yield one weighted sample of all values for every draw; their mean is the estimate."""
        turned = game.space.project(queries.astype(np.float64, copy=False))
        for done, draw in enumerate(self.draws(len(game.features))):
            solved = SolvedSubset(game, draw.members)
            yield solved.effects(turned)[:, :, None] * (draw.weight * solved.factors)
            progress(done + 1, self.num_draws)

    def draws(self, num_players: int) -> Iterator[Draw]:
        """Yield the subsets of this range of draws."""
        last = self.first_draw + self.num_draws
        for block in range(self.first_draw // self.num_strata, -(-last // self.num_strata)):
            rng = stream(self.seed, "subset", self.num_strata, block)
            u = (rng.permutation(self.num_strata) + rng.random(self.num_strata)) / self.num_strata
            for number, position in enumerate(u, start=block * self.num_strata):
                q, weight = self._locate(float(position))
                members = rng.random(num_players) < q  # drawn for skipped ones too: draw k never depends on the range
                if self.first_draw <= number < last:
                    yield Draw(q, weight, members)

    def _locate(self, u: float) -> tuple[float, float]:
        """Return q at a uniform u, and its importance weight."""
        if self.semivalue.is_shapley:
            return u * u, 2 * u
        if self.semivalue.beta is not None:
            return float(betaincinv(*self.semivalue.beta, u)), 1.0
        steps = np.cumsum([weight for _, weight in self.semivalue.points])
        chosen = min(int(np.searchsorted(steps, u * steps[-1], side="right")), len(steps) - 1)
        return self.semivalue.points[chosen][0], float(steps[-1])

    def _check_memory(self, num_bytes: int) -> None:
        fix = "take fewer queries at a time, or a smaller features.sketch.dim"
        require_memory(num_bytes, "sampling subsets", fix, self.max_bytes)


class SolvedSubset:
    """One subset, solved; the marginal of player i is effects[:, i] * factors[i].

    Attributes:
        factors: [n, c] r_i / (1 + h_i) outside S, r_i / (1 - h_i) inside.
    """

    factors: Float[np.ndarray, "n c"]

    def __init__(self, game: KernelGame, members: Bool[np.ndarray, " n"]) -> None:
        self.coordinates, self.ridge = game.space.coordinates, game.ridge
        self.rows = self.coordinates[members]
        responses = game.responses.astype(np.float64, copy=False)
        self.is_dual = len(self.rows) <= self.coordinates.shape[1]
        gram = self.rows @ self.rows.T if self.is_dual else self.rows.T @ self.rows
        gram[np.diag_indices(len(gram))] += self.ridge
        self.factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        # lam P = I - A A^T in the dual, P = A A^T in the primal; `whitened` holds rows A^T phi_i.
        sides = self.rows @ self.coordinates.T if self.is_dual else self.coordinates.T
        self.whitened = self._halve(sides)
        square = np.einsum("kn,kn->n", self.whitened, self.whitened)
        if self.is_dual:
            target = self.whitened.T @ self._halve(responses[members])
            norms = np.einsum("nd,nd->n", self.coordinates, self.coordinates)
            divisor = 1 + np.maximum(norms - square, 0) / self.ridge
            inverse = self._halve(np.eye(len(self.rows)))
            divisor[members] = self.ridge * np.einsum("kn,kn->n", inverse, inverse)  # 1 - h_i without cancellation
        else:
            target = self.whitened.T @ (self.whitened[:, members] @ responses[members])
            divisor = np.where(members, 1 - square, 1 + square)
        self.factors = (responses - target) / divisor[:, None]

    def effects(self, queries: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m n"]:
        """Return phi(x)^T P_S phi_i."""
        if not self.is_dual:
            return np.asarray(self._halve(queries.T).T @ self.whitened)
        half = self._halve(self.rows @ queries.T)
        return np.asarray((queries @ self.coordinates.T - half.T @ self.whitened) / self.ridge)

    def representers(self) -> Float[np.ndarray, "n d"]:
        """Return P_S phi_i of all players."""
        rest = scipy.linalg.solve_triangular(self.factor, self.whitened, lower=True, trans="T", check_finite=False)
        if not self.is_dual:
            return np.asarray(rest.T)
        return np.asarray((self.coordinates - rest.T @ self.rows) / self.ridge)

    def _halve(self, sides: Float[np.ndarray, "k m"]) -> Float[np.ndarray, "k m"]:
        """Apply the inverse of the Cholesky factor."""
        return np.asarray(scipy.linalg.solve_triangular(self.factor, sides, lower=True, check_finite=False))
