"""Subsets that somebody chose, and what sub-models of them are worth: a table that is asked before anything is trained.

Where the rows of a subset table (subset_table.py) are drawn, those here are named: a row is (training seed, members,
utilities), one shard each, so a killed evaluation loses the sub-model in flight alone, and another evaluation that asks
for the same subset finds it. Rows have no order that matters: what was planned and not finished by a killed process is
filled with whatever is asked next.

Limits: the whole table is read once, when it is opened; one process writes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from llmattrib.games.subset_table import pack
from llmattrib.progress import Progress, silent
from llmattrib.table import TableManifest, TableStore

SeededUtility = Callable[[Bool[np.ndarray, "1 n"], int], Float[np.ndarray, "1 q"]]
"""Called with one subset and a training seed; returns its utilities."""


class ChosenSubsets:
    """A table on disk, of one game.

    Args:
        path: local path or fsspec URL; created when there is none.
        num_players: n.
        num_utilities: q.
        game: JSON of everything the utilities depend on but the training seed.

    Raises:
        FingerprintMismatchError: a table of another game is there.
        CorruptShardError: a row fails its checksum.
        StoreError: the path cannot be written.
    """

    def __init__(self, path: str, num_players: int, num_utilities: int, game: Mapping[str, Any]) -> None:
        columns = {
            "seed": ("int64", ()),
            "masks": ("uint8", (-(-num_players // 8),)),
            "utilities": ("float64", (num_utilities,)),
        }
        fingerprint = {"num_players": num_players, "game": game}
        self._table = TableStore.create(path, TableManifest(columns, 1, fingerprint))
        _, stored = self._table.read()
        self._found: dict[tuple[int, bytes], Float[np.ndarray, " q"]] = {
            (int(seed), mask.tobytes()): utilities
            for seed, mask, utilities in zip(stored["seed"], stored["masks"], stored["utilities"], strict=True)
        }

    def worth(
        self,
        members: Bool[np.ndarray, "m n"],
        seeds: range,
        utility: SeededUtility,
        progress: Progress = silent,
    ) -> Float[np.ndarray, "s m q"]:
        """Return the utilities of subsets for each training seed; what is not in the table is evaluated and kept.

        Args:
            members: the subsets, equal ones allowed.
            seeds: training seeds.
            utility: evaluates one subset.
            progress: told of the missing ones done.

        Raises:
            StoreError: utilities are not finite, or the table cannot be written.
        """
        masks = pack(members)
        keys = [(seed, mask.tobytes()) for seed in seeds for mask in masks]
        rows = {key: row % len(members) for row, key in enumerate(keys)}
        missing = [key for key in rows if key not in self._found]
        lacking = len(missing) - len(self._table.pending())
        if lacking > 0:
            self._table.extend({}, lacking)
        for done, (key, shard) in enumerate(zip(missing, self._table.pending(), strict=False)):
            row = rows[key]
            found = utility(members[row : row + 1], key[0])
            columns = {"seed": np.array([key[0]]), "masks": masks[row : row + 1], "utilities": found}
            self._table.write_shard(shard, columns)
            self._found[key] = found[0]
            progress(done + 1, len(missing))
        return np.array([self._found[key] for key in keys]).reshape(len(seeds), len(members), -1)
