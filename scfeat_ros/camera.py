"""Camera model of a sensor_msgs/CameraInfo: pixels to undistorted bearings and back."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import cv2
import numpy as np

from scfeat_ros.errors import InputError

DISTORTION_LENGTHS = {
    "plumb_bob": (0, 4, 5),
    "rational_polynomial": (0, 8),
    "equidistant": (0, 4),
}
"""ROS distortion models and the number of coefficients that each may have."""

_ALIASES = {"": "plumb_bob", "radtan": "plumb_bob", "fisheye": "equidistant"}
_ITERATIONS = 100
_TOLERANCE = 1e-10
_MAX_REPROJECTION = 0.1
"""Largest reprojection error of a valid bearing, pixels."""
_GRID = 8
"""Distance of the grid points on which a lens model is tested, pixels."""


class Camera:
    """A calibrated camera.

    Args:
        K: (3, 3) intrinsics of the raw (distorted) image, pixels.
        D: distortion coefficients in ROS order, empty for none.
        model: "plumb_bob", "rational_polynomial" or "equidistant".
        image_size: (width, height) of the calibrated images, (0, 0) if unknown.

    Raises:
        InputError: an unknown model, a wrong number of coefficients, or a K that is not an
            intrinsic matrix.
    """

    def __init__(
        self,
        K: np.ndarray,
        D: np.ndarray = (),
        model: str = "plumb_bob",
        image_size: tuple[int, int] = (0, 0),
    ) -> None:
        model = _ALIASES.get(model, model)
        if model not in DISTORTION_LENGTHS:
            raise InputError(
                f"CameraInfo has the distortion model '{model}'; known are "
                f"{', '.join(DISTORTION_LENGTHS)}"
            )
        self.K = np.asarray(K, np.float64).reshape(3, 3)
        self.D = np.asarray(D, np.float64).reshape(-1)
        self.model = model
        self.image_size = image_size
        if len(self.D) not in DISTORTION_LENGTHS[model]:
            raise InputError(
                f"CameraInfo has {len(self.D)} distortion coefficients, the model '{model}' takes "
                f"{' or '.join(str(n) for n in DISTORTION_LENGTHS[model])}"
            )
        if not np.isfinite(self.D).all():
            raise InputError(
                f"CameraInfo has no usable distortion coefficients: D is {self.D.tolist()}"
            )
        usable = np.isfinite(self.K).all() and self.K[2, 2] == 1
        if not usable or self.K[0, 0] <= 0 or self.K[1, 1] <= 0:
            raise InputError(
                "CameraInfo has no usable intrinsics: K must hold positive focal lengths and a "
                f"last element of 1, got {self.K.tolist()}"
            )

    @classmethod
    def from_message(cls, message: Any, rectified: bool = False) -> Camera | None:
        """The camera of a sensor_msgs/CameraInfo (ROS 2's k, d, p or ROS 1's K, D, P).

        K is adjusted to region of interest and binning as in image_geometry: first the offset is
        subtracted, then the result is divided by the binning.

        Args:
            message: of rclpy's or of rosbags' class.
            rectified: whether the images are rectified: then the intrinsics are those of P, and
                there is no distortion.

        Returns:
            None for an uncalibrated camera, which in ROS has K[0] = 0 (P[0] if rectified).

        Raises:
            InputError: see the class.
        """
        ros2 = hasattr(message, "k")
        if rectified:
            projection = np.array(message.p if ros2 else message.P, np.float64)
            K, D, model = projection.reshape(3, 4)[:, :3].copy(), np.zeros(0), "plumb_bob"
        else:
            K = np.array(message.k if ros2 else message.K, np.float64).reshape(3, 3)
            D = np.asarray(message.d if ros2 else message.D, np.float64)
            model = message.distortion_model
        if K[0, 0] == 0:
            return None
        width, height = int(message.width), int(message.height)
        roi = message.roi
        if roi.width and roi.height:
            K[0, 2] -= roi.x_offset
            K[1, 2] -= roi.y_offset
            width, height = int(roi.width), int(roi.height)
        # binning 0 means 1
        bin_x, bin_y = max(1, int(message.binning_x)), max(1, int(message.binning_y))
        K[0] /= bin_x
        K[1] /= bin_y
        return cls(K, D, model, (width // bin_x, height // bin_y))

    def same_as(self, other: Camera | None) -> bool:
        """Whether the other one has the same calibration."""
        return (
            other is not None
            and (self.model, self.image_size) == (other.model, other.image_size)
            and np.array_equal(self.K, other.K)
            and np.array_equal(self.D, other.D)
        )

    def fits(self, image_size: tuple[int, int]) -> bool:
        """Whether the calibration is for images of this (width, height)."""
        return self.image_size == (0, 0) or self.image_size == image_size

    @property
    def distorts(self) -> bool:
        """Whether its images differ from a pinhole camera's; always so for an equidistant lens."""
        return self.model == "equidistant" or bool(self.D.any())

    def bearings(self, points: np.ndarray) -> np.ndarray:
        """Undistorted directions of pixels in the optical frame (x right, y down, z ahead).

        Args:
            points: (N, 2) pixels of the raw image.

        Returns:
            (N, 3) float32 with z = 1; a row of NaN where the distortion model has no inverse
            (the pixel is outside the model's valid range).
        """
        bearings = np.full((len(points), 3), np.nan, np.float32)
        if len(points) == 0:
            return bearings
        pixels = np.asarray(points, np.float64).reshape(-1, 1, 2)
        normalized = self._undistort(pixels).reshape(-1, 2)
        width, height = self.image_size
        inside = pixels.min() >= -0.5 and (pixels <= (width - 0.5, height - 0.5)).all()
        if inside and self._has_inverse:
            good = slice(None)
        else:
            good = self._reprojects(normalized, pixels)
        bearings[good, :2] = normalized[good]
        bearings[good, 2] = 1
        return bearings

    @cached_property
    def _has_inverse(self) -> bool:
        """Whether every pixel of the image has a bearing; tested on a grid up to the border."""
        width, height = self.image_size
        x, y = (np.append(np.arange(0, size, _GRID), size) - 0.5 for size in (width, height))
        pixels = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 1, 2)
        return bool(self._reprojects(self._undistort(pixels).reshape(-1, 2), pixels).all())

    def _reprojects(self, normalized: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(N,) bool: which normalized coordinates (N, 2) reproject to their pixels (N, 1, 2).

        Where the inversion failed, or 90 degrees and more off the axis, they are NaN or huge.
        """
        error = np.linalg.norm(self.project(normalized) - pixels[:, 0], axis=1)
        return np.isfinite(normalized).all(axis=1) & (error < _MAX_REPROJECTION)

    def project(self, directions: np.ndarray) -> np.ndarray:
        """Pixels of the raw image from normalized coordinates, the inverse of `bearings`.

        Args:
            directions: (N, 2) x / z and y / z.

        Returns:
            (N, 2) float64 pixels.
        """
        directions = np.asarray(directions, np.float64).reshape(-1, 1, 2)
        if len(directions) == 0:
            return np.zeros((0, 2))
        if self.model == "equidistant":
            D = self.D if len(self.D) else np.zeros(4)
            return cv2.fisheye.distortPoints(directions, self.K, D).reshape(-1, 2)
        return self._project_points(directions)[0].reshape(-1, 2)

    def pixel_gradients(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Jacobian of `project` at (N, 2) normalized coordinates x / z and y / z, by its columns.

        Returns:
            d(u, v)/dx and d(u, v)/dy, (N, 2) each.
        """
        if not self.distorts or not len(directions):
            return tuple(np.tile(column, (len(directions), 1)) for column in self.K[:2, :2].T)
        if self.model != "equidistant":
            jacobian = self._project_points(directions)[1]
            # columns 3 and 4 are by the translation, which moves x / z and y / z as z is 1
            return jacobian[:, 3].reshape(-1, 2), jacobian[:, 4].reshape(-1, 2)
        step = 1e-6 * (1 + np.square(directions).sum(axis=1))[:, None]
        gradients = []
        for axis in np.eye(2):
            ahead, behind = (self.project(directions + sign * step * axis) for sign in (1, -1))
            gradients.append((ahead - behind) / (2 * step))
        return gradients[0], gradients[1]

    def _project_points(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """OpenCV's pixels and Jacobian for (N, 2) or (N, 1, 2) normalized coordinates, N > 0."""
        rays = cv2.convertPointsToHomogeneous(np.asarray(directions, np.float64))
        D = self.D if len(self.D) else None
        return cv2.projectPoints(rays, np.zeros(3), np.zeros(3), self.K, D)

    def per_pixel(self, bearings: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """Change of a line's equation at a bearing per pixel of distance in the raw image.

        The value of the equation divided by it is the distance from the line, which distortion
        bends, to first order.

        Args:
            bearings: (M, 3), see `bearings`.
            lines: (M, 3), of the equations line . bearing = 0 in the plane z = 1.

        Returns:
            (M,) float64, NaN where a bearing is.
        """
        across, down = self.pixel_gradients(bearings[:, :2])
        determinant = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
        along_u = lines[:, 0] * down[:, 1] - lines[:, 1] * across[:, 1]
        along_v = lines[:, 1] * across[:, 0] - lines[:, 0] * down[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where the bearing is unknown
            return np.hypot(along_u, along_v) / np.abs(determinant)

    def _undistort(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 1, 2) pixels -> (N, 1, 2) normalized coordinates, unchecked."""
        if self.model == "equidistant":
            return self._undistort_fisheye(pixels)
        D = self.D if len(self.D) else None
        criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, _ITERATIONS, _TOLERANCE)
        return cv2.undistortPointsIter(pixels, self.K, D, None, None, criteria)

    def _undistort_fisheye(self, pixels: np.ndarray) -> np.ndarray:
        """As `_undistort`, by Newton's method on the angle from the axis; NaN from 90 degrees on.

        OpenCV's implementation rejects radii above pi / 2 focal lengths, which a lens with positive
        coefficients reaches well below 90 degrees.
        """
        image = (pixels[:, 0] - self.K[:2, 2]) / np.diag(self.K)[:2]
        radius = np.hypot(*image.T)
        k1, k2, k3, k4 = self.D if len(self.D) else np.zeros(4)
        low, high = np.zeros_like(radius), np.full_like(radius, self._widest_angle)
        angle = np.minimum(radius, high)
        for _ in range(_ITERATIONS):
            square = angle * angle
            excess = angle * (1 + square * (k1 + square * (k2 + square * (k3 + square * k4))))
            excess -= radius
            low, high = np.where(excess > 0, low, angle), np.where(excess > 0, angle, high)
            slope = 1 + square * (3 * k1 + square * (5 * k2 + square * (7 * k3 + square * 9 * k4)))
            with np.errstate(divide="ignore", invalid="ignore"):
                following = angle - excess / slope
            within = (following >= low) & (following <= high)
            following = np.where(within, following, (low + high) / 2)
            angle, before = following, angle
            if (np.abs(angle - before) < _TOLERANCE).all():
                break
        tangent = np.where(angle < np.pi / 2, np.tan(angle), np.nan)
        scale = np.divide(tangent, radius, out=np.ones_like(radius), where=radius > 0)
        return (image * scale[:, None])[:, None]

    @cached_property
    def _widest_angle(self) -> float:
        """Largest angle from the axis, rad: where the radius stops growing, at most pi / 2."""
        slope = [9, 7, 5, 3, 1] * np.array([*self.D[::-1], *[0.0] * (4 - len(self.D)), 1])
        squares = np.roots(slope)
        folds = squares.real[(abs(squares.imag) < 1e-9) & (squares.real > 0)]
        return float(min([np.pi / 2, *np.sqrt(folds)]))
