"""Stage 0: descriptors from known correspondences, before camera poses take over.

From random weights the epipolar loss of stage 1 falls into poor minima; the warm-up brings the
descriptors to where the search along the line finds the right place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scfeat_ros.model.sampling import sample


@dataclass(frozen=True)
class WarmupOptions:
    """How the warm-up loss is made.

    Attributes:
        temperature: of the softmax over cosine similarities.
        near: candidates closer than this to the true place are no negatives, pixels.
        window: half side of the window of the place term, pixels; 0 leaves the term out.
        grid: samples along a side of that window.
        place_points: points a pair that the place term uses.
        place_weight: its weight against the contrastive term.
        place_sharpness: the factor on the cosine similarity in its softmax.
        bridged_weight: weight of the loss on F_cn against the one on D_desc.
        bridged_points: points a pair that the loss on F_cn uses; it follows D_desc closely.
    """

    temperature: float = 0.05
    near: float = 6.0
    window: float = 6.0
    grid: int = 7
    place_points: int = 192
    place_weight: float = 0.2
    place_sharpness: float = 60.0
    bridged_weight: float = 0.5
    bridged_points: int = 256


def contrastive_loss(
    descriptors1: torch.Tensor,
    descriptors2: torch.Tensor,
    points1: torch.Tensor,
    points2: torch.Tensor,
    valid: torch.Tensor,
    temperature: float,
    near: float,
) -> torch.Tensor:
    """Symmetric InfoNCE with negatives from both images.

    For a point of image 1 the candidates are all points of image 2 (one of them right) and all
    other points of image 1 itself, where repeated texture gives the hardest ones; likewise for
    image 2.

    Args:
        descriptors1, descriptors2: (B, N, D) of unit norm.
        points1, points2: (B, N, 2) pixels.
        valid: (B, N) bool: row i of points2 is the true place of row i of points1. The other rows
            are candidates only.
        temperature: divides the cosine similarity.
        near: candidates closer than this to the true place, other than itself, are left out.

    Returns:
        (B,) the mean over the valid points of both directions; 0 for a pair without any.
    """
    count = points1.shape[1]
    same = torch.eye(count, dtype=torch.bool, device=points1.device)
    near1 = torch.cdist(points1, points1) < near
    near2 = torch.cdist(points2, points2) < near
    cross = descriptors1 @ descriptors2.transpose(1, 2) / temperature
    total = 0.0
    for logits, descriptors, close_cross, close_own in (
        (cross, descriptors1, near2, near1),
        (cross.transpose(1, 2), descriptors2, near1, near2),
    ):
        own = descriptors @ descriptors.transpose(1, 2) / temperature
        candidates = torch.cat(
            [
                logits.masked_fill(close_cross & ~same, -torch.inf),
                own.masked_fill(close_own | same, -torch.inf),
            ],
            dim=2,
        )
        right = logits.diagonal(dim1=1, dim2=2)
        total = total + torch.logsumexp(candidates, dim=2) - right
    weight = valid.to(total.dtype)
    return 0.5 * (total * weight).sum(1) / weight.sum(1).clamp_min(1)


def place_loss(
    queries: torch.Tensor,
    feature_map: torch.Tensor,
    points: torch.Tensor,
    valid: torch.Tensor,
    noise: torch.Tensor,
    options: WarmupOptions,
) -> torch.Tensor:
    """Distance of the expected place in a window to the true place.

    The window's grid is shifted at random by up to half its half side, so that its middle tells
    nothing; the softmax over cosine similarities is the one of stage 1.

    Args:
        queries: (B, N, D) of unit norm.
        feature_map: (B, D, H/4, W/4), not normalized.
        points: (B, N, 2) true places in pixels.
        valid: (B, N) bool.
        noise: (B, N, 2) uniform in [0, 1).

    Returns:
        (B,) mean Huber distance in pixels (linear from 1 px on).
    """
    side = torch.linspace(-options.window, options.window, options.grid, device=points.device)
    offsets = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).view(-1, 2)
    shift = (noise - 0.5) * options.window
    places = (points + shift)[:, :, None] + offsets
    batch, count = points.shape[:2]
    sampled = F.normalize(sample(feature_map, places.view(batch, -1, 2)), dim=-1)
    sampled = sampled.view(batch, count, len(offsets), -1)
    similarity = torch.einsum("bnd,bnkd->bnk", queries, sampled)
    probability = torch.softmax(options.place_sharpness * similarity, dim=-1)
    expected = torch.einsum("bnk,bnkc->bnc", probability, places)
    distance = F.huber_loss(expected, points, reduction="none").sum(-1)
    weight = valid.to(distance.dtype)
    return (distance * weight).sum(1) / weight.sum(1).clamp_min(1)


def warmup_loss(
    maps1: torch.Tensor,
    maps2: torch.Tensor,
    points1: torch.Tensor,
    points2: torch.Tensor,
    valid: torch.Tensor,
    noise: torch.Tensor,
    options: WarmupOptions,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both terms for one kind of map (D_desc or F_cn).

    Args:
        maps1, maps2: (B, D, H/4, W/4).
        points1, points2, valid: see `contrastive_loss`.
        noise: (B, N, 4) uniform in [0, 1).

    Returns:
        (B,) loss of each pair and the mean terms for the log.
    """
    found1 = F.normalize(sample(maps1, points1), dim=-1)
    found2 = F.normalize(sample(maps2, points2), dim=-1)
    contrast = contrastive_loss(
        found1, found2, points1, points2, valid, options.temperature, options.near
    )
    terms = {"contrast": contrast.detach().mean()}
    loss = contrast
    if options.window > 0 and options.place_weight > 0:
        # valid rows first, so that posed pairs with few of them use them all
        order = valid.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        order = order[:, : options.place_points]

        def pick(x: torch.Tensor) -> torch.Tensor:
            return torch.take_along_dim(x, order[..., None], dim=1)

        used = torch.take_along_dim(valid, order, dim=1)
        place = 0.5 * (
            place_loss(pick(found1), maps2, pick(points2), used, pick(noise)[..., :2], options)
            + place_loss(pick(found2), maps1, pick(points1), used, pick(noise)[..., 2:], options)
        )
        terms["place"] = place.detach().mean()
        loss = loss + options.place_weight * place
    return loss, terms
