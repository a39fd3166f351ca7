"""Features to representers: one store for each method, so that any query is answered by inner products.

    score_i = <q, v_i>,   q = phi(query) - mean, scaled to unit norm when info["normalize"]

holds for every method; a positive score means that training on i raises the query's answer. A representer store has
the shape and shards of the feature store, the vectors `mean` (zeros when not centred) and `total` (sum of all
representers), and in `info` what was chosen. Its fingerprint is a digest of the feature data and the resolved
settings: an equal one is reused, another one is replaced, since all of it can be computed again.

Responses of the kernel game: features of `loss`, `log_odds` and `margin` are gradients of an example's own label, so
the code of the right label, +1, is in their sign already and `labels` means 1 for them, as `unit` does. Features of
`logits` have one row per class and play one game per class with one-hot minus 1/c.

Memory: gradient methods hold p x p (or, n < p, the n x p rows); Shapley holds the features, see estimators.mean_field.
The first rank does the work; rows would be shared out in `games.kernel.form_gram`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from llmattrib import storage
from llmattrib.config import Method, ReduceConfig, RunConfig, digest
from llmattrib.distributed import Ranks
from llmattrib.errors import MethodError, StoreNotFoundError
from llmattrib.estimators.certificate import Certificate, MeasuredBias, certify, sample_queries
from llmattrib.estimators.mean_field import LARGE, Form, MeanField
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import LOO_GRID, FeatureRows, KernelGame
from llmattrib.lock import locked
from llmattrib.progress import Progress, silent
from llmattrib.scorers.gradient import GradCos, GradDot, Influence, Scorer, Trak, absolute_ridge, unit_rows
from llmattrib.store import Manifest, RowStore

Response = Literal["labels", "unit", "residual"]
MADE_BY = "llmattrib reduce"
_STEPS = 100  # of progress, for each method
_CERTIFICATE_QUERIES = 32
_NOTED_BIAS = 0.05


@dataclass(frozen=True)
class ReduceResult:
    """What was done for one method, the same on every rank.

    Attributes:
        method: its name.
        path: its store.
        num_examples: rows in it.
        ridge: in units of the mean squared feature norm; None where there is none.
        sum_rule_error: of Shapley values, relative to the full model; None for other methods.
        certificate: measured bias of Shapley values; None for other methods or without draws.
        loo_curve: (ridge, mean squared leave-one-out error) where the ridge was chosen by it.
        is_reused: whether an equal store was there.
        seconds: from start to end.
        notes: what a reader of the values should know.
    """

    method: Method
    path: str
    num_examples: int
    ridge: float | None
    sum_rule_error: float | None
    certificate: MeasuredBias | None
    loo_curve: tuple[tuple[float, float], ...]
    is_reused: bool
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """Reduce settings of one method with every `auto` resolved; None where the method has no such setting."""

    method: Method
    center: bool
    normalize: bool
    dtype: Literal["float16", "float32"]
    ridge: float | Literal["loo"] | None
    response: Response | None
    form: Form | None
    sum_rule_tolerance: float | None
    certificate_draws: int | None


def resolve(config: ReduceConfig, method: Method, output: str, has_labels: bool, num_rows: int) -> Settings:
    """Fill in what a method's `auto` settings mean.

    Args:
        config: the reduce section.
        method: which method.
        output: output function of the features.
        has_labels: whether the data has label words.
        num_rows: n.

    Raises:
        MethodError: the method or its response cannot use these features.
    """
    is_shapley = method == "shapley"
    if output == "logits" and not is_shapley:
        raise MethodError(
            f"{method} needs one gradient per example, and features of output logits have one per class",
            expected="features.output loss, log_odds, margin or pntk",
            fix="set reduce.methods=[shapley], or build features of output margin",
        )
    ridge: float | Literal["loo"] | None = None
    if method not in ("grad_dot", "grad_cos"):
        ridge = ("loo" if is_shapley and has_labels else 0.1) if config.ridge == "auto" else config.ridge
    response: Response | None = None
    if is_shapley or ridge == "loo":
        own_labels = has_labels and output != "pntk"  # the gradient of a sum over classes knows no label
        response = ("labels" if own_labels else "unit") if config.response == "auto" else config.response
        _check_response(response, output, has_labels)
    form: Form = ("pairs" if num_rows <= LARGE else "total_gradient") if config.form == "auto" else config.form
    return Settings(
        method=method,
        center=(is_shapley and not has_labels) if config.center == "auto" else config.center,
        normalize=method == "grad_cos" or (is_shapley if config.normalize == "auto" else config.normalize),
        dtype=config.dtype,
        ridge=ridge,
        response=response,
        form=form if is_shapley else None,
        sum_rule_tolerance=config.sum_rule_tolerance if is_shapley else None,
        certificate_draws=config.certificate_draws if is_shapley else None,
    )


def _check_response(response: Response, output: str, has_labels: bool) -> None:
    if response == "labels" and not has_labels:
        raise MethodError(
            "reduce.response=labels needs label words, and data.label_words is empty",
            expected="unit or residual for generation",
            fix="set reduce.response=unit, or name data.label_words and build again",
        )
    if response == "labels" and output == "pntk":
        raise MethodError(
            "features of output pntk are the same for every label, so labels cannot be their responses",
            expected="features.output logits, margin, log_odds or loss for responses that are labels",
            fix="build features of one of these, or set reduce.response=unit",
        )
    if response != "labels" and output == "logits":
        raise MethodError(
            f"reduce.response={response} gives every class the same response",
            expected="labels for features of output logits",
            fix="set reduce.response=labels",
        )


class FeatureReader:
    """The feature store as methods see it, centred and scaled; statistics are kept for later methods."""

    def __init__(self, store: RowStore) -> None:
        self.store, self.manifest = store, store.manifest
        self.output = str(store.manifest.fingerprint["features"]["output"])
        self._features: dict[tuple[bool, bool, int], FeatureRows] = {}

    @cached_property
    def mean(self) -> Float[np.ndarray, "c p"]:
        """Mean feature, float32 as it is stored, so that queries are centred by the same numbers."""
        total = np.zeros((self.manifest.num_outputs, self.manifest.dim))
        for _, rows in self.store.blocks():
            total += rows.sum(axis=0, dtype=np.float64)
        return (total / self.manifest.num_rows).astype(np.float32)

    def center(self, settings: Settings) -> Float[np.ndarray, "c p"]:
        """Return what is subtracted: the mean, or zeros."""
        return self.mean if settings.center else np.zeros((self.manifest.num_outputs, self.manifest.dim), np.float32)

    def blocks(self, settings: Settings) -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        """Yield (first row, rows), shard by shard."""
        center = self.center(settings)
        for start, rows in self.store.blocks():
            rows = rows - center if settings.center else rows
            yield start, unit_rows(rows) if settings.normalize else rows

    def features(self, settings: Settings, output: int = 0) -> FeatureRows:
        """Return the rows of one output; the same object for the same transform."""
        key = settings.center, settings.normalize, output
        if key not in self._features:

            def blocks() -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
                return ((start, rows[:, output]) for start, rows in self.blocks(settings))

            self._features[key] = FeatureRows(blocks, self.manifest.num_rows, self.manifest.dim)
        return self._features[key]

    @cached_property
    def log_odds(self) -> Float[np.ndarray, " n"]:
        """Log p/(1-p) of every example."""
        return np.asarray(self.store.column("log_odds"), np.float64)

    def responses(self, response: Response, output: int) -> Float[np.ndarray, "n 1"]:
        """Return y of the kernel game over the rows of one output."""
        if response == "residual":
            return np.asarray(expit(-self.log_odds)[:, None])
        if self.output != "logits":
            return np.ones((self.manifest.num_rows, 1))
        is_class = self.store.column("label") == output
        return np.asarray(is_class[:, None] - 1 / self.manifest.num_outputs)


def reduce_run(config: RunConfig, ranks: Ranks | None = None, progress: Progress = silent) -> list[ReduceResult]:
    """Write the representers of every method of `config.reduce`.

    Args:
        config: the run; its features must be complete.
        ranks: the processes of the job; called by all of them. One process by default.
        progress: told of steps done, on the first rank.

    Returns:
        One result per method, in the order of the config.

    Raises:
        StoreNotFoundError, IncompleteStoreError: the features are missing or not finished.
        CorruptShardError: a shard of the features fails its checksum.
        MethodError: a method cannot use these features, or does not fit the memory.
        StoreLockedError: another process reduces this run now.
        DiskSpaceError: the representers would not fit on the disk.
    """
    trees = (ranks or Ranks()).on_main(lambda: _reduce(config, progress))
    return [_from_tree(tree) for tree in trees]


def _from_tree(tree: dict[str, Any]) -> ReduceResult:
    """Undo what JSON does to a result."""
    certificate = None if tree["certificate"] is None else MeasuredBias(**tree["certificate"])
    curve = tuple(map(tuple, tree["loo_curve"]))
    return ReduceResult(**{**tree, "certificate": certificate, "loo_curve": curve, "notes": tuple(tree["notes"])})


def _reduce(config: RunConfig, progress: Progress) -> list[dict[str, Any]]:
    """Return the fields of each method's result; what ranks tell each other is JSON."""
    store = RowStore.open(config.layout.features)
    store.require_complete()
    reader, reduce = FeatureReader(store), config.reduce
    has_labels = bool(store.manifest.fingerprint["encoding"]["label_words"])
    num_rows = store.manifest.num_rows
    settings = [resolve(reduce, method, reader.output, has_labels, num_rows) for method in reduce.methods]
    results = []
    with locked(config.layout.path("representers")):
        for index, item in enumerate(settings):

            def report(done: int, total: int, before: int = index) -> None:
                progress(before * _STEPS + _STEPS * done // total, len(settings) * _STEPS)

            results.append(_reduce_method(config.layout.representers(item.method), item, reader, report))
            report(1, 1)
    return results


def _reduce_method(path: str, settings: Settings, reader: FeatureReader, progress: Progress) -> dict[str, Any]:
    """Reuse the store of a method, or make it."""
    started = time.perf_counter()
    resolved = dataclasses.asdict(settings)
    fingerprint = {"features": reader.store.digest(), "settings": digest(resolved)}
    stored = _stored(path)
    is_other = stored is not None and dict(stored.manifest.fingerprint) != fingerprint
    is_reused = stored is not None and not is_other and stored.is_complete
    if stored is not None and is_reused:
        info = dict(stored.manifest.info)
    else:
        info, representers = _compute(settings, reader, progress)
        info = {**resolved, **info}
        if is_other:
            storage.remove(path)  # only now: what is there stays when the new cannot be computed
        _write(path, reader, settings, fingerprint, info, representers)
    return {
        "method": settings.method,
        "path": path,
        "num_examples": reader.manifest.num_rows,
        "ridge": info["ridge"],
        "sum_rule_error": info.get("sum_rule_error"),
        "certificate": info.get("certificate"),
        "loo_curve": info["loo_curve"],
        "is_reused": is_reused,
        "seconds": time.perf_counter() - started,
        "notes": info["notes"],
    }


def _stored(path: str) -> RowStore | None:
    """Return the store that is there, of whatever settings."""
    try:
        return RowStore.open(path)
    except StoreNotFoundError:
        return None


Representers = Callable[[], Iterator[tuple[int, Float[np.ndarray, "m c p"]]]]
"""A pass over (first row, representers), shard by shard."""


def _compute(settings: Settings, reader: FeatureReader, progress: Progress) -> tuple[dict[str, Any], Representers]:
    """Return what to note about a method and its representers."""
    ridge, curve, notes = choose_ridge(settings, reader)
    info: dict[str, Any] = {"ridge": ridge, "loo_curve": curve}
    if settings.method == "shapley":
        assert ridge is not None
        measured, representers = _shapley(settings, ridge, reader, progress)
        notes += measured.pop("notes")
        info |= measured
    else:
        representers = _score(_scorer(settings, ridge, reader), settings, reader, progress)
        if settings.method == "trak" and reader.output == "loss":
            notes.append("on features of loss, trak equals influence: the gradient already carries the factor 1 - p")
    return {**info, "notes": notes}, representers


def choose_ridge(
    settings: Settings, reader: FeatureReader
) -> tuple[float | None, list[tuple[float, float]], list[str]]:
    """Return the relative ridge, the leave-one-out curve it was chosen by, and notes."""
    if settings.ridge != "loo":
        return settings.ridge, [], []
    assert settings.response is not None
    totals = np.zeros(len(LOO_GRID))
    num_outputs = reader.manifest.num_outputs
    for output in range(num_outputs):
        features = reader.features(settings, output)
        ridges = [absolute_ridge(features, ridge) for ridge in LOO_GRID]
        totals += features.leave_one_out_errors(reader.responses(settings.response, output), ridges)
    curve = [(ridge, float(total) / num_outputs) for ridge, total in zip(LOO_GRID, totals, strict=True)]
    best = int(np.argmin(totals))
    notes = []
    if best in (0, len(LOO_GRID) - 1):
        side = "smallest" if best == 0 else "largest"
        notes.append(
            f"leave-one-out chose ridge {LOO_GRID[best]:g}, the {side} of its grid: the best may lie beyond; "
            "set reduce.ridge to try others"
        )
    return LOO_GRID[best], curve, notes


def _scorer(settings: Settings, ridge: float | None, reader: FeatureReader) -> Scorer[Any]:
    if settings.method == "grad_dot":
        return GradDot()
    if settings.method == "grad_cos":
        return GradCos()
    assert ridge is not None
    if settings.method == "influence":
        return Influence(ridge)
    return Trak(ridge, weighted=reader.output != "loss")


def _score(scorer: Scorer[Any], settings: Settings, reader: FeatureReader, progress: Progress) -> Representers:
    state = scorer.init(reader.features(settings))
    log_odds, num_rows = reader.log_odds, reader.manifest.num_rows

    def representers() -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for start, rows in reader.blocks(settings):
            stop = start + len(rows)
            yield start, scorer.compute(state, rows[:, 0], log_odds[start:stop])[:, None]
            progress(stop, num_rows)

    return representers


def _shapley(
    settings: Settings, ridge: float, reader: FeatureReader, progress: Progress
) -> tuple[dict[str, Any], Representers]:
    """Play the kernel game, one for each output."""
    assert settings.response is not None
    assert settings.form is not None
    assert settings.sum_rule_tolerance is not None
    estimator = MeanField(form=settings.form, tolerance=settings.sum_rule_tolerance)
    num_outputs, size, num_rows = reader.manifest.num_outputs, reader.manifest.shard_size, reader.manifest.num_rows
    spaces, results = [], []
    certificate: Certificate | None = None
    for output in range(num_outputs):

        def report(done: int, total: int, before: int = output) -> None:
            progress(before * total + done, num_outputs * total)

        features = reader.features(settings, output)
        lam = absolute_ridge(features, ridge)
        space = features.space
        game = KernelGame(space.coordinates, reader.responses(settings.response, output), lam)
        results.append(estimator.init(game, report))
        spaces.append(space)
        if settings.certificate_draws:
            queries = sample_queries(space.coordinates, _CERTIFICATE_QUERIES, seed=0)
            found = certify(game, results[-1], queries, Subset(num_draws=settings.certificate_draws))
            certificate = found if certificate is None else certificate.merge(found)
    prefix = ["" if num_outputs == 1 else f"class {output}: " for output in range(num_outputs)]
    notes = [prefix[output] + note for output, result in enumerate(results) for note in result.notes]

    measured = None if certificate is None else certificate.summary()
    if measured is not None and measured.lower > _NOTED_BIAS:
        notes.append(f"the mean field is off: {measured}; take a larger ridge, or reduce.form=pairs")

    def representers() -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for start in range(0, num_rows, size):
            parts = [
                space.lift(result.representers[start : start + size, 0])
                for space, result in zip(spaces, results, strict=True)
            ]
            yield start, np.stack(parts, axis=1).astype(np.float32)

    return {
        "sum_rule_error": max(result.sum_rule_error or 0.0 for result in results),
        "certificate": None if measured is None else dataclasses.asdict(measured),
        "num_nodes": max(result.num_nodes for result in results),
        "num_groups": [result.num_groups for result in results],
        "precision": results[0].precision,
        "notes": notes,
    }, representers


def _write(
    path: str,
    reader: FeatureReader,
    settings: Settings,
    fingerprint: dict[str, str],
    info: dict[str, Any],
    representers: Representers,
) -> None:
    """Write shards that are not there yet; the last one is committed after the vectors, so complete means all."""
    features = reader.manifest
    manifest = Manifest(
        kind="representers",
        num_rows=features.num_rows,
        num_outputs=features.num_outputs,
        dim=features.dim,
        dtype=settings.dtype,
        shard_size=features.shard_size,
        fingerprint=fingerprint,
        info=info,
    )
    store = RowStore.create(path, manifest)
    store.write_vector("mean", reader.center(settings))
    pending = store.pending()
    total = np.zeros((features.num_outputs, features.dim))
    for start, rows in representers():
        shard = start // features.shard_size
        total += rows.sum(axis=0, dtype=np.float64)
        if shard == pending[-1]:
            held = rows
        elif shard in pending:
            store.write_shard(shard, rows, {})
    store.write_vector("total", total.astype(np.float32))
    store.write_shard(pending[-1], held, {})
