"""Features to representers: one store for each method, so that any query is answered by inner products.

    score_i = <q, v_i>,   q = phi(query) - mean, scaled to unit norm when info["normalize"]

holds for every method; a positive score means that training on i raises the query's answer. A representer store has
the shape and shards of the feature store, the vectors `mean` (zeros when not centred) and `total` (sum of all
representers), and in `info` what was chosen. Its fingerprint is a digest of the feature data and the resolved
settings: an equal one is reused, another one is replaced, since all of it can be computed again.

Memory: gradient methods hold p x p (or, n < p, the n x p rows); semivalues hold the features, see
estimators.mean_field, and those of one run are computed together, in one sweep over q.
The first rank does the work; rows would be shared out in `games.kernel.form_gram`.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib import storage
from llmattrib.config import Method, RunConfig, digest
from llmattrib.distributed import Ranks
from llmattrib.errors import StoreNotFoundError
from llmattrib.estimators.certificate import MeasuredBias
from llmattrib.lock import locked
from llmattrib.methods import MethodName
from llmattrib.progress import Progress, silent
from llmattrib.reader import FeatureReader, Representers, choose_ridge
from llmattrib.scorers.gradient import GradCos, GradDot, Influence, Scorer, Trak
from llmattrib.semivalues import play
from llmattrib.settings import Settings, resolve
from llmattrib.store import Manifest, RowStore

MADE_BY = "llmattrib reduce"
_STEPS = 100  # of progress, for each method


@dataclass(frozen=True)
class ReduceResult:
    """What was done for one method, the same on every rank.

    Attributes:
        method: its name.
        path: its store.
        num_examples: rows in it.
        ridge: in units of the mean squared feature norm; None where there is none.
        sum_rule_error: of Shapley values, relative to the full model; None for other methods.
        certificate: measured bias of semivalues; None for other methods or without draws.
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
    results: dict[Method, dict[str, Any]] = {}
    with locked(config.layout.path("representers")):
        jobs = [_Job(config.layout.representers(item.method), item, reader) for item in settings]
        for group in _together(jobs):

            def report(done: int, total: int, before: int = len(results), size: int = len(group)) -> None:
                progress(_STEPS * before + size * _STEPS * done // total, len(jobs) * _STEPS)

            results |= _run(group, reader, report)
            report(1, 1)
    return [results[method] for method in reduce.methods]


class _Job:
    """One method: where its representers go, and whether they are there."""

    def __init__(self, path: str, settings: Settings, reader: FeatureReader) -> None:
        self.path, self.settings, self.resolved = path, settings, dataclasses.asdict(settings)
        self.fingerprint = {"features": reader.store.digest(), "settings": digest(self.resolved)}
        stored = _stored(path)
        self.is_other = stored is not None and dict(stored.manifest.fingerprint) != self.fingerprint
        is_reused = stored is not None and not self.is_other and stored.is_complete
        self.info = dict(stored.manifest.info) if stored is not None and is_reused else None


def _together(jobs: list[_Job]) -> list[list[_Job]]:
    """Group what is computed together: the semivalues that are not there, everything else by itself."""
    swept = [job for job in jobs if job.info is None and MethodName.parse(job.settings.method).is_semivalue]
    return [swept if job in swept else [job] for job in jobs if job not in swept[1:]]


def _run(jobs: list[_Job], reader: FeatureReader, progress: Progress) -> dict[Method, dict[str, Any]]:
    """Make the stores of methods that are computed together, or reuse the one of a single method."""
    started = time.perf_counter()
    if jobs[0].info is None:
        return {
            job.settings.method: _make(job, reader, info, representers, started)
            for job, (info, representers) in zip(jobs, _compute(jobs, reader, progress), strict=True)
        }
    return {job.settings.method: _result(job, job.info, reader, started) for job in jobs if job.info is not None}


def _make(
    job: _Job, reader: FeatureReader, info: dict[str, Any], representers: Representers, started: float
) -> dict[str, Any]:
    """Write the store of a method."""
    info = {**job.resolved, **info}
    if job.is_other:
        storage.remove(job.path)  # only now: what is there stays when the new cannot be computed
    _write(job.path, reader, job.settings, job.fingerprint, info, representers)
    return _result(job, info, reader, started)


def _result(job: _Job, info: dict[str, Any], reader: FeatureReader, started: float) -> dict[str, Any]:
    return {
        "method": job.settings.method,
        "path": job.path,
        "num_examples": reader.manifest.num_rows,
        "ridge": info["ridge"],
        "sum_rule_error": info.get("sum_rule_error"),
        "certificate": info.get("certificate"),
        "loo_curve": info["loo_curve"],
        "is_reused": job.info is not None,
        "seconds": time.perf_counter() - started,
        "notes": info["notes"],
    }


def _stored(path: str) -> RowStore | None:
    """Return the store that is there, of whatever settings."""
    try:
        return RowStore.open(path)
    except StoreNotFoundError:
        return None


def _compute(jobs: list[_Job], reader: FeatureReader, progress: Progress) -> list[tuple[dict[str, Any], Representers]]:
    """Return what to note about each method and its representers."""
    settings = jobs[0].settings
    ridge, curve, notes = choose_ridge(settings, reader)
    info: dict[str, Any] = {"ridge": ridge, "loo_curve": curve}
    if MethodName.parse(settings.method).is_semivalue:
        assert ridge is not None
        played = play([job.settings for job in jobs], ridge, reader, progress)
        return [
            ({**info, **measured, "notes": notes + measured["notes"]}, representers)
            for measured, representers in played
        ]
    if settings.method == "trak" and reader.output == "loss":
        notes.append("on features of loss, trak equals influence: the gradient already carries the factor 1 - p")
    representers = _score(_scorer(settings, ridge, reader), settings, reader, progress)
    return [({**info, "notes": notes}, representers)]


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
