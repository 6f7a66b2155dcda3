"""Assigns track ids that persist from frame to frame, and decides when tracks end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scfeat_ros.features import Features, Matches


@dataclass(frozen=True)
class TrackedFrame:
    """The previous frame with its tracks."""

    stamp: int
    frame_id: str
    features: Features
    track_ids: np.ndarray
    track_lengths: np.ndarray


class Tracker:
    """Gives every keypoint a track id, and propagates ids along matches.

    Args:
        max_gap: seconds without a frame after which tracks end.
    """

    def __init__(self, max_gap: float = 1.0) -> None:
        self.max_gap = max_gap
        self.previous: TrackedFrame | None = None
        self._next_id = 1

    def reset(self) -> None:
        """Forget the previous frame; ids are not reused."""
        self.previous = None

    def reset_reason(self, features: Features, stamp: int, frame_id: str) -> str | None:
        """Why a frame cannot be matched to the previous one; None if it can."""
        previous = self.previous
        if previous is None:
            return "first frame"
        if stamp < previous.stamp:
            return "time went backwards"
        if frame_id != previous.frame_id:
            return f"frame id changed from '{previous.frame_id}' to '{frame_id}'"
        if features.image_size != previous.features.image_size:
            return "image size changed from {}x{} to {}x{}".format(
                *previous.features.image_size, *features.image_size
            )
        lengths = [f.descriptors.shape[1] for f in (previous.features, features)]
        if lengths[0] != lengths[1]:
            return "descriptor length changed from {} to {}".format(*lengths)
        if (stamp - previous.stamp) * 1e-9 > self.max_gap:
            return f"gap of {(stamp - previous.stamp) * 1e-9:.2f} s"
        return None

    def update(
        self, features: Features, matches: Matches, stamp: int, frame_id: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Append a frame with its matches (previous, current) to the previous one.

        Returns:
            (N,) uint32 track ids and (N,) int32 track lengths in frames.
        """
        count = len(features)
        # ids wrap at 2^32 and never take the value 0, which consumers use for "no track"
        fresh = (self._next_id - 1 + np.arange(count, dtype=np.uint64)) % (2**32 - 1) + 1
        ids = fresh.astype(np.uint32)
        lengths = np.ones(count, np.int32)
        if self.previous is not None and len(matches):
            before, now = matches.indices.T
            ids[now] = self.previous.track_ids[before]
            lengths[now] = self.previous.track_lengths[before] + 1
        self._next_id = int((self._next_id - 1 + count) % (2**32 - 1) + 1)
        self.previous = TrackedFrame(stamp, frame_id, features, ids, lengths)
        return ids, lengths
