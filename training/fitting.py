"""Data for fitting projection and reliability: the network's keypoints in pairs of images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features
from scfeat_ros.model.descriptors import Projection
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    ImageCache,
    pair_images,
    validation_pairs,
)
from scfeat_training.scenes import Scene, photo_paths

KEYPOINTS = 1000
SEED = 5


class SampledPairs:
    """Pairs of images of one kind with the network's keypoints, whose descriptors are raw samples.

    Iterating yields the pair (see `datasets`; it has "H" or "F") and the features of both images.
    Their descriptors are all samples that `Projection` combines, concatenated and of unit norm.
    They are extracted again in each iteration: together they are too large to be kept in memory.

    Args:
        name: of the kind, for the progress bar and errors.
        pairs: of images.
        extractor: see `sampled_pairs`.
    """

    def __init__(self, name: str, pairs: Dataset, extractor: Extractor) -> None:
        self.name = name
        self._pairs = pairs
        self._extractor = extractor

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Features, Features]]:
        for i in tqdm(range(len(self)), self.name, unit="pair", disable=None):
            pair = self._pairs[i]
            first, second = map(self._extractor, pair_images(pair))
            yield pair, first, second


def sampled_pairs(
    model: SCFeat,
    scenes: Sequence[Scene],
    pairs: int,
    size: tuple[int, int],
    images: ImageCache | None = None,
    skip_bad: bool = False,
) -> list[SampledPairs]:
    """Both kinds of pairs, the same ones in every call.

    Args:
        model: a trained network; it is not changed. Its reliability is not used.
        scenes: posed scenes.
        pairs: homographies of the scenes' photos, and as many posed pairs.
        size: (width, height) of the views.
        images: source of the images; its `bad` lists unreadable ones.
        skip_bad: continue without these.
    """
    images = images or ImageCache()
    wide = HomographyPairsConfig(
        size=size,
        length=pairs,
        seed=SEED,
        rotation=(40.0, 40.0),
        scale=(0.4, 2.5),
        perspective=0.3,
        overlap=0.3,
    )
    homographies = HomographyPairs(photo_paths(scenes), wide, images, skip_bad)
    posed = validation_pairs(scenes, pairs, size, images, skip_bad)
    model = copy.deepcopy(model)
    model.projection.matrix = torch.eye(model.projection.matrix.shape[1])
    model.detector.reliability = model.detector.reliability.unfitted()
    extractor = Extractor(model, max_keypoints=KEYPOINTS, precision="fp32")
    return [
        SampledPairs("homographies", homographies, extractor),
        SampledPairs("posed pairs", posed, extractor),
    ]


def described(samples: Features, projection: Projection) -> Features:
    """Features with descriptors computed from their samples."""
    values = torch.from_numpy(samples.descriptors) @ projection.matrix.T
    descriptors = torch.nn.functional.normalize(values, dim=1).numpy()
    return Features(samples.keypoints, samples.scores, descriptors, samples.image_size)
