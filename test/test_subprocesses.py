"""Subprocesses: their output, and that none of them is left behind."""

import os
import subprocess
import sys
import threading

import pytest
from processes import has_ended, process_of

from scfeat_ros import subprocesses

FAMILY = "sleep 300 & echo $! > {file}; wait"
"""A shell that waits for a program of its own and tells its process id."""


def test_status_and_output():
    code = "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"
    result = subprocesses.run([sys.executable, "-c", code], 60)
    assert (result.returncode, result.stdout, result.stderr) == (3, "1\n", "2\n")
    with pytest.raises(FileNotFoundError):
        subprocesses.run(["no-such-program"], 60)
    assert not subprocesses._running  # by whose process ids others may be known later


def test_output_of_another_encoding_can_be_read():
    result = subprocesses.run(["printf", r"caf\351\n"], 60)
    assert result.stdout == "caf\N{REPLACEMENT CHARACTER}\n"


def test_a_timeout_ends_the_programs_of_the_program_too(tmp_path):
    file = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocesses.run(["sh", "-c", FAMILY.format(file=file)], 5)
    assert has_ended(process_of(file))
    # also where it has ended itself, and they hold its output open
    with pytest.raises(subprocess.TimeoutExpired):
        subprocesses.run(["sh", "-c", f"sleep 300 & echo $! > {file}; exit"], 5)
    assert has_ended(process_of(file))


def test_all_are_ended_from_another_thread(tmp_path):
    results = []
    files = [tmp_path / "one", tmp_path / "other"]
    threads = [
        threading.Thread(
            target=lambda file=file: results.append(
                subprocesses.run(["sh", "-c", FAMILY.format(file=file)], 60)
            )
        )
        for file in files
    ]
    for thread in threads:
        thread.start()
    pids = [process_of(file) for file in files]
    subprocesses.kill_all()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [-9, -9]
    assert all(has_ended(pid) for pid in pids)


def test_a_signal_to_the_group_of_this_process_does_not_reach_them():
    """As Ctrl-C in a terminal."""
    result = subprocesses.run([sys.executable, "-c", "import os; print(os.getpgrp())"], 60)
    assert int(result.stdout) != os.getpgrp()
