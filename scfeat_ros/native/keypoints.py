"""Selection of keypoints from a score map, in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scfeat_ros.native.library import call, floats

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
    points, values, count = floats(most, 2), floats(most), np.empty(1, np.int64)
    call(
        "select",
        None,
        *(scores, height, width, image, image.strides[0], mask),
        *(options.nms_radius, options.score_threshold, options.border, most, options.subpixel),
        *(points, values, count),
    )
    return points[: count[0]], values[: count[0]]
