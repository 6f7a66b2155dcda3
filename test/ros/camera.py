"""A camera for the tests: a process of its own that publishes what its standard input says.

One JSON object a line; each is answered by one line "done" when carried out:
    {"send": KIND, "count": 1, "rate": 10, "size": [160, 120], "start": SECONDS, "step": 0.1}
        publish images of a kind of `SPECIAL`, or of that encoding, with stamps from `start` on;
        frame_id, index of the first picture and namespace may be given too
    {"qos": "reliable" | "best_effort"}     publish with another quality of service from now on
"""

from __future__ import annotations

import array
import functools
import json
import sys
import time

import cv2
import numpy as np

SPECIAL = ("truncated", "zero_size", "all_nan", "unknown", "short_row")
"""Kinds of raw images that cannot be used."""

FOCAL = 150.0
DISTORTION = (-0.05, 0.01, 0.001, -0.001, 0.0)


def picture(index: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a texture that moves by (2, 1) pixels a frame."""
    x, y = 2 * index % 128, index % 64
    return np.ascontiguousarray(_texture(width, height)[y : y + height, x : x + width])


@functools.lru_cache(maxsize=8)
def _texture(width: int, height: int) -> np.ndarray:
    noise = np.random.default_rng(7).integers(0, 256, (height + 64, width + 128, 3), np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX)


def intrinsics(width: int, height: int) -> list[float]:
    """The nine elements of K."""
    return [FOCAL, 0.0, width / 2, 0.0, FOCAL, height / 2, 0.0, 0.0, 1.0]


def encoded(kind: str, rgb: np.ndarray) -> tuple[str, int, np.ndarray]:
    """Encoding, row step and bytes of a picture as a kind of image."""
    height, width = rgb.shape[:2]
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    data = {
        "rgb8": lambda: rgb,
        "bgr8": lambda: rgb[..., ::-1],
        "8UC3": lambda: rgb[..., ::-1],
        "bgra8": lambda: cv2.cvtColor(rgb, cv2.COLOR_RGB2BGRA),
        "mono8": lambda: grey,
        "8UC1": lambda: grey,
        "mono16": lambda: grey.astype(np.uint16) * 257,
        "16UC3": lambda: rgb[..., ::-1].astype(np.uint16) * 257,
        "32FC1": lambda: grey.astype(np.float32) / 10,
        "bayer_rggb8": lambda: _bayer(rgb),
        "yuv422": lambda: _yuv422(grey),
    }
    if kind in data:
        pixels = np.ascontiguousarray(data[kind]())
        return kind, pixels.nbytes // height, pixels.view(np.uint8).reshape(-1)
    if kind in ("nan", "all_nan"):
        depth = grey.astype(np.float32)
        depth[:, : width // 2 if kind == "nan" else width] = np.nan
        return "32FC1", 4 * width, depth.view(np.uint8).reshape(-1)
    if kind == "truncated":
        return "rgb8", 3 * width, rgb.reshape(-1)[: rgb.size // 2]
    if kind == "unknown":
        return "rainbow12", 3 * width, rgb.reshape(-1)
    if kind == "short_row":
        return "rgb8", 3 * width - 1, rgb.reshape(-1)
    if kind == "padded":
        rows = np.zeros((height, 3 * width + 5), np.uint8)
        rows[:, : 3 * width] = rgb.reshape(height, -1)
        return "rgb8", rows.shape[1], rows.reshape(-1)
    if kind == "short_tail":  # the last row's padding is missing
        encoding, step, data = encoded("padded", rgb)
        return encoding, step, data[:-5]
    if kind == "big_endian":
        return "mono16", 2 * width, (grey.astype(">u2") * 257).view(np.uint8).reshape(-1)
    if kind == "zero_size":
        return "rgb8", 0, np.zeros(0, np.uint8)
    raise ValueError(kind)


def _bayer(rgb: np.ndarray) -> np.ndarray:
    mosaic = rgb[..., 1].copy()
    mosaic[::2, ::2] = rgb[::2, ::2, 0]
    mosaic[1::2, 1::2] = rgb[1::2, 1::2, 2]
    return mosaic


def _yuv422(grey: np.ndarray) -> np.ndarray:
    return np.stack([np.full_like(grey, 128), grey], axis=2)


def main() -> None:
    import rclpy
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    rclpy.init()
    node = rclpy.create_node("test_camera")
    publishers: dict[tuple, object] = {}
    reliability = "reliable"

    def publisher(message_type: type, topic: str) -> object:
        key = (message_type, topic)
        if key not in publishers:
            policy = ReliabilityPolicy[reliability.upper()]
            # deep: what a test sends must all leave, however late the other side reads
            profile = QoSProfile(depth=100, reliability=policy)
            publishers[key] = node.create_publisher(message_type, topic, profile)
        return publishers[key]

    def send(command: dict) -> None:
        kind = command["send"]
        namespace = command.get("namespace", "")
        width, height = command.get("size", (160, 120))
        rate = command.get("rate", 10)
        for i in range(command.get("count", 1)):
            started = time.monotonic()
            rgb = picture(command.get("index", 0) + i, width, height)
            compressed = kind in ("png", "jpeg", "cut_jpeg")
            message = (CompressedImage if compressed else Image)()
            nanoseconds = round((command.get("start", 100) + i * command.get("step", 0.1)) * 1e9)
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(nanoseconds, 10**9)
            message.header.frame_id = command.get("frame_id", "camera_optical")
            if compressed:
                suffix = ".png" if kind == "png" else ".jpg"
                data = cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes()
                message.format = f"rgb8; {suffix[1:]} compressed bgr8"
                message.data = array.array(
                    "B", data[: len(data) // 2] if kind == "cut_jpeg" else data
                )
                topic = "image_raw/compressed"
            else:
                encoding, step, data = encoded(kind, rgb)
                message.encoding, message.step = encoding, step
                message.is_bigendian = int(kind == "big_endian")
                if kind != "zero_size":
                    message.height, message.width = height, width
                message.data = array.array("B", data.tobytes())
                topic = "image_raw"
            info = CameraInfo(height=height, width=width, distortion_model="plumb_bob")
            info.header = message.header
            info.k, info.d = intrinsics(width, height), list(DISTORTION)
            info.p = np.insert(info.k, (3, 6, 9), 0.0)
            if command.get("camera_info", True):
                publisher(CameraInfo, namespace + "camera_info").publish(info)
            if command.get("depth", False):
                depth = Image(header=message.header, height=height, width=width)
                depth.encoding, depth.step = "16UC1", 2 * width
                depth.data = array.array("B", np.full(width * height, 1500, np.uint16).tobytes())
                publisher(Image, namespace + "depth").publish(depth)
            publisher(type(message), namespace + topic).publish(message)
            if rate:
                time.sleep(max(0.0, 1 / rate - (time.monotonic() - started)))

    for line in sys.stdin:
        command = json.loads(line)
        if "qos" in command:
            reliability = command["qos"]
            for old in publishers.values():
                node.destroy_publisher(old)
            publishers.clear()
        else:
            send(command)
        print("done", flush=True)
    rclpy.shutdown()


if __name__ == "__main__":
    main()
