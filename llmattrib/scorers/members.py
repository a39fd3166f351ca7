"""An ensemble by the sum of scores: each member has a curvature of its own, and values are the mean of the members'.

Features of k adapters stand side by side, each divided by sqrt(k), so that plain inner products are means of kernels.
A scorer with a curvature sees one matrix over all of them: influence of the mean kernel. Here every member's columns
are scored by themselves, undivided, as a run of that adapter alone would, and divided again:

    v_i = (A_1 g_i1, ..., A_k g_ik) / sqrt(k),     <phi(query), v_i> = mean over members of <g_q, A_m g_i>

so the index and the query stay one inner product. What is not a column is shared: TRAK weighs by the log-odds of the
store, which are the mean of the members'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib.games.kernel import Blocks, FeatureRows
from llmattrib.scorers.gradient import Scorer


@dataclass(frozen=True)
class Members:
    """A scorer for each member.

    Attributes:
        scorers: of the members.
        widths: columns of each member, in order.
    """

    scorers: tuple[Scorer[Any], ...]
    widths: tuple[int, ...]

    def init(self, features: FeatureRows) -> list[Any]:
        """Return the state of each member.

        Raises:
            MethodError: as the members' scorers.
        """
        assert sum(self.widths) == features.dim
        states = []
        for scorer, part in zip(self.scorers, self._parts(), strict=True):
            everything = None if features.everything is None else partial(self._columns, features.everything, part)
            own = FeatureRows(
                partial(self._columns, features.blocks, part),
                features.num_rows,
                part.stop - part.start,
                features.max_bytes,
                features.total,
                everything,
            )
            states.append(scorer.init(own))
        return states

    def compute(
        self, state: Sequence[Any], rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the representers of all members side by side."""
        scale = np.float32(len(self.widths) ** 0.5)
        found = [
            scorer.compute(own, rows[:, part] * scale, log_odds) / scale
            for scorer, own, part in zip(self.scorers, state, self._parts(), strict=True)
        ]
        return np.concatenate(found, axis=1)

    def _columns(self, blocks: Blocks, part: slice) -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
        scale = np.float32(len(self.widths) ** 0.5)
        return ((start, rows[:, part] * scale) for start, rows in blocks())

    def _parts(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(np.cumsum([0, *self.widths]).tolist())]
