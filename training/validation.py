"""Figures on held-out pairs while training: cheap, fixed, the same from run to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros.model.descriptors import Maps
from scfeat_ros.model.sampling import sample_one
from scfeat_ros.model.scfeat import SCFeat
from scfeat_ros.selection import is_local_maximum, subpixel_offsets
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    ImageCache,
    match_errors,
    validation_pairs,
)
from scfeat_training.scenes import Scene, has_pairs, photo_paths

CORNERS = 500
NEAR = 2.0
"""Threshold on the epipolar distance, pixels."""


def corners(image: torch.Tensor) -> torch.Tensor:
    """Shi-Tomasi corners (N, 2) float32 of a (3, H, W) uint8 image, at most `CORNERS`."""
    grey = cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
    found = cv2.goodFeaturesToTrack(grey, CORNERS, 0.005, 4)
    return torch.zeros(0, 2) if found is None else torch.from_numpy(found[:, 0])


def strongest(scores: torch.Tensor, count: int, border: int = 2) -> torch.Tensor:
    """Places (N, 2) of the `count` largest local maxima of an (H, W) map, as the extractor's."""
    kept = torch.zeros_like(scores)
    inside = slice(border, -border), slice(border, -border)
    kept[inside] = torch.where(is_local_maximum(scores[None, None], 1)[0, 0], scores, 0.0)[inside]
    values, places = kept.flatten().topk(min(count, kept.numel()))
    places = places[values > 0]
    rows, columns = places // scores.shape[1], places % scores.shape[1]
    points = torch.stack([columns, rows], dim=1).float()
    return points + subpixel_offsets(scores, rows, columns)


def mutual_matches(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of mutual nearest neighbours between unit-norm (N, D) and (M, D)."""
    if not len(first) or not len(second):
        nothing = torch.zeros(0, dtype=torch.long)
        return nothing, nothing
    similarity = first @ second.T
    forward, back = similarity.argmax(1), similarity.argmax(0)
    mutual = back[forward] == torch.arange(len(first))
    return mutual.nonzero()[:, 0], forward[mutual]


def held_out_pairs(
    scenes: Sequence[Scene],
    count: int,
    size: tuple[int, int],
    skip_bad: bool = False,
    on_bad: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A fixed list of `count` homography pairs, then as many posed pairs if the scenes have any.

    Args:
        scenes: held-out scenes (`split_scenes` gives them).
        count: of each kind.
        size: (width, height) of the crops.
        skip_bad: leave out unreadable images instead of raising InputError; `on_bad` gets a line
            for each.
    """
    config = HomographyPairsConfig(
        size=size, length=count, seed=10_000, rotation=(30.0, 30.0), scale=(0.6, 1.6)
    )
    images = ImageCache()
    kinds = [HomographyPairs(photo_paths(scenes), config, images, skip_bad)]
    if has_pairs(scenes):
        kinds.append(validation_pairs(scenes, count, size, images, skip_bad))
    pairs = [kind[i] for kind in kinds for i in range(count)]
    for line in images.bad.values():
        on_bad(line)
    return pairs


class Validation:
    """Figures on `held_out_pairs`, which see for the arguments."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        count: int,
        size: tuple[int, int],
        skip_bad: bool = False,
        on_bad: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.pairs = held_out_pairs(scenes, count, size, skip_bad, on_bad)

    @torch.inference_mode()
    def __call__(self, model: SCFeat, keypoints: int = 500, detector: bool = True) -> dict:
        """Evaluate a network (in evaluation mode).

        Returns:
            Means over the pairs. mma1, mma3: share of mutual matches within 1 and 3 px of the
            true place under a homography; line: share within `NEAR` px of the epipolar line
            of a posed pair; matches: mutual matches a pair; found: matches within 3 px a pair.
            Each at Shi-Tomasi corners for descriptors before (`corner`) and after (`bridged`)
            the bridge, sampled bilinearly, and with `detector` at the network's own keypoints
            with descriptors as the extractor's (`own`).
        """
        device = next(model.parameters()).device
        figures: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            figures.setdefault(name, []).append(value)

        for pair in self.pairs:
            images = torch.stack([pair["image1"], pair["image2"]])
            batch = images.to(device).float().div(255).contiguous(memory_format=torch.channels_last)
            description = model.describe(batch)
            at_corners = [corners(image) for image in images]
            variants = [
                ("corner", description.descriptors, at_corners, sample_one),
                ("bridged", description.bridged, at_corners, sample_one),
            ]
            if detector:
                scores = model.detect(batch, description)[:, 0].cpu()
                own = [strongest(scores[i], keypoints) for i in range(2)]
                each = [Maps(*maps) for maps in zip(*description.maps, strict=True)]
                variants.append(("own", each, own, model.projection))
            for name, maps, points, describe in variants:
                found = [
                    F.normalize(describe(maps[i], points[i].to(device)), dim=1) for i in range(2)
                ]
                first, second = mutual_matches(found[0].cpu(), found[1].cpu())
                matched1 = points[0][first].double().numpy()
                matched2 = points[1][second].double().numpy()
                kind = "h" if "H" in pair else "p"
                note(f"{name}/{kind}_matches", len(matched1))
                error = match_errors(pair, matched1, matched2)
                if kind == "h":
                    for threshold in (1, 3):
                        note(f"{name}/mma{threshold}", share(error, threshold))
                    note(f"{name}/found", float((error < 3).sum()))
                else:
                    note(f"{name}/line", share(error, NEAR))
        return {name: float(np.mean(values)) for name, values in figures.items()}


def share(errors: np.ndarray, threshold: float) -> float:
    """Share of (N,) errors below a threshold; 0 where there are none."""
    return float((errors < threshold).mean()) if len(errors) else 0.0
