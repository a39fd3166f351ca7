"""A GPU that is pretended: its tensors lie in the memory of the machine, and say that they are on cuda:0.

What a GPU refuses is refused here too: an operation between its tensors and others, and a view by numpy. As on a GPU,
a tensor of no dimensions and the indices of a tensor may be elsewhere. Numbers are those of the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")


class MixedDevicesError(Exception):
    """An operation between tensors of two devices."""


class _Memory:
    """The storages that are pretended to be on the GPU; kept, so that none is another's later."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        storage = tensor.untyped_storage()
        if device.type == "cuda":
            self._held[storage._cdata] = storage
        else:
            self._held.pop(storage._cdata, None)
        return tensor

    def device(self, tensor: Tensor) -> torch.device:
        return GPU if self.has(tensor) else tensor.device


class _Calls(TorchFunctionMode):
    """What Python sees of devices, and tensors that are made on one or taken to one."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory, kwargs = self._memory, kwargs or {}
        if func == Tensor.device.__get__:
            return memory.device(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return memory.has(args[0]) == (func == Tensor.is_cuda.__get__)
        if func in (Tensor.numpy, Tensor.__array__) and memory.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return memory.put(func(*args, **{**kwargs, "device": "cpu"}), GPU)
        return func(*args, **kwargs)

    def _moved(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if func is not Tensor.to:
            device, dtype = CPU if func is Tensor.cpu else GPU, None
        elif args and isinstance(args[0], Tensor):
            device, dtype = self._memory.device(args[0]), args[0].dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = self._memory.device(tensor)
        changed = tensor if dtype is None else Tensor.to(tensor, dtype, copy=copy)
        if device is None or device.type == here.type:
            return changed
        return self._memory.put(changed.clone() if changed is tensor else changed, device)


class _Operations(TorchDispatchMode):
    """Everything that is computed, forward and backward."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, memory, name = kwargs or {}, self._memory, func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        free = {id(leaf) for leaf in tree_leaves(args[1])} if name in _INDEXING and memory.has(args[0]) else set()
        asked = [tensor for tensor in given if id(tensor) not in free]
        devices = {memory.device(tensor).type for tensor in asked if tensor.dim() or memory.has(tensor)}
        if len(devices) > 1 and name != "copy_":
            raise MixedDevicesError(f"{func}: {[(tuple(t.shape), memory.device(t).type) for t in asked]}")
        made = func(*args, **kwargs)
        if "cuda" in devices:
            known = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                    memory.put(tensor, GPU)
        return made


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that there is one GPU, cuda:0."""
    memory, engine = _Memory(), torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _Calls(memory):  # for the hooks that run in it
            return engine(*args, **kwargs)

    with mock.patch.object(torch.autograd, "_engine_run_backward", run_backward), _Operations(memory), _Calls(memory):
        yield
