"""Other programs that this one runs and waits for: none of them outlives it."""

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
    """Run a program to its end and take its output.

    It has a session of its own, so that a Ctrl-C in the terminal does not reach it, and is ended
    together with the programs that it has started itself.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it was ended after so many seconds.
    """
    with _lock:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # a program need not write in the encoding that Python expects
            start_new_session=True,
        )
        _running.add(process)
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            _end(process)
            with _lock:
                _running.remove(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def end_all() -> None:
    """End the programs that threads wait for in `run`."""
    with _lock:
        for process in _running:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the program's group, which outlives it where it has left programs behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
