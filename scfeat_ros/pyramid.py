"""Features of one image seen at several sizes, for matches between views at different distances.

The network finds the same place again up to a change of scale of about two. Seen also smaller, an
image from nearby gives the features that one from afar has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from scfeat_ros.features import Features
from scfeat_ros.preprocessing import scaled

FACTOR = math.sqrt(2)
"""How much smaller the image is on each level."""
MIN_SIDE = 64
"""Shorter side of the smallest level, pixels: below, little is left for the network to see."""


def level_sizes(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """(width, height) of every level, the largest first, which is `size` itself.

    Levels with a side below `MIN_SIDE` are left out.
    """
    smaller = [scaled(size, FACTOR**-k) for k in range(1, levels)]
    return [size, *(level for level in smaller if min(level) >= MIN_SIDE)]


def merge(levels: Sequence[Features], count: int, radius: int) -> Features:
    """The best features of all levels.

    Args:
        levels: features of each level, in pixels of the one image.
        count: at most so many are kept, by score.
        radius: a keypoint is dropped where another level has a better one at most this many
            pixels away in x and in y; 0 keeps them all.
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
    # stable, so that of equal scores the larger level's comes first
    return together.select(np.argsort(-together.scores, kind="stable")[:count])


def _places(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the keypoints' pixels."""
    width, height = features.image_size
    columns, rows = np.rint(features.keypoints).astype(int).T
    return rows.clip(0, height - 1), columns.clip(0, width - 1)


def _best_nearby(
    features: Features, places: tuple[np.ndarray, np.ndarray], radius: int
) -> np.ndarray:
    """(height, width) of the image: the best score at most `radius` pixels away, 0 for none."""
    width, height = features.image_size
    best = np.zeros((height, width), np.float32)
    np.maximum.at(best, places, features.scores)
    return cv2.dilate(best, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
