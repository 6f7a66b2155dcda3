"""Memory: what the allocator keeps, giving it back, and recognizing that it ran out."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress


def keep_freed_memory(limit: int = 1 << 30) -> None:
    """Make glibc's malloc keep freed memory; no effect with another C library.

    By default large maps are returned to the system after every frame and allocated again as
    zeroed pages: some 5,000 page faults and a tenth of a frame's time. All threads share one
    arena: other arenas would still return memory.

    Args:
        limit: most bytes to keep, below 2^31.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, limit)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)


def free_memory() -> None:
    """Return unused memory to the GPU's driver and to the operating system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with suppress(RuntimeError):  # of a GPU that has failed, or after a capture that has
            torch.cuda.empty_cache()
    # glibc keeps freed blocks for later; elsewhere there is no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch (CUDA or CPU), numpy or OpenCV ran out of memory."""
    text = str(error).lower()
    phrases = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "insufficient memory",
        "alloc_failed",  # cuBLAS
        "status_not_initialized",  # cuBLAS and cuDNN, of their handles
        "unable to find an engine",  # cuDNN
        "nvml_success == r",  # on a Jetson, which lacks what PyTorch's message is made of
    )
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)
