"""Training examples to stores of features, shard by shard, on any number of ranks.

What the stores hold is the business of products.py; they are built one after another. For each the first rank checks
that the store fits the settings (or creates it, with a sketch planned on a sample) and hands out the shards that are
not there yet; ranks then work alone. Batches are formed within a shard, so a row's bytes
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

from llmattrib.append import extend
from llmattrib.config import RunConfig, config_to_yaml
from llmattrib.data import load_examples, save_examples
from llmattrib.distributed import Ranks
from llmattrib.encoding import Encoded, length_batches
from llmattrib.errors import (
    FingerprintMismatchError,
    LlmattribError,
    NonFiniteGradientError,
    StoppedError,
    StoreError,
    StoreNotFoundError,
)
from llmattrib.extraction import encode_examples, load_extractor, resolved_config
from llmattrib.lock import Part, locked
from llmattrib.manifest import differing
from llmattrib.products import Product, products
from llmattrib.progress import Progress, silent
from llmattrib.signals import deferred
from llmattrib.storage import atomic_write
from llmattrib.store import RowStore
from llmattrib.words import has_words

MADE_BY = "llmattrib build"


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What a build did to one store, the same on every rank.

    Attributes:
        path: the store.
        num_examples: rows in it.
        num_appended: of these, rows that this run added to a store that was there, as the data had grown.
        num_tokens: tokens of all examples.
        num_truncated: examples whose prompt was cut to fit.
        num_skipped: examples left out because they did not fit.
        num_shards: shards in all.
        num_shards_done: shards computed by this run, on all ranks.
        seconds: from start to end, of both stores.
        words: the same of the word gradients, where the run has them.
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
    words: "BuildResult | None" = None


def build_features(
    config: RunConfig, ranks: Ranks | None = None, progress: Progress = silent, part: Part | None = None
) -> BuildResult:
    """Compute the features of all training examples into the stores of the run; go on where a run stopped.

    These are `config.layout.features`, and `config.layout.words` where `tracin_we` is among the methods. When the data
    has grown at its end since, full shards are kept and only what is new is computed.

    Args:
        config: the run.
        ranks: the processes of the job; called by all of them. One process by default.
        progress: told, on the first rank, of examples done; from its own share it infers the others'. It starts anew
            with each store.
        part: the share of this job when several build the stores together; by default it does all.

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
        MethodError: word gradients are asked for and cannot be taken of these features.
        StoppedError: a signal asked a rank to stop; all have finished their shard, and others are pending.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks()
    with ranks.lockstep(), ExitStack() as held:
        places = [config.layout.features, *([config.layout.words] if has_words(config) else [])]
        ranks.together(lambda: [held.enter_context(locked(path)) for path in places if ranks.is_main and part is None])
        examples = ranks.together(lambda: load_examples(config.data))  # first: quick, and most mistakes are here
        extractor = ranks.in_passes(lambda: load_extractor(config, ranks.sharding))
        encoded = ranks.together(lambda: encode_examples(config, extractor, examples))
        made = ranks.together(lambda: products(config, extractor, encoded))
        result, *others = [_build(product, ranks, progress, part, held) for product in made]
    seconds = time.perf_counter() - started
    return dataclasses.replace(result, words=others[0] if others else None, seconds=seconds)


def _build(product: Product, ranks: Ranks, progress: Progress, part: Part | None, held: ExitStack) -> BuildResult:
    """Fill the store of one product."""
    started = time.perf_counter()
    product.plan(ranks)
    with deferred() as is_asked:  # on every rank before the first shard of any
        todo, num_appended = ranks.on_main(lambda: _join(product, part, held))
        store = RowStore.open(product.path, read_only=False)
        ranks.together(lambda: product.begin(store))
        done = _write(product, store, ranks, todo, progress, lambda: ranks.is_any(is_asked()))
        told = ranks.gather([done, is_asked()])
    all_done = [shard for mine, _ in told for shard in mine]
    ranks.on_main(lambda: _require_all(store, todo, all_done, any(asked for _, asked in told)))
    encoded = product.encoded
    return BuildResult(
        path=product.path,
        num_examples=len(encoded.encoded),
        num_appended=num_appended,
        num_tokens=sum(map(len, encoded.encoded)),
        num_truncated=encoded.num_truncated,
        num_skipped=encoded.num_skipped,
        num_shards=store.num_shards,
        num_shards_done=len(all_done),
        seconds=time.perf_counter() - started,
    )


def _join(product: Product, part: Part | None, held: ExitStack) -> tuple[list[int], int]:
    """Prepare the store, but for a part beside others, which write by what is there; hold the part's lock.

    First rank only.

    Returns:
        The shards to compute, and how many rows were added to a store that was there.
    """
    path, num_appended = product.path, 0
    if part is None:
        return _prepare(product)
    with part.joining(path) as has_others:
        if has_others:
            stored = RowStore.open(path, read_only=False)
            keys = differing(stored.manifest.compared(), product.manifest().compared())
            if keys:
                raise FingerprintMismatchError(path, keys)
            pending = stored.pending()
        else:
            pending, num_appended = _prepare(product)
        held.enter_context(locked(part.place(path)))
    return [shard for shard in pending if part.has(shard)], num_appended


def _prepare(product: Product) -> tuple[list[int], int]:
    """Create, check or extend the store and save what belongs to it; return what `_join` does, of all shards."""
    config, num_appended, manifest = product.config, 0, product.manifest()
    try:
        stored = RowStore.open(product.path, read_only=False)
    except StoreNotFoundError:
        product.precede(manifest)
    else:
        num_appended = extend(stored, manifest, product.encoded, config.layout.examples)
    store = RowStore.create(product.path, manifest)
    product.complete(store)
    save_examples(product.encoded.examples, config.layout.examples)
    atomic_write(config.layout.config, config_to_yaml(resolved_config(config)).encode())
    return store.pending(), num_appended


def _write(
    product: Product,
    store: RowStore,
    ranks: Ranks,
    todo: Sequence[int],
    progress: Progress,
    is_stopped: Callable[[], bool],
) -> list[int]:
    """Compute and commit this rank's share of the shards `todo`, until stopped; return those that are done."""
    mine, encoded = ranks.share(todo), product.encoded.encoded
    num_todo, num_mine = (sum(stop - start for start, stop in map(store.shard_range, part)) for part in (todo, mine))
    num_rows, num_done = store.manifest.num_rows, 0
    progress(num_rows - num_todo, num_rows)

    def report(done: int, _: int) -> None:
        progress(num_rows - num_todo + (num_done + done) * num_todo // num_mine, num_rows)

    def compute(shard: int) -> None:
        store.write_shard(shard, *product.rows(slice(*store.shard_range(shard)), report))

    num_rounds = -(-len(todo) // ranks.world_size) if ranks.sharding else len(mine)
    for number in range(num_rounds):
        if is_stopped():
            return list(mine[:number])
        own = mine[number : number + 1]
        if ranks.sharding:
            shards = todo[number * ranks.world_size : (number + 1) * ranks.world_size]
            parts = [encoded[slice(*store.shard_range(shard))] for shard in shards]
            _in_step(product, parts, ranks, partial(_each, compute, own))
        else:
            _each(compute, own)
        num_done += sum(stop - start for start, stop in map(store.shard_range, own))
    return list(mine)


def _each(action: Callable[[int], None], shards: Sequence[int]) -> None:
    for shard in shards:
        action(shard)


def _in_step(product: Product, parts: Sequence[Sequence[Encoded]], ranks: Ranks, action: Callable[[], object]) -> None:
    """Run `action`, which computes one of `parts` or none, then padding batches up to those of the longest part."""
    budget = product.config.features.tokens_per_batch
    longest = max(len(length_batches(list(map(len, part)), budget)) for part in parts)
    num_batches = product.num_batches + longest
    failure: LlmattribError | None = None
    try:
        action()
    except (NonFiniteGradientError, StoreError) as error:  # between two batches: the others can still be told
        failure = error
    shortest = min((example for part in parts for example in part), key=len)
    while product.num_batches < num_batches:
        product.pad(shortest)

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
