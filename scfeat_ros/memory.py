"""How the process deals with memory that it has freed."""

from __future__ import annotations

import ctypes


def keep_freed_memory(limit: int = 1 << 30, map_large: bool = True) -> None:
    """Let the process keep memory that it has freed, where the C library is glibc.

    By default large maps are handed back to the system after every frame and come back as pages
    to be cleared: some 5,000 page faults and a tenth of the time of a frame.

    Args:
        limit: bytes that are kept at most, below 2^31.
        map_large: allocations above 32 MiB are mapped by themselves and given back as ever;
            False keeps those too, for work that repeats the same large allocations.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, limit)
    if map_large:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
    else:
        mallopt(mmap_max, 0)
