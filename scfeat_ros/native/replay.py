"""Records a network's kernel calls once for an image size, and replays them in one call.

Between two kernels Python prepares the next one, while other cores are idle and the GIL is held. A
recording holds the kernels' arguments, and a memory plan for intermediate maps: a frame is a single
call of C++.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scfeat_ros.model.scfeat import SCFeatOutput
from scfeat_ros.native.library import Argument, Kernel, load, recorded

LOG = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""Most memory of all recordings."""
KEPT_SIZES = 16
"""Most image sizes to keep track of, with or without a recording."""
UNUSED = 100
"""A size that was not used for this many images may be evicted for another."""
ALIGNMENT = 64
"""Of maps in a recording's memory, bytes."""

Network = Callable[[torch.Tensor], SCFeatOutput]


@dataclass
class _Kept:
    """The recordings of one image size."""

    idle: list[_Replay] = field(default_factory=list)
    """Recordings that are not in use by a thread."""
    bytes: int = 0
    """Of all recordings."""
    used: int = 0
    """Number of the last image."""
    records_from: float = 0
    """Number of the image from which another recording may be made."""


class Replays:
    """Calls a network by replaying the kernels that it called for an image of the same size.

    The first image of a size runs normally, the second is recorded. Thread-safe; each thread uses a
    recording of its own, within the limit of `KEPT_BYTES`.

    Args:
        network: takes an image on the CPU. If it computes by anything but the kernels of
            `library.call`, nothing is replayed.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._kept: dict[tuple[object, ...], _Kept] = {}  # the last used at the end
        self._images = 0
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Delete all recordings and free their memory."""
        with self._lock:
            self._kept.clear()

    def __call__(self, image: torch.Tensor) -> SCFeatOutput:
        key = image.shape, image.stride(), image.dtype, torch.get_num_threads()
        with self._lock:
            self._images += 1
            is_new = key not in self._kept
            kept = self._kept[key] = self._kept.pop(key, _Kept())
            kept.used = self._images
            if len(self._kept) > KEPT_SIZES:
                del self._kept[next(iter(self._kept))]
            replay = kept.idle.pop() if kept.idle else None
        if is_new or (replay is None and kept.used < kept.records_from):
            return self.network(image)
        if replay is None:
            return self._record(kept, image)
        try:
            return replay(image)
        finally:  # also if there was no memory for the output
            with self._lock:
                kept.idle.append(replay)

    def _record(self, kept: _Kept, image: torch.Tensor) -> SCFeatOutput:
        recorder = _Recorder()
        try:
            with recorded(recorder), recorder:
                output = self.network(image)
        except RuntimeError as error:  # PyTorch 2.1 cannot make memory in a dispatch mode
            output = self.network(image)
            LOG.debug("%s: not recorded: %s", tuple(image.shape), error)
            kept.records_from = math.inf
            return output
        if recorder.computed:
            LOG.debug("%s: not replayed for %s", tuple(image.shape), ", ".join(recorder.computed))
            kept.records_from = math.inf
            return output
        plan = _Plan.of(recorder, image, output)
        with self._lock:
            if not self._has_room(plan.bytes):
                kept.records_from = self._images + UNUSED
                return output
            kept.idle.append(_Replay(plan, output))
            kept.bytes += plan.bytes
        return output

    def _has_room(self, size: int) -> bool:
        """Whether another recording may be kept; evicts sizes that are no longer used."""
        if size > KEPT_BYTES:
            return False
        while sum(kept.bytes for kept in self._kept.values()) + size > KEPT_BYTES:
            key, oldest = next(iter(self._kept.items()))
            if self._images - oldest.used < UNUSED:
                return False
            del self._kept[key]
        return True


class _Recorder(TorchDispatchMode):
    """Records a network's kernel calls, memory allocations, and all other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Kernel, bytes, tuple[Argument, ...]]] = []
        self.memory: list[torch.Tensor] = []  # kept alive, so that addresses are unique
        self.computed: dict[str, None] = {}

    def called(self, kernel: Kernel, words: bytes, arguments: tuple[Argument, ...]) -> None:
        self.calls.append((kernel, words, arguments))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.memory.append(result)
        elif not getattr(func, "is_view", False):
            self.computed[func.name()] = None
        return result


class _Use(NamedTuple):
    """An argument that is an address in a piece of memory."""

    word: int
    """Its index among the arguments of all calls."""
    memory: int
    """Which piece: the image, an output, or an intermediate map."""
    offset: int


class _Plan(NamedTuple):
    """Kernel calls, and the memory that they read and write."""

    calls: list[tuple[Kernel, bytes]]
    """With their arguments."""
    weights: list[torch.Tensor]
    """Kept alive, since the calls contain their addresses."""
    given: list[_Use]
    """Uses of tensors that differ in every call: memory 0 is the image, the others are outputs."""
    between: list[_Use]
    """Uses of a recording's own memory; offsets are from its start."""
    bytes: int
    """Of a recording's own memory."""

    @classmethod
    def of(cls, recorder: _Recorder, image: torch.Tensor, output: SCFeatOutput) -> _Plan:
        """The plan of what was recorded while a network processed an image."""
        pieces = sorted([image, *recorder.memory], key=torch.Tensor.data_ptr)
        starts = [piece.data_ptr() for piece in pieces]
        slots = {tensor.data_ptr(): i for i, tensor in enumerate((image, *output))}
        given, uses, weights, first, last = [], [], [], {}, {}
        word = 0
        for step, (kernel, _, arguments) in enumerate(recorder.calls):
            for place, argument in enumerate(arguments):
                if not isinstance(argument, torch.Tensor):
                    continue
                address = argument.data_ptr()
                piece = bisect_right(starts, address) - 1
                offset = address - starts[piece]
                if piece < 0 or offset >= pieces[piece].nbytes:
                    weights.append(argument)
                elif starts[piece] in slots:
                    given.append(_Use(word + place, slots[starts[piece]], offset))
                else:
                    uses.append(_Use(word + place, piece, offset))
                    first.setdefault(piece, step)
                    last[piece] = step
            word += kernel.words.size // 8
        sizes = {piece: -(-pieces[piece].nbytes // ALIGNMENT) * ALIGNMENT for piece in first}
        offsets, size = _laid_out(sizes, first, last)
        between = [use._replace(offset=use.offset + offsets[use.memory]) for use in uses]
        calls = [(kernel, words) for kernel, words, _ in recorder.calls]
        return cls(calls, weights, given, between, size)


def _laid_out(
    sizes: dict[int, int], first: dict[int, int], last: dict[int, int]
) -> tuple[dict[int, int], int]:
    """Offsets of pieces of memory, such that pieces in use at the same time do not overlap.

    Args:
        sizes: of the pieces, bytes.
        first, last: the steps between which they are in use.

    Returns:
        The offset of each, and the total size.
    """
    offsets: dict[int, int] = {}
    for piece in sorted(sizes, key=lambda piece: -sizes[piece]):  # largest first
        others = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if first[other] <= last[piece] and first[piece] <= last[other]
        )
        place = 0
        for begin, end in others:
            if begin - place >= sizes[piece]:
                break
            place = max(place, end)
        offsets[piece] = place
    return offsets, max((offsets[piece] + sizes[piece] for piece in sizes), default=0)


class _Replay:
    """A plan with memory of its own; for one thread at a time."""

    def __init__(self, plan: _Plan, like: SCFeatOutput) -> None:
        self._weights = plan.weights
        self._memory = torch.empty(plan.bytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
        self._words = np.frombuffer(b"".join(words for _, words in plan.calls), np.int64).copy()
        start = -(-self._memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        for use in plan.between:
            self._words[use.word] = start + use.offset
        given = np.array(plan.given, np.int64).reshape(-1, 3)
        self._given, self._slots, self._offsets = given.T
        addresses, word = [], self._words.ctypes.data
        for kernel, words in plan.calls:
            addresses.append((ctypes.cast(kernel.function, ctypes.c_void_p).value, word))
            word += len(words)
        self._steps = np.array(addresses, np.uint64)
        self._outputs = [(part.shape, part.stride(), part.dtype) for part in like]

    def __call__(self, image: torch.Tensor) -> SCFeatOutput:
        output = [
            torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            for shape, stride, dtype in self._outputs
        ]
        pieces = np.array([piece.data_ptr() for piece in (image, *output)])
        self._words[self._given] = pieces[self._slots] + self._offsets
        steps = ctypes.c_void_p(self._steps.ctypes.data), ctypes.c_long(len(self._steps))
        if not load().replay(*steps):
            raise MemoryError("there is not enough memory for an image")
        return SCFeatOutput(*output)
