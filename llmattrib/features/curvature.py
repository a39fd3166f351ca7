"""EK-FAC: the curvature of each LoRA factor in Kronecker eigenbases with corrected eigenvalues, and whitening by it.

The gradient of a factor is a matrix G_i [m, k], a sum over tokens of outer products l r^T (capture.py). K-FAC takes
its second moment for a Kronecker product, E[l l^T] x E[r r^T] = (U S U^T) x (V T V^T), means over the tokens of all
examples. EK-FAC keeps these eigenvectors and measures what the eigenvalues should be (George et al. 2018):

    h_ab = mean_i (U^T G_i V)_ab^2        the nearest to E[vec G vec G^T] that is diagonal in the basis U x V

Whitened rows are W_ab = (U^T G V)_ab / sqrt(h_ab + lam), lam = damping * mean h, so that inner products of them are
g^T (H + lam)^-1 g', influence with this curvature (Grosse et al. 2023), and whatever takes features takes these. No
labels are sampled: the moments are of the gradients of the output as it is used, an empirical Fisher matrix.

Padding does not count. A side longer than the limit keeps its coordinates,
U = I: h is then the best diagonal in that basis. A factor whose gradient is zero for all examples is whitened to zero.
Memory while it is fitted: `fit_bytes`. Knows shapes, nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from llmattrib.errors import FeatureError, NonFiniteGradientError

Shape = tuple[int, int]
"""Rows m and columns k of a factor's gradient."""


def side_bytes(shapes: Sequence[Shape], max_side: int) -> int:
    """Return the bytes of all eigenbases in float32."""
    return sum(4 * side * side for shape in shapes for side in shape if side <= max_side)


def fit_bytes(shapes: Sequence[Shape], max_side: int) -> int:
    """Return the bytes that a fit holds at its peak: moments in float64, or bases and what is written of them."""
    return 2 * side_bytes(shapes, max_side) + 16 * sum(rows * columns for rows, columns in shapes)


@dataclass(frozen=True)
class BlockCurvature:
    """The curvature of one factor.

    Attributes:
        left: [m, m] eigenvectors in columns, None for the identity.
        right: [k, k] the same of the other side.
        eigenvalues: [m, k] corrected ones, in squared units of the gradient.
    """

    left: Float[Tensor, "m m"] | None
    right: Float[Tensor, "k k"] | None
    eigenvalues: Float64[Tensor, "m k"]


@dataclass(frozen=True)
class Curvature:
    """The curvature of all factors, in the order of the blocks."""

    blocks: tuple[BlockCurvature, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return named tensors on the CPU: `<block>.left`, `<block>.right` where they are, `<block>.eigenvalues`."""
        found = {}
        for number, block in enumerate(self.blocks):
            for name in ("left", "right", "eigenvalues"):
                tensor = getattr(block, name)
                if tensor is not None:
                    found[f"{number}.{name}"] = tensor.cpu().contiguous()
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Curvature":
        """Read back `to_tensors`."""
        count = sum(name.endswith(".eigenvalues") for name in tensors)
        return cls(
            tuple(
                BlockCurvature(
                    tensors.get(f"{number}.left"), tensors.get(f"{number}.right"), tensors[f"{number}.eigenvalues"]
                )
                for number in range(count)
            )
        )


class CurvatureFit:
    """Sums over examples that become a curvature: first the pairs of all, then the gradients of all.

    Args:
        shapes: of the blocks' gradients.
        max_side: longest side with an eigenbasis.
        device: where pairs and gradients arrive.
    """

    def __init__(self, shapes: Sequence[Shape], max_side: int, device: torch.device | str = "cpu") -> None:
        def zeros(*sides: int) -> Tensor:
            return torch.zeros(*sides, dtype=torch.float64, device=device)

        self._shapes = tuple(shapes)
        self._moments = [[zeros(side, side) if side <= max_side else None for side in shape] for shape in shapes]
        self._squares = [zeros(*shape) for shape in shapes]
        self._bases: list[tuple[Tensor | None, Tensor | None]] = []
        self._num_rows = [0] * len(shapes)

    def add_pair(
        self,
        block: int,
        left: Float[Tensor, "b t m"],
        right: Float[Tensor, "b t k"],
        is_token: Bool[Tensor, "b t"],
    ) -> None:
        """Add the two sides of a batch's gradients, without those of padding."""
        for moment, side in zip(self._moments[block], (left, right), strict=True):
            if moment is not None:
                rows = side[is_token]
                moment += rows.T @ rows

    def find_bases(self) -> None:
        """Turn the moments of the pairs into eigenbases; gradients come next.

        Raises:
            NonFiniteGradientError: a gradient was NaN or infinite.
        """
        if not all(bool(moment.isfinite().all()) for pair in self._moments for moment in pair if moment is not None):
            raise NonFiniteGradientError(
                "among the examples that the curvature is fitted on, a gradient is NaN or infinite",
                expected="finite numbers",
                fix="build with features.preconditioner=none to another run_dir: it names the example",
            )
        while self._moments:
            left, right = self._moments.pop(0)
            self._bases.append((_eigenvectors(left), _eigenvectors(right)))

    def add_gradients(self, block: int, gradient: Float[Tensor, "b size"]) -> None:
        """Add a batch's gradients."""
        rotated = rotate(gradient, self._shapes[block], *self._bases[block])
        self._squares[block] += rotated.square().sum(0, dtype=torch.float64)
        self._num_rows[block] += len(gradient)

    def curvature(self, num_rows: int) -> Curvature:
        """Return what was fitted.

        Args:
            num_rows: gradients that every block should have seen.

        Raises:
            FeatureError: a layer is used several times in a forward, so that its gradients arrived in parts.
        """
        parts = {count // num_rows for count in self._num_rows} - {0, 1}
        if parts:
            raise FeatureError(
                f"a layer is used {max(parts)} times in one forward: the gradient of its factors arrives in parts",
                expected="a layer of its own for each use, as EK-FAC squares whole gradients",
                fix="set features.preconditioner=none, or leave the layer out of the adapter's target modules",
            )
        blocks = zip(self._bases, self._squares, strict=True)
        return Curvature(tuple(BlockCurvature(*bases, squares / num_rows) for bases, squares in blocks))


def _eigenvectors(moment: Float64[Tensor, "m m"] | None) -> Float[Tensor, "m m"] | None:
    return None if moment is None else torch.linalg.eigh(moment).eigenvectors.float()


def rotate(
    gradient: Float[Tensor, "b size"],
    shape: Shape,
    left: Float[Tensor, "m m"] | None,
    right: Float[Tensor, "k k"] | None,
) -> Float[Tensor, "b m k"]:
    """Return U^T G V of each row, a basis that is None left out."""
    rotated = gradient.view(-1, *shape)
    if right is not None:
        rotated = rotated @ right
    if left is not None:
        rotated = (rotated.transpose(1, 2) @ left).transpose(1, 2)
    return rotated


class Whitening:
    """Multiplies gradients by (H + lam)^-1/2 in the eigenbasis of H.

    Args:
        curvature: H.
        damping: lam over the mean eigenvalue of the block.
        device: where gradients arrive.
        num_members: independent models whose blocks stand side by side; their inner products are averaged.
    """

    def __init__(
        self, curvature: Curvature, damping: float, device: torch.device | str = "cpu", num_members: int = 1
    ) -> None:
        self._bases = [
            tuple(None if basis is None else basis.to(device) for basis in (block.left, block.right))
            for block in curvature.blocks
        ]
        self._weights = [
            _inverse_root(block.eigenvalues, damping, num_members).to(device) for block in curvature.blocks
        ]

    def __call__(self, block: int, gradient: Float[Tensor, "b size"]) -> Float[Tensor, "b size"]:
        """Whiten a batch's gradients."""
        weights = self._weights[block]
        rows, columns = weights.shape
        return (rotate(gradient, (rows, columns), *self._bases[block]) * weights).flatten(1)


def _inverse_root(eigenvalues: Float64[Tensor, "m k"], damping: float, num_members: int) -> Float[Tensor, "m k"]:
    mean = eigenvalues.mean()
    if mean == 0:  # inner products with training gradients, all zero here, are the same whatever stands here
        return torch.zeros_like(eigenvalues).float()
    return ((eigenvalues + damping * mean) * num_members).rsqrt().float()
