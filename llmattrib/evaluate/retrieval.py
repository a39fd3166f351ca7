"""Does an attribution rank the example that taught an answer first? Recall at k, beside text search.

A probe is a prompt whose teaching example is known. Methods are compared on the same probes with tf-idf over prompt
and answer, the baseline any claim must stand beside. Ties are broken by row, so a ranking is a pure function of scores.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer

WORD = r"(?u)\b\w+\b"


def recall(top: Sequence[Sequence[int]], targets: Sequence[int], ks: Sequence[int]) -> dict[str, float | int]:
    """Measure recall at each k: the share of probes whose teaching example is among the first k.

    Args:
        top: for each probe the best rows, best first, at least max(ks) of them (or all rows).
        targets: for each probe the row of the example that taught it.
        ks: cut-offs.

    Returns:
        `recall@k` for every k, 0 where there are no probes, and `count`, their number.
    """
    hits = {k: sum(target in rows[:k] for rows, target in zip(top, targets, strict=True)) for k in ks}
    return {**{f"recall@{k}": hit / max(len(targets), 1) for k, hit in hits.items()}, "count": len(targets)}


def top_rows(scores: Float[np.ndarray, "q n"], k: int) -> Int[np.ndarray, "q k"]:
    """Return the k best rows of each query, best first, ties by row."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def tfidf_scores(train_texts: Sequence[str], query_texts: Sequence[str]) -> Float[np.ndarray, "q n"]:
    """Score training texts for each query text by cosine of word tf-idf vectors; zeros where they hold no word."""
    if not have_words(train_texts):
        return np.zeros((len(query_texts), len(train_texts)))
    vectorizer = tfidf()
    train = vectorizer.fit_transform(train_texts)
    return np.asarray((vectorizer.transform(query_texts) @ train.T).todense())


def tfidf() -> TfidfVectorizer:
    """Return what makes unit tf-idf vectors of unigrams and bigrams of words; it takes texts that `have_words`."""
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)


def have_words(texts: Sequence[str]) -> bool:
    """Whether any text has a letter or digit."""
    return any(re.search(r"\w", text) for text in texts)
