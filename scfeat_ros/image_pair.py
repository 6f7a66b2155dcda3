"""Matches between two image files, drawn side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from scfeat_ros.errors import InputError
from scfeat_ros.extractor import Extractor
from scfeat_ros.images import read_file
from scfeat_ros.matcher import epipolar_inliers, match_with
from scfeat_ros.overlay import draw_matches
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.staging import check_file, staged_file


def check_picture(output: Path, overwrite: bool) -> None:
    """Check that the picture can be written; raises as `match_pair`."""
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"{output}: the picture's name must end with .png or .jpg")
    check_file(output, overwrite)


@dataclass(frozen=True)
class PairResult:
    """Counts of a pair of images: keypoints in both, matches, epipolar inliers."""

    keypoints: tuple[int, int]
    matches: int
    inliers: int


def match_pair(
    first: Path,
    second: Path,
    output: Path,
    extractor: Extractor,
    matching: MatcherOptions,
    inlier_threshold: float = 1.0,
    overwrite: bool = False,
) -> PairResult:
    """Match two image files and draw them side by side, inliers green, the others red.

    Args:
        inlier_threshold: largest distance from the epipolar line, pixels.

    Raises:
        InputError: an image cannot be read, the output is no .png or .jpg, or the threshold is
            not positive.
        OutputExistsError: the output is there.
    """
    check_picture(output, overwrite)
    if not 0 < inlier_threshold < np.inf:
        raise InputError(f"--inlier-threshold must be positive, got {inlier_threshold}")
    with staged_file(output, overwrite) as partial:
        images = [read_file(first), read_file(second)]
        features = [extractor(image) for image in images]
        matches = match_with(matching, *features, extractor.device)
        inliers, _ = epipolar_inliers(
            features[0].keypoints[matches.indices[:, 0]],
            features[1].keypoints[matches.indices[:, 1]],
            inlier_threshold,
        )
        picture = draw_matches(*images, *features, matches, inliers)
        done, data = cv2.imencode(output.suffix.lower(), np.ascontiguousarray(picture[..., ::-1]))
        if not done:
            height, width = picture.shape[:2]
            raise InputError(
                f"{output}: too large for this format ({width}x{height} pixels); give a .png"
            )
        partial.write_bytes(data.tobytes())
    return PairResult((len(features[0]), len(features[1])), len(matches), int(inliers.sum()))
