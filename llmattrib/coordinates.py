"""Coordinates in which every part of a representer weighs alike on a query: those that `scan` and `ivfpq` code.

A code replaces a representer v by v + e, which makes the value <q, v> of a query wrong by <q, e>. With S = E[q q^T],

    v' = S^1/2 v,   q' = S^-1/2 q,   <q', v'> = <q, v>,   E <q, e>^2 = |e'|^2

so the code with the least squared error of v' has the least error of values. Representers of influence and TRAK need
this: they are nearly white while queries lie along a few directions. The rows' principal axes in these coordinates are
kept until the rest holds no more than `tail` of E <q, v>^2, and then turned at random, so that each coordinate holds as
much as any other. Queries are taken to be distributed as the features of the training examples.

Limits: [d, d] float64 three times over, d = c * p; a small eigenvalue of S is raised to 1e-3 of the mean one.
Source: the asymmetric error of product quantisation is Jegou, Douze and Schmid (2011), section III; weighting it by the
queries is the ordinary argument of weighted least squares.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmattrib.config import RunConfig
from llmattrib.reader import check_made_from
from llmattrib.rng import stream
from llmattrib.scorers.gradient import unit_rows
from llmattrib.store import RowStore
from llmattrib.words import METHOD as WORDS
from llmattrib.words import open_words

FLOOR = 1e-3


@dataclass(frozen=True)
class Transform:
    """How query features are centred and scaled before inner products with the representers of a method.

    Attributes:
        mean: subtracted.
        normalize: whether they are scaled to unit norm.
        members: columns of each adapter, each scaled by itself; empty where they are not.
    """

    mean: Float[np.ndarray, "c p"]
    normalize: bool
    members: tuple[int, ...]

    @classmethod
    def of(cls, representers: RowStore) -> "Transform":
        """Read what goes with stored representers."""
        info = representers.manifest.info
        return cls(representers.read_vector("mean"), bool(info["normalize"]), tuple(info["members"]))

    def __call__(self, phi: Float[np.ndarray, "q c p"]) -> Float[np.ndarray, "q c p"]:
        """Transform features."""
        return unit_rows(phi - self.mean, self.members) if self.normalize else phi - self.mean


@dataclass(frozen=True)
class Coordinates:
    """Two linear maps that keep inner products, but for `dropped`.

    Attributes:
        of_rows: representers @ of_rows are their coordinates.
        of_queries: the same of queries.
        dropped: the share of E <q, v>^2 that is not kept.
    """

    of_rows: Float[np.ndarray, "d k"]
    of_queries: Float[np.ndarray, "d k"]
    dropped: float


def second_moments(
    features: RowStore, transform: Transform, most: int, random: np.random.Generator
) -> Float[np.ndarray, "c p p"]:
    """Return E[q q^T] of each output over the training examples, transformed as queries are.

    Args:
        features: the feature store.
        transform: of queries.
        most: rows to read, in whole shards drawn at random.
        random: draws them.
    """
    wanted = -(-most // features.manifest.shard_size)
    shards = sorted(random.permutation(features.num_shards)[:wanted].tolist())
    total, num_rows = np.zeros((*transform.mean.shape, features.manifest.dim)), 0
    for _, rows in features.blocks(shards):
        moved = transform(rows).transpose(1, 0, 2).astype(np.float64)
        total += np.matmul(moved.transpose(0, 2, 1), moved)
        num_rows += len(rows)
    return total / num_rows


def balance(
    moments: Float[np.ndarray, "c p p"],
    rows: Float[np.ndarray, "m c p"],
    tail: float,
    multiple: int,
    random: np.random.Generator,
) -> Coordinates:
    """Choose the coordinates.

    Args:
        moments: E[q q^T] of each output.
        rows: a sample of representers.
        tail: share of E <q, v>^2 that may be dropped.
        multiple: of which k is to be one; what that takes beyond c * p is zero.
        random: draws the rotation.
    """
    dim = rows.shape[1] * rows.shape[2]
    values, axes = np.linalg.eigh(moments)
    spread = np.sqrt(np.maximum(values, FLOOR * values.mean(axis=1, keepdims=True)))
    roots, inverses = (np.matmul(axes * scale[:, None], axes.transpose(0, 2, 1)) for scale in (spread, 1 / spread))
    gram = np.zeros((dim, dim))
    for start in range(0, len(rows), 4096):
        moved = np.einsum("mcp,cpk->mck", rows[start : start + 4096], roots, optimize=True).reshape(-1, dim)
        gram += moved.T @ moved
    energy, principal = np.linalg.eigh(gram)
    left = np.cumsum(np.maximum(energy, 0))  # smallest first
    needed = dim - (int(np.searchsorted(left, tail * left[-1], side="right")) if tail else 0)
    width = -(-needed // multiple) * multiple
    num_dropped = max(dim - width, 0)
    kept = principal[:, num_dropped:]
    turned = np.zeros((dim, width))
    turned[:, : dim - num_dropped] = kept @ np.linalg.qr(random.standard_normal((kept.shape[1], kept.shape[1])))[0]
    parts = turned.reshape(*rows.shape[1:], -1)
    of_rows, of_queries = (np.matmul(root, parts).reshape(dim, -1).astype(np.float32) for root in (roots, inverses))
    dropped = left[num_dropped - 1] / left[-1] if num_dropped else 0.0
    return Coordinates(of_rows, of_queries, float(dropped))


def coordinates_of(
    config: RunConfig, representers: RowStore, sample: Float[np.ndarray, "m d"], most: int, tail: float, multiple: int
) -> Coordinates:
    """Choose the coordinates of the representers of a run.

    Args:
        config: the run.
        representers: all of them, of one method.
        sample: some of them.
        most: features to read.
        tail: share of E <q, v>^2 that may be dropped.
        multiple: of which k is to be one.

    Raises:
        StoreNotFoundError: the features they are of are gone.
        StaleIndexError: they are of other features than are there.
    """
    is_of_words = representers.manifest.info["method"] == WORDS
    features = open_words(config) if is_of_words else RowStore.open(config.layout.features)
    features.require_complete()
    check_made_from(representers, features)
    queries = stream(config.seed, "index", "queries")
    of_queries = representers if is_of_words else features  # of words, a query's sketch is made as representers are
    moments = second_moments(of_queries, Transform.of(representers), most, queries)
    rows = sample.reshape(-1, representers.manifest.num_outputs, representers.manifest.dim)
    return balance(moments, rows, tail, multiple, stream(config.seed, "index", "rotation"))
