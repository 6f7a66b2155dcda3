"""Descriptors of keypoints, in C++."""

from __future__ import annotations

import torch

from scfeat_ros.model.descriptors import Maps, Projection
from scfeat_ros.native.library import call, channels_last, floats


def describe(
    projection: Projection, maps: Maps, points: torch.Tensor, length: int = 0
) -> torch.Tensor:
    """As `Projection.forward`."""
    matrix = projection.matrix[: length or None].contiguous()
    layer2, layer3 = channels_last(maps.layer2[None]), channels_last(maps.layer3[None])
    bridged = channels_last(maps.bridged[None].float())
    sized = (part for x in (bridged, layer2, layer3) for part in (x, *x.shape[2:], x.shape[1]))
    out = floats(len(points), len(matrix))
    call(
        "describe",
        layer2.dtype,
        *sized,
        *(points.contiguous(), len(points), matrix, len(matrix), out),
    )
    return out


def l2_normalize(descriptors: torch.Tensor) -> torch.Tensor:
    """(N, D) fp32 to unit L2 norm (Eq. 22), in place."""
    call("l2_normalize", None, descriptors, *descriptors.shape)
    return descriptors
