"""Reads and writes videos by PyAV; writes H.264 that browsers play."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from scfeat_ros.errors import InputError, ScfeatError

try:
    import av
except ImportError:
    av = None

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_TICKS = 1000  # ticks of the time base per second
_RATE = 30
_LONGEST_FRAME = 1.0
_LARGEST_SIDE = 16384  # of H.264, pixels
_CODECS = ("libx264", "mpeg4")


def require_av() -> None:
    """Check that PyAV is installed.

    Raises:
        ScfeatError: it is not.
    """
    if av is None:
        raise ScfeatError("videos need PyAV: pip install av")


class VideoWriter:
    """Writes frames with their stamps to an .mp4 (H.264, 4:2:0).

    Args:
        path: the file.
        size: (width, height) of the first frame, shrunk if too large for H.264; other frames are
            scaled to it.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        require_av()
        factor = min(1.0, _LARGEST_SIDE / max(size))
        # 4:2:0 needs even sides
        self._size = tuple(max(2, 2 * (int(side * factor) // 2)) for side in size)
        codec = next(name for name in _CODECS if name in av.codecs_available)
        # the index at the front lets a browser start before the whole file is loaded
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        options = {"preset": "veryfast", "crf": "23"} if codec == "libx264" else {}
        self._stream = self._container.add_stream(codec, rate=_TICKS, options=options)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = Fraction(1, _TICKS)
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        # determines the H.264 level, which players check; by default one frame per tick
        self._stream.codec_context.framerate = _RATE
        if codec != "libx264":
            self._stream.bit_rate = 8_000_000
        self._time = 0
        self._stamp: int | None = None

    def write(self, image: np.ndarray, stamp: int) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) uint8 RGB.
            stamp: its time in nanoseconds. A step backwards is shown as a millisecond, one of more
                than a second as a second.
        """
        if self._stamp is not None:
            seconds = min(max((stamp - self._stamp) * 1e-9, 0.0), _LONGEST_FRAME)
            self._time += max(1, round(seconds * _TICKS))
        self._stamp = stamp
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(*self._size, format="yuv420p")
        frame.pts, frame.time_base = self._time, Fraction(1, _TICKS)
        self._mux(frame)

    def close(self) -> None:
        self._mux(None)
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = _TICKS // _RATE  # of the last frame; PyAV before 18 sets one tick
            self._container.mux(packet)


def read_video(path: Path) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Frames of a video: (H, W, 3) uint8 RGB, time in nanoseconds, and whether it is damaged.

    Raises:
        InputError: the file is not a readable video; decodable frames are given before.
        ScfeatError: PyAV is not installed.
    """
    require_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: this file has no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 30)
            for index, frame in enumerate(container.decode(stream)):
                seconds = frame.time if frame.time is not None else index / rate
                yield frame.to_ndarray(format="rgb24"), round(seconds * 1e9), frame.is_corrupt
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be read as a video: {error.strerror}") from error


def count_frames(path: Path) -> int | None:
    """Number of frames as stated by the file; None if it is not."""
    require_av()
    try:
        with av.open(str(path)) as container:
            return (container.streams.video[0].frames if container.streams.video else 0) or None
    except av.FFmpegError:
        return None


def stated_duration(path: Path) -> float | None:
    """Length of a video in seconds as stated by the file; None if it is not."""
    try:
        with av.open(str(path)) as container:
            (stream, *_) = container.streams.video
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base)
            alone = len(container.streams) == 1  # else it may be the duration of the audio
            return container.duration / av.time_base if container.duration and alone else None
    except (av.FFmpegError, ValueError):
        return None
