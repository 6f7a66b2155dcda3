"""Networks: initialized, or loaded from checkpoints and weights files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scfeat_ros.errors import InputError
from scfeat_ros.model.scfeat import (
    CONFIGS,
    SCFeat,
    available_models,
    find_weights,
    load_model,
    read_metadata,
)
from scfeat_training.checkpoint import load_checkpoint
from scfeat_training.config import TrainConfig, make_config, options_of


def make_model(config: TrainConfig) -> SCFeat:
    """The initial network: random weights, and the encoder's from a file if one is given.

    Raises:
        InputError: no such network, or an encoder file that cannot be read or does not fit.
    """
    torch.manual_seed(config.seed)
    try:
        model = SCFeat(options_of(CONFIGS[config.model], config.network, "network"))
    except ValueError as error:
        raise InputError(f"network: {error}") from error
    if config.encoder_weights:
        path = Path(config.encoder_weights)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.backbone.encoder.load_torchvision(state)
        except Exception as error:  # torch.load has no error of its own
            raise InputError(f"{path}: encoder weights cannot be used ({error})") from error
    if not config.cross_norm:
        model.bridge = nn.Identity()
    return model


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load a state dict into a network.

    Raises:
        InputError: it is of another network; `where` names its source.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{where}: weights of another network ({first})") from error


def load_trained(checkpoint: str | Path) -> tuple[SCFeat, dict[str, Any]]:
    """The averaged network of a checkpoint, in evaluation mode, and the checkpoint itself.

    Raises:
        InputError: see `load_checkpoint`.
    """
    state = load_checkpoint(checkpoint)
    # only the settings of the network: valid ranges of others may have changed
    settings = state["history"][-1]["config"]
    made_of = ("stage", "model", "network", "cross_norm")
    network = {key: settings[key] for key in made_of if key in settings}
    model = make_model(make_config(network, str(checkpoint)))
    load_weights(model, state["ema"], str(checkpoint))
    return model.eval().to(memory_format=torch.channels_last), state


def load_network(run: str | Path) -> tuple[SCFeat, dict[str, Any]]:
    """A network, in evaluation mode, and its provenance.

    Args:
        run: an installed model's name, a .safetensors file, or a checkpoint or run's folder.

    Raises:
        ModelError, InputError: see `load_model` and `load_checkpoint`.
    """
    if str(run) in available_models() or Path(run).suffix == ".safetensors":
        return load_model(run), read_metadata(find_weights(run))["provenance"]
    model, state = load_trained(run)
    return model, {"stage": state["stage"], "history": state["history"]}


def mean_of(
    loaded: Sequence[tuple[SCFeat, dict[str, Any]]], names: Sequence[str | Path]
) -> tuple[SCFeat, dict[str, Any]]:
    """The mean of the weights of several networks, and its provenance.

    Networks that were trained on from common weights may be better in the mean ("model soups",
    Wortsman et al. 2022). What was fitted to any of them does not fit the mean, and is left out.

    Args:
        loaded: the networks, which are changed, each with its provenance.
        names: of each, for errors.

    Raises:
        InputError: they are of different architectures.
    """
    networks, provenances = zip(*loaded, strict=True)
    states = []
    for name, network in zip(names, networks, strict=True):
        if network.config != networks[0].config:
            raise InputError(
                f"{name}: is a {network.config.name}, {names[0]} a {networks[0].config.name}; only "
                "networks of one architecture have a mean"
            )
        network.projection = network.projection.unfitted()
        network.detector.reliability = network.detector.reliability.unfitted()
        states.append(network.state_dict())
    mean = {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    networks[0].load_state_dict(mean)
    first, *others = (
        {key: made[key] for key in ("stage", "history") if key in made} for made in provenances
    )
    return networks[0], {**first, "mean_with": others}
