"""Keeps CPU cores awake while a frame is processed."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from scfeat_ros.native.library import is_compiled, load

CPU = torch.device("cpu")


@contextlib.contextmanager
def cores_awake(device: torch.device = CPU) -> Iterator[None]:
    """Keep the cores of PyTorch's threads from entering idle states between two operations.

    A virtual machine's cores, and those of small computers with deep idle states, take as long to
    wake up as a small layer takes to compute. While the context is open, threads of the scheduler's
    idle class spin on these cores; any other thread preempts them. See `awake.cpp`.

    Args:
        device: the device that computes; only the CPU needs this.
    """
    if device.type != "cpu" or not keeps_cores_awake():
        yield
        return
    library = load()
    library.awake_begin()
    try:
        yield
    finally:
        library.awake_end()


def keeps_cores_awake() -> bool:
    """Whether `cores_awake` has an effect.

    It has none with a single thread or threads for less than half of the cores, with a quota of CPU
    time (which spinning would use up), without a compiler, and on other systems than Linux.
    """
    if sys.platform != "linux" or has_cpu_quota():
        return False
    threads = torch.get_num_threads()
    return threads > 1 and 2 * threads >= len(os.sched_getaffinity(0)) and is_compiled()


@functools.cache
def has_cpu_quota(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> bool:
    """Whether a control group, such as a container's or a service's, limits the CPU time."""
    files = [groups / "cpu.max", groups / "cpu/cpu.cfs_quota_us"]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        number, _, path = line.split(":", 2)
        own = groups / path.lstrip("/")
        if number == "0":  # of version 2; every group above counts as well
            files += [group / "cpu.max" for group in (own, *own.parents)]
    return any(
        file.is_file() and file.read_text().split()[0] not in ("max", "-1") for file in files
    )
