"""Subprocesses that are waited for, and killed with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence

_lock = threading.Lock()
_running: set[subprocess.Popen] = set()


def run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output, like `subprocess.run`.

    It has a session of its own, so that a Ctrl-C in the terminal does not reach it. When it ends or
    the timeout (seconds) expires, processes that it has started and left behind are killed, too.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it was killed at the timeout.
    """
    with _lock:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # its output may be in any encoding
            start_new_session=True,
        )
        _running.add(process)
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            _kill(process)
            with _lock:
                _running.remove(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_all() -> None:
    """Kill the subprocesses that other threads wait for in `run`."""
    with _lock:
        for process in _running:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill the process group, which outlives the process if it has left others behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
