"""Settings of the OpenMP threads that PyTorch and the compiled kernels use."""

from __future__ import annotations

import ctypes
import os

SOFT = 1
"""`omp_pause_soft` of omp.h: threads may go, settings stay."""


def configure() -> None:
    """Limit spinning, and make forks safe; must be called before PyTorch is imported.

    Threads spin for some 50 microseconds between two operations and then sleep. On a busy machine
    such as a robot's computer, threads that spin longer take cores that the frame needs: ten times
    as long costs a third of a frame's time, endless spinning makes some frames ten times slower.
    On an idle machine it would gain a tenth only, as cores are kept awake during a frame anyway
    (native/awake.cpp). If `OMP_WAIT_POLICY` is set, it takes precedence.

    Before a fork the calling thread's pool is released: the child would wait forever for threads
    that a fork does not copy.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=release_threads)


def release_threads() -> None:
    """End the calling thread's pool of OpenMP threads; its next operation starts a new one.

    Every thread that computes has a pool of its own. GNU's OpenMP counts the threads of all pools,
    and stops spinning if they outnumber the cores: the idle pool of a thread that has only loaded
    the network makes frames a tenth slower.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # of OpenMP 5.0
    if pause is not None:
        pause(SOFT)
