"""Networks out of checkpoints and weights files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scfeat_ros.model.scfeat import (
    SCFeat,
    available_models,
    find_weights,
    load_model,
    read_metadata,
)
from scfeat_training.checkpoint import load_checkpoint
from scfeat_training.config import make_config
from scfeat_training.trainer import make_model


def load_trained(checkpoint: str | Path) -> tuple[SCFeat, dict[str, Any]]:
    """The averaged network of a checkpoint, in evaluation mode, and the checkpoint itself.

    Raises:
        InputError: see `load_checkpoint`.
    """
    state = load_checkpoint(checkpoint)
    settings = dict(state["history"][-1]["config"], encoder_weights=None)
    model = make_model(make_config(settings, str(checkpoint)))
    model.load_state_dict(state["ema"])
    return model.eval().to(memory_format=torch.channels_last), state


def load_network(run: str | Path) -> tuple[SCFeat, dict[str, Any]]:
    """A network, in evaluation mode, and how it was made.

    Args:
        run: an installed model's name, a .safetensors file, or a checkpoint or run's folder.

    Raises:
        ModelError, InputError: see `load_model` and `load_checkpoint`.
    """
    if str(run) in available_models() or Path(run).suffix == ".safetensors":
        return load_model(run), read_metadata(find_weights(run))["provenance"]
    model, state = load_trained(run)
    return model, {"stage": state["stage"], "history": state["history"]}
