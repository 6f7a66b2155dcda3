"""A network through captured CUDA graphs: one launch a frame instead of some hundred."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from scfeat_ros.model.scfeat import SCFeatOutput

KEPT = 4
"""Sizes of images whose graphs are kept; others run without one."""
WARM_UPS = 3
"""Runs before the capture, in which libraries choose their algorithms and allocate."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    image: torch.Tensor
    output: SCFeatOutput


class CudaGraphs:
    """Calls a network by replaying what it launched for the first image of the same size.

    May be called from several threads.

    Args:
        network: takes an image on a CUDA device, and never waits for the device.
    """

    def __init__(self, network: Callable[[torch.Tensor], SCFeatOutput]) -> None:
        self.network = network
        self._captured: dict[tuple[torch.Size, torch.dtype], _Captured] = {}
        self._lock = threading.Lock()

    def __call__(self, image: torch.Tensor) -> SCFeatOutput:
        with self._lock:
            key = image.shape, image.dtype
            if key not in self._captured:
                if len(self._captured) == KEPT:
                    return self.network(image)
                self._captured[key] = self._capture(image)
            graph, place, output = self._captured[key]
            place.copy_(image)
            graph.replay()
            # the next replay writes to the same place
            return SCFeatOutput(*(part.clone() for part in output))

    def _capture(self, image: torch.Tensor) -> _Captured:
        place = image.clone()
        current, beside = torch.cuda.current_stream(image.device), torch.cuda.Stream(image.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self.network(place)
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(place)
        return _Captured(graph, place, output)
