"""Sampling and upsampling of feature maps, with one coordinate convention for the whole project.

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
    # created on the device, so that nothing is copied to it
    size = torch.cat([points.new_full((1,), side * stride) for side in (width, height)])
    grid = ((2 * points + 1) / size - 1).to(feature_map.dtype)
    samples = F.grid_sample(
        feature_map, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return samples[..., 0].transpose(1, 2)


def sample_one(feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4) -> torch.Tensor:
    """As `sample` for one image, in fp32: a (C, h, w) map at (N, 2) points -> (N, C)."""
    return sample(feature_map[None].float(), points[None], stride)[0].contiguous()


def sample_smooth(feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4) -> torch.Tensor:
    """As `sample_one`, weighting the surrounding 4x4 cells by a cubic B-spline.

    Args:
        feature_map: (C, h, w) in any precision.
        points: (N, 2) float32.
        stride: image pixels per cell of the map.

    Returns:
        (N, C) float32.
    """
    _, height, width = feature_map.shape
    x, y = ((points + 0.5) / stride - 0.5).unbind(dim=1)
    columns, horizontal = _cells(x, width)
    rows, vertical = _cells(y, height)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    weights = (vertical[:, :, None] * horizontal[:, None, :]).flatten(1)
    cells = feature_map.permute(1, 2, 0).float().contiguous().flatten(0, 1)
    return F.embedding_bag(places, cells, per_sample_weights=weights, mode="sum")


def _cells(position: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 4) cells around each position along an axis, and their weights; the border repeats."""
    cells = position.floor()[:, None] + torch.arange(-1, 3, device=position.device)
    distance = (cells - position[:, None]).abs()
    outer = (2 - distance).clamp_min(0)
    inner = (1 - distance).clamp_min(0)
    weights = (outer**3 - 4 * inner**3) / 6
    return cells.clamp(0, size - 1).long(), weights


def block_means(feature_map: torch.Tensor, side: int) -> torch.Tensor:
    """(C, h, w) -> fp32 means of blocks of `side` x `side` cells; those at the edge are smaller."""
    _, height, width = feature_map.shape
    cells = F.pad(feature_map.permute(1, 2, 0).float(), (0, 0, 0, -width % side, 0, -height % side))
    # summed along each axis: avg_pool2d takes four times as long on channels-last maps
    sums = cells.unflatten(1, (-1, side)).sum(dim=2).unflatten(0, (-1, side)).sum(dim=1)
    rows, columns = (
        (size - torch.arange(0, size, side, device=sums.device)).clamp_max(side)
        for size in (height, width)
    )
    return (sums / (rows[:, None, None] * columns[:, None])).permute(2, 0, 1)


def upsample(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear upsampling of a (B, C, h, w) map by an integer factor."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def convolve_upsampled(conv: nn.Conv2d, x: torch.Tensor, factor: int) -> torch.Tensor:
    """Convolution of a (B, C, h, w) map after upsampling it by an integer factor.

    A convolution with a method `forward_upsampled` does both by itself: training on a CPU adds one.
    """
    if conv.kernel_size == (1, 1):  # they commute, and this order is cheaper
        return upsample(conv(x), factor)
    if factor > 1 and hasattr(conv, "forward_upsampled"):
        return conv.forward_upsampled(x, factor)
    return conv(upsample(x, factor))
