"""Measures of matches, poses and homographies. Pure functions of numpy arrays.

Pixel coordinates are x, y with the centre of the top-left pixel at (0, 0); poses are world to
camera, x_cam = R X + t; angles are degrees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from scfeat_training.geometry import (
    fundamental_from_pose,
    rotation_angle,
    symmetric_epipolar_distance,
    transform_points,
)

MMA_THRESHOLDS = tuple(range(1, 11))
"""Pixel thresholds of the matching accuracy (Sec. IV-B)."""


def project_homography(H: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (N, 2) points by a (3, 3) homography; points at infinity become inf."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mapped = transform_points(H, np.asarray(points, np.float64))
    return np.where(np.isfinite(mapped), mapped, np.inf)


def homography_errors(H: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) distances in pixels of the second image between H(first) and second, both (M, 2)."""
    if len(first) == 0:
        return np.zeros(0)
    return np.linalg.norm(project_homography(H, first) - second, axis=1)


def matching_accuracy(errors: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Share of matches whose error is at most each threshold; 0 where there is no match."""
    if len(errors) == 0:
        return np.zeros(len(thresholds))
    return (np.asarray(errors)[None] <= np.asarray(thresholds)[:, None]).mean(axis=1)


def mma_score(mma: Sequence[float]) -> float:
    """MMAScore (Eq. 24): mean of MMA at 1 to 10 px, weighted by 2 - 0.1 * threshold.

    Raises:
        ValueError: not exactly ten values.
    """
    if len(mma) != len(MMA_THRESHOLDS):
        raise ValueError(f"MMAScore needs the MMA at 1, 2, ... 10 px, got {len(mma)} values")
    weights = 2.0 - 0.1 * np.asarray(MMA_THRESHOLDS)
    return float(weights @ np.asarray(mma, np.float64) / weights.sum())


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: which points lie within an image of (width, height)."""
    width, height = size
    x, y = points[:, 0], points[:, 1]
    return (x >= -0.5) & (y >= -0.5) & (x <= width - 0.5) & (y <= height - 0.5)


def repeatability(
    first: np.ndarray,
    second: np.ndarray,
    H: np.ndarray,
    first_size: tuple[int, int],
    second_size: tuple[int, int],
    threshold: float = 3.0,
) -> float:
    """Share of keypoints in the shared region that have a keypoint nearby in the other image.

    A keypoint of either image counts if it maps into the other image; it is repeated if a
    keypoint of the other image lies within `threshold` pixels of where it maps to, which may be one
    for several. That is SuperPoint's definition, but that here a keypoint nearby may lie outside of
    the shared region. 0 where no keypoint is in the shared region.

    Args:
        first, second: (N, 2) and (M, 2) keypoints.
        H: (3, 3) homography from the first image to the second.
        first_size, second_size: (width, height).
        threshold: pixels.
    """
    repeated = shared = 0
    for source, target, matrix, size in (
        (first, second, H, second_size),
        (second, first, np.linalg.inv(H), first_size),
    ):
        mapped = project_homography(matrix, source)
        mapped = mapped[inside(mapped, size)]
        shared += len(mapped)
        if len(mapped) and len(target):
            distances, _ = cKDTree(target).query(mapped, distance_upper_bound=threshold + 1e-9)
            repeated += int((distances <= threshold).sum())
    return repeated / shared if shared else 0.0


def homography_matching_score(
    first: np.ndarray,
    second: np.ndarray,
    indices: np.ndarray,
    H: np.ndarray,
    first_size: tuple[int, int],
    second_size: tuple[int, int],
    threshold: float = 3.0,
) -> float:
    """Correct matches over keypoints in the shared region, mean of both images' shares.

    Args are those of `repeatability`, and `indices` (M, 2), the matches.
    """
    errors = homography_errors(H, first[indices[:, 0]], second[indices[:, 1]])
    correct = int((errors <= threshold).sum())
    counts = (
        inside(project_homography(H, first), second_size).sum(),
        inside(project_homography(np.linalg.inv(H), second), first_size).sum(),
    )
    return float(np.mean([min(correct / n, 1.0) if n else 0.0 for n in counts]))


def corner_error(estimated: np.ndarray | None, H: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance in pixels of the four mapped image corners; inf without an estimate."""
    if estimated is None:
        return float("inf")
    width, height = size
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], float)
    difference = project_homography(estimated, corners) - project_homography(H, corners)
    error = np.linalg.norm(difference, axis=1).mean()
    return float(error) if np.isfinite(error) else float("inf")


def motion_errors(
    K1: np.ndarray,
    K2: np.ndarray,
    R: np.ndarray,
    t: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
) -> np.ndarray:
    """(M,) distances of matches from what the relative pose x2 = R x1 + t allows, pixels.

    From the epipolar lines, the larger of the two images' ones. Without a translation there is no
    epipolar line: then from the rotated point.
    """
    if np.linalg.norm(t) < 1e-9:
        return homography_errors(K2 @ R @ np.linalg.inv(K1), first, second)
    return symmetric_epipolar_distance(fundamental_from_pose(K1, K2, R, t), first, second)


def rotation_error(R: np.ndarray, reference: np.ndarray) -> float:
    """Angle between two rotations, degrees."""
    return float(rotation_angle(R.T @ reference))


def direction_error(t: np.ndarray, reference: np.ndarray) -> float:
    """Angle between two translations up to their sign, degrees (0 to 90).

    The sign is left out as in SuperGlue's evaluation: an essential matrix does not know it.
    """
    angle = np.degrees(np.arctan2(np.linalg.norm(np.cross(t, reference)), abs(t @ reference)))
    return float(angle)


def similarity_transform(
    source: np.ndarray, target: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Least-squares scale, R (3, 3) and t (3,) with target = scale * R source + t (Umeyama 1991).

    Points on a line leave R undetermined around it; what comes out is one of the best.

    Args:
        source, target: (N, 3) corresponding points.
    """
    mean_source, mean_target = source.mean(axis=0), target.mean(axis=0)
    a, b = source - mean_source, target - mean_target
    U, S, Vt = np.linalg.svd(b.T @ a / len(a))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ Vt))])
    R = (U * sign) @ Vt
    scale = float((S * sign).sum() / max((a**2).sum() / len(a), 1e-300))
    return scale, R, mean_target - scale * R @ mean_source


def auc(errors: Sequence[float], thresholds: Sequence[float]) -> list[float]:
    """Area under the recall curve of errors up to each threshold, divided by the threshold.

    The curve runs straight through the points (sorted error k, k / count), as in SuperGlue's
    evaluation; a failure is an error of inf. In [0, 1]; 0 for an empty list.
    """
    errors = np.sort(np.asarray(errors, np.float64))
    if len(errors) == 0:
        return [0.0 for _ in thresholds]
    recall = np.arange(1, len(errors) + 1) / len(errors)
    errors, recall = np.r_[0.0, errors], np.r_[0.0, recall]
    areas = []
    for threshold in thresholds:
        last = int(np.searchsorted(errors, threshold))
        x, y = np.r_[errors[:last], threshold], np.r_[recall[:last], recall[last - 1]]
        areas.append(float(np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2) / threshold))
    return areas


def median_milliseconds(seconds: Sequence[float]) -> float | None:
    """Median of the times that are not NaN, in ms; None where there is none."""
    known = [s for s in seconds if np.isfinite(s)]
    return 1000 * float(np.median(known)) if known else None


def track_lengths(matches: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Lengths, in frames, of the tracks that consecutive matches make.

    Args:
        matches: one (M, 2) array per step: index in frame k, index in frame k + 1.
        counts: keypoints per frame; one more than there are steps.

    Returns:
        (T,) int lengths of all tracks of at least two frames.
    """
    lengths = np.ones(counts[0], int)
    ended = []
    for pairs, count in zip(matches, counts[1:], strict=True):
        following = np.ones(count, int)
        following[pairs[:, 1]] = lengths[pairs[:, 0]] + 1
        lost = np.ones(len(lengths), bool)
        lost[pairs[:, 0]] = False
        ended.append(lengths[lost])
        lengths = following
    ended.append(lengths)
    all_lengths = np.concatenate(ended)
    return all_lengths[all_lengths >= 2]
