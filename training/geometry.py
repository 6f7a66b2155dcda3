"""Projective geometry of two pinhole views.

Every function takes numpy arrays or torch tensors (one kind per call) with any leading batch
dimensions, and computes in the input's dtype. Pixel centres are at integer coordinates; cameras
look along +z with x right and y down (OpenCV); a world-to-camera pose maps x_cam = R X + t, and
a relative pose maps x2 = R x1 + t.
"""

from __future__ import annotations

from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def _module(array: Array) -> ModuleType:
    return torch if isinstance(array, torch.Tensor) else np


def homogeneous(points: Array) -> Array:
    """Append a coordinate of 1: (..., D) to (..., D + 1)."""
    xp = _module(points)
    return xp.concatenate([points, xp.ones_like(points[..., :1])], -1)


def transform_points(H: Array, points: Array) -> Array:
    """Apply homographies (or affinities) H (..., 3, 3) to points (..., N, 2)."""
    mapped = homogeneous(points) @ H.swapaxes(-1, -2)
    return mapped[..., :2] / mapped[..., 2:]


def intrinsic_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """K (3, 3) float64 of a pinhole camera, pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def pixel_affinity(
    scale_x: float, scale_y: float, offset_x: float = 0, offset_y: float = 0
) -> np.ndarray:
    """The map of pixel coordinates under "crop, then resize", as a (3, 3) float64 matrix.

    The crop's top-left pixel is (offset_x, offset_y) of the source; the crop is then resized by
    the factors scale_x and scale_y in the align_corners=False sense (pixel areas scale, pixel
    centres at integers). Left-multiply it to K to get the intrinsics of the result.
    """
    return np.array(
        [
            [scale_x, 0.0, scale_x * (0.5 - offset_x) - 0.5],
            [0.0, scale_y, scale_y * (0.5 - offset_y) - 0.5],
            [0.0, 0.0, 1.0],
        ]
    )


def relative_pose(R1: Array, t1: Array, R2: Array, t2: Array) -> tuple[Array, Array]:
    """The pose (R, t) with x2 = R x1 + t, from two world-to-camera poses.

    R1, R2: (..., 3, 3); t1, t2: (..., 3).
    """
    R = R2 @ R1.swapaxes(-1, -2)
    t = t2 - (R @ t1[..., None])[..., 0]
    return R, t


def rotation_angle(R: Array) -> Array:
    """Rotation angle of R (..., 3, 3) in degrees, accurate for small angles too."""
    xp = _module(R)
    axis = xp.stack(
        [
            R[..., 2, 1] - R[..., 1, 2],
            R[..., 0, 2] - R[..., 2, 0],
            R[..., 1, 0] - R[..., 0, 1],
        ],
        -1,
    )
    sine = (axis * axis).sum(-1) ** 0.5
    cosine = R[..., 0, 0] + R[..., 1, 1] + R[..., 2, 2] - 1
    return xp.rad2deg(xp.arctan2(sine, cosine))


def skew(v: Array) -> Array:
    """The matrix (..., 3, 3) of the cross product with v (..., 3)."""
    xp = _module(v)
    x, y, z = v[..., 0], v[..., 1], v[..., 2]
    zero = xp.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    return xp.stack(rows, -1).reshape(*v.shape[:-1], 3, 3)


def fundamental_from_pose(K1: Array, K2: Array, R: Array, t: Array) -> Array:
    """F (..., 3, 3) of unit Frobenius norm with x2^T F x1 = 0 for pixels x1, x2.

    F = K2^-T [t]x R K1^-1. A pure rotation (t = 0) has no F and gives NaN. Compute it in
    float64: focal lengths enter squared.
    """
    xp = _module(K1)
    E = skew(t) @ R
    F = xp.linalg.inv(K2).swapaxes(-1, -2) @ E @ xp.linalg.inv(K1)
    return F / (F * F).sum((-2, -1))[..., None, None] ** 0.5


def epipolar_lines(F: Array, points: Array) -> Array:
    """Lines (..., N, 3) in image 2 of points (..., N, 2) in image 1, scaled to a^2 + b^2 = 1.

    With that scale a x + b y + c is the signed distance in pixels. For the lines in image 1 of
    points in image 2 give F transposed.
    """
    lines = homogeneous(points) @ F.swapaxes(-1, -2)
    norm = (lines[..., :2] * lines[..., :2]).sum(-1)[..., None] ** 0.5
    return lines / norm.clip(1e-12)


def epipolar_distance(F: Array, points1: Array, points2: Array) -> Array:
    """Distance (..., N) in pixels of points2 (..., N, 2) from the epipolar lines of points1."""
    return abs((epipolar_lines(F, points1) * homogeneous(points2)).sum(-1))


def symmetric_epipolar_distance(F: Array, points1: Array, points2: Array) -> Array:
    """The larger (..., N) of the distances of both points from each other's lines, pixels."""
    forward = epipolar_distance(F, points1, points2)
    back = epipolar_distance(F.swapaxes(-1, -2), points2, points1)
    return _module(F).maximum(forward, back)


def lines_hit_image(lines: Array, width: int, height: int) -> Array:
    """Whether each line (..., N, 3) crosses the image of the given size, (..., N) bool."""
    a, b, c = lines[..., 0], lines[..., 1], lines[..., 2]
    right, bottom = width - 0.5, height - 0.5
    # The line crosses the rectangle unless all four corners lie on one side of it.
    corners = [(-0.5, -0.5), (right, -0.5), (-0.5, bottom), (right, bottom)]
    signs = [a * x + b * y + c > 0 for x, y in corners]
    some = signs[0] | signs[1] | signs[2] | signs[3]
    every = signs[0] & signs[1] & signs[2] & signs[3]
    return some & ~every


def project(K: Array, R: Array, t: Array, points: Array) -> tuple[Array, Array]:
    """Pixels (..., N, 2) and depths (..., N) of points (..., N, 3) seen by K, R, t.

    Where the depth is not positive the pixel has no meaning.
    """
    camera = points @ R.swapaxes(-1, -2) + t[..., None, :]
    image = camera @ K.swapaxes(-1, -2)
    return image[..., :2] / image[..., 2:], camera[..., 2]


def back_project(K: Array, pixels: Array, depth: Array) -> Array:
    """Points (..., N, 3) in the camera's frame at pixels (..., N, 2) and depths z (..., N)."""
    xp = _module(K)
    rays = homogeneous(pixels) @ xp.linalg.inv(K).swapaxes(-1, -2)
    return rays * depth[..., None]


def eight_point(points1: torch.Tensor, points2: torch.Tensor) -> torch.Tensor:
    """Fundamental matrices by the normalized eight-point algorithm (Hartley and Zisserman 11.2).

    Args:
        points1, points2: (..., N, 2) corresponding points, N >= 8; computed in float64.

    Returns:
        (..., 3, 3) float64 of rank 2 and unit Frobenius norm with x2^T F x1 = 0 in the least
        squares sense. Points in a degenerate position (all on one line, say) give some matrix.

    Raises:
        ValueError: fewer than eight points, or shapes that differ.
    """
    if points1.shape != points2.shape or points1.shape[-2] < 8:
        raise ValueError(
            f"eight_point wants the same N >= 8 points twice, got {tuple(points1.shape)} and "
            f"{tuple(points2.shape)}"
        )
    T1, normal1 = _hartley(points1.double())
    T2, normal2 = _hartley(points2.double())
    # x2^T F x1 = 0 is linear in F: one row x2 (outer) x1 for each correspondence
    rows = homogeneous(normal2)[..., :, None] * homogeneous(normal1)[..., None, :]
    _, _, Vh = torch.linalg.svd(rows.flatten(-2), full_matrices=True)
    F = Vh[..., -1, :].unflatten(-1, (3, 3))
    U, S, Vh = torch.linalg.svd(F)
    rank_two = torch.cat([S[..., :2], torch.zeros_like(S[..., :1])], -1)
    F = T2.mT @ (U * rank_two[..., None, :] @ Vh) @ T1
    return F / F.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-300)


def _hartley(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """T (..., 3, 3), and points (..., N, 2) mapped by it: mean 0, mean distance sqrt(2)."""
    mean = points.mean(-2)
    distance = (points - mean[..., None, :]).norm(dim=-1).mean(-1)
    scale = 2**0.5 / distance.clamp_min(1e-12)
    T = torch.zeros(*points.shape[:-2], 3, 3, dtype=points.dtype, device=points.device)
    T[..., 0, 0] = T[..., 1, 1] = scale
    T[..., :2, 2] = -scale[..., None] * mean
    T[..., 2, 2] = 1
    return T, (points - mean[..., None, :]) * scale[..., None, None]


def fundamental_error(F1: torch.Tensor, F2: torch.Tensor) -> torch.Tensor:
    """Smooth L1 distance (...) of fundamental matrices (..., 3, 3) up to scale and sign (Eq. 19).

    Both are brought to unit Frobenius norm and the same sign first: a fundamental matrix has no
    scale. The nine terms are summed, so that the result lies between 0 and 1. The matrices should
    belong to coordinates of about unit size (pixels divided by the image's size): in pixels the
    last entries outweigh all others.
    """
    F1 = F1 / F1.flatten(-2).norm(dim=-1)[..., None, None]
    F2 = F2 / F2.flatten(-2).norm(dim=-1)[..., None, None]
    agree = (F1 * F2).sum((-2, -1))[..., None, None]
    aligned = torch.where(agree < 0, -F2, F2)
    loss = torch.nn.functional.smooth_l1_loss
    return loss(F1, aligned.expand_as(F1), reduction="none").sum((-2, -1))
