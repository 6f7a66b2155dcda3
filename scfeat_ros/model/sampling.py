"""Between image pixels and feature maps: one coordinate convention for the whole project.

The centre of the top-left pixel of an image is (0, 0). A map at stride s covers the image with
cells of s x s pixels, so image position x lies at (x + 0.5) / s - 0.5 on the map: PyTorch's
`align_corners=False`, used alike for upsampling and sampling.
"""

from __future__ import annotations

from collections.abc import Callable

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


def sample_few(
    feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4, smooth: bool = False
) -> torch.Tensor:
    """As `sample` for one image, in fp32, bilinear or smooth.

    Args:
        feature_map: (C, h, w) in any precision.
        points: (N, 2) float32.
        stride: image pixels per cell of the map.
        smooth: weigh the 4x4 cells around a point by a cubic B-spline, in place of bilinear
            weights of 2x2 cells.

    Returns:
        (N, C) float32.
    """
    _, height, width = feature_map.shape
    x, y = ((points + 0.5) / stride - 0.5).unbind(dim=1)
    columns, horizontal = _cells(x, width, smooth)
    rows, vertical = _cells(y, height, smooth)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    weights = (vertical[:, :, None] * horizontal[:, None, :]).flatten(1)
    cells = feature_map.permute(1, 2, 0).float().contiguous().flatten(0, 1)
    return F.embedding_bag(places, cells, per_sample_weights=weights, mode="sum")


def _cells(position: torch.Tensor, size: int, smooth: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 4) cells about each position along an axis, and their weights; the border repeats."""
    cells = position.floor()[:, None] + torch.arange(-1, 3, device=position.device)
    distance = (cells - position[:, None]).abs()
    outer = (2 - distance).clamp_min(0)
    inner = (1 - distance).clamp_min(0)
    weights = (outer**3 - 4 * inner**3) / 6 if smooth else inner
    return cells.clamp(0, size - 1).long(), weights


POOL = 8
"""Side of the blocks of cells whose means `sample_pooled` takes for a point's surroundings."""


def block_means(feature_map: torch.Tensor) -> torch.Tensor:
    """(C, h, w) -> means of blocks of `POOL` x `POOL` cells, those at the edge may be smaller."""
    return F.avg_pool2d(feature_map[None], POOL, ceil_mode=True, count_include_pad=False)[0]


def sample_pooled(
    feature_map: torch.Tensor,
    points: torch.Tensor,
    stride: int = 4,
    sample: Callable[..., torch.Tensor] = sample_few,
    block_means: Callable[[torch.Tensor], torch.Tensor] = block_means,
) -> torch.Tensor:
    """A map close to each point, plus the mean of its surroundings.

    A descriptor that has its surroundings in it is taken less often for another one that looks
    alike, and changes less with the keypoint's place in its cell: more of the matches are right
    than with bilinear samples. Both parts are weighted by cubic B-splines; at a stride of 4 they
    reach over 2.3 and 21 px (standard deviations).

    Args:
        feature_map: (C, h, w).
        points: (N, 2) float32.
        stride: image pixels per cell of the map.
        sample, block_means: the functions of these names here, or others like them.

    Returns:
        (N, C) float32.
    """
    near = sample(feature_map, points, stride, smooth=True)
    return near + sample(block_means(feature_map), points, POOL * stride, smooth=True)


CONTEXT_FACTOR = 4
"""How much smaller the image is that `sample_context` sees the surroundings in."""


def sample_context(
    feature_map: torch.Tensor,
    small_map: torch.Tensor,
    points: torch.Tensor,
    scale: torch.Tensor,
    stride: int = 4,
    sample: Callable[..., torch.Tensor] = sample_few,
    block_means: Callable[[torch.Tensor], torch.Tensor] = block_means,
) -> torch.Tensor:
    """A map close to each point and, beside it, the point's surroundings.

    These are the mean that `sample_pooled` adds, plus the network's map of the small image, in
    which a cell sees more of the scene. Inner products of such descriptors are means of two: the
    places look alike, and so do their surroundings.

    Args:
        feature_map: (C, h, w).
        small_map: (C, h', w'), of the image at a `CONTEXT_FACTOR`-th of its size.
        points: (N, 2) float32.
        scale: (2,) width and height of the small image by those of the image.
        stride, sample, block_means: as for `sample_pooled`.

    Returns:
        (N, 2 C) float32; each half has unit norm.
    """
    near = sample(feature_map, points, stride, smooth=True)
    around = sample(block_means(feature_map), points, POOL * stride, smooth=True)
    around = around + sample(small_map, (points + 0.5) * scale - 0.5, stride, smooth=True)
    return torch.cat([F.normalize(near, dim=1), F.normalize(around, dim=1)], dim=1)


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
