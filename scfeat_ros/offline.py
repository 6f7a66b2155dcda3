"""The offline tool: bag, video or image folder -> output bag, overlay video, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from scfeat_ros import __version__
from scfeat_ros.bags import UnreadableMessageError
from scfeat_ros.errors import InputError
from scfeat_ros.extractor import Extractor
from scfeat_ros.feature_bag import FeatureBagWriter
from scfeat_ros.features import Features, FrameResult
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.ground_truth import RIGHT_WITHIN, right_matches
from scfeat_ros.matcher import epipolar_inliers
from scfeat_ros.native.awake import cores_awake
from scfeat_ros.overlay import Overlay
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.pipeline import background, on_threads
from scfeat_ros.recovery import RawMessage
from scfeat_ros.report import SAMPLES, SampleFrames, render
from scfeat_ros.run_statistics import RunStatistics
from scfeat_ros.sources import Frame, Source
from scfeat_ros.staging import SUMMARY, check_apart, check_output, staged_folder
from scfeat_ros.video import VideoWriter, require_av

BAG, REPORT = "features", "report/index.html"
"""Paths in the output folder, next to the summary and the video."""
INLIER_THRESHOLD = 1.0
"""Threshold of the epipolar inlier ratio in the report, pixels."""
GEOMETRY_FROM = 400
"""Most matches from which a frame's fundamental matrix is estimated; all are tested against it."""
FRAMES_AT_ONCE = 2
"""Frames that are extracted concurrently: on a CPU each has a share of the threads; on a GPU one is
prepared and uploaded while the other is computed."""
FRAMES_AHEAD = 4
"""Most frames that are being extracted or wait for the matching."""
SWITCH_INTERVAL = 5e-4
"""Seconds after which a thread must release the GIL; Python's default is ten times as long."""
GROUP_BYTES = 8 << 20
"""Most bytes of passed-through messages that are grouped with the next frame."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written besides features, matches, report and summary.

    Attributes:
        video: name of the overlay video in the output folder (.mp4), None for none.
        overlay: whether the output bag contains the overlay images.
        passthrough: whether the output bag contains the input's messages.
        descriptor_type: of the features in the bag, "float32" or "int8".
        overwrite: whether an existing output may be replaced.
    """

    video: str | None = None
    overlay: bool = False
    passthrough: bool = False
    descriptor_type: str = "float32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        name = self.video
        if name is not None and (Path(name).name != name or not name.endswith(".mp4")):
            raise InputError(
                f"--video {name}: give the name of an .mp4 file, it is put into the output folder "
                "(the input comes before --video)"
            )


def run(
    source: Source,
    extractor: Extractor,
    output: Path,
    matching: MatcherOptions | None = None,
    options: OutputOptions | None = None,
    mask: np.ndarray | None = None,
    model_name: str = "",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Process a source and write the output folder.

    Reading and decoding, extraction, matching, and writing run on threads of their own with short
    queues in between, so that memory does not depend on the length of the input. Two frames are
    extracted concurrently: while one waits, for a core that reads or writes or for a GPU, the other
    continues.

    Args:
        source: where frames come from.
        extractor: of the front end.
        output: the folder to create.
        matching: how frames are matched, None for the defaults.
        options: what to write, None for the defaults.
        mask: (H, W), non-zero where keypoints are allowed.
        model_name: for the report.
        progress: whether to show a progress bar, None for "on a terminal".

    Returns:
        The content of summary.json.

    Raises:
        OutputExistsError: see `staging.staged_folder`.
        InputError: the source has no usable frame.
    """
    matching = matching or MatcherOptions()
    options = options or OutputOptions()
    with ExitStack() as stack:
        check_output(Path(output), options.overwrite)
        check_apart(output, source.path)
        if options.video:
            require_av()
        front_end = FrontEnd(extractor, matching)
        stack.enter_context(cores_awake(extractor.device))
        stack.enter_context(_parallel_stages())
        folder = stack.enter_context(staged_folder(output, options.overwrite))
        writer = _Writer(folder, options, source)
        began = time.perf_counter()
        try:
            groups = stack.enter_context(background(_grouped(source.frames())))
            results = stack.enter_context(background(_process(groups, front_end, mask)))
            bar = stack.enter_context(_progress_bar(len(source), progress))
            for item in results:
                if isinstance(item, RawMessage):
                    writer.pass_through(item)
                else:
                    writer.write(*item)
                    bar.update()
        except BaseException:
            writer.abort()
            raise
        if writer.statistics.frames == 0:
            writer.abort()
            raise InputError(_no_frames(source))
        seconds = time.perf_counter() - began
        settings = asdict(extractor.options) | asdict(matching) | asdict(options)
        model = {
            "name": model_name or extractor.model.config.name,
            "architecture": extractor.model.config.name,
            "descriptor_dim": extractor.descriptor_dim,
            "network": str(extractor.network),
            "device": str(extractor.device),
        }
        return writer.finish(seconds, model, settings)


@contextmanager
def _parallel_stages() -> Iterator[None]:
    """Settings of the process while stages run in parallel; the old ones are restored."""
    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    interval = sys.getswitchinterval()
    cv2.setNumThreads(1)
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        cv2.setNumThreads(cv_threads)
        torch.set_num_threads(threads)  # which `_process` changes


@dataclass
class _Group:
    """A frame, preceded by the messages that are passed through before it."""

    messages: list[RawMessage]
    frame: Frame | None = None
    features: Features | None = None
    extract_seconds: float = 0.0


def _grouped(items: Iterable[Frame | RawMessage]) -> Generator[_Group, None, None]:
    """Every frame with the messages before it; `GROUP_BYTES` of messages come without a frame."""
    group, size = _Group([]), 0
    for item in items:
        if isinstance(item, RawMessage):
            group.messages.append(item)
            size += len(item.data)
            if size < GROUP_BYTES:
                continue
        else:
            group.frame = item
        yield group
        group, size = _Group([]), 0
    yield group


def _process(
    groups: Iterable[_Group], front_end: FrontEnd, mask: np.ndarray | None
) -> Generator[tuple[Frame, FrameResult] | RawMessage, None, None]:
    extractor = front_end.extractor
    threads = torch.get_num_threads()

    def share_threads() -> None:
        torch.set_num_threads(max(1, threads // FRAMES_AT_ONCE))

    def extract(group: _Group) -> _Group:
        frame = group.frame
        if frame is not None:
            began = time.perf_counter()
            group.features = extractor(frame.image, mask=_mask_of(frame, mask))
            group.extract_seconds = time.perf_counter() - began
        return group

    if extractor.device.type != "cpu" or threads >= FRAMES_AT_ONCE:
        extracted = on_threads(extract, groups, FRAMES_AT_ONCE, FRAMES_AHEAD, share_threads)
        torch.set_num_threads(1)  # of the matching, which runs in parallel to the network
    else:
        extracted = (extract(group) for group in groups)
    with closing(extracted):
        for group in extracted:
            yield from group.messages
            frame = group.frame
            if frame is not None:
                seconds, camera = group.extract_seconds, frame.camera
                result = front_end.follow(
                    group.features, frame.stamp, frame.frame_id, seconds, camera
                )
                yield frame, result


def _mask_of(frame: Frame, mask: np.ndarray | None) -> np.ndarray | None:
    """Where keypoints are allowed: on valid pixels of the frame where `mask` is not zero.

    Raises:
        InputError: the mask is of another size than the frame.
    """
    if mask is None:
        return frame.mask
    if mask.shape != frame.image.shape[:2]:
        raise InputError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, the images are "
            f"{frame.image.shape[1]}x{frame.image.shape[0]}"
        )
    return mask if frame.mask is None else (mask != 0) & frame.mask


def _progress_bar(total: int, show: bool | None) -> tqdm:
    """Frames done, frames per second and, where the total is known, time left."""
    left = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    return tqdm(
        total=total or None,
        unit=" frames",
        bar_format=f"{{percentage:3.0f}} %|{{bar}}| {left}" if total else None,
        disable=None if show is None else not show,
        file=sys.stderr,
    )


def _no_frames(source: Source) -> str:
    account = source.account
    reasons = [f"{count} x {reason}" for reason, count in account.skipped.items()]
    reasons += account.damage.places[:2]
    text = f"{source.description['path']}: not a single frame could be read"
    if reasons:
        return f"{text} ({'; '.join(reasons)})"
    if source.description["start_s"] or source.description["duration_s"] is not None:
        return f"{text}; is the time range empty?"
    return f"{text}; there is none"


class _Writer:
    """Writes all output files of a run."""

    def __init__(self, folder: Path, options: OutputOptions, source: Source) -> None:
        self.folder = folder
        self.options = options
        self.source = source
        self.statistics = RunStatistics()
        self._bag = FeatureBagWriter(folder / BAG, options.descriptor_type, options.overlay)
        self._video: VideoWriter | None = None
        self._overlay = Overlay()
        self._samples = SampleFrames()
        # if the length is known, few overlays are drawn and then discarded
        self._sample_stride = max(1, len(source) // SAMPLES)
        self._previous: Frame | None = None
        self._previous_bearings: np.ndarray | None = None

    def pass_through(self, message: RawMessage) -> None:
        try:
            self._bag.write_input(message, self.source.reader)
        except UnreadableMessageError as error:
            self.source.account.damage.add(str(error), len(message.data), 1)

    def write(self, frame: Frame, result: FrameResult) -> None:
        began = time.perf_counter()
        bearings = frame.camera.bearings(result.features.keypoints) if frame.camera else None
        inliers = right = None
        if result.reset is None:
            one, other = result.matches.indices.T
            rays = None
            if bearings is not None and self._previous_bearings is not None:
                rays = self._previous_bearings[one], bearings[other]
            inliers, _ = epipolar_inliers(
                result.previous_keypoints,
                result.features.keypoints[other],
                INLIER_THRESHOLD,
                estimate_from=GEOMETRY_FROM,
                camera=frame.camera,
                bearings=rays,
            )
            right = self._judge(frame, rays)
        self._bag.write(result, bearings, frame.time)
        self._draw(frame, result, inliers)
        self._previous, self._previous_bearings = frame, bearings
        timings = result.timings | {
            "decode": frame.decode_seconds,
            "output": time.perf_counter() - began,
        }
        self.statistics.add(result, inliers, right, timings)

    def _judge(self, frame: Frame, rays: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray | None:
        """Which matches, of these bearings, are right by the recorded poses; None if unknown."""
        if rays is None or frame.pose is None or self._previous.pose is None:
            return None
        return right_matches(frame.camera, self._previous.pose, frame.pose, *rays)

    def _draw(self, frame: Frame, result: FrameResult, inliers: np.ndarray | None) -> None:
        """Draw the overlay if the video, the bag or the report needs it."""
        candidate = self.statistics.frames % self._sample_stride == 0
        sample = candidate and self._samples.wants_next()
        if candidate and not sample:
            self._samples.skip()
        if not (sample or self.options.video or self.options.overlay):
            self._overlay.follow(result)
            return
        picture = self._overlay.draw(frame.image, result)
        if self.options.video:
            if self._video is None:
                self._video = VideoWriter(self.folder / self.options.video, picture.shape[1::-1])
            self._video.write(picture, result.stamp)
        if self.options.overlay:
            self._bag.write_overlay(picture, result, frame.time)
        if sample:
            caption = (
                f"Frame {self.statistics.frames}, {frame.name}: {len(result.features)} keypoints"
            )
            if result.reset is None:
                caption += f", {len(result.matches)} matches, {int(inliers.sum())} inliers"
            self._samples.add(picture, caption)

    def finish(
        self, seconds: float, model: dict[str, Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Close all files, write report and summary, return the summary."""
        self._bag.close()
        if self._video is not None:
            self._video.close()
        self.statistics.finish()
        account = self.source.account
        for topic, reason in self._bag.not_passed.items():
            account.warn(f"{topic} was not passed through: {reason}")
        for reason, count in self.statistics.resets.items():
            remedy = "; --max-gap sets how long a gap may be" if reason == "gap" else ""
            account.warn(f"tracking was reset {count} times: {reason}{remedy}")
        poses = self.source.description.get("pose_topic")
        if poses and not self.statistics.judged:
            account.warn(
                f"no match could be judged by {poses}: it takes a CameraInfo, poses at the times "
                "of the images, and a camera that moves"
            )
        figures = self.statistics.summary()
        if figures["keypoints_per_frame"] and not figures["keypoints_per_frame"]["mean"]:
            account.warn(
                "no keypoint was found in any frame: are the images blank, or is --max-size, "
                "--border, --score-threshold or --mask too strict?"
            )
        summary = {
            "version": __version__,
            "input": self.source.description,
            "model": model,
            "options": settings,
            **figures,
            "duration_s": (self.statistics.last_stamp - self.statistics.first_stamp) * 1e-9,
            "processing_s": round(seconds, 3),
            "frames_per_second": round(self.statistics.frames / seconds, 3),
            "peak_memory_mib": peak_memory(),
            "thresholds_px": {
                "epipolar_inlier": INLIER_THRESHOLD,
                "right_by_ground_truth": RIGHT_WITHIN,
            },
            "frames_skipped": dict(account.skipped),
            "damage": asdict(account.damage),
            "warnings": account.warnings,
            "damaged": account.is_damaged,
        }
        page = self.folder / REPORT
        page.parent.mkdir()
        title = f"SCFeat on {Path(self.source.description['path']).resolve().name}"
        page.write_text(
            render(title, summary, self.statistics, self._samples.chosen()), encoding="utf-8"
        )
        # written last: it marks a complete output
        (self.folder / SUMMARY).write_text(
            json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        return summary

    def abort(self) -> None:
        """Close all files; the folder will be removed."""
        self._bag.abort()
        if self._video is not None:
            with suppress(Exception):  # the error that led here is the one to report
                self._video.close()


def peak_memory() -> float | None:
    """Peak resident memory of this process in MiB; None on a system that does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def figures_text(summary: dict[str, Any], output: Path) -> str:
    """Statistics and output paths of a finished run, for the terminal."""

    def rows() -> Iterator[tuple[str, str]]:
        yield "frames", f"{summary['frames']}, {summary['frames_per_second']:.1f} per second"
        for key, name in (
            ("keypoints_per_frame", "keypoints per frame"),
            ("matches_per_frame", "matches per frame"),
        ):
            if summary[key]:
                yield name, f"{summary[key]['mean']:.0f}"
        if summary["epipolar_inlier_ratio"]:
            ratio = summary["epipolar_inlier_ratio"]["mean"]
            yield "fit one epipolar geometry", f"{100 * ratio:.1f} %"
        if summary["ground_truth"]:
            share = summary["ground_truth"]["share"]
            yield "right by ground truth", f"{100 * share:.1f} % (within {RIGHT_WITHIN:g} px)"
        if summary["tracks"]:
            yield "track length", f"{summary['tracks']['mean_length']:.1f} frames (mean)"
        for reason, count in summary["frames_skipped"].items():
            yield "skipped", f"{count} x {reason}"
        damage = summary["damage"]
        if damage["places"]:
            yield "lost", f"{damage['bytes_lost']} bytes, {damage['messages_lost']} messages"
            for place in damage["places"]:
                yield "", place
        for warning in summary["warnings"]:
            yield "note", warning
        yield "output bag", str(output / BAG)
        if summary["options"]["video"]:
            yield "overlay video", str(output / summary["options"]["video"])
        yield "report", str(output / REPORT)
        yield "summary", str(output / SUMMARY)

    lines = list(rows())
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
