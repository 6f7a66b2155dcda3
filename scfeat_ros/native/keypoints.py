"""Keypoints out of a score map, and samples of maps there, in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scfeat_ros.native.library import call

if TYPE_CHECKING:
    from scfeat_ros.parameters import ExtractorOptions


def select(
    scores: torch.Tensor, image: np.ndarray, mask: np.ndarray | None, options: ExtractorOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and scores, as by `selection.on_cpu`."""
    height, width = scores.shape
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    if mask is not None:
        mask = np.ascontiguousarray(mask)
    most = min(options.max_keypoints, height * width)
    points, values, count = torch.empty(most, 2), torch.empty(most), np.empty(1, np.int64)
    call(
        "select",
        None,
        *(scores, height, width, image, image.strides[0], mask),
        *(options.nms_radius, options.score_threshold, options.border, most, options.subpixel),
        *(points, values, count),
    )
    return points[: count[0]], values[: count[0]]


def sample(
    feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4, smooth: bool = False
) -> torch.Tensor:
    """As `sampling.sample_few`."""
    feature_map, pitch = _pixels(feature_map)
    channels, height, width = feature_map.shape
    out = torch.empty((len(points), channels))
    call(
        "sample",
        feature_map.dtype,
        *(feature_map, height, width, channels, pitch),
        *(points.contiguous(), len(points), stride, smooth, out),
    )
    return out


def _pixels(feature_map: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A (C, h, w) map whose channels lie beside each other, and how far apart its pixels lie."""
    channels, _, width = feature_map.shape
    pitch = feature_map.stride(2)
    if feature_map.stride() == (1, pitch * width, pitch):
        return feature_map, pitch
    return feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1), channels
