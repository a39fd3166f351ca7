"""Features to representers: one store for each method, so that any query is answered by inner products.

    score_i = <q, v_i>,   q = phi(query) - mean, scaled to unit norm when info["normalize"],
                                               each adapter's part by itself (info["members"])

holds for every method; a positive score means that training on i raises the query's answer. A representer store has
the shape and shards of the feature store, the vectors `mean` (zeros when not centred) and `total` (sum of all
representers), and in `info` what was chosen. Its fingerprint is a digest of the feature data and the resolved
settings: an equal one is reused, another one is replaced, since all of it can be computed again.

Ranks: each reads, reduces and writes its own share of the shards for gradient methods and streamed semivalues; what
they sum (mean, Gram, leave-one-out errors, `total`) is the same to rounding for any number of them, and the same bytes
for the same number. Semivalues of another form are computed and written by the first rank alone.
Memory: gradient methods hold p x p (or, n < p, the n x p rows) and a few shards, whatever n is, but for 16 bytes a row
where leave-one-out chooses the ridge; streamed semivalues see estimators.streamed; the others hold the features, see
estimators.mean_field. Semivalues of one run are computed together, in one sweep over q.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib import storage
from llmattrib.config import RunConfig, digest
from llmattrib.distributed import Ranks
from llmattrib.errors import StoreNotFoundError
from llmattrib.estimators.certificate import MeasuredBias
from llmattrib.games.kernel import ridge_errors
from llmattrib.lock import locked
from llmattrib.methods import MethodName
from llmattrib.progress import Progress, silent
from llmattrib.reader import FeatureReader, Representers, choose_ridge
from llmattrib.scorers.datainf import ColumnBlock, DataInf
from llmattrib.scorers.gradient import GradCos, GradDot, Influence, Scorer, Trak
from llmattrib.scorers.iterative import TOLERANCE, InfluenceCg, InfluenceLissa, LissaState
from llmattrib.scorers.members import Members
from llmattrib.scorers.spectral import Spectral
from llmattrib.scorers.tracin_we import WordSketch
from llmattrib.sections import Method
from llmattrib.semivalues import play
from llmattrib.settings import Settings
from llmattrib.store import Manifest, RowStore
from llmattrib.words import METHOD as WORDS
from llmattrib.words import has_words, open_words, stored_words

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
        MethodError: a method cannot use these features, does not fit the memory, or its ridge is lost in rounding.
        StoreLockedError: another process reduces this run now.
        DiskSpaceError: the representers would not fit on the disk.
    """
    ranks = ranks or Ranks()
    trees = ranks.together(lambda: _reduce(config, ranks, progress))
    return [_from_tree(tree) for tree in trees]


def _from_tree(tree: dict[str, Any]) -> ReduceResult:
    """Undo what JSON does to a result."""
    certificate = None if tree["certificate"] is None else MeasuredBias(**tree["certificate"])
    curve = tuple(map(tuple, tree["loo_curve"]))
    return ReduceResult(**{**tree, "certificate": certificate, "loo_curve": curve, "notes": tuple(tree["notes"])})


def _reduce(config: RunConfig, ranks: Ranks, progress: Progress) -> list[dict[str, Any]]:
    """Return the fields of each method's result; what ranks tell each other is JSON."""
    store, methods = RowStore.open(config.layout.features), config.reduce.methods
    store.require_complete()
    reader = FeatureReader(store, ranks)
    words = open_words(config) if has_words(config) else None
    settings = [reader.resolve(config.reduce, method) for method in methods]
    results: dict[Method, dict[str, Any]] = {}
    with locked(config.layout.path("representers")) if ranks.is_main else nullcontext():
        jobs = _jobs(config, store, words, settings, ranks)
        for group in _together(jobs):

            def report(done: int, total: int, before: int = len(results), size: int = len(group)) -> None:
                progress(_STEPS * before + size * _STEPS * done // total, len(jobs) * _STEPS)

            if words is not None and group[0].settings.method == WORDS:
                results[WORDS] = _sketch_words(config, group[0], words, ranks, report)
            else:
                results |= _run(group, reader, report)
            report(1, 1)
        return ranks.on_main(lambda: [results[method] for method in methods])


@dataclass(frozen=True)
class _Job:
    """One method: where its representers go, and whether they are there.

    Attributes:
        path: its store.
        settings: its settings.
        fingerprint: of its store.
        is_other: whether a store of another fingerprint is there.
        info: of the store that is there, complete and with this fingerprint.
    """

    path: str
    settings: Settings
    fingerprint: dict[str, str]
    is_other: bool
    info: dict[str, Any] | None


def _jobs(
    config: RunConfig, store: RowStore, words: RowStore | None, settings: Sequence[Settings], ranks: Ranks
) -> list[_Job]:
    """Return the methods' jobs as the first rank finds them."""
    paths = [config.layout.representers(item.method) for item in settings]

    def find() -> list[Any]:
        data = store.digest()
        prints = [{"features": data, "settings": item.digest()} for item in settings]
        for number, item in enumerate(settings):
            if words is not None and item.method == WORDS:
                sketch = dataclasses.asdict(_word_sketch(config, words))
                made_with = digest({**dataclasses.asdict(item), "sketch": sketch})
                prints[number] = {"features": words.digest(), "settings": made_with}
        return [_find(path, fingerprint) for path, fingerprint in zip(paths, prints, strict=True)]

    found = ranks.on_main(find)
    return [_Job(path, item, *known) for path, item, known in zip(paths, settings, found, strict=True)]


def _find(path: str, fingerprint: dict[str, str]) -> tuple[dict[str, str], bool, dict[str, Any] | None]:
    """Return the fingerprint, whether a store of another one is there, and `info` of a finished one of this."""
    try:
        stored = RowStore.open(path)
    except StoreNotFoundError:
        return fingerprint, False, None
    is_other = dict(stored.manifest.fingerprint) != fingerprint
    return fingerprint, is_other, dict(stored.manifest.info) if stored.is_complete and not is_other else None


def _together(jobs: list[_Job]) -> list[list[_Job]]:
    """Group what is computed together: the semivalues that are not there, everything else by itself."""
    swept = [job for job in jobs if job.info is None and MethodName.parse(job.settings.method).is_semivalue]
    return [swept if job in swept else [job] for job in jobs if job not in swept[1:]]


def _run(jobs: list[_Job], reader: FeatureReader, progress: Progress) -> dict[Method, dict[str, Any]]:
    """Make the stores of methods that are computed together, or reuse the one of a single method."""
    started, first = time.perf_counter(), jobs[0]
    if first.info is not None:
        return {first.settings.method: _result(first, first.info, reader.manifest.num_rows, started)}
    if MethodName.parse(first.settings.method).is_semivalue:
        if first.settings.form == "streamed":
            return _sweep(jobs, reader, started, progress)
        return reader.ranks.on_main(lambda: _sweep(jobs, reader.alone(), started, progress))
    return {first.settings.method: _stream(first, reader, started, progress)}


def _result(job: _Job, info: dict[str, Any], num_rows: int, started: float) -> dict[str, Any]:
    return {
        "method": job.settings.method,
        "path": job.path,
        "num_examples": num_rows,
        "ridge": info["ridge"],
        "sum_rule_error": info.get("sum_rule_error"),
        "certificate": info.get("certificate"),
        "loo_curve": info["loo_curve"],
        "is_reused": job.info is not None,
        "seconds": time.perf_counter() - started,
        "notes": info["notes"],
    }


def _sweep(jobs: list[_Job], reader: FeatureReader, started: float, progress: Progress) -> dict[Method, dict[str, Any]]:
    """Make the stores of semivalues: streamed by all ranks, else by one."""
    ridge, curve, notes = choose_ridge(jobs[0].settings, reader)
    assert ridge is not None
    results = {}
    played = play([job.settings for job in jobs], ridge, reader, progress)
    for job, (measured, representers) in zip(jobs, played, strict=True):
        info = {"ridge": ridge, "loo_curve": curve, **measured, "notes": notes + measured["notes"]}
        center = reader.center(job.settings)
        results[job.settings.method] = _write(job, reader.manifest, center, info, representers, reader.ranks, started)
    return results


def _stream(job: _Job, reader: FeatureReader, started: float, progress: Progress) -> dict[str, Any]:
    """Make the store of a gradient method, by all ranks."""
    settings = job.settings
    ridge, curve, notes = choose_ridge(settings, reader)
    if settings.method == "trak" and reader.output == "loss":
        notes.append("on features of loss, trak equals influence: the gradient already carries the factor 1 - p")
    scorer: Scorer[Any]
    if settings.ensemble is None:
        scorer = _scorer(settings, ridge, reader)
    else:
        members = reader.members()
        widths = tuple(sum(block.width for block in blocks) for blocks in members)
        scorer = Members(tuple(_scorer(settings, ridge, reader, blocks) for blocks in members), widths)
    is_spectral = MethodName.parse(settings.method).kind == "spectral"
    with ridge_errors():
        state = scorer.init(reader.curved(settings) if is_spectral else reader.features(settings))
    for own in state if isinstance(scorer, Members) else [state]:
        if isinstance(own, LissaState) and own.residual > TOLERANCE:
            notes.append(f"LiSSA stops after {own.iterations} iterations with residuals of up to {own.residual:.2g}")
    representers = _score(scorer, state, settings, reader, progress)
    info = {"ridge": ridge, "loo_curve": curve, "notes": notes}
    return _write(job, reader.manifest, reader.center(settings), info, representers, reader.ranks, started)


def _scorer(
    settings: Settings, ridge: float | None, reader: FeatureReader, blocks: Sequence[ColumnBlock] | None = None
) -> Scorer[Any]:
    """Return the scorer of a method, of some columns or of all."""
    name = MethodName.parse(settings.method)
    if name.kind == "grad_dot":
        return GradDot()
    if name.kind == "grad_cos":
        return GradCos(settings.members)
    if name.kind == "spectral":
        return Spectral(int(name.arguments[0]), name.arguments[1], weighted=reader.output in ("log_odds", "margin"))
    assert ridge is not None
    if name.kind == "influence":
        return Influence(ridge)
    if name.kind == "datainf":
        return DataInf(ridge, blocks or reader.column_blocks())
    if name.kind == "trak":
        return Trak(ridge, weighted=reader.output != "loss")
    assert settings.iterations is not None
    if name.kind == "influence_cg":
        return InfluenceCg(ridge, settings.iterations)
    return InfluenceLissa(ridge, settings.iterations)


def _score(
    scorer: Scorer[Any], state: Any, settings: Settings, reader: FeatureReader, progress: Progress
) -> Representers:
    num_mine = len(reader.shards)

    def representers() -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for done, (start, rows) in enumerate(reader.blocks(settings), start=1):
            log_odds = reader.store.column("log_odds", start, start + len(rows))
            yield start, scorer.compute(state, rows[:, 0], log_odds)[:, None]
            progress(done, num_mine)

    return representers


def _word_sketch(config: RunConfig, words: RowStore) -> WordSketch:
    return WordSketch.planned(config.seed, words.manifest.dim, config.words.sketch_dim, config.words.sketch_width)


def _sketch_words(config: RunConfig, job: _Job, words: RowStore, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    """Make the store of sketched word gradients, by all ranks."""
    started = time.perf_counter()
    if job.info is not None:
        return _result(job, job.info, words.manifest.num_rows, started)
    sketch, mine = _word_sketch(config, words), ranks.share(range(words.num_shards))

    def representers() -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for done, (start, rows) in enumerate(words.blocks(mine), start=1):
            named = stored_words(words, start, start + len(rows))
            yield start, sketch.apply(list(named), list(rows))[:, None]
            progress(done, len(mine))

    shape = dataclasses.replace(words.manifest, num_outputs=1, dim=sketch.dim)
    info: dict[str, Any] = {"ridge": None, "loo_curve": [], "notes": [], "word_sketch": dataclasses.asdict(sketch)}
    center = np.zeros((1, sketch.dim), np.float32)
    return _write(job, shape, center, info, representers, ranks, started)


def _write(
    job: _Job,
    features: Manifest,
    center: Float[np.ndarray, "c p"],
    info: dict[str, Any],
    representers: Representers,
    ranks: Ranks,
    started: float,
) -> dict[str, Any]:
    """Write shards that are not there yet, each rank its own; return the fields of the method's result.

    The last one is committed after the vectors, so complete means all.

    Args:
        job: the method.
        features: rows, outputs, width and shards of the store.
        center: the vector `mean`.
        info: of the store, beside the settings.
        representers: this rank's.
        ranks: the processes of the job.
        started: when the method was begun.
    """
    info = {**dataclasses.asdict(job.settings), **info}
    pending = ranks.on_main(lambda: _create(job, features, info))
    store, todo, last = RowStore.open(job.path, made_by=MADE_BY, read_only=False), set(pending[:-1]), pending[-1]
    held: list[np.ndarray] = []

    def write() -> Float[np.ndarray, "c p"]:
        total = np.zeros(center.shape)
        for start, rows in representers():
            shard = start // features.shard_size
            total += rows.sum(axis=0, dtype=np.float64)
            if shard == last:
                held.append(rows)
            elif shard in todo:
                store.write_shard(shard, rows, {})
        return total

    total = ranks.total(write)

    def write_vectors() -> None:
        store.write_vector("mean", center)
        store.write_vector("total", total.astype(np.float32))

    ranks.on_main(write_vectors)

    def write_last() -> None:
        for rows in held:
            store.write_shard(last, rows, {})

    ranks.together(write_last)
    return _result(job, info, features.num_rows, started)


def _create(job: _Job, features: Manifest, info: dict[str, Any]) -> list[int]:
    """Make the store of a method, or resume it; return its pending shards."""
    if job.is_other:
        storage.remove(job.path)  # only now: what is there stays when the new cannot be computed
    manifest = Manifest(
        kind="representers",
        num_rows=features.num_rows,
        num_outputs=features.num_outputs,
        dim=features.dim,
        dtype=job.settings.dtype,
        shard_size=features.shard_size,
        fingerprint=job.fingerprint,
        info=info,
    )
    return RowStore.create(job.path, manifest).pending()
