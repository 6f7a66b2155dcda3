"""Photometric augmentation: what light, lens, sensor and codec do to a picture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Photometric:
    """How strong each change may be, 0 for none; `probability` is that of each optional one."""

    brightness: float = 0.15  # added, as a share of full scale
    contrast: float = 0.3  # log of the factor about mid grey
    gamma: float = 0.35  # log of the exponent
    colour: float = 0.08  # log of the gain of each channel
    grey: float = 0.1  # probability of a picture without colour
    noise: float = 0.04  # standard deviation, as a share of full scale
    blur: float = 1.2  # standard deviation in pixels
    motion: int = 7  # longest motion blur in pixels
    jpeg: int = 30  # lowest quality, 95 at most
    shadow: float = 0.6  # darkest shadow, as a share taken away
    light: float = 0.0  # log of the gain of a smooth field of light, 0 for even light
    probability: float = 0.3


def augment(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    """Change an RGB uint8 image (H, W, 3) at random; returns a new one of the same shape."""
    image = _tone(image, rng, options)
    if rng.random() < options.grey:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        image = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    # drawn only where it is wanted: without it a seed's pairs stay what they were
    if options.light and rng.random() < options.probability:
        image = _light(image, rng, options)
    for change in (_shadow, _blur, _motion, _noise, _jpeg):
        if rng.random() < options.probability:
            image = change(image, rng, options)
    return image


def _tone(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    """Gamma, contrast, brightness and a gain per channel, as one table per channel."""
    exponent = np.exp(rng.uniform(-options.gamma, options.gamma))
    factor = np.exp(rng.uniform(-options.contrast, options.contrast))
    shift = rng.uniform(-options.brightness, options.brightness)
    gains = np.exp(rng.uniform(-options.colour, options.colour, 3))
    level = np.linspace(0, 1, 256)[:, None] ** exponent
    level = ((level - 0.5) * factor + 0.5 + shift) * gains
    table = (level.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return cv2.LUT(image, table[None])


def _light(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    """Light that is brighter here and darker there: a gain with a few hills and valleys."""
    height, width = image.shape[:2]
    cells = int(rng.integers(2, 6))
    gain = np.exp(rng.uniform(-options.light, options.light, (cells, cells))).astype(np.float32)
    gain = cv2.resize(gain, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.multiply(image, cv2.merge([gain] * 3), dtype=cv2.CV_8U)


def _shadow(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    """A darker polygon with soft edges (or a brighter one around it)."""
    height, width = image.shape[:2]
    # Drawn at a quarter of the size: its edges are soft anyway.
    small = np.full(((height + 3) // 4, (width + 3) // 4), 255, np.uint8)
    corners = rng.uniform(-0.3, 1.3, (int(rng.integers(3, 6)), 2)) * (width / 4, height / 4)
    dark = int(255 * (1 - rng.uniform(0.2, 1) * options.shadow))
    cv2.fillPoly(small, [cv2.convexHull(corners.astype(np.int32))], dark)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.5, 6))
    shade = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.multiply(image, cv2.merge([shade] * 3), scale=1 / 255)


def _blur(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    if not options.blur:
        return image
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(min(0.3, options.blur), options.blur))


def _motion(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    """A straight blur, symmetric about each pixel so that nothing moves."""
    if options.motion < 2:
        return image
    size = int(rng.integers(1, options.motion // 2 + 1)) * 2 + 1
    angle = rng.uniform(0, np.pi)
    reach = (size - 1) / 2 * np.array([np.cos(angle), np.sin(angle)])
    offsets = np.linspace(-1, 1, 4 * size)[:, None] * reach + (size - 1) / 2
    kernel = np.zeros((size, size), np.float32)
    low = np.floor(offsets).astype(int)
    part = offsets - low
    for dx in (0, 1):
        for dy in (0, 1):
            weight = abs(1 - dx - part[:, 0]) * abs(1 - dy - part[:, 1])
            place = np.minimum(low + np.array([dx, dy]), size - 1)
            np.add.at(kernel, (place[:, 1], place[:, 0]), weight)
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def _noise(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= 255 * options.noise * rng.uniform(0.1, 1)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def _jpeg(image: np.ndarray, rng: np.random.Generator, options: Photometric) -> np.ndarray:
    if not options.jpeg:
        return image
    quality = int(rng.integers(options.jpeg, 96))
    _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)  # the order of channels passes through
