"""`scfeat train project`: the linear map from samples about a keypoint to its descriptor.

A discriminant analysis of the samples at the network's own keypoints. Two samples of one place
differ by chance (`within`), those of all places by what tells them apart as well (`total`): the
projection's rows are the directions in which the second is largest against the first, scaled so
that the first is the same in all. What is the same place is known from the homography between two
views of a photo, and from camera poses: mutual nearest neighbours on each other's epipolar lines.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from tqdm import tqdm

from scfeat_ros.errors import InputError
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.model.descriptors import Projection
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.datasets import HomographyPairs, HomographyPairsConfig, validation_pairs
from scfeat_training.geometry import epipolar_distance, transform_points
from scfeat_training.scenes import Scene, photo_paths

KEYPOINTS = 1000
SAME_PLACE = 1.5
"""Largest distance of two keypoints of one place under a homography, pixels."""
ON_THE_LINE = 1.0
"""Largest distance of a match from both epipolar lines, pixels."""
REGULARIZATION = 0.3
"""Share of the mean variance within a place that is added in every direction."""
COMMON = 0.7
"""Share that is taken away of what all samples have in common. With all of it the descriptors'
differences are lost in rounding to int8; without any, samples like nothing in particular match."""
SEED = 5


class Scatter:
    """Sums over samples of one kind of pairs: how they spread in all, and within a place."""

    def __init__(self) -> None:
        self.count = self.places = 0
        self.sum = self.squares = self.differences = 0.0

    def add(self, first: np.ndarray, second: np.ndarray, same: np.ndarray) -> None:
        """Take in a pair.

        Args:
            first, second: (N, S) and (M, S) samples of both images.
            same: (K, 2) rows that show one place.
        """
        for samples in (first.astype(np.float64), second.astype(np.float64)):
            self.count += len(samples)
            self.sum += samples.sum(axis=0)
            self.squares += samples.T @ samples
        difference = (first[same[:, 0]] - second[same[:, 1]]).astype(np.float64)
        self.places += len(difference)
        self.differences += difference.T @ difference

    def mean(self) -> np.ndarray:
        """(S,) mean of all samples."""
        return self.sum / self.count

    def total(self) -> np.ndarray:
        """(S, S) covariance of all samples."""
        return self.squares / self.count - np.outer(self.mean(), self.mean())

    def within(self) -> np.ndarray:
        """(S, S) covariance of samples of one place."""
        return self.differences / (2 * self.places)


def discriminant(mean: np.ndarray, total: np.ndarray, within: np.ndarray, dim: int) -> np.ndarray:
    """(dim, S) rows of the projection, see the top of this file.

    Args:
        mean: (S,) of all samples.
        total, within: (S, S) covariances.
        dim: rows, those with the largest ratio.
    """
    size = len(within)
    within = within + REGULARIZATION * np.trace(within) / size * np.eye(size)
    values, vectors = np.linalg.eigh(within)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    _, directions = np.linalg.eigh(whitening @ total @ whitening)
    rows = directions[:, ::-1][:, :dim].T @ whitening
    common = mean / np.linalg.norm(mean)
    rows -= COMMON * np.outer(rows @ common, common)
    return rows / np.abs(rows).max()  # for fp16; the descriptors' length is normalized anyway


def fit_projection(
    model: SCFeat, scenes: Sequence[Scene], pairs: int = 250, size: tuple[int, int] = (640, 480)
) -> Projection:
    """Fit a network's projection.

    Args:
        model: a trained network; it is left as it is.
        scenes: posed scenes to fit it on.
        pairs: homographies of the scenes' photos, and as many posed pairs.
        size: (width, height) of the views.

    Raises:
        InputError: there are hardly any places that two images show.
    """
    start = Projection(model.config.descriptor_dim)
    extractor = _samples_extractor(model)
    wide = HomographyPairsConfig(
        size=size,
        length=pairs,
        seed=SEED,
        rotation=(40.0, 40.0),
        scale=(0.4, 2.5),
        perspective=0.3,
        overlap=0.3,
    )
    homographies = HomographyPairs(photo_paths(scenes), wide)
    posed = validation_pairs(scenes, pairs, size)
    scatters = [
        _scatter(extractor, start, (kind[i] for i in range(pairs)), pairs, name)
        for kind, name in ((homographies, "homographies"), (posed, "posed pairs"))
    ]
    mean = np.mean([scatter.mean() for scatter in scatters], axis=0)
    total, within = (
        np.mean([covariance / np.trace(covariance) for covariance in kinds], axis=0)
        for kinds in ([s.total() for s in scatters], [s.within() for s in scatters])
    )
    fitted, dim = Projection(model.config.descriptor_dim), model.config.descriptor_dim
    for matrix in (fitted.surroundings, fitted.context):
        known = slice(matrix.shape[1])  # context comes after the surroundings
        rows = discriminant(mean[known], total[known, known], within[known, known], dim)
        matrix.copy_(torch.from_numpy(rows))
    return fitted


def _samples_extractor(model: SCFeat) -> Extractor:
    """An extractor whose descriptors are all samples, surroundings and context, of unit norm."""
    model = copy.deepcopy(model)
    model.projection.context = torch.eye(model.projection.context.shape[1])
    return Extractor(
        model,
        max_keypoints=KEYPOINTS,
        descriptor_sampling="context",
        precision="fp32",
    )


def _scatter(
    extractor: Extractor, start: Projection, pairs: Iterable[dict[str, Any]], count: int, name: str
) -> Scatter:
    scatter = Scatter()
    for pair in tqdm(pairs, name, count, unit="pair", disable=None):
        first, second = (
            extractor(np.ascontiguousarray(pair[key].permute(1, 2, 0).numpy()))
            for key in ("image1", "image2")
        )
        if len(first) and len(second):
            scatter.add(first.descriptors, second.descriptors, _same(first, second, pair, start))
    if scatter.places < 10 * start.context.shape[1]:
        raise InputError(
            f"{name}: {scatter.places} places that two images show are too few; give more pairs"
        )
    return scatter


def _same(first: Features, second: Features, pair: dict[str, Any], start: Projection) -> np.ndarray:
    """(K, 2) rows of both images' features that show one place."""
    if "H" in pair:
        there = transform_points(pair["H"].double().numpy(), first.keypoints.astype(float))
        distance, nearest = cKDTree(second.keypoints).query(there)
        near = np.flatnonzero(distance < SAME_PLACE)
        return np.stack([near, nearest[near]], axis=1)
    rows, columns = match(*(_described(features, start) for features in (first, second))).indices.T
    at1, at2 = first.keypoints[rows].astype(float), second.keypoints[columns].astype(float)
    F = pair["F"].double().numpy()
    forward, back = epipolar_distance(F, at1, at2), epipolar_distance(F.T, at2, at1)
    right = np.maximum(forward, back) < ON_THE_LINE
    return np.stack([rows[right], columns[right]], axis=1)


def _described(samples: Features, projection: Projection) -> Features:
    """Features with descriptors in place of samples."""
    values = torch.from_numpy(samples.descriptors) @ projection.context.T
    descriptors = torch.nn.functional.normalize(values, dim=1).numpy()
    return Features(samples.keypoints, samples.scores, descriptors, samples.image_size)
