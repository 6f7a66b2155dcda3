"""Images from ROS messages (without ROS) and from files, as uint8 RGB or grey arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.image.image import ImageError, convert_color, to_cvtype

from scfeat_ros.decoded_image import (
    DecodedImage,
    UnknownEncodingError,
    UnreadableImageError,
    check_yuv_width,
    decode,
    from_compressed,
    packed_rows,
    to_8_bit,
)
from scfeat_ros.errors import InputError

_GENERIC = {
    "8UC1": "mono8",
    "8UC3": "bgr8",
    "8UC4": "bgra8",
    "16UC1": "mono16",
    "16UC3": "bgr16",
    "16UC4": "bgra16",
}
"""OpenCV's type names, with OpenCV's channel order."""

ENCODINGS = (
    "mono8 mono16 rgb8 bgr8 rgba8 bgra8 rgb16 bgr16 rgba16 bgra16 "
    "bayer_rggb8 bayer_bggr8 bayer_gbrg8 bayer_grbg8 "
    "bayer_rggb16 bayer_bggr16 bayer_gbrg16 bayer_grbg16 "
    "uyvy yuv422 yuyv yuv422_yuy2 8SC1 16SC1 32SC1 32FC1 64FC1"
).split()
"""Encodings of sensor_msgs/Image that are read."""

_BY_NAME = {name.lower(): name for name in ENCODINGS}


def from_message(message: Any) -> DecodedImage:
    """The picture of a sensor_msgs/Image or sensor_msgs/CompressedImage.

    Args:
        message: of rclpy's or of rosbags' class.

    Returns:
        The image, grey or RGB; other types than 8 bits are converted by `to_8_bit`.

    Raises:
        UnknownEncodingError: an encoding outside `ENCODINGS`, or compressedDepth.
        UnreadableImageError: the message is damaged.
    """
    if hasattr(message, "format"):
        return from_compressed(message)
    encoding = _BY_NAME.get(_GENERIC.get(message.encoding, message.encoding).lower())
    if encoding is None:
        raise UnknownEncodingError(
            f"image encoding '{message.encoding}' is not supported; "
            f"known are {', '.join(ENCODINGS)}"
        )
    check_yuv_width(encoding, int(message.width))
    _, _, dtype, channels = to_cvtype(encoding)
    pixels = _pixels(message, np.dtype(dtype), channels)
    try:
        if not encoding.startswith("mono") and not encoding[0].isdigit():
            pixels = convert_color(pixels, encoding, "rgb16" if dtype == "uint16" else "rgb8")
    except (cv2.error, ImageError) as error:
        # e.g. a Bayer image of one pixel
        raise UnreadableImageError(
            f"{message.width}x{message.height} {encoding} image cannot be converted: {error}"
        ) from error
    return to_8_bit(pixels)


def _pixels(message: Any, dtype: np.dtype, channels: int) -> np.ndarray:
    """(H, W) or (H, W, channels) array in native byte order, without the rows' padding."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    used = width * channels * dtype.itemsize
    # the padding of the last row may be missing
    needed = (height - 1) * step + used if height and width else 0
    if step < used:
        raise UnreadableImageError(
            f"image of {width}x{height} pixels {message.encoding} has a step of {step} bytes, "
            f"a row needs {used}"
        )
    if len(message.data) < needed:
        raise UnreadableImageError(
            f"image of {width}x{height} pixels {message.encoding} with rows of {step} bytes needs "
            f"{needed} bytes, the message holds {len(message.data)}"
        )
    if needed == 0:
        raise UnreadableImageError(f"image of {width}x{height} pixels is empty")
    pixels = packed_rows(message, used, dtype)
    return pixels if channels == 1 else pixels.reshape(height, width, channels)


def read_file(path: Path) -> np.ndarray:
    """The picture of an image file; see `decode`.

    Raises:
        InputError: the file is missing or cannot be read as an image.
    """
    try:
        # not np.fromfile, which cannot read a pipe (/dev/stdin)
        return decode(np.frombuffer(path.read_bytes(), np.uint8), "the file")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnreadableImageError as error:
        raise InputError(f"{path}: {error}; give a JPEG or PNG image") from error


def read_mask(path: Path) -> np.ndarray:
    """An image file as (H, W) bool, True where it is not black.

    Raises:
        InputError: see `read_file`.
    """
    image = read_file(path)
    return image > 0 if image.ndim == 2 else image.any(axis=2)
