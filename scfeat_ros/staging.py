"""Output under its final name only when it is complete."""

from __future__ import annotations

import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfeat_ros.errors import InputError, OutputExistsError

SUMMARY = "summary.json"
"""The file by which an output folder is known as one."""


@contextmanager
def staged_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends without an error.

    Every process has a partial folder of its own, so two of them to the same name do not meet: the
    second to end finds the output there. What a killed run has left is removed by the next one.

    Args:
        path: the final name.
        overwrite: whether an output that is there already may be replaced.

    Raises:
        OutputExistsError: it exists; with `overwrite`, only if it is no output of this tool.
        InputError: its parent cannot be written to.
    """
    path = Path(path).resolve()
    check_output(path, overwrite)
    partial = path.with_name(_partial(path.name))
    replaced = path.with_name(f".{path.name}.scfeat-replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, path.name)
        _remove(partial)  # of an earlier process with this one's number
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        check_output(path, overwrite)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
        os.rename(partial, path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged_file(path: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """A file name to write to that becomes `path` when the block ends without an error.

    The ending stays the same, for libraries that go by it. Raises as `staged_folder`.
    """
    path = Path(path).resolve()
    check_file(path, overwrite)
    partial = path.with_name(_partial(path.stem, path.suffix))
    make_parent(path)
    try:
        _remove_stale(path.parent, path.stem, path.suffix)
        _remove(partial)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        check_file(path, overwrite)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _partial(name: str, suffix: str = "") -> str:
    """Name of this process's partial output."""
    return f"{_prefix(name)}{os.getpid()}{suffix}"


def _prefix(name: str) -> str:
    machine = zlib.crc32(platform.node().encode())
    return f".{name}.scfeat-partial-{machine:08x}-"


def _remove_stale(folder: Path, name: str, suffix: str = "") -> None:
    """Remove what processes of this machine have left that are no more."""
    prefix = _prefix(name)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for found in names:
        process = found.removeprefix(prefix).removesuffix(suffix)
        if process.isdigit() and not _is_running(int(process)):
            _remove(folder / found)


def _is_running(process: int) -> bool:
    if os.name == "nt":
        return True  # there is no harmless way to ask
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def _remove(path: Path) -> None:
    """Remove a folder, or a file and what SQLite has beside it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    for beside in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + beside).unlink(missing_ok=True)


def make_parent(path: str | Path) -> None:
    """Make the folder of a file that will be written, before the work that goes into it.

    Raises:
        InputError: it cannot be made or written to.
    """
    folder = Path(path).resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission in {folder}")


def check_file(path: Path, overwrite: bool) -> None:
    """See `staged_file`."""
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, the output is a file")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")


def check_output(path: Path, overwrite: bool) -> None:
    """See `staged_folder`."""
    if not path.exists():
        return
    if not overwrite and path.is_dir():
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")
    # never delete what somebody else has put there
    if not path.is_dir() or (any(path.iterdir()) and not (path / SUMMARY).is_file()):
        raise OutputExistsError(
            f"{path} exists and is no earlier output (a folder with a {SUMMARY}), so --overwrite "
            "does not replace it; give another name"
        )


def check_apart(output: Path, source: Path) -> None:
    """Make sure that writing the output cannot change the input.

    Raises:
        InputError: one lies in the other.
    """
    output, source = Path(output).resolve(), Path(source).resolve()
    if (source.parent / "metadata.yaml").is_file():
        source = source.parent  # a file of a rosbag2 folder
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        raise InputError(f"the output {output} and the input {source} lie in one another")
