"""Players who are the same: near-equal rows with equal responses are joined into groups.

Groups are what makes exact duplicates exact in the mean field (`fixed_point`). Members stay players of their own: each
gets its group's value over their number. Takes O(n log n) where few rows lie within the tolerance of one another along
a random direction.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llmattrib.rng import stream


@dataclass(frozen=True)
class Groups:
    """Players joined into groups of equal ones.

    Attributes:
        group: [n] group of each player.
        leaders: [g] the player whose row stands for the group.
        counts: [g] members.
    """

    group: Int[np.ndarray, " n"]
    leaders: Int[np.ndarray, " g"]
    counts: Int[np.ndarray, " g"]


def group_copies(
    coordinates: Float[np.ndarray, "n d"], responses: Float[np.ndarray, "n c"], tolerance: float | None
) -> Groups:
    """Join players whose rows agree within `tolerance` of their norm and whose responses are equal.

    Rows are sorted along a random direction, so only neighbours within the tolerance are compared.
    """
    if tolerance is None:
        everyone = np.arange(len(coordinates))
        return Groups(everyone, everyone, np.ones_like(everyone))
    norms = np.linalg.norm(coordinates, axis=1)
    direction = stream(0, "mean_field", "copies").standard_normal(coordinates.shape[1])
    heights = coordinates @ (direction / np.linalg.norm(direction))
    order = np.argsort(heights, kind="stable")
    leader_of = np.arange(len(coordinates))
    firsts = np.searchsorted(heights[order], heights[order] - tolerance * norms[order])
    for position, player in enumerate(order):
        near = order[firsts[position] : position]
        near = near[leader_of[near] == near]
        if len(near):
            far = np.linalg.norm(coordinates[near] - coordinates[player], axis=1) > tolerance * norms[player]
            same = ~far & (responses[near] == responses[player]).all(axis=1)
            if same.any():
                leader_of[player] = near[np.argmax(same)]
    leaders, group, counts = np.unique(leader_of, return_inverse=True, return_counts=True)
    return Groups(group, leaders, counts)
