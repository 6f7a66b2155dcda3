"""What runs between convolutions and behind the network in Triton, for GPUs.

The functions of `kernels.py`, `Projection.forward` and `selection.on_device`, with fewer launches
and passes over memory.

Maps are channels-last, of any batch size. A program of a kernel computes a tile of pixels (where it
upsamples, of cells of the small map) by channels; sums are taken in fp32 within a program and in
float64 over programs, in the same order every time. Sizes of images are not compiled in
(`do_not_specialize`), so that a new size does not compile anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from scfeat_ros.model import kernels
from scfeat_ros.model.descriptors import BLOCKS, ENCODER_BLOCK, Maps, Projection
from scfeat_ros.model.kernels import EPSILON, DetectorInput, Image, Norm, normalize_image
from scfeat_ros.model.sampling import upsample
from scfeat_ros.model.scfeat import DESCRIPTOR_STRIDE
from scfeat_ros.parameters import ExtractorOptions
from scfeat_ros.selection import TEXTURE_WINDOW, Selected

if TYPE_CHECKING:
    from scfeat_ros.model.fused import Conv
    from scfeat_ros.model.reliability import Reliability

__all__ = [
    "bridge",
    "convolution",
    "describe",
    "finish_convolution",
    "hidden",
    "image_branch",
    "normalize_activate",
    "normalize_image",
    "response",
    "scale_and_shift",
    "score",
    "select",
    "statistics",
    "up_conv",
    "upsampled_sum",
    "weigh_by_peakiness",
]

TILE = 2048
"""Values that a program computes at a time."""
KEYPOINT_TILE = 256
"""The same for keypoints, and for pixels that may be some."""
CELLS, MOST_CHANNELS = 4, 32
"""Cells of the small map that a program upsamples, by channels."""
SUMMED = 8
"""Tiles that a program sums."""
WIDEST = 64
"""Most channels of a tile, where channels are independent of each other."""


def _layout(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A map with channels last, and the distance of its pixels and of its images in memory."""
    _, channels, height, width = x.shape
    if not _is_part(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return x, channels, channels * height * width
    return x, x.stride(3), x.stride(0)


def _is_part(x: torch.Tensor) -> bool:
    """Whether a map consists of some channels of a larger one that is channels-last."""
    _, channels, height, width = x.shape
    return (
        x.stride(1) == 1
        and x.stride(3) > channels
        and (x.stride(2), x.stride(0)) == (width * x.stride(3), height * width * x.stride(3))
    )


def _new(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized map, channels-last."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    width = min(WIDEST, triton.next_power_of_2(channels))
    return TILE // width, width


def _pixels(x: torch.Tensor) -> int:
    return x.shape[2] * x.shape[3]


# --- sums ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels"])
def _sums(
    x,
    partial,
    pixels,
    channels,
    pixel,
    image,
    STEPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for step in range(STEPS):
        p = (block * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        places = x + batch * image + p[:, None] * pixel + c[None, :]
        value = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value, axis=0)
        squares += tl.sum(value * value, axis=0)
    to = partial + (batch * tl.num_programs(0) + block) * 2 * channels + c
    tl.store(to, total, mask=c < channels)
    tl.store(to + channels, squares, mask=c < channels)


def statistics(x: torch.Tensor) -> torch.Tensor:
    x, pixel, image = _layout(x)
    batch, channels = x.shape[:2]
    height, width = _tile(channels)
    blocks = triton.cdiv(_pixels(x), SUMMED * height)
    partial = x.new_empty(batch, blocks, 2, channels, dtype=torch.float32)
    grid = (blocks, triton.cdiv(channels, width), batch)
    _sums[grid](
        *(x, partial, _pixels(x), channels, pixel, image),
        STEPS=SUMMED,
        PIXELS=height,
        CHANNELS=width,
    )
    return partial.sum(dim=1, dtype=torch.float64)


def convolution(x: torch.Tensor, conv: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    y = _layout(conv(x))[0]
    return y, statistics(y)


# --- normalization and activation ---------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def _scale_and_shift(
    totals,
    weight,
    bias,
    scale,
    shift,
    channels,
    count,
    epsilon,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    total = tl.load(totals + 2 * batch * channels + c, mask=inside, other=0.0)
    squares = tl.load(totals + (2 * batch + 1) * channels + c, mask=inside, other=0.0)
    if GROUP > 1:
        shape: tl.constexpr = [CHANNELS // GROUP, GROUP]
        total = tl.sum(tl.reshape(total, shape), axis=1)
        squares = tl.sum(tl.reshape(squares, shape), axis=1)
        total = tl.reshape(tl.broadcast_to(total[:, None], shape), [CHANNELS])
        squares = tl.reshape(tl.broadcast_to(squares[:, None], shape), [CHANNELS])
    mean = total / count
    variance = squares / count - mean * mean
    variance = tl.where(variance > 0, variance, 0.0) + epsilon
    factor = tl.load(weight + c, mask=inside, other=0.0) / tl.sqrt(variance)
    offset = tl.load(bias + c, mask=inside, other=0.0) - mean * factor
    tl.store(scale + batch * channels + c, factor.to(tl.float32), mask=inside)
    tl.store(shift + batch * channels + c, offset.to(tl.float32), mask=inside)


def scale_and_shift(
    totals: torch.Tensor, norm: Norm, pixels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, channels = totals.shape
    group = channels // norm.groups
    if group & (group - 1):  # no power of two
        return kernels.scale_and_shift(totals, norm, pixels)
    scale, shift = torch.empty(2, batch, channels, dtype=torch.float32, device=totals.device)
    _scale_and_shift[(batch,)](
        *(totals, norm.weight, norm.bias, scale, shift, channels, pixels * group, EPSILON),
        GROUP=group,
        CHANNELS=triton.next_power_of_2(channels),
    )
    return scale, shift


@triton.jit(do_not_specialize=["pixels"])
def _normalize_activate(
    x,
    scale,
    shift,
    out,
    pixels,
    channels,
    pixel,
    image,
    out_pixel,
    out_image,
    slope,
    ELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    inside = (p < pixels)[:, None] & known[None, :]
    value = tl.load(x + batch * image + p[:, None] * pixel + c[None, :], mask=inside).to(tl.float32)
    factor = tl.load(scale + batch * channels + c, mask=known)
    offset = tl.load(shift + batch * channels + c, mask=known)
    value = value * factor[None, :] + offset[None, :]
    if ELU:
        value = tl.where(value > 0, value, tl.exp(tl.minimum(value, 0.0)) - 1)
    else:
        value = tl.where(value > 0, value, value * slope)
    to = out + batch * out_image + p[:, None] * out_pixel + c[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)


def normalize_activate(
    x: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    x, pixel, image = _layout(x)
    batch, channels = x.shape[:2]
    scale, shift = scale_and_shift(totals, norm, _pixels(x))
    out = _new(x, x.shape, x.dtype) if out is None else out
    height, width = _tile(channels)
    grid = (triton.cdiv(_pixels(x), height), triton.cdiv(channels, width), batch)
    _normalize_activate[grid](
        *(x, scale, shift, out, _pixels(x), channels, pixel, image, *_layout(out)[1:]),
        *(slope or 0.0, slope is None),
        PIXELS=height,
        CHANNELS=width,
    )
    return out


@triton.jit(do_not_specialize=["pixels"])
def _finish(
    y,
    bias,
    plus,
    pixels,
    channels,
    BIAS: tl.constexpr,
    PLUS: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    places = p[:, None] * channels + c[None, :]
    value = tl.load(y + places, mask=inside).to(tl.float32)
    if BIAS:
        value += tl.load(bias + c, mask=c < channels).to(tl.float32)[None, :]
    if PLUS:
        value += tl.load(plus + places, mask=inside).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)


def finish_convolution(
    y: torch.Tensor, bias: torch.Tensor | None, plus: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """Add a bias (C,) and a map to a convolution's result (B, C, h, w), then ReLU; in place."""
    y = _layout(y)[0]
    plus = None if plus is None else _layout(plus)[0]
    if bias is None and plus is None and not relu:
        return y
    batch, channels = y.shape[:2]
    pixels = batch * _pixels(y)
    height, width = _tile(channels)
    _finish[(triton.cdiv(pixels, height), triton.cdiv(channels, width))](
        *(y, y if bias is None else bias, y if plus is None else plus, pixels, channels),
        BIAS=bias is not None,
        PLUS=plus is not None,
        RELU=relu,
        PIXELS=height,
        CHANNELS=width,
    )
    return y


# --- upsampling ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["height", "width"])
def _upsampled_sum(
    taps,
    plus,
    out,
    partial,
    height,
    width,
    channels,
    NINE: tl.constexpr,
    PLUS: tl.constexpr,
    FACTOR: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of a few cells of a row: the FACTOR x FACTOR pixels of each.

    A pixel is at most one cell away from its own, so every tap at every one of the nine cells
    around contributes with a weight along x and one along y, which may be 0.
    """
    across = tl.cdiv(width, CELLS)
    place, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = place // across
    column = (place % across) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (column < width)[:, None] & (c < channels)[None, :]
    phase = tl.arange(0, FACTOR)
    SIDE: tl.constexpr = 3 if NINE else 1
    REACH: tl.constexpr = SIDE // 2
    result = tl.zeros([CELLS, FACTOR, FACTOR, CHANNELS], tl.float32)
    # loops that are not unrolled: the loads of all 81 taps together would not fit the registers
    for ky in range(SIDE):
        y = phase + (ky - REACH)
        # what a shift brings in from outside of the image is 0
        in_y = (row * FACTOR + y >= 0) & (row * FACTOR + y < height * FACTOR)
        at_y = (y + 0.5) / FACTOR - 0.5
        for dy in range(-1, 2):
            weight_y = tl.where(in_y, tl.maximum(1 - tl.abs(at_y - dy), 0.0), 0.0)
            from_row = tl.minimum(tl.maximum(row + dy, 0), height - 1)
            line = tl.zeros([CELLS, FACTOR, CHANNELS], tl.float32)
            for kx in tl.static_range(SIDE):
                x = phase + (kx - REACH)
                to_x = column[:, None] * FACTOR + x[None, :]
                in_x = (to_x >= 0) & (to_x < width * FACTOR)
                at_x = (x + 0.5) / FACTOR - 0.5
                for dx in tl.static_range(-1, 2):
                    hat = tl.maximum(1 - tl.abs(at_x - dx), 0.0)
                    weight_x = tl.where(in_x, hat[None, :], 0.0)
                    from_column = tl.minimum(tl.maximum(column + dx, 0), width - 1)
                    cell = (batch * height + from_row) * width + from_column
                    tap = cell * (SIDE * SIDE) + (ky * SIDE + kx)
                    places = taps + tap[:, None] * channels + c[None, :]
                    value = tl.load(places, mask=inside, other=0.0).to(tl.float32)
                    line += weight_x[:, :, None] * value[:, None, :]
            result += weight_y[None, :, None, None] * line[:, None, :, :]
    to_row = row * FACTOR + phase
    to_column = column[:, None] * FACTOR + phase[None, :]
    pixel = to_row[None, :, None] * (width * FACTOR) + to_column[:, None, :]
    pixel += batch * (height * FACTOR) * (width * FACTOR)
    places = pixel[:, :, :, None] * channels + c[None, None, None, :]
    stored = inside[:, None, None, :]
    if PLUS:
        result += tl.load(plus + places, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=stored)
    flat = tl.reshape(result, [CELLS * FACTOR * FACTOR, CHANNELS])
    to = partial + (batch * tl.num_programs(0) + place) * 2 * channels + c
    tl.store(to, tl.sum(flat, axis=0), mask=c < channels)
    tl.store(to + channels, tl.sum(flat * flat, axis=0), mask=c < channels)


def upsampled_sum(
    taps: torch.Tensor, channels: int, factor: int, plus: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `kernels`; `plus` is overwritten, and the result has its type."""
    taps = _layout(taps)[0]
    batch, count, height, width = taps.shape
    if plus is None:
        out = _new(taps, (batch, channels, height * factor, width * factor), taps.dtype)
    else:
        out = _layout(plus)[0]
    across = min(MOST_CHANNELS, triton.next_power_of_2(channels))
    places = height * triton.cdiv(width, CELLS)
    partial = taps.new_empty(batch, places, 2, channels, dtype=torch.float32)
    _upsampled_sum[(places, triton.cdiv(channels, across), batch)](
        *(taps, out, out, partial, height, width, channels),
        NINE=count != channels,
        PLUS=plus is not None,
        FACTOR=factor,
        CELLS=CELLS,
        CHANNELS=across,
    )
    return out, partial.sum(dim=1, dtype=torch.float64)


def up_conv(taps: torch.Tensor, channels: int, factor: int, norm: Norm, out: torch.Tensor) -> None:
    x, totals = upsampled_sum(taps, channels, factor)
    normalize_activate(x, totals, norm, out=out)


# --- bridge -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels"])
def _moments(
    x, mean, inverse, pixels, channels, epsilon, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(x + p[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(value, axis=1) / channels
    centred = tl.where(inside, value - average[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    tl.store(mean + p, average, mask=p < pixels)
    tl.store(inverse + p, 1 / tl.sqrt(variance + epsilon), mask=p < pixels)


@triton.jit(do_not_specialize=["pixels"])
def _bridge(
    x,
    mean,
    inverse,
    spatial,
    scale,
    shift,
    reliability_weight,
    reliability_bias,
    out,
    reliability,
    pixels,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    known, there = c < channels, p < pixels
    inside = there[:, None] & known[None, :]
    pixel = batch * pixels + p
    places = pixel[:, None] * channels + c[None, :]
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(mean + pixel, mask=there, other=0.0)
    factor = tl.load(spatial + 2 * batch * pixels + p, mask=there, other=0.0)
    factor *= tl.load(inverse + pixel, mask=there, other=0.0)
    offset = tl.load(spatial + (2 * batch + 1) * pixels + p, mask=there, other=0.0)
    across = (value - average[:, None]) * factor[:, None] + offset[:, None]
    by_channel = tl.load(scale + batch * channels + c, mask=known, other=0.0)
    plus = tl.load(shift + batch * channels + c, mask=known, other=0.0)
    result = tl.where(inside, across + value * by_channel[None, :] + plus[None, :], 0.0)
    tl.store(out + places, result, mask=inside)
    along = tl.sum(result * tl.load(reliability_weight + c, mask=known, other=0.0)[None, :], axis=1)
    length = tl.maximum(tl.sqrt(tl.sum(result * result, axis=1)), 1e-12)
    factor = tl.exp(along / length + tl.load(reliability_bias))
    tl.store(reliability + pixel, factor, mask=there)


def bridge(
    descriptors: torch.Tensor,
    stem: torch.Tensor,
    spatial: torch.nn.Conv2d,
    channel: Norm,
    reliability: Reliability,
) -> DetectorInput:
    descriptors = _layout(descriptors)[0]
    batch, channels, height, width = descriptors.shape
    pixels, across = height * width, triton.next_power_of_2(channels)
    tile = {"PIXELS": max(1, TILE // across), "CHANNELS": across}
    mean, inverse, factors = descriptors.new_empty(3, batch, 1, height, width, dtype=torch.float32)
    _moments[(triton.cdiv(batch * pixels, tile["PIXELS"]),)](
        *(descriptors, mean, inverse, batch * pixels, channels, EPSILON), **tile
    )
    spatially = spatial(mean).contiguous(memory_format=torch.contiguous_format)
    scale, shift = scale_and_shift(statistics(descriptors), channel, pixels)
    bridged = _new(descriptors, descriptors.shape, torch.float32)
    _bridge[(triton.cdiv(pixels, tile["PIXELS"]), batch)](
        *(descriptors, mean, inverse, spatially, scale, shift),
        *(reliability.weight, reliability.bias, bridged, factors, pixels, channels),
        **tile,
    )
    return DetectorInput(bridged, stem, factors)


# --- detector -----------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=["height", "width"])
def _weigh_by_peakiness(
    x,
    largest,
    peaks,
    weighted,
    height,
    width,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    across = tl.cdiv(width, PIXELS)
    place, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = place // across
    column = (place % across) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    inside = (column < width)[:, None] & (c < channels)[None, :]
    around = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for dy in tl.static_range(-1, 2):
        from_row = tl.abs(row + dy)  # the border is reflected
        from_row = tl.where(from_row < height, from_row, 2 * height - 2 - from_row)
        for dx in tl.static_range(-1, 2):
            from_column = tl.abs(column + dx)
            mirrored = 2 * width - 2 - from_column
            from_column = tl.where(from_column < width, from_column, mirrored)
            pixel = (batch * height + from_row) * width + from_column
            places = x + pixel[:, None] * channels + c[None, :]
            around += tl.load(places, mask=inside, other=0.0)
    pixel = (batch * height + row) * width + column
    places = pixel[:, None] * channels + c[None, :]
    value = tl.load(x + places, mask=inside, other=0.0)
    unit = 1 / tl.maximum(tl.load(largest + batch), 1e-6)
    scaled = value * unit
    average = tl.sum(scaled, axis=1) / channels
    score = _softplus(scaled - average[:, None]) * _softplus(scaled - around * (unit / 9))
    peak = tl.max(tl.where(inside, score, 0.0), axis=1)
    tl.store(peaks + pixel, peak, mask=column < width)
    tl.store(weighted + places, (peak[:, None] * value).to(weighted.dtype.element_ty), mask=inside)


def _weighted(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Peakiness (B, 1, h, w) of an fp32 map, and the map times it."""
    x = _layout(x)[0]
    batch, channels, height, width = x.shape
    largest = torch.linalg.vector_norm(x, torch.inf, dim=(1, 2, 3))
    peaks = x.new_empty(batch, 1, height, width)
    weighted = _new(x, x.shape, dtype)
    across = triton.next_power_of_2(channels)
    tile = min(128, max(1, TILE // across))
    _weigh_by_peakiness[(height * triton.cdiv(width, tile), batch)](
        *(x, largest, peaks, weighted, height, width, channels),
        PIXELS=tile,
        CHANNELS=across,
    )
    return peaks, weighted


def weigh_by_peakiness(
    maps: DetectorInput, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return _weighted(maps.values, dtype)


def image_branch(image: Image, conv: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    peaks, weighted = _weighted(image.values, torch.float32)
    return peaks, *convolution(weighted, conv)


def hidden(
    right: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float,
    conv: Conv,
    left: torch.Tensor,
    left_taps: Conv,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `kernels`; `right` is overwritten."""
    right = conv(normalize_activate(right, totals, norm, slope, out=right))
    factor = right.shape[-1] // left.shape[-1]
    return upsampled_sum(left_taps(left), right.shape[1], factor, right)


@triton.jit(do_not_specialize=["pixels"])
def _response(
    x,
    scale,
    shift,
    weight,
    out,
    partial,
    pixels,
    channels,
    slope,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = block * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    known, there = c < channels, p < pixels
    places = x + (batch * pixels + p)[:, None] * channels + c[None, :]
    value = tl.load(places, mask=there[:, None] & known[None, :], other=0.0)
    factor = tl.load(scale + batch * channels + c, mask=known, other=0.0)
    offset = tl.load(shift + batch * channels + c, mask=known, other=0.0)
    value = value * factor[None, :] + offset[None, :]
    value = tl.where(value > 0, value, value * slope)
    value *= tl.load(weight + c, mask=known, other=0.0)[None, :]
    result = tl.where(there, tl.sum(value, axis=1), 0.0)
    tl.store(out + batch * pixels + p, result, mask=there)
    to = partial + (batch * tl.num_programs(0) + block) * 2
    tl.store(to, tl.sum(result, axis=0))
    tl.store(to + 1, tl.sum(result * result, axis=0))


def response(
    x: torch.Tensor, totals: torch.Tensor, norm: Norm, slope: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _layout(x)[0]
    batch, channels, height, width = x.shape
    pixels, across = height * width, triton.next_power_of_2(channels)
    scale, shift = scale_and_shift(totals, norm, pixels)
    tile = max(1, TILE // across)
    blocks = triton.cdiv(pixels, tile)
    out = x.new_empty(batch, 1, height, width)
    partial = x.new_empty(batch, blocks, 2, 1)
    _response[(blocks, batch)](
        *(x, scale, shift, weight, out, partial, pixels, channels, slope),
        PIXELS=tile,
        CHANNELS=across,
    )
    return out, partial.sum(dim=1, dtype=torch.float64)


@triton.jit(do_not_specialize=["pixels"])
def _score(value, scale, shift, left, right, pixels, PIXELS: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = p < pixels
    places = batch * pixels + p
    result = tl.load(value + places, mask=inside) * tl.load(scale + batch) + tl.load(shift + batch)
    result = _softplus(result) * tl.load(left + places, mask=inside)
    tl.store(value + places, result * tl.load(right + places, mask=inside), mask=inside)


def score(
    value: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    left_peaks: torch.Tensor,
    reliability: torch.Tensor,
    right_peaks: torch.Tensor,
) -> torch.Tensor:
    """As in `kernels`; `value` is overwritten."""
    batch, _, height, width = value.shape
    scale, shift = scale_and_shift(totals, norm, height * width)
    left = upsample(left_peaks * reliability, width // left_peaks.shape[3]).contiguous()
    _score[(triton.cdiv(height * width, TILE), batch)](
        *(value, scale, shift, left, right_peaks, height * width), PIXELS=TILE
    )
    return value


# --- keypoints and descriptors ------------------------------------------------------------------


@triton.jit(do_not_specialize=["height", "width"])
def _block_means(
    x,
    means,
    units,
    height,
    width,
    channels,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row, column = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for dy in range(SIDE):
        y = row * SIDE + dy + 0 * c  # as wide as `c`: masks are no numbers
        for dx in tl.static_range(SIDE):
            at = column * SIDE + dx + 0 * c
            inside = (c < channels) & (y < height) & (at < width)
            value = tl.load(x + (y * width + at) * channels + c, mask=inside, other=0.0)
            total += value.to(tl.float32)
    rows = tl.minimum(height - row * SIDE, SIDE)
    mean = total / (rows * tl.minimum(width - column * SIDE, SIDE))
    length = tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), 1e-12)
    to = (row * tl.num_programs(1) + column) * channels + c
    tl.store(means + to, mean, mask=c < channels)
    tl.store(units + to, mean / length, mask=c < channels)


def _means_of_blocks(x: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, w, C) -> fp32 means of blocks of `side` x `side` cells, and these of unit length."""
    height, width, channels = x.shape
    rows, columns = triton.cdiv(height, side), triton.cdiv(width, side)
    means, units = x.new_empty(2, rows, columns, channels, dtype=torch.float32)
    _block_means[(rows, columns)](
        *(x, means, units, height, width, channels),
        SIDE=side,
        CHANNELS=triton.next_power_of_2(channels),
    )
    return means, units


@triton.jit
def _spline(position, offset, size):
    """A cell near a position along an axis, and its weight by a cubic B-spline."""
    cell = tl.floor(position) + offset
    distance = tl.abs(cell - position)
    outer = tl.maximum(2 - distance, 0.0)
    inner = tl.maximum(1 - distance, 0.0)
    weight = (outer * outer * outer - 4 * inner * inner * inner) / 6
    return tl.minimum(tl.maximum(cell.to(tl.int32), 0), size - 1), weight


@triton.jit(do_not_specialize=["height", "width"])
def _samples(
    x,
    points,
    out,
    height,
    width,
    channels,
    stride,
    ADD: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    known = c < channels
    at_x = (tl.load(points + 2 * n) + 0.5) / stride - 0.5
    at_y = (tl.load(points + 2 * n + 1) + 0.5) / stride - 0.5
    result = tl.zeros([CHANNELS], tl.float32)
    for dy in tl.static_range(-1, 3):
        row, weight_y = _spline(at_y, dy, height)
        for dx in tl.static_range(-1, 3):
            column, weight_x = _spline(at_x, dx, width)
            value = tl.load(x + (row * width + column) * channels + c, mask=known, other=0.0)
            result += weight_y * weight_x * value.to(tl.float32)
    if UNIT:
        result /= tl.maximum(tl.sqrt(tl.sum(result * result, axis=0)), 1e-12)
    to = out + n * channels + c
    if ADD:
        result += tl.load(to, mask=known, other=0.0)
    tl.store(to, result, mask=known)


def _sample(
    x: torch.Tensor, points: torch.Tensor, stride: int, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """As `sampling.sample_smooth` of an (h, w, C) map; added to `plus`, else of unit length."""
    height, width, channels = x.shape
    out = points.new_empty(len(points), channels) if plus is None else plus
    if len(points):
        _samples[(len(points),)](
            *(x, points, out, height, width, channels, float(stride)),
            ADD=plus is not None,
            UNIT=plus is None,
            CHANNELS=triton.next_power_of_2(channels),
        )
    return out


def describe(
    projection: Projection, maps: Maps, points: torch.Tensor, length: int = 0
) -> torch.Tensor:
    """As `Projection.forward`, with means of blocks as `sampling.block_means`."""
    at_keypoint, *parts = projection.matrix[: length or None].split(projection.channels, dim=1)
    bridged, layer2, layer3 = (part.permute(1, 2, 0).contiguous() for part in maps)
    points = points.contiguous()
    descriptors = F.linear(_sample(bridged, points, DESCRIPTOR_STRIDE), at_keypoint)
    levels, means, side = [], bridged, 1
    for block in BLOCKS:  # each divides the next
        means, units = _means_of_blocks(means, block // side)
        side = block
        levels.append((units, DESCRIPTOR_STRIDE * block))
    for layer, stride in ((layer2, 8), (layer3, 16)):
        levels.append((_means_of_blocks(layer, ENCODER_BLOCK)[1], stride * ENCODER_BLOCK))
    for (units, stride), part in zip(levels, parts, strict=True):
        _sample(F.linear(units, part), points, stride, descriptors)
    return descriptors


@triton.jit(
    do_not_specialize=["height", "width", "score_row", "image_channel", "image_row", "border"]
)
def _candidates(
    scores,
    image,
    mask,
    out,
    height,
    width,
    score_row,
    image_channel,
    image_row,
    image_column,
    threshold,
    border,
    MASKED: tl.constexpr,
    RADIUS: tl.constexpr,
    TEXTURE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = p // width, p % width
    there = row < height
    score = tl.load(scores + row * score_row + column, mask=there, other=0.0)
    largest = score
    smallest = score
    for dy in range(-RADIUS, RADIUS + 1):
        y = row + dy
        for dx in range(-RADIUS, RADIUS + 1):
            x = column + dx
            inside = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            places = scores + y * score_row + x
            largest = tl.maximum(largest, tl.load(places, mask=inside, other=float("-inf")))
            smallest = tl.minimum(smallest, tl.load(places, mask=inside, other=float("inf")))
    finite = (score > float("-inf")) & (score < float("inf"))
    keep = finite & (score > threshold)
    if RADIUS > 0:
        keep = keep & (score == largest) & (score > smallest)
    differs = tl.zeros([PIXELS], tl.int32)
    for channel in range(3):
        own = image + channel * image_channel
        value = tl.load(own + row * image_row + column * image_column, mask=there, other=0)
        brightest = value.to(tl.int32)
        darkest = brightest
        for dy in range(-TEXTURE, TEXTURE + 1):
            y = row + dy
            for dx in range(-TEXTURE, TEXTURE + 1):
                x = column + dx
                inside = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                near = tl.load(own + y * image_row + x * image_column, mask=inside, other=0)
                near = tl.where(inside, near.to(tl.int32), brightest)
                brightest = tl.maximum(brightest, near)
                darkest = tl.minimum(darkest, near)
        differs += brightest - darkest
    keep = keep & (differs > 0)
    keep = keep & (row >= border) & (row < height - border)
    keep = keep & (column >= border) & (column < width - border)
    if MASKED:
        keep = keep & (tl.load(mask + p, mask=there, other=0) != 0)
    tl.store(out + p, tl.where(keep, score, float("-inf")), mask=there)


@triton.jit(do_not_specialize=["count", "height", "width", "score_row"])
def _locate(
    scores,
    places,
    points,
    count,
    height,
    width,
    score_row,
    SUBPIXEL: tl.constexpr,
    PIXELS: tl.constexpr,
):
    n = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = n < count
    place = tl.load(places + n, mask=there, other=0).to(tl.int32)
    row, column = place // width, place % width
    at_x, at_y = column.to(tl.float32), row.to(tl.float32)
    if SUBPIXEL:
        least = tl.full([PIXELS], float("inf"), tl.float32)
        for dy in tl.static_range(-1, 2):
            y = tl.minimum(tl.maximum(row + dy, 0), height - 1)
            for dx in tl.static_range(-1, 2):
                x = tl.minimum(tl.maximum(column + dx, 0), width - 1)
                value = tl.load(scores + y * score_row + x, mask=there, other=0.0)
                least = tl.minimum(least, value)
        total = tl.zeros([PIXELS], tl.float32)
        sum_x = tl.zeros([PIXELS], tl.float32)
        sum_y = tl.zeros([PIXELS], tl.float32)
        for dy in tl.static_range(-1, 2):
            y = tl.minimum(tl.maximum(row + dy, 0), height - 1)
            for dx in tl.static_range(-1, 2):
                x = tl.minimum(tl.maximum(column + dx, 0), width - 1)
                weight = tl.load(scores + y * score_row + x, mask=there, other=0.0) - least
                total += weight
                sum_x += weight * (x - column)
                sum_y += weight * (y - row)
        total = tl.maximum(total, 1e-12)
        at_x += sum_x / total
        at_y += sum_y / total
    tl.store(points + 2 * n, at_x, mask=there)
    tl.store(points + 2 * n + 1, at_y, mask=there)


def select(
    scores: torch.Tensor,
    image: torch.Tensor,
    mask: torch.Tensor | None,
    options: ExtractorOptions,
) -> Selected:
    """As `selection.on_device`."""
    height, width = scores.shape
    scores = scores.float()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    values = scores.new_empty(height * width)
    _candidates[(triton.cdiv(height * width, KEYPOINT_TILE),)](
        *(scores, image, scores if mask is None else mask.contiguous(), values, height, width),
        *(scores.stride(0), *image.stride(), options.score_threshold, options.border),
        MASKED=mask is not None,
        RADIUS=options.nms_radius,
        TEXTURE=TEXTURE_WINDOW // 2,
        PIXELS=KEYPOINT_TILE,
    )
    values, places = values.sort(descending=True, stable=True)
    values, places = values[: options.max_keypoints], places[: options.max_keypoints]
    points = scores.new_empty(len(places), 2)
    _locate[(triton.cdiv(len(places), KEYPOINT_TILE),)](
        *(scores, places, points, len(places), height, width, scores.stride(0)),
        SUBPIXEL=options.subpixel,
        PIXELS=KEYPOINT_TILE,
    )
    return Selected(points, values)
