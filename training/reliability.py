"""Second part of `scfeat train fit`: the factor on scores that tells where matches are right.

Keypoints of pairs of images are matched by the final descriptors. Of those that found a match, a
linear discriminant analysis of F_cn at the keypoint tells the right ones from the wrong ones. Its
direction is the reliability's; how strong and how large the factor is, is set beside the detection
scores at the same keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from scfeat_ros.errors import InputError
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.model.reliability import Reliability
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.fitting import SampledPairs, described
from scfeat_training.geometry import symmetric_epipolar_distance, transform_points

RIGHT = 3.0
"""Largest error of a right match under a homography, pixels."""
ON_THE_LINE = 1.5
"""Largest distance of a right match from both epipolar lines, pixels."""
REGULARIZATION = 1.0
"""Added to the variances of all values, which are 1. With less the direction is more of the
training's images."""
SPREAD = 0.5
"""Standard deviation of the factor's logarithm, against that of the detection score's. With more,
fewer wrong matches are left, but the keypoints crowd together."""
MEAN = 0.5
"""Geometric mean of the factor: it puts the paper's threshold of 1.0 on the scores where MMAScore
stops rising on held-out pairs."""


def fit_reliability(model: SCFeat, kinds: Sequence[SampledPairs]) -> Reliability:
    """Fit a network's reliability.

    Args:
        model: a trained network with its fitted projection; it is left as it is.
        kinds: pairs to fit it on.

    Raises:
        InputError: hardly any keypoint is matched, or all of them right.
    """
    places, scores, matched, right = [], [], [], []
    for kind in kinds:
        for pair, *features in kind:
            first, second = (described(one, model.projection) for one in features)
            indices = match(first, second).indices
            is_right = _is_right(
                pair, first.keypoints[indices[:, 0]], second.keypoints[indices[:, 1]]
            )
            for one, rows in zip(features, indices.T, strict=True):
                places.append(_bridged(one, model.config.descriptor_dim))
                scores.append(one.scores)
                has_match, has_right = np.zeros((2, len(one)), bool)
                has_match[rows], has_right[rows] = True, is_right
                matched.append(has_match)
                right.append(has_right)
    places, scores, matched, right = map(np.concatenate, (places, scores, matched, right))
    direction = discriminant(places[matched], right[matched])
    values = places @ direction
    weight = SPREAD * np.log(scores).std() / values.std() * direction
    fitted = Reliability(len(weight))
    fitted.weight.copy_(torch.from_numpy(weight))
    fitted.bias.fill_(np.log(MEAN) - float((places @ weight).mean()))
    return fitted


def discriminant(values: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(D,) direction in which values of right matches are largest against wrong ones.

    Args:
        values: (N, D) float.
        right: (N,) bool.

    Raises:
        InputError: hardly any values, or all of one kind.
    """
    fewest = min(right.sum(), (~right).sum())
    if fewest < 10 * values.shape[1]:
        raise InputError(
            f"{right.sum()} right and {(~right).sum()} wrong matches are too few to tell them "
            "apart; give more pairs"
        )
    deviation = values.std(axis=0, dtype=np.float64)
    values = (values - values.mean(axis=0)) / deviation
    covariance = values.T @ values / len(values) + REGULARIZATION * np.eye(values.shape[1])
    towards = values.T @ (right - right.mean()) / len(values)
    return np.linalg.solve(covariance, towards) / deviation


def _bridged(samples: Features, dim: int) -> np.ndarray:
    """(N, D) F_cn at the keypoints, of unit norm: the first of the samples."""
    at_keypoint = samples.descriptors[:, :dim]
    return at_keypoint / np.linalg.norm(at_keypoint, axis=1, keepdims=True).clip(1e-12)


def _is_right(pair: dict[str, Any], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) bool: which matches of (N, 2) points are right."""
    first, second = first.astype(float), second.astype(float)
    if "H" in pair:
        there = transform_points(pair["H"].double().numpy(), first)
        return np.linalg.norm(there - second, axis=1) < RIGHT
    distance = symmetric_epipolar_distance(pair["F"].double().numpy(), first, second)
    return distance < ON_THE_LINE
