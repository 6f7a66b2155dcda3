"""Small bags for tests, written by rosbags."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

START = 1_700_000_000_000_000_000
PERIOD = 100_000_000
IMAGE_TOPIC = "/camera/image_raw"
INFO_TOPIC = "/camera/camera_info"
POSE_TOPIC = "/ground_truth/pose"
FRAME_ID = "camera_optical"

ROS2 = get_typestore(Stores.ROS2_JAZZY)
ROS1 = get_typestore(Stores.ROS1_NOETIC)


def texture(size: int = 400, seed: int = 0) -> np.ndarray:
    """(size, size) uint8: blobs and edges of several sizes."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size, size), np.float32)
    for cell in (4, 10, 25):
        cells = rng.random((size // cell + 1, size // cell + 1), np.float32)
        large = cv2.resize(cells, (size, size), interpolation=cv2.INTER_NEAREST)
        image += cv2.GaussianBlur(large, (0, 0), 0.8)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def sequence(count: int = 6, width: int = 160, height: int = 120, step: int = 3) -> list:
    """Grey images of a camera that slides over a texture, `step` pixels a frame to the right."""
    world = texture()
    return [world[40 : 40 + height, 20 + i * step :][:, :width].copy() for i in range(count)]


def stamp(index: int) -> int:
    """Time of a frame in nanoseconds; not a round number."""
    return START + index * PERIOD + 123


def header(types: dict, time: int, frame_id: str) -> object:
    time_message = types["builtin_interfaces/msg/Time"](sec=time // 10**9, nanosec=time % 10**9)
    is_ros1 = "seq" in types["std_msgs/msg/Header"].__dataclass_fields__
    extra = {"seq": 0} if is_ros1 else {}
    return types["std_msgs/msg/Header"](stamp=time_message, frame_id=frame_id, **extra)


def image_message(
    image: np.ndarray,
    time: int = START,
    encoding: str | None = None,
    padding: int = 0,
    types: dict = ROS2.types,
) -> object:
    """sensor_msgs/Image of an array, rows padded by some bytes."""
    height, width = image.shape[:2]
    rows = np.ascontiguousarray(image).reshape(height, -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    return types["sensor_msgs/msg/Image"](
        header=header(types, time, FRAME_ID),
        height=height,
        width=width,
        encoding=encoding or ("mono8" if image.ndim == 2 else "rgb8"),
        is_bigendian=0,
        step=rows.shape[1],
        data=rows.reshape(-1),
    )


def compressed_message(image: np.ndarray, time: int = START, ending: str = ".png") -> object:
    """sensor_msgs/CompressedImage of a grey or RGB array."""
    data = cv2.imencode(ending, image if image.ndim == 2 else image[..., ::-1])[1]
    return ROS2.types["sensor_msgs/msg/CompressedImage"](
        header=header(ROS2.types, time, FRAME_ID), format=ending[1:], data=data.reshape(-1)
    )


def info_message(
    K: np.ndarray,
    size: tuple[int, int],
    time: int = START,
    D: tuple = (0.0,) * 5,
    model: str = "plumb_bob",
    binning: int = 0,
    roi: tuple[int, int, int, int] = (0, 0, 0, 0),
    types: dict = ROS2.types,
) -> object:
    """sensor_msgs/CameraInfo; roi is x offset, y offset, width, height."""
    names = ("d", "k", "r", "p") if types is ROS2.types else ("D", "K", "R", "P")
    values = (
        np.array(D, np.float64),
        np.asarray(K, np.float64).reshape(-1),
        np.eye(3).reshape(-1),
        np.zeros(12),
    )
    return types["sensor_msgs/msg/CameraInfo"](
        header=header(types, time, FRAME_ID),
        height=size[1],
        width=size[0],
        distortion_model=model,
        binning_x=binning,
        binning_y=binning,
        roi=types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=roi[0], y_offset=roi[1], width=roi[2], height=roi[3], do_rectify=False
        ),
        **dict(zip(names, values, strict=True)),
    )


def pose_message(position: tuple, quaternion: tuple = (0, 0, 0, 1), time: int = START) -> object:
    """geometry_msgs/PoseStamped; quaternion is x, y, z, w."""
    types = ROS2.types
    return types["geometry_msgs/msg/PoseStamped"](
        header=header(types, time, "world"),
        pose=types["geometry_msgs/msg/Pose"](
            position=types["geometry_msgs/msg/Point"](*map(float, position)),
            orientation=types["geometry_msgs/msg/Quaternion"](*map(float, quaternion)),
        ),
    )


def odometry_message(pose: object, child_frame_id: str) -> object:
    """nav_msgs/Odometry of a geometry_msgs/PoseStamped."""
    types = ROS2.types
    zero = types["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
    return types["nav_msgs/msg/Odometry"](
        header=pose.header,
        child_frame_id=child_frame_id,
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose.pose, np.zeros(36)),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            types["geometry_msgs/msg/Twist"](zero, zero), np.zeros(36)
        ),
    )


def write_bag(
    path: Path,
    messages: list[tuple[str, int, object]],
    storage: str = "mcap",
    compression: str = "none",
    store: Typestore = ROS2,
) -> Path:
    """Write a rosbag2 folder of (topic, time, message) rows.

    Args:
        compression: "none", "storage" (mcap only), "file" or "message".
        store: with the messages' types.
    """
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    if compression != "none":
        writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for topic, time, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(
                    topic, message.__msgtype__, typestore=store
                )
            data = store.serialize_cdr(message, message.__msgtype__)
            writer.write(connections[topic], time, data)
    return path


def write_ros1_bag(
    path: Path,
    messages: list[tuple[str, int, object]],
    chunk_bytes: int = 1 << 20,
    store: Typestore = ROS1,
) -> Path:
    """Write a ROS 1 .bag file of (topic, time, message) rows."""
    writer = Ros1Writer(path)
    writer.chunk_threshold = chunk_bytes
    with writer:
        connections = {}
        for topic, time, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(
                    topic, message.__msgtype__, typestore=store
                )
            data = store.serialize_ros1(message, message.__msgtype__)
            writer.write(connections[topic], time, data)
    return path


def camera_messages(
    images: list, K: np.ndarray | None = None, D: tuple = (0.0,) * 5
) -> list[tuple[str, int, object]]:
    """Images, and CameraInfo where K is given, as rows; recorded 5 ms after they were taken."""
    rows = []
    for index, image in enumerate(images):
        time = stamp(index)
        if K is not None:
            info = info_message(K, image.shape[1::-1], time, D)
            rows.append((INFO_TOPIC, time + 5_000_000, info))
        rows.append((IMAGE_TOPIC, time + 5_000_000, image_message(image, time)))
    return rows


def storage_file(bag: Path) -> Path:
    """The one storage file of a rosbag2 folder."""
    (file,) = (f for f in bag.iterdir() if f.name != "metadata.yaml")
    return file
