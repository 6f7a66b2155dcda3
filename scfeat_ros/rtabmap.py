"""rtabmap_msgs/RGBDImage with our keypoints and descriptors, for RTAB-Map's external features."""

from __future__ import annotations

import array
import threading
import zlib
from collections import deque
from typing import Any

import numpy as np

from scfeat_ros.features import Features

_CV_32FC1 = 5
KEYPOINT_SIZE = 9.0
"""Diameter of all keypoints, pixels: they have no scale of their own."""


class DepthBuffer:
    """The latest depth images, to be found by stamp; thread-safe.

    Args:
        size: number of images.
    """

    def __init__(self, size: int = 10) -> None:
        self._lock = threading.Lock()
        self._images: deque[tuple[int, Any]] = deque(maxlen=size)

    def add(self, stamp: int, message: Any) -> None:
        """Keep a depth image of a stamp in nanoseconds."""
        with self._lock:
            if self._images and stamp < self._images[-1][0]:
                self._images.clear()  # time went backwards
            self._images.append((stamp, message))

    def nearest(self, stamp: int, tolerance: float) -> Any | None:
        """The depth image nearest in time, None if none lies within `tolerance` seconds."""
        with self._lock:
            images = list(self._images)
        if not images:
            return None
        found, message = min(images, key=lambda image: abs(image[0] - stamp))
        return message if abs(found - stamp) * 1e-9 <= tolerance else None

    def clear(self) -> None:
        with self._lock:
            self._images.clear()


def compress_matrix(matrix: np.ndarray) -> array.array:
    """An (N, D) float32 matrix as RTAB-Map compresses a cv::Mat.

    That is a zlib stream, followed by rows, columns and OpenCV's type as three native int32.
    """
    matrix = np.ascontiguousarray(matrix, np.float32)
    packed = array.array("B")
    if matrix.size:
        # floats hardly compress: the fastest level costs least
        packed.frombytes(zlib.compress(matrix.tobytes(), 1))
        packed.frombytes(np.array([*matrix.shape, _CV_32FC1], np.int32).tobytes())
    return packed


def encode_rgbd(image: Any, depth: Any, camera_info: Any, features: Features, messages: Any) -> Any:
    """An RGBDImage of a colour and a registered depth image.

    RTAB-Map takes the keypoints' 3D points from the depth image itself, so `points` stays
    empty. The message holds an object for each keypoint, so this costs a loop.

    Args:
        image: sensor_msgs/Image or CompressedImage; the result has its header.
        depth: sensor_msgs/Image, registered to it.
        camera_info: sensor_msgs/CameraInfo of both.
        features: of `image`.
        messages: the module rtabmap_msgs.msg.
    """
    key_points = [
        messages.KeyPoint(
            pt=messages.Point2f(x=x, y=y), size=KEYPOINT_SIZE, angle=-1.0, response=score
        )
        for (x, y), score in zip(features.keypoints.tolist(), features.scores.tolist(), strict=True)
    ]
    source = {"rgb_compressed" if hasattr(image, "format") else "rgb": image}
    return messages.RGBDImage(
        header=image.header,
        rgb_camera_info=camera_info,
        depth_camera_info=camera_info,
        depth=depth,
        key_points=key_points,
        descriptors=compress_matrix(features.descriptors),
        **source,
    )
