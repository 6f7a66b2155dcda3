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
    """Options of the warm-up loss.

    Attributes:
        temperature: of the softmax over cosine similarities.
        anchors: points a pair and direction whose partner is looked for.
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
    anchors: int = 256
    near: float = 6.0
    window: float = 6.0
    grid: int = 7
    place_points: int = 128
    place_weight: float = 0.2
    place_sharpness: float = 60.0
    bridged_weight: float = 0.5
    bridged_points: int = 128


def valid_first(valid: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (B, at most count) of rows, the valid ones first and else in their order."""
    return valid.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(B, M, ...) rows of (B, N, ...) by (B, M) indices."""
    return torch.take_along_dim(x, rows[(...,) + (None,) * (x.ndim - 2)], dim=1)


def contrastive_loss(
    descriptors1: torch.Tensor,
    descriptors2: torch.Tensor,
    points1: torch.Tensor,
    points2: torch.Tensor,
    valid: torch.Tensor,
    options: WarmupOptions,
) -> torch.Tensor:
    """Symmetric InfoNCE with negatives from both images.

    For an anchor, a point of image 1, the candidates are all points of image 2 (one of them
    right) and all other points of image 1 itself, where repeated texture gives the hardest ones;
    likewise for image 2. Anchors are fewer than points: what matters is the number of candidates.

    Args:
        descriptors1, descriptors2: (B, N, D) of unit norm.
        points1, points2: (B, N, 2) pixels.
        valid: (B, N) bool: row i of points2 is the true place of row i of points1. The other rows
            are candidates only.
        options: temperature, anchors and near.

    Returns:
        (B,) the mean over the anchors of both directions; 0 for a pair without any.
    """
    anchors = valid_first(valid, options.anchors)
    itself = anchors[..., None] == torch.arange(points1.shape[1], device=points1.device)
    first, second = (descriptors1, points1), (descriptors2, points2)
    total = 0.0
    for (own, own_points), (other, other_points) in ((first, second), (second, first)):
        queries = take_rows(own, anchors)
        in_own = queries @ own.transpose(1, 2) / options.temperature
        in_other = queries @ other.transpose(1, 2) / options.temperature
        right = torch.take_along_dim(in_other, anchors[..., None], dim=2)[..., 0]
        near_own = torch.cdist(take_rows(own_points, anchors), own_points) < options.near
        near_other = torch.cdist(take_rows(other_points, anchors), other_points) < options.near
        candidates = [
            in_other.masked_fill(near_other & ~itself, -torch.inf),
            in_own.masked_fill(near_own | itself, -torch.inf),
        ]
        total = total + torch.logsumexp(torch.cat(candidates, dim=2), dim=2) - right
    weight = take_rows(valid, anchors).to(total.dtype)
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

    The window's grid is shifted at random by up to half its half side, so that its centre is not
    the true place; the softmax over cosine similarities is that of stage 1.

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
    contrast = contrastive_loss(found1, found2, points1, points2, valid, options)
    terms = {"contrast": contrast.detach().mean()}
    loss = contrast
    if options.window > 0 and options.place_weight > 0:
        rows = valid_first(valid, options.place_points)
        points1, points2, used, noise = (
            take_rows(x, rows) for x in (points1, points2, valid, noise)
        )
        found1, found2 = take_rows(found1, rows), take_rows(found2, rows)
        place = 0.5 * (
            place_loss(found1, maps2, points2, used, noise[..., :2], options)
            + place_loss(found2, maps1, points1, used, noise[..., 2:], options)
        )
        terms["place"] = place.detach().mean()
        loss = loss + options.place_weight * place
    return loss, terms
