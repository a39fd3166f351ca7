"""The processes of one job: who am I, wait for the others, tell them something small, add up arrays.

Under `accelerate launch` (or torchrun) the process group is accelerate's; without a launcher there is one process and
every call is trivial. Models are never wrapped: weights are frozen, and ranks meet only where this module is called.
What ranks tell each other is JSON, never pickle. This module alone imports accelerate.
"""

import atexit
import dataclasses
import datetime
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.state import PartialState
from jaxtyping import Float

from llmattrib.errors import LlmattribError

T = TypeVar("T")
EXIT_CODE = 2
PATIENCE = datetime.timedelta(days=1)
"""How long a rank waits for others; a dead one is noticed at once, since the launcher stops all."""
GRACE_SECONDS = 30.0
"""How long the others stay after a rank failed. Were one to leave first, the launcher would end all in mid-message."""
_SUMMED = 1 << 18
"""Numbers of each rank that are summed at a time."""
_AGREED = "_llmattrib_agreed"
"""Attribute of an exception that all ranks know of."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process of a job.

    Attributes:
        rank: its number.
        world_size: processes in all.
        device: where tensors of collective calls live, `cpu` or the GPU of this rank.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that creates, prints and saves."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of a list of work that is the same on all ranks."""
        return items[self.rank :: self.world_size]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank.

        Args:
            value: small and JSON-able; comes back as JSON gives it back (tuples as lists).
        """
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(data)], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, size)
        longest = max(int(item) for item in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        parts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, sizes, strict=True)]

    def sum(self, array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Return the sum of the arrays of all ranks, the same bytes on every rank; shapes and dtypes must agree.

        Added in rank order, piece by piece: unlike a ring, no backend or topology changes a bit of it. Each rank
        receives world_size - 1 arrays.
        """
        if self.world_size == 1:
            return array
        flat = np.ascontiguousarray(array).reshape(-1)
        total = np.empty_like(flat)
        for start in range(0, len(flat), _SUMMED):
            piece = torch.from_numpy(flat[start : start + _SUMMED]).to(self.device)
            parts = [torch.empty_like(piece) for _ in range(self.world_size)]
            torch.distributed.all_gather(parts, piece)
            total[start : start + _SUMMED] = functools.reduce(torch.add, parts).cpu().numpy()
        return total.reshape(array.shape)

    def total(self, part: Callable[[], Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
        """Return the sum of what `part` returns on every rank, or fail as `together` does."""
        return self.sum(self.together(part))

    def is_any(self, mine: bool) -> bool:
        """Say whether any rank has asked with `mine` so far; ranks do not wait for each other, as `gather` does."""
        if self.world_size == 1:
            return mine
        board = torch.distributed.distributed_c10d._get_default_store()
        if mine:
            board.set("llmattrib/asked", "1")
        return mine or bool(board.check(["llmattrib/asked"]))

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and go on only if all of them succeed.

        An action may itself call `together`, `total` and `on_main`: a rank that fails outside of those calls is noticed
        by the others at their next one. It must not call `gather`, `sum` and `barrier`, which do not look for that.

        Returns:
            This rank's result.

        Raises:
            Exception: what `action` raised here, on the first rank where it failed; the other ranks then leave by
                `SystemExit` a little later, so that the message is printed, and once.
        """
        if self.world_size == 1:
            return action()
        result: T
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            if hasattr(error, _AGREED):
                raise
            failure = error
        failed = [rank for rank, is_failed in enumerate(self.gather(failure is not None)) if is_failed]
        if failure is not None and failed[0] == self.rank:
            setattr(failure, _AGREED, True)
            raise failure
        if failed:
            time.sleep(GRACE_SECONDS)
            raise SystemExit(EXIT_CODE)
        return result

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank while the others wait.

        Args:
            action: its result is JSON-able and small.

        Returns:
            The result, on every rank, as JSON gives it back.

        Raises:
            Exception: what `action` raised, on the first rank; the others leave by `SystemExit`.
        """
        result = self.together(lambda: action() if self.is_main else None)
        value: T = self.gather(result)[0]
        return value


def ranks() -> Ranks:
    """Return this process's place in the job; joins the process group when a launcher started several.

    Raises:
        LlmattribError: a launcher announced several processes but they cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    try:
        # Without cpu=True accelerate takes a rank without a GPU for a job of one process.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise LlmattribError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but the processes cannot be joined ({error})",
            expected="processes started by `accelerate launch`",
            fix="start through `accelerate launch --config_file launch/cpu.yaml ...`, or unset WORLD_SIZE",
        ) from error
    atexit.register(state.destroy_process_group)  # left to the interpreter's end, its threads may outlive their locks
    return Ranks(state.process_index, state.num_processes, str(state.device))
