"""Shared coupling-bridge: cross normalization over channels and over space (Sec. III-B)."""

from __future__ import annotations

import torch
from torch import nn

EPSILON = 1e-5


class CrossNorm(nn.Module):
    """F_cn = w_s * S(D) + w_c * C(D) (Eq. 2-3).

    S standardizes every position over its channels, then scales and shifts it by two maps that
    7x7 convolutions compute from the channel mean. C standardizes every channel over the image,
    then scales and shifts it by learned numbers. The two weights are divided by their sum.

    Args:
        channels: channels of the descriptor map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial_scale = nn.Conv2d(1, 1, 7, padding=3)
        self.spatial_shift = nn.Conv2d(1, 1, 7, padding=3)
        self.channel_scale = nn.Parameter(torch.ones(channels))
        self.channel_shift = nn.Parameter(torch.zeros(channels))
        self.weights = nn.Parameter(torch.tensor([0.7, 0.3]))
        # start as a plain standardization: scale 1, shift 0 everywhere
        nn.init.zeros_(self.spatial_scale.weight)
        nn.init.ones_(self.spatial_scale.bias)
        nn.init.zeros_(self.spatial_shift.weight)
        nn.init.zeros_(self.spatial_shift.bias)

    def forward(self, descriptors: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) descriptor map D -> F_cn of the same shape."""
        mean = descriptors.mean(dim=1, keepdim=True)
        centred = descriptors - mean
        variance = centred.square().mean(dim=1, keepdim=True)
        spatial = centred * (variance + EPSILON).rsqrt()
        spatial = spatial * self.spatial_scale(mean) + self.spatial_shift(mean)
        # a group per channel is instance normalization, which PyTorch does not do channels-last
        channel = nn.functional.group_norm(
            descriptors, len(self.channel_scale), self.channel_scale, self.channel_shift, EPSILON
        )
        w_s, w_c = self.weights / self.weights.sum()
        return w_s * spatial + w_c * channel
