"""Errors that a user can fix; the command line prints them as one line."""

from __future__ import annotations

import importlib
import re
from typing import Any

from scfeat_ros.signals import sigterm_kept


class ScfeatError(Exception):
    """Base of the errors below; the message names the problem and the remedy."""


class InputError(ScfeatError):
    """An input file, folder, topic or value that cannot be used."""


class ModelError(ScfeatError):
    """A model file that is missing, damaged or of another architecture."""


class OutputExistsError(ScfeatError):
    """The output exists already and is not to be overwritten."""


class OptionError(ScfeatError, ValueError):
    """An option outside its range, or one that is incompatible with the others."""


def import_optional(name: str, purpose: str, install: str | None = None) -> Any:
    """Import a module of an optional dependency; the process keeps its handler of SIGTERM.

    Args:
        name: of module and package.
        purpose: what needs it.
        install: pip's argument, if not the package's name.

    Raises:
        ScfeatError: it cannot be imported; the message says what needs it and how to install it.
    """
    try:
        with sigterm_kept():
            return importlib.import_module(name)
    except ImportError as error:
        raise ScfeatError(
            f"{purpose} needs the Python package {name}: pip install {install or name}"
        ) from error


def one_line(error: Exception) -> str:
    """Type and message of an exception, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def without_numbers(text: str) -> str:
    """A message with `#` for its numbers, to compare messages that differ only in these."""
    return re.sub(r"0x[0-9a-f]+|\d[\d.]*", "#", text)
