"""Checks of a whole run: every byte of its stores, and that each was made from what is there now.

    features, words, validation, representers      every shard: crc32c, checksum, finite numbers; vectors; fingerprints
    values/subsets.zarr, {retraining,gold}/*.zarr  every shard of the tables
    curvature.safetensors                          the digest that the features carry
    adapters                                       their weights: the digests that train and the features keep
    examples.parquet, values/<method>.*            number of rows, fingerprints
    index/<method>.*                               checksums, and the vectors against the representers
    everything                                     temporary files and locks that killed processes left

A finding says what is wrong and which command makes it right. All that repair does is remove: the commit record of a
broken shard (so that its stage computes it again, to the same bytes), what is stale or broken as a whole and can be
made again, and what killed processes left. It holds every lock of the run meanwhile. What is downstream of a broken
shard is kept, for it is right again when the shard is. A feature store whose metadata cannot be read is left to a
person.

Limits: `train` takes no lock, so no repair beside it. Stages that were never run are not missed, save build.
"""

import csv
import io
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmattrib import storage
from llmattrib.adapters import adapter_faults
from llmattrib.commits import Problem
from llmattrib.config import RunConfig
from llmattrib.data import MAX_CELL, data_fingerprint, read_examples
from llmattrib.errors import DataError, StoreAccessError, StoreError, StoreNotFoundError
from llmattrib.extraction import settings_fingerprint
from llmattrib.index import verify_index
from llmattrib.lock import holder, lock_path, locked, parts
from llmattrib.manifest import differing
from llmattrib.preconditioner import wrong_curvature
from llmattrib.store import RowStore
from llmattrib.table import TableStore
from llmattrib.train import adapter_paths
from llmattrib.values.stage import TABLE_METHODS
from llmattrib.values.validation import features_fingerprint
from llmattrib.words import CLUSTERS, has_words, word_settings_fingerprint
from llmattrib.words import METHOD as WORDS

Store = TypeVar("Store", RowStore, TableStore)
VECTORS = ("mean", "total")
"""What representers hold besides their rows."""
INDEX_FILES = (".faiss", ".sample.npy", ".json")
VALUES_FILES = (".csv", ".parquet", ".json")
UNCOMMITTED = "is not committed"
OUTDATED = "was made from other features than are there now"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Attributes:
        place: the file or store, below the run directory.
        what: what is wrong with it.
        rerun: the command that makes it right, after a repair where `removable` is not empty.
        shards: first and last shard that it is about, if any.
        rows: their first row and the row after their last.
        removable: paths that a repair removes.
        is_leftover: whether nothing is missing once they are removed.
    """

    place: str
    what: str
    rerun: str
    shards: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    removable: tuple[str, ...] = ()
    is_leftover: bool = False


def verify_run(config: RunConfig, target: Sequence[str], *, repair: bool = False) -> list[Finding]:
    """Read all of a run and compare it with its checksums, fingerprints and numbers of rows.

    Args:
        config: the run.
        target: how the user named it, with overrides, for the commands of the findings.
        repair: remove what findings call removable; all else is only read.

    Returns:
        What is wrong, in the order of the stages; empty when the run is sound.

    Raises:
        StoreLockedError: a repair was asked for while another process writes the run.
        StoreAccessError: a path cannot be read, or not be written by a repair; what it holds is not judged.
    """
    checks = _Checks(config, shlex.join(target))
    if not repair:
        return list(checks.run())
    places = [config.layout.path(name) for name in checks.locks()]
    found = list(checks.lock_findings())
    with ExitStack() as held:
        for place in places:
            held.enter_context(locked(place))
        found += checks.contents()
        for finding in found:
            for path in finding.removable:
                if not path.endswith(".lock"):  # held by now, and removed by whom it belongs to
                    storage.remove(path)
    return found


class _Checks:
    """The checks of one run; each yields findings."""

    def __init__(self, config: RunConfig, target: str) -> None:
        self.config, self.layout, self.target = config, config.layout, target

    def command(self, stage: str, *settings: str) -> str:
        """Return the command line of a stage."""
        return " ".join([f"llmattrib {stage} {self.target}", *map(shlex.quote, settings)])

    def of_method(self, stage: str, method: str) -> str:
        """Return the command line of reduce or index that does this method."""
        is_default = method in self.config.reduce.methods
        return self.command(stage, *([] if is_default else [f"reduce.methods={json.dumps([method])}"]))

    def short(self, path: str) -> str:
        """Return a path below the run directory."""
        return path.removeprefix(self.layout.run_dir + "/")

    def locks(self) -> list[str]:
        """Return what is locked in a run: the features, their parts, and of the others those that are there."""
        others = ("representers", "index", "values", "retraining", "gold")
        names = [name for name in others if any(map(storage.exists, map(self.layout.path, (name, f"{name}.lock"))))]
        built = [self.layout.features, *([self.layout.words] if self.has_words() else [])]
        held = [place for path in built for place in (path, *(part.place(path) for part in parts(path)))]
        return [*map(self.short, held), *names]

    def has_words(self) -> bool:
        """Say whether the run has word gradients, or should."""
        return has_words(self.config) or storage.exists(self.layout.words)

    def run(self) -> Iterator[Finding]:
        """All checks; temporary files are those of a live writer while there is one."""
        found = list(self.lock_findings())
        yield from found
        yield from self.contents(has_writer=any(not finding.is_leftover for finding in found))

    def lock_findings(self) -> Iterator[Finding]:
        """Locks that are held, or were left."""
        for name in self.locks():
            lock = lock_path(self.layout.path(name))
            held = holder(self.layout.path(name))
            if held is None:
                continue
            who, may_live = held
            if may_live:
                wait = f"wait for it to end (if it is known to be gone: delete {lock}), then {self.command('verify')}"
                yield Finding(self.short(lock), f"{name} is being written by {who}", wait)
            else:
                what = f"was left by {who}, which is gone"
                yield Finding(
                    self.short(lock), what, self.command("verify", "--repair"), removable=(lock,), is_leftover=True
                )

    def contents(self, has_writer: bool = False) -> Iterator[Finding]:
        """Everything but locks."""
        build = self.command("build")
        found: list[Finding] = []
        features = self.open(self.layout.features, RowStore.open, build, found, is_rebuilt=False)
        if features is not None:
            found += self.problems(features, features.verify(), build)
        is_sound = not found
        yield from found
        if features is not None:
            yield from self.settings(features, settings_fingerprint(self.config))
            yield from self.adapters(features)
            yield from self.curvature(features)
            yield from self.examples(features)
            yield from self.validation(features, is_sound)
        digest = features.digest() if features is not None and is_sound else None
        words: list[str] = []
        yield from self.words(words)
        yield from self.representers(digest, words[0] if words else None)
        yield from self.values(digest)
        yield from self.sub_models()
        if not has_writer:
            yield from self.leftovers()

    def open(
        self,
        path: str,
        opener: Callable[[str], Store],
        rerun: str,
        found: list[Finding],
        is_rebuilt: bool = True,
    ) -> Store | None:
        """Open a store; what cannot be opened is found, and removable when a repair may."""
        place = self.short(path)
        try:
            return opener(path)
        except StoreNotFoundError:
            found.append(Finding(place, "there is no finished store", rerun))
        except StoreAccessError:
            raise
        except StoreError as error:
            if is_rebuilt:
                found.append(Finding(place, error.found, rerun, removable=(path,)))
            else:
                found.append(Finding(place, error.found, f"rm -r {shlex.quote(path)} && {rerun}"))
        return None

    def problems(self, store: RowStore | TableStore, problems: Sequence[Problem], rerun: str) -> Iterator[Finding]:
        """Turn problems of a store into findings, neighbouring shards without a record into one."""
        size, place = store.manifest.shard_size, self.short(store.path)
        num_rows = store.manifest.num_rows if isinstance(store, RowStore) else store.manifest.num_shards * size
        runs: list[tuple[int, int, str]] = []
        for shard, what in problems:
            if runs and what == UNCOMMITTED == runs[-1][2] and shard == runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], shard, what)
            else:
                runs.append((shard, shard, what))
        for first, last, what in runs:
            if first < 0:  # a vector: the writer of the last shard writes the vectors
                yield Finding(place, what, rerun, removable=_records(store, -(-num_rows // size) - 1))
                continue
            records = _records(store, first)
            start, stop = first * size, min((last + 1) * size, num_rows)
            if start >= num_rows:
                again = self.command("verify", "--repair")
                yield Finding(place, what, again, (first, last), removable=records, is_leftover=True)
                continue
            yield Finding(place, _without_place(what, store.path), rerun, (first, last), (start, stop), records)

    def words(self, digest: list[str]) -> Iterator[Finding]:
        """The word gradients; the digest of sound ones is put into `digest`."""
        if not self.has_words():
            return
        build, found = self.command("build"), list[Finding]()
        store = self.open(self.layout.words, RowStore.open, build, found)
        if store is not None:
            problems = store.verify()
            if self.config.words.synonym_cosine and CLUSTERS not in storage.list_names(f"{store.path}/vectors"):
                problems.insert(0, Problem(-1, f"vector {CLUSTERS!r} is missing"))
            found += self.problems(store, problems, build)
            if not found:
                digest.append(store.digest())
            found += self.settings(store, word_settings_fingerprint(self.config))
        yield from found

    def settings(self, features: RowStore, wanted: Mapping[str, Any]) -> Iterator[Finding]:
        """The config against the settings that features were made with."""
        stored = {key: features.manifest.fingerprint.get(key) for key in wanted}
        keys = differing(stored, json.loads(json.dumps(wanted)))
        if keys:
            rows = "; ".join(f"{key}: stored {old!r}, now {new!r}" for key, (old, new) in keys.items())
            again = f"restore these settings, or: rm -r {shlex.quote(features.path)} && {self.command('build')}"
            yield Finding(self.short(features.path), f"was made with other settings ({rows})", again)

    def adapters(self, features: RowStore) -> Iterator[Finding]:
        """The adapters that features are made at and queries answered by: there, and the same as then."""
        named, stored = self.config.model.adapters, features.manifest.fingerprint["model"].get("adapters")
        paths = named or (adapter_paths(self.config) if stored else [self.layout.adapter])
        if not (named or stored or features.manifest.info.get("has_adapter") or storage.exists(paths[0])):
            return  # the base model answers
        for path, what, is_of_features in adapter_faults(paths, stored):
            again = self.command("train")
            if named:
                again = "restore it, or correct model.adapters"
            elif is_of_features:
                again = f"restore it, or: rm -r {shlex.quote(features.path)} && {self.command('build')}"
            elif storage.exists(path):
                again = f"rm -r {shlex.quote(path)} && {again}"
            yield Finding(self.short(path), what, again)

    def curvature(self, features: RowStore) -> Iterator[Finding]:
        """The file that the features were whitened with."""
        wrong = wrong_curvature(self.layout.curvature, features.manifest.info)
        if wrong:
            again = f"restore it, or: rm -r {shlex.quote(features.path)} && {self.command('build')}"
            yield Finding(self.short(self.layout.curvature), wrong, again)

    def examples(self, features: RowStore) -> Iterator[Finding]:
        """The texts against the features."""
        place, what = self.short(self.layout.examples), ""
        num_rows = features.manifest.num_rows
        try:
            examples = read_examples(self.layout.examples)
        except DataError as error:
            what = error.found
        except (ValueError, OSError, pa.ArrowException) as error:
            what = f"cannot be read ({error})"
        else:
            if len(examples) != num_rows:
                what = f"holds {len(examples):,} examples, and the features are of {num_rows:,}"
            elif data_fingerprint(examples) != features.manifest.fingerprint["data"]["examples"]:
                what = "holds other texts than the features were made from"
        if what:
            yield Finding(place, what, self.command("build"))

    def validation(self, features: RowStore, is_sound: bool) -> Iterator[Finding]:
        """The validation features, and whether they were made as the training features are."""
        path, rerun, found = self.layout.validation, self.command("values"), list[Finding]()
        if not storage.exists(path):
            return
        store = self.open(path, RowStore.open, rerun, found)
        yield from found
        if store is None:
            return
        stored = {key: value for key, value in store.manifest.fingerprint.items() if key != "validation"}
        if is_sound and differing(stored, features_fingerprint(features)):
            what = "was made with other settings than the features that are there now"
            yield Finding(self.short(path), what, rerun, removable=(path,))
        else:
            yield from self.problems(store, store.verify(), rerun)

    def representers(self, features: str | None, words: str | None) -> Iterator[Finding]:
        """All representers and indices; without the digest of sound features, or words, chains are not compared."""
        stores: dict[str, RowStore | None] = {}
        outdated = set()
        for name in storage.list_names(self.layout.path("representers")):
            path, found = self.layout.path("representers", name), list[Finding]()
            if not name.endswith(".zarr"):
                continue
            store = self.open(path, RowStore.open, self.command("reduce"), found)
            if store is not None:
                method = store.manifest.info["method"]
                rerun, source = self.of_method("reduce", method), words if method == WORDS else features
                if source is not None and store.manifest.fingerprint["features"] != source:
                    found.append(Finding(self.short(path), OUTDATED, rerun, removable=(path,)))
                    outdated.add(name.removesuffix(".zarr"))
                else:
                    found += self.representer_store(store, rerun)
            yield from found
            stores[name.removesuffix(".zarr")] = None if found else store
        for name in self.names("index", INDEX_FILES):
            yield from self.index(name, stores, name in outdated)

    def names(self, folder: str, ends: Sequence[str]) -> list[str]:
        """Return the names, without their ends, of the files in a folder that have one of these ends."""
        names = storage.list_names(self.layout.path(folder))
        return sorted({name.removesuffix(end) for name in names for end in ends if name.endswith(end)})

    def representer_store(self, store: RowStore, rerun: str) -> Iterator[Finding]:
        """One store of representers."""
        problems = store.verify()
        present = storage.list_names(f"{store.path}/vectors")
        if store.is_complete:
            problems = [
                Problem(-1, f"vector {name!r} is missing") for name in VECTORS if name not in present
            ] + problems
        yield from self.problems(store, problems, rerun)

    def index(self, name: str, stores: Mapping[str, RowStore | None], is_outdated: bool) -> Iterator[Finding]:
        """One index, against its representers where they are sound."""
        faiss, sample, manifest = files = tuple(self.layout.path("index", name + end) for end in INDEX_FILES)
        store, place = stores.get(name), self.short(faiss)
        what = OUTDATED if is_outdated else verify_index(faiss, sample, manifest, store)
        method = name if store is None else store.manifest.info["method"]
        if what:
            yield Finding(place, what, self.of_method("index", method), removable=files)
        elif name not in stores:
            yield Finding(place, "its representers are missing", self.of_method("reduce", method))

    def values(self, features: str | None) -> Iterator[Finding]:
        """The table of random subsets, and the values."""
        path, found = self.layout.path("values", "subsets.zarr"), list[Finding]()
        if storage.exists(path):
            rerun = self.table_command()
            table = self.open(path, TableStore.open, rerun, found)
            yield from found
            if table is not None:
                game = table.manifest.fingerprint.get("game", {})
                if features is not None and game.get("features") != features:
                    yield Finding(self.short(path), OUTDATED, rerun, removable=(path,))
                else:
                    yield from self.problems(table, table.verify(), rerun)
        for name in self.names("values", VALUES_FILES):
            yield from self.values_of(name, features)

    def sub_models(self) -> Iterator[Finding]:
        """The tables of sub-models: one for each training seed, that of subsets chosen by evaluations, and the gold."""
        places = [(folder, name) for folder in ("retraining", "gold") for name in self.names(folder, (".zarr",))]
        for folder, name in places:
            stage = "evaluate gold" if folder == "gold" else "evaluate curves" if name == "chosen" else "retrain"
            rerun, found = self.command(stage), list[Finding]()
            table = self.open(self.layout.path(folder, f"{name}.zarr"), TableStore.open, rerun, found)
            yield from found
            if table is not None:
                yield from self.problems(table, table.verify(), rerun)

    def table_command(self) -> str:
        """Return what fills the table: values of a method that reads it, without those that would be kept."""
        own = self.config.values.method
        method = own if own in TABLE_METHODS else TABLE_METHODS[0]
        kept = self.layout.path("values", f"{method}.json")
        fill = self.command("values", *([] if method == own else [f"values.method={method}"]))
        return f"rm {shlex.quote(kept)} && {fill}" if storage.exists(kept) else fill

    def values_of(self, name: str, features: str | None) -> Iterator[Finding]:
        """The three files of one method; its samples are checked by who reads them."""
        files = tuple(self.layout.path("values", name + end) for end in VALUES_FILES)
        method, what = name, ""
        try:
            manifest = json.loads(storage.read_bytes(files[2]))
            method = manifest["method"]
            table = pq.read_table(io.BytesIO(storage.read_bytes(files[1])))
            csv.field_size_limit(MAX_CELL)
            texts = list(csv.DictReader(io.StringIO(storage.read_bytes(files[0]).decode())))
            values = table["value"].to_numpy()
            if [float(text["value"]) for text in texts] != values.tolist() or len(values) != manifest["num_examples"]:
                what = "its files hold different values"
            elif not np.isfinite(values).all():
                what = f"the value of row {int(np.argmin(np.isfinite(values)))} is not finite"
            elif features is not None and manifest["fingerprint"].get("features", features) != features:
                what = OUTDATED
        except (ValueError, OSError, KeyError, TypeError, csv.Error, pa.ArrowException) as error:
            what = f"is missing a file or cannot be read ({error})"
        if what:
            extra = [] if method == self.config.values.method else [f"values.method={method}"]
            samples = (self.layout.path("values", f"{name}.npz"),) if what == OUTDATED else ()
            yield Finding(self.short(files[0]), what, self.command("values", *extra), removable=files + samples)

    def leftovers(self) -> Iterator[Finding]:
        """Temporary files of killed processes; object stores have none."""
        local = storage.local_path(self.layout.run_dir)
        if local is None or not local.is_dir():
            return
        folders = sorted(Path(local).glob(".adapter*"))
        for path in [*folders, *sorted(local.rglob(f"*{storage.PARTIAL}"))]:
            if folders and any(folder in path.parents for folder in folders):
                continue
            what, again = "was left by a killed process", self.command("verify", "--repair")
            yield Finding(str(path.relative_to(local)), what, again, removable=(str(path),), is_leftover=True)


def _without_place(what: str, path: str) -> str:
    """Return the message about a shard of a store without the words that name both."""
    prefix, _, rest = what.partition(f" of {path} ")
    return rest.partition(") ")[2] if rest.startswith("(rows ") else rest or prefix


def _records(store: RowStore | TableStore, shard: int) -> tuple[str, ...]:
    record = store.record(shard)
    return () if record is None else (record,)
