"""Features, matches and the overlay as standard ROS messages, and back.

Everything is a numpy structured array in between: `feature_array` and `match_array` fill one
from a result, `encode_cloud` and `decode_cloud` convert one to a sensor_msgs/PointCloud2 and back
without a loop over points. The message classes are passed as a `MessageTypes`, so that the same
code works with ROS (`ros_types`) and rosbags (`rosbags_types`); decoding needs only numpy.

Fields of `~/features` (one point per keypoint):
    x y z       float32  bearing in the camera's optical frame, z = 1; NaN if unknown
    u v         float32  pixels of the source image, centre of the top-left pixel at (0, 0)
    score       float32  detection score
    track_id    uint32
    descriptor  float32 or int8, count D; int8 is the descriptor times 127, rounded

Fields of `~/matches` (one point per match with the previous image):
    x y z, u v            float32  of the current keypoint, as above
    prev_u prev_v         float32  pixels of the previous image
    similarity            float32  cosine similarity of the two descriptors
    index prev_index      uint32   into the two images' `~/features`
    track_id              uint32
    prev_sec prev_nanosec int32, uint32  stamp of the previous image
"""

from __future__ import annotations

import array
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scfeat_ros.features import Features, FrameResult

DESCRIPTOR_TYPES = ("float32", "int8")
INT8_SCALE = 127.0

_DATATYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""sensor_msgs/PointField datatype -> numpy type code."""
_CODES = {code: number for number, code in _DATATYPES.items()}


@dataclass(frozen=True)
class MessageTypes:
    """The message classes to build with.

    Attributes:
        image, point_cloud2, point_field, header, time: classes of sensor_msgs/Image,
            sensor_msgs/PointCloud2, sensor_msgs/PointField, std_msgs/Header,
            builtin_interfaces/Time; all take their fields as keyword arguments.
        pack: contiguous uint8 array -> what the `data` fields of these classes hold.
    """

    image: type
    point_cloud2: type
    point_field: type
    header: type
    time: type
    pack: Callable[[np.ndarray], Any]


def ros_types() -> MessageTypes:
    """The classes of a ROS 2 installation.

    Raises:
        ImportError: no ROS 2 environment is sourced.
    """
    from builtin_interfaces.msg import Time
    from sensor_msgs.msg import Image, PointCloud2, PointField
    from std_msgs.msg import Header

    return MessageTypes(Image, PointCloud2, PointField, Header, Time, pack_array)


def rosbags_types(typestore: Any) -> MessageTypes:
    """The classes of a rosbags type store of ROS 2 (`rosbags.typesys.get_typestore`)."""
    types = typestore.types
    return MessageTypes(
        image=types["sensor_msgs/msg/Image"],
        point_cloud2=types["sensor_msgs/msg/PointCloud2"],
        point_field=types["sensor_msgs/msg/PointField"],
        header=types["std_msgs/msg/Header"],
        time=types["builtin_interfaces/msg/Time"],
        pack=lambda data: data,
    )


def pack_array(data: np.ndarray) -> array.array:
    """A contiguous uint8 array as array.array('B'), which rclpy does not check byte by byte."""
    packed = array.array("B")
    packed.frombytes(memoryview(data).cast("B"))
    return packed


def stamp_to_nanoseconds(stamp: Any) -> int:
    """builtin_interfaces/Time (or ROS 1's, with secs and nsecs) -> nanoseconds."""
    if hasattr(stamp, "nanosec"):
        return int(stamp.sec) * 10**9 + int(stamp.nanosec)
    return int(stamp.secs) * 10**9 + int(stamp.nsecs)


def feature_dtype(descriptor_dim: int, descriptor_type: str = "float32") -> np.dtype:
    """dtype of one point of `~/features`.

    Raises:
        ValueError: a descriptor type other than "float32" and "int8".
    """
    if descriptor_type not in DESCRIPTOR_TYPES:
        raise ValueError(
            f"descriptor_type must be one of {', '.join(DESCRIPTOR_TYPES)}, got {descriptor_type!r}"
        )
    return np.dtype(
        [(name, "<f4") for name in ("x", "y", "z", "u", "v", "score")]
        + [
            ("track_id", "<u4"),
            ("descriptor", "<f4" if descriptor_type == "float32" else "<i1", (descriptor_dim,)),
        ]
    )


MATCH_DTYPE = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z", "u", "v", "prev_u", "prev_v", "similarity")]
    + [(name, "<u4") for name in ("index", "prev_index", "track_id")]
    + [("prev_sec", "<i4"), ("prev_nanosec", "<u4")]
)
"""dtype of one point of `~/matches`."""


def feature_array(
    result: FrameResult, bearings: np.ndarray | None = None, descriptor_type: str = "float32"
) -> np.ndarray:
    """The points of `~/features`.

    Args:
        result: of the front end, N keypoints with descriptors of length D.
        bearings: (N, 3) of the keypoints (see `camera.Camera.bearings`), None for NaN.
        descriptor_type: "float32" or "int8".

    Returns:
        (N,) array of `feature_dtype`.
    """
    features = result.features
    points = np.empty(len(features), feature_dtype(features.descriptors.shape[1], descriptor_type))
    _set_bearings(points, bearings)
    points["u"], points["v"] = features.keypoints.T
    points["score"] = features.scores
    points["track_id"] = result.track_ids
    if descriptor_type == "int8":
        points["descriptor"] = np.rint(features.descriptors * INT8_SCALE).clip(-127, 127)
    else:
        points["descriptor"] = features.descriptors
    return points


def match_array(result: FrameResult, bearings: np.ndarray | None = None) -> np.ndarray:
    """The points of `~/matches`.

    Args:
        result: of the front end, M matches with the previous frame.
        bearings: (N, 3) of all keypoints of the current image, None for NaN.

    Returns:
        (M,) array of `MATCH_DTYPE`.
    """
    previous, current = result.matches.indices.T
    points = np.zeros(len(current), MATCH_DTYPE)
    _set_bearings(points, None if bearings is None else bearings[current])
    points["u"], points["v"] = result.features.keypoints[current].T
    points["prev_u"], points["prev_v"] = result.previous_keypoints.T
    points["similarity"] = result.matches.similarity
    points["index"], points["prev_index"] = current, previous
    points["track_id"] = result.track_ids[current]
    if result.previous_stamp is not None:
        points["prev_sec"], points["prev_nanosec"] = divmod(result.previous_stamp, 10**9)
    return points


def _set_bearings(points: np.ndarray, bearings: np.ndarray | None) -> None:
    for axis, name in enumerate("xyz"):
        points[name] = np.nan if bearings is None else bearings[:, axis]


def encode_features(
    result: FrameResult,
    bearings: np.ndarray | None,
    types: MessageTypes,
    descriptor_type: str = "float32",
) -> Any:
    """`~/features` of a result: sensor_msgs/PointCloud2 with the source image's header."""
    points = feature_array(result, bearings, descriptor_type)
    return encode_cloud(points, result.stamp, result.frame_id, types)


def encode_matches(result: FrameResult, bearings: np.ndarray | None, types: MessageTypes) -> Any:
    """`~/matches` of a result: sensor_msgs/PointCloud2 with the current image's header."""
    return encode_cloud(match_array(result, bearings), result.stamp, result.frame_id, types)


def decode_features(message: Any) -> np.ndarray:
    """sensor_msgs/PointCloud2 of `~/features` -> (N,) structured array.

    Raises:
        ValueError: the message has another format; the text says what is wrong.
    """
    points = decode_cloud(message)
    _require(points, feature_dtype(1).names)
    return points


def decode_matches(message: Any) -> np.ndarray:
    """sensor_msgs/PointCloud2 of `~/matches` -> (M,) structured array.

    Raises:
        ValueError: the message has another format; the text says what is wrong.
    """
    points = decode_cloud(message)
    _require(points, MATCH_DTYPE.names)
    return points


def _require(points: np.ndarray, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in points.dtype.names]
    if missing:
        raise ValueError(f"the point cloud lacks the field(s) {', '.join(missing)}")


def to_features(points: np.ndarray, image_size: tuple[int, int]) -> Features:
    """Decoded `~/features` points -> Features, e.g. to match them again.

    Args:
        points: (N,) from `decode_features`; int8 descriptors come back with unit norm.
        image_size: (width, height) of the source image, which the message does not contain.
    """
    descriptors = points["descriptor"].astype(np.float32)
    if descriptors.ndim == 1:  # of one value
        descriptors = descriptors[:, None]
    if points["descriptor"].dtype == np.int8:
        norm = np.linalg.norm(descriptors, axis=1, keepdims=True)
        descriptors /= np.maximum(norm, np.finfo(np.float32).tiny)
    return Features(
        keypoints=np.stack([points["u"], points["v"]], axis=1).astype(np.float32),
        scores=points["score"].astype(np.float32),
        descriptors=descriptors,
        image_size=image_size,
    )


def encode_cloud(points: np.ndarray, stamp: int, frame_id: str, types: MessageTypes) -> Any:
    """A structured array as sensor_msgs/PointCloud2, width N and height 1.

    Args:
        points: (N,) structured array, little-endian, with x, y and z among its fields; sub-arrays
            become fields with a count.
        stamp: nanoseconds.
    """
    fields = []
    for name in points.dtype.names:
        dtype, offset = points.dtype.fields[name][:2]
        code = dtype.base.str[1:]
        fields.append(
            types.point_field(
                name=name,
                offset=int(offset),
                datatype=_CODES[code],
                count=int(np.prod(dtype.shape, dtype=int)),
            )
        )
    return types.point_cloud2(
        header=encode_header(stamp, frame_id, types),
        height=1,
        width=len(points),
        fields=fields,
        is_bigendian=False,
        point_step=points.dtype.itemsize,
        row_step=points.dtype.itemsize * len(points),
        data=types.pack(np.ascontiguousarray(points).view(np.uint8)),
        # NaN bearings make a cloud non-dense
        is_dense=not any(np.isnan(points[name]).any() for name in "xyz"),
    )


def decode_cloud(message: Any) -> np.ndarray:
    """Any sensor_msgs/PointCloud2 as a structured array.

    Returns:
        (height * width,) array; a field with a count above 1 is a sub-array.

    Raises:
        ValueError: a field outside the point or of unknown type, or too little data.
    """
    names, formats, offsets = [], [], []
    order = ">" if message.is_bigendian else "<"
    for field in message.fields:
        if field.datatype not in _DATATYPES:
            raise ValueError(f"point field '{field.name}' has unknown datatype {field.datatype}")
        code = order + _DATATYPES[field.datatype]
        names.append(field.name)
        formats.append((code, (int(field.count),)) if field.count > 1 else code)
        offsets.append(int(field.offset))
    try:
        dtype = np.dtype(
            {
                "names": names,
                "formats": formats,
                "offsets": offsets,
                "itemsize": int(message.point_step),
            }
        )
    except ValueError as error:
        raise ValueError(f"the point cloud's fields do not fit its point_step: {error}") from None
    height, width = int(message.height), int(message.width)
    data = np.frombuffer(message.data, np.uint8)
    used = width * dtype.itemsize
    needed = (height - 1) * int(message.row_step) + used if height and width else 0
    if len(data) < needed or (height > 1 and message.row_step < used):
        raise ValueError(
            f"the point cloud holds {len(data)} bytes, {height} x {width} points of "
            f"{dtype.itemsize} bytes need {needed}"
        )
    if needed == 0:
        return np.zeros(0, dtype)
    rows = np.lib.stride_tricks.as_strided(data, (height, used), (int(message.row_step), 1))
    return np.ascontiguousarray(rows).reshape(-1).view(dtype)


def encode_header(stamp: int, frame_id: str, types: MessageTypes) -> Any:
    """std_msgs/Header from nanoseconds and a frame id."""
    sec, nanosec = divmod(stamp, 10**9)
    return types.header(stamp=types.time(sec=sec, nanosec=nanosec), frame_id=frame_id)


def encode_image(image: np.ndarray, stamp: int, frame_id: str, types: MessageTypes) -> Any:
    """An overlay, (H, W, 3) uint8 RGB, as sensor_msgs/Image rgb8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an overlay is (H, W, 3) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    return types.image(
        header=encode_header(stamp, frame_id, types),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=types.pack(np.ascontiguousarray(image).reshape(-1)),
    )


def decode_image(message: Any) -> np.ndarray:
    """sensor_msgs/Image rgb8, as `encode_image` makes it, -> (H, W, 3) uint8 RGB.

    Raises:
        ValueError: another encoding, or too little data. (`images.from_message` reads all.)
    """
    if message.encoding != "rgb8":
        raise ValueError(f"an overlay is encoded rgb8, not {message.encoding!r}")
    data = np.frombuffer(message.data, np.uint8)
    if len(data) < message.height * message.step or message.step < 3 * message.width:
        raise ValueError(
            f"the image holds {len(data)} bytes, {message.height} rows of {message.step} bytes "
            f"for {message.width} pixels were announced"
        )
    rows = data[: message.height * message.step].reshape(message.height, message.step)
    return rows[:, : 3 * message.width].reshape(message.height, message.width, 3)


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("scfeat_ros.messages writes little-endian clouds from native arrays")
