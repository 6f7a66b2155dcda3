"""Drawing: keypoints coloured by track age with motion trails, and matches of two images."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

from scfeat_ros.features import Features, FrameResult, Matches

TRAIL_LENGTH = 4
"""Positions of a trail, the current one included."""
TRAIL_OPACITY = 0.5
LINE_OPACITY = 0.6
MOST_LINES = 150
"""Most lines between two images."""
OLD_TRACK = 30
"""Age in frames from which a track has the last colour."""
COLOURS = 12
_SHIFT = 4  # sub-pixel bits of OpenCV's drawing
_NEW_COLOUR = (150, 150, 150)


def _palette() -> np.ndarray:
    """(COLOURS, 3) uint8 RGB, blue for young to red for old tracks."""
    ramp = np.linspace(0, 255, COLOURS).astype(np.uint8)[:, None]
    return cv2.applyColorMap(ramp, cv2.COLORMAP_TURBO)[:, 0, ::-1]


def age_colours(lengths: np.ndarray) -> np.ndarray:
    """Palette index of tracks from their length in frames (log scale); (N,) int in [0, COLOURS)."""
    age = np.log(np.clip(lengths, 1, OLD_TRACK)) / np.log(OLD_TRACK)
    return np.minimum((age * COLOURS).astype(int), COLOURS - 1)


class Overlay:
    """Draws consecutive frames and remembers the recent path of every track.

    Frames may be missing (the node draws only for a subscriber): trails follow track ids.
    """

    def __init__(self) -> None:
        self._followed: deque[FrameResult] = deque(maxlen=TRAIL_LENGTH)
        self._ids = np.zeros(0, np.uint32)
        self._trails = np.zeros((0, TRAIL_LENGTH, 2), np.float32)
        self._palette = _palette().tolist()

    def draw(self, image: np.ndarray, result: FrameResult) -> np.ndarray:
        """A copy of the image with keypoints and trails.

        Args:
            image: the frame, (H, W, 3) uint8 RGB or (H, W) uint8 grey.
            result: of the front end for that frame.

        Returns:
            (H, W, 3) uint8 RGB. Grey rings are new keypoints; tracks go from blue (young) to
            red (30 frames and older).
        """
        self.follow(result)
        while self._followed:
            trails = self._extend_trails(self._followed.popleft())
        canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image.copy()
        canvas = np.ascontiguousarray(canvas)
        scale = max(1.0, max(canvas.shape[:2]) / 1000)
        thickness = round(scale)
        new = result.track_lengths <= 1
        colours = age_colours(result.track_lengths)
        chosen = [~new & (colours == index) for index in range(COLOURS)]
        layer = canvas.copy()
        for rows, colour in zip(chosen, self._palette, strict=True):
            lines = _fixed_point(trails[rows])
            cv2.polylines(layer, list(lines), False, colour, thickness, cv2.LINE_AA, _SHIFT)
        # transparent, so that many trails do not hide the image
        cv2.addWeighted(layer, TRAIL_OPACITY, canvas, 1 - TRAIL_OPACITY, 0, canvas)
        keypoints = result.features.keypoints
        _draw_rings(canvas, keypoints[new], _NEW_COLOUR, 1.5 * scale, 1)
        for rows, colour in zip(chosen, self._palette, strict=True):
            _draw_rings(canvas, keypoints[rows], colour, 2.5 * scale, thickness)
        return canvas

    def follow(self, result: FrameResult) -> None:
        """Update the trails by a frame that is not drawn; `draw` includes this."""
        self._followed.append(result)  # evaluated only when something is drawn

    def _extend_trails(self, result: FrameResult) -> np.ndarray:
        """(N, TRAIL_LENGTH, 2) positions of every keypoint's track, the newest first."""
        keypoints = result.features.keypoints
        trails = np.repeat(keypoints[:, None], TRAIL_LENGTH, axis=1)
        if result.reset is None:
            _, now, before = np.intersect1d(result.track_ids, self._ids, return_indices=True)
            trails[now, 1:] = self._trails[before, :-1]
        self._ids, self._trails = result.track_ids, trails
        return trails


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _draw_rings(
    canvas: np.ndarray, centres: np.ndarray, colour: tuple, radius: float, thickness: int
) -> None:
    """Small rings around (N, 2) points, all in one call."""
    angle = np.arange(8) * (np.pi / 4)
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rings = _fixed_point(centres[:, None] + ring)
    cv2.polylines(canvas, list(rings), True, colour, thickness, cv2.LINE_AA, _SHIFT)


def draw_matches(
    first_image: np.ndarray,
    second_image: np.ndarray,
    first: Features,
    second: Features,
    matches: Matches,
    inliers: np.ndarray | None = None,
) -> np.ndarray:
    """Two images side by side with lines between matching keypoints.

    Args:
        first_image, second_image: uint8, RGB or grey.
        first, second: their features.
        matches: rows (index in first, index in second).
        inliers: (M,) bool; inliers are green, the others red and drawn on top. None: all green.
            Of many matches only some have a line.

    Returns:
        (max height, sum of widths + gap, 3) uint8 RGB.
    """
    images = [
        cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
        for image in (first_image, second_image)
    ]
    (h1, w1), (h2, w2) = images[0].shape[:2], images[1].shape[:2]
    gap = 8
    canvas = np.full((max(h1, h2), w1 + gap + w2, 3), 255, np.uint8)
    canvas[:h1, :w1] = images[0]
    canvas[:h2, w1 + gap :] = images[1]
    if inliers is None:
        inliers = np.ones(len(matches), bool)
    start = first.keypoints[matches.indices[:, 0]]
    end = second.keypoints[matches.indices[:, 1]] + np.array([w1 + gap, 0], np.float32)
    scale = max(1.0, max(canvas.shape[:2]) / 2000)
    colours = ((inliers, (40, 200, 80)), (~inliers, (225, 60, 60)))
    has_line = np.arange(len(matches)) % max(1, -(-len(matches) // MOST_LINES)) == 0
    layer = canvas.copy()
    for chosen, colour in colours:
        lines = _fixed_point(np.stack([start, end], axis=1)[chosen & has_line])
        cv2.polylines(layer, list(lines), False, colour, round(scale), cv2.LINE_AA, _SHIFT)
    # transparent, so that the images and the ends of the lines stay visible
    cv2.addWeighted(layer, LINE_OPACITY, canvas, 1 - LINE_OPACITY, 0, canvas)
    for chosen, colour in colours:
        for points in (start, end):
            _draw_rings(canvas, points[chosen], colour, 2.5 * scale, round(scale))
    return canvas
