"""Captured CUDA graphs: one launch for an image instead of some hundred."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

LOG = logging.getLogger(__name__)

KEPT = 12
"""Most image sizes with a graph, enough for all levels of a pyramid; others run without one."""
WARM_UPS = 3
"""Runs before the capture, in which libraries choose algorithms and allocate memory."""

Output = TypeVar("Output", bound=tuple[torch.Tensor, ...])
Key = tuple[tuple[torch.Size, torch.dtype], ...]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: tuple[torch.Tensor, ...]


class CudaGraphs(Generic[Output]):
    """Calls a function by replaying the graph captured for the first inputs of the same sizes.

    Thread-safe. All graphs share one memory pool, since they run one after the other and their
    results are copied immediately.

    Args:
        function: takes tensors on a CUDA device, returns a named tuple of such, and never
            synchronizes with the device.
    """

    def __init__(self, function: Callable[..., Output]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        with self._lock:
            self._captured: dict[Key, _Captured | None] = {}
            self._pool: tuple[int, int] | None = None

    def is_captured(self, *inputs: torch.Tensor) -> bool:
        """Whether there is a graph for inputs of these sizes."""
        return self._captured.get(_key(inputs)) is not None

    def __call__(self, *inputs: torch.Tensor) -> Output:
        with self._lock, torch.cuda.device(inputs[0].device):
            key = _key(inputs)
            if key not in self._captured and len(self._captured) < KEPT:
                self._captured[key] = self._capture(inputs)
            captured = self._captured.get(key)
            if captured is None:
                return self.function(*inputs)
            for place, given in zip(captured.inputs, inputs, strict=True):
                place.copy_(given)
            captured.graph.replay()
            # the next replay overwrites them
            return captured.output._make(part.clone() for part in captured.output)

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> _Captured | None:
        """The graph for inputs of these sizes; None, with a warning, if the capture fails.

        Raises:
            RuntimeError: the function fails, or memory runs out.
        """
        places = tuple(given.clone() for given in inputs)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
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
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            LOG.warning("%s: runs without a CUDA graph: %s", tuple(inputs[0].shape), error)
            return None
        finally:
            torch.cuda.set_stream(current)  # PyTorch does not reset it if the capture fails
        self._pool = graph.pool()
        return _Captured(graph, places, output)


def _key(inputs: tuple[torch.Tensor, ...]) -> Key:
    return tuple((given.shape, given.dtype) for given in inputs)
