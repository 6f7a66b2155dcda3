"""The ROS 2 lifecycle node: camera images in, features, matches, overlay and diagnostics out.

PyTorch is imported when the node is configured, so that an unconfigured node costs little and
a signal ends it at any time.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud, PointCloud2

from scfeat_ros import subprocesses
from scfeat_ros.diagnostics import Level, Monitor, Problems
from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.frame_processor import OUTPUT_CONDITIONS, Frame, FrameProcessor
from scfeat_ros.matched_subscription import MatchedSubscription, overrides_of
from scfeat_ros.memory import free_memory
from scfeat_ros.node_parameters import (
    ExtractorOptions,
    MatcherOptions,
    NodeOptions,
    as_declared,
    build,
    parameter_fields,
    refusal,
)
from scfeat_ros.ros_image import ImageDecoder
from scfeat_ros.worker import LatestOnlyWorker

if TYPE_CHECKING:
    from scfeat_ros.frontend import FrontEnd

Transition = Callable[["ExtractorNode", LifecycleState], TransitionCallbackReturn]

WATCH_PERIOD = 0.5
"""Seconds between checks of the publishers of the input topics."""
STOP_TIMEOUT = 1.0
"""Seconds for which the process waits for the current frame when it ends."""
SPIN_TIMEOUT = 0.2
"""Seconds after which the executor checks whether the process is to end."""
INPUT_CONDITIONS = (
    "silence",
    "qos image",
    "qos camera_info",
    "qos depth",
    "type",
    "pixels",
    "camera",
    *OUTPUT_CONDITIONS,
)
"""Conditions that are cleared when the node unsubscribes."""


def _log_exceptions(transition: Transition) -> Transition:
    """Log what a transition raises: rclpy itself does not."""

    @functools.wraps(transition)
    def run(node: ExtractorNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception:
            node.get_logger().error(traceback.format_exc())
            raise

    return run


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
        self._warn_of_unknown_parameters(of_topics=False)
        self._monitor = Monitor()
        self._problems = Problems(self._monitor, self.get_logger())
        self._worker: LatestOnlyWorker[Frame] | None = None
        self._processor: FrameProcessor | None = None
        self._inputs: dict[str, MatchedSubscription] = {}
        self._outputs: dict[str, Any] = {}
        self._status_name = f"{self.get_fully_qualified_name().lstrip('/')}: features"
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # wall time: the clock of a bag may stand still or jump
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        period = self.get_parameter("diagnostics_period").value
        self.create_timer(period, self._publish_diagnostics, clock=steady)
        self.create_timer(WATCH_PERIOD, self._watch, clock=steady)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._refuse_invalid_transitions()
        self._autostart_timer = None
        if self.get_parameter("autostart").value:
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=steady)
        else:
            self.get_logger().info(
                "unconfigured; autostart is off, so nothing happens until a lifecycle manager, or "
                f"'ros2 lifecycle set {self.get_fully_qualified_name()} configure' and then "
                "'... activate', says so"
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
                # YAML reads on and off as booleans
                dynamic_typing="off" in choices,
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

    def _warn_of_unknown_parameters(self, of_topics: bool) -> None:
        """Warn of values from files and arguments for parameters that this node does not have.

        Args:
            of_topics: look at those of topics, which are declared with the topics.
        """
        known = self.get_parameters_by_prefix("")
        for name in sorted(self._parameter_overrides.keys() - known.keys()):
            if name.startswith("qos_overrides.") == of_topics:
                close = difflib.get_close_matches(name, known, 1)
                meant = f" (was '{close[0]}' meant?)" if close else ""
                self.get_logger().warning(
                    f"there is no parameter '{name}': its value has no effect{meant}"
                )

    def _parameter_values(self) -> dict[str, Any]:
        return {
            name: as_declared(f, self.get_parameter(name).value)
            for name, f in parameter_fields().items()
        }

    def _on_set_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            name, value = parameter.name, parameter.value
            now = self.get_parameter_or(name).value
            reason = refusal(name, value, self._processor is not None, now)
            if value != now and name.startswith(
                tuple(overrides_of(subscription.topic) for subscription in self._inputs.values())
            ):
                reason = f"{name} takes effect when the node is activated: deactivate it first"
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        if self._processor is not None:
            known = parameter_fields()
            self._processor.apply(
                {p.name: as_declared(known[p.name], p.value) for p in parameters if p.name in known}
            )
        return SetParametersResult(successful=True)

    # ---------------------------------------------------------------- lifecycle

    def _refuse_invalid_transitions(self) -> None:
        """Make the service refuse a transition that is invalid in the current state.

        rclpy raises instead of responding, and a lifecycle manager would wait forever.
        """
        service = next(s for s in self.services if s.srv_type is ChangeState)
        change_state = service.callback

        def respond(request: Any, response: Any) -> Any:
            try:
                return change_state(request, response)
            except RuntimeError as error:  # as rclpy raises it
                self.get_logger().error(
                    f"no transition {request.transition.id} from state '{self.state}': {error}"
                )
                response.success = False
                return response

        service.callback = respond

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
            # what a user can fix is logged as one line
            detail = str(error) if isinstance(error, ScfeatError) else traceback.format_exc()
            self._monitor.set_condition("configure", Level.ERROR, f"cannot configure: {error}")
            self.get_logger().error(
                f"cannot configure: {detail}\nThe node stays unconfigured. Fix this (ros2 param "
                f"set {self.get_fully_qualified_name()} ...), then: ros2 lifecycle set "
                f"{self.get_fully_qualified_name()} configure, and the same with activate"
            )
            return TransitionCallbackReturn.FAILURE
        for name in ("configure", "transition"):
            self._monitor.clear_condition(name)
        return super().on_configure(state)

    def _configure(self) -> None:
        values = self._parameter_values()
        options = build(NodeOptions, values)
        decoder = ImageDecoder()
        rtabmap_messages = self._import_rtabmap() if options.rgbd else None
        self._worker = LatestOnlyWorker(lambda frame: self._processor.process(frame))
        front_end = self._worker.call(lambda: self._load_front_end(options, values))
        self._create_outputs(options, rtabmap_messages)
        self._processor = FrameProcessor(
            front_end,
            options,
            decoder,
            self._outputs,
            self._monitor,
            self._problems,
            self.get_logger(),
            rtabmap_messages,
            (options.warm_up_width, options.warm_up_height),
        )

    def _load_front_end(self, options: NodeOptions, values: dict[str, Any]) -> FrontEnd:
        """Load and warm up the network; called on the worker's thread, like all PyTorch code."""
        import torch

        from scfeat_ros.extractor import Extractor, select_device
        from scfeat_ros.frontend import FrontEnd

        device = options.device
        self._monitor.clear_condition("device")
        try:
            select_device(device)
        except ScfeatError as error:
            if not device.startswith("cuda"):
                raise
            self._problems.report("device", Level.WARN, f"{error}. Running on the CPU instead")
            device = "cpu"
        started = time.perf_counter()
        extractor = Extractor.from_pretrained(
            options.weights, device, **vars(build(ExtractorOptions, values))
        )
        front_end = FrontEnd(extractor, build(MatcherOptions, values))
        loaded = time.perf_counter()
        size = options.warm_up_width, options.warm_up_height
        if min(size) > 0:
            extractor.warm_up(size)
        threads = torch.get_num_threads()
        self.get_logger().info(
            f"'{options.weights}' ({extractor.descriptor_dim}-d descriptors) on "
            f"{extractor.device}, {threads} CPU thread(s): loaded in {loaded - started:.2f} s, "
            f"warmed up in {time.perf_counter() - loaded:.2f} s"
        )
        self._monitor.set_facts(
            model=options.weights,
            network=extractor.network,
            device=extractor.device,
            threads=threads,
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

    def _create_outputs(self, options: NodeOptions, rtabmap_messages: Any) -> None:
        topics = {
            "features": PointCloud2,
            "matches": PointCloud2,
            "overlay": Image,
        }
        if options.tracks != "off":
            topics["tracks"] = PointCloud
        if rtabmap_messages is not None:
            topics["rgbd_image"] = rtabmap_messages.RGBDImage
        for name, message_type in topics.items():
            try:
                self._outputs[name] = self.create_lifecycle_publisher(
                    message_type,
                    f"~/{name}",
                    QoSProfile(depth=5),
                    qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                )
            except (RuntimeError, InvalidParameterTypeException) as error:  # as rclpy raises them
                raise ScfeatError(
                    f"'~/{name}' cannot be published: {error}. Parameters qos_overrides of outputs "
                    "are read once: restart the node with other values"
                ) from error

    @_log_exceptions
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe."""
        try:
            self._subscribe()
        except InputError as error:
            self._unsubscribe()
            self._monitor.set_condition("activate", Level.ERROR, f"cannot activate: {error}")
            self.get_logger().error(
                f"cannot activate: {error}\nThe node stays inactive. Fix this (ros2 param set "
                f"{self.get_fully_qualified_name()} ...), then: ros2 lifecycle set "
                f"{self.get_fully_qualified_name()} activate"
            )
            return TransitionCallbackReturn.FAILURE
        self._monitor.clear_condition("activate")
        self._warn_of_unknown_parameters(of_topics=True)
        self._monitor.start()
        self.get_logger().info(
            f"active: images from {self._inputs['image'].topic} "
            f"({self._inputs['image'].description}), features on "
            f"{self._outputs['features'].topic_name}"
        )
        return super().on_activate(state)

    def _subscribe(self) -> None:
        options = self._processor.options
        compressed = options.image_transport == "compressed"
        topic = self.resolve_topic_name("image_raw")
        if compressed:
            # image_transport's rule: the transport's name goes after the remapped base name,
            # and what comes of it can be remapped too
            topic = self.resolve_topic_name(f"{topic}/compressed")
        self._inputs["image"] = MatchedSubscription(
            self,
            CompressedImage if compressed else Image,
            topic,
            self._on_image,
            self._qos_error("qos image"),
            options.image_reliability,
            options.image_depth,
        )
        info_topic = self.resolve_topic_name("camera_info")
        self._monitor.set_facts(camera=f"no camera_info on {info_topic} yet: no bearings")
        self._inputs["camera_info"] = MatchedSubscription(
            self,
            CameraInfo,
            info_topic,
            self._processor.set_camera_info,
            self._qos_error("qos camera_info"),
        )
        if options.rgbd:
            self._inputs["depth"] = MatchedSubscription(
                self,
                Image,
                self.resolve_topic_name("depth"),
                self._processor.add_depth,
                self._qos_error("qos depth"),
            )
        self._monitor.set_facts(image_topic=topic, image_qos=self._inputs["image"].description)

    def _qos_error(self, condition: str) -> Callable[[str], None]:
        return functools.partial(self._problems.report, condition, Level.ERROR)

    def _unsubscribe(self) -> None:
        for subscription in self._inputs.values():
            subscription.destroy()
        self._inputs.clear()
        if self._worker is not None and self._worker.withdraw():
            self._monitor.withdrawn()

    def _forget_input(self) -> None:
        """Clear the calibration and all conditions of the input, after the last frame."""
        if self._processor is not None:
            self._processor.pause()
        self._monitor.set_facts(camera="none: not active")
        for name in INPUT_CONDITIONS:
            self._monitor.clear_condition(name)

    @_log_exceptions
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the current frame; the network stays loaded."""
        self._unsubscribe()
        self._worker.wait()
        self._forget_input()
        self.get_logger().info("inactive: the network stays loaded")
        return super().on_deactivate(state)

    @_log_exceptions
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
        self._release()
        text = f"a transition from '{state.label}' failed; the node is unconfigured now"
        self._monitor.set_condition("transition", Level.ERROR, f"{text} (the log says why)")
        self.get_logger().error(text)
        return TransitionCallbackReturn.SUCCESS

    def _release(self, timeout: float | None = None) -> None:
        """Undo configure and activate, as far as they were done."""
        self._unsubscribe()
        if self._worker is not None and not self._worker.stop(timeout):
            return  # it may still publish; the process is about to end
        self._worker = None
        self._forget_input()
        for name in ("memory", "device", "activate"):
            self._monitor.clear_condition(name)
        self._monitor.set_facts(size_limit=None)
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = {}
        self._processor = None
        free_memory()

    @property
    def state(self) -> str:
        """Label of the lifecycle state, such as "active"."""
        return self._state_machine.current_state[1]

    @property
    def busy(self) -> bool:
        """Whether a frame is still being processed after a shutdown that did not wait for it."""
        return self._worker is not None

    # ---------------------------------------------------------------- input, on the executor

    def _on_image(self, message: Any) -> None:
        arrived = time.perf_counter()
        if self._worker is None:
            return  # it was queued when the subscription ended
        if self._monitor.clear_condition("silence"):
            self.get_logger().info("images again")
        self._monitor.arrived(self._worker.offer(Frame(message, arrived)))

    def _watch(self) -> None:
        """Adapt to the publishers of the input topics, and report when no image arrives."""
        for name, subscription in self._inputs.items():
            if subscription.update():
                self.get_logger().info(
                    f"subscribed again to {subscription.topic}, matching its publishers: "
                    f"{subscription.description}"
                )
                if name == "image":
                    self._monitor.set_facts(image_qos=subscription.description)
            if not subscription.incompatible_publishers():
                self._monitor.clear_condition(f"qos {name}")
        image = self._inputs.get("image")
        if image is None:
            return
        others = image.other_types()
        if others:
            transport = self._processor.options.image_transport
            self._problems.report(
                "type",
                Level.ERROR,
                f"{image.topic} is published as {', '.join(others)}, not as an image of transport "
                f"'{transport}': set image_transport to raw or compressed, and remap image_raw to "
                "the base topic (without /compressed)",
            )
        else:
            self._monitor.clear_condition("type")
        if self._monitor.silence() > self._processor.options.silence_timeout:
            publishers = image.publisher_count
            cause = (
                f"its {publishers} publisher(s) send nothing that arrives"
                if publishers
                else f"nobody publishes there ({self._remedy_for_no_publisher(image.topic)})"
            )
            self._problems.report("silence", Level.WARN, f"no image on {image.topic}: {cause}")

    def _remedy_for_no_publisher(self, topic: str) -> str:
        """What to change so that images arrive, judged by the topics that are published."""

        def types(name: str) -> set[str]:
            return {info.topic_type for info in self.get_publishers_info_by_topic(name)}

        if self._processor.options.image_transport == "raw":
            if "sensor_msgs/msg/CompressedImage" in types(f"{topic}/compressed"):
                return (
                    f"but {topic}/compressed is published: set image_transport to compressed, and "
                    f"leave image_raw at the base topic {topic}"
                )
        else:
            base = topic.removesuffix("/compressed")
            if "sensor_msgs/msg/Image" in types(base):
                return f"but {base} is published: set image_transport to raw"
            if base.endswith("/compressed") and types(base):
                return (
                    f"but {base} is published: remap image_raw to the base topic "
                    f"{base.removesuffix('/compressed')}, image_transport adds /compressed"
                )
        return "remap image_raw to the camera's topic"

    # ---------------------------------------------------------------- diagnostics

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


class RosLogHandler(logging.Handler):
    """Forwards the package's log records (Python's `logging`) to the node's logger."""

    def __init__(self, node: ExtractorNode) -> None:
        super().__init__()
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        else:
            self._logger.info(text)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, and end the process.

    Returns:
        2 for arguments or parameters that cannot be used.
    """
    # a pipe, which is written whichever thread receives the signal; a handler that sets an Event
    # would have to wait for the main thread, which may itself hold the Event's lock
    signalled, signal_end = os.pipe()
    os.set_blocking(signal_end, False)
    signal.set_wakeup_fd(signal_end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        # our own handlers: rclpy's would shut the context down while a frame is processed
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        node = ExtractorNode()
        package_log = logging.getLogger("scfeat_ros")
        package_log.addHandler(RosLogHandler(node))
        package_log.setLevel(logging.INFO)
        package_log.propagate = False
    except Exception as error:
        print(f"extractor: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    stop = threading.Event()

    def spin() -> None:
        # polls `stop`: an executor that is shut down while it spins may raise
        while not stop.is_set():
            try:
                executor.spin_once(timeout_sec=SPIN_TIMEOUT)
            except Exception:
                # a robot is better off with a node that keeps running
                node.get_logger().error(f"a callback failed:\n{traceback.format_exc()}")
                time.sleep(SPIN_TIMEOUT)

    thread = threading.Thread(target=spin, name="executor", daemon=True)
    thread.start()
    os.read(signalled, 1)
    stop.set()
    thread.join(STOP_TIMEOUT / 2)
    if not thread.is_alive() and node.state != "finalized":
        node.trigger_shutdown()
    if not thread.is_alive() and not node.busy:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    # skip the regular exit: it takes seconds on a busy computer, and would wait for the current
    # frame or for a network that is being loaded
    sys.stdout.flush()
    sys.stderr.flush()
    subprocesses.kill_all()
    os._exit(0)
