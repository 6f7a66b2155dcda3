"""Captured CUDA graphs: one launch for an image instead of some hundred."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from scfeat_ros.memory import is_out_of_memory

LOG = logging.getLogger(__name__)

KEPT = 12
"""Most image sizes with a graph, enough for all levels of a pyramid; others run without one."""
WARM_UPS = 3
"""Runs before the capture, in which libraries choose algorithms and allocate memory."""

_LOCK = threading.Lock()
"""PyTorch captures one graph at a time in a process."""

Output = TypeVar("Output", bound=tuple[torch.Tensor, ...])
Key = tuple[tuple[torch.Size, torch.dtype], ...]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: tuple[torch.Tensor, ...]


class CudaGraphs(Generic[Output]):
    """Calls a function by replaying the graph captured for the first inputs of the same sizes.

    Thread-safe, also for threads with streams of their own. All graphs share one memory pool, since
    they run one after the other and their results are copied immediately.

    Args:
        function: takes tensors on a CUDA device, returns a named tuple of such, and never
            synchronizes with the device.
    """

    def __init__(self, function: Callable[..., Output]) -> None:
        self.function = function
        self._captured: dict[Key, _Captured | None] = {}
        self._pool: tuple[int, int] | None = None
        self._done: torch.cuda.Event | None = None

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        with _LOCK:
            self._captured, self._pool, self._done = {}, None, None

    def is_captured(self, *inputs: torch.Tensor) -> bool:
        """Whether there is a graph for inputs of these sizes."""
        return self._captured.get(_key(inputs)) is not None

    def __call__(self, *inputs: torch.Tensor) -> Output:
        with _LOCK, torch.cuda.device(inputs[0].device):
            key = _key(inputs)
            if key not in self._captured and len(self._captured) < KEPT:
                self._captured[key] = self._capture(inputs)
            captured = self._captured.get(key)
            if captured is None:
                return self.function(*inputs)
            stream = torch.cuda.current_stream()
            if self._done is not None:  # of another thread's stream
                stream.wait_event(self._done)
            for place, given in zip(captured.inputs, inputs, strict=True):
                place.copy_(given)
            captured.graph.replay()
            # the next replay overwrites them
            output = captured.output._make(part.clone() for part in captured.output)
            self._done = stream.record_event()
            return output

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> _Captured | None:
        """The graph for inputs of these sizes; None, with a warning, if the capture fails.

        Raises:
            RuntimeError: the function fails, or memory runs out.
        """
        places = tuple(given.clone() for given in inputs)
        current, side = torch.cuda.current_stream(), _side_stream(inputs[0].device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function(*places)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may allocate meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
            ):
                output = self.function(*places)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            LOG.warning("%s: runs without a CUDA graph: %s", tuple(inputs[0].shape), error)
            return None
        finally:
            torch.cuda.set_stream(current)  # PyTorch does not reset it if the capture fails
        self._pool = graph.pool()
        return _Captured(graph, places, output)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are captured: those of one pool share memory on one stream only, and for every
    stream PyTorch keeps a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


def _key(inputs: tuple[torch.Tensor, ...]) -> Key:
    return tuple((given.shape, given.dtype) for given in inputs)
