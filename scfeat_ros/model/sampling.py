"""Between image pixels and feature maps: one coordinate convention for the whole project.

The centre of the top-left pixel of an image is (0, 0). A map at stride s covers the image with
cells of s x s pixels, so image position x lies at (x + 0.5) / s - 0.5 on the map: PyTorch's
`align_corners=False`, used alike for upsampling and sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def sample(feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4) -> torch.Tensor:
    """Bilinear samples of a feature map at image positions (the grid sampling of Eq. 23).

    Args:
        feature_map: (B, C, h, w).
        points: (B, N, 2), x and y in pixels of the image; positions outside take the value of
            the border.
        stride: image pixels per cell of the map.

    Returns:
        (B, N, C)
    """
    height, width = feature_map.shape[-2:]
    size = torch.tensor([width * stride, height * stride], dtype=points.dtype, device=points.device)
    grid = ((2 * points + 1) / size - 1).to(feature_map.dtype)
    samples = F.grid_sample(
        feature_map, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return samples[..., 0].transpose(1, 2)


def sample_few(feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4) -> torch.Tensor:
    """As `sample` for one image, in fp32, converting only the cells around the points.

    Args:
        feature_map: (C, h, w) in any precision.
        points: (N, 2) float32.
        stride: image pixels per cell of the map.

    Returns:
        (N, C) float32.
    """
    _, height, width = feature_map.shape
    cells = feature_map.permute(1, 2, 0).flatten(0, 1)
    x, y = ((points + 0.5) / stride - 0.5).unbind(dim=1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    columns = torch.stack([left, (left + 1).clamp_max(width - 1)])
    rows = torch.stack([top, (top + 1).clamp_max(height - 1)])
    horizontal, vertical = (
        torch.stack([left + 1 - x, x - left]),
        torch.stack([top + 1 - y, y - top]),
    )
    corners = cells[(rows[:, None] * width + columns[None]).long()].float()  # (2, 2, N, C)
    return ((vertical[:, None] * horizontal[None])[..., None] * corners).sum(dim=(0, 1))


def upsample(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear upsampling of a (B, C, h, w) map by a whole factor."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def convolve_upsampled(conv: nn.Conv2d, x: torch.Tensor, factor: int) -> torch.Tensor:
    """Convolution of a (B, C, h, w) map that is upsampled by a whole factor."""
    if conv.kernel_size == (1, 1):  # commutes, and is cheaper before
        return upsample(conv(x), factor)
    return conv(upsample(x, factor))
