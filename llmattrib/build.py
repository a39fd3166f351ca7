"""Training examples to a store of features, shard by shard, on any number of ranks.

The first rank checks that the store fits the settings (or creates it, with a sketch planned on a sample) and hands
out the shards that are not there yet; ranks then work alone. Batches are formed within a shard, so a row's bytes
depend neither on the number of ranks nor on where an earlier run was stopped. Data that has grown at its end extends
the store (append.py), with the sketch that was planned, and the curvature that was fitted, on the first examples.
Under a launcher a rank that fails ends the job; committed shards are kept, and a rerun computes the others. A signal to
stop (signals.py) to any rank lets every rank finish the shard it is at. Several jobs may build one store, each a part
of its shards (lock.py).

Ranks that share the model's weights (ZeRO-3, FSDP2) go in rounds of one shard each: who has fewer batches, or no shard
left, runs padding batches whose features are thrown away.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

from llmattrib.append import content_fingerprint, extend
from llmattrib.config import RunConfig, config_to_yaml
from llmattrib.data import load_examples, save_examples
from llmattrib.distributed import Ranks
from llmattrib.encoding import Encoded, EncodedSet, length_batches
from llmattrib.errors import (
    FingerprintMismatchError,
    LlmattribError,
    NonFiniteGradientError,
    StoppedError,
    StoreError,
    StoreNotFoundError,
)
from llmattrib.extraction import (
    batch_memory,
    calibration_batches,
    encode_examples,
    extract_rows,
    load_extractor,
    model_fingerprint,
    resolved_config,
)
from llmattrib.features.extract import COLUMNS, Extractor
from llmattrib.features.sketch import Sketch, SketchPlan
from llmattrib.lock import Part, locked
from llmattrib.manifest import differing
from llmattrib.preconditioner import CURVATURE, curvature_digest, fit_curvature, load_curvature
from llmattrib.progress import Progress, silent
from llmattrib.signals import deferred
from llmattrib.storage import atomic_write, exists, require_space
from llmattrib.store import Manifest, RowStore

PACKAGES = ("llmattrib", "numpy", "peft", "tokenizers", "torch", "transformers", "zarr")
"""Their versions are noted in the manifest."""
MADE_BY = "llmattrib build"


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What a build did, the same on every rank.

    Attributes:
        path: the store.
        num_examples: rows in it.
        num_appended: of these, rows that this run added to a store that was there, as the data had grown.
        num_tokens: tokens of all examples.
        num_truncated: examples whose prompt was cut to fit.
        num_skipped: examples left out because they did not fit.
        num_shards: shards in all.
        num_shards_done: shards computed by this run, on all ranks.
        seconds: from start to end.
    """

    path: str
    num_examples: int
    num_appended: int
    num_tokens: int
    num_truncated: int
    num_skipped: int
    num_shards: int
    num_shards_done: int
    seconds: float


def build_features(
    config: RunConfig, ranks: Ranks | None = None, progress: Progress = silent, part: Part | None = None
) -> BuildResult:
    """Compute the features of all training examples into `config.layout.features`; go on where a run stopped.

    When the data has grown at its end since, full shards are kept and only what is new is computed.

    Args:
        config: the run.
        ranks: the processes of the job; called by all of them. One process by default.
        progress: told, on the first rank, of examples done; from its own share it infers the others'.
        part: the share of this job when several build the store together; by default it does all.

    Returns:
        What was done.

    Raises:
        DataError: the examples cannot be used.
        ModelError: base model or adapter is missing or does not fit.
        FingerprintMismatchError: a store of other settings is there, or an old example was changed or removed.
        StoreLockedError: another build writes it now, or this part of it.
        DiskSpaceError: it would not fit on the disk.
        NonFiniteGradientError: an example's gradient is NaN or infinite.
        DeviceMemoryError: a batch does not fit on the device.
        CurvatureError: the curvature does not fit the memory, or the file of the stored features is gone.
        StoppedError: a signal asked a rank to stop; all have finished their shard, and others are pending.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks()
    path = config.layout.features
    with ranks.lockstep(), ExitStack() as held:
        ranks.together(lambda: held.enter_context(locked(path)) if ranks.is_main and part is None else None)
        examples = ranks.together(lambda: load_examples(config.data))  # first: quick, and most mistakes are here
        extractor = ranks.in_passes(lambda: load_extractor(config, ranks.sharding))
        encoded = ranks.together(lambda: encode_examples(config, extractor, examples))
        curvature = _curvature(config, extractor, encoded.encoded, ranks)
        plan = _plan(config, extractor, encoded.encoded, ranks)
        with deferred() as is_asked:  # on every rank before the first shard of any
            todo, num_appended = ranks.on_main(lambda: _join(config, extractor, encoded, plan, curvature, part, held))
            curvature = None  # gigabytes, for large models; it is in its file now
            store = RowStore.open(path, read_only=False)
            ranks.together(lambda: load_curvature(config, extractor, store.manifest.info))
            done = _write(config, extractor, encoded, store, ranks, todo, progress, lambda: ranks.is_any(is_asked()))
            told = ranks.gather([done, is_asked()])
        all_done = [shard for mine, _ in told for shard in mine]
        ranks.on_main(lambda: _require_all(store, todo, all_done, any(asked for _, asked in told)))
    return BuildResult(
        path=path,
        num_examples=len(encoded.encoded),
        num_appended=num_appended,
        num_tokens=sum(map(len, encoded.encoded)),
        num_truncated=encoded.num_truncated,
        num_skipped=encoded.num_skipped,
        num_shards=store.num_shards,
        num_shards_done=len(all_done),
        seconds=time.perf_counter() - started,
    )


def _join(
    config: RunConfig,
    extractor: Extractor,
    encoded: EncodedSet,
    plan: SketchPlan,
    curvature: bytes | None,
    part: Part | None,
    held: ExitStack,
) -> tuple[list[int], int]:
    """Prepare the store, but for a part beside others, which write by the plan that is there; hold the part's lock.

    First rank only.

    Returns:
        The shards to compute, and how many rows were added to a store that was there.
    """
    path, num_appended = config.layout.features, 0
    manifest = _manifest(config, extractor, encoded, plan, curvature)
    if part is None:
        return _prepare(config, encoded, manifest, curvature)
    with part.joining(path) as has_others:
        if has_others:
            stored = RowStore.open(path, read_only=False)
            keys = differing(stored.manifest.compared(), manifest.compared())
            if keys:
                raise FingerprintMismatchError(path, keys)
            pending = stored.pending()
        else:
            pending, num_appended = _prepare(config, encoded, manifest, curvature)
        held.enter_context(locked(part.place(path)))
    return [shard for shard in pending if part.has(shard)], num_appended


def _prepare(
    config: RunConfig, encoded: EncodedSet, manifest: Manifest, curvature: bytes | None
) -> tuple[list[int], int]:
    """Create, check or extend the store and save what belongs to it; return what `_join` does, of all shards."""
    path, num_appended = config.layout.features, 0
    try:
        stored = RowStore.open(path, read_only=False)
    except StoreNotFoundError:
        if curvature is not None:
            require_space(path, manifest.num_bytes + len(curvature))
            atomic_write(config.layout.curvature, curvature)
    else:
        num_appended = extend(stored, manifest, encoded, config.layout.examples)
    store = RowStore.create(path, manifest)
    save_examples(encoded.examples, config.layout.examples)
    atomic_write(config.layout.config, config_to_yaml(resolved_config(config)).encode())
    return store.pending(), num_appended


def _curvature(config: RunConfig, extractor: Extractor, encoded: Sequence[Encoded], ranks: Ranks) -> bytes | None:
    """Fit what whitens the features of a new store, on the first rank, or on all where they share the weights.

    Returns:
        The file to save, on who fitted; None without a preconditioner, or where a store is there that has its own.
    """
    is_new = config.features.preconditioner != "none" and not ranks.on_main(lambda: exists(config.layout.features))

    def fitted() -> bytes | None:
        return fit_curvature(config, extractor, encoded) if is_new and (ranks.is_main or ranks.sharding) else None

    return ranks.in_passes(fitted)


def _plan(config: RunConfig, extractor: Extractor, encoded: Sequence[Encoded], ranks: Ranks) -> SketchPlan:
    """Return the plan of the store's sketch, else the first rank's; where ranks share the weights all of them plan."""

    def stored() -> dict[str, Any] | None:
        try:
            return dict(RowStore.open(config.layout.features).manifest.info["sketch_plan"])
        except StoreNotFoundError:
            return None

    def planned() -> dict[str, Any] | None:
        if not (ranks.is_main or ranks.sharding):
            return None
        sketch, sample = config.features.sketch, calibration_batches(config, encoded)
        with batch_memory(config, max(map(len, sample))):
            return extractor.plan(sketch.kind, config.seed, sketch.dim, sample).to_json()

    plan = ranks.on_main(stored) or ranks.gather(ranks.in_passes(planned))[0]
    return SketchPlan.from_json(plan)


def _manifest(
    config: RunConfig, extractor: Extractor, encoded: EncodedSet, plan: SketchPlan, curvature: bytes | None
) -> Manifest:
    data = content_fingerprint(encoded.examples, encoded.encoded)
    return Manifest(
        kind="features",
        num_rows=len(encoded.encoded),
        num_outputs=extractor.num_outputs,
        dim=plan.dim,
        dtype=config.features.dtype,
        shard_size=config.features.shard_size,
        columns=COLUMNS,
        fingerprint={**model_fingerprint(config, extractor), "data": data},
        info={
            "sketch_plan": plan.to_json(),
            "sketch_rows": len(encoded.encoded),
            **({} if curvature is None else {CURVATURE: curvature_digest(curvature)}),
            "label_ids": list(extractor.label_ids),
            "num_truncated": encoded.num_truncated,
            "num_skipped": encoded.num_skipped,
            "versions": {package: version(package) for package in PACKAGES},
        },
    )


def _write(
    config: RunConfig,
    extractor: Extractor,
    encoded: EncodedSet,
    store: RowStore,
    ranks: Ranks,
    todo: Sequence[int],
    progress: Progress,
    is_stopped: Callable[[], bool],
) -> list[int]:
    """Compute and commit this rank's share of the shards `todo`, until stopped; return those that are done."""
    sketch = Sketch(SketchPlan.from_json(dict(store.manifest.info["sketch_plan"])), extractor.loaded.device)
    mine = ranks.share(todo)
    num_todo, num_mine = (sum(stop - start for start, stop in map(store.shard_range, part)) for part in (todo, mine))
    num_rows, num_done = store.manifest.num_rows, 0
    progress(num_rows - num_todo, num_rows)

    def report(done: int, _: int) -> None:
        progress(num_rows - num_todo + (num_done + done) * num_todo // num_mine, num_rows)

    def compute(shard: int) -> None:
        part = slice(*store.shard_range(shard))
        rows, columns = extract_rows(
            config, extractor, sketch, encoded.encoded[part], encoded.examples[part], progress=report
        )
        store.write_shard(shard, rows, columns)

    num_rounds = -(-len(todo) // ranks.world_size) if ranks.sharding else len(mine)
    for number in range(num_rounds):
        if is_stopped():
            return list(mine[:number])
        own = mine[number : number + 1]
        if ranks.sharding:
            shards = todo[number * ranks.world_size : (number + 1) * ranks.world_size]
            parts = [encoded.encoded[slice(*store.shard_range(shard))] for shard in shards]
            _in_step(config, extractor, sketch, parts, ranks, partial(_each, compute, own))
        else:
            _each(compute, own)
        num_done += sum(stop - start for start, stop in map(store.shard_range, own))
    return list(mine)


def _each(action: Callable[[int], None], shards: Sequence[int]) -> None:
    for shard in shards:
        action(shard)


def _in_step(
    config: RunConfig,
    extractor: Extractor,
    sketch: Sketch,
    parts: Sequence[Sequence[Encoded]],
    ranks: Ranks,
    action: Callable[[], object],
) -> None:
    """Run `action`, which computes one of `parts` or none, then padding batches up to those of the longest part."""
    longest = max(len(length_batches(list(map(len, part)), config.features.tokens_per_batch)) for part in parts)
    num_batches = extractor.num_batches + longest
    failure: LlmattribError | None = None
    try:
        action()
    except (NonFiniteGradientError, StoreError) as error:  # between two batches: the others can still be told
        failure = error
    shortest = min((example for part in parts for example in part), key=len)
    while extractor.num_batches < num_batches:
        extractor.extract([shortest], sketch)

    def tell() -> None:
        if failure is not None:
            raise failure

    ranks.together(tell)


def _require_all(store: RowStore, todo: Sequence[int], done: Sequence[int], is_stopped: bool) -> None:
    """Raise unless every shard that was to be computed is there. First rank only."""
    pending = store.pending()
    missing = len({*todo} & {*pending})
    if missing and is_stopped:
        after = f"after shard {max(done)}" if done else "before the first shard"
        raise StoppedError(
            f"asked to stop, the build of {store.path} has stopped {after}: "
            f"{store.num_shards - len(pending)} of {store.num_shards} shards are finished",
            fix="run the same command again: it goes on from there",
        )
    if missing:
        store.require_complete(MADE_BY)
