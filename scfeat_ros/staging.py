"""Output under its final name only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfeat_ros.errors import InputError, OutputExistsError

SUMMARY = "summary.json"
"""The file by which an output folder is known as one."""


@contextmanager
def staged_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends without an error.

    What a killed run has left is removed by the next one to the same name.

    Args:
        path: the final name.
        overwrite: whether an output that is there already may be replaced.

    Raises:
        OutputExistsError: it exists; with `overwrite`, only if it is no output of this tool.
        InputError: its parent cannot be written to.
    """
    path = Path(path).absolute()
    check_output(path, overwrite)
    partial = path.with_name(f".{path.name}.scfeat-partial")
    replaced = path.with_name(f".{path.name}.scfeat-replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
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
def staged_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A file name to write to that becomes `path` when the block ends without an error.

    The ending stays the same, for libraries that go by it. Raises as `staged_folder`.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, the output is a file")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")
    partial = path.with_name(f".{path.stem}.scfeat-partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """See `staged_folder`."""
    if not path.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{path} exists already; give another name or --overwrite")
    # never delete what somebody else has put there
    if not path.is_dir() or (any(path.iterdir()) and not (path / SUMMARY).is_file()):
        raise OutputExistsError(
            f"{path} exists and is no earlier output (it has no {SUMMARY}), so --overwrite does "
            "not replace it; give another name"
        )


def check_apart(output: Path, source: Path) -> None:
    """Make sure that writing the output cannot change the input.

    Raises:
        InputError: one lies in the other.
    """
    output, source = Path(output).resolve(), Path(source).resolve()
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        raise InputError(f"the output {output} and the input {source} lie in one another")
