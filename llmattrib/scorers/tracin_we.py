"""TracIn-WE on arrays: values of examples word by word, and the sketch of word gradients that an index searches.

    value(query, i) = sum over the words w of both of <g_w(query), g_w(i)>

Each summand is what the example does through that word. The whole is the inner product of two sparse matrices, a row a
word, so it is searched by a linear sketch: words are hashed into buckets (a count sketch), and within its bucket a
gradient stands with random signs, rotated by a random number of places, and summed over equal bins where it is longer
than the bucket (OPORP, a Johnson-Lindenstrauss projection). Signs, rotation and bucket of a word are a pure function
of (seed, word). E<Sx, Sy> = <x, y>. With buckets as wide as the gradient a shared word costs no error at all, and what
is left comes from different words in one bucket, which the rotation spreads evenly:

    variance = (1/r) sum_w (|g_w|^2 |g'_w|^2 + <g_w, g'_w>^2) [0 when r = d] + about |G|^2 |G'|^2 / (B r)

for B buckets of width r. So width first, up to d, then buckets.
Source: Yeh et al. 2022 (arXiv 2202.11844); Charikar et al. 2002 (count sketch); Li and Li 2023 (OPORP).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llmattrib.rng import stream

WordRows = Mapping[int, Float[np.ndarray, " d"]]
"""Word -> its gradient."""


def word_rows(words: Int[np.ndarray, " k"], rows: Float[np.ndarray, "k d"]) -> WordRows:
    """Return the rows of an example by word; -1 stands for no word."""
    return {int(word): row.astype(np.float64) for word, row in zip(words, rows, strict=True) if word >= 0}


def explain(query: WordRows, example: WordRows) -> dict[int, float]:
    """Return the value of each word that a query and an example share; their sum is the value of the example."""
    return {word: float(query[word] @ row) for word, row in example.items() if word in query}


@dataclass(frozen=True)
class WordSketch:
    """A sketch of word gradients.

    Attributes:
        seed: of the tables.
        source_dim: d, numbers of a gradient.
        buckets: B.
        width: r, numbers of a bucket; at most d.
    """

    seed: int
    source_dim: int
    buckets: int
    width: int

    @classmethod
    def planned(cls, seed: int, source_dim: int, dim: int, width: int | None) -> "WordSketch":
        """Return the sketch of at most `dim` numbers, with buckets of `width` (as wide as gradients when None)."""
        width = min(width or source_dim, source_dim, dim)
        return cls(seed, source_dim, dim // width, width)

    @property
    def dim(self) -> int:
        """Numbers of a sketch."""
        return self.buckets * self.width

    def apply(
        self, words: Sequence[Int[np.ndarray, " _"]], rows: Sequence[Float[np.ndarray, "_ d"]]
    ) -> Float[np.ndarray, "m p"]:
        """Return the sketches of m examples.

        Args:
            words: of each example; -1 stands for no word.
            rows: their gradients.
        """
        out = np.zeros((len(words), self.buckets, self.width), np.float32)
        places: dict[int, list[tuple[int, int]]] = {}
        for example, own in enumerate(words):
            for place, word in enumerate(own.tolist()):
                if word >= 0:
                    places.setdefault(word, []).append((example, place))
        for word in sorted(places):
            bucket, shift, signs = self._table(word)
            gradients = np.stack([rows[example][place] for example, place in places[word]])
            folded = self._fold(np.roll(gradients * signs, shift, axis=1))
            for (example, _), row in zip(places[word], folded, strict=True):
                out[example, bucket] += row
        return out.reshape(len(words), self.dim)

    def _fold(self, gradients: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "k r"]:
        """Sum every r-th number."""
        num_bins = -(-self.source_dim // self.width)
        padded = np.zeros((len(gradients), num_bins * self.width), np.float32)
        padded[:, : self.source_dim] = gradients
        return np.asarray(padded.reshape(len(gradients), num_bins, self.width).sum(axis=1))

    def _table(self, word: int) -> tuple[int, int, Float[np.ndarray, " d"]]:
        """Return bucket, rotation and signs of a word."""
        draws = stream(self.seed, "word sketch", word)
        bucket, shift = int(draws.integers(self.buckets)), int(draws.integers(self.source_dim))
        bits = np.unpackbits(np.frombuffer(draws.bytes((self.source_dim + 7) // 8), np.uint8), count=self.source_dim)
        return bucket, shift, 2 * bits.astype(np.float32) - 1
