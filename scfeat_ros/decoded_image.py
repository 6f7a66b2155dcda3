"""Images of any number type as the front end takes them: 8-bit pixels and a mask of valid ones."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_ros.errors import InputError

_LARGEST = 1e300
"""So that the range of an image of float64 is a number."""


class UnreadableImageError(InputError):
    """One image is damaged; those after it may be fine."""


@dataclass(frozen=True)
class DecodedImage:
    """An image for the front end.

    Attributes:
        pixels: (H, W, 3) uint8 RGB or (H, W) uint8 grey.
        mask: (H, W) bool, where pixels are valid; None where all are.
        note: what was odd about the image, None where nothing was.
    """

    pixels: np.ndarray
    mask: np.ndarray | None = None
    note: str | None = None


def to_8_bit(pixels: np.ndarray) -> DecodedImage:
    """Numbers of any type -> 8-bit grey or RGB.

    16 bits without a sign are scaled over their full range. Numbers without a known range (32FC1
    and the like) are stretched from the image's smallest to its largest finite value; pixels that
    are not finite are masked.

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
    return DecodedImage(
        image, valid, f"{1 - valid.mean():.1%} of the image's pixels are NaN or infinite"
    )
