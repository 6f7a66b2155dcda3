"""Decodes sensor_msgs/Image by cv_bridge, with checks."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import Image

from scfeat_ros import subprocesses
from scfeat_ros.decoded_image import DecodedImage, check_yuv_width, packed_rows, to_8_bit
from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.messages import pack_array

_ALIASES = {
    "8UC1": "mono8",
    "8UC3": "bgr8",
    "8UC4": "bgra8",
    "16UC3": "bgr16",
    "16UC4": "bgra16",
    "uyvy": "yuv422",
    "yuyv": "yuv422_yuy2",
}
"""OpenCV's type names, with OpenCV's channel order, and names that older cv_bridge lacks."""

_TRIAL = """
import numpy, cv_bridge
from cv_bridge.boost.cv_bridge_boost import cvtColor2
cv_bridge.CvBridge().encoding_to_dtype_with_channels("bgr8")
cvtColor2(numpy.zeros((2, 2, 3), numpy.uint8), "bgr8", "rgb8")
"""
TRIAL_TIMEOUT = 60
"""Timeout of the trial, seconds."""
INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
"""Exit statuses of a trial that was killed by a signal from outside."""


class ImageDecoder:
    """Decodes image messages with cv_bridge.

    Raises:
        ScfeatError: cv_bridge is not installed, its compiled part does not work with the numpy or
            OpenCV of this Python, or the trial timed out; the message says what to do.
    """

    def __init__(self) -> None:
        _try_cv_bridge()
        from cv_bridge import CvBridge

        self._bridge = CvBridge()

    def decode(self, message: Any) -> DecodedImage:
        """Decode a sensor_msgs/Image.

        Colour (RGB, BGR, with alpha, Bayer, YUV 4:2:2) is converted to RGB, grey stays grey, and
        other types than 8 bits are converted by `to_8_bit`, as by `images.from_message` for
        recorded bags.

        Raises:
            InputError: zero size, too few bytes, or an unknown encoding.
        """
        width, height, step = message.width, message.height, message.step
        encoding = _ALIASES.get(message.encoding, message.encoding)
        if width == 0 or height == 0:
            raise InputError(f"image of zero size ({width}x{height})")
        try:
            dtype, channels = self._bridge.encoding_to_dtype_with_channels(encoding)
        except Exception as error:  # cv_bridge has no common exception
            raise InputError(
                f"image encoding '{encoding}' is unknown; publish rgb8, bgr8, "
                "mono8, a Bayer pattern or yuv422, or use the compressed transport"
            ) from error
        check_yuv_width(encoding, width)
        row = width * np.dtype(dtype).itemsize * channels
        if step < row:
            raise InputError(
                f"image of {width}x{height} {encoding} announces {step} bytes a row, but a row "
                f"needs {row}"
            )
        needed = step * (height - 1) + row  # the padding of the last row may be missing
        if len(message.data) < needed:
            raise InputError(
                f"truncated image: {len(message.data)} bytes, but {height} rows of {step} bytes "
                f"({width}x{height} {encoding}) were announced"
            )
        swapped = bool(message.is_bigendian) != (sys.byteorder == "big")
        if step != row or swapped or encoding != message.encoding:
            message = _repacked(message, encoding, row, np.dtype(dtype))
        has_colour = not encoding.startswith("mono") and not encoding[0].isdigit()
        try:
            pixels = self._bridge.imgmsg_to_cv2(message, "rgb8" if has_colour else "passthrough")
        except Exception as error:  # e.g. a Bayer image of one pixel
            raise InputError(
                f"{width}x{height} {encoding} image cannot be converted: {error}"
            ) from error
        return to_8_bit(pixels)


def _try_cv_bridge() -> None:
    """Try cv_bridge in a subprocess: it may crash instead of raising.

    Raises:
        ScfeatError: see `ImageDecoder`.
    """
    try:
        trial = subprocesses.run([sys.executable, "-c", _TRIAL], TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ScfeatError(
            f"the trial of cv_bridge has not ended in {TRIAL_TIMEOUT} s: configure the node again "
            "when the computer is less busy"
        ) from error
    if trial.returncode == 0:
        return
    if trial.returncode in INTERRUPTED:
        raise ScfeatError("the trial of cv_bridge was interrupted: configure the node again")
    lines = [line for line in trial.stderr.splitlines() if line.strip()]
    cause = lines[-1].strip() if lines else f"it ended with status {trial.returncode}"
    raise ScfeatError(
        f"cv_bridge does not work with numpy {np.__version__} and OpenCV {cv2.__version__} of "
        f"{sys.executable} ({cause}). Install it (apt install ros-$ROS_DISTRO-cv-bridge), and "
        "leave this Python the numpy and OpenCV that your distribution's cv_bridge was built "
        "with: pip install 'numpy<2' where that is numpy 1, pip uninstall opencv-python "
        'opencv-python-headless opencv-contrib-python (README, "On a robot")'
    )


def _repacked(message: Any, encoding: str, row: int, dtype: np.dtype) -> Image:
    """The message without padding, in native byte order, with another encoding.

    cv_bridge misreads padding by fractions of a pixel, and cannot swap bytes under numpy 2.
    """
    values = packed_rows(message, row, dtype)
    copy = Image(header=message.header, height=message.height, width=message.width)
    copy.encoding, copy.step, copy.data = encoding, row, pack_array(values)
    copy.is_bigendian = int(sys.byteorder == "big")
    return copy
