"""What the node does with one image: decode, extract and match, encode, publish, count."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rclpy.impl.rcutils_logger import RcutilsLogger
from sensor_msgs.msg import CameraInfo, Image

from scfeat_ros.camera import Camera
from scfeat_ros.decoded_image import DecodedImage, from_compressed
from scfeat_ros.diagnostics import Level, Monitor, Problems
from scfeat_ros.errors import InputError
from scfeat_ros.memory import free_memory, is_out_of_memory
from scfeat_ros.messages import (
    encode_features,
    encode_image,
    encode_matches,
    ros_types,
    stamp_to_nanoseconds,
)
from scfeat_ros.node_parameters import ExtractorOptions, MatcherOptions, NodeOptions
from scfeat_ros.overlay import Overlay
from scfeat_ros.ros_image import ImageDecoder
from scfeat_ros.rtabmap import DepthBuffer, encode_rgbd
from scfeat_ros.vins import encode_tracks

if TYPE_CHECKING:
    from scfeat_ros.features import FrameResult
    from scfeat_ros.frontend import FrontEnd

MOST_WARM_SIZES = 10
"""Most image sizes that the network is warmed up for; a camera has one, a faulty driver many."""
OUTPUT_CONDITIONS = {
    "calibration": {"features", "matches", "tracks"},
    "tracks": {"tracks"},
    "rgbd": {"rgbd_image"},
}
"""Outputs that a condition concerns; it is cleared while none of them has a subscriber."""


@dataclass(frozen=True)
class Frame:
    """An image message and when its callback ran (time.perf_counter)."""

    message: Any
    arrived: float


class FrameProcessor:
    """Processes one image after the other, on the worker's thread.

    Calibration, depth images and changes of live parameters arrive on the executor's thread, by
    other methods; each takes effect as a whole.

    Args:
        front_end: features, matches and tracks.
        options: of the node.
        decoder: of image messages.
        outputs: publishers by name: features, matches, overlay, tracks, rgbd_image.
        monitor, problems: collect what diagnostics and log report.
        logger: of the node.
        rtabmap_messages: the module rtabmap_msgs.msg if there is an output rgbd_image.
        warm_size: (width, height) that the network was warmed up for.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        options: NodeOptions,
        decoder: ImageDecoder,
        outputs: dict[str, Any],
        monitor: Monitor,
        problems: Problems,
        logger: RcutilsLogger,
        rtabmap_messages: Any = None,
        warm_size: tuple[int, int] | None = None,
    ) -> None:
        self.front_end = front_end
        self.options = options
        self._decoder = decoder
        self._outputs = outputs
        self._monitor = monitor
        self._problems = problems
        self._logger = logger
        self._rtabmap_messages = rtabmap_messages
        self._types = ros_types()
        self._overlay = Overlay()
        self._camera: Camera | None = None
        self._camera_info: CameraInfo | None = None
        self._depth_images = DepthBuffer()
        self._warm_sizes = {warm_size} if warm_size else set()
        self._previous_done = 0.0
        self._out_of_memory = False

    def apply(self, changes: dict[str, Any]) -> None:
        """Take over live parameters, already checked; the next image is processed with them."""
        groups = {
            group: {name: changes[name] for name in changes if name in group.__dataclass_fields__}
            for group in (NodeOptions, ExtractorOptions, MatcherOptions)
        }
        self.options = replace(self.options, **groups[NodeOptions])
        if groups[ExtractorOptions]:
            self.front_end.extractor.set_options(**groups[ExtractorOptions])
        if groups[MatcherOptions]:
            self.front_end.set_matching(**groups[MatcherOptions])
        if "max_size" in changes:  # the user's value replaces that of `_shrink`
            self._out_of_memory = False
            self._monitor.clear_condition("memory")
            self._monitor.set_facts(size_limit=None)

    def set_camera_info(self, message: CameraInfo) -> None:
        """Use this calibration from the next image on."""
        self._camera_info = message
        try:
            camera = Camera.from_message(message, self.options.rectified)
        except InputError as error:
            camera = None
            self._problems.report("camera", Level.WARN, f"{error}; features have no bearings")
        else:
            if camera is not None and camera.same_as(self._camera):
                return  # keep the old one, which has cached its inverse
            self._monitor.clear_condition("camera")
        self._camera = camera
        self._monitor.set_facts(
            camera="uncalibrated: no bearings"
            if self._camera is None
            else f"{self._camera.model} {message.width}x{message.height}"
        )

    def add_depth(self, message: Image) -> None:
        """Keep a depth image for the image with the same stamp."""
        self._depth_images.add(stamp_to_nanoseconds(message.header.stamp), message)

    def pause(self) -> None:
        """Forget all input; called when the subscriptions are gone and no frame is processed."""
        self._camera = self._camera_info = None
        self._depth_images.clear()
        self.front_end.reset()

    def process(self, frame: Frame) -> None:
        """One image from message to messages; never raises."""
        started = time.perf_counter()
        # time spent on the previous frame does not count as overhead of this one
        waited = max(0.0, min(started, self._previous_done) - frame.arrived)
        try:
            image = self._decode(frame.message)
            decoded = time.perf_counter()
            if image.note:
                self._problems.report("pixels", Level.WARN, f"of the image's pixels {image.note}")
            else:
                self._monitor.clear_condition("pixels")
            waited += self._warm_up(image.pixels.shape[1::-1])
            result = self._extract(image, frame.message.header)
            extracted = time.perf_counter()
            self._publish(frame.message, image, result)
            done = time.perf_counter()
            self._count(frame, result, image, waited, decoded - started, done - extracted, done)
        except InputError as error:
            self._monitor.failed(str(error))
            self._problems.log(Level.ERROR, f"image left out: {error}")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._monitor.failed(text)
            # any other error is a bug, and needs its traceback
            detail = text if is_out_of_memory(error) else f"\n{traceback.format_exc()}"
            self._problems.log(Level.ERROR, f"image left out: {detail}")
        finally:
            self._previous_done = time.perf_counter()

    def _decode(self, message: Any) -> DecodedImage:
        if hasattr(message, "format"):
            return from_compressed(message)
        return self._decoder.decode(message)

    def _extract(self, image: DecodedImage, header: Any) -> FrameResult:
        size = image.pixels.shape[1::-1]
        stamp = stamp_to_nanoseconds(header.stamp)
        camera = self._camera if self._camera is not None and self._camera.fits(size) else None
        inputs = image.pixels, stamp, header.frame_id, image.mask, camera
        try:
            return self.front_end.process(*inputs)
        except Exception as error:
            if not is_out_of_memory(error) or self._out_of_memory:
                raise
            text = self._shrink(size)
        # outside of the handler, which keeps the failed attempt's tensors alive
        free_memory()
        self._problems.report("memory", Level.WARN, text)
        return self.front_end.process(*inputs)

    def _warm_up(self, size: tuple[int, int]) -> float:
        """Run the network once on an image size that is new to it; returns the seconds it took."""
        if size in self._warm_sizes or len(self._warm_sizes) >= MOST_WARM_SIZES:
            return 0.0
        self._warm_sizes.add(size)
        started = time.perf_counter()
        try:
            self.front_end.extractor.warm_up(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return 0.0  # the image itself will fail, too, and is handled
        seconds = time.perf_counter() - started
        self._logger.info(
            f"first image of {size[0]}x{size[1]}: warmed up for it in {seconds:.2f} s"
        )
        return seconds

    def _shrink(self, size: tuple[int, int]) -> str:
        """Halve the working size, once; returns the warning to report."""
        self._out_of_memory = True
        extractor = self.front_end.extractor
        limit = extractor.options.max_size or max(size)
        half = max(1, min(limit, max(size)) // 2)
        extractor.set_options(max_size=half)
        extractor.clear()
        self._monitor.set_facts(size_limit=f"{half} px, after out of memory")
        return (
            f"out of memory on {extractor.device} at {size[0]}x{size[1]}: images are shrunk to "
            f"{half} px until max_size is set; set it to {half} or less for good"
        )

    def _publish(self, message: Any, image: DecodedImage, result: FrameResult) -> None:
        """Encode and publish the outputs that have subscribers."""
        wanted = {
            name: publisher
            for name, publisher in self._outputs.items()
            if publisher.get_subscription_count() > 0
        }
        if not self.options.overlay:
            wanted.pop("overlay", None)
        self._monitor.set_facts(outputs=" ".join(sorted(wanted)) or "nobody subscribes")
        for condition, outputs in OUTPUT_CONDITIONS.items():
            if not wanted.keys() & outputs:
                self._monitor.clear_condition(condition)
        camera = bearings = None
        if wanted.keys() & OUTPUT_CONDITIONS["calibration"]:
            camera = self._camera_for(result)
        if camera is not None:
            bearings = camera.bearings(result.features.keypoints)
        if "features" in wanted:
            wanted["features"].publish(
                encode_features(result, bearings, self._types, self.options.descriptor_type)
            )
        if "matches" in wanted:
            wanted["matches"].publish(encode_matches(result, bearings, self._types))
        if "tracks" in wanted:
            if camera is None:
                text = "~/tracks needs a calibrated camera: no usable camera_info came in"
                self._problems.report("tracks", Level.WARN, text)
            else:
                self._monitor.clear_condition("tracks")
                wanted["tracks"].publish(
                    encode_tracks(
                        message.header,
                        result,
                        bearings,
                        camera.bearings(result.previous_keypoints),
                        self.options.tracks,
                        self.options.tracks_max,
                        self.options.tracks_min_distance,
                    )
                )
        if "overlay" in wanted:
            picture = self._overlay.draw(image.pixels, result)
            wanted["overlay"].publish(
                encode_image(picture, result.stamp, result.frame_id, self._types)
            )
        if "rgbd_image" in wanted:
            self._publish_rgbd(wanted["rgbd_image"], message, result)

    def _publish_rgbd(self, publisher: Any, message: Any, result: FrameResult) -> None:
        depth = self._depth_images.nearest(result.stamp, self.options.rgbd_tolerance)
        camera_info = self._camera_info
        if depth is None or camera_info is None:
            missing = "camera_info" if camera_info is None else "depth image in time"
            text = f"~/rgbd_image left out: no {missing}"
            self._problems.report("rgbd", Level.WARN, text)
            return
        self._monitor.clear_condition("rgbd")
        publisher.publish(
            encode_rgbd(message, depth, camera_info, result.features, self._rtabmap_messages)
        )

    def _camera_for(self, result: FrameResult) -> Camera | None:
        """The calibration, if there is one for images of this size."""
        camera = self._camera
        size = result.features.image_size
        if camera is None or camera.fits(size):
            self._monitor.clear_condition("calibration")
            return camera
        width, height = camera.image_size
        self._problems.report(
            "calibration",
            Level.WARN,
            f"camera_info is for images of {width}x{height}, the image is of "
            f"{size[0]}x{size[1]}: features have no bearings",
        )
        return None

    def _count(
        self,
        frame: Frame,
        result: FrameResult,
        image: DecodedImage,
        waited: float,
        decoding: float,
        publishing: float,
        done: float,
    ) -> None:
        total = done - frame.arrived
        seconds = {
            "wait": waited,
            "decode": decoding,
            **result.timings,
            "publish": publishing,
            "total": total,
            "overhead": total - waited - sum(result.timings.values()),
        }
        height, width = image.pixels.shape[:2]
        facts = {
            "image size": f"{width}x{height}",
            "keypoints": len(result.features),
            "matches": len(result.matches),
        }
        if result.reset is not None:
            facts["last tracker reset"] = result.reset
            if result.reset != "first frame":
                text = f"tracks reset: {result.reset}"
                self._monitor.event(Level.WARN, text)
                self._problems.log(Level.WARN, text)
        self._monitor.served(seconds, facts, result.reset is not None)
