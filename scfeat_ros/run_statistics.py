"""Statistics of a run, in memory that does not grow with its length."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from scfeat_ros.features import FrameResult

LONGEST_TRACK = 10_000
"""Longer tracks are counted as this long."""
STAGES = ("decode", "extract", "match", "track", "output")
HEAT_CELLS = 64
"""Cells of the coverage map along the longer side of the image."""
_COVERAGE_GRID = 8


class Series:
    """A value per frame, averaged over `stride` frames: fewer than 2 * `capacity` are kept."""

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self.stride = 1
        """Frames per kept value."""
        self._kept: list[float] = []
        self._open: list[float] = []
        self.count = 0
        self.total = 0.0
        self.minimum = np.inf
        self.maximum = -np.inf

    def add(self, value: float) -> None:
        """Append a frame's value; NaN, for a frame without one, is ignored in all statistics."""
        self._open.append(value)
        if not np.isnan(value):
            self.count += 1
            self.total += value
            self.minimum = min(self.minimum, value)
            self.maximum = max(self.maximum, value)
        if len(self._open) == self.stride:
            self._kept.append(_mean(self._open))
            self._open = []
        if len(self._kept) == 2 * self.capacity:
            self._kept = [
                _mean(pair) for pair in zip(self._kept[::2], self._kept[1::2], strict=True)
            ]
            self.stride *= 2

    @property
    def values(self) -> np.ndarray:
        """Kept values; NaN where all frames of a stride were NaN."""
        return np.array(self._kept + ([_mean(self._open)] if self._open else []))

    def summary(self) -> dict[str, float] | None:
        """Mean, smallest and largest; None without a value."""
        if self.count == 0:
            return None
        return {
            "mean": round(self.total / self.count, 4),
            "min": round(float(self.minimum), 4),
            "max": round(float(self.maximum), 4),
        }


def _mean(values: tuple[float, ...] | list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


class LatencyHistogram:
    """Durations in logarithmic bins of 2 %, from a microsecond to a quarter of an hour."""

    _LOWEST, _STEP, _BINS = 1e-6, np.log(1.02), 1050

    def __init__(self) -> None:
        self._counts = np.zeros(self._BINS, np.int64)

    def add(self, seconds: float) -> None:
        index = int(np.log(max(seconds, self._LOWEST) / self._LOWEST) / self._STEP)
        self._counts[min(index, self._BINS - 1)] += 1

    def quantile(self, share: float) -> float:
        """Quantile of the durations in seconds, within 1 %; NaN without any."""
        total = self._counts.sum()
        if total == 0:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self._counts), share * total))
        return self._LOWEST * float(np.exp((index + 0.5) * self._STEP))


def _count_cells(positions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Number of (N, 2) positions x, y in [0, 1) in each cell of a grid of (rows, columns)."""
    column, row = (positions * shape[::-1]).astype(int).T
    return np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)


class RunStatistics:
    """Accumulates the statistics of `summary.json` and of the report, frame by frame."""

    def __init__(self) -> None:
        self.frames = 0
        self.keypoints = Series()
        self.matches = Series()
        self.inliers = Series()
        self.inlier_ratio = Series()
        self.right_share = Series()
        self.right, self.judged = 0, 0
        self.coverage = Series()
        self.resets: Counter[str] = Counter()
        self.latency = {stage: LatencyHistogram() for stage in STAGES}
        self.track_lengths = np.zeros(LONGEST_TRACK + 1, np.int64)
        self.heat: np.ndarray | None = None
        self.first_stamp: int | None = None
        self.last_stamp: int | None = None
        self._alive = np.zeros(0, np.int32)

    def add(
        self,
        result: FrameResult,
        inliers: np.ndarray | None,
        right: np.ndarray | None,
        seconds: dict[str, float],
    ) -> None:
        """Add a frame.

        Args:
            result: of the front end, M matches.
            inliers: (M,) bool by estimated epipolar geometry, None for a frame without matches.
            right: (M,) bool by the true epipolar geometry, None if unknown.
            seconds: by stage.
        """
        self.frames += 1
        nan = float("nan")
        matches = len(result.matches)
        self.keypoints.add(len(result.features))
        # the first frame after a reset has nothing to match with
        self.matches.add(nan if result.reset else matches)
        self.inliers.add(nan if inliers is None else int(inliers.sum()))
        self.inlier_ratio.add(nan if inliers is None or not matches else float(inliers.mean()))
        self.right_share.add(nan if right is None or not matches else float(right.mean()))
        if right is not None:
            self.right += int(right.sum())
            self.judged += len(right)
        if result.reset and result.reset != "first frame":
            # "gap of 1.5 s" -> "gap": kinds are few, texts are not
            self.resets[re.sub(r" (of|from) .*", "", result.reset)] += 1
        self.first_stamp = result.stamp if self.first_stamp is None else self.first_stamp
        self.last_stamp = result.stamp
        for stage, duration in seconds.items():
            self.latency[stage].add(duration)
        self._end_tracks(result)
        self._add_heat(result)

    def finish(self) -> None:
        """Count the tracks that are still alive at the end."""
        self._count_tracks(self._alive)
        self._alive = np.zeros(0, np.int32)

    def _end_tracks(self, result: FrameResult) -> None:
        ended = np.ones(len(self._alive), bool)
        ended[result.matches.indices[:, 0]] = False
        self._count_tracks(self._alive[ended])
        self._alive = result.track_lengths

    def _count_tracks(self, lengths: np.ndarray) -> None:
        counts = np.bincount(np.minimum(lengths, LONGEST_TRACK))
        self.track_lengths[: len(counts)] += counts

    def _add_heat(self, result: FrameResult) -> None:
        width, height = result.features.image_size
        if self.heat is None:
            cell = max(width, height) / HEAT_CELLS
            shape = max(1, round(height / cell)), max(1, round(width / cell))
            self.heat = np.zeros(shape, np.int64)
        # keypoints may lie half a pixel outside of the outermost pixels' centres
        position = (result.features.keypoints + 0.5) / (width, height)
        position = np.clip(position, 0, np.nextafter(1, 0))
        self.heat += _count_cells(position, self.heat.shape)
        cells = _count_cells(position, (_COVERAGE_GRID, _COVERAGE_GRID))
        self.coverage.add(np.count_nonzero(cells) / cells.size)

    def mean_track_length(self) -> float:
        """Mean number of frames in which a keypoint is seen; NaN without keypoints."""
        count = self.track_lengths.sum()
        lengths = np.arange(len(self.track_lengths))
        return float((self.track_lengths * lengths).sum() / count) if count else float("nan")

    def summary(self) -> dict[str, Any]:
        """The statistics as JSON values; None where there are none."""
        cumulative = np.cumsum(self.track_lengths)
        tracks = int(cumulative[-1])
        present = np.flatnonzero(self.track_lengths)
        return {
            "frames": self.frames,
            "keypoints_per_frame": self.keypoints.summary(),
            "matches_per_frame": self.matches.summary(),
            "inliers_per_frame": self.inliers.summary(),
            "epipolar_inlier_ratio": self.inlier_ratio.summary(),
            "ground_truth": {
                "matches": self.judged,
                "right": self.right,
                "share": round(self.right / self.judged, 4),
                "per_frame": self.right_share.summary(),
            }
            if self.judged
            else None,
            "tracks": {
                "count": tracks,
                "mean_length": round(self.mean_track_length(), 3),
                "median_length": int(np.searchsorted(cumulative, tracks / 2)),
                "longest": int(present[-1]),
            }
            if tracks
            else None,
            "coverage": self.coverage.summary(),
            "tracker_resets": dict(self.resets),
            "latency_ms": {
                stage: {
                    "median": round(1e3 * histogram.quantile(0.5), 3),
                    "p95": round(1e3 * histogram.quantile(0.95), 3),
                }
                for stage, histogram in self.latency.items()
                if self.frames
            },
        }
