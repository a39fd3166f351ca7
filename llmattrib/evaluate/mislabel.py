"""Are wrongly labelled examples found? AUROC of suspicion, by attribution and by what needs none.

The config says which labels are wrong (`evaluate.mislabeled`, a file of ids, or `evaluate.mislabeled_column`, a column
of the data). Every score says how suspicious an example is:

    value, <method>        minus its mean score over the validation prompts (baselines of scores.py too)
    self, <method>         its own influence on itself: large where nothing else explains it
    loss                   as stored
    gradient norm          of the loss, where it is not mixed over classes
    residual               y_i - f_{-i}(x_i) of the ridge model without it, in closed form
    disagreement           share of its ten nearest neighbours with another label, by features or by tf-idf
    tf-idf regression      out-of-fold loss of logistic regression on tf-idf

The last three need label words. `recall` is the share of wrong ones among as many most suspicious examples as there are
wrong ones. Intervals of AUROC are DeLong's (normal, over examples).
Sources: docs/methods.md section 10; DeLong, DeLong and Clarke-Pearson 1988; Koh and Liang 2017 (self-influence).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats
from jaxtyping import Bool, Float, Int
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from llmattrib.config import RunConfig
from llmattrib.coordinates import Transform
from llmattrib.data import read_column
from llmattrib.errors import ConfigError, DataError, MethodError
from llmattrib.evaluate.record import Record, Row
from llmattrib.evaluate.retrieval import have_words, tfidf
from llmattrib.evaluate.scores import RunScores
from llmattrib.games.kernel import KernelGame
from llmattrib.query import answered_slots, in_slots
from llmattrib.reader import FeatureReader, choose_ridge, current_representers
from llmattrib.rng import stream
from llmattrib.sections import Method
from llmattrib.values.estimates import is_label_free, label_free
from llmattrib.words import METHOD as WORDS

NEIGHBORS, FOLDS = 10, 10
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Detection:
    """How well suspicion finds what is wrong.

    Attributes:
        auroc: chance that a wrong example is more suspicious than a right one.
        low: lower end of the 95 % interval.
        high: upper end.
        recall: share of the wrong ones among as many most suspicious examples.
    """

    auroc: float
    low: float
    high: float
    recall: float


def detection(suspicion: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]) -> Detection:
    """Measure suspicion against what is wrong; ties count half. Of one wrong or one right example the interval is all.

    Raises:
        MethodError: all or no examples are wrong.
    """
    num_wrong, num_right = int(wrong.sum()), int((~wrong).sum())
    if not num_wrong or not num_right:
        raise MethodError(f"{num_wrong} of {len(wrong)} examples are wrong", expected="some wrong and some right ones")
    ranks = scipy.stats.rankdata(suspicion)
    beaten = (ranks[wrong] - scipy.stats.rankdata(suspicion[wrong])) / num_right
    beating = 1 - (ranks[~wrong] - scipy.stats.rankdata(suspicion[~wrong])) / num_wrong
    auroc = float(beaten.mean())
    variances = (part.var(ddof=1) / len(part) if len(part) > 1 else np.inf for part in (beaten, beating))
    reach = 1.959964 * float(np.sqrt(sum(variances)))
    top = np.argsort(-suspicion, kind="stable")[:num_wrong]
    return Detection(auroc, max(0.0, auroc - reach), min(1.0, auroc + reach), float(wrong[top].mean()))


def disagreement(vectors: Any, labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the share of the nearest examples by inner product, itself left out, that have another label.

    Args:
        vectors: array or sparse matrix [n, d].
        labels: one an example.
    """
    found = np.empty(len(labels))
    for start in range(0, len(labels), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        products = vectors[part] @ vectors.T
        likeness = np.array(products.todense() if scipy.sparse.issparse(products) else products)
        np.fill_diagonal(likeness[:, start:], -np.inf)
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, : min(NEIGHBORS, len(labels) - 1)]
        found[part] = (labels[nearest] != labels[part, None]).mean(axis=1)
    return found


def residuals(games: Sequence[KernelGame], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return y_i - f_{-i}(x_i) of the own label, in closed form."""
    found = np.zeros(len(labels))
    for output, part in enumerate(games):
        rows = part.space.coordinates
        solved = np.linalg.solve(rows.T @ rows + part.ridge * np.eye(rows.shape[1]), rows.T).T
        raw = part.responses[:, 0] - rows @ (solved.T @ part.responses[:, 0])
        own = labels == output if len(games) > 1 else np.ones(len(labels), dtype=bool)
        found[own] = (raw / (1 - np.einsum("nd,nd->n", rows, solved)))[own]
    return found


def regression_loss(texts: Sequence[str], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"] | None:
    """Return the out-of-fold loss of logistic regression on tf-idf; None without words, or too few of a label."""
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    folds = min(FOLDS, int(counts.min()))
    if folds < 2 or len(counts) < 2 or not have_words(texts):
        return None
    vectors = tfidf().fit_transform(texts)
    model = LogisticRegression(C=10.0, max_iter=1000)
    odds = cross_val_predict(model, vectors, codes, cv=folds, method="predict_proba")
    return np.asarray(-np.log(odds[np.arange(len(codes)), codes]))


def trivial_suspicions(
    reader: FeatureReader, games: Sequence[KernelGame], texts: Sequence[str]
) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the suspicions that need no attribution.

    Args:
        reader: of the features.
        games: the kernel game of each output.
        texts: prompts of the examples.
    """
    labels = reader.store.column("label").astype(np.int64)
    found = {"loss": reader.store.column("loss").astype(np.float64)}
    if reader.output in ("margin", "log_odds"):
        found["gradient norm"] = reader.store.column("norm") * expit(-reader.log_odds)
    elif reader.output == "loss":
        found["gradient norm"] = reader.store.column("norm").astype(np.float64)
    found["residual"] = residuals(games, labels)
    if (labels >= 0).all():
        if is_label_free(reader):
            rows = np.concatenate([block for _, block in reader.store.blocks()])
            free = label_free(rows, labels, reader.output)
            found["disagreement, features"] = disagreement(free, labels)
        if have_words(texts):
            found["disagreement, tf-idf"] = disagreement(tfidf().fit_transform(texts).tocsr(), labels)
        loss = regression_loss(texts, labels)
        if loss is not None:
            found["tf-idf regression"] = loss
    return found


def self_scores(scores: RunScores, method: Method) -> Float[np.ndarray, " n"]:
    """Return the score of every example for itself.

    Raises:
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: representers are missing or outdated.
    """
    if method == WORDS:
        blocks = scores.run.source(method).blocks()
        return np.concatenate([np.square(rows.astype(np.float64)).sum(axis=(1, 2)) for _, rows in blocks])
    features = scores.features
    store = current_representers(scores.config, method, features)
    slots = answered_slots(features.column("label").astype(np.int64), FeatureReader(features).output)
    transform = Transform.of(store)
    found = np.empty(features.manifest.num_rows)
    for start, rows in features.blocks():
        part = slice(start, start + len(rows))
        own = in_slots(transform(rows), slots[part])
        found[part] = np.einsum("ncp,ncp->n", own, store.read(part.start, part.stop), dtype=np.float64)
    return found


def read_mislabeled(scores: RunScores) -> Bool[np.ndarray, " n"]:
    """Return which training examples the config says are wrongly labelled.

    Raises:
        ConfigError: it does not say, or the file cannot be read or names no example of the run.
        DataError: a row lacks the column.
        FingerprintMismatchError: the data set with the column has other examples than the features.
    """
    settings, ids = scores.config.evaluate, [example.id for example in scores.examples]
    if settings.mislabeled_column is not None:
        column = read_column(scores.config.data, settings.mislabeled_column)
        scores.require_training()  # a column of other rows says nothing of these
        return np.array([_is_true(column[example_id], example_id) for example_id in ids])
    wrong = set(_read_ids(scores.config))
    unknown = sorted(wrong - set(ids))
    if unknown:
        raise ConfigError(
            f"{settings.mislabeled} names {unknown[0]!r}, which is no training example",
            expected=f"ids of {scores.config.layout.examples}, such as {ids[0]!r}",
            fix="write one id a line, or a JSON list of ids",
        )
    return np.array([example_id in wrong for example_id in ids])


def _is_true(value: object, example_id: str) -> bool:
    """Read a cell: JSON's true, a number, or a word of CSV."""
    word = str(value).strip().lower()
    if value is not None and word not in ("true", "false", "1", "0", "yes", "no", "1.0", "0.0"):
        raise DataError(
            f"example {example_id!r} has {value!r} in evaluate.mislabeled_column", expected="true or false in every row"
        )
    return word in ("true", "1", "yes", "1.0")


def _read_ids(config: RunConfig) -> list[str]:
    path = config.evaluate.mislabeled
    if path is None:
        raise ConfigError(
            "nothing says which labels are wrong",
            expected="evaluate.mislabeled, a file of ids, or evaluate.mislabeled_column, a column of data.train",
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(map(str, json.loads(text)))
        return [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"evaluate.mislabeled {path} cannot be read ({error})", expected="one id a line, or a JSON list of ids"
        ) from error


def suspicions(scores: RunScores) -> dict[str, Float[np.ndarray, " n"]]:
    """Return all suspicions of a run; those that are equal for all examples are left out.

    Raises:
        ConfigError: `values.data` is not set.
        MethodError: the kernel game does not fit the memory.
    """
    config = scores.config
    reader = FeatureReader(scores.features)
    settings = reader.resolve(config.reduce, "shapley")
    ridge, _, _ = choose_ridge(settings, reader)
    assert ridge is not None
    games = [reader.game(settings, ridge, output) for output in range(reader.manifest.num_outputs)]
    trivial = trivial_suspicions(reader, games, [example.prompt_text for example in scores.examples])
    found = {f"value, {name}": -array.mean(axis=0) for name, array in scores.table(("random", "size", "loss")).items()}
    found |= {f"self, {method}": self_scores(scores, method) for method in scores.methods}
    draws = stream(config.seed, "evaluate", "mislabel", "random")
    found |= {**trivial, "random": draws.standard_normal(len(scores.examples))}
    return {name: array for name, array in found.items() if np.ptp(array) > 1e-6 * np.abs(array).max()}


def mislabel_of_run(scores: RunScores) -> Record:
    """Find the wrongly labelled examples of a run by everything there is.

    Returns:
        Rows `method`, `auroc`, `low`, `high`, `recall`; saved.

    Raises:
        ConfigError: the config does not say which labels are wrong, or `values.data` is not set.
        MethodError: all or no labels are wrong.
    """
    wrong = read_mislabeled(scores)
    found = {name: detection(array, wrong) for name, array in suspicions(scores).items()}
    order = sorted(found, key=lambda name: -found[name].auroc)
    return Record(
        "mislabel",
        [_row(name, found[name]) for name in order],
        (f"{int(wrong.sum())} of {len(wrong):,} labels are wrong; recall by chance {wrong.mean():.2f}",),
    ).save(scores.config, scores.features.digest())


def _row(name: str, found: Detection) -> Row:
    return {"method": name, "auroc": found.auroc, "low": found.low, "high": found.high, "recall": found.recall}
