"""File names: as printable text, and in natural order."""

from __future__ import annotations

import os
import re


def printable(path: str | os.PathLike) -> str:
    """A path as text that can be encoded as UTF-8, whatever bytes it consists of."""
    return os.fsencode(path).decode("utf-8", "replace")


def natural_order(name: str) -> list[str | int]:
    """Sort key for natural order: img2 before img10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
