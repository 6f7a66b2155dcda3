"""Checkpoints of a training run: written atomically, to resume at the exact step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from scfeat_ros.errors import InputError
from scfeat_ros.staging import staged_file

CHECKPOINT = "checkpoint.pt"
"""Name of the latest checkpoint in a run's folder."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values atomically.

    Raises:
        InputError: it cannot be written, as on a full disk; an existing file is kept.
    """
    try:
        with staged_file(path, overwrite=True) as partial, partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # when torch.save closes its archive it fails again, with another error
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({cause.strerror})") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or the latest one of a run's folder, onto the CPU.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a run's folder or its {CHECKPOINT}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch may raise anything on other files
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint ({line})") from error
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{path}: is not a checkpoint of a training run")
    return state
