"""Pictures of a training run for TensorBoard."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros.model.sampling import sample
from scfeat_ros.model.scfeat import SCFeat
from scfeat_training.descriptor_loss import clip_lines
from scfeat_training.geometry import epipolar_lines
from scfeat_training.keypoint_policy import epipolar_errors, homography_errors
from scfeat_training.validation import corners, mutual_matches, strongest

LINES = 6
"""Epipolar lines in a picture."""


def to_array(image: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 from a (3, H, W) uint8 tensor."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def score_picture(image: torch.Tensor, scores: torch.Tensor, count: int = 300) -> np.ndarray:
    """Image with keypoints, next to its score map.

    Args:
        image: (3, H, W) uint8.
        scores: (H, W).
        count: keypoints drawn.

    Returns:
        (H, 2 W, 3) uint8 RGB.
    """
    scores = scores.float().cpu()
    picture = to_array(image)
    for x, y in strongest(scores, count).tolist():
        cv2.circle(picture, (round(x), round(y)), 2, (0, 255, 0), 1, cv2.LINE_AA)
    top = float(torch.quantile(scores.flatten(), 0.999).clamp_min(1e-9))
    grey = (scores / top).clamp(0, 1).mul(255).byte().numpy()
    heat = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return np.hstack([picture, heat])


def match_picture(
    images: tuple[torch.Tensor, torch.Tensor],
    points1: torch.Tensor,
    points2: torch.Tensor,
    errors: torch.Tensor,
    threshold: float = 3.0,
) -> np.ndarray:
    """Both images with lines between matches: green where the error is below `threshold` px.

    Args:
        images: two (3, H, W) uint8.
        points1, points2: (N, 2) matched pixels.
        errors: (N,) pixels.

    Returns:
        (H, 2 W, 3) uint8 RGB.
    """
    picture = np.hstack([to_array(image) for image in images])
    width = images[0].shape[-1]
    for (x1, y1), (x2, y2), error in zip(
        points1.tolist(), points2.tolist(), errors.tolist(), strict=True
    ):
        colour = (0, 220, 0) if error < threshold else (230, 0, 0)
        start, end = (round(x1), round(y1)), (round(x2) + width, round(y2))
        cv2.line(picture, start, end, colour, 1, cv2.LINE_AA)
    return picture


def line_picture(
    images: tuple[torch.Tensor, torch.Tensor],
    maps: tuple[torch.Tensor, torch.Tensor],
    fundamental: torch.Tensor,
    temperature: float = 60.0,
) -> np.ndarray:
    """Queries in image 1, and in image 2 the match distribution along their epipolar lines.

    The wider a dot on a line, the more probable the place.

    Args:
        images: two (3, H, W) uint8.
        maps: two (D, H/4, W/4).
        fundamental: (3, 3) with x2^T F x1 = 0.
        temperature: factor on the cosine similarity.

    Returns:
        (H, 2 W, 3) uint8 RGB.
    """
    height, width = images[0].shape[-2:]
    first, second = (to_array(image) for image in images)
    points = corners(images[0].cpu())
    points = points[:: max(1, len(points) // LINES)][:LINES]
    lines = epipolar_lines(fundamental.cpu().double(), points.double()).float()
    ends, hit = clip_lines(lines, (width, height))
    share = torch.linspace(0, 1, 100)
    for k, (x, y) in enumerate(points.tolist()):
        hue = np.uint8([[[round(180 * k / LINES), 255, 255]]])
        colour = tuple(int(v) for v in cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0])
        cv2.circle(first, (round(x), round(y)), 4, colour, 2, cv2.LINE_AA)
        if not hit[k]:
            continue
        start, end = ends[k].round().int().tolist()
        cv2.line(second, start, end, colour, 1, cv2.LINE_AA)
        places = ends[k, 0] + share[:, None] * (ends[k, 1] - ends[k, 0])
        query, found = (
            F.normalize(sample(m[None].float().cpu(), at[None])[0], dim=1)
            for m, at in zip(maps, (points[k : k + 1], places), strict=True)
        )
        probability = torch.softmax(temperature * (found @ query[0]), dim=0)
        radii = 5 * probability / probability.max()
        for (u, v), radius in zip(places.tolist(), radii.tolist(), strict=True):
            cv2.circle(second, (round(u), round(v)), round(radius), colour, -1, cv2.LINE_AA)
    return np.hstack([first, second])


@torch.inference_mode()
def pictures_of(
    model: SCFeat,
    image1: torch.Tensor,
    image2: torch.Tensor,
    geometry: torch.Tensor,
    planar: bool,
    detector: bool,
) -> dict[str, np.ndarray]:
    """All pictures of one pair; with `detector` also score maps.

    Args:
        model: the network, in evaluation mode.
        image1, image2: (3, H, W) uint8.
        geometry: (3, 3) homography if `planar`, else fundamental matrix.
    """
    device = next(model.parameters()).device
    images = image1, image2
    batch = torch.stack(images).to(device).float().div(255)
    description = model.describe(batch.contiguous(memory_format=torch.channels_last))
    maps = description.descriptors
    pictures = {}
    if detector:
        scores = model.detect(batch, description)[:, 0].float().cpu()
        points = [strongest(s, 300) for s in scores]
        pictures["scores"] = score_picture(image1, scores[0])
    else:
        points = [corners(image.cpu()) for image in images]
    found = [
        F.normalize(sample(maps[i : i + 1].float().cpu(), points[i][None])[0], dim=1)
        for i in range(2)
    ]
    first, second = mutual_matches(*found)
    measure = homography_errors if planar else epipolar_errors
    matched = points[0][first], points[1][second]
    errors = measure(geometry.cpu(), *matched).diagonal()
    pictures["matches"] = match_picture(images, *matched, errors)
    if not planar:
        pictures["epipolar"] = line_picture(
            images, (description.bridged[0], description.bridged[1]), geometry
        )
    return pictures
