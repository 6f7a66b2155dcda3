"""Pairs of images with point correspondences, for the warm-up (stage 0)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from scfeat_training.datasets import HomographyPairs, PosedPairs
from scfeat_training.geometry import transform_points


def textured_points(
    image: np.ndarray, count: int, rng: np.random.Generator, cell: int = 8
) -> np.ndarray:
    """Points spread over an image, at most one in a cell, more likely where there is texture.

    Args:
        image: (H, W, 3) uint8.
        count: how many, at most the number of cells.
        cell: side of a cell in pixels.

    Returns:
        (count, 2) float64 x, y, with a random fraction of a pixel.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    grey = cv2.GaussianBlur(grey, (0, 0), 1.0)
    texture = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)) + 4.0
    rows, columns = image.shape[0] // cell, image.shape[1] // cell
    blocks = texture[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
    blocks = blocks.transpose(0, 2, 1, 3).reshape(rows * columns, cell * cell)
    # the pixel of largest log-weight plus Gumbel noise is a draw in proportion to the weights
    place = (np.log(blocks) + rng.gumbel(size=blocks.shape)).argmax(1)
    y = np.arange(rows * columns) // columns * cell + place // cell
    x = np.arange(rows * columns) % columns * cell + place % cell
    chosen = rng.permutation(rows * columns)[:count]
    points = np.stack([x, y], 1)[chosen].astype(np.float64)
    return points + rng.uniform(-0.5, 0.5, points.shape)


class GeometryPairs(Dataset):
    """Brings the samples of `HomographyPairs` and `PosedPairs` to one form.

    Samples are dicts of image1, image2 (3, H, W) uint8; geometry (3, 3) float32, a homography
    from image 1 to image 2 or a fundamental matrix; planar, bool, which of the two; K1, K2, R, t,
    depth_range1, depth_range2 as `PosedPairs` has them (a planar pair has identities and unknown
    depths); name.
    """

    def __init__(self, pairs: HomographyPairs | PosedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _one_form(self.pairs[index])


def _one_form(sample: dict[str, Any]) -> dict[str, Any]:
    common = {key: sample[key] for key in ("image1", "image2")}
    if "H" in sample:
        unknown = torch.tensor([0.0, torch.inf])
        return {
            **common,
            "geometry": sample["H"],
            "planar": True,
            **{key: torch.eye(3) for key in ("K1", "K2", "R")},
            "t": torch.zeros(3),
            "depth_range1": unknown,
            "depth_range2": unknown,
            "name": sample["name"],
        }
    cameras = {key: sample[key] for key in ("K1", "K2", "R", "t", "depth_range1", "depth_range2")}
    name = f"{sample['name1']} {sample['name2']}"
    return {**common, "geometry": sample["F"], "planar": False, **cameras, "name": name}


class CorrespondencePairs(Dataset):
    """`GeometryPairs` with corresponding points.

    Samples have in addition points1, points2 (count, 2) float32 pixels; valid (count,) bool,
    whether a row of points2 is the true place of points1's row. From a homography the points are
    spread by texture. From posed pairs they are the sparse 3D points that both crops show, where
    the scene has any; the rows that are left are textured points of each image without a
    partner, which serve as wrong candidates.

    Args:
        pairs: where samples come from; `PosedPairs` with `tracks` rows of correspondences.
        count: points a sample.
        margin: points nearer than this to the border of the second image are invalid, pixels.
    """

    def __init__(
        self, pairs: HomographyPairs | PosedPairs, count: int = 700, margin: float = 2.0
    ) -> None:
        self.pairs = pairs
        self.count = count
        self.margin = margin

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.pairs[index]
        rng = np.random.default_rng((self.pairs.config.seed, 3, index))
        image1, image2 = (sample[key].numpy().transpose(1, 2, 0) for key in ("image1", "image2"))
        points1 = textured_points(image1, self.count, rng)
        if "H" in sample:
            points2 = transform_points(sample["H"].numpy().astype(np.float64), points1)
            size = np.array(image2.shape[1::-1])
            valid = (points2 > self.margin).all(1) & (points2 < size - 1 - self.margin).all(1)
        else:
            points2 = textured_points(image2, self.count, rng)
            tracks = sample["tracks"].numpy()
            tracks = tracks[np.isfinite(tracks).all(1)][: len(points1)]
            points1[: len(tracks)], points2[: len(tracks)] = tracks[:, :2], tracks[:, 2:]
            valid = np.arange(len(points1)) < len(tracks)
        return {
            **_one_form(sample),
            "points1": torch.from_numpy(points1).float(),
            "points2": torch.from_numpy(points2).float(),
            "valid": torch.from_numpy(valid),
        }


class MixedPairs(Dataset):
    """Sample i comes from `second` for a share of the indices, evenly spread, else from `first`."""

    def __init__(self, first: Dataset, second: Dataset, share: float) -> None:
        self.first = first
        self.second = second
        self.share = share

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from_second = int((index + 1) * self.share) > int(index * self.share)
        return (self.second if from_second else self.first)[index]
