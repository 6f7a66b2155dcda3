"""Tracks in the format that the back ends of VINS-Mono and VINS-Fusion read."""

from __future__ import annotations

import numpy as np
from geometry_msgs.msg import Point32
from sensor_msgs.msg import ChannelFloat32, PointCloud
from std_msgs.msg import Header

from scfeat_ros.features import FrameResult

ID_LIMIT = 2**24
"""Ids are sent as float32, which is exact up to here; they wrap around."""

CHANNELS = {
    "vins_mono": ("id", "u", "v", "velocity_x", "velocity_y"),
    # VINS-Fusion reads the last three (ground truth, for simulation) whenever it reads any
    "vins_fusion": ("id", "camera", "u", "v", "velocity_x", "velocity_y", "gx", "gy", "gz"),
}
"""Channels by consumer; the back ends identify them by position, not by name."""


def select_tracks(
    result: FrameResult, bearings: np.ndarray, limit: int, min_distance: float
) -> np.ndarray:
    """Indices of the keypoints to publish: longest tracks first, spread over the image.

    Args:
        result: N keypoints.
        bearings: (N, 3); keypoints without a bearing are left out.
        limit: most points.
        min_distance: at most one point in each square of this side, pixels; 0 for any.

    Returns:
        (M,) int64, M <= limit.
    """
    known = np.flatnonzero(np.isfinite(bearings).all(axis=1))
    # keypoints come by descending score, so a stable sort leaves the best first among equals
    order = known[np.argsort(-result.track_lengths[known], kind="stable")]
    if min_distance > 0:
        cells = np.floor(result.features.keypoints[order] / min_distance).astype(np.int64)
        _, first = np.unique(cells, axis=0, return_index=True)
        order = order[np.sort(first)]
    return order[:limit]


def track_velocities(
    result: FrameResult, bearings: np.ndarray, previous_bearings: np.ndarray
) -> np.ndarray:
    """(N, 2) float32: velocity of each keypoint on the plane z = 1, 1/s; 0 for new tracks.

    Args:
        result: N keypoints, M matches.
        bearings: (N, 3) of the keypoints.
        previous_bearings: (M, 3) of `result.previous_keypoints`.
    """
    velocities = np.zeros((len(result.features), 2), np.float32)
    if result.previous_stamp is None or result.stamp <= result.previous_stamp:
        return velocities
    seconds = (result.stamp - result.previous_stamp) * 1e-9
    now = result.matches.indices[:, 1]
    velocities[now] = (bearings[now, :2] - previous_bearings[:, :2]) / seconds
    # the previous bearing is NaN where the lens model has no inverse
    return np.nan_to_num(velocities, nan=0.0)


def encode_tracks(
    header: Header,
    result: FrameResult,
    bearings: np.ndarray,
    previous_bearings: np.ndarray,
    consumer: str,
    limit: int,
    min_distance: float,
) -> PointCloud:
    """`~/tracks`: sensor_msgs/PointCloud with normalized points (z = 1) and channels.

    Args:
        header: of the source image.
        consumer: "vins_mono" or "vins_fusion".
        result, bearings, limit, min_distance: see `select_tracks`.
        previous_bearings: see `track_velocities`.
    """
    chosen = select_tracks(result, bearings, limit, min_distance)
    velocities = track_velocities(result, bearings, previous_bearings)[chosen]
    keypoints = result.features.keypoints[chosen]
    nothing = np.zeros(len(chosen))
    values = {
        "id": result.track_ids[chosen] % ID_LIMIT,
        "camera": nothing,
        "u": keypoints[:, 0],
        "v": keypoints[:, 1],
        "velocity_x": velocities[:, 0],
        "velocity_y": velocities[:, 1],
        "gx": nothing,
        "gy": nothing,
        "gz": nothing,
    }
    return PointCloud(
        header=header,
        points=[Point32(x=x, y=y, z=1.0) for x, y in bearings[chosen, :2].astype(float).tolist()],
        channels=[
            ChannelFloat32(name=name, values=values[name].astype(float).tolist())
            for name in CHANNELS[consumer]
        ],
    )
