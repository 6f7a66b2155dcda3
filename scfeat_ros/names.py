"""Names of files: as text, and in their order."""

from __future__ import annotations

import os
import re


def printable(path: str | os.PathLike) -> str:
    """A path as text that can be written as UTF-8, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def natural_order(name: str) -> list[str | int]:
    """What names are sorted by so that img2 comes before img10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
