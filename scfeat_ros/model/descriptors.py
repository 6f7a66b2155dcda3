"""Descriptors of keypoints from feature maps: samples of the map and its surroundings, projected.

The paper takes one bilinear sample of the map (Eq. 23). Here the map is sampled at the keypoint,
and so are means over blocks of increasing size, of this map and of two of the encoder's; a linear
projection of these samples is the descriptor. It is fitted after the training (`scfeat train fit`),
and is part of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.model.sampling import block_means, sample_smooth

BLOCKS = (4, 8, 16)
"""Sides, in cells, of the blocks of F_cn whose means describe a keypoint's surroundings."""
ENCODER_BLOCK = 8
"""The same for the encoder's layer2 and layer3."""
START_BLOCK = 8
"""Side of the blocks that an unfitted projection uses."""


class Maps(NamedTuple):
    """The feature maps from which descriptors of one image are made."""

    bridged: torch.Tensor
    """(D, H/4, W/4): F_cn."""
    layer2: torch.Tensor
    """(C2, H/8, W/8): of the encoder."""
    layer3: torch.Tensor
    """(C3, H/16, W/16)"""


class Projection(nn.Module):
    """Makes descriptors; its matrix is a buffer, which is not trained with the network.

    Unfitted, a descriptor is F_cn at the keypoint plus the mean of its surroundings. Fitted, it may
    have another length; its first values are the most discriminative.

    Args:
        dim: channels of F_cn, and length of an unfitted descriptor.
        layer2, layer3: channels of the encoder's maps.

    Attributes:
        matrix: (D, S) matrix from samples to descriptors. The samples are F_cn at the keypoint, its
            means over `BLOCKS`, and those of layer2 and layer3 over blocks of `ENCODER_BLOCK`
            cells, each of unit norm. A state dict may have another D.
    """

    matrix: torch.Tensor

    def __init__(self, dim: int, layer2: int, layer3: int) -> None:
        super().__init__()
        self.channels = [dim] * (1 + len(BLOCKS)) + [layer2, layer3]
        matrix = torch.zeros(dim, sum(self.channels), dtype=torch.float32)
        for part in (0, 1 + BLOCKS.index(START_BLOCK)):
            matrix[:, part * dim : (part + 1) * dim] = torch.eye(dim)
        self.register_buffer("matrix", matrix)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: object) -> None:
        given = state_dict.get(f"{prefix}matrix")
        if given is not None:
            self.matrix = self.matrix.new_zeros(len(given), self.matrix.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def unfitted(self) -> Projection:
        """An unfitted projection of the same sizes, on the same device."""
        dim, *_, layer2, layer3 = self.channels
        with self.matrix.device:
            return Projection(dim, layer2, layer3)

    def forward(
        self,
        maps: Maps,
        points: torch.Tensor,
        length: int = 0,
    ) -> torch.Tensor:
        """Descriptors, not normalized.

        Samples are weighted by cubic B-splines: at the keypoint they reach over 2.3 px (standard
        deviation), with blocks of side b over 2.3 b px, and twice and four times as far on layer2
        and layer3.

        Args:
            maps: of the image.
            points: (N, 2) float32, pixels of the image.
            length: number of values of a descriptor, the first ones; 0 for all.

        Returns:
            (N, D) float32, or (N, length).
        """
        matrix = self.matrix[: length or None]
        at_keypoint, *parts = matrix.split(self.channels, dim=1)
        near = F.normalize(sample_smooth(maps.bridged, points), dim=1)
        descriptors = F.linear(near, at_keypoint)
        for (means, stride), part in zip(_surroundings(maps), parts, strict=True):
            # projected before sampling: there are fewer cells than keypoints
            cells = F.linear(F.normalize(means.permute(1, 2, 0), dim=2), part)
            descriptors += sample_smooth(cells.permute(2, 0, 1), points, stride)
        return descriptors


def _surroundings(maps: Maps) -> list[tuple[torch.Tensor, int]]:
    """(C, h, w) means of blocks of cells, and image pixels per block."""
    levels, means, side = [], maps.bridged, 1
    for block in BLOCKS:  # each divides the next
        means, side = block_means(means, block // side), block
        levels.append((means, 4 * block))
    for layer, stride in ((maps.layer2, 8), (maps.layer3, 16)):
        levels.append((block_means(layer, ENCODER_BLOCK), stride * ENCODER_BLOCK))
    return levels
