"""Distillation: a smaller network (student) learns the maps of a trained larger one (teacher).

The student has fewer channels inside of the encoder's blocks. It is initialized with the teacher's
most important channels, and learns to reproduce its maps, with a loss at every layer of the encoder
(FitNets, Romero et al. 2015). This needs neither poses nor correspondences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scfeat_ros.errors import InputError
from scfeat_ros.model.resnet import BasicBlock
from scfeat_ros.model.scfeat import SCFeat


@dataclass
class DistillationOptions:
    """Weights of the loss's terms, relative to that of F_cn.

    Attributes:
        layers: of each of the encoder's layers.
        scores: of the scores' divergence; with 0 the detector is not trained, and a step takes two
            thirds of the time.
    """

    layers: float = 0.4
    scores: float = 0.0


def unexplained(maps: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of the target's variance that maps leave unexplained.

    Args:
        maps, target: (B, C, H, W).

    Returns:
        (B,): squared differences over the squared deviations from each channel's mean over the
        batch, each with its mean over channels and places; 0 for equal maps, 1 for the mean alone.
    """
    deviation = target - target.mean(dim=(0, 2, 3), keepdim=True)
    variance = deviation.square().mean().clamp_min(1e-12)
    return (maps - target).square().mean(dim=(1, 2, 3)) / variance


def start_from(teacher: SCFeat, student: SCFeat) -> None:
    """Initialize a student with the weights of a teacher with more inner channels; in place.

    A block keeps the inner channels with the largest product of the norms of the kernels that write
    and read them.

    Raises:
        InputError: the networks differ in anything else.
    """
    theirs, own = teacher.state_dict(), student.state_dict()
    if theirs["projection.matrix"].shape[1] == own["projection.matrix"].shape[1]:
        own["projection.matrix"] = theirs["projection.matrix"]  # of any length
    blocks = dict(teacher.named_modules())
    for name, block in student.named_modules():
        if isinstance(block, BasicBlock) and isinstance(blocks.get(name), BasicBlock):
            kept = _strongest(blocks[name], block.conv1.out_channels)
            for key in own:
                if key.startswith((f"{name}.conv1.", f"{name}.bn1.")) and theirs[key].ndim:
                    theirs[key] = theirs[key][kept]
                elif key.startswith(f"{name}.conv2."):
                    theirs[key] = theirs[key][:, kept]
    for key, value in own.items():
        if key not in theirs or theirs[key].shape != value.shape:
            raise InputError(
                f"distillation: the network to learn from differs in '{key}', not only in the "
                "channels inside of the encoder's blocks"
            )
    student.load_state_dict({key: theirs[key] for key in own})


def _strongest(block: BasicBlock, count: int) -> torch.Tensor:
    """Indices of the most important inner channels."""
    written = fuse_conv_bn_eval(block.conv1, block.bn1).weight.flatten(1).norm(dim=1)
    read = block.conv2.weight.transpose(0, 1).flatten(1).norm(dim=1)
    kept = (written * read).topk(min(count, len(written))).indices
    return kept.sort().values


class Distill(nn.Module):
    """Images -> maps and scores of student and teacher; only the student's have gradients.

    Args:
        model: the student.
        teacher: the teacher.
        scores: whether to compute scores.
    """

    def __init__(self, model: SCFeat, teacher: SCFeat, scores: bool) -> None:
        super().__init__()
        self.model, self.scores = model, scores
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(
        self, images: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """For each network: F_cn ("bridged"), "layer1", "layer2", "layer3", and maybe "scores"."""
        with torch.no_grad():
            target = self._maps(self.teacher, images)
        return self._maps(self.model, images), target

    def _maps(self, network: SCFeat, images: torch.Tensor) -> dict[str, torch.Tensor]:
        description = network.describe(images)
        maps = {"bridged": description.bridged, **description.encoded._asdict()}
        del maps["stem"]
        if self.scores:
            maps["scores"] = network.detect(images, description)
        return maps
