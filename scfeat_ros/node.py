"""The ROS 2 lifecycle node: camera images in, features, matches, overlay and diagnostics out.

PyTorch is imported when the node is configured, so that an unconfigured node costs little and
a signal ends it at any time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud, PointCloud2

from scfeat_ros.camera import Camera
from scfeat_ros.diagnostics import Level, Monitor
from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.matched_subscription import MatchedSubscription
from scfeat_ros.messages import (
    encode_features,
    encode_image,
    encode_matches,
    ros_types,
    stamp_to_nanoseconds,
)
from scfeat_ros.node_parameters import (
    ExtractorOptions,
    MatcherOptions,
    NodeOptions,
    build,
    parameter_fields,
    refusal,
)
from scfeat_ros.overlay import Overlay
from scfeat_ros.ros_image import DecodedImage, ImageDecoder
from scfeat_ros.rtabmap import DepthBuffer, encode_rgbd
from scfeat_ros.vins import encode_tracks
from scfeat_ros.worker import NewestFirstWorker

if TYPE_CHECKING:
    from scfeat_ros.features import FrameResult
    from scfeat_ros.frontend import FrontEnd

WATCH_PERIOD = 0.5
"""Seconds between looks at the publishers of the input topics."""
STOP_TIMEOUT = 1.0
"""Seconds that the end of the process waits for a frame in work."""
SPIN_TIMEOUT = 0.2
"""Seconds after which the executor looks whether the process is to end."""
LOG_AGAIN = 10.0
"""Seconds after which the same problem is logged again."""


@dataclass(frozen=True)
class Frame:
    """An image message and when its callback ran (time.perf_counter)."""

    message: Any
    arrived: float


class ExtractorNode(LifecycleNode):
    """Features of one camera; see README, "On a robot".

    configure loads the network on a thread of its own and warms it up there, activate
    subscribes, deactivate stops and keeps the network, cleanup frees it. A failed configure
    leaves the node unconfigured, with the reason in log and diagnostics.

    Raises:
        ParameterException: a parameter file or argument with a value of the wrong type or
            outside its range.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("extractor", **kwargs)
        self._declare_parameters()
        self._monitor = Monitor()
        self._options = NodeOptions()
        self._worker: NewestFirstWorker[Frame] | None = None
        self._front_end: FrontEnd | None = None
        self._image_subscription: MatchedSubscription | None = None
        self._subscriptions_by_name: dict[str, MatchedSubscription] = {}
        self._outputs: dict[str, Any] = {}
        self._camera: Camera | None = None
        self._camera_info: CameraInfo | None = None
        self._depth_images = DepthBuffer()
        self._warm_sizes: set[tuple[int, int]] = set()
        self._previous_done = 0.0
        self._out_of_memory = False
        self._logged: dict[str, float] = {}
        self._status_name = f"{self.get_fully_qualified_name().lstrip('/')}: features"
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # wall time: the clock of a bag may stand still or jump
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        period = self.get_parameter("diagnostics_period").value
        self.create_timer(period, self._publish_diagnostics, clock=steady)
        self.create_timer(WATCH_PERIOD, self._watch, clock=steady)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._autostart_timer = None
        if self.get_parameter("autostart").value:
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=steady)
        else:
            self.get_logger().info(
                "unconfigured; autostart is off, so nothing happens until a lifecycle manager, or "
                f"'ros2 lifecycle set {self.get_fully_qualified_name()} configure', says so"
            )

    # ---------------------------------------------------------------- parameters

    def _declare_parameters(self) -> None:
        for name, f in parameter_fields().items():
            low, high, choices = (f.metadata[key] for key in ("minimum", "maximum", "choices"))
            descriptor = ParameterDescriptor(
                description=f.metadata["help"],
                additional_constraints="; ".join(
                    ([f"one of {', '.join(choices)}"] if choices else [])
                    + [
                        "can change at any time"
                        if f.metadata["live"]
                        else "takes effect when the node is configured"
                    ]
                ),
                # these are read once, at start
                read_only=name in ("autostart", "diagnostics_period"),
            )
            if type(f.default) is int:
                descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=0)]
            elif type(f.default) is float:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)
                ]
            value = self.declare_parameter(name, f.default, descriptor).value
            problem = refusal(name, value, configured=False)
            if problem:
                raise ParameterException(problem, (name,))

    def _parameter_values(self) -> dict[str, Any]:
        return {name: self.get_parameter(name).value for name in parameter_fields()}

    def _on_set_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            reason = refusal(parameter.name, parameter.value, self._front_end is not None)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        if self._front_end is not None:
            known = parameter_fields()
            self._apply({p.name: p.value for p in parameters if p.name in known})
        return SetParametersResult(successful=True)

    def _apply(self, changes: dict[str, Any]) -> None:
        """Take over live parameters, already checked; the next frame is processed with them."""
        groups = {
            group: {name: changes[name] for name in changes if name in group.__dataclass_fields__}
            for group in (NodeOptions, ExtractorOptions, MatcherOptions)
        }
        self._options = replace(self._options, **groups[NodeOptions])
        if groups[ExtractorOptions]:
            self._front_end.extractor.set_options(**groups[ExtractorOptions])
        for name, value in groups[MatcherOptions].items():
            _set_matcher_option(self._front_end, name, value)
        if "max_size" in changes or "max_keypoints" in changes:
            self._out_of_memory = False
            self._monitor.clear_condition("memory")

    # ---------------------------------------------------------------- lifecycle

    def _autostart(self) -> None:
        self._autostart_timer.cancel()
        self.get_logger().info(
            "autostart: configuring and activating by itself (autostart:=false leaves this to a "
            "lifecycle manager)"
        )
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the network, warm it up and create the publishers."""
        try:
            self._configure()
        except Exception as error:
            self._release()
            # what a user can mend is told in one line
            detail = str(error) if isinstance(error, ScfeatError) else traceback.format_exc()
            self._monitor.set_condition("configure", Level.ERROR, f"cannot configure: {error}")
            self.get_logger().error(
                f"cannot configure: {detail}\nThe node stays unconfigured. Mend this (ros2 param "
                f"set {self.get_fully_qualified_name()} ...), then: ros2 lifecycle set "
                f"{self.get_fully_qualified_name()} configure"
            )
            return TransitionCallbackReturn.FAILURE
        self._monitor.clear_condition("configure")
        return super().on_configure(state)

    def _configure(self) -> None:
        values = self._parameter_values()
        self._options = build(NodeOptions, values)
        self._out_of_memory = False
        self._warm_sizes = set()
        self._overlay = Overlay()
        self._types = ros_types()
        self._decoder = ImageDecoder()
        self._rtabmap_messages = self._import_rtabmap() if self._options.rgbd else None
        self._worker = NewestFirstWorker(self._process)
        self._front_end = self._worker.call(lambda: self._load_front_end(values))
        self._create_outputs()

    def _load_front_end(self, values: dict[str, Any]) -> FrontEnd:
        """Runs on the worker's thread, as all of PyTorch does."""
        # idle OpenMP threads sleep instead of spinning; read when PyTorch loads its OpenMP
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from scfeat_ros.extractor import Extractor, select_device
        from scfeat_ros.frontend import FrontEnd

        device = self._options.device
        self._monitor.clear_condition("device")
        try:
            select_device(device)
        except ScfeatError as error:
            if not device.startswith("cuda"):
                raise
            text = f"{error}. Running on the CPU instead"
            self._monitor.set_condition("device", Level.WARN, text)
            self.get_logger().warning(text)
            device = "cpu"
        started = time.perf_counter()
        extractor = Extractor.from_pretrained(
            self._options.weights, device, **vars(build(ExtractorOptions, values))
        )
        front_end = FrontEnd(extractor)
        for name, value in vars(build(MatcherOptions, values)).items():
            _set_matcher_option(front_end, name, value)
        loaded = time.perf_counter()
        size = self._options.warm_up_width, self._options.warm_up_height
        if min(size) > 0:
            extractor.warm_up(size)
            self._warm_sizes.add(size)
        threads = torch.get_num_threads()
        self.get_logger().info(
            f"'{self._options.weights}' ({extractor.descriptor_dim}-d descriptors) on "
            f"{extractor.device}, {threads} CPU thread(s): loaded in {loaded - started:.2f} s, "
            f"warmed up in {time.perf_counter() - loaded:.2f} s"
        )
        self._monitor.set_facts(
            model=self._options.weights, device=extractor.device, threads=threads
        )
        return front_end

    def _import_rtabmap(self) -> Any:
        try:
            return importlib.import_module("rtabmap_msgs.msg")
        except ImportError as error:
            raise ScfeatError(
                "rgbd is on, but rtabmap_msgs cannot be imported: install it (apt install "
                "ros-$ROS_DISTRO-rtabmap-msgs), or set rgbd to false"
            ) from error

    def _create_outputs(self) -> None:
        topics = {
            "features": PointCloud2,
            "matches": PointCloud2,
            "overlay": Image,
        }
        if self._options.tracks != "off":
            topics["tracks"] = PointCloud
        if self._rtabmap_messages is not None:
            topics["rgbd_image"] = self._rtabmap_messages.RGBDImage
        for name, message_type in topics.items():
            self._outputs[name] = self.create_lifecycle_publisher(
                message_type,
                f"~/{name}",
                QoSProfile(depth=5),
                qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe."""
        try:
            self._subscribe()
        except InputError as error:
            self._unsubscribe()
            self._monitor.set_condition("activate", Level.ERROR, f"cannot activate: {error}")
            self.get_logger().error(f"cannot activate: {error}")
            return TransitionCallbackReturn.FAILURE
        self._monitor.clear_condition("activate")
        self._monitor.start()
        self.get_logger().info(
            f"active: images from {self._image_subscription.topic} "
            f"({self._image_subscription.description}), features on "
            f"{self._outputs['features'].topic_name}"
        )
        return super().on_activate(state)

    def _subscribe(self) -> None:
        compressed = self._options.image_transport == "compressed"
        topic = self.resolve_topic_name("image_raw")
        if compressed:
            # image_transport's rule: the transport's name goes after the remapped base name
            topic += "/compressed"
        self._image_subscription = MatchedSubscription(
            self,
            CompressedImage if compressed else Image,
            topic,
            self._on_image,
            self._options.image_reliability,
            self._options.image_depth,
            self._on_incompatible_image,
        )
        self._subscriptions_by_name["image"] = self._image_subscription
        self._subscriptions_by_name["camera_info"] = MatchedSubscription(
            self, CameraInfo, self.resolve_topic_name("camera_info"), self._on_camera_info
        )
        if self._rtabmap_messages is not None:
            self._subscriptions_by_name["depth"] = MatchedSubscription(
                self, Image, self.resolve_topic_name("depth"), self._on_depth
            )
        self._monitor.set_facts(image_topic=topic, image_qos=self._image_subscription.description)

    def _unsubscribe(self) -> None:
        for subscription in self._subscriptions_by_name.values():
            subscription.destroy()
        self._subscriptions_by_name.clear()
        self._image_subscription = None
        self._depth_images.clear()
        for name in ("silence", "qos", "type", "camera", "tracks", "rgbd"):
            self._monitor.clear_condition(name)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the frame in work; the network stays."""
        self._unsubscribe()
        self._worker.pause()
        self.get_logger().info("inactive: the network stays loaded")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the network."""
        self._release()
        self.get_logger().info("unconfigured: the network is freed")
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release(STOP_TIMEOUT)
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After an exception in a transition: back to unconfigured."""
        self._release(STOP_TIMEOUT)
        text = f"a transition from '{state.label}' failed; the node is unconfigured now"
        self._monitor.event(Level.ERROR, text)
        self.get_logger().error(text)
        return TransitionCallbackReturn.SUCCESS

    def _release(self, timeout: float | None = None) -> None:
        """Undo configure and activate, whatever of them was done."""
        self._unsubscribe()
        if self._worker is not None and self._worker.stop(timeout):
            self._worker = None
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = {}
        self._front_end = None
        self._camera = self._camera_info = None
        _free_memory()

    @property
    def state(self) -> str:
        """Label of the lifecycle state, such as "active"."""
        return self._state_machine.current_state[1]

    @property
    def busy(self) -> bool:
        """Whether a frame is still in work after a shutdown that did not wait for it."""
        return self._worker is not None

    # ---------------------------------------------------------------- input, on the executor

    def _on_image(self, message: Any) -> None:
        arrived = time.perf_counter()
        if self._monitor.clear_condition("silence"):
            self.get_logger().info("images again")
        self._monitor.arrived(self._worker.offer(Frame(message, arrived)))

    def _on_camera_info(self, message: CameraInfo) -> None:
        if message.header.frame_id and self._camera_info is not None:
            message.header.stamp = self._camera_info.header.stamp
        if message == self._camera_info:
            return
        self._camera_info = message
        try:
            self._camera = Camera.from_message(message)
            self._monitor.clear_condition("camera")
        except InputError as error:
            self._camera = None
            self._problem("camera", Level.WARN, f"{error}; features have no bearings")
        self._monitor.set_facts(
            camera="uncalibrated: no bearings"
            if self._camera is None
            else f"{self._camera.model} {message.width}x{message.height}"
        )

    def _on_depth(self, message: Image) -> None:
        self._depth_images.add(stamp_to_nanoseconds(message.header.stamp), message)

    def _on_incompatible_image(self, text: str) -> None:
        self._problem("qos", Level.ERROR, text)

    def _watch(self) -> None:
        """Follow the publishers of the input topics, and notice when nothing comes."""
        for name, subscription in self._subscriptions_by_name.items():
            if subscription.update():
                self.get_logger().info(
                    f"subscribed anew to {subscription.topic} as its publishers offer it: "
                    f"{subscription.description}"
                )
                if name == "image":
                    self._monitor.set_facts(image_qos=subscription.description)
        image = self._image_subscription
        if image is None:
            return
        if not image.incompatible_publishers():
            self._monitor.clear_condition("qos")
        others = image.other_types()
        if others:
            self._problem(
                "type",
                Level.ERROR,
                f"{image.topic} is published as {', '.join(others)}, not as an image of transport "
                f"'{self._options.image_transport}': set image_transport to raw or compressed, and "
                "remap image_raw to the base topic (without /compressed)",
            )
        else:
            self._monitor.clear_condition("type")
        if self._monitor.silence() > self._options.silence_timeout:
            publishers = image.publisher_count
            cause = (
                f"its {publishers} publisher(s) send nothing that arrives"
                if publishers
                else "nobody publishes there (remap image_raw to the camera's topic)"
            )
            self._problem("silence", Level.WARN, f"no image on {image.topic}: {cause}")

    # ---------------------------------------------------------------- work, on the worker

    def _process(self, frame: Frame) -> None:
        """One image from message to messages; never raises."""
        started = time.perf_counter()
        # what was spent on the frame before is no overhead of this one
        waited = max(0.0, min(started, self._previous_done) - frame.arrived)
        try:
            image = self._decode(frame.message)
            decoded = time.perf_counter()
            if image.note:
                self._problem(None, Level.WARN, image.note)
            result = self._extract(image, frame.message.header)
            extracted = time.perf_counter()
            self._publish(frame.message, image, result)
            done = time.perf_counter()
            self._count(frame, result, image, waited, decoded - started, done - extracted, done)
        except (InputError, ValueError) as error:
            self._monitor.failed(Level.ERROR, str(error))
            self._log(Level.ERROR, f"image left out: {error}")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._monitor.failed(Level.ERROR, text)
            # memory runs out without anybody's mistake; all else is one, and shows where
            detail = text if _is_out_of_memory(error) else f"\n{traceback.format_exc()}"
            self._log(Level.ERROR, f"image left out: {detail}")
        finally:
            self._previous_done = time.perf_counter()

    def _decode(self, message: Any) -> DecodedImage:
        if hasattr(message, "format"):
            return self._decoder.decode_compressed(message)
        return self._decoder.decode(message)

    def _extract(self, image: DecodedImage, header: Any) -> FrameResult:
        size = image.pixels.shape[1::-1]
        stamp = stamp_to_nanoseconds(header.stamp)
        try:
            if size not in self._warm_sizes:
                self._warm_up(size)
            return self._front_end.process(image.pixels, stamp, header.frame_id, image.mask)
        except Exception as error:
            if not _is_out_of_memory(error) or self._out_of_memory:
                raise
            text = self._shrink(size)
        # outside of the handler, which would keep the failed attempt's tensors alive
        _free_memory()
        self._problem("memory", Level.WARN, text)
        return self._front_end.process(image.pixels, stamp, header.frame_id, image.mask)

    def _warm_up(self, size: tuple[int, int]) -> None:
        if len(self._warm_sizes) < 10:
            self._warm_sizes.add(size)
            started = time.perf_counter()
            self._front_end.extractor.warm_up(size)
            self.get_logger().info(
                f"first image of {size[0]}x{size[1]}: warmed up for it in "
                f"{time.perf_counter() - started:.2f} s"
            )

    def _shrink(self, size: tuple[int, int]) -> str:
        """Halve the working size, once; returns what to say about it."""
        self._out_of_memory = True
        extractor = self._front_end.extractor
        limit = extractor.options.max_size or max(size)
        half = max(1, min(limit, max(size)) // 2)
        extractor.set_options(max_size=half)
        return (
            f"out of memory on {extractor.device} at {size[0]}x{size[1]}: images are shrunk to "
            f"{half} px from now on; set max_size to {half} or less for good"
        )

    def _publish(self, message: Any, image: DecodedImage, result: FrameResult) -> None:
        """Encode and send what somebody subscribes to."""
        wanted = {
            name: publisher
            for name, publisher in self._outputs.items()
            if publisher.get_subscription_count() > 0
        }
        if not self._options.overlay:
            wanted.pop("overlay", None)
        self._monitor.set_facts(outputs=" ".join(sorted(wanted)) or "nobody subscribes")
        if not wanted:
            return
        camera = self._camera_for(result)
        bearings = None
        if camera is not None and wanted.keys() & {"features", "matches", "tracks"}:
            bearings = camera.bearings(result.features.keypoints)
        if "features" in wanted:
            wanted["features"].publish(
                encode_features(result, bearings, self._types, self._options.descriptor_type)
            )
        if "matches" in wanted:
            wanted["matches"].publish(encode_matches(result, bearings, self._types))
        if "tracks" in wanted:
            if camera is None:
                text = "~/tracks needs a calibrated camera: no usable camera_info came in"
                self._problem("tracks", Level.WARN, text)
            else:
                self._monitor.clear_condition("tracks")
                wanted["tracks"].publish(
                    encode_tracks(
                        message.header,
                        result,
                        bearings,
                        camera.bearings(result.previous_keypoints),
                        self._options.tracks,
                        self._options.tracks_max,
                        self._options.tracks_min_distance,
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
        depth = self._depth_images.nearest(result.stamp, self._options.rgbd_tolerance)
        if depth is None or self._camera_info is None:
            missing = "camera_info" if self._camera_info is None else "depth image in time"
            topic = self.resolve_topic_name("depth")
            text = f"~/rgbd_image left out: no {missing} (depth topic: {topic})"
            self._problem("rgbd", Level.WARN, text)
            return
        self._monitor.clear_condition("rgbd")
        publisher.publish(
            encode_rgbd(message, depth, self._camera_info, result.features, self._rtabmap_messages)
        )

    def _camera_for(self, result: FrameResult) -> Camera | None:
        """The calibration, if there is one for images of this size."""
        camera = self._camera
        size = result.features.image_size
        if camera is None:
            return None
        if camera.fits(size):
            self._monitor.clear_condition("camera")
            return camera
        width, height = camera.image_size
        self._problem(
            "camera",
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
            if result.reset not in ("first frame",):
                self._log(Level.WARN, f"tracks start anew: {result.reset}")
        self._monitor.served(seconds, facts, result.reset is not None)

    # ---------------------------------------------------------------- telling

    def _problem(self, condition: str | None, level: Level, text: str) -> None:
        """Tell diagnostics (until cleared; once, without a condition) and log of a problem."""
        if condition is None:
            self._monitor.event(level, text)
        elif not self._monitor.set_condition(condition, level, text):
            return
        self._log(level, text)

    def _log(self, level: Level, text: str) -> None:
        """Log, but the same text not again and again."""
        now = time.monotonic()
        if now - self._logged.get(text, -LOG_AGAIN) < LOG_AGAIN:
            return
        if len(self._logged) > 100:
            self._logged.clear()
        self._logged[text] = now
        if level == Level.ERROR:
            self.get_logger().error(text)
        else:
            self.get_logger().warning(text)

    def _publish_diagnostics(self) -> None:
        report = self._monitor.report()
        state = self.state
        message = report.message if state == "active" or report.level else state
        values = {"state": state, **report.values}
        array = DiagnosticArray()
        array.header.stamp = self.get_clock().now().to_msg()
        array.status = [
            DiagnosticStatus(
                level=bytes([report.level]),
                name=self._status_name,
                message=message,
                hardware_id=self.resolve_topic_name("image_raw"),
                values=[KeyValue(key=key, value=value) for key, value in values.items()],
            )
        ]
        self._diagnostics.publish(array)


def _set_matcher_option(front_end: FrontEnd, name: str, value: float) -> None:
    """Set a field of `MatcherOptions` on a front end, where 0 switches some of them off."""
    if name == "max_gap":
        front_end.tracker.max_gap = value
    elif name == "min_similarity":
        front_end.min_similarity = value
    else:
        setattr(front_end, name, value or None)


def _free_memory() -> None:
    """Give back what is no longer used: to the GPU's driver and to the operating system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed blocks for later; elsewhere there is no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch (CUDA or CPU), numpy or OpenCV could not get memory."""
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "insufficient memory")
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, and end the process.

    Returns:
        2 for arguments or parameters that cannot be used.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        # handlers of our own: rclpy's would shut the context down under a frame in work
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        node = ExtractorNode()
    except Exception as error:
        print(f"extractor: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    failure: list[str] = []

    def spin() -> None:
        try:
            # looks at `stop` now and then: an executor that is shut down while it spins may raise
            while not stop.is_set():
                executor.spin_once(timeout_sec=SPIN_TIMEOUT)
        except Exception:
            failure.append(traceback.format_exc())
        stop.set()

    thread = threading.Thread(target=spin, name="executor", daemon=True)
    thread.start()
    stop.wait()
    thread.join(STOP_TIMEOUT / 2)
    if failure:
        print(f"extractor: the executor failed:\n{failure[0]}", file=sys.stderr)
    if not thread.is_alive() and node.state != "finalized":
        node.trigger_shutdown()
    if not thread.is_alive() and not node.busy:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    # unloading PyTorch takes seconds on a busy computer, and a frame in work or a network that
    # loads would hold it up: nothing of that is worth waiting for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failure else 0)


if __name__ == "__main__":
    sys.exit(main())
