"""Poses of the camera over time, and the share of matches that agree with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from scfeat_ros.camera import Camera

POSE_TYPES = ("geometry_msgs/msg/PoseStamped", "nav_msgs/msg/Odometry")
DEFAULT_TOPIC = "/ground_truth/pose"
RIGHT_WITHIN = 2.0
"""Largest distance of a right match from the true epipolar lines in both images, pixels."""
_REMEMBERED = 1000
_LONGEST_GAP = 200_000_000  # between two poses to interpolate, nanoseconds
_NEAREST = 1_000_000  # a single pose counts for an image this near, nanoseconds


@dataclass(frozen=True)
class Pose:
    """Pose of the camera's optical frame in the world: x_world = R x_camera + position."""

    R: np.ndarray
    position: np.ndarray


class PoseTrack:
    """The latest poses of a topic, for the pose at the time of an image.

    Attributes:
        frame_id: the frame whose poses they are (child_frame_id of Odometry), else "".
    """

    def __init__(self) -> None:
        self.frame_id = ""
        self._poses: deque[tuple[int, np.ndarray, np.ndarray]] = deque(maxlen=_REMEMBERED)

    def add(self, stamp: int, message: Any) -> None:
        """Append a geometry_msgs/PoseStamped or nav_msgs/Odometry.

        A pose is ignored if it is not finite, has a zero quaternion, or is not newer than the last.
        """
        pose = message.pose.pose if hasattr(message.pose, "pose") else message.pose
        self.frame_id = getattr(message, "child_frame_id", "")
        p, q = pose.position, pose.orientation
        position = np.array([p.x, p.y, p.z], np.float64)
        quaternion = np.array([q.x, q.y, q.z, q.w], np.float64)
        norm = np.linalg.norm(quaternion)
        if not np.isfinite(position).all() or not np.isfinite(norm) or norm < 1e-6:
            return
        if self._poses and stamp <= self._poses[-1][0]:
            return
        self._poses.append((stamp, position, quaternion / norm))

    def covers(self, stamp: int) -> bool:
        """Whether there is a pose at or after this time."""
        return bool(self._poses) and self._poses[-1][0] >= stamp

    def at(self, stamp: int) -> Pose | None:
        """The pose at a time, interpolated; None if no pose is near."""
        after = next((i for i, pose in enumerate(self._poses) if pose[0] >= stamp), None)
        if after is None:
            candidates = [self._poses[-1]] if self._poses else []
        elif self._poses[after][0] == stamp or after == 0:
            candidates = [self._poses[after]]
        else:
            (t0, p0, q0), (t1, p1, q1) = self._poses[after - 1], self._poses[after]
            if t1 - t0 <= _LONGEST_GAP:
                weight = (stamp - t0) / (t1 - t0)
                return Pose(rotation_of(_slerp(q0, q1, weight)), (1 - weight) * p0 + weight * p1)
            candidates = [self._poses[after - 1], self._poses[after]]
        for time, position, quaternion in candidates:
            if abs(time - stamp) <= _NEAREST:
                return Pose(rotation_of(quaternion), position)
        return None


def _slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """Unit quaternion on the shorter arc from a to b."""
    cosine = float(a @ b)
    if cosine < 0:
        b, cosine = -b, -cosine
    angle = np.arccos(min(cosine, 1.0))
    if angle < 1e-6:
        return b
    return (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)


def rotation_of(quaternion: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of a unit quaternion x, y, z, w."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def right_matches(
    camera: Camera, first: Pose, second: Pose, bearings1: np.ndarray, bearings2: np.ndarray
) -> np.ndarray | None:
    """Which correspondences lie on each other's true epipolar lines.

    Distances are measured in the distorted images, where the lines are curves: undistorted pixels
    would be larger at the border of a wide image than in its middle. They are first-order
    approximations, accurate up to a few pixels from the line.

    Args:
        camera: of both images.
        first, second: poses of the camera at the two images.
        bearings1, bearings2: (M, 3) undistorted directions with z = 1, see `Camera.bearings`.

    Returns:
        (M,) bool: distance of at most `RIGHT_WITHIN` px in both images; None if the camera has
        not moved, since a pure rotation has no epipolar lines.
    """
    R = second.R.T @ first.R
    t = second.R.T @ (first.position - second.position)
    baseline = np.linalg.norm(t)
    if baseline < 1e-9 * max(1.0, np.linalg.norm(first.position)):
        return None
    x, y, z = t / baseline
    E = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ R
    bearings1, bearings2 = bearings1.astype(np.float64), bearings2.astype(np.float64)
    lines2, lines1 = bearings1 @ E.T, bearings2 @ E
    algebraic = np.abs((bearings2 * lines2).sum(axis=1))
    scale = np.minimum(camera.per_pixel(bearings1, lines1), camera.per_pixel(bearings2, lines2))
    # NaN, where the lens model has no inverse, compares as False
    return algebraic <= RIGHT_WITHIN * scale
