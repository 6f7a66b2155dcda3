"""What the tests of the node stand on: processes for camera and node, and an observer."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from waiting import PATIENCE, wait_for

HERE = Path(__file__).parent
# every rig a domain of its own, so that nothing of another test is heard
_domains = itertools.count(os.getpid())
LEVELS = {b"\0": "OK", b"\1": "WARN", b"\2": "ERROR"}


class Rig:
    """A camera, the node and an observer in a ROS domain of their own.

    Args:
        log: where the node's log goes.
    """

    def __init__(self, log: Path):
        self.domain = 1 + next(_domains) % 100
        self.environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self.domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "PYTHONUNBUFFERED": "1",
        }
        self.log_path = log
        self.messages = defaultdict(list)
        self.processes = []
        self.camera_process = None
        self.node_process = None
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.context = Context()
        rclpy.init(context=self.context, domain_id=self.domain)
        self.observer = rclpy.create_node("observer", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.observer)
        self.subscriptions = {}
        self._statuses = []
        self.observer.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, 100
        )
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()

    def _spin(self):
        while self.context.ok():
            try:
                self.executor.spin_once(timeout_sec=0.1)
            except Exception:
                if self.context.ok():
                    raise

    # ------------------------------------------------------------ processes

    def start(self, command, **options):
        process = subprocess.Popen(
            [str(part) for part in command], env=self.environment, text=True, **options
        )
        self.processes.append(process)
        return process

    def start_node(
        self,
        ready=True,
        remap=(),
        start_new_session=False,
        program=("-m", "scfeat_ros.run_node"),
        **parameters,
    ):
        """Start the node; `ready` waits until it is active."""
        arguments = []
        for name, value in parameters.items():
            arguments += ["-p", f"{name}:={_text(value)}"]
        for rule in remap:
            arguments += ["-r", rule]
        command = [sys.executable, *program]
        with self.log_path.open("a") as log:
            self.node_process = self.start(
                [*command, "--ros-args", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=start_new_session,
            )
        if ready:
            wait_for(
                lambda: "active: images from" in self.log or self.node_process.poll() is not None,
                "the node becomes active",
            )
            assert self.node_process.poll() is None, self.log
        return self.node_process

    def start_camera(self):
        self.camera_process = self.start(
            [sys.executable, HERE / "camera.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def camera(self, **command):
        """Let the camera carry out a command of camera.py, and wait for it."""
        if self.camera_process is None:
            self.start_camera()
        self.camera_process.stdin.write(json.dumps(command) + "\n")
        self.camera_process.stdin.flush()
        assert self.camera_process.stdout.readline() == "done\n"

    def connect(self, topic="/image_raw", kind="rgb8", **command):
        """Send pictures until the node has served one: publisher and node know each other now."""
        before = self.figure("frames out", 0)
        self.camera(send=kind, rate=0, start=1, **command)
        wait_for(
            lambda: (
                self.camera(send=kind, count=2, rate=20, start=1, **command) is None
                and self.figure("frames out", 0) > before
            ),
            "the node serves a frame",
        )
        self.settle()

    def settle(self):
        """Wait until every image that came in is accounted for in the diagnostics.

        Returns the figures.
        """
        seen = len(self.statuses())

        def find():
            for _, _, values in self.statuses()[seen + 1 :]:
                done = sum(int(values[f"frames {what}"]) for what in ("out", "dropped", "failed"))
                if done == int(values["frames in"]):
                    return values

        return wait_for(find, lambda: "all images are accounted for; log:\n" + self.log)

    def stop_node(self, number=signal.SIGINT):
        """Send the node a signal; returns its exit status."""
        self.node_process.send_signal(number)
        return self.node_process.wait(PATIENCE)

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                if process.stdin:
                    process.stdin.close()  # the camera's end
                else:
                    process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        rclpy.shutdown(context=self.context)
        self.thread.join()

    # ------------------------------------------------------------ observer

    def subscribe(self, topic, message_type, depth=1000, **policies):
        """Keep every message of a topic in `messages[topic]`."""
        self.subscriptions[topic] = self.observer.create_subscription(
            message_type, topic, self.messages[topic].append, QoSProfile(depth=depth, **policies)
        )

    def listen(self, topic, message_type):
        """Subscribe, and wait until the publisher is there."""
        self.subscribe(topic, message_type)
        wait_for(lambda: self.observer.count_publishers(topic), f"{topic} is published")

    def unsubscribe(self, topic):
        self.observer.destroy_subscription(self.subscriptions.pop(topic))

    def received(self, topic, count=1):
        """The messages of a topic, as soon as there are so many."""
        wait_for(lambda: len(self.messages[topic]) >= count, f"{count} messages on {topic}")
        return list(self.messages[topic])

    def _on_diagnostics(self, array):
        for status in array.status:
            values = {value.key: value.value for value in status.values}
            self._statuses.append((LEVELS[status.level], status.message, values))

    def statuses(self):
        """(level, message, values) of every diagnostics message so far."""
        return self._statuses[:]

    def figure(self, name, default=None):
        """The newest value of a figure in the diagnostics, as a number."""
        values = [values[name] for _, _, values in self.statuses() if name in values]
        return float(values[-1]) if values else default

    def wait_for_status(self, level, *texts, since=0):
        """The first diagnostics message of a level that holds all texts."""

        def find():
            for status in self.statuses()[since:]:
                if status[0] == level and all(text in status[1] for text in texts):
                    return status

        what = f"diagnostics of level {level} with {texts}; log:\n"
        return wait_for(find, lambda: what + self.log)

    # ------------------------------------------------------------ services

    def call(self, service_type, name, request):
        client = self.observer.create_client(service_type, name)
        try:
            wait_for(client.service_is_ready, f"service {name}")
            future = client.call_async(request)
            wait_for(future.done, f"answer of {name}")
            return future.result()
        finally:
            self.observer.destroy_client(client)

    def set_parameter(self, name, value, node="/extractor"):
        """Returns (successful, reason)."""
        request = SetParameters.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg()]
        result = self.call(SetParameters, f"{node}/set_parameters", request).results[0]
        return result.successful, result.reason

    def get_parameter(self, name, node="/extractor"):
        request = GetParameters.Request(names=[name])
        return self.call(GetParameters, f"{node}/get_parameters", request).values[0]

    def describe_parameters(self, names, node="/extractor"):
        request = DescribeParameters.Request(names=names)
        return self.call(DescribeParameters, f"{node}/describe_parameters", request).descriptors

    def transition(self, name, node="/extractor"):
        """Ask for a lifecycle transition; returns whether it was made."""
        request = ChangeState.Request()
        request.transition.id = getattr(Transition, f"TRANSITION_{name.upper()}")
        return self.call(ChangeState, f"{node}/change_state", request).success

    def state(self, node="/extractor"):
        return self.call(GetState, f"{node}/get_state", GetState.Request()).current_state.label


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)
