"""Outputs that get their name when they are complete."""

import os
import platform
import subprocess
import sys

import pytest

from scfeat_ros.errors import OutputExistsError
from scfeat_ros.staging import SUMMARY, staged_file, staged_folder


def test_two_runs_to_one_name_do_not_meet(tmp_path):
    """The second to end is refused, and what the first has written stays."""
    program = (
        "import sys; from pathlib import Path; from scfeat_ros.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), False) as folder:\n"
        "    (folder / 'file').write_text('first'); print('in'); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(OutputExistsError), staged_folder(tmp_path / "out", False) as folder:
        (folder / "file").write_text("second")
        other.communicate()
    assert other.returncode == 0
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_removed_and_that_of_other_machines_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for host, process in ((platform.node(), ended.pid), ("elsewhere", ended.pid)):
        (tmp_path / f".out.scfeat-partial.{host}.{process}").mkdir()
        (tmp_path / f".out.scfeat-partial.{host}.{process}.npz").touch()
    running = f".out.scfeat-partial.{platform.node()}.{os.getppid()}"
    (tmp_path / running).mkdir()
    with staged_folder(tmp_path / "out", False) as folder:
        (folder / SUMMARY).touch()
    left = f".out.scfeat-partial.elsewhere.{ended.pid}"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", running, left, f"{left}.npz"}


def test_files_beside_an_unfinished_file_go_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "a.db", False) as partial:
        partial.touch()
        partial.with_name(f"{partial.name}-wal").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_folder(tmp_path / "link", False) as folder:
        (folder / SUMMARY).write_text("1")
    assert (tmp_path / "real" / SUMMARY).read_text() == "1" and (tmp_path / "link").is_symlink()
    with staged_folder(tmp_path / "link", True) as folder:
        (folder / SUMMARY).write_text("2")
    assert (tmp_path / "real" / SUMMARY).read_text() == "2" and (tmp_path / "link").is_symlink()
