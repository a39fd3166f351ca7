"""The processes of one job: who am I, wait for the others, tell them something small, add up arrays.

Under `accelerate launch` (or torchrun) the process group is accelerate's; without a launcher there is one process and
every call is trivial. Weights are frozen, so models are not wrapped, and ranks meet only where this module is called.
Under launch/zero3.yaml (DeepSpeed ZeRO-3) and launch/fsdp2.yaml (PyTorch FSDP2) alone the ranks share the weights:
then every pass through the model is collective, see `Sharding`. What ranks tell each other is JSON, never pickle. This
module alone imports accelerate and deepspeed.
"""

import atexit
import dataclasses
import datetime
import functools
import gc
import json
import logging
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, final

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
_SUMMED = 1 << 18
"""Numbers of each rank that are summed at a time."""
_ROOT = Path(__file__).parents[1]
"""Of the repository: relative paths in its launch/ are from there, wherever the launcher is called."""
_AGREED = "_llmattrib_agreed"
"""Attribute of an exception that all ranks know of."""


class Sharding(ABC):
    """The weights of one model, cut among the ranks; each layer is brought together while a pass is in it.

    No optimizer is made, so there is nothing beside the weights. Ranks must run the same number of passes, forward and
    backward: one that waits in a pass waits for the others.

    Attributes:
        is_placing: whether weights stay in the memory of the machine until `partition` takes them to their devices.
    """

    is_placing: bool

    @abstractmethod
    def loading(self, dtype: str) -> AbstractContextManager[None]:
        """Guard the reading of a model by transformers.

        Args:
            dtype: of the weights.
        """

    @abstractmethod
    def partition(self, model: nn.Module, device: torch.device) -> None:
        """Cut up what is still whole (the same numbers on all ranks), and gather each layer as a pass reaches it.

        Args:
            model: a transformers model, or one of PEFT around it.
            device: where passes run.

        Raises:
            LlmattribError: the model cannot be cut up in this way.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what a pass has left whole; after every pass."""


@final
class Zero3(Sharding):
    """DeepSpeed's stage 3. Weights are cut as they are read; a parameter has numel 0 between passes.

    Args:
        settings: of DeepSpeed, with ZeRO stage 3.
    """

    is_placing = False

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._engine: Any = None

    @contextmanager
    def loading(self, dtype: str) -> Iterator[None]:
        """Let transformers cut a model up as it reads it."""
        for name, key in (("bfloat16", "bf16"), ("float16", "fp16")):
            self._settings[key] = {"enabled": dtype == name}
        # transformers keeps a weak reference
        active = HfDeepSpeedConfig(self._settings)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            del active

    def partition(self, model: nn.Module, device: torch.device) -> None:
        """Hand the model to an engine of DeepSpeed."""
        import deepspeed  # noqa: PLC0415

        self._engine = deepspeed.initialize(model=model, config=self._settings)[0]

    def release(self) -> None:
        """Cut up what the engine keeps for the next pass."""
        self._engine.optimizer.partition_all_parameters()


@final
class Fsdp2(Sharding):
    """PyTorch's `fully_shard`: parameters are DTensors, cut along their first axis.

    A block of layers is brought together at a time, and so are the two embeddings where they are not one; what is left
    is whole during a pass. Every rank reads the model into the memory of its machine first: files of the dtype that is
    asked for are mapped, not copied, so that ranks of one machine hold them once.

    Args:
        is_offloaded: whether the parts stay in the memory of the machine, between passes.
    """

    is_placing = True

    def __init__(self, is_offloaded: bool) -> None:
        self._is_offloaded = is_offloaded
        self._units: list[Any] = []

    def loading(self, dtype: str) -> AbstractContextManager[None]:
        """Do nothing: all ranks read the same."""
        return nullcontext()

    def partition(self, model: nn.Module, device: torch.device) -> None:
        """Cut up block by block, so that no more than one is whole on the device."""
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
        from torch.distributed.fsdp import (  # noqa: PLC0415
            CPUOffloadPolicy,
            FSDPModule,
            OffloadPolicy,
            fully_shard,
        )

        owner: Any = model
        blocks = set(owner._no_split_modules or ())
        units = [module for module in model.modules() if type(module).__name__ in blocks]
        if not units:
            raise LlmattribError(
                f"{type(model).__name__} does not say which of its modules are blocks (_no_split_modules)",
                expected="a model that FSDP2 can bring together block by block",
                fix="launch with --config_file launch/zero3.yaml",
            )
        embeddings = [owner.get_input_embeddings(), owner.get_output_embeddings()]
        if None not in embeddings and embeddings[0].weight is not embeddings[1].weight:
            units += embeddings
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        offload = CPUOffloadPolicy() if self._is_offloaded and device.type != "cpu" else OffloadPolicy()
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh, offload_policy=offload)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def release(self) -> None:
        """Cut up what is whole for the whole of a pass."""
        for unit in self._units:
            unit.reshard()


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
        ends them. On GPUs a rank that fails by itself ends without NCCL's farewell, in which it would wait for the
        others, and they for it.

        Raises:
            Exception: what was raised here, on the rank that failed first; the others leave by `SystemExit`.
        """
        try:
            yield
        except Exception as error:
            if self.world_size > 1 and self.device != "cpu" and not hasattr(error, _AGREED):
                atexit.register(_end)  # the last that is registered is the first to run, so before `_leave`
            if self.sharding is None or self.world_size == 1 or _board().add("llmattrib/failed", 1) == 1:
                raise
            time.sleep(GRACE_SECONDS)
            raise SystemExit(EXIT_CODE) from None

    def in_passes(self, action: Callable[[], T]) -> T:
        """Run `action`, which needs the model, on every rank: `together`, or inside `lockstep` where it is shared."""
        return action() if self.sharding else self.together(action)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and go on only if all of them succeed.

        An action may itself call `together`, `total` and `on_main`: a rank that fails outside of those calls is noticed
        by the others at their next one. It must not call `gather` and `sum`, which do not look for that.

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
        LlmattribError: a launcher announced several processes but they cannot be joined, or DeepSpeed is missing or
            its settings are not of ZeRO-3, or those of FSDP not of its second version.
    """
    sharding = _sharding()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and sharding is None:
        return Ranks()
    on_cpu = not torch.cuda.is_available()
    try:
        # With cpu=True accelerate uses no DeepSpeed; without it, it takes a rank without a GPU for a job of one.
        place: dict[str, Any] = {"backend": "gloo"} if on_cpu else {}
        if not isinstance(sharding, Zero3):
            place = {"cpu": on_cpu}
        state = PartialState(**place, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise LlmattribError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')} but the processes cannot be joined ({error})",
            expected="processes started by `accelerate launch`",
            fix="start through `accelerate launch --config_file launch/cpu.yaml ...`, or unset WORLD_SIZE",
        ) from error
    atexit.register(_leave, state)
    return Ranks(state.process_index, state.num_processes, str(state.device), sharding)


def _leave(state: PartialState) -> None:
    """End the process groups while the interpreter is whole: a thread of gloo that lives on may abort it at its end.

    Models of shared weights hold groups and are part of cycles, so these are collected first.
    """
    gc.collect()
    state.destroy_process_group()


def _end() -> None:
    """End the process, which has said why."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def _board() -> Any:
    """Return the store that the launcher keeps for all ranks."""
    return torch.distributed.distributed_c10d._get_default_store()


def _sharding() -> Sharding | None:
    """Return how the launcher wants the ranks to share a model's weights."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return Zero3(_deepspeed_settings())
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return None
    from accelerate import FullyShardedDataParallelPlugin  # noqa: PLC0415
    from torch.distributed.fsdp import CPUOffloadPolicy  # noqa: PLC0415

    try:
        plugin = FullyShardedDataParallelPlugin()
        found = f"version {plugin.fsdp_version}"
    except ValueError as error:
        plugin, found = None, f"settings that accelerate refuses ({first_line(error)})"
    if plugin is None or plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise LlmattribError(
            f"the launcher asks for FSDP with {found}",
            expected="fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false",
            fix="launch with --config_file launch/fsdp2.yaml",
        )
    return Fsdp2(isinstance(plugin.cpu_offload, CPUOffloadPolicy))


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
        from_here, from_root = Path(path), _ROOT / path
        text = (from_here if from_here.is_file() else from_root).read_text(encoding="utf-8")
        settings: dict[str, Any] = json.loads(text)
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LlmattribError(
            f"the settings of DeepSpeed, {path or 'no file'}, cannot be read ({first_line(error)})",
            expected="JSON with zero_optimization.stage",
            fix="launch with --config_file launch/zero3.yaml",
        ) from error
    if stage != 3:
        raise LlmattribError(
            f"{path} asks for ZeRO stage {stage}", expected="stage 3", fix="see configs/deepspeed/zero3.json"
        )
    return settings
