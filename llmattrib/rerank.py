"""Exact inner products of a query with a shortlist: the gradients themselves, not their sketches.

Only for methods whose representer of an example is a function of that example alone: grad_dot, grad_cos and, from what
is stored of its words (word_query.py), tracin_we. The others weigh an example by the whole set, so an exact value would
need the exact gradients of all. Exact gradients are as long as the LoRA adapter and are computed batch by batch, at
most `MAX_EXACT_BYTES` of them at a time.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from llmattrib.config import RunConfig
from llmattrib.data import Example
from llmattrib.encoding import Encoded
from llmattrib.errors import MethodError
from llmattrib.extraction import encode_examples, extract_rows
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.reader import member_widths
from llmattrib.scorers.gradient import unit_rows
from llmattrib.sections import Method
from llmattrib.words import METHOD as WORDS

RERANKED: tuple[Method, ...] = ("grad_dot", "grad_cos", WORDS)
MAX_EXACT_BYTES = 1 << 30
Pool = tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]
"""Values and rows found for each query, best first."""


def check_rerank(methods: Sequence[Method], num_candidates: int, top: int, is_centred: bool) -> None:
    """Refuse what cannot be reranked, before a model is loaded.

    Args:
        methods: to be reranked.
        num_candidates: of either kind.
        top: hits of either kind.
        is_centred: whether a mean feature is subtracted for one of the methods.

    Raises:
        MethodError: a method's values depend on the whole set, or there are fewer candidates than hits wanted.
    """
    for method in methods:
        if method not in RERANKED:
            raise MethodError(
                f"{method} cannot be reranked: its representer of an example depends on all examples",
                expected=f"one of {', '.join(RERANKED)}",
                fix="leave --rerank out, or raise features.sketch.dim for a smaller sketch error",
            )
    if num_candidates < top:
        raise MethodError(
            f"rerank of {num_candidates} candidates for {top} hits",
            expected="as many candidates as hits, or more",
            fix="raise --rerank or lower --top",
        )
    if is_centred:
        raise MethodError(
            "rerank of centred features: the exact mean gradient is not kept",
            expected="reduce.center=false",
            fix="leave --rerank out, or reduce with reduce.center=false",
        )


def resorted(
    pools: Sequence[Pool], exact: Callable[[int, Int[np.ndarray, " k"]], Float[np.ndarray, " k"]]
) -> list[Pool]:
    """Replace the values of the pools of the largest and of the smallest by exact ones, and sort again.

    Args:
        pools: both; row -1 is no row.
        exact: (query, rows) -> their values.
    """
    values = [np.full(scores.shape, np.nan, np.float32) for scores, _ in pools]
    for query in range(len(pools[0][1])):
        found = np.unique(np.concatenate([rows[query] for _, rows in pools]))
        found = found[found >= 0]
        scores = exact(query, found)
        for side, (_, rows) in enumerate(pools):
            is_found = rows[query] >= 0
            values[side][query, is_found] = scores[np.searchsorted(found, rows[query][is_found])]
    sorted_again = []
    for side, (_, rows) in enumerate(pools):
        sign = (1, -1)[side]
        order = np.lexsort((rows, -sign * values[side]), axis=1)  # NaN, of rows not found, is last
        sorted_again.append((np.take_along_axis(values[side], order, 1), np.take_along_axis(rows, order, 1)))
    return sorted_again


class ExactScorer:
    """Scores examples for one query with exact gradients.

    Args:
        config: the run.
        extractor: at the store's linearisation point.
        query: the query's prompt and answer.
        encoded: the same, tokenised.
        cosine: scale gradients to unit norm.
    """

    def __init__(self, config: RunConfig, extractor: Extractor, query: Example, encoded: Encoded, cosine: bool) -> None:
        self._config, self._extractor, self._cosine = config, extractor, cosine
        plan = extractor.plan("none", config.seed, 1, [])
        self._members = member_widths(plan.to_json())
        self._sketch = Sketch(plan, extractor.loaded.device)
        self._query = self._gradients([query], [encoded])[0]

    def values(self, examples: Sequence[Example]) -> Float[np.ndarray, " k"]:
        """Return the exact value of each example."""
        if not examples:
            return np.empty(0, np.float32)
        encoded = encode_examples(self._config, self._extractor, examples).encoded
        step = max(1, MAX_EXACT_BYTES // (4 * self._sketch.dim))
        parts = [
            self._gradients(examples[start : start + step], encoded[start : start + step]) @ self._query
            for start in range(0, len(examples), step)
        ]
        return np.concatenate(parts)

    def _gradients(self, examples: Sequence[Example], encoded: Sequence[Encoded]) -> Float[np.ndarray, "k p"]:
        rows = extract_rows(self._config, self._extractor, self._sketch, encoded, examples)[0][:, 0]
        return unit_rows(rows, self._members) if self._cosine else rows
