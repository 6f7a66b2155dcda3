"""Atomic output: a file or folder gets its final name only when it is complete."""

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
"""The file that marks a folder as output of this tool."""


@contextmanager
def staged_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which is renamed to `path` when the block ends without an error.

    Every process has a partial folder of its own, so two with the same output do not interfere: the
    second to finish finds that it exists. Leftovers of a killed run are removed by the next one.

    Args:
        path: the final name.
        overwrite: whether existing output may be replaced.

    Raises:
        OutputExistsError: it exists; with `overwrite`, only if it is not output of this tool.
        InputError: its parent folder is not writable.
    """
    path = Path(path).resolve()
    check_output(path, overwrite)
    partial = path.with_name(_partial(path.name))
    replaced = path.with_name(f".{path.name}.scfeat-replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, path.name)
        _remove(partial)  # of an earlier process with the same id
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
    """A file to write, which is renamed to `path` when the block ends without an error.

    It has the same suffix, for libraries that depend on it. Raises as `staged_folder`.
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
    """Remove leftovers of this machine's processes that have ended."""
    prefix = _prefix(name)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for found in names:
        process = found.removeprefix(prefix).removesuffix(suffix)
        if process.isdigit() and not _is_running(int(process)):
            _remove(folder / found)


def _is_running(process: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would terminate it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    """Remove a folder, or a file and SQLite's files that belong to it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    for beside in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + beside).unlink(missing_ok=True)


def make_parent(path: str | Path) -> None:
    """Create the folder of an output file, before the work that its content takes.

    Raises:
        InputError: it cannot be created or is not writable.
    """
    folder = Path(path).resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission in {folder}")


def check_file(path: Path, overwrite: bool) -> None:
    """Check that a file may be written; raises as `staged_file`."""
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, the output is a file")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")


def check_output(path: Path, overwrite: bool) -> None:
    """Check that a folder may be written; raises as `staged_folder`."""
    if not path.exists():
        return
    if not overwrite and path.is_dir():
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")
    # never delete anything but our own output
    if not path.is_dir() or (any(path.iterdir()) and not (path / SUMMARY).is_file()):
        raise OutputExistsError(
            f"{path} exists and is not an earlier output (a folder with a {SUMMARY}), so "
            "--overwrite does not replace it; give another name"
        )


def check_apart(output: Path, source: Path) -> None:
    """Check that writing the output cannot change the input.

    Raises:
        InputError: one is inside of the other.
    """
    output, source = Path(output).resolve(), Path(source).resolve()
    if (source.parent / "metadata.yaml").is_file():
        source = source.parent  # a file of a rosbag2 folder
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        raise InputError(f"the output {output} and the input {source} lie in one another")
