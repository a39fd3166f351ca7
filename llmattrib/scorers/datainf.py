"""DataInf: influence with the inverse of a mean replaced by the mean of inverses, block by block.

    v_i = (1/lam) [phi_i - mean_j phi_j <phi_j, phi_i> / (lam + |phi_j|^2)]      within each block of columns

The influence function has (lam I + mean_j phi_j phi_j^T)^-1 phi_i there; the two are equal for one example, and differ
most where lam is small beside |phi_j|^2, as it is at the damping of the paper: lam = 0.1 times the mean squared entry
of a gradient, in each block by itself. A block is one factor of one LoRA layer.

Rows are read in blocks; what is kept is a w x w matrix for each block of width w, or with n < p the n x p rows.
Source: Kwon et al. 2023 (arXiv 2310.00902), section 3; docs/methods.md section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from llmattrib.errors import MethodError
from llmattrib.games.kernel import FeatureRows
from llmattrib.memory import require_memory


@dataclass(frozen=True)
class ColumnBlock:
    """Neighbouring columns that are one block of parameters.

    Attributes:
        width: columns.
        size: parameters that were sketched into them.
    """

    width: int
    size: int


@dataclass(frozen=True)
class DataInfState:
    """What is kept of the features.

    Attributes:
        damping: lam of each block; 0 where every gradient is.
        sums: for each block mean_j phi_j phi_j^T / (lam + |phi_j|^2), [w, w]; empty where n < p.
        rows: [n, p] all rows, where n < p; else None.
        weights: [blocks, n] 1 / (n (lam + |phi_j|^2)), where n < p; else None.
    """

    damping: Float[np.ndarray, " blocks"]
    sums: tuple[np.ndarray, ...]
    rows: Float[np.ndarray, "n p"] | None = None
    weights: Float[np.ndarray, "blocks n"] | None = None


@dataclass(frozen=True)
class DataInf:
    """DataInf on stored features.

    Attributes:
        ridge: lam in units of a block's mean squared gradient entry, positive; 0.1 in the paper.
        blocks: of the columns, in order.
    """

    ridge: float
    blocks: Sequence[ColumnBlock]

    def init(self, features: FeatureRows) -> DataInfState:
        """Measure the blocks, then add up what all examples have in common.

        Raises:
            MethodError: all features are zero, or what is kept does not fit the memory.
        """
        assert sum(block.width for block in self.blocks) == features.dim

        def squares() -> Float[np.ndarray, " blocks"]:
            total = np.zeros(len(self.blocks))
            for _, rows in features.blocks():
                total += self._squares(rows.astype(np.float64)).sum(axis=1)
            return total

        sizes = np.array([block.size for block in self.blocks])
        damping = self.ridge * features.total(squares) / features.num_rows / sizes
        if not damping.any():
            raise MethodError(
                "all features are zero, so a damping relative to them is zero too",
                expected="examples whose gradients differ",
                fix="set reduce.center=false if there is one example or all are equal; else check features.output",
            )
        if features.is_wide:
            rows = features.space.lift(features.space.coordinates)
            return DataInfState(damping, (), rows, self._weights(rows, damping) / features.num_rows)
        return DataInfState(damping, self._sums(features, damping))

    def compute(
        self, state: DataInfState, rows: Float[np.ndarray, "m p"], log_odds: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m p"]:
        """Return the representers of rows of the training features."""
        found = np.zeros(rows.shape, np.float32)
        for number, part in enumerate(self._parts()):
            if not state.damping[number]:
                continue
            own = rows[:, part].astype(np.float64)
            if state.rows is None or state.weights is None:
                common = own @ state.sums[number]
            else:
                common = (own @ state.rows[:, part].T * state.weights[number]) @ state.rows[:, part]
            found[:, part] = (own - common) / state.damping[number]
        return found

    def _sums(self, features: FeatureRows, damping: Float[np.ndarray, " blocks"]) -> tuple[np.ndarray, ...]:
        """Return the matrices of all blocks, from one pass."""
        widths = [block.width for block in self.blocks]
        ends = np.cumsum([0, *(width**2 for width in widths)]).tolist()
        require_memory(
            24 * ends[-1],
            f"the matrices of {len(widths)} blocks, the widest of {max(widths)} columns,",
            "use a smaller features.sketch.dim, or a machine with more memory",
            features.max_bytes,
        )

        def sums() -> Float[np.ndarray, " s"]:
            flat = np.zeros(ends[-1])
            for _, block in features.blocks():
                rows = block.astype(np.float64)
                weights = self._weights(rows, damping)
                for number, part in enumerate(self._parts()):
                    own = rows[:, part]
                    flat[ends[number] : ends[number + 1]] += ((own.T * weights[number]) @ own).reshape(-1)
            return flat

        flat = features.total(sums) / features.num_rows
        return tuple(
            flat[start:stop].reshape(width, width)
            for start, stop, width in zip(ends[:-1], ends[1:], widths, strict=True)
        )

    def _weights(
        self, rows: Float[np.ndarray, "m p"], damping: Float[np.ndarray, " blocks"]
    ) -> Float[np.ndarray, "blocks m"]:
        """Return 1 / (lam + |phi|^2) of each row in each block; 0 in blocks that are zero throughout."""
        total = damping[:, None] + self._squares(rows)
        return np.asarray(np.divide(1.0, total, out=np.zeros_like(total), where=damping[:, None] > 0))

    def _squares(self, rows: Float[np.ndarray, "m p"]) -> Float[np.ndarray, "blocks m"]:
        return np.stack([np.square(rows[:, part]).sum(axis=1) for part in self._parts()])

    def _parts(self) -> list[slice]:
        ends = np.cumsum([0, *(block.width for block in self.blocks)]).tolist()
        return [slice(start, stop) for start, stop in pairwise(ends)]
