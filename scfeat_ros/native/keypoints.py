"""Keypoints out of a score map, and samples of maps there, in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scfeat_ros.native.library import call

if TYPE_CHECKING:
    from scfeat_ros.parameters import ExtractorOptions


def local_maxima(
    scores: torch.Tensor, image: np.ndarray, mask: np.ndarray | None, options: ExtractorOptions
) -> np.ndarray:
    """As `selection.local_maxima`."""
    height, width = scores.shape
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    if mask is not None:
        mask = np.ascontiguousarray(mask)
    places, count = np.empty(height * width, np.int64), np.empty(1, np.int64)
    call(
        "local_maxima",
        None,
        *(scores, height, width),
        *(options.nms_radius, options.score_threshold, options.border),
        *(image, image.strides[0], mask, places, count),
    )
    return places[: count[0]].copy()


def subpixel_points(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(N, 2) x and y of places, moved as by `selection.subpixel_offsets`."""
    points = torch.empty((len(places), 2))
    call("subpixel_points", None, scores, *scores.shape, places, len(places), points)
    return points


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
