"""Where frames come from: a bag, a folder of images, a video."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scfeat_ros.bags import CAMERA_INFO, BagReader, UnreadableMessageError
from scfeat_ros.camera import Camera
from scfeat_ros.decoded_image import UnknownEncodingError, UnreadableImageError
from scfeat_ros.errors import InputError, without_numbers
from scfeat_ros.ground_truth import DEFAULT_TOPIC, POSE_TYPES, Pose, PoseTrack
from scfeat_ros.images import from_message, read_file
from scfeat_ros.messages import stamp_to_nanoseconds
from scfeat_ros.names import natural_order, printable
from scfeat_ros.recovery import Damage, RawMessage
from scfeat_ros.video import VIDEO_SUFFIXES, count_frames, read_video, require_av, stated_duration

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_GIVE_UP_AFTER = 3  # images of an unknown encoding, where none could be read
_PATIENCE = 20  # images that wait for a later CameraInfo or pose
_RECENT = 10_000_000_000  # nanoseconds before a time range, in which a CameraInfo is sought first
_FOREVER = 1e9
"""Upper bound of a recording's length, seconds."""
_ALL_TIME = (0, math.inf)


@dataclass
class Frame:
    """One image of a source.

    Attributes:
        image: (H, W, 3) uint8 RGB or (H, W) uint8 grey.
        stamp: capture time, nanoseconds.
        frame_id: the camera's optical frame.
        time: recording time, nanoseconds; the time of the output messages.
        name: for display: the file, or the seconds since the first frame.
        camera: calibration, None if unknown.
        pose: pose of the camera in the world, None if unknown.
        decode_seconds: how long reading and decoding took.
        mask: (H, W) bool, True where pixels are valid; None if all are.
    """

    image: np.ndarray
    stamp: int
    frame_id: str
    time: int
    name: str
    camera: Camera | None = None
    pose: Pose | None = None
    decode_seconds: float = 0.0
    mask: np.ndarray | None = None


@dataclass
class Account:
    """Problems in reading a source that did not stop it.

    Attributes:
        damage: lost parts of the input.
        skipped: reason -> number of frames that could not be used.
        warnings: for the user, each once.
    """

    damage: Damage = field(default_factory=Damage)
    skipped: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        text = printable(text)
        if text not in self.warnings:
            self.warnings.append(text)

    def skip(self, reason: str) -> None:
        """Count a frame that cannot be used; reasons that differ only in numbers count as one."""
        reason = printable(reason)
        kind = without_numbers(reason)
        same = (known for known in self.skipped if without_numbers(known) == kind)
        self.skipped[next(same, reason)] += 1

    @property
    def is_damaged(self) -> bool:
        """Whether something of the input was lost."""
        return bool(self.damage) or bool(self.skipped)


class Source(Protocol):
    """Gives frames in order.

    Attributes:
        path: what is read.
        description: the same and how, for the report.
        account: problems; complete after the last frame.
    """

    path: Path
    description: dict[str, Any]
    account: Account

    def __len__(self) -> int:
        """Expected number of frames, 0 if unknown."""

    def frames(self) -> Iterator[Frame | RawMessage]:
        """Frames; and, from a bag whose input is passed through, its messages in between."""

    def close(self) -> None: ...


@dataclass
class _Waiting:
    """An image message that waits for its CameraInfo and pose."""

    message: RawMessage
    content: Any
    stamp: int
    seconds: float


class BagSource:
    """Frames of an image topic of a bag, with calibration and poses.

    Args:
        path: the bag.
        topic: image topic; None takes the only one.
        camera_info: CameraInfo topic; None takes the one in the image topic's namespace or the
            nearest parent of it, or else the only one if there is a single image topic.
        poses: topic with the camera's pose; None takes /ground_truth/pose if there is one.
        every: use every n-th image.
        start: seconds to leave out at the beginning.
        duration: seconds to use, None for all.
        passthrough: whether `frames` also yields all messages of the bag.
        rectified: whether the images are rectified, see `Camera.from_message`.

    Raises:
        InputError: no bag, or no such topic; the text lists the candidates.
    """

    def __init__(
        self,
        path: Path,
        topic: str | None = None,
        camera_info: str | None = None,
        poses: str | None = None,
        every: int = 1,
        start: float = 0.0,
        duration: float | None = None,
        passthrough: bool = False,
        rectified: bool = False,
    ) -> None:
        self._time_range = _check_range(every, start, duration)
        self.path = path
        self.reader = BagReader(path)
        self.account = Account(damage=self.reader.damage)
        self.every = every
        self.passthrough, self.rectified = passthrough, rectified
        self._decoded = False
        self._uncalibrated = 0
        self._first_stamp: int | None = None
        try:
            self.topic = self._image_topic(topic)
            self.camera_info = self._camera_info_topic(camera_info)
            self.poses = self._pose_topic(poses)
        except InputError:
            self.close()
            raise
        self.description = {
            "path": printable(path),
            "image_topic": self.topic,
            "camera_info_topic": self.camera_info,
            "rectified": rectified,
            "pose_topic": self.poses,
            "every": every,
            "start_s": start,
            "duration_s": duration,
        }

    def __len__(self) -> int:
        count = self.reader.topics[self.topic].count
        if count is None or self._time_range != _ALL_TIME:
            return 0
        return -(-count // self.every)

    def close(self) -> None:
        self.reader.close()

    def _image_topic(self, asked: str | None) -> str:
        images = self.reader.image_topics
        listing = ", ".join(
            f"{t.name} ({t.type.split('/')[-1]}" + (f", {t.count})" if t.count else ")")
            for t in images
        )
        if asked is not None:
            if any(t.name == asked for t in images):
                return asked
            known = self.reader.topics.get(asked)
            problem = f"is of type {known.type}, not an image" if known else "is not in the bag"
            raise InputError(
                f"{self.path}: topic {asked} {problem}; image topics: {listing or 'none'}"
            )
        lost = f" ({self.reader.damage.places[0]})" if self.reader.damage else ""
        if not self.reader.topics:
            raise InputError(f"{self.path}: no topic can be read of this bag{lost}")
        if not images:
            others = ", ".join(self.reader.topics)
            raise InputError(
                f"{self.path}: the bag has no image topic, its topics are {others}{lost}"
            )
        if len(images) > 1:
            raise InputError(
                f"{self.path}: the bag has several image topics, choose one with --topic: {listing}"
            )
        return images[0].name

    def _camera_info_topic(self, asked: str | None) -> str | None:
        known = [t.name for t in self.reader.topics.values() if t.type == CAMERA_INFO]
        if asked is not None:
            if asked not in known:
                raise InputError(
                    f"{self.path}: no CameraInfo topic {asked}; there are: "
                    f"{', '.join(known) or 'none'}"
                )
            return asked
        namespace = self.topic.removesuffix("/compressed")
        while "/" in namespace:
            namespace = namespace.rpartition("/")[0]
            if f"{namespace}/camera_info" in known:
                return f"{namespace}/camera_info"
        return known[0] if len(known) == 1 and len(self.reader.image_topics) == 1 else None

    def _pose_topic(self, asked: str | None) -> str | None:
        known = [t.name for t in self.reader.topics.values() if t.type in POSE_TYPES]
        if asked is not None and asked not in known:
            raise InputError(
                f"{self.path}: no pose topic {asked} (PoseStamped or Odometry); there are: "
                f"{', '.join(known) or 'none'}"
            )
        return asked or (DEFAULT_TOPIC if DEFAULT_TOPIC in known else None)

    def frames(self) -> Iterator[Frame | RawMessage]:
        calibration = None
        if self.camera_info:
            calibration = _Calibration(self.account, self.rectified)
        track = PoseTrack() if self.poses else None
        waiting: deque[_Waiting] = deque()
        images = 0
        if calibration and self._time_range[0]:
            message = self._last_calibration()
            if message is not None:
                calibration.update(self._decode(message))
        began = time.perf_counter()
        for message in self._messages():
            seconds = time.perf_counter() - began
            if self.passthrough:
                yield message
            if message.topic == self.topic:
                images += 1
                if (images - 1) % self.every == 0:
                    content = self._decode(message)
                    stamp = self._stamp(message, content)
                    if stamp is not None:
                        waiting.append(_Waiting(message, content, stamp, seconds))
            elif message.topic == self.camera_info:
                calibration.update(self._decode(message))
            elif message.topic == self.poses:
                content = self._decode(message)
                stamp = self._stamp(message, content)
                if stamp is not None:
                    track.add(stamp, content)
            while waiting and (
                len(waiting) > _PATIENCE
                or (
                    (calibration is None or calibration.received)
                    and (track is None or track.covers(waiting[0].stamp))
                )
            ):
                yield from self._frame(waiting.popleft(), calibration, track)
            began = time.perf_counter()
        while waiting:
            yield from self._frame(waiting.popleft(), calibration, track)
        if calibration is not None and not calibration.received:
            self.account.warn(f"no usable message on {self.camera_info}: bearings are NaN")
        elif self._uncalibrated:
            self.account.warn(
                f"{self._uncalibrated} images came before the first message on "
                f"{self.camera_info}: their bearings are NaN"
            )

    def _last_calibration(self) -> RawMessage | None:
        """The last CameraInfo before the time range: some cameras send it once, at the start."""
        begin, _ = self._range(self._first_time())
        # without an index everything before is read in any case
        for since in (begin - _RECENT, 0) if self.reader.is_indexed else (0,):
            before = self.reader.messages([self.camera_info], max(0, since), begin)
            last = deque(before, maxlen=1)
            if last:
                return last[0]
        return None

    def _first_time(self) -> int:
        """Start of the recording; without an index, the time of the first message of any topic."""
        known = self.reader.start_time
        if known is not None:
            return known
        return next((m.time for m in self.reader.messages(complete=False)), 0)

    def _messages(self) -> Iterator[RawMessage]:
        """Messages of the time range."""
        wanted = {self.topic, self.camera_info, self.poses} - {None}
        topics = None if self.passthrough else wanted
        if self._time_range == _ALL_TIME:
            yield from self.reader.messages(topics)
            return
        yield from self.reader.messages(topics, *self._range(self._first_time()))

    def _range(self, first: int) -> tuple[int, int | None]:
        start, stop = self._time_range
        return first + start, None if stop == math.inf else first + stop

    def _decode(self, message: RawMessage) -> Any | None:
        try:
            return self.reader.decode(message)
        except UnreadableMessageError as error:
            if message.topic == self.topic:
                self.account.skip("message cannot be decoded")
            else:
                self.account.damage.add(str(error), len(message.data), 1)
            return None

    def _stamp(self, message: RawMessage, content: Any | None) -> int | None:
        """Time in the header, or, if that is zero, of the recording; None if it is invalid."""
        if content is None:
            return None
        stamp = stamp_to_nanoseconds(content.header.stamp)
        if not -(2**31) <= stamp // 10**9 < 2**31:
            text = f"stamp that ROS 2 cannot express ({stamp // 10**9} s)"
            if message.topic == self.topic:
                self.account.skip(text)
            else:
                place = f"{message.topic} at {message.time} ns: {text}"
                self.account.damage.add(place, len(message.data), 1)
            return None
        if stamp == 0:
            self.account.warn(f"{message.topic} has no stamps: the times of the recording are used")
            return message.time
        return stamp

    def _frame(
        self, waiting: _Waiting, calibration: _Calibration | None, track: PoseTrack | None
    ) -> Iterator[Frame]:
        """The frame of an image message; nothing where it cannot be read."""
        began = time.perf_counter()
        try:
            image = from_message(waiting.content)
        except UnknownEncodingError as error:
            # a wrong name now and then is damage
            self.account.skip(str(error))
            if not self._decoded and self.account.skipped.total() >= _GIVE_UP_AFTER:
                raise InputError(f"{self.topic}: {error}") from error
            return
        except UnreadableImageError as error:
            self.account.skip(str(error))
            return
        self._decoded = True
        if image.mask is not None:
            self.account.warn(f"{self.topic}: pixels that are NaN or infinite have no keypoints")
        if self._first_stamp is None:
            self._first_stamp = waiting.stamp
        camera = calibration.camera if calibration else None
        if calibration is not None and not calibration.received:
            self._uncalibrated += 1
        height, width = image.pixels.shape[:2]
        if camera is not None and not camera.fits((width, height)):
            self.account.warn(
                f"{self.camera_info} is for {camera.image_size[0]}x{camera.image_size[1]} images, "
                f"those on {self.topic} are {width}x{height}: bearings are NaN"
            )
            camera = None
        frame_id = waiting.content.header.frame_id
        if track and track.frame_id not in ("", frame_id):
            self.account.warn(
                f"{self.poses} has the poses of '{track.frame_id}', the images are of "
                f"'{frame_id}': what is right by them is so only if the two are one frame"
            )
        seconds = waiting.seconds + time.perf_counter() - began
        yield Frame(
            image=image.pixels,
            stamp=waiting.stamp,
            frame_id=frame_id,
            time=waiting.message.time,
            name=f"{(waiting.stamp - self._first_stamp) * 1e-9:.2f} s",
            camera=camera,
            pose=track.at(waiting.stamp) if track else None,
            decode_seconds=seconds,
            mask=image.mask,
        )


class _Calibration:
    """The camera of the latest CameraInfo."""

    def __init__(self, account: Account, rectified: bool) -> None:
        self.account = account
        self.rectified = rectified
        self.received = False
        self.camera: Camera | None = None

    def update(self, message: Any | None) -> None:
        """Use a sensor_msgs/CameraInfo; None for one that could not be decoded."""
        if message is None:
            return
        self.received = True
        try:
            camera = Camera.from_message(message, self.rectified)
        except (InputError, ValueError) as error:
            self.account.warn(f"{error}: bearings are NaN")
            self.camera = None
            return
        if camera is None:
            self.account.warn("the camera is not calibrated (K or P is zero): bearings are NaN")
        elif camera.same_as(self.camera):
            return  # keep the old one, which has cached its inverse
        self.camera = camera


class FolderSource:
    """The images of a folder in natural order (img2 before img10).

    Args:
        path: the folder.
        rate: frames per second, for the stamps.
        every: use every n-th image.
        start, duration: use only images of these seconds, None for all to the end.

    Raises:
        InputError: the folder is not there or has no images.
    """

    def __init__(
        self,
        path: Path,
        rate: float = 10.0,
        every: int = 1,
        start: float = 0.0,
        duration: float | None = None,
    ) -> None:
        if not 1e-6 < rate < 1e9:
            raise InputError(f"--rate must lie between 1e-6 and 1e9 Hz, got {rate}")
        self.path = path
        first, stop = _check_range(every, start, duration)
        stamped = [(round(i / rate * 1e9), file) for i, file in enumerate(list_images(path))]
        self.files = [(stamp, file) for stamp, file in stamped if first <= stamp < stop][::every]
        self.account = Account()
        self.description = {
            "path": printable(path),
            "rate_hz": rate,
            "every": every,
            "start_s": start,
            "duration_s": duration,
        }

    def __len__(self) -> int:
        return len(self.files)

    def close(self) -> None:
        pass

    def frames(self) -> Iterator[Frame]:
        for stamp, file in self.files:
            began = time.perf_counter()
            try:
                image = read_file(file)
            except InputError as error:
                self.account.skip("image cannot be decoded")
                self.account.damage.add(str(error), file.stat().st_size if file.exists() else 0, 1)
                continue
            seconds = time.perf_counter() - began
            name = printable(file.name)
            yield Frame(image, stamp, "camera", stamp, name, decode_seconds=seconds)


class VideoSource:
    """The frames of a video.

    Args:
        path: the file.
        every: use every n-th frame.
        start, duration: use only frames of these seconds, None for all to the end.

    Raises:
        InputError: the file is not there.
        ScfeatError: PyAV is not installed.
    """

    def __init__(
        self, path: Path, every: int = 1, start: float = 0.0, duration: float | None = None
    ) -> None:
        require_av()
        self._time_range = _check_range(every, start, duration)
        if not path.is_file():
            raise InputError(f"{path}: no such file or folder")
        self.path, self.every = path, every
        self.account = Account()
        self.description = {
            "path": printable(path),
            "every": every,
            "start_s": start,
            "duration_s": duration,
        }

    def __len__(self) -> int:
        if self._time_range != _ALL_TIME:
            return 0
        return -(-(count_frames(self.path) or 0) // self.every)

    def close(self) -> None:
        pass

    def frames(self) -> Iterator[Frame]:
        decoded = read_video(self.path)
        start, stop = self._time_range
        first = None
        index = used = 0
        while True:
            began = time.perf_counter()
            try:
                image, stamp, damaged = next(decoded)
            except StopIteration:
                break
            except InputError as error:
                if index == 0:
                    raise
                self.account.damage.add(str(error))
                break
            first = stamp if first is None else first  # not always 0
            since_first = stamp - first
            if since_first >= stop:
                return
            index += 1
            if since_first < start:
                continue
            name = f"{since_first * 1e-9:.2f} s"
            if damaged:
                self.account.damage.add(f"{self.path}: the frame at {name} is damaged")
            if used % self.every == 0:
                seconds = time.perf_counter() - began
                yield Frame(image, stamp, "camera", stamp, name, decode_seconds=seconds)
            used += 1
        if index:
            self._compare_length(index, stamp * 1e-9)

    def _compare_length(self, frames: int, end: float) -> None:
        """Report missing frames, by their number or, if that is unknown, by the duration.

        Args:
            frames: number of frames read.
            end: time of the last one, seconds.
        """
        expected = count_frames(self.path)
        if expected:
            missing = expected - frames
            if missing > 0:
                text = f"{self.path}: {missing} of {expected} frames are missing"
                self.account.damage.add(text, lost_messages=missing)
            return
        duration = stated_duration(self.path) or 0.0
        if frames > 1 and duration - end > max(0.1 * duration, 3 * end / frames):
            # (or the last frame has a long duration)
            text = f"{self.path} ends after {end:.2f} s of {duration:.2f} s: is it cut off?"
            self.account.warn(text)


def _check_range(every: int, start: float, duration: float | None) -> tuple[int, float]:
    """Check which frames are asked for; returns their times, [from, to) in nanoseconds.

    Without a duration `to` is infinite.

    Raises:
        InputError: a value outside its range.
    """
    if every < 1:
        raise InputError(f"--every must be at least 1, got {every}")
    if not (0 <= start < _FOREVER and (duration is None or 0 < duration < _FOREVER)):
        raise InputError(
            "--start must not be negative and --duration must be positive, in seconds, got "
            f"{start} and {duration}"
        )
    first = round(start * 1e9)
    return first, math.inf if duration is None else first + round(duration * 1e9)


def open_images(
    path: Path,
    rate: float = 10.0,
    every: int = 1,
    start: float = 0.0,
    duration: float | None = None,
) -> FolderSource | VideoSource:
    """A folder of images or a video, whichever the path is."""
    if path.is_dir():
        return FolderSource(path, rate, every, start, duration)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{path}: this is a single image; give its folder, or a video")
    if path.is_file() and path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(
            f"{path}: neither a folder nor a video ({', '.join(VIDEO_SUFFIXES)}); for a bag use "
            "`scfeat bag`"
        )
    return VideoSource(path, every, start, duration)


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, and of folders in it if `recursive`, in natural order.

    Raises:
        InputError: the folder is not there or has no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files = image_files(folder.rglob("*") if recursive else folder.iterdir())
    if not files:
        raise InputError(f"{folder}: no images here ({', '.join(IMAGE_SUFFIXES)})")
    return files


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The images among some paths, without hidden files, in natural order (img2 before img10)."""
    files = [
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and not path.is_dir()
    ]
    return sorted(files, key=lambda path: natural_order(str(path)))
