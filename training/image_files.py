"""Image files: their pixels, and their size without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from scfeat_ros.decoded_image import JPEG_FRAMES, jpeg_segments
from scfeat_ros.errors import InputError

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB; InputError names a file that cannot be read."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    # The stored pixels, not the EXIF orientation, are what poses and K belong to.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error as error:  # more pixels than OpenCV takes, or memory holds
        raise InputError(f"{path}: too large to be decoded; shrink or remove the file") from error
    if image is None:
        raise InputError(f"{path}: no image that can be decoded; replace or remove the file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: Path, image: np.ndarray, parameters: Sequence[int] = ()) -> None:
    """Write an image in the format that its name ends with.

    Not by `cv2.imwrite`, which crashes over a path that is no UTF-8.

    Args:
        path: the file.
        image: (H, W) or (H, W, 3) uint8, grey or BGR.
        parameters: of the format, as `cv2.imencode` takes them.

    Raises:
        InputError: it cannot be written; the message names the file.
    """
    _, data = cv2.imencode(path.suffix, image, parameters)
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of an image file as `read_image` gives it.

    Of JPEG and PNG files only the header is read, and whether they end too early; others are
    decoded, and so are those with an unusual header.

    Raises:
        InputError: the file cannot be read or is no image.
    """
    size = None
    try:
        with Path(path).open("rb") as file:
            start = file.read(24)
            if start.startswith(JPEG):
                size = _jpeg_size(file)
            elif start.startswith(PNG):
                size = int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:], "big")
                if not _ends_with(file, b"IEND", 8):
                    raise InputError(f"{path}: ends too early; replace or remove the file")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if size is None:
        height, width = read_image(path).shape[:2]
        size = width, height
    return size


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    """(width, height) of the frame; None where something is missing or unusual."""
    size = None
    for marker in jpeg_segments(file):
        if marker == _JPEG_SCAN:  # pixels follow
            return size if size and all(size) and _ends_with(file, _JPEG_END, 2) else None
        if marker in JPEG_FRAMES:
            frame = file.read(5)
            size = int.from_bytes(frame[3:], "big"), int.from_bytes(frame[1:3], "big")
    return None


def _ends_with(file: BinaryIO, mark: bytes, back: int) -> bool:
    """Whether a file has its end mark: `back` bytes before its end, or with other bytes after."""
    here = file.tell()
    at = file.seek(0, 2)
    file.seek(max(here, at - back))
    if file.read(len(mark)) == mark:
        return True
    file.seek(here)
    return mark in file.read()
