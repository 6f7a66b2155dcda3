"""Stage 1: descriptors from camera poses alone, by the epipolar loss (Sec. III-D 1, Eq. 14-15).

For a query point in one image the search goes line-to-window, as in PoSFeat and CAPS: along the
epipolar line in the other image to the most similar place, then into a window about that place,
where the expected position under a softmax of the similarities is differentiable. The loss is
the distance of the expected position to the line.

The window is not centred on the place found: its centre lies on the line, so that a flat softmax,
whose expectation is the centre, would have no loss. It is shifted at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scfeat_ros.model.sampling import sample
from scfeat_training.geometry import back_project, epipolar_lines, project


@dataclass(frozen=True)
class DescriptorOptions:
    """Options of the epipolar loss.

    Attributes:
        cell: one query point in each cell of this side, pixels.
        line_samples: places tried along an epipolar line.
        window: side of the window, as a share of the image's sides.
        jitter: largest shift of the window, as a share of its half side.
        temperature: factor on the cosine similarity in the softmax (an inverse temperature).
        max_cost: queries with a distance above this share of the image's shorter side are ignored:
            their search has failed.
        contrast_weight: weight of the warm-up loss on known correspondences, relative to the
            epipolar loss; 0 trains from poses alone.
    """

    cell: int = 16
    line_samples: int = 100
    window: float = 0.1
    jitter: float = 0.5
    temperature: float = 60.0
    max_cost: float = 0.1
    contrast_weight: float = 0.0


@dataclass
class View:
    """One image of a posed pair for the search: cameras are needed for a depth range only.

    K (B, 3, 3); depth_range (B, 2), near and far z, (0, inf) where unknown.
    """

    K: torch.Tensor
    depth_range: torch.Tensor


def query_points(size: tuple[int, int], cell: int, noise: torch.Tensor) -> torch.Tensor:
    """One point in each cell.

    Args:
        size: (width, height) of the image in pixels.
        cell: side of the cells.
        noise: (B, `query_count`, 2) uniform in [0, 1).

    Returns:
        (B, N, 2) x, y in pixels.
    """
    width, height = size
    columns, rows = width // cell, height // cell
    number = torch.arange(columns * rows, device=noise.device)
    corner = torch.stack([number % columns, number // columns], dim=-1)
    return (corner + noise) * cell - 0.5


def query_count(size: tuple[int, int], cell: int) -> int:
    """Points that `query_points` gives for an image."""
    return (size[0] // cell) * (size[1] // cell)


def clip_lines(lines: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each line that lies in the image.

    Args:
        lines: (..., 3) a x + b y + c = 0 with a^2 + b^2 = 1.
        size: (width, height); pixel centres are at integers.

    Returns:
        ends (..., 2, 2): both end points; hit (...): whether there is such a part. Without it
        the ends mean nothing.
    """
    a, b, c = lines.unbind(-1)
    foot = -c[..., None] * torch.stack([a, b], -1)  # nearest to the origin
    along = torch.stack([-b, a], -1)
    high = lines.new_tensor([size[0] - 1, size[1] - 1])
    # where the line enters and leaves the strip between two opposite borders
    safe = torch.where(along.abs() < 1e-12, torch.full_like(along, 1e-12), along)
    first, second = (0 - foot) / safe, (high - foot) / safe
    enter = torch.minimum(first, second).amax(-1)
    leave = torch.maximum(first, second).amin(-1)
    hit = leave > enter
    ends = foot[..., None, :] + torch.stack([enter, leave], -1)[..., None] * along[..., None, :]
    return ends, hit


def search_line(
    queries: torch.Tensor,
    feature_map: torch.Tensor,
    ends: torch.Tensor,
    samples: int,
    allowed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of the most similar descriptor on a segment.

    Args:
        queries: (B, N, D) of unit norm.
        feature_map: (B, D, H/4, W/4), not normalized.
        ends: (B, N, 2, 2) end points in pixels.
        samples: places tried, evenly spread.
        allowed: (B, N) lowest and highest position along the segment, in shares of it.

    Returns:
        (B, N, 2) places, and (B, N) whether any place was allowed.
    """
    share = torch.linspace(0, 1, samples, device=queries.device)
    places = ends[..., :1, :] + share[:, None] * (ends[..., 1:, :] - ends[..., :1, :])
    similarity = _similarity(queries, feature_map, places)
    some = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    if allowed is not None:
        low, high = allowed
        outside = (share < low[..., None]) | (share > high[..., None])
        similarity = similarity.masked_fill(outside, -torch.inf)
        some = ~outside.all(-1)
    best = similarity.argmax(-1)[..., None, None]
    return torch.take_along_dim(places, best, dim=2)[:, :, 0], some


def _similarity(
    queries: torch.Tensor, feature_map: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """(B, N, K) cosine similarity of (B, N, D) unit queries with the map at (B, N, K, 2) places."""
    batch, count, tried = places.shape[:3]
    found = sample(feature_map, places.reshape(batch, -1, 2))
    found = F.normalize(found, dim=-1).view(batch, count, tried, -1)
    return torch.einsum("bnd,bnkd->bnk", queries, found)


def expected_place(
    queries: torch.Tensor,
    feature_map: torch.Tensor,
    centres: torch.Tensor,
    window: tuple[float, float],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the match distribution in a window.

    Args:
        queries: (B, N, D) of unit norm.
        feature_map: (B, D, H/4, W/4), not normalized.
        centres: (B, N, 2) pixels.
        window: (width, height) in pixels.
        temperature: factor on the cosine similarity.

    Returns:
        (B, N, 2) expected places and (B, N) standard deviations, in pixels.
    """
    sides = []
    for side in window:
        tried = 2 * math.ceil(side / 8) + 1  # odd, so that the middle is tried; at most 4 px apart
        sides.append(torch.linspace(-side / 2, side / 2, tried, device=centres.device))
    offsets = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1).reshape(-1, 2)
    places = centres[:, :, None] + offsets
    probability = torch.softmax(temperature * _similarity(queries, feature_map, places), dim=-1)
    mean = torch.einsum("bnk,bnkc->bnc", probability, places)
    spread = (places - mean[:, :, None]).square().sum(-1)
    return mean, (probability * spread).sum(-1).clamp_min(1e-6).sqrt()


def depth_interval(
    points: torch.Tensor,
    ends: torch.Tensor,
    first: View,
    second: View,
    R: torch.Tensor,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each segment that the depth range of the first image leaves (CAPS Sec. 7).

    Args:
        points: (B, N, 2) queries in the first image.
        ends: (B, N, 2, 2) segment on the epipolar line in the second image.
        first, second: cameras; the depth range of `first` is used.
        R, t: (B, 3, 3) and (B, 3), x2 = R x1 + t.

    Returns:
        (B, N) lowest and highest position in shares of the segment; (0, 1) where the range is
        unknown or its ends are not in front of the second camera.
    """
    along = ends[..., 1, :] - ends[..., 0, :]
    length = along.square().sum(-1).clamp_min(1e-12)
    shares, usable = [], []
    for column in range(2):
        depth = first.depth_range[:, column, None].expand(points.shape[:2])
        known = depth.isfinite() & (depth > 0)
        in_first = back_project(first.K, points, torch.where(known, depth, torch.ones_like(depth)))
        in_second, z = project(second.K, R, t, in_first)
        shares.append(((in_second - ends[..., 0, :]) * along).sum(-1) / length)
        usable.append(known & (z > 1e-6))
    both = usable[0] & usable[1]
    low = torch.where(both, torch.minimum(*shares), torch.zeros_like(length))
    high = torch.where(both, torch.maximum(*shares), torch.ones_like(length))
    return low, high


def epipolar_loss(
    map1: torch.Tensor,
    map2: torch.Tensor,
    points: torch.Tensor,
    lines: torch.Tensor,
    noise: torch.Tensor,
    options: DescriptorOptions,
    cameras: tuple[View, View, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted distance of the expected places to the epipolar lines, one direction (Eq. 14-15).

    Args:
        map1, map2: (B, D, H/4, W/4) F_cn of both images.
        points: (B, N, 2) queries in image 1, pixels.
        lines: (B, N, 3) their epipolar lines in image 2, a^2 + b^2 = 1.
        noise: (B, N, 2) uniform in [0, 1); shifts the windows.
        options: see there.
        cameras: views 1 and 2, R and t with x2 = R x1 + t, to use the depth range.

    Returns:
        (B,) loss in pixels, 0 for a pair without a usable query, and (B,) share of queries used.
    """
    size = map2.shape[-1] * 4, map2.shape[-2] * 4
    # without geometry there is no line (NaN), which must not come into the sum or the gradient
    known = lines.isfinite().all(-1)
    lines = torch.where(known[..., None], lines, torch.zeros_like(lines))
    queries = F.normalize(sample(map1, points), dim=-1)
    ends, hit = clip_lines(lines, size)
    with torch.no_grad():
        allowed = None if cameras is None else depth_interval(points, ends, *cameras)
        found, some = search_line(queries, map2, ends, options.line_samples, allowed)
    window = options.window * size[0], options.window * size[1]
    shift = (noise - 0.5) * options.jitter * noise.new_tensor(window)
    mean, deviation = expected_place(queries, map2, found + shift, window, options.temperature)
    distance = ((lines[..., :2] * mean).sum(-1) + lines[..., 2]).abs()
    used = known & hit & some & (distance.detach() < options.max_cost * min(size))
    weight = used / deviation.detach()
    loss = (weight * distance).sum(1) / weight.sum(1).clamp_min(1e-9)
    return loss, used.float().mean(1)


def descriptor_loss(
    map1: torch.Tensor,
    map2: torch.Tensor,
    fundamental: torch.Tensor,
    noise: torch.Tensor,
    options: DescriptorOptions,
    cameras: tuple[View, View, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_desc (Eq. 14), the mean of both directions.

    Args:
        map1, map2: (B, D, H/4, W/4) F_cn.
        fundamental: (B, 3, 3) with x2^T F x1 = 0 in pixels.
        noise: (B, N, 8) uniform in [0, 1), N of `query_count`.
        options: see there.
        cameras: see `epipolar_loss`.

    Returns:
        (B,) loss in pixels and (B,) share of queries used.
    """
    size = map1.shape[-1] * 4, map1.shape[-2] * 4
    points1 = query_points(size, options.cell, noise[..., 0:2])
    points2 = query_points(size, options.cell, noise[..., 2:4])
    back = None
    if cameras is not None:
        first, second, R, t = cameras
        back = second, first, R.mT, -(R.mT @ t[..., None])[..., 0]
    double = fundamental.double()
    lines2 = epipolar_lines(double, points1.double()).to(points1)
    lines1 = epipolar_lines(double.mT, points2.double()).to(points2)
    forward, used2 = epipolar_loss(map1, map2, points1, lines2, noise[..., 4:6], options, cameras)
    backward, used1 = epipolar_loss(map2, map1, points2, lines1, noise[..., 6:8], options, back)
    return 0.5 * (forward + backward), 0.5 * (used1 + used2)
