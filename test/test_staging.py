"""Outputs that get their name when they are complete."""

import subprocess
import sys
from pathlib import Path

import pytest

from scfeat_ros import staging
from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_ros.staging import SUMMARY, check_apart, check_output, staged_file, staged_folder

PROGRAM = """
import sys
from pathlib import Path
from scfeat_ros import staging
make = getattr(staging, sys.argv[1])
with make(Path(sys.argv[2]), False) as partial:
    (partial / "file" if make is staging.staged_folder else partial).write_text("first")
    print("in", flush=True)
    sys.stdin.read()
"""


def begin(kind, path):
    """Another process in the middle of writing an output; it goes on when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in\n"
    return process


def test_two_runs_to_one_name_do_not_meet(tmp_path):
    """The second to end is refused, and what the first has written stays."""
    for kind in ("staged_folder", "staged_file"):
        out = tmp_path / kind
        other = begin(kind, out)
        make = getattr(staging, kind)
        with pytest.raises(OutputExistsError), make(out, False) as partial:
            (partial / "file" if kind == "staged_folder" else partial).write_text("second")
            other.communicate()
        assert other.returncode == 0
        assert (out / "file" if kind == "staged_folder" else out).read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"staged_folder", "staged_file"}


@pytest.mark.parametrize(("kind", "name"), [("staged_folder", "out"), ("staged_file", "out.npz")])
def test_what_a_killed_run_left_is_removed_by_the_next_on_this_machine(
    tmp_path, monkeypatch, kind, name
):
    def write():
        with getattr(staging, kind)(tmp_path / name, True) as partial:
            (partial / SUMMARY if kind == "staged_folder" else partial).write_text("mine")
        return len(list(tmp_path.iterdir())) - 1  # beside the output

    other = begin(kind, tmp_path / name)
    assert write() == 1  # still in work
    other.kill()
    other.communicate()
    with monkeypatch.context() as patch:
        patch.setattr(staging.platform, "node", lambda: "another machine")
        assert write() == 1
    assert write() == 0


def test_outputs_of_one_process_do_not_meet_either(tmp_path):
    with (
        staged_file(tmp_path / "a.json", False) as first,
        staged_file(tmp_path / "a.npz", False) as second,
        staged_file(tmp_path / "a", False) as third,
    ):
        for partial in (first, second, third):
            partial.write_text(partial.suffix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json", "a.npz"]


def test_files_beside_an_unfinished_file_go_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "a.db", False) as partial:
        partial.touch()
        partial.with_name(f"{partial.name}-wal").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "name"), [("staged_folder", "out"), ("staged_file", "out.npz")])
def test_what_a_killed_run_of_the_same_number_left_is_removed(tmp_path, kind, name):
    """Where the program is alone in a container, it always has the same process id."""
    make = getattr(staging, kind)
    with make(tmp_path / name, False) as partial:
        left = partial
        (partial / SUMMARY if kind == "staged_folder" else partial).write_text("1")
    left.mkdir()
    (left / "old").write_text("what was written before the kill")
    with make(tmp_path / name, True) as partial:
        assert partial == left
        (partial / SUMMARY if kind == "staged_folder" else partial).write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (tmp_path / name / "old").exists()


def test_a_run_that_was_killed_while_it_replaced_does_not_stand_in_the_way(tmp_path):
    for overwrite in (False, True):
        (tmp_path / ".out.scfeat-replaced").mkdir()
        (tmp_path / ".out.scfeat-replaced" / SUMMARY).write_text("0")
        with staged_folder(tmp_path / "out", overwrite) as partial:
            (partial / SUMMARY).write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_can_be_replaced_and_a_file_cannot(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(tmp_path / "out", False)
    check_output(tmp_path / "out", True)
    (tmp_path / "file").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="not an earlier output"):
            check_output(tmp_path / "file", overwrite)
    with pytest.raises(InputError, match="this is a folder"), staged_file(tmp_path / "out", True):
        pass


@pytest.mark.parametrize("output", ["bag", "bag/out", "bag/bag.mcap", ".", "bag/bag.mcap/out"])
@pytest.mark.parametrize("source", ["bag", "bag/bag.mcap"])
def test_an_output_in_a_bag_or_around_it_is_refused(tmp_path, monkeypatch, output, source):
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "metadata.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="lie in one another"):
        check_apart(Path(output), Path(source))
    check_apart(Path("bag-out"), Path(source))


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_folder(tmp_path / "link", False) as folder:
        (folder / SUMMARY).write_text("1")
    assert (tmp_path / "real" / SUMMARY).read_text() == "1" and (tmp_path / "link").is_symlink()
    with staged_folder(tmp_path / "link", True) as folder:
        (folder / SUMMARY).write_text("2")
    assert (tmp_path / "real" / SUMMARY).read_text() == "2" and (tmp_path / "link").is_symlink()
