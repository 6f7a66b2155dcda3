"""Results of the front end: plain, immutable containers with fixed shapes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Features:
    """Local features of one image, sorted by descending score.

    Attributes:
        keypoints: (N, 2) float32, x and y in pixels of the image that was given to the
            extractor; the centre of the top-left pixel is (0, 0).
        scores: (N,) float32, detection score (paper Eq. 13, times the reliability), larger is
            better.
        descriptors: (N, D) float32, unit L2 norm (paper Eq. 22) unless the extractor's
            descriptor_norm is "fusion" (Eq. 25).
        image_size: (width, height) of that image, in pixels.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.keypoints)

    def select(self, keep: np.ndarray) -> Features:
        """The features that the boolean mask or index array `keep` selects."""
        return Features(
            self.keypoints[keep], self.scores[keep], self.descriptors[keep], self.image_size
        )

    @classmethod
    def empty(cls, descriptor_dim: int, image_size: tuple[int, int]) -> Features:
        """No features, with the right shapes and dtypes."""
        return cls(
            keypoints=np.zeros((0, 2), np.float32),
            scores=np.zeros((0,), np.float32),
            descriptors=np.zeros((0, descriptor_dim), np.float32),
            image_size=image_size,
        )


@dataclass(frozen=True)
class Matches:
    """Correspondences between two sets of features, one row each.

    Attributes:
        indices: (M, 2) int64, index into the first and into the second set of features.
        similarity: (M,) float32, inner product of the two descriptors: their cosine similarity.
    """

    indices: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, keep: np.ndarray) -> Matches:
        """The matches that the boolean mask or index array `keep` selects."""
        return Matches(self.indices[keep], self.similarity[keep])

    @classmethod
    def empty(cls) -> Matches:
        return cls(np.zeros((0, 2), np.int64), np.zeros((0,), np.float32))


@dataclass(frozen=True)
class FrameResult:
    """Everything the front end knows about one frame.

    Attributes:
        stamp: time of the image in nanoseconds.
        frame_id: the camera's optical frame.
        features: features of this image.
        track_ids: (N,) uint32, one per keypoint: that of the keypoint in the previous frame
            that it was matched to, else a new one.
        track_lengths: (N,) int32, number of consecutive frames in which the track was seen,
            this one included (so at least 1).
        matches: rows (index in the previous frame, index in this frame); empty without one.
        previous_stamp: stamp of the previous frame in nanoseconds, None without one.
        previous_keypoints: (M, 2) float32, each match's keypoint in the previous image, pixels.
        reset: why the tracker was reset at this frame ("first frame", "time went backwards",
            ...), None if it was not.
        timings: seconds by stage: "extract", "match", "track".
    """

    stamp: int
    frame_id: str
    features: Features
    track_ids: np.ndarray
    track_lengths: np.ndarray
    matches: Matches
    previous_stamp: int | None
    previous_keypoints: np.ndarray
    reset: str | None
    timings: dict[str, float] = field(default_factory=dict)
