"""Robust estimation of homographies and relative poses from matches, repeatable by a fixed seed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

import cv2
import numpy as np

from scfeat_ros.errors import InputError
from scfeat_training.geometry import transform_points

CONFIDENCE = 0.99999
MAX_ITERATIONS = 10_000

RelativePose = tuple[np.ndarray, np.ndarray, np.ndarray]
"""R (3, 3), t (3,) of unit length with x_2 = R x_1 + t, and the (M,) bool inlier mask."""


def magsac_parameters(threshold: float) -> cv2.UsacParams:
    """Settings of OpenCV's USAC_MAGSAC with a fixed seed; threshold in units of the points."""
    parameters = cv2.UsacParams()
    parameters.randomGeneratorState = 0
    parameters.confidence = CONFIDENCE
    parameters.maxIterations = MAX_ITERATIONS
    parameters.threshold = threshold
    parameters.score = cv2.SCORE_METHOD_MAGSAC
    parameters.sampler = cv2.SAMPLING_UNIFORM
    parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    parameters.loIterations = 10
    parameters.loSampleSize = 50
    return parameters


def estimate_homography(
    first: np.ndarray, second: np.ndarray, threshold: float = 3.0
) -> np.ndarray | None:
    """(3, 3) homography from (M, 2) matches by USAC_MAGSAC, None where there is none."""
    if len(first) < 4:
        return None
    try:
        H, _ = cv2.findHomography(
            np.ascontiguousarray(first, np.float64),
            np.ascontiguousarray(second, np.float64),
            magsac_parameters(threshold),
        )
    except cv2.error:  # degenerate points
        return None
    return H if H is not None and H.shape == (3, 3) and np.isfinite(H).all() else None


def normalize_points(K: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(M, 2) pixels -> image plane at z = 1."""
    return transform_points(np.linalg.inv(K), points.astype(np.float64))


def estimate_pose_magsac(
    first: np.ndarray, second: np.ndarray, K1: np.ndarray, K2: np.ndarray, threshold: float
) -> RelativePose | None:
    """Relative pose by OpenCV: essential matrix (USAC_MAGSAC) and `recoverPose`.

    Args:
        first, second: (M, 2) matched pixels.
        K1, K2: (3, 3) intrinsics.
        threshold: pixels.

    Returns:
        None with fewer than 5 matches or where no pose fits.
    """
    if len(first) < 5:
        return None
    undistorted = np.zeros(4)
    try:
        E, mask = cv2.findEssentialMat(
            np.ascontiguousarray(first, np.float64),
            np.ascontiguousarray(second, np.float64),
            np.asarray(K1, np.float64),
            np.asarray(K2, np.float64),
            undistorted,
            undistorted,
            magsac_parameters(threshold),
        )
    except cv2.error:
        return None
    return _decompose(E, mask, normalize_points(K1, first), normalize_points(K2, second))


def estimate_pose_magsac_1000(
    first: np.ndarray, second: np.ndarray, K1: np.ndarray, K2: np.ndarray, threshold: float
) -> RelativePose | None:
    """OpenCV's call as most scripts make it: normalized points, at most 1,000 iterations.

    It finds fewer poses than `estimate_pose_magsac`; it is here because many published tables were
    made this way.
    """
    if len(first) < 5:
        return None
    n1, n2 = normalize_points(K1, first), normalize_points(K2, second)
    focal = np.mean([K1[0, 0], K1[1, 1], K2[0, 0], K2[1, 1]])
    try:
        E, mask = cv2.findEssentialMat(
            n1,
            n2,
            np.eye(3),
            method=cv2.USAC_MAGSAC,
            prob=CONFIDENCE,
            threshold=threshold / focal,
            maxIters=1000,
        )
    except cv2.error:
        return None
    return _decompose(E, mask, n1, n2)


def _decompose(
    E: np.ndarray | None, mask: np.ndarray, n1: np.ndarray, n2: np.ndarray
) -> RelativePose | None:
    """The one of an essential matrix's poses that has the points in front of both cameras."""
    if E is None or E.shape[1] != 3 or not np.isfinite(E).all():
        return None
    best = None
    inliers = mask.ravel().astype(bool)
    for candidate in np.split(E, len(E) // 3):
        count, R, t, _ = cv2.recoverPose(candidate, n1, n2, np.eye(3), mask=mask.copy())
        if best is None or count > best[0]:
            best = count, R, t.ravel()
    if best is None or not best[0]:
        return None
    return best[1], best[2], inliers


def estimate_pose_poselib(
    first: np.ndarray, second: np.ndarray, K1: np.ndarray, K2: np.ndarray, threshold: float
) -> RelativePose | None:
    """Relative pose by PoseLib (LO-RANSAC with bundle adjustment); see `estimate_pose_magsac`.

    Raises:
        ImportError: poselib is not installed.
    """
    import poselib

    if len(first) < 5:
        return None
    cameras = [
        {
            "model": "PINHOLE",
            "width": 0,
            "height": 0,
            "params": [K[0, 0], K[1, 1], K[0, 2], K[1, 2]],
        }
        for K in (K1, K2)
    ]
    pose, info = poselib.estimate_relative_pose(
        first.astype(np.float64),
        second.astype(np.float64),
        *cameras,
        {
            "max_epipolar_error": threshold,
            "success_prob": CONFIDENCE,
            "max_iterations": MAX_ITERATIONS,
            "seed": 0,
        },
        {},
    )
    inliers = np.asarray(info["inliers"], bool)
    t = np.asarray(pose.t)
    length = np.linalg.norm(t)  # the refinement lets it drift from 1
    if inliers.sum() < 5 or not 0 < length < np.inf:
        return None
    return np.asarray(pose.R), t / length, inliers


POSE_ESTIMATORS = {
    "magsac": estimate_pose_magsac,
    "magsac-1000": estimate_pose_magsac_1000,
    "poselib": estimate_pose_poselib,
}
"""By the names that the commands take."""


def poselib_version() -> str | None:
    """Part of the cache's keys, as the version of OpenCV is; None where it is not installed."""
    if importlib.util.find_spec("poselib") is None:
        return None
    return importlib.metadata.version("poselib")


def check_estimators(names: Sequence[str], flag: str) -> None:
    """Refuse what is unknown or not installed.

    Args:
        names: keys of `POSE_ESTIMATORS`.
        flag: of the command line, for the message.

    Raises:
        InputError: names the flag and the remedy.
    """
    if not names:
        raise InputError(f"{flag} is empty; choose from {', '.join(POSE_ESTIMATORS)}")
    unknown = sorted(set(names) - set(POSE_ESTIMATORS))
    if unknown:
        raise InputError(f"{flag} {unknown[0]}: unknown; choose from {', '.join(POSE_ESTIMATORS)}")
    if "poselib" in names and importlib.util.find_spec("poselib") is None:
        raise InputError(f"poselib is not installed: pip install poselib, or use {flag} magsac")
