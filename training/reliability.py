"""Second part of `scfeat train fit`: the factor on scores that predicts where matches are right.

Keypoints of pairs of images are matched by the final descriptors. A linear discriminant analysis of
F_cn at the matched keypoints separates right from wrong matches. Its direction is that of the
reliability; strength and mean of the factor are set relative to the detection scores at all
keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scfeat_ros.errors import InputError
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.model.reliability import Reliability
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.datasets import match_errors
from scfeat_training.fitting import SampledPairs, described

RIGHT = 3.0
"""Largest error of a right match under a homography, pixels."""
ON_THE_LINE = 1.5
"""Largest distance of a right match from both epipolar lines, pixels."""
REGULARIZATION = 1.0
"""Added to the variances of all values, which are 1. With less the direction overfits to the
training images."""
SPREAD = 0.5
"""Standard deviation of the factor's logarithm, relative to that of the detection score's. With
more, there are fewer wrong matches, but keypoints cluster."""
MEAN = 0.75
"""Geometric mean of the factor: with it, the paper's score threshold of 1.0 is where MMAScore on
held-out pairs saturates."""


def fit_reliability(model: SCFeat, kinds: Sequence[SampledPairs]) -> Reliability:
    """Fit a network's reliability.

    Args:
        model: a trained network with its fitted projection; it is not changed.
        kinds: pairs to fit it on.

    Raises:
        InputError: there are too few right or too few wrong matches.
    """
    places, scores, matched, right = [], [], [], []
    for kind in kinds:
        for pair, *features in kind:
            first, second = (described(one, model.projection) for one in features)
            rows, columns = match(first, second).indices.T
            errors = match_errors(pair, first.keypoints[rows], second.keypoints[columns])
            for one, at in ((features[0], rows), (features[1], columns)):
                bridged = _bridged(one, model.config.descriptor_dim)
                places.append(bridged)
                scores.append(one.scores)
                matched.append(bridged[at])
                right.append(errors < (RIGHT if "H" in pair else ON_THE_LINE))
    direction = discriminant(np.concatenate(matched), np.concatenate(right))
    values = np.concatenate(places) @ direction
    strength = SPREAD * np.log(np.concatenate(scores)).std() / values.std()
    fitted = model.detector.reliability.unfitted()
    fitted.weight.copy_(torch.from_numpy(strength * direction))
    fitted.bias.fill_(np.log(MEAN) - strength * values.mean())
    return fitted


def discriminant(values: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(D,) direction that separates values of right matches from wrong ones.

    Args:
        values: (N, D) float.
        right: (N,) bool.

    Raises:
        InputError: too few values of one kind.
    """
    fewest = min(right.sum(), (~right).sum())
    if fewest < 10 * values.shape[1]:
        raise InputError(
            f"{right.sum()} right and {(~right).sum()} wrong matches are too few to separate "
            "them; give more pairs"
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
