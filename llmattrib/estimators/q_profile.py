"""Where on the q-axis a value is earned: at small q, beside few other examples, or late, beside nearly all.

With V_i(q) the mean marginal contribution of player i to a subset that holds each other player with probability q, a
semivalue is the integral of V_i(q) over its density. Here are V_i at the nodes of its quadrature rule, and the part of
the integral below each node: the integrand's interpolating polynomial in u (see `quadrature`), integrated exactly, so
that the last part is the quadrature's own sum. At q = 1 V_i is leave-one-out.

Limits: parts below a node have the rule's error in absolute terms; where a value nearly cancels, shares of it say
nothing. Source: docs/methods.md section 3; Owen 1972 (the integral); Trefethen 2008 (Clenshaw-Curtis).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.polynomial import chebyshev

from llmattrib.estimators.quadrature import NestedRule, clenshaw_curtis


@dataclass(frozen=True)
class QProfile:
    """Values along the q-axis.

    Attributes:
        semivalue: whose nodes these are.
        q: [k] nodes, ascending from 0 to 1.
        weights: [k] of the nodes in the semivalue, its density included.
        values: [k, m, e, c] V(q) of e players for m queries and c responses.
        earned: [k, m, e, c] the part of the semivalue below each node, 0 at the first and all of it at the last.
    """

    semivalue: str
    q: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    values: Float[np.ndarray, "k m e c"]
    earned: Float[np.ndarray, "k m e c"]

    @classmethod
    def of(cls, rule: NestedRule, values: Mapping[float, Float[np.ndarray, "m e c"]]) -> "QProfile":
        """Integrate values at all nodes u of a level of a rule."""
        nodes = sorted(values)
        num_intervals = len(nodes) - 1
        level = rule.level(num_intervals)
        u, plain = clenshaw_curtis(num_intervals)
        weights = np.array([rule.weight(level, index, level) for index in range(len(nodes))])
        stacked = np.stack([values[node] for node in nodes])
        integrand = (weights / plain)[:, None, None, None] * stacked
        x = 2 * u - 1
        coefficients = np.linalg.solve(chebyshev.chebvander(x, num_intervals), integrand.reshape(len(nodes), -1))
        antiderivative = chebyshev.chebint(coefficients, lbnd=-1, scl=1, axis=0) / 2
        earned = chebyshev.chebval(x, antiderivative).T.reshape(stacked.shape)
        return cls(rule.semivalue.name, np.array([rule.q(node) for node in nodes]), weights, stacked, earned)

    def mean(self) -> "QProfile":
        """Return the profile of the mean over queries."""
        values, earned = (array.mean(axis=1, keepdims=True) for array in (self.values, self.earned))
        return QProfile(self.semivalue, self.q, self.weights, values, earned)

    def shares(self) -> Float[np.ndarray, "k m e c"]:
        """Return `earned` over the whole value; NaN where that is zero."""
        whole = self.earned[-1]
        return np.asarray(self.earned / np.where(whole == 0, np.nan, whole))
