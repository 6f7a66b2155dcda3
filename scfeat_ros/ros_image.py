"""sensor_msgs/Image and CompressedImage -> what the extractor takes, by cv_bridge, with checks."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import Image

from scfeat_ros import subprocesses
from scfeat_ros.decoded_image import DecodedImage, check_pairs, packed_rows, to_8_bit
from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.messages import pack_array

_ALIASES = {
    "8UC1": "mono8",
    "8UC3": "bgr8",
    "8UC4": "bgra8",
    "uyvy": "yuv422",
    "yuyv": "yuv422_yuy2",
}
"""OpenCV's type names, taken as OpenCV's channel order, and names newer than cv_bridge."""

_TRIAL = """
import numpy, cv_bridge
from cv_bridge.boost.cv_bridge_boost import cvtColor2
cv_bridge.CvBridge().encoding_to_dtype_with_channels("bgr8")
cvtColor2(numpy.zeros((2, 2, 3), numpy.uint8), "bgr8", "rgb8")
"""
TRIAL_TIMEOUT = 60
"""Seconds after which the trial is given up."""
INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
"""Statuses of a trial that somebody else has ended."""


class ImageDecoder:
    """Decodes image messages with cv_bridge.

    Raises:
        ScfeatError: cv_bridge is not there, or its compiled part does not work with the numpy
            or OpenCV of this Python, or the trial of it did not come to an end; the message says
            what to do.
    """

    def __init__(self) -> None:
        _try_cv_bridge()
        from cv_bridge import CvBridge

        self._bridge = CvBridge()

    def decode(self, message: Any) -> DecodedImage:
        """Decode a sensor_msgs/Image.

        Colour (RGB, BGR, with alpha, Bayer, YUV 4:2:2) becomes RGB, grey stays grey, and other
        numbers than 8 bits are scaled by `to_8_bit`, as `images.from_message` does it for recorded
        bags.

        Raises:
            InputError: zero size, fewer bytes than announced, or an encoding that is unknown.
        """
        width, height, step = message.width, message.height, message.step
        encoding = _ALIASES.get(message.encoding, message.encoding)
        if width == 0 or height == 0:
            raise InputError(f"image of zero size ({width}x{height})")
        try:
            dtype, channels = self._bridge.encoding_to_dtype_with_channels(encoding)
        except Exception as error:  # boost raises what it likes
            raise InputError(
                f"image encoding '{encoding}' is unknown; publish rgb8, bgr8, "
                "mono8, a Bayer pattern or yuv422, or use the compressed transport"
            ) from error
        check_pairs(encoding, width)
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
            message = _tidied(message, encoding, row, np.dtype(dtype))
        has_colour = not encoding.startswith("mono") and not encoding[0].isdigit()
        try:
            pixels = self._bridge.imgmsg_to_cv2(message, "rgb8" if has_colour else "passthrough")
        except Exception as error:  # e.g. a Bayer image of one pixel
            raise InputError(
                f"{width}x{height} {encoding} image cannot be converted: {error}"
            ) from error
        return to_8_bit(pixels)


def _try_cv_bridge() -> None:
    """Use cv_bridge in a process of its own: it may not raise but crash.

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


def _tidied(message: Any, encoding: str, row: int, dtype: np.dtype) -> Image:
    """The message without padding, in the machine's byte order, under another encoding.

    cv_bridge misreads padding by parts of a pixel, and cannot swap bytes under numpy 2.
    """
    values = packed_rows(message, row, dtype)
    copy = Image(header=message.header, height=message.height, width=message.width)
    copy.encoding, copy.step, copy.data = encoding, row, pack_array(values)
    copy.is_bigendian = int(sys.byteorder == "big")
    return copy
