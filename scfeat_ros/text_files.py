"""Reads the user's text files: lists of pairs, calibrations, settings."""

from __future__ import annotations

from pathlib import Path

from scfeat_ros.errors import InputError


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with or without a byte order mark.

    Raises:
        InputError: it cannot be read, or is not UTF-8; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read (not UTF-8 text: {error.reason})") from error
