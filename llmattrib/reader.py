"""The feature store as methods see it: centred, scaled, with the responses and the ridge of the kernel game.

Memory: statistics and row spaces are kept for later methods; `features` and `game` hold the rows in float64.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from llmattrib.config import RunConfig
from llmattrib.distributed import Ranks
from llmattrib.errors import MethodError, StaleIndexError
from llmattrib.games.kernel import LOO_GRID, FeatureRows, KernelGame
from llmattrib.manifest import differing
from llmattrib.scorers.datainf import ColumnBlock
from llmattrib.scorers.gradient import absolute_ridge, unit_rows
from llmattrib.sections import Method, ReduceConfig
from llmattrib.settings import Response, Settings, resolve
from llmattrib.store import RowStore

Representers = Callable[[], Iterator[tuple[int, Float[np.ndarray, "m c p"]]]]
"""A pass over (first row, representers) of this rank's shards, in order."""


class FeatureReader:
    """The feature store as methods see it, centred and scaled; statistics are kept for later methods.

    Each of several ranks reads its own share of the shards, and sums are of all: they ask for the same in the same
    order, in a `Ranks.together`.
    """

    def __init__(self, store: RowStore, ranks: Ranks | None = None) -> None:
        self.store, self.manifest, self.ranks = store, store.manifest, ranks or Ranks()
        self.output = str(store.manifest.fingerprint["features"]["output"])
        self._features: dict[tuple[bool, bool, int], FeatureRows] = {}

    def resolve(self, config: ReduceConfig, method: Method) -> Settings:
        """Return what the settings of a method mean for these features.

        Raises:
            MethodError: the method or its response cannot use them.
        """
        stored = self.manifest.fingerprint
        has_labels, is_whitened = bool(stored["encoding"]["label_words"]), "preconditioner" in stored["features"]
        num_rows, dim = self.manifest.num_rows, self.manifest.dim
        members = member_widths(self.manifest.info.get("sketch_plan", {}))
        return resolve(config, method, self.output, has_labels, num_rows, dim, is_whitened, members)

    def alone(self) -> "FeatureReader":
        """Return a reader of all shards for a rank that works while the others wait."""
        return self if self.ranks.world_size == 1 else FeatureReader(self.store)

    @property
    def shards(self) -> Sequence[int]:
        """The shards of this rank, in order."""
        return self.ranks.share(range(self.store.num_shards))

    @cached_property
    def mean(self) -> Float[np.ndarray, "c p"]:
        """Mean feature, float32 as it is stored, so that queries are centred by the same numbers."""

        def part() -> Float[np.ndarray, "c p"]:
            total = np.zeros((self.manifest.num_outputs, self.manifest.dim))
            for _, rows in self.store.blocks(self.shards):
                total += rows.sum(axis=0, dtype=np.float64)
            return total

        return (self.ranks.total(part) / self.manifest.num_rows).astype(np.float32)

    def center(self, settings: Settings) -> Float[np.ndarray, "c p"]:
        """Return what is subtracted: the mean, or zeros."""
        return self.mean if settings.center else np.zeros((self.manifest.num_outputs, self.manifest.dim), np.float32)

    def blocks(
        self, settings: Settings, shards: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        """Yield (first row, rows) of some shards, by default of this rank's."""
        center = self.center(settings)
        for start, rows in self.store.blocks(self.shards if shards is None else shards):
            rows = rows - center if settings.center else rows
            yield start, unit_rows(rows, settings.members) if settings.normalize else rows

    def features(self, settings: Settings, output: int = 0) -> FeatureRows:
        """Return the rows of one output; the same object for the same transform."""
        key = settings.center, settings.normalize, output
        if key not in self._features:

            def blocks(shards: Sequence[int]) -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
                return ((start, rows[:, output]) for start, rows in self.blocks(settings, shards))

            n, p = self.manifest.num_rows, self.manifest.dim
            mine, everything = partial(blocks, self.shards), partial(blocks, range(self.store.num_shards))
            self._features[key] = FeatureRows(mine, n, p, total=self.ranks.total, everything=everything)
        return self._features[key]

    def curved(self, settings: Settings) -> FeatureRows:
        """Return the rows scaled so that their Gram is n times the Gauss-Newton curvature of the mean loss.

        By sqrt(p (1 - p)) for gradients of a log-odds, by sqrt(p / (1 - p)) for those of a loss; `pntk`, which knows no
        answer, is left as it is. Exact with two label words; of more, and of completions of several tokens, it is the
        curvature in the one direction of the answer.
        """
        n, p = self.manifest.num_rows, self.manifest.dim
        odds = np.exp(self.log_odds)
        weights = {"pntk": np.ones(n), "loss": odds}.get(self.output, odds / (1 + odds) ** 2)

        def blocks(shards: Sequence[int]) -> Iterator[tuple[int, Float[np.ndarray, "m p"]]]:
            for start, rows in self.blocks(settings, shards):
                yield start, rows[:, 0] * np.sqrt(weights[start : start + len(rows), None])

        mine, everything = partial(blocks, self.shards), partial(blocks, range(self.store.num_shards))
        return FeatureRows(mine, n, p, total=self.ranks.total, everything=everything)

    def column_blocks(self) -> list[ColumnBlock]:
        """Return which columns are of which block of parameters; one block where a dense sketch mixes them all."""
        plan = self.manifest.info["sketch_plan"]
        sizes = [int(block["size"]) for block in plan["blocks"]]
        if plan["kind"] == "rademacher":
            return [ColumnBlock(self.manifest.dim, sum(sizes))]
        return [ColumnBlock(int(width), size) for width, size in zip(plan["widths"], sizes, strict=True)]

    def members(self) -> list[tuple[ColumnBlock, ...]]:
        """Return the column blocks of each adapter, in order.

        Raises:
            MethodError: members share columns, since several initialisations or a dense sketch mix them.
        """
        plan, num_inits = self.manifest.info["sketch_plan"], self.manifest.fingerprint["features"]["num_inits"] or 1
        found: dict[str, list[ColumnBlock]] = {}
        for block, columns in zip(plan["blocks"], self.column_blocks(), strict=False):
            found.setdefault(_member(block), []).append(columns)
        if num_inits > 1 or plan["kind"] == "rademacher":
            raise MethodError(
                "reduce.ensemble=members, and the members share columns: "
                + (f"{num_inits} initialisations" if num_inits > 1 else "a dense sketch"),
                expected="features at several adapters, whose sketch is oporp or none",
                fix="set reduce.ensemble=kernel",
            )
        return [tuple(blocks) for blocks in found.values()]

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

    def game(self, settings: Settings, ridge: float, output: int) -> KernelGame:
        """Return the kernel game of one output, in the coordinates of `features(settings, output).space`.

        Args:
            settings: of a method that has responses.
            ridge: in units of the mean squared feature norm.
            output: which rows.
        """
        assert settings.response is not None
        features = self.features(settings, output)
        lam = absolute_ridge(features, ridge)
        return KernelGame(features.space.coordinates, self.responses(settings.response, output), lam)


def _member(block: Mapping[str, Any]) -> str:
    """Return the adapter of a block of a sketch plan; "" where there is one alone."""
    name, slash, _ = block["name"].partition("/")
    return str(name) if slash else ""


def member_widths(plan: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the columns of each of several adapters, from a sketch plan; none where a dense sketch mixes them."""
    widths: dict[str, int] = {}
    for block, width in zip(plan.get("blocks", ()), plan.get("widths", ()), strict=True):
        widths[_member(block)] = widths.get(_member(block), 0) + int(width)
    return tuple(widths.values()) if len(widths) > 1 and plan["kind"] != "rademacher" else ()


def check_made_from(representers: RowStore, features: RowStore) -> None:
    """Compare representers with the features that are there.

    Raises:
        StaleIndexError: they were made from other features.
    """
    if representers.manifest.fingerprint["features"] != features.digest():
        raise StaleIndexError(
            f"{representers.path} was made from other features than {features.path} holds now",
            expected="representers and an index of the present features",
            fix="run `llmattrib reduce` and `llmattrib index` again",
        )


def stored_representers(config: RunConfig, method: Method, features: RowStore) -> RowStore:
    """Open the representers of a method, whatever settings of `reduce` they were made with.

    Args:
        config: the run.
        method: which.
        features: what they are to be made from: gradient features, of `tracin_we` word gradients.

    Raises:
        StoreNotFoundError, IncompleteStoreError: they are missing or not finished.
        StaleIndexError: they were made from other features.
    """
    store = RowStore.open(config.layout.representers(method), made_by="llmattrib reduce")
    store.require_complete("llmattrib reduce")
    check_made_from(store, features)
    return store


def current_representers(config: RunConfig, method: Method, features: RowStore) -> RowStore:
    """Open the representers of a method of gradient features, made with the settings that the config has now.

    Args:
        config: the run.
        method: which.
        features: what they are to be made from.

    Raises:
        StoreNotFoundError, IncompleteStoreError: they are missing or not finished.
        StaleIndexError: they were made from other features, or with other settings of `reduce`.
        MethodError: the method cannot use these features with the settings of the config.
    """
    store = stored_representers(config, method, features)
    wanted = FeatureReader(features).resolve(config.reduce, method)
    if store.manifest.fingerprint["settings"] != wanted.digest():
        info = store.manifest.info
        stored = {**info, "ridge": "loo" if info["loo_curve"] else info["ridge"]}
        now = json.loads(json.dumps(asdict(wanted)))
        keys = differing({name: stored.get(name) for name in now}, now)
        old, new = (", ".join(f"{name}={pair[side]}" for name, pair in keys.items()) for side in (0, 1))
        raise StaleIndexError(
            f"{store.path} was made with reduce settings {old}",
            expected=f"{new}, as the config says",
            fix="run `llmattrib reduce` and `llmattrib index` again, or restore the settings",
        )
    return store


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
