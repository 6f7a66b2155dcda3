"""Writes the sample camera bag: a drive through the street, as recorded by a robot's camera."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_training.geometry import intrinsic_matrix
from scfeat_training.render import Camera, World
from scfeat_training.street import Drive, drive, street

IMAGE_TOPIC = "/camera/image_raw/compressed"
INFO_TOPIC = "/camera/camera_info"
POSE_TOPIC = "/ground_truth/pose"
CAMERA_FRAME = "camera_optical_frame"
WORLD_FRAME = "world"
START_NS = 1_767_225_600 * 10**9  # midnight of 1 January 2026, UTC
JPEG_QUALITY = 92


def intrinsics(size: tuple[int, int]) -> np.ndarray:
    """K (3, 3) of the sample camera: 75 degrees wide, centred, without distortion."""
    width, height = size
    focal = 420 / 640 * width
    return intrinsic_matrix(focal, focal, (width - 1) / 2, (height - 1) / 2)


def write_sample_bag(
    out: str | Path,
    seconds: float = 10.0,
    rate: float = 15.0,
    size: tuple[int, int] = (640, 480),
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Render the drive and write it as a ROS 2 bag (mcap); returns the bag's folder.

    Topics: the camera's JPEG images, its CameraInfo, and the pose of its optical frame in the
    world (geometry_msgs/PoseStamped), all of the same stamp. The bag is written under a
    temporary name and renamed when it is complete.

    Raises:
        OutputExistsError: `out` exists, and `overwrite` is not set or it is no bag.
        InputError: a bad value, or the bag cannot be written.
    """
    out = Path(out)
    if not (seconds > 0 and rate > 0 and seconds * rate >= 1):
        raise InputError(f"a bag of {seconds} s at {rate} frames per second has no frame")
    if min(size) < 32:
        raise InputError(f"an image of {size[0]}x{size[1]} is too small; want 32x32 at least")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists already; choose another name or give --overwrite")
    if out.exists() and not (out / "metadata.yaml").is_file():
        raise OutputExistsError(
            f"{out} is not a bag, so --overwrite does not replace it; choose another name"
        )
    trip = drive(seconds, rate)
    # The bag's name goes into the file names in it, so it is written under its own name.
    staging = out.with_name(f".{out.name}.scfeat-partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run has left
        staging.mkdir(parents=True)
        frames = _frames(trip, seed, size, workers)
        if progress:
            frames = tqdm(frames, "rendering the sample bag", len(trip.times), unit="frame")
        _write(staging / out.name, frames, trip, size)
        if out.exists():
            out.rename(staging / "replaced")
        (staging / out.name).rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _frames(trip: Drive, seed: int, size: tuple[int, int], workers: int) -> Iterator[bytes]:
    """JPEG files of all frames in order, rendered by several processes."""
    count = len(trip.times)
    workers = min(workers or os.cpu_count() or 1, count, 8)
    if workers == 1:
        world = street(seed, trip)
        for index in range(count):
            yield _encode(world, trip, index, seed, size)
        return
    context = multiprocessing.get_context("spawn")  # forking under torch's threads may hang
    with ProcessPoolExecutor(workers, context, _start_worker, (trip, seed)) as pool:
        yield from pool.map(_render_frame, range(count), repeat(seed), repeat(size))


_worker: tuple[World, Drive] | None = None


def _start_worker(trip: Drive, seed: int) -> None:
    global _worker
    cv2.setNumThreads(1)
    _worker = street(seed, trip), trip


def _render_frame(index: int, seed: int, size: tuple[int, int]) -> bytes:
    assert _worker is not None
    return _encode(*_worker, index, seed, size)


def _encode(world: World, trip: Drive, index: int, seed: int, size: tuple[int, int]) -> bytes:
    """Render a frame, add what a sensor adds, and encode it."""
    camera = Camera(intrinsics(size), trip.R[index], trip.t[index], size)
    image = world.render(camera)
    rng = np.random.default_rng((seed, 8, index))
    width, height = size
    # Automatic exposure that drifts, and a lens that is darker at the corners.
    time = trip.times[index]
    exposure = 1.04 + 0.13 * np.sin(0.9 * time + 0.4) + 0.03 * np.sin(3.1 * time)
    x = (np.arange(width) - width / 2) / width
    y = (np.arange(height) - height / 2) / width
    lens = 1 - 0.42 * (x[None, :] ** 2 + y[:, None] ** 2)
    light = image * (exposure * lens[..., None]).astype(np.float32)
    # Shot noise grows with the root of the light, read noise does not.
    deviation = np.sqrt(1.0 + 0.02 * light)
    light += deviation * rng.standard_normal(light.shape, dtype=np.float32)
    # Highlights roll off instead of clipping hard.
    light = np.where(light > 215, 215 + 40 * np.tanh((light - 215) / 40), light)
    pixels = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    return data.tobytes()


def _write(path: Path, frames: Iterator[bytes], trip: Drive, size: tuple[int, int]) -> None:
    """Write the messages of all frames to a new bag."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types = store.types
    width, height = size
    K = intrinsics(size)
    P = np.hstack([K, np.zeros((3, 1))])
    topics = (
        (IMAGE_TOPIC, "sensor_msgs/msg/CompressedImage"),
        (INFO_TOPIC, "sensor_msgs/msg/CameraInfo"),
        (POSE_TOPIC, "geometry_msgs/msg/PoseStamped"),
    )
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = [writer.add_connection(*topic, typestore=store) for topic in topics]
        for index, jpeg in enumerate(frames):
            stamp = START_NS + round(float(trip.times[index]) * 1e9)
            time = types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9))
            header = types["std_msgs/msg/Header"](time, CAMERA_FRAME)
            image = types["sensor_msgs/msg/CompressedImage"](
                header, "rgb8; jpeg compressed bgr8", np.frombuffer(jpeg, np.uint8)
            )
            info = types["sensor_msgs/msg/CameraInfo"](
                header=header,
                height=height,
                width=width,
                distortion_model="plumb_bob",
                d=np.zeros(5),
                k=K.ravel(),
                r=np.eye(3).ravel(),
                p=P.ravel(),
                binning_x=0,
                binning_y=0,
                roi=types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False),
            )
            R = trip.R[index].T  # camera to world
            position = -R @ trip.t[index]
            pose = types["geometry_msgs/msg/PoseStamped"](
                types["std_msgs/msg/Header"](time, WORLD_FRAME),
                types["geometry_msgs/msg/Pose"](
                    types["geometry_msgs/msg/Point"](*map(float, position)),
                    types["geometry_msgs/msg/Quaternion"](*quaternion(R)),
                ),
            )
            for connection, message in zip(connections, (image, info, pose), strict=True):
                data = store.serialize_cdr(message, connection.msgtype)
                writer.write(connection, stamp, data)


def quaternion(R: np.ndarray) -> tuple[float, float, float, float]:
    """The unit quaternion (x, y, z, w) of a rotation (3, 3), w >= 0."""
    # Rows and columns of this matrix are multiples of the quaternion; take the longest.
    xx, yy, zz = R[0, 0], R[1, 1], R[2, 2]
    outer = np.array(
        [
            [1 + xx - yy - zz, R[0, 1] + R[1, 0], R[0, 2] + R[2, 0], R[2, 1] - R[1, 2]],
            [R[0, 1] + R[1, 0], 1 - xx + yy - zz, R[1, 2] + R[2, 1], R[0, 2] - R[2, 0]],
            [R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], 1 - xx - yy + zz, R[1, 0] - R[0, 1]],
            [R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], 1 + xx + yy + zz],
        ]
    )
    q = outer[np.argmax(np.diag(outer))]
    q = q / math.copysign(np.linalg.norm(q), q[3])
    return tuple(float(value) for value in q)
