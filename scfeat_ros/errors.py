"""Errors that a user can mend; the command line prints them as one line."""

from __future__ import annotations

import importlib
import re
from typing import Any


class ScfeatError(Exception):
    """Base of the errors below; the message names what is wrong and the remedy."""


class InputError(ScfeatError):
    """An input file, folder, topic or value that cannot be used."""


class ModelError(ScfeatError):
    """A model file that is missing, damaged or of another architecture."""


class OutputExistsError(ScfeatError):
    """The output is there already and overwriting was not asked for."""


class OptionError(ScfeatError, ValueError):
    """An option outside its range, or one that does not go with the others."""


def import_optional(name: str, purpose: str, install: str | None = None) -> Any:
    """A module of a package that is not always installed.

    Args:
        name: of module and package.
        purpose: what needs it.
        install: what pip is to install, if not the package alone.

    Raises:
        ScfeatError: it cannot be imported; the message says what for and how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ScfeatError(
            f"{purpose} needs the Python package {name}: pip install {install or name}"
        ) from error


def without_numbers(text: str) -> str:
    """A message without its numbers, by which messages of the same matter may differ."""
    return re.sub(r"0x[0-9a-f]+|\d[\d.]*", "#", text)
