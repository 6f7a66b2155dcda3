"""Images of any pixel type, converted for the front end: 8-bit pixels and a validity mask."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np

from scfeat_ros.errors import InputError

_LARGEST = 1e300
"""Limit of float64 pixels, so that their range does not overflow."""

_DECODE_FLAGS = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
_CONVERTED = (np.uint8, np.uint16, np.float32)
"""Pixel types for which OpenCV converts colours; TIFF files may have others."""
_JPEG_END = np.array([0xFF, 0xD9], np.uint8)
JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG's start-of-frame segments, which contain the image size."""
_BAYER = {  # OpenCV names a pattern by its second row
    "bayer_rggb": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg": cv2.COLOR_BayerGB2RGB,
}


class UnreadableImageError(InputError):
    """One image is damaged; later ones may be fine."""


class UnknownEncodingError(InputError):
    """An image encoding that this package does not read."""


@dataclass(frozen=True)
class DecodedImage:
    """An image for the front end.

    Attributes:
        pixels: (H, W, 3) uint8 RGB or (H, W) uint8 grey.
        mask: (H, W) bool, True where pixels are valid; None if all are.
        note: how many pixels are not valid and why; None if all are.
    """

    pixels: np.ndarray
    mask: np.ndarray | None = None
    note: str | None = None


def packed_rows(message: Any, row: int, dtype: np.dtype) -> np.ndarray:
    """The values of a sensor_msgs/Image without padding, in native byte order.

    Args:
        message: with enough data for its rows; the padding of the last one may be missing.
        row: bytes of a row without padding.
        dtype: type of the values.

    Returns:
        (H, row / itemsize), contiguous.
    """
    data = np.frombuffer(message.data, np.uint8)
    rows = np.lib.stride_tricks.as_strided(data, (message.height, row), (message.step, 1))
    values = np.ascontiguousarray(rows).view(dtype)
    is_swapped = bool(message.is_bigendian) != (sys.byteorder == "big")
    return values.byteswap() if is_swapped else values


def check_yuv_width(encoding: str, width: int) -> None:
    """Refuse YUV 4:2:2 images of odd width: some OpenCV versions write out of bounds.

    Raises:
        UnreadableImageError: such an image.
    """
    if encoding.startswith(("yuv", "uyvy", "yuyv")) and width % 2:
        raise UnreadableImageError(
            f"image of {width} pixels a row, but {encoding} has two pixels in each of its units"
        )


def to_8_bit(pixels: np.ndarray) -> DecodedImage:
    """Pixels of any type -> 8-bit grey or RGB.

    uint16 is scaled from its full range. Types without a defined range (32FC1 and the like) are
    scaled from the image's smallest to its largest finite value; non-finite pixels are masked.

    Args:
        pixels: (H, W) grey or (H, W, 3) RGB.

    Raises:
        UnreadableImageError: another number of channels, or not one pixel is finite.
    """
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise UnreadableImageError(f"image of {pixels.shape[2]} channels without a colour")
    if pixels.dtype == np.uint8:
        return DecodedImage(np.ascontiguousarray(pixels))
    if pixels.dtype == np.uint16:
        return DecodedImage(cv2.convertScaleAbs(pixels, alpha=255 / 65535))
    finite = np.isfinite(pixels)
    valid = finite.all(axis=2) if pixels.ndim == 3 else finite
    if not valid.any():
        raise UnreadableImageError("image without a single finite pixel (all NaN or infinite)")
    values = pixels.astype(np.float64).clip(-_LARGEST, _LARGEST)
    low, high = values[valid].min(), values[valid].max()
    filled = np.where(finite, values, low)
    scaled = (filled - low) * (255 / max(high - low, 1e-12))
    image = np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8))
    if valid.all():
        return DecodedImage(image)
    return DecodedImage(image, valid, f"{1 - valid.mean():.1%} are NaN or infinite")


def from_compressed(message: Any) -> DecodedImage:
    """The picture of a sensor_msgs/CompressedImage (JPEG, PNG or what else OpenCV reads).

    Args:
        message: of rclpy's or of rosbags' class.

    Raises:
        UnknownEncodingError: compressedDepth.
        UnreadableImageError: no image, or a damaged one.
    """
    if "compressedDepth" in message.format:
        raise UnknownEncodingError(
            f"compressed image of format '{message.format}': compressedDepth is not an image; use "
            "the raw depth images, or the camera's"
        )
    pixels = _decoded(np.frombuffer(message.data, np.uint8), f"'{message.format}' image")
    # image_transport leaves a sensor's mosaic as it is
    pattern = _BAYER.get(message.format[:10])
    if pattern is not None and pixels.ndim == 2:
        pixels = cv2.cvtColor(pixels, pattern)
    return to_8_bit(pixels)


def decode(data: np.ndarray, name: str) -> np.ndarray:
    """The picture of an encoded file in memory (JPEG, PNG, whatever OpenCV reads).

    Args:
        data: (n,) uint8, the file's bytes.
        name: what to call it in an error.

    Returns:
        (H, W) uint8 for a grey image, else (H, W, 3) uint8 RGB, as the sensor stored them: the
        Exif orientation is ignored. Other pixel types are converted by `to_8_bit`.

    Raises:
        UnreadableImageError: no image, or a damaged one.
    """
    return to_8_bit(_decoded(data, name)).pixels


def _decoded(data: np.ndarray, name: str) -> np.ndarray:
    """(H, W) grey or (H, W, 3) RGB, of the file's pixel type; see `decode`."""
    size, is_open = len(data), _lacks_end(data)
    if is_open:
        data = np.append(data, _JPEG_END)
    try:
        image = cv2.imdecode(data, _DECODE_FLAGS) if size else None
    except cv2.error as error:
        raise UnreadableImageError(f"{name} cannot be decoded: {error}") from error
    if image is None:
        raise UnreadableImageError(f"{name} cannot be decoded ({size} bytes)")
    # missing rows are of one value; a progressive image lacks detail everywhere instead
    if is_open and ((image[-1] == image[-1, :1]).all() or _is_progressive(data)):
        raise UnreadableImageError(f"{name} is cut off after {size} bytes")
    if image.ndim == 3:
        if image.dtype in _CONVERTED:
            code = cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGB
            image = cv2.cvtColor(image, code)
        else:
            image = image[..., 2::-1]
    return image


def _is_progressive(data: np.ndarray) -> bool:
    """Whether a JPEG is progressive: several scans, from coarse to fine."""
    frames = (marker for marker in jpeg_segments(io.BytesIO(data)) if marker in JPEG_FRAMES)
    return next(frames, None) in (0xC2, 0xC6, 0xCA, 0xCE)


def jpeg_segments(file: BinaryIO) -> Iterator[int]:
    """Markers of a JPEG's segments; the file is positioned at the content of each."""
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        content = file.tell()
        yield head[1]
        file.seek(content + int.from_bytes(head[2:], "big") - 2)


def _lacks_end(data: np.ndarray) -> bool:
    """Whether a JPEG lacks its end marker: it is cut off, or the camera omits the marker.

    Some cameras pad with zeros after it.
    """
    if data[:2].tobytes() != b"\xff\xd8":
        return False
    end = _JPEG_END.tobytes()
    return end not in data[-4096:].tobytes() and end not in data.tobytes().rstrip(b"\0")[-4096:]
