"""OpenMP's threads, on which PyTorch and the compiled kernels compute."""

from __future__ import annotations

import ctypes
import os

SOFT = 1
"""`omp_pause_soft` of omp.h: threads may go, settings stay."""


def configure() -> None:
    """Make threads fit for a robot and for processes that fork. Comes before PyTorch's import.

    They spin for some 50 microseconds between two operations and then sleep. On a busy machine,
    as a robot's is, threads that spin longer take the cores that the frame needs: ten times as
    long costs a third of a frame's time, spinning on and on makes some frames ten times as long.
    On an idle one it gains a tenth: its cores stay awake during a frame anyway
    (native/awake.cpp). `OMP_WAIT_POLICY`, where it is set, decides instead.

    Before a fork the calling thread's threads end: the child would wait for ever for threads that
    did not follow it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=release_threads)


def release_threads() -> None:
    """End the threads that wait for the calling thread's next operation, which starts new ones.

    Every thread that computes has such threads of its own. GNU's OpenMP counts them all, and where
    they outnumber the cores none of them spins: a thread that has done its work for good, such as
    the one that loads a network for another, makes frames a tenth slower.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # of OpenMP 5.0
    if pause is not None:
        pause(SOFT)
