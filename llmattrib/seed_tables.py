"""Subset tables of several training seeds over the same subsets: what `retrain` and `evaluate gold` fill and read.

    run_dir/<stage>/seed<k>.zarr      a subset table (games/subset_table.py) for each training seed

All seeds train on the same subsets, drawn from streams of the run's seed, so the mean over seeds is the mean over
tables. A table is filled shard by shard by any number of ranks; killed jobs go on, more subsets and more seeds are
added at any time, and what is there is kept. Filling and reading both compare what a table is of with what the run asks
for now. Knows nothing of what is trained.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from llmattrib.distributed import Ranks
from llmattrib.games.subset_table import Design, SubsetRows, SubsetTable
from llmattrib.lock import locked
from llmattrib.progress import Progress, silent


@runtime_checkable
class Worth(Protocol):
    """What subsets are worth, trained with a seed."""

    def __call__(self, members: Bool[np.ndarray, "m n"], seed: int, progress: Progress) -> Float[np.ndarray, "m u"]:
        """Return the utilities of subsets; `progress` is told of subsets done."""
        ...


@dataclass(frozen=True)
class Game:
    """What the tables are of.

    Attributes:
        num_players: n.
        num_utilities: utilities of a subset.
        identity: JSON of everything they depend on but the training seed.
        load: returns what computes them; called by the ranks that have something to do.
    """

    num_players: int
    num_utilities: int
    identity: Mapping[str, Any]
    load: Callable[[], Worth]


@dataclass(frozen=True)
class SeedTables:
    """The tables of a stage.

    Attributes:
        folder: where they are.
        seed: of the draws, and the first training seed.
        num_seeds: training seeds seed, seed + 1, ... .
        shard_size: subsets saved together.
        made_by: what fills them, for messages.
    """

    folder: str
    seed: int
    num_seeds: int
    shard_size: int
    made_by: str

    def fill(
        self,
        design: Design,
        num_subsets: int,
        game: Game,
        ranks: Ranks,
        progress: Progress = silent,
    ) -> int:
        """Train what is not there yet of the first subsets of a design; called by all ranks.

        Args:
            design: of the subsets.
            num_subsets: how many, made up to whole shards.
            game: what is trained.
            ranks: the processes of the job.
            progress: told of this rank's sub-models done and to do.

        Returns:
            Sub-models trained now, by all ranks.

        Raises:
            FingerprintMismatchError: tables of another game are there.
            StoreLockedError: another job fills them now.
            StoreError: they cannot be written.
        """
        with locked(self.folder) if ranks.is_main else nullcontext():
            pending = ranks.on_main(lambda: self._plan(design, num_subsets, game))
            done = ranks.together(lambda: self._fill(game, pending, ranks, progress)) if any(pending) else 0
        return sum(ranks.gather(done))

    def num_rows(self, design: Design) -> int:
        """Return the subsets planned of a design."""
        return self._tables()[0].num_rows(design)

    def read(self, design: Design, game: Callable[[], Game]) -> tuple[SubsetRows, Float[np.ndarray, "s m u"]]:
        """Read the subsets that are trained with every seed.

        Args:
            design: of the subsets.
            game: returns what they must be of; called when there are tables.

        Returns:
            The subsets, their utilities means over seeds; and the utilities of each seed.

        Raises:
            StoreNotFoundError: there are no tables.
            FingerprintMismatchError: they are of another game.
            MethodError: no subset of this design is trained.
            CorruptShardError: a shard fails its checksum.
        """
        tables, wanted = self._tables(), game()
        for number, table in enumerate(tables):
            table.require(wanted.num_players, self.seed, self._identity(wanted, number))
        rows = [table.rows(design) for table in tables]
        draws = sorted(set.intersection(*(set(part.draw.tolist()) for part in rows)))
        rows = [part.take(np.searchsorted(part.draw, draws)) for part in rows]
        utilities = np.array([part.utilities for part in rows])
        return dataclasses.replace(rows[0], utilities=utilities.mean(axis=0)), utilities

    def _paths(self) -> list[str]:
        return [f"{self.folder}/seed{self.seed + number}.zarr" for number in range(self.num_seeds)]

    def _identity(self, game: Game, number: int) -> dict[str, Any]:
        """Return what the table of a training seed depends on."""
        return {**game.identity, "training_seed": self.seed + number}

    def _tables(self) -> list[SubsetTable]:
        return [SubsetTable.open(path, made_by=self.made_by) for path in self._paths()]

    def _plan(self, design: Design, num_subsets: int, game: Game) -> list[list[int]]:
        """Make or extend the tables; return the shards to fill of each. First rank only."""
        pending = []
        for number, path in enumerate(self._paths()):
            identity = self._identity(game, number)
            table = SubsetTable.create(path, game.num_players, game.num_utilities, self.seed, identity, self.shard_size)
            table.extend(design, num_subsets)
            pending.append(table.pending())
        return pending

    def _fill(self, game: Game, pending: Sequence[Sequence[int]], ranks: Ranks, progress: Progress) -> int:
        """Train this rank's share; return the number of sub-models."""
        todo = ranks.share([(number, shard) for number, shards in enumerate(pending) for shard in shards])
        if not todo:
            return 0
        worth, paths, size = game.load(), self._paths(), self.shard_size
        for done, (number, shard) in enumerate(todo):

            def report(part: int, _: int, before: int = size * done) -> None:
                progress(before + part, size * len(todo))

            table = SubsetTable.open(paths[number], read_only=False)
            table.fill_shard(shard, partial(worth, seed=self.seed + number, progress=report))
        return size * len(todo)
