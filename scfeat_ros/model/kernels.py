"""The fast network's operations between convolutions, in PyTorch: any device, any batch size.

`native/kernels.py` implements the same for one image on the CPU, with fewer passes over memory;
the functions there have the same names, arguments and results.

Statistics of a map are (B, 2, C) float64: the sums over the image of every channel and of its
square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scfeat_ros.model.detector import peakiness
from scfeat_ros.model.reliability import Reliability
from scfeat_ros.model.sampling import upsample
from scfeat_ros.model.scfeat import unit_range

EPSILON = 1e-5


class Norm(NamedTuple):
    """A group or instance normalization (instance: as many groups as channels)."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int


class DetectorInput(NamedTuple):
    """Input of the detector."""

    bridged: torch.Tensor
    """(B, D, h, w) fp32: F_cn."""
    stem: torch.Tensor
    """(B, 64, h, w): F_0, in the convolutions' type."""
    reliability: torch.Tensor
    """(B, 1, h, w), see `Reliability`."""
    mean: torch.Tensor | None = None
    """(h, w): mean over the channels of both; only for the compiled kernels."""
    largest: torch.Tensor | None = None
    """(1,): largest magnitude in both; only for the compiled kernels."""

    @property
    def values(self) -> torch.Tensor:
        """(B, D + 64, h, w) fp32: both, concatenated."""
        return torch.cat([self.bridged, self.stem.float()], dim=1)


class Image(NamedTuple):
    """A normalized image."""

    values: torch.Tensor
    """(B, 3, H, W) fp32."""
    largest: torch.Tensor | None = None
    """(1,): largest magnitude; only for the compiled kernels."""


def normalize_image(image: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> Image:
    """(B, 3, H, W) RGB, uint8 or float in [0, 1] -> normalized image."""
    return Image((unit_range(image) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))


def statistics(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, 2, C) sums and sums of squares."""
    norm = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)
    return torch.stack([x.sum(dim=(2, 3), dtype=torch.float32), norm * norm], dim=1).double()


def convolution(
    x: torch.Tensor, conv: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A 3x3 convolution without bias, and its result's statistics."""
    y = conv(x)
    return y, statistics(y)


def scale_and_shift(
    totals: torch.Tensor, norm: Norm, pixels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C) scale and shift that normalize a map with these statistics."""
    batch, _, channels = totals.shape
    count = pixels * channels // norm.groups
    mean, square = (totals.view(batch, 2, norm.groups, -1).sum(dim=3) / count).unbind(dim=1)
    inverse = (square - mean * mean).clamp_min(0).add(EPSILON).rsqrt()
    mean, inverse = (v.repeat_interleave(channels // norm.groups, dim=1) for v in (mean, inverse))
    scale = norm.weight * inverse
    return scale.float(), (norm.bias - mean * scale).float()


def normalize_activate(
    x: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalization, then ELU, or PReLU if a slope is given.

    Args:
        x: (B, C, h, w).
        totals: its statistics.
        norm: the normalization.
        slope: of the PReLU's negative side.
        out: where to write the result: channels of a larger map.
    """
    scale, shift = scale_and_shift(totals, norm, x.shape[2] * x.shape[3])
    y = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
    y = F.elu_(y) if slope is None else F.leaky_relu_(y, slope)
    return y.to(x.dtype) if out is None else out.copy_(y)


def upsampled_sum(
    taps: torch.Tensor, channels: int, factor: int, plus: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """1x1 or 3x3 convolution of an upsampled map from its one or nine taps at the small size.

    Args:
        taps: (B, C, h, w) or (B, 9 * C, h, w): the results of a 1x1 convolution for each tap, row
            by row.
        channels: C.
        factor: of the upsampling.
        plus: (B, C, h * factor, w * factor), added to the result.

    Returns:
        (B, C, h * factor, w * factor) and its statistics.
    """
    one = taps.shape[1] == channels
    result = upsample(taps, factor) if one else _sum_of_nine(taps, factor)
    if plus is not None:
        result += plus
    return result, statistics(result)


def _sum_of_nine(taps: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, 9 * C, h, w) -> (B, C, h * factor, w * factor).

    Upsampling and a tap's 1x1 convolution commute, so every tap is computed on the small map,
    upsampled, shifted by its offset (with zeros shifted in, as the convolution pads after the
    upsampling) and added. Bilinear upsampling is separable, so the sum is taken along x first.
    """
    batch, channels, height, width = taps.shape
    channels //= 9
    taps = taps.view(batch, 3, 3, channels, height, width)

    def wide(column: int) -> torch.Tensor:
        return _stretched(taps[:, :, column].flatten(1, 2), (height, width * factor))

    def high(row: int) -> torch.Tensor:
        part = total[:, row * channels : (row + 1) * channels]
        return _stretched(part, (height * factor, width * factor))

    # one at a time, as all of them take more memory than all the rest of the network
    total = wide(1)
    total[..., 1:] += wide(0)[..., :-1]
    total[..., :-1] += wide(2)[..., 1:]
    result = high(1)
    result[:, :, 1:] += high(0)[:, :, :-1]
    result[:, :, :-1] += high(2)[:, :, 1:]
    return result


def _stretched(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) -> bilinearly upsampled to (height, width) `size`, channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, size=size, mode="bilinear")


def up_conv(taps: torch.Tensor, channels: int, factor: int, norm: Norm, out: torch.Tensor) -> None:
    """UP-CONV of Fig. 4 (b): a convolution of an upsampled map, normalization and ELU.

    Args:
        taps, channels, factor: as for `upsampled_sum`.
        norm: the normalization.
        out: (B, C, h * factor, w * factor), where to write the result: channels of a larger map.
    """
    x, totals = upsampled_sum(taps, channels, factor)
    normalize_activate(x, totals, norm, out=out)


def bridge(
    descriptors: torch.Tensor,
    stem: torch.Tensor,
    spatial: torch.nn.Conv2d,
    channel: Norm,
    reliability: Reliability,
) -> DetectorInput:
    """Cross normalization (Eq. 2-3) and the reliability.

    Args:
        descriptors: (B, D, h, w) D_desc.
        stem: (B, 64, h, w).
        spatial: 7x7 convolution from the channel mean to scale and shift, times w_s.
        channel: the instance normalization, its weight and bias times w_c.
        reliability: of F_cn.
    """
    descriptors = descriptors.float()
    variance, mean = torch.var_mean(descriptors, dim=1, correction=0, keepdim=True)
    factor, offset = spatial(mean).split(1, dim=1)
    across = (descriptors - mean) * (variance + EPSILON).rsqrt() * factor + offset
    pixels = descriptors.shape[2] * descriptors.shape[3]
    scale, shift = scale_and_shift(statistics(descriptors), channel, pixels)
    bridged = across + descriptors * scale[:, :, None, None] + shift[:, :, None, None]
    return DetectorInput(bridged, stem, reliability(bridged))


def weigh_by_peakiness(
    maps: DetectorInput, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Peakiness (B, 1, h, w) in fp32, and the maps times it in the convolutions' type."""
    values = maps.values
    peaks = peakiness(values)
    weighted = (peaks * values).to(dtype, memory_format=torch.channels_last)
    return peaks, weighted


def image_branch(
    image: Image, conv: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head's Layer_0 on the image, without its normalization; in fp32.

    Returns:
        Peakiness (B, 1, H, W), the convolution of the image times it, and its statistics.
    """
    peaks = peakiness(image.values)
    weighted = (peaks * image.values).contiguous(memory_format=torch.channels_last)
    return peaks, *convolution(weighted, conv)


def hidden(
    right: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float,
    conv: Callable[[torch.Tensor], torch.Tensor],
    left: torch.Tensor,
    left_taps: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's Layer_1, without its normalization: the sum of both branches; in fp32.

    Args:
        right, totals: the image branch and its statistics, see `image_branch`.
        norm, slope: its normalization and PReLU.
        conv: 3x3 convolution of the normalized and activated image branch.
        left: (B, C, h, w), the branch on the small maps, activated.
        left_taps: 1x1 convolution to the taps of its convolution, see `upsampled_sum`.

    Returns:
        (B, C, H, W) and its statistics.
    """
    right = conv(normalize_activate(right, totals, norm, slope))
    factor = right.shape[-1] // left.shape[-1]
    return upsampled_sum(left_taps(left).float(), right.shape[1], factor, right)


def response(
    x: torch.Tensor, totals: torch.Tensor, norm: Norm, slope: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """InstanceNorm, PReLU and the 1x1 convolution to one channel.

    Args:
        x: (B, C, H, W) with statistics `totals`.
        norm, slope: of the normalization and the PReLU.
        weight: (C,) of the convolution.

    Returns:
        (B, 1, H, W) in fp32 and its statistics.
    """
    hidden = normalize_activate(x.float(), totals, norm, slope)
    result = (hidden.permute(0, 2, 3, 1) @ weight)[:, None]
    return result, statistics(result)


def score(
    value: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    left_peaks: torch.Tensor,
    reliability: torch.Tensor,
    right_peaks: torch.Tensor,
) -> torch.Tensor:
    """Scores (Eq. 13) times reliability, (B, 1, H, W) fp32.

    From the head's response, both peakiness maps, and the reliability at the left one's resolution.
    """
    pixels = value.shape[2] * value.shape[3]
    scale, shift = scale_and_shift(totals, norm, pixels)
    value = F.softplus(value * scale[:, :, None, None] + shift[:, :, None, None])
    factor = value.shape[2] // left_peaks.shape[2]
    return upsample(left_peaks * reliability, factor) * right_peaks * value
