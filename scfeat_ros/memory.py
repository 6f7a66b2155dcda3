"""How the process deals with memory that it has freed."""

from __future__ import annotations

import ctypes
import gc
import sys


def keep_freed_memory(limit: int = 1 << 30) -> None:
    """Let the process keep memory that it has freed, where the C library is glibc.

    By default large maps are handed back to the system after every frame and come back as pages
    to be cleared: some 5,000 page faults and a tenth of the time of a frame. Threads share one
    heap: heaps of their own would hand memory back as before.

    Args:
        limit: bytes that are kept at most, below 2^31.
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
    """Give back what is no longer used: to the GPU's driver and to the operating system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed blocks for later; elsewhere there is no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch (CUDA or CPU), numpy or OpenCV could not get memory."""
    text = str(error).lower()
    phrases = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "insufficient memory",
        "alloc_failed",  # cuBLAS
        "unable to find an engine",  # cuDNN
    )
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)
