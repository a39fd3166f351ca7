"""The processes of one job: who am I, wait for the others, tell them something small, add up arrays.

Under `accelerate launch` (or torchrun) the process group is accelerate's; without a launcher there is one process and
every call is trivial. Weights are frozen, so models are not wrapped, and ranks meet only where this module is called.
Under launch/zero3.yaml alone the ranks share the weights (DeepSpeed ZeRO-3): then every pass through the model is
collective, see `Sharding`. What ranks tell each other is JSON, never pickle. This module alone imports accelerate and
deepspeed.
"""

import atexit
import dataclasses
import datetime
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.state import PartialState
from jaxtyping import Float
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from llmattrib.errors import LlmattribError, first_line

T = TypeVar("T")
EXIT_CODE = 2
PATIENCE = datetime.timedelta(days=1)
"""How long a rank waits for others; a dead one is noticed at once, since the launcher stops all."""
GRACE_SECONDS = 30.0
"""How long the others stay after a rank failed. Were one to leave first, the launcher would end all in mid-message."""


class Sharding:
    """The weights of one model, cut among the ranks; each layer is brought together while a pass is in it.

    No optimizer is made, so there is nothing beside the weights. Ranks must run the same number of passes, forward and
    backward: one that waits in a pass waits for the others. A partitioned parameter has numel 0 between passes.

    Args:
        settings: of DeepSpeed, with ZeRO stage 3.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._engine: Any = None

    @contextmanager
    def loading(self, dtype: str) -> Iterator[None]:
        """Let transformers cut a model up as it reads it.

        Args:
            dtype: of the weights.
        """
        for name, key in (("bfloat16", "bf16"), ("float16", "fp16")):
            self._settings[key] = {"enabled": dtype == name}
        # transformers keeps a weak reference
        active = HfDeepSpeedConfig(self._settings)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            del active

    def partition(self, model: nn.Module) -> None:
        """Cut up what is still whole (the same numbers on all ranks), and gather each layer as a pass reaches it."""
        import deepspeed  # noqa: PLC0415

        self._engine = deepspeed.initialize(model=model, config=self._settings)[0]

    def release(self) -> None:
        """Let go of what a pass has left whole; after every pass."""
        self._engine.optimizer.partition_all_parameters()


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process of a job.

    Attributes:
        rank: its number.
        world_size: processes in all.
        device: where tensors of collective calls live, `cpu` or the GPU of this rank.
        sharding: how the ranks share a model's weights; None where each has them all.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    sharding: Sharding | None = None

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
        """Return the sum of the arrays of all ranks, on every rank; shapes and dtypes must agree."""
        if self.world_size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, copy=True)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy().reshape(array.shape)

    def is_any(self, mine: bool) -> bool:
        """Say whether any rank has asked with `mine` so far.

        Ranks do not wait for each other, as `gather` does, but where they share a model: there all call, and agree.
        """
        if self.world_size == 1:
            return mine
        if self.sharding:
            return any(self.gather(mine))
        board = _board()
        if mine:
            board.set("llmattrib/asked", "1")
        return mine or bool(board.check(["llmattrib/asked"]))

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Guard work in which ranks that share a model's weights wait for each other inside its passes.

        A rank that fails in a pass cannot tell the others, who wait in it; they fail when it is gone, or the launcher
        ends them.

        Raises:
            Exception: what was raised here, on the rank that failed first; the others leave by `SystemExit`.
        """
        try:
            yield
        except Exception:
            if self.sharding is None or self.world_size == 1 or _board().add("llmattrib/failed", 1) == 1:
                raise
            time.sleep(GRACE_SECONDS)
            raise SystemExit(EXIT_CODE) from None

    def in_passes(self, action: Callable[[], T]) -> T:
        """Run `action`, which needs the model, on every rank: `together`, or inside `lockstep` where it is shared."""
        return action() if self.sharding else self.together(action)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and go on only if all of them succeed.

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
            failure = error
        failed = [rank for rank, is_failed in enumerate(self.gather(failure is not None)) if is_failed]
        if failure is not None and failed[0] == self.rank:
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
        LlmattribError: a launcher announced several processes but they cannot be joined, or DeepSpeed is missing or
            its settings are not of ZeRO-3.
    """
    is_shared = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not is_shared:
        return Ranks()
    sharding = Sharding(_deepspeed_settings()) if is_shared else None
    on_cpu = not torch.cuda.is_available()
    try:
        # With cpu=True accelerate uses no DeepSpeed; without it, it takes a rank without a GPU for a job of one.
        place: dict[str, Any] = {"cpu": on_cpu} if not is_shared else {"backend": "gloo"} if on_cpu else {}
        state = PartialState(**place, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise LlmattribError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but the processes cannot be joined ({error})",
            expected="processes started by `accelerate launch`",
            fix="start through `accelerate launch --config_file launch/cpu.yaml ...`, or unset WORLD_SIZE",
        ) from error
    atexit.register(state.destroy_process_group)  # left to the interpreter's end, its threads may outlive their locks
    return Ranks(state.process_index, state.num_processes, str(state.device), sharding)


def _board() -> Any:
    """Return the store that the launcher keeps for all ranks."""
    return torch.distributed.distributed_c10d._get_default_store()


def _deepspeed_settings() -> dict[str, Any]:
    """Import DeepSpeed, quietly, and read the settings that the launcher names."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: PLC0415
    except ImportError as error:
        raise LlmattribError(
            "the launcher asks for DeepSpeed and it is not installed", fix="DS_BUILD_OPS=0 pip install deepspeed"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    if on_cpu:  # else it compiles kernels of collective calls that are not used
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    try:
        with open(path, encoding="utf-8") as file:
            settings: dict[str, Any] = json.load(file)
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LlmattribError(
            f"the settings of DeepSpeed, {path or 'no file'}, cannot be read ({first_line(error)})",
            expected="JSON with zero_optimization.stage",
            fix="launch with --config_file launch/zero3.yaml, from the repository",
        ) from error
    if stage != 3:
        raise LlmattribError(
            f"{path} asks for ZeRO stage {stage}", expected="stage 3", fix="see configs/deepspeed/zero3.json"
        )
    return settings
