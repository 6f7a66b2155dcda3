"""Features x Features -> Matches: mutual nearest neighbours, ratio test, epipolar check."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch

from scfeat_ros.camera import Camera
from scfeat_ros.features import Features, Matches
from scfeat_ros.native import library, matching
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.preprocessing import upload

BLOCK_ROWS = 512
"""Rows of the similarity matrix that the CPU computes at a time: 4 MiB with 2,048 columns."""
BLOCK_VALUES = 1 << 26
"""Values of it that a GPU computes at a time: 256 MiB, all rows of up to 8,192 features."""

WIDEST = 4.0
"""Largest x / z and y / z of points that epipolar geometry is estimated from (76 degrees). Farther
from the axis a pixel covers so much of the plane that all precision is lost."""


def match(
    first: Features,
    second: Features,
    ratio: float | None = None,
    min_similarity: float = -1.0,
    device: str | torch.device = "cpu",
) -> Matches:
    """Match two sets of features by mutual nearest neighbours in descriptor space.

    Args:
        first, second: features with unit-norm descriptors of the same length D.
        ratio: if given, keep a match only where the distance to the nearest neighbour is
            below `ratio` times that to the second nearest, both ways (paper: 0.80).
        min_similarity: smallest cosine similarity of a match.
        device: torch device for the similarities.

    Returns:
        Matches sorted by the index in `first`; empty if either side is empty. On the CPU, one of
        two almost equally near neighbours may be taken for the other: see
        `native.matching.nearest`.

    Raises:
        ValueError: descriptors of different lengths, or a ratio outside (0, 1].
    """
    if first.descriptors.shape[1] != second.descriptors.shape[1]:
        raise ValueError(
            f"descriptors have {first.descriptors.shape[1]} and {second.descriptors.shape[1]} "
            "dimensions: features of different models cannot be matched"
        )
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if len(first) == 0 or len(second) == 0:
        return Matches.empty()
    a, b, seconds = first.descriptors, second.descriptors, ratio is not None
    if torch.device(device).type == "cpu" and library.is_compiled():
        rows, columns, best, second_best = _compiled_pairs(a, b, seconds)
    else:
        rows, columns, best, second_best = _pairs(a, b, seconds, torch.device(device))
    keep = best >= min_similarity
    if ratio is not None:
        # |a - b|^2 = 2 - 2 cos for unit vectors; a single candidate always passes
        keep &= np.maximum(2 - 2 * best, 0) < ratio**2 * np.maximum(2 - 2 * second_best, 0)
    return Matches(np.stack([rows[keep], columns[keep]], axis=1), best[keep])


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
"""Rows and columns of a b^T that are each other's first maximum, sorted by row; that maximum; and,
if requested, the largest other value of the row or the column."""


def _mutual(of_row: np.ndarray, of_column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that are each other's nearest, sorted by row."""
    rows = np.flatnonzero(of_column[of_row] == np.arange(len(of_row)))
    return rows, of_row[rows]


def _compiled_pairs(a: np.ndarray, b: np.ndarray, seconds: bool) -> Pairs:
    """Pairs by the compiled kernels, in one pass."""
    found = matching.nearest(a, b, seconds)
    rows, columns = _mutual(found.of_row, found.of_column)
    second_best = None
    if seconds:
        second_best = np.maximum(found.second[rows], found.second_of_column[columns])
    return rows, columns, found.similarity[rows], second_best


@torch.inference_mode()
def _pairs(a: np.ndarray, b: np.ndarray, seconds: bool, device: torch.device) -> Pairs:
    """Pairs by PyTorch, on any device."""
    a, b = upload(a, device), upload(b, device)
    # one copy to the host, in float64, where indices are exact
    found = torch.cat([part.double() for part in _nearest(a, b)]).cpu()
    best, of_row, of_column = (part.numpy() for part in found.split([len(a), len(a), len(b)]))
    rows, columns = _mutual(of_row.astype(np.int64), of_column.astype(np.int64))
    second_best = None
    if seconds:
        pairs = (upload(part, device) for part in (rows, columns))
        second_best = _second_best(a, b, *pairs).cpu().numpy()
    return rows, columns, best[rows].astype(np.float32), second_best


def _similarities(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of the (N, M) matrix a b^T: which rows, and their values.

    On the CPU a block stays in the cache while it is used, and is overwritten by the next one; the
    whole matrix would be read from memory several times. On a GPU it may not fit into memory.
    """
    height = BLOCK_ROWS if a.device.type == "cpu" else max(1, BLOCK_VALUES // len(b))
    block = a.new_empty(min(height, len(a)), len(b))
    for start in range(0, len(a), height):
        rows = slice(start, min(start + height, len(a)))
        yield rows, torch.mm(a[rows], b.T, out=block[: rows.stop - start])


def _nearest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The maxima of the rows of a b^T, their columns, and the rows of the columns' maxima.

    Of equal values the first counts.
    """
    best, of_row, of_column = [], [], None
    for rows, block in _similarities(a, b):
        for found, part in zip((best, of_row), block.max(dim=1), strict=True):
            found.append(part)
        values, places = block.max(dim=0)
        if of_column is None:
            best_of_column, of_column = values, places
        else:
            of_column = torch.where(values > best_of_column, places + rows.start, of_column)
            best_of_column = torch.maximum(values, best_of_column)
    return torch.cat(best), torch.cat(of_row), of_column


def _second_best(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """For mutual pairs: the largest similarity of either with anything but the other.

    The similarities are recomputed: storing them all is slower from 4,096 features on.
    """
    of_row = a.new_empty(len(rows))
    of_column = a.new_full((len(b),), -torch.inf)
    for span, block in _similarities(a, b):
        inside = (rows >= span.start) & (rows < span.stop)
        own = rows[inside] - span.start
        block[own, columns[inside]] = -torch.inf
        of_row[inside] = block.amax(dim=1)[own]
        torch.maximum(of_column, block.amax(dim=0), out=of_column)
    return torch.maximum(of_row, of_column[columns])


def epipolar_inliers(
    first: np.ndarray,
    second: np.ndarray,
    threshold: float = 1.0,
    seed: int = 0,
    estimate_from: int | None = None,
    camera: Camera | None = None,
    bearings: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which correspondences agree with one fundamental matrix (OpenCV's USAC).

    Args:
        first, second: (M, 2) corresponding points in pixels.
        threshold: largest distance from the epipolar line in pixels.
        seed: of the random sampler, so that the result is repeatable.
        estimate_from: if there are more correspondences, the matrix is estimated from this many of
            them (8 or more), spread evenly over their order, and all are tested against it. The
            first ones are sampled first (PROSAC): `match` returns those of the best keypoints
            first. None: estimated from all by MAGSAC, a little better and four times slower.
        camera: of both images. If it distorts, the matrix is that of the undistorted points, and
            distances are measured in the images, where epipolar lines are curves. None: the images
            are taken to be undistorted.
        bearings: (M, 3) of both by this camera, if they are known already.

    Returns:
        (M,) bool mask and the (3, 3) float64 fundamental matrix (for K times the bearings if the
        camera distorts); with fewer than 8 points, or if no matrix is found, nothing is an inlier
        and the matrix is None.
    """
    if camera is not None and camera.distorts:
        bearings = bearings or (camera.bearings(first), camera.bearings(second))
        return _inliers_through_lens(*bearings, threshold, seed, estimate_from, camera)
    none = np.zeros(len(first), bool), None
    if len(first) < 8:
        return none
    few = estimate_from is not None and estimate_from < len(first)
    parameters = cv2.UsacParams()
    parameters.randomGeneratorState = seed
    parameters.maxIterations = 1000
    parameters.threshold = threshold
    parameters.loSampleSize = 20
    if few:
        parameters.confidence, parameters.loIterations = 0.99, 5
        parameters.score = cv2.SCORE_METHOD_MSAC
        parameters.sampler = cv2.SAMPLING_PROSAC
        parameters.loMethod = cv2.LOCAL_OPTIM_INNER_LO
    else:
        parameters.confidence, parameters.loIterations = 0.9999, 10
        parameters.score = cv2.SCORE_METHOD_MAGSAC
        parameters.sampler = cv2.SAMPLING_UNIFORM
        parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    first, second = (np.ascontiguousarray(points, np.float64) for points in (first, second))
    used = np.linspace(0, len(first) - 1, estimate_from).astype(int) if few else slice(None)
    try:
        matrix, mask = cv2.findFundamentalMat(first[used], second[used], parameters)
    except cv2.error:  # degenerate input, e.g. all points coincide
        return none
    if matrix is None or matrix.shape != (3, 3):
        return none
    if few:
        return _sampson_distances(matrix, first, second) < threshold, matrix
    return mask.ravel().astype(bool), matrix


def _inliers_through_lens(
    one: np.ndarray,
    other: np.ndarray,
    threshold: float,
    seed: int,
    estimate_from: int | None,
    camera: Camera,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`epipolar_inliers` of the bearings of a camera that distorts."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    # False for NaN, where the lens model has no inverse
    central = (np.abs(np.hstack([one[:, :2], other[:, :2]])) < WIDEST).all(axis=1)
    undistorted = ((ray[central] @ camera.K.T)[:, :2] for ray in (one, other))
    _, matrix = epipolar_inliers(*undistorted, threshold, seed, estimate_from)
    if matrix is None:
        return np.zeros(len(one), bool), None
    essential = camera.K.T @ matrix @ camera.K
    lines2, lines1 = one @ essential.T, other @ essential
    per_pixel = np.hypot(camera.per_pixel(one, lines1), camera.per_pixel(other, lines2))
    return np.abs((other * lines2).sum(axis=1)) < threshold * per_pixel, matrix


def _sampson_distances(matrix: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) Sampson distances of (M, 2) points in pixels, OpenCV's own measure for inliers."""
    lines2 = first @ matrix[:, :2].T + matrix[:, 2]
    lines1 = second @ matrix[:2, :2] + matrix[2, :2]
    algebraic = (second * lines2[:, :2]).sum(axis=1) + lines2[:, 2]
    squares = np.square(lines1).sum(axis=1) + np.square(lines2[:, :2]).sum(axis=1)
    return np.abs(algebraic) / np.sqrt(squares)


def match_with(
    options: MatcherOptions,
    first: Features,
    second: Features,
    device: str | torch.device = "cpu",
    camera: Camera | None = None,
) -> Matches:
    """`match`, then `epipolar_inliers` if the options request it."""
    matches = match(first, second, options.ratio or None, options.min_similarity, device)
    if options.epipolar_threshold:
        one, other = matches.indices.T
        inliers, _ = epipolar_inliers(
            first.keypoints[one],
            second.keypoints[other],
            options.epipolar_threshold,
            camera=camera,
        )
        matches = matches.select(inliers)
    return matches
