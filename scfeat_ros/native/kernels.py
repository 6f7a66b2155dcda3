"""The functions of `model/kernels.py` in C++, for one image on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scfeat_ros.model.kernels import DetectorInput, Image, Norm
from scfeat_ros.native.library import call, channels_last, empty_map, floats

if TYPE_CHECKING:
    from scfeat_ros.model.fused import Conv
    from scfeat_ros.model.reliability import Reliability

FEW = 8
"""Channels at full resolution for which there are special kernels, as in kernels.cpp.

Such maps are (1, FEW, height, width) with memory order (height, FEW, width), see `_lines`.
"""
FACTOR = 4
"""Between the detector's two resolutions, as in kernels.cpp."""


def _lines(height: int, width: int) -> torch.Tensor:
    return floats(height, FEW, width).permute(1, 0, 2)[None]


def _is_lines(x: torch.Tensor) -> bool:
    _, channels, _, width = x.shape
    return channels == FEW and x.stride()[1:] == (width, FEW * width, 1)


def _totals(channels: int) -> torch.Tensor:
    return torch.empty(1, 2, channels, dtype=torch.float64, device="cpu")


def normalize_image(image: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> Image:
    image = channels_last(image if image.dtype == torch.uint8 else image.float())
    _, _, height, width = image.shape
    values, largest = floats(1, 3, height, width), floats(1)
    call(
        "normalize_bytes" if image.dtype == torch.uint8 else "normalize_floats",
        None,
        *(image, height * width, mean, deviation, values, largest),
    )
    return Image(values, largest)


def statistics(x: torch.Tensor) -> torch.Tensor:
    x = channels_last(x)
    _, channels, height, width = x.shape
    totals = _totals(channels)
    call("channel_sums", x.dtype, x, height, width, channels, totals)
    return totals


def convolution(x: torch.Tensor, conv: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    y = conv(x)
    return y, statistics(y)


def normalize_activate(
    x: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    x = channels_last(x)
    _, channels, height, width = x.shape
    out = empty_map(channels, height, width, x.dtype) if out is None else out
    call(
        "normalize_activate",
        x.dtype,
        *(x, height * width, channels, totals, norm.groups, norm.weight, norm.bias),
        *(slope is None, slope or 0.0, out, out.stride(3)),
    )
    return out


def upsampled_sum(
    taps: torch.Tensor, channels: int, factor: int, plus: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `kernels`; `plus`, of fp32, is overwritten."""
    taps = channels_last(taps)
    _, count, height, width = taps.shape
    name = "upsampled" if count == channels else "upsampled_sum"
    if plus is None:
        out = empty_map(channels, height * factor, width * factor, taps.dtype)
    else:
        name, out = f"add_{name}", channels_last(plus)
    totals = _totals(channels)
    call(name, taps.dtype, taps, height, width, factor, channels, out, totals)
    return out, totals


def up_conv(taps: torch.Tensor, channels: int, factor: int, norm: Norm, out: torch.Tensor) -> None:
    if taps.shape[1] != channels:
        x, totals = upsampled_sum(taps, channels, factor)
        normalize_activate(x, totals, norm, out=out)
        return
    taps = channels_last(taps)
    _, _, height, width = taps.shape
    size = height, width, factor, channels
    totals = _totals(channels)
    call("upsampled_sums", taps.dtype, taps, *size, totals)
    call(
        "upsampled_elu",
        taps.dtype,
        *(taps, *size, totals, norm.groups, norm.weight, norm.bias, out, out.stride(3)),
    )


def bridge(
    descriptors: torch.Tensor,
    stem: torch.Tensor,
    spatial: torch.nn.Conv2d,
    channel: Norm,
    reliability: Reliability,
) -> DetectorInput:
    descriptors, stem = channels_last(descriptors), channels_last(stem)
    _, channels, height, width = descriptors.shape
    bridged = empty_map(channels, height, width, torch.float32)
    maps_mean, factors = floats(height, width), floats(1, 1, height, width)
    largest = floats(1)
    call(
        "bridge",
        descriptors.dtype,
        *(descriptors, stem, height, width, channels, stem.shape[1]),
        *(spatial.weight, spatial.bias, channel.weight, channel.bias),
        *(reliability.weight, reliability.bias, bridged, maps_mean, factors, largest),
    )
    return DetectorInput(bridged, stem, factors, maps_mean, largest)


def weigh_by_peakiness(
    maps: DetectorInput, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _, channels, height, width = maps.bridged.shape
    stem = maps.stem.shape[1]
    peaks = floats(1, 1, height, width)
    weighted = empty_map(channels + stem, height, width, dtype)
    call(
        "weigh_by_peakiness",
        dtype,
        *(maps.bridged, maps.stem, maps.mean, maps.largest),
        *(height, width, channels, stem, peaks, weighted),
    )
    return peaks, weighted


def image_branch(image: Image, conv: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, channels, height, width = image.values.shape
    peaks = floats(1, 1, height, width)
    if conv.weight.shape[0] != FEW:
        weighted = empty_map(channels, height, width, torch.float32)
        call(
            "weigh_image_by_peakiness",
            weighted.dtype,
            *(image.values, image.largest, height, width, peaks, weighted),
        )
        return peaks, *convolution(weighted, conv)
    out, totals = _lines(height, width), _totals(FEW)
    call(
        "image_branch",
        None,
        *(image.values, image.largest, height, width, conv.by_outputs, peaks, out, totals),
    )
    return peaks, out, totals


def hidden(
    right: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float,
    conv: Conv,
    left: torch.Tensor,
    left_taps: Conv,
) -> tuple[torch.Tensor, torch.Tensor]:
    left = channels_last(left)
    _, channels, height, width = left.shape
    factor = right.shape[3] // width
    few = _is_lines(right) and conv.weight.shape[0] == left_taps.weight.shape[0] == FEW
    if not few or factor != FACTOR:
        right = conv(normalize_activate(right, totals, norm, slope))
        return upsampled_sum(left_taps(left), right.shape[1], factor, right)
    out, sums = _lines(height * FACTOR, width * FACTOR), _totals(FEW)
    call(
        "hidden",
        left.dtype,
        *(right, totals, norm.groups, norm.weight, norm.bias, slope, conv.by_outputs),
        *(left, height, width, channels, left_taps.by_outputs, out, sums),
    )
    return out, sums


def response(
    x: torch.Tensor, totals: torch.Tensor, norm: Norm, slope: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _, channels, height, width = x.shape
    out, sums = floats(1, 1, height, width), _totals(1)
    rest = totals, norm.groups, norm.weight, norm.bias, slope, weight, out, sums
    if _is_lines(x):
        call("response_of_lines", None, x, height, width, *rest)
    else:
        x = channels_last(x)
        call("response", x.dtype, x, height, width, channels, *rest)
    return out, sums


def score(
    value: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    left_peaks: torch.Tensor,
    reliability: torch.Tensor,
    right_peaks: torch.Tensor,
) -> torch.Tensor:
    """As in `kernels`; `value` is overwritten."""
    _, _, height, width = left_peaks.shape
    call(
        "score",
        None,
        *(value, totals, norm.weight, norm.bias, left_peaks, reliability, right_peaks),
        *(height, width, value.shape[2] // height),
    )
    return value
