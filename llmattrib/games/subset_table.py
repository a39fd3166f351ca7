"""Random subsets of the training examples and what they are worth: one table that many estimators read.

A row is a subset S of n players, how it was drawn, and its utilities U [q]. How subsets are drawn is a `Design`; the
draw of row k of a design comes from its own stream, so it is the same whoever draws it, in any order, and a longer
table begins with the rows of a shorter one. Masks are packed, 8 players a byte. What a utility is (the kernel game, a
retrained model) is the caller's business: anything that maps subsets to numbers can fill the table.

Rows come in whole shards (32 by default): a request for 100 rows of a design gives 128. At n = 10,000 and q = 100 a
row is 2 KB. Utilities are float64: differences of losses sit near the floor of float32.
Source: docs/methods.md section 7; Lin et al. 2022 (AME); Wang and Jia 2022 (Banzhaf); Li and Yu 2024 (sizes).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from llmattrib.errors import FingerprintMismatchError, MethodError
from llmattrib.manifest import differing
from llmattrib.progress import Progress, silent
from llmattrib.rng import stream
from llmattrib.table import SAME, TableManifest, TableStore

Utility = Callable[[Bool[np.ndarray, "m n"]], Float[np.ndarray, "m q"]]
"""Called with subsets; returns their utilities."""


@dataclass(frozen=True)
class Design:
    """How subsets are drawn. Exactly one of the four ways.

    Attributes:
        name: of its streams and in the table.
        points: p uniform on these, then every player is in by itself with probability p.
        truncation: eps; logit(p) uniform between those of eps and 1 - eps, then the same.
        by_size: size s of 1 ... n - 1 with probability proportional to 1/sqrt(s(n-s)), then any s players; p = s/n.
        leave_out: row k is everybody but the k-th player of a random order, and everybody from row n on; p = 1.
    """

    name: str
    points: tuple[float, ...] = ()
    truncation: float | None = None
    by_size: bool = False
    leave_out: bool = False

    def __post_init__(self) -> None:
        """Check that it is one way of drawing, with probabilities inside (0, 1)."""
        ways = bool(self.points) + (self.truncation is not None) + self.by_size + self.leave_out
        inside = (
            all(0 < p < 1 for p in self.points) and 0 < (0.25 if self.truncation is None else self.truncation) < 0.5
        )
        if ways != 1 or not inside:
            raise MethodError(
                f"design {self.name} is {self.to_json()}",
                expected="one of: points inside (0, 1), truncation inside (0, 0.5), by_size, leave_out",
            )

    def draw(self, seed: int, num_players: int, row: int) -> tuple[float, Bool[np.ndarray, " n"]]:
        """Return p and the members of one row."""
        if self.leave_out:
            order = stream(seed, "subset", self.name).permutation(num_players)
            members = np.ones(num_players, bool)
            members[order[row : row + 1]] = False
            return 1.0, members
        draws = stream(seed, "subset", self.name, row)
        if self.by_size:
            size = 1 + int(draws.choice(num_players - 1, p=size_chances(num_players)))
            members = np.zeros(num_players, bool)
            members[draws.permutation(num_players)[:size]] = True
            return size / num_players, members
        if self.truncation is not None:
            edge = np.log(self.truncation / (1 - self.truncation))
            p = float(1 / (1 + np.exp(-edge * (1 - 2 * draws.random()))))
        else:
            p = self.points[draws.integers(len(self.points))]
        return p, draws.random(num_players) < p

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**dataclasses.asdict(self), "points": list(self.points)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Design":
        """Read back `to_json`."""
        return cls(**{**tree, "points": tuple(tree["points"])})


ATTRIBUTION = Design("attribution", points=(0.2, 0.4, 0.6, 0.8))
"""For sparse effects (AME)."""
SHAPLEY = Design("shapley", truncation=0.01)
"""For Shapley values by regression."""
BANZHAF = Design("banzhaf", points=(0.5,))
"""Every subset is as likely as any other."""
SIZES = Design("sizes", by_size=True)
"""For all semivalues at once."""
LEAVE_OUT = Design("leave_out", leave_out=True)
"""For leave-one-out."""
DESIGNS = {design.name: design for design in (ATTRIBUTION, SHAPLEY, BANZHAF, SIZES, LEAVE_OUT)}
"""By name."""


def size_chances(num_players: int) -> Float[np.ndarray, " k"]:
    """Return the chance of each size 1 ... n - 1 in a design by size."""
    size = np.arange(1, num_players)
    chances = 1 / np.sqrt(size * (num_players - size))
    return np.asarray(chances / chances.sum())


@dataclass(frozen=True)
class SubsetRows:
    """Rows of one design.

    Attributes:
        design: how they were drawn.
        seed: of the draws.
        members: [m, n].
        p: [m] probability of each player to be in.
        draw: [m] number of the row within its design.
        utilities: [m, q].
    """

    design: Design
    seed: int
    members: Bool[np.ndarray, "m n"]
    p: Float[np.ndarray, " m"]
    draw: Int[np.ndarray, " m"]
    utilities: Float[np.ndarray, "m q"]

    @property
    def num_players(self) -> int:
        """Players n."""
        return int(self.members.shape[1])

    def first(self, num_rows: int) -> "SubsetRows":
        """Return the first rows."""
        return self.take(np.arange(min(num_rows, len(self.p))))

    def take(self, rows: Int[np.ndarray, " k"]) -> "SubsetRows":
        """Return some rows, by their places."""
        fields = {name: getattr(self, name)[rows] for name in ("members", "p", "draw", "utilities")}
        return replace(self, **fields)

    def dummies(self) -> Bool[np.ndarray, "m n"]:
        """Draw for each row a second subset, with the same p, that no utility has seen."""
        if self.design.by_size or self.design.leave_out:
            raise MethodError("subsets of a drawn size have no independent copies", expected="a design of p")
        rows = [
            stream(self.seed, "subset", "knockoff", self.design.name, int(draw)).random(self.num_players) < p
            for draw, p in zip(self.draw, self.p, strict=True)
        ]
        return np.array(rows).reshape(self.members.shape)


def draw_rows(design: Design, seed: int, num_players: int, num_rows: int, utility: Utility) -> SubsetRows:
    """Draw and evaluate the first rows of a design without a table on disk."""
    drawn = [design.draw(seed, num_players, row) for row in range(num_rows)]
    p, members = np.array([p for p, _ in drawn]), np.array([inside for _, inside in drawn])
    return SubsetRows(design, seed, members, p, np.arange(num_rows), utility(members))


class SubsetTable:
    """A table on disk, of one game: the same players, queries and utility. Made by `create` or `open`."""

    def __init__(self, table: TableStore) -> None:
        self._table = table
        self.num_players = int(table.manifest.fingerprint["num_players"])
        self.seed = int(table.manifest.fingerprint["seed"])

    @classmethod
    def create(
        cls,
        path: str,
        num_players: int,
        num_utilities: int,
        seed: int,
        game: Mapping[str, Any],
        shard_size: int = 32,
    ) -> "SubsetTable":
        """Make a table without rows, or go on with the one that is there.

        Args:
            path: local path or fsspec URL.
            num_players: n.
            num_utilities: q.
            seed: of the draws.
            game: JSON of everything the utilities depend on.
            shard_size: rows that are evaluated and committed together.

        Raises:
            FingerprintMismatchError: a table of another game is there.
            StoreError: the path cannot be written.
        """
        columns = {
            "masks": ("uint8", (-(-num_players // 8),)),
            "p": ("float64", ()),
            "design": ("uint8", ()),
            "draw": ("int64", ()),
            "utilities": ("float64", (num_utilities,)),
        }
        return cls(TableStore.create(path, TableManifest(columns, shard_size, _fingerprint(num_players, seed, game))))

    @classmethod
    def open(cls, path: str, *, made_by: str = "SubsetTable.create", read_only: bool = True) -> "SubsetTable":
        """Open a table that is there.

        Raises:
            StoreNotFoundError: there is none.
        """
        return cls(TableStore.open(path, made_by=made_by, read_only=read_only))

    def require(self, num_players: int, seed: int, game: Mapping[str, Any]) -> None:
        """Refuse a table of another game than the one that is to be read; arguments as for `create`.

        Raises:
            FingerprintMismatchError: it is; names the keys that differ.
        """
        stored = self._table.manifest
        wanted = replace(stored, fingerprint=_fingerprint(num_players, seed, game))
        keys = differing(stored.compared()["fingerprint"], wanted.compared()["fingerprint"])
        if keys:
            raise FingerprintMismatchError(self._table.path, keys, expected=SAME)

    @property
    def designs(self) -> list[Design]:
        """Designs in the table; a row holds its place in this list."""
        found: list[Design] = []
        for segment in self._table.manifest.segments:
            design = Design.from_json(segment["design"])
            if design not in found:
                found.append(design)
        return found

    def num_rows(self, design: Design) -> int:
        """Rows planned of a design."""
        shards = [s["shards"] for s in self._table.manifest.segments if Design.from_json(s["design"]) == design]
        return int(sum(shards)) * self._table.manifest.shard_size

    def extend(self, design: Design, num_rows: int) -> None:
        """Plan rows until there are `num_rows` of a design, in whole shards; do nothing when there are.

        Raises:
            MethodError: the table has another design of that name.
            DiskSpaceError: they would not fit.
        """
        if any(other.name == design.name and other != design for other in self.designs):
            found = f"{self._table.path} has another design named {design.name}"
            raise MethodError(found, expected="one design a name", fix="give it another name")
        missing = -(-(num_rows - self.num_rows(design)) // self._table.manifest.shard_size)
        if missing > 0:
            self._table.extend({"design": design.to_json()}, missing)

    def pending(self) -> list[int]:
        """Return the shards without utilities; ranks share them out."""
        return self._table.pending()

    def subsets(
        self, shard: int
    ) -> tuple[Design, Float[np.ndarray, " m"], Int[np.ndarray, " m"], Bool[np.ndarray, "m n"]]:
        """Return (design, p, numbers of the draws, members) of a shard: drawn, not read."""
        size = self._table.manifest.shard_size
        segment, number = self._table.segment(shard)
        design = Design.from_json(segment["design"])
        draw = np.arange(number * size, (number + 1) * size)
        drawn = [design.draw(self.seed, self.num_players, row) for row in draw.tolist()]
        return design, np.array([p for p, _ in drawn]), draw, np.array([members for _, members in drawn])

    def fill(self, utility: Utility, progress: Progress = silent) -> None:
        """Evaluate the pending shards and commit each.

        Args:
            utility: maps members to utilities.
            progress: called with (shards done, shards to do).

        Raises:
            StoreError: utilities are not finite or of another number, or the table cannot be written.
        """
        shards = self.pending()
        for done, shard in enumerate(shards):
            self.fill_shard(shard, utility)
            progress(done + 1, len(shards))

    def fill_shard(self, shard: int, utility: Utility) -> None:
        """Evaluate one shard and commit it.

        Raises:
            StoreError: as `fill`.
        """
        design, p, draw, members = self.subsets(shard)
        columns = {
            "masks": pack(members),
            "p": p,
            "design": np.full(len(p), self.designs.index(design), np.uint8),
            "draw": draw,
            "utilities": utility(members).astype(np.float64, copy=False),
        }
        self._table.write_shard(shard, columns)

    def rows(self, design: Design) -> SubsetRows:
        """Read the rows of a design that have their utilities, in the order of their draws.

        Raises:
            MethodError: there are none.
            CorruptShardError: a shard fails its checksum.
        """
        _, columns = self._table.read()
        designs = self.designs
        chosen = columns["design"] == (designs.index(design) if design in designs else -1)
        if not chosen.any():
            names = ", ".join(other.name for other in designs) or "none"
            raise MethodError(
                f"{self._table.path} has no finished rows of the design {design.name}",
                expected=f"one it holds: {names}",
                fix=f"run `llmattrib retrain` with retraining.design={design.name}, or ask for what it holds; a table "
                "of your own: extend it by that design and fill it",
            )
        members = unpack(columns["masks"][chosen], self.num_players)
        return SubsetRows(
            design, self.seed, members, columns["p"][chosen], columns["draw"][chosen], columns["utilities"][chosen]
        )


def _fingerprint(num_players: int, seed: int, game: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the numbers of a table."""
    return {"num_players": num_players, "seed": seed, "game": game}


def pack(members: Bool[np.ndarray, "m n"]) -> UInt8[np.ndarray, "m b"]:
    """Pack masks, player 0 in the lowest bit of the first byte."""
    return np.packbits(members, axis=1, bitorder="little")


def unpack(masks: UInt8[np.ndarray, "m b"], num_players: int) -> Bool[np.ndarray, "m n"]:
    """Undo `pack`."""
    return np.unpackbits(masks, axis=1, count=num_players, bitorder="little").astype(bool)
