"""Exact semivalues of the kernel game: every subset, for checking the other estimators.

A semivalue draws q from its measure and S with every player in it with probability q, so subset S has the chance
W_|S| = E[q^|S| (1-q)^(n-|S|)], a Beta function for Beta densities, and

    v_i = sum over all S of W_|S| (w_{S+i} - w_{S-i})

Limits: 2^n solves; 16 players (65,536 solves, about a minute) are the most. Source: definition.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln

from llmattrib.errors import MethodError
from llmattrib.estimators.quadrature import SHAPLEY, Semivalue
from llmattrib.estimators.subset import SubsetResult
from llmattrib.games.kernel import KernelGame

MAX_PLAYERS = 16


@dataclass(frozen=True)
class Enumeration:
    """The estimator.

    Attributes:
        semivalue: the measure over q.
    """

    semivalue: Semivalue = SHAPLEY

    def init(self, game: KernelGame) -> SubsetResult:
        """Compute the representers of all players.

        Raises:
            MethodError: more players than 16.
        """
        begin, n = time.perf_counter(), len(game.features)
        if n > MAX_PLAYERS:
            raise MethodError(
                f"enumeration of the subsets of {n} examples",
                expected=f"at most {MAX_PLAYERS} examples",
                fix="use the mean field, subsets or permutations",
            )
        total = np.zeros((n, game.responses.shape[1], game.features.shape[1]))
        for case in itertools.product([False, True], repeat=n):
            members = np.array(case)
            total += self.chance(int(members.sum()), n) * game.marginals(members)
        return SubsetResult(total, self.semivalue.name, 2**n, time.perf_counter() - begin)

    def chance(self, size: int, num_players: int) -> float:
        """Return the chance of one given subset of a size."""
        if self.semivalue.beta is not None:
            a, b = self.semivalue.beta
            return float(np.exp(betaln(a + size, b + num_players - size) - betaln(a, b)))
        return sum(w * q**size * (1 - q) ** (num_players - size) for q, w in self.semivalue.points)
