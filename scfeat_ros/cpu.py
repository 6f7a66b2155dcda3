"""Name and features of the CPU, from /proc/cpuinfo on Linux."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_info() -> str:
    """The content of /proc/cpuinfo; empty if there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """The CPU's model name, or its architecture if the system does not tell."""
    for line in cpu_info().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
