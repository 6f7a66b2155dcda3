"""A network through captured CUDA graphs: one launch a frame instead of some hundred."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from scfeat_ros.model.scfeat import SCFeatOutput

LOG = logging.getLogger(__name__)

KEPT = 12
"""Sizes of images whose graphs are kept, enough for all levels of a pyramid; others run without."""
WARM_UPS = 3
"""Runs before the capture, in which libraries choose their algorithms and allocate."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    image: torch.Tensor
    output: SCFeatOutput


class CudaGraphs:
    """Calls a network by replaying what it launched for the first image of the same size.

    May be called from several threads. All graphs share one pool of memory, since they run one
    after the other and their results are copied at once.

    Args:
        network: takes an image on a CUDA device, and never waits for the device.
    """

    def __init__(self, network: Callable[[torch.Tensor], SCFeatOutput]) -> None:
        self.network = network
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        with self._lock:
            self._captured: dict[tuple[torch.Size, torch.dtype], _Captured | None] = {}
            self._pool: tuple[int, int] | None = None

    def __call__(self, image: torch.Tensor) -> SCFeatOutput:
        with self._lock, torch.cuda.device(image.device):
            key = image.shape, image.dtype
            if key not in self._captured and len(self._captured) < KEPT:
                self._captured[key] = self._capture(image)
            captured = self._captured.get(key)
            if captured is None:
                return self.network(image)
            captured.image.copy_(image)
            captured.graph.replay()
            # the next replay writes to the same place
            return SCFeatOutput(*(part.clone() for part in captured.output))

    def _capture(self, image: torch.Tensor) -> _Captured | None:
        """The graph for images like this one.

        Returns:
            None, with a warning, where an image of another size was captured and this cannot be.

        Raises:
            RuntimeError: the first image cannot be captured, or memory runs out.
        """
        place = image.clone()
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self.network(place)
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may allocate meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"
            ):
                output = self.network(place)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._captured:
                raise
            LOG.warning("images of %s run without a CUDA graph: %s", tuple(image.shape), error)
            return None
        finally:
            torch.cuda.set_stream(current)  # where a capture fails, PyTorch leaves the other one
        self._pool = graph.pool()
        return _Captured(graph, place, output)
