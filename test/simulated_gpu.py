"""A CUDA device simulated on the CPU, for what goes wrong on a GPU alone.

A tensor on it holds its values in host memory and says that it is on cuda:0. These raise errors: an
operation on tensors of both devices (unless those of the host have a single value), reading values
without a copy to the host, and waiting for the device while a graph is captured. A captured graph
can be replayed. Autocast to bf16 casts the arguments of a few functions; there is a single stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from scfeat_ros import acceleration, cuda_graphs

DEVICE = torch.device("cuda:0")
BETWEEN_DEVICES = {"aten::copy_", "aten::_to_copy"}
TAKE_HOST_INDICES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
WAIT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
IN_BFLOAT16 = "bmm conv2d conv_transpose2d linear matmul mm".split()
IN_FLOAT32 = "exp group_norm layer_norm log log_softmax norm pow rsqrt softmax".split()
AUTOCAST = dict.fromkeys(IN_BFLOAT16, torch.bfloat16) | dict.fromkeys(IN_FLOAT32, torch.float32)
"""What autocast casts floats to, by function."""
OF_THREAD = threading.local()
"""`graph`: what is being captured."""


class OnGpu(torch.Tensor):
    """A tensor on the simulated GPU; its values are in `host`."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnGpu:
        # a PyTorch without CUDA cannot switch to such a device, but to that of meta tensors
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )
        tensor.host = host
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            return DEVICE
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_meta.__get__):
            return func == torch.Tensor.is_cuda.__get__
        # these do not dispatch
        if func == torch.Tensor.data.__set__:
            args[0].host = args[1].host
        if func == torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func == torch.Tensor.new_tensor:
            return args[0].host.new_tensor(*args[1:], **(kwargs or {})).to(DEVICE)
        dtype = AUTOCAST.get(getattr(func, "__name__", ""))
        if dtype is not None and torch.is_autocast_enabled("cuda"):
            args = tree_map_only(OnGpu, lambda t: t.to(dtype) if t.is_floating_point() else t, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    """Sends all operations, also those that make a tensor on a device, to `call`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class Graph:
    """A captured graph: the operations on host memory, which a replay repeats there."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = tree_leaves(func(*args, **kwargs))
            for kept, new in zip(tree_leaves(result), again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    @contextmanager
    def capture(self, **_: Any) -> Iterator[None]:
        OF_THREAD.graph = self
        try:
            yield
        finally:
            OF_THREAD.graph = None


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on host memory, after the checks of a GPU."""
    name = func.name().split(".")[0]
    flat, spec = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    on_gpu = any(isinstance(value, OnGpu) for value in tensors)
    to_gpu = on_gpu
    if kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type != "cpu"
    elif name == "aten::copy_":
        to_gpu = isinstance(args[0], OnGpu)
    if name not in BETWEEN_DEVICES and on_gpu:
        strays = [t for t in tensors if t.dim() and not isinstance(t, OnGpu)]
        if strays and not (name in TAKE_HOST_INDICES and isinstance(args[0], OnGpu)):
            raise RuntimeError(
                f"{name}: expected all tensors on the same device, but one of shape "
                f"{tuple(strays[0].shape)} is on the CPU"
            )
    graph = getattr(OF_THREAD, "graph", None)
    if graph and (on_gpu or to_gpu):
        by_mask = name == "aten::index" and any(t.dtype == torch.bool for t in tensors[1:])
        between = not all(isinstance(value, OnGpu) for value in tensors)
        if name in WAIT or by_mask or between or not to_gpu:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    flat = [value.host if isinstance(value, OnGpu) else value for value in flat]
    host_args, host_kwargs = tree_unflatten(flat, spec)
    if kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    host_kwargs.pop("pin_memory", None)
    result = func(*host_args, **host_kwargs)
    if not to_gpu:
        return result
    if graph:
        graph.steps.append((func, host_args, host_kwargs, result))
    result = tree_map_only(torch.Tensor, OnGpu, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def in_dispatch(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a mode of its own: modes are those of a thread."""
    with Dispatch():
        function(*args)


@contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """Simulate a GPU for all that runs in the context; yields its device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda _: None,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "get_device_name": lambda *_: "simulated",
            "get_device_capability": lambda *_: (9, 0),
            "is_bf16_supported": lambda: True,
            "max_memory_allocated": lambda *_: 2**20,
            "reset_peak_memory_stats": lambda *_: None,
            "CUDAGraph": Graph,
            "graph": Graph.capture,
            "Stream": lambda *_: MagicMock(),
            "current_stream": MagicMock(),
            "set_stream": lambda _: None,
            "stream": nullcontext,
            "device": nullcontext,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        # a tensor like `OnGpu` cannot be indexed in the inference mode
        for name in ("__enter__", "__exit__"):
            patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        run = threading.Thread.run
        patch.setattr(threading.Thread, "run", lambda thread: in_dispatch(run, thread))
        patch.setattr(acceleration, "has_triton", lambda: False)  # it takes no such tensors
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        cuda_graphs._side_stream.cache_clear()
        with Dispatch():
            yield DEVICE
        cuda_graphs._side_stream.cache_clear()
