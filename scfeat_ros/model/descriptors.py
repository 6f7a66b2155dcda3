"""Descriptors of keypoints out of feature maps: a place and its surroundings, projected.

The paper takes one bilinear sample of the map (Eq. 23). Here the map is sampled at the keypoint and
in its surroundings, at several scales, and a linear map makes a descriptor of that. It is fitted
after the training (`scfeat train project`), and is part of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.model.sampling import block_means, sample_few

SCALES = (1, 4, 8, 16, 32)
"""Sides of the blocks of cells whose means are sampled; each divides the next."""
CONTEXT_SCALES = (1, 4, 8)
"""The same on the map of the small image that shows the context."""
CONTEXT_FACTOR = 4
"""How much smaller that image is."""


def sample_scales(
    feature_map: torch.Tensor, points: torch.Tensor, scales: Sequence[int] = SCALES, stride: int = 4
) -> torch.Tensor:
    """Samples of a map at several scales beside each other.

    Weighted by cubic B-splines: with blocks of side b they reach over 2.3 b px (standard deviation)
    at a stride of 4.

    Args:
        feature_map: (C, h, w).
        points: (N, 2) float32, pixels of the image.
        scales: sides of the blocks of cells, each a divisor of the next.
        stride: image pixels per cell of the map.

    Returns:
        (N, len(scales) * C) float32; the C values of each scale have unit norm.
    """
    parts, side = [], 1
    for scale in scales:
        if scale > side:
            feature_map, side = block_means(feature_map, scale // side), scale
        sampled = sample_few(feature_map, points, side * stride, smooth=True)
        parts.append(F.normalize(sampled, dim=1))
    return torch.cat(parts, dim=1)


class Projection(nn.Module):
    """What makes descriptors of `sample_scales`: buffers, not trained with the network.

    At the start a descriptor is the sum of the map at the keypoint and the mean of its surroundings
    (blocks of 8 cells), with and without context.

    Args:
        dim: channels of the map, and length of a descriptor.

    Attributes:
        surroundings: (D, len(SCALES) * D).
        context: (D, (len(SCALES) + len(CONTEXT_SCALES)) * D), the small image's samples last.
    """

    surroundings: torch.Tensor
    context: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        one, none = torch.eye(dim), torch.zeros(dim, dim)
        parts = [one if scale in (1, 8) else none for scale in SCALES]
        small = [none for _ in CONTEXT_SCALES]
        self.register_buffer("surroundings", torch.cat(parts, dim=1))
        self.register_buffer("context", torch.cat(parts + small, dim=1))

    def forward(self, samples: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """(N, D) descriptors, not normalized, from `sample_scales` of a map and of a small one."""
        if context is None:
            return F.linear(samples, self.surroundings)
        return F.linear(torch.cat([samples, context], dim=1), self.context)
