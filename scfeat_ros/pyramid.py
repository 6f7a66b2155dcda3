"""Features of an image pyramid, for matches between views at different distances.

The network matches the same place up to a scale change of about two. At a smaller size, an image
from nearby gives the features that an image from farther away has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from scfeat_ros.features import Features
from scfeat_ros.preprocessing import scaled

FACTOR = math.sqrt(2)
"""Scale factor between two levels."""
MIN_SIDE = 64
"""Smallest side of a level, pixels: in smaller images the network finds little."""


def level_sizes(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """(width, height) of every level, the largest first, which is `size` itself.

    Levels with a side below `MIN_SIDE` are left out.
    """
    smaller = [scaled(size, FACTOR**-k) for k in range(1, levels)]
    return [size, *(level for level in smaller if min(level) >= MIN_SIDE)]


def merge(levels: Sequence[Features], count: int, radius: int) -> Features:
    """The best features of all levels.

    Args:
        levels: features of each level, in pixels of the original image.
        count: most features to keep, by score.
        radius: a keypoint is dropped if another level has a better one at most this many pixels
            away in x and in y; 0 keeps all.
    """
    if radius > 0:
        places = [_places(level) for level in levels]
        best = [_best_nearby(*both, radius) for both in zip(levels, places, strict=True)]
        levels = [
            level.select(
                np.all([level.scores >= other[at] for other in best if other is not own], axis=0)
            )
            for level, at, own in zip(levels, places, best, strict=True)
        ]
    together = Features(
        *(
            np.concatenate([getattr(level, name) for level in levels])
            for name in ("keypoints", "scores", "descriptors")
        ),
        image_size=levels[0].image_size,
    )
    # stable: of equal scores, that of the larger level comes first
    return together.select(np.argsort(-together.scores, kind="stable")[:count])


def _places(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the keypoints' pixels."""
    width, height = features.image_size
    columns, rows = np.rint(features.keypoints).astype(int).T
    return rows.clip(0, height - 1), columns.clip(0, width - 1)


def _best_nearby(
    features: Features, places: tuple[np.ndarray, np.ndarray], radius: int
) -> np.ndarray:
    """(height, width) map of the best score at most `radius` pixels away, 0 for none."""
    width, height = features.image_size
    best = np.zeros((height, width), np.float32)
    np.maximum.at(best, places, features.scores)
    return cv2.dilate(best, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
