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

FACTOR = math.sqrt(2)
"""How much smaller the image is on each level."""
MIN_SIDE = 64
"""Shorter side of the smallest level, pixels: below, little is left for the network to see."""


def level_sizes(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """(width, height) of every level, the largest first, which is `size` itself.

    Levels with a side below `MIN_SIDE` are left out.
    """
    smaller = [tuple(round(side / FACTOR**k) for side in size) for k in range(1, levels)]
    return [size, *(level for level in smaller if min(level) >= MIN_SIDE)]


def merge(levels: Sequence[Features], count: int, radius: int) -> Features:
    """The best features of all levels.

    Args:
        levels: features of each level, in pixels of the one image.
        count: at most so many are kept, by score.
        radius: a keypoint is dropped where another level has a better one at most this many
            pixels away in x and in y; 0 keeps them all.
    """
    width, height = levels[0].image_size
    if radius > 0:
        window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
        places = [_places(level) for level in levels]
        best = np.zeros((len(levels), height, width), np.float32)
        for i in range(len(levels)):
            np.maximum.at(best[i], places[i], levels[i].scores)
            cv2.dilate(best[i], window, dst=best[i])
        levels = [
            _select(level, level.scores >= np.delete(best, i, axis=0).max(axis=0)[places[i]])
            for i, level in enumerate(levels)
        ]
    together = Features(
        *(
            np.concatenate([getattr(level, name) for level in levels])
            for name in ("keypoints", "scores", "descriptors")
        ),
        image_size=(width, height),
    )
    # stable, so that of equal scores the larger level's comes first
    return _select(together, np.argsort(-together.scores, kind="stable")[:count])


def _places(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the keypoints' pixels."""
    width, height = features.image_size
    columns, rows = np.rint(features.keypoints).astype(int).T
    return rows.clip(0, height - 1), columns.clip(0, width - 1)


def _select(features: Features, keep: np.ndarray) -> Features:
    """The features where the boolean mask or index array `keep` says so."""
    return Features(
        features.keypoints[keep],
        features.scores[keep],
        features.descriptors[keep],
        features.image_size,
    )
