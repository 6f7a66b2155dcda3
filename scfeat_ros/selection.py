"""Score map -> keypoints: NMS, threshold, mask, top-K, sub-pixel (Sec. III-E).

Two implementations give the same keypoints. On the CPU only the local maxima are processed
(`on_cpu`); on a GPU everything stays on the device, and no step synchronizes with it (`on_device`).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros.native import keypoints as native_keypoints
from scfeat_ros.parameters import ExtractorOptions

TEXTURE_WINDOW = 5
"""Side of the neighbourhood that must not be uniform, pixels."""


class Selected(NamedTuple):
    """Keypoints of one image, best first, on the score map's device.

    points (N, 2): x, y in pixels of the score map, float32. scores (N,): float32; -inf in rows
    without a keypoint (on a GPU, where the number of rows is fixed).
    """

    points: torch.Tensor
    scores: torch.Tensor


def on_cpu(
    scores: torch.Tensor,
    image: np.ndarray,
    mask: np.ndarray | None,
    options: ExtractorOptions,
    compiled: bool = False,
) -> Selected:
    """Select keypoints on the CPU.

    Args:
        scores: (h, w) float score map.
        image: (h, w, 3) uint8, the network's input.
        mask: (h, w) uint8 or None; keypoints are allowed where it is not 0.
        options: nms_radius, score_threshold, border, max_keypoints and subpixel are used.
        compiled: use the compiled kernels, see `native/library.py`.
    """
    scores = scores.float().contiguous()
    if compiled:
        return Selected(*native_keypoints.select(scores, image, mask, options))
    places = local_maxima(scores, image, mask, options)
    values = scores.numpy().reshape(-1)[places]
    if len(values) > options.max_keypoints:
        # only candidates for the best need to be sorted
        least = len(values) - options.max_keypoints
        enough = values >= np.partition(values, least)[least]
        places, values = places[enough], values[enough]
    # stable, so that equal scores come in image order on every device
    order = np.argsort(-values, kind="stable")[: options.max_keypoints]
    places, values = torch.from_numpy(places[order]), torch.from_numpy(values[order])
    return Selected(_points(scores, places, options.subpixel), values)


def local_maxima(
    scores: torch.Tensor, image: np.ndarray, mask: np.ndarray | None, options: ExtractorOptions
) -> np.ndarray:
    """(N,) places (row * width + column) where keypoints may be, in the order of the image."""
    places = is_local_maximum(scores[None, None], options.nms_radius).flatten().nonzero()[:, 0]
    values = scores.flatten()[places].numpy()
    places = places.numpy()
    keep = (values > options.score_threshold) & np.isfinite(values)
    keep &= _allowed(image, mask, options.border, places)
    return places[keep]


def on_device(
    scores: torch.Tensor,
    image: torch.Tensor,
    mask: torch.Tensor | None,
    options: ExtractorOptions,
) -> Selected:
    """Select keypoints on the score map's device, without synchronizing with it.

    Args:
        scores: (h, w) float score map.
        image: (3, h, w) uint8, the network's input.
        mask: (h, w) bool or None, as for `on_cpu`.
        options: as for `on_cpu`.
    """
    scores = scores.float()
    keep = is_local_maximum(scores[None, None], options.nms_radius)[0, 0]
    keep &= (scores > options.score_threshold) & scores.isfinite() & _textured(image)
    if mask is not None:
        keep &= mask
    if options.border:
        inside = torch.zeros_like(keep)
        inside[options.border : -options.border, options.border : -options.border] = True
        keep &= inside
    values = scores.masked_fill(~keep, -torch.inf).flatten()
    values, places = values.sort(descending=True, stable=True)
    values, places = values[: options.max_keypoints], places[: options.max_keypoints]
    return Selected(_points(scores, places, options.subpixel), values)


def _points(scores: torch.Tensor, places: torch.Tensor, subpixel: bool) -> torch.Tensor:
    """(N, 2) x and y of places (row * width + column)."""
    rows, columns = places // scores.shape[1], places % scores.shape[1]
    points = torch.stack([columns, rows], dim=1).float()
    return points + subpixel_offsets(scores, rows, columns) if subpixel else points


def is_local_maximum(scores: torch.Tensor, radius: int) -> torch.Tensor:
    """Non-maximum suppression in a (2 * radius + 1)^2 window: (B, 1, H, W) scores -> bool.

    A pixel survives if none in its window is larger and at least one is smaller, so a plateau
    gives nothing. Radius 0 keeps all.
    """
    if radius == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    window = 2 * radius + 1
    if scores.device.type == "cpu":  # OpenCV's filters are many times faster than max_pool2d
        kernel = np.ones((window, window), np.uint8)
        found = np.empty(scores.shape, bool)
        for one, keep in zip(scores[:, 0].numpy(), found[:, 0], strict=True):
            np.equal(one, cv2.dilate(one, kernel), out=keep)
            keep &= one > cv2.erode(one, kernel)
        return torch.from_numpy(found)
    largest = F.max_pool2d(scores, window, stride=1, padding=radius)
    smallest = -F.max_pool2d(-scores, window, stride=1, padding=radius)
    return (scores == largest) & (scores > smallest)


def subpixel_offsets(
    scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """(N, 2) x, y offsets: the score-weighted mean position of each 3x3 neighbourhood.

    The neighbourhood's smallest score is subtracted first; otherwise the nearly equal weights of a
    flat neighbourhood would pull every keypoint to its pixel's centre.
    """
    height, width = scores.shape
    steps = torch.arange(-1, 2, device=scores.device)
    y = (rows[:, None, None] + steps[None, :, None]).clamp(0, height - 1)
    x = (columns[:, None, None] + steps[None, None, :]).clamp(0, width - 1)
    weights = scores[y, x].float()
    weights = weights - weights.amin(dim=(1, 2), keepdim=True)
    weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    offset_x = (weights * (x - columns[:, None, None])).sum(dim=(1, 2))
    offset_y = (weights * (y - rows[:, None, None])).sum(dim=(1, 2))
    return torch.stack([offset_x, offset_y], dim=1)


def _allowed(
    image: np.ndarray, mask: np.ndarray | None, border: int, places: np.ndarray
) -> np.ndarray:
    """(N,) bool: at which places (row * width + column) keypoints are allowed.

    Not in the border, not where the mask is 0, and not where the neighbourhood is uniform: black or
    saturated areas have nothing to localize.
    """
    height, width = image.shape[:2]
    kernel = np.ones((TEXTURE_WINDOW, TEXTURE_WINDOW), np.uint8)
    textured = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel)
    red, green, blue = textured.reshape(-1, 3)[places].T
    allowed = (red | green | blue) != 0
    if mask is not None:
        allowed &= mask.reshape(-1)[places] != 0
    if border:
        rows, columns = np.divmod(places, width)
        allowed &= (rows >= border) & (rows < height - border)
        allowed &= (columns >= border) & (columns < width - border)
    return allowed


def _textured(image: torch.Tensor) -> torch.Tensor:
    """(3, h, w) -> (h, w) bool: where the neighbourhood is not uniform."""
    image = image.float()
    window = dict(kernel_size=TEXTURE_WINDOW, stride=1, padding=TEXTURE_WINDOW // 2)
    return (F.max_pool2d(image, **window) > -F.max_pool2d(-image, **window)).any(dim=0)
