"""The front end of node and offline tool: image in, features, matches and tracks out."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from scfeat_ros.camera import Camera
from scfeat_ros.extractor import Extractor
from scfeat_ros.features import Features, FrameResult, Matches
from scfeat_ros.matcher import match_with
from scfeat_ros.parameters import MatcherOptions, validate
from scfeat_ros.tracker import Tracker


class FrontEnd:
    """Extractor, matcher and tracker over a stream of images of one camera.

    Args:
        extractor: image -> Features.
        matching: how frames are matched and tracked, None for the defaults.

    Raises:
        OptionError: an option outside its range.
    """

    def __init__(self, extractor: Extractor, matching: MatcherOptions | None = None) -> None:
        self.extractor = extractor
        self.matching = matching or MatcherOptions()
        validate(self.matching)
        self.tracker = Tracker(self.matching.max_gap)

    def set_matching(self, **changes: float) -> None:
        """Change fields of `MatcherOptions`; the next image is processed with them.

        Raises:
            OptionError: a value outside its range; nothing is changed then.
        """
        matching = replace(self.matching, **changes)
        validate(matching)
        self.matching = matching
        self.tracker.max_gap = matching.max_gap

    def reset(self) -> None:
        """Forget the previous frame."""
        self.tracker.reset()

    def process(
        self,
        image: np.ndarray,
        stamp: int,
        frame_id: str = "",
        mask: np.ndarray | None = None,
        camera: Camera | None = None,
    ) -> FrameResult:
        """Extract features from an image and match them to those of the previous one.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8 grey.
            stamp: time of the image in nanoseconds.
            frame_id: the camera's optical frame; a change resets the tracker.
            mask: (H, W) bool or uint8, non-zero where keypoints are wanted.
            camera: calibration for images of this size; the epipolar check undistorts by it.

        Raises:
            ValueError: an image or mask of another shape or dtype.
        """
        started = time.perf_counter()
        features = self.extractor(image, mask=mask)
        return self.follow(features, stamp, frame_id, time.perf_counter() - started, camera)

    def follow(
        self,
        features: Features,
        stamp: int,
        frame_id: str = "",
        extract_seconds: float = 0.0,
        camera: Camera | None = None,
    ) -> FrameResult:
        """Match features of the stream's next image to those of the previous one.

        `process` without the extraction, which may so run ahead, and on several images at a time:
        only matching depends on the order of the images.

        Args:
            features: of the image.
            stamp, frame_id, camera: see `process`.
            extract_seconds: how long the extraction took, for the timings.
        """
        started = time.perf_counter()
        reset = self.tracker.reset_reason(features, stamp, frame_id)
        if reset:
            self.tracker.reset()
        previous = self.tracker.previous
        matches = Matches.empty()
        previous_keypoints = np.zeros((0, 2), np.float32)
        if previous is not None:
            device = self.extractor.device
            matches = match_with(self.matching, previous.features, features, device, camera)
            previous_keypoints = previous.features.keypoints[matches.indices[:, 0]]
        matched = time.perf_counter()
        track_ids, track_lengths = self.tracker.update(features, matches, stamp, frame_id)
        return FrameResult(
            stamp=stamp,
            frame_id=frame_id,
            features=features,
            track_ids=track_ids,
            track_lengths=track_lengths,
            matches=matches,
            previous_stamp=None if previous is None else previous.stamp,
            previous_keypoints=previous_keypoints,
            reset=reset,
            timings={
                "extract": extract_seconds,
                "match": matched - started,
                "track": time.perf_counter() - matched,
            },
        )
