"""First part of `scfeat train fit`: the linear map from samples at a keypoint to its descriptor.

A linear discriminant analysis of the samples at the network's own keypoints: `within` is the
scatter of differences between samples of one place, `between` that of differences between a place
and others that look like it. The projection's rows are the directions with the largest ratio of
`between` to `within`, in this order, scaled to equal `within` but for `EMPHASIS`. Which samples
show the same place is known from the homography between two views of a photo, and from camera
poses: mutual nearest neighbours on each other's epipolar lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree

from scfeat_ros.errors import InputError
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.model.descriptors import Projection
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.datasets import match_errors
from scfeat_training.fitting import KEYPOINTS, SampledPairs, described
from scfeat_training.geometry import transform_points

SAME_PLACE = 1.5
"""Largest distance of two keypoints of one place under a homography, pixels."""
ON_THE_LINE = 1.0
"""Largest distance of a match from both epipolar lines, pixels."""
LOOK_ALIKES = 5
"""Number of similar but wrong places for each place: the nearest by unfitted descriptors."""
APART = 8.0
"""Smallest distance of a wrong place from the right one, pixels."""
LENGTH = 128
"""Length of a descriptor, as in the paper."""
EMPHASIS = 0.25
"""Directions are scaled by the ratio of the two scatters to this power: the last ones, which
discriminate little, contribute less to the descriptors' similarity."""
REGULARIZATION = 0.1
"""Share of the mean variance within a place that is added to every direction's."""
COMMON = 0.7
"""Share of the samples' mean direction that is subtracted. With 0, the descriptors' differences are
lost in rounding to int8; with 1, fewer matches are right."""


class Scatter:
    """Accumulates the scatter matrices within and between places over one kind of pairs."""

    def __init__(self) -> None:
        self.count = self.places = self.others = 0
        self.sum = self.within_sum = self.between_sum = 0.0

    def add(
        self, first: np.ndarray, second: np.ndarray, same: np.ndarray, alike: np.ndarray
    ) -> None:
        """Add a pair.

        Args:
            first, second: (N, S) and (M, S) samples of both images.
            same: (K, 2) rows that show the same place.
            alike: (K, L) rows of `second` that look like row `same[:, 0]` of `first` but show
                other places.
        """
        first, second = first.astype(np.float64), second.astype(np.float64)
        self.count += len(first) + len(second)
        self.sum += first.sum(axis=0) + second.sum(axis=0)
        difference = first[same[:, 0]] - second[same[:, 1]]
        self.places += len(difference)
        self.within_sum += difference.T @ difference
        for column in alike.T:
            difference = first[same[:, 0]] - second[column]
            self.others += len(difference)
            self.between_sum += difference.T @ difference

    def mean(self) -> np.ndarray:
        """(S,) mean of all samples."""
        return self.sum / self.count

    def within(self) -> np.ndarray:
        """(S, S) mean outer product of differences between samples of one place."""
        return self.within_sum / self.places

    def between(self) -> np.ndarray:
        """(S, S) mean outer product of differences between a place and its look-alikes."""
        return self.between_sum / self.others


def discriminant(mean: np.ndarray, between: np.ndarray, within: np.ndarray, dim: int) -> np.ndarray:
    """(dim, S) rows of the projection, see the top of this file.

    Args:
        mean: (S,) of all samples.
        between, within: (S, S), see `Scatter`.
        dim: rows, those with the largest ratio.
    """
    size = len(within)
    within = within + REGULARIZATION * np.trace(within) / size * np.eye(size)
    values, vectors = np.linalg.eigh(within)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    ratios, directions = np.linalg.eigh(whitening @ between @ whitening)
    rows = directions[:, ::-1][:, :dim].T @ whitening
    rows *= ratios[::-1][:dim, None] ** EMPHASIS
    common = mean / np.linalg.norm(mean)
    rows -= COMMON * np.outer(rows @ common, common)
    return rows / np.abs(rows).max()  # for fp16; the descriptors' length is normalized anyway


def fit_projection(model: SCFeat, kinds: Sequence[SampledPairs]) -> Projection:
    """Fit a network's projection.

    Args:
        model: a trained network; it is not changed.
        kinds: pairs to fit it on; every kind has the same weight.

    Raises:
        InputError: too few places are visible in two images.
    """
    start = model.projection.unfitted()
    scatters = [_scatter(kind, start) for kind in kinds]
    mean = np.mean([scatter.mean() for scatter in scatters], axis=0)
    between, within = (
        np.mean([outer / np.trace(outer) for outer in outers], axis=0)
        for outers in ([s.between() for s in scatters], [s.within() for s in scatters])
    )
    fitted = model.projection.unfitted()
    fitted.matrix = torch.from_numpy(discriminant(mean, between, within, LENGTH)).float()
    return fitted


def _scatter(pairs: SampledPairs, start: Projection) -> Scatter:
    scatter = Scatter()
    wanted = 10 * start.matrix.shape[1]
    _check_places(pairs, 0, 0, wanted)
    for done, (pair, *features) in enumerate(pairs, 1):
        first, second = features
        if min(len(first), len(second)) > LOOK_ALIKES:
            unfitted = [described(one, start) for one in features]
            same = _same(*unfitted, pair)
            alike = _look_alikes(*unfitted, same)
            scatter.add(first.descriptors, second.descriptors, same, alike)
        _check_places(pairs, done, scatter.places, wanted)
    return scatter


def _check_places(pairs: SampledPairs, done: int, places: int, wanted: int) -> None:
    """Raise InputError if too few places are certain: `done` pairs had `places` of `wanted`."""
    most = places + (len(pairs) - done) * KEYPOINTS
    if most < wanted:
        rate = max(1.0, places / done) if done else KEYPOINTS
        raise InputError(
            f"{pairs.name}: at most {most} places are visible in two images, {wanted} are needed; "
            f"give more pairs, --pairs {math.ceil(1.1 * wanted / rate)} or so"
        )


def _same(first: Features, second: Features, pair: dict[str, Any]) -> np.ndarray:
    """(K, 2) rows of both images' features that show one place."""
    if "H" in pair:
        there = transform_points(pair["H"].double().numpy(), first.keypoints.astype(float))
        distance, nearest = cKDTree(second.keypoints).query(there)
        near = np.flatnonzero(distance < SAME_PLACE)
        return np.stack([near, nearest[near]], axis=1)
    rows, columns = match(first, second).indices.T
    right = match_errors(pair, first.keypoints[rows], second.keypoints[columns]) < ON_THE_LINE
    return np.stack([rows[right], columns[right]], axis=1)


def _look_alikes(first: Features, second: Features, same: np.ndarray) -> np.ndarray:
    """(K, LOOK_ALIKES) rows of `second`, see `Scatter.add`."""
    rows, columns = same.T
    similarity = first.descriptors[rows] @ second.descriptors.T
    apart = second.keypoints[columns][:, None] - second.keypoints[None]
    similarity[np.linalg.norm(apart, axis=2) < APART] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :LOOK_ALIKES]
