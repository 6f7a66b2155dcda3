"""What differs between the stages of the training: data, trained parts, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from scfeat_ros.errors import InputError
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.config import TrainConfig
from scfeat_training.correspondences import CorrespondencePairs, MixedPairs
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    PosedPairs,
    PosedPairsConfig,
    Scene,
    photo_paths,
)
from scfeat_training.sampling_order import uniform
from scfeat_training.warmup_loss import WarmupOptions, warmup_loss

T = TypeVar("T")
Batch = dict[str, Any]
Terms = dict[str, torch.Tensor]


def options_of(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass of options from a section of the configuration; lists become tuples.

    Raises:
        InputError: an unknown field.
    """
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f"config section '{where}': unknown field '{key}'; known: {known}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Stage:
    """Base of the stages.

    Attributes:
        network: the part of the model that this stage runs forward, as one module, so that
            DistributedDataParallel and torch.compile can wrap it.
    """

    network: nn.Module

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        self.config = config
        self.model = model

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters with their peak learning rate; all others are frozen here."""
        raise NotImplementedError

    def dataset(self, scenes: Sequence[Scene], skip_bad: bool) -> Dataset:
        """Pairs of the training scenes."""
        raise NotImplementedError

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        """Loss (B,) of each pair and mean terms for the log; `network` is `network`, wrapped."""
        raise NotImplementedError

    def pictures(self, model: SCFeat, batch: Batch) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) uint8 for TensorBoard of the first pair of a batch."""
        return {}


def images_of(batch: Batch) -> torch.Tensor:
    """Both images of every pair, (2 B, 3, H, W) in [0, 1]: first all image1, then all image2."""
    images = torch.cat([batch["image1"], batch["image2"]]).float().div(255)
    return images.contiguous(memory_format=torch.channels_last)


class Describe(nn.Module):
    """Images -> D_desc and F_cn."""

    def __init__(self, model: SCFeat) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        description = self.model.describe(images)
        return description.descriptors, description.bridged


def description_groups(config: TrainConfig, model: SCFeat) -> list[dict[str, Any]]:
    """Backbone and bridge trained, the detector frozen; the encoder at a rate of its own."""
    model.requires_grad_(False)
    encoder = model.backbone.encoder
    for part in (model.backbone, model.bridge):
        part.requires_grad_(True)
    if config.freeze_stem:
        encoder.conv1.requires_grad_(False)
        encoder.bn1.requires_grad_(False)
    in_encoder = {id(p) for p in encoder.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in in_encoder], "peak": config.lr_encoder},
        {"params": [p for p in trained if id(p) not in in_encoder], "peak": config.lr},
    ]


def size_of(config: TrainConfig) -> tuple[int, int]:
    return int(config.size[0]), int(config.size[1])


def posed_pairs(
    config: TrainConfig, scenes: Sequence[Scene], skip_bad: bool, **more: Any
) -> PosedPairs:
    """Pairs of posed scenes as the configuration says."""
    values = {"size": list(config.size), "seed": config.seed, **more, **config.posed}
    return PosedPairs(scenes, options_of(PosedPairsConfig, values, "posed"), skip_bad=skip_bad)


def homography_pairs(
    config: TrainConfig, scenes: Sequence[Scene], skip_bad: bool
) -> HomographyPairs:
    """Pairs of views of single photos as the configuration says."""
    values = {"size": list(config.size), "seed": config.seed, **config.homography}
    options = options_of(HomographyPairsConfig, values, "homography")
    return HomographyPairs(photo_paths(scenes), options, skip_bad=skip_bad)


class WarmupStage(Stage):
    """Stage 0: descriptors before and after the bridge, from known correspondences."""

    POINTS = 700

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        self.options = options_of(WarmupOptions, config.loss, "loss")
        self.network = Describe(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return description_groups(self.config, self.model)

    def dataset(self, scenes: Sequence[Scene], skip_bad: bool) -> Dataset:
        homographies = homography_pairs(self.config, scenes, skip_bad)
        pairs = CorrespondencePairs(homographies, self.POINTS)
        if not self.config.posed_share:
            return pairs
        tracked = [scene for scene in scenes if scene.tracks is not None]
        posed = posed_pairs(self.config, tracked, skip_bad, tracks=self.POINTS // 2)
        posed.images = homographies.images
        return MixedPairs(pairs, CorrespondencePairs(posed, self.POINTS), self.config.posed_share)

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        before, after = network(images_of(batch))
        points1, points2, valid = batch["points1"], batch["points2"], batch["valid"]
        noise = uniform(self.config.seed, batch["index"], (points1.shape[1], 4)).to(points1)
        total, terms = 0.0, {}
        weights = {"backbone": 1.0, "bridged": self.options.bridged_weight}
        for (name, weight), maps in zip(weights.items(), (before, after), strict=True):
            if weight == 0:
                continue
            loss, parts = warmup_loss(
                *maps.float().chunk(2), points1, points2, valid, noise, self.options
            )
            total = total + weight * loss
            terms |= {f"{name}/{key}": value for key, value in parts.items()}
        return total, terms


STAGE_CLASSES: dict[str, type[Stage]] = {"warmup": WarmupStage}
