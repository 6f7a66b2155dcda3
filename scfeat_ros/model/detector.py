"""Detection network: peakiness measurement and detection head (Sec. III-C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.model.reliability import Reliability
from scfeat_ros.model.sampling import convolve_upsampled, upsample


def mean_of_3x3(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H + 2, W + 2) -> (B, C, H, W); faster on the CPU than `avg_pool2d` of few channels."""
    columns = x[..., :-2] + x[..., 1:-1]
    columns += x[..., 2:]
    mean = columns[..., :-2, :] + columns[..., 1:-1, :]
    mean += columns[..., 2:, :]
    return mean.div_(9)


def peakiness(x: torch.Tensor) -> torch.Tensor:
    """Peakiness score map (Eq. 4-6).

    The maps are first divided by the image's largest magnitude, so that the score does not
    depend on their scale. (The magnitude, not the signed maximum: the normalized image of a dark
    scene has no positive value, and its maximum may be close to zero.)

    Args:
        x: (B, C, H, W) maps.

    Returns:
        (B, 1, H, W): over the channels, the largest product of the channel-wise score (against
        the mean over channels) and the local score (against the mean of the 3x3 neighbourhood,
        border reflected).
    """
    extremes = x.amax(dim=(1, 2, 3), keepdim=True), -x.amin(dim=(1, 2, 3), keepdim=True)
    x = x / torch.maximum(*extremes).clamp_min(1e-6)
    local_mean = mean_of_3x3(F.pad(x, (1, 1, 1, 1), mode="reflect"))
    channel_score = F.softplus(x - x.mean(dim=1, keepdim=True))
    local_score = F.softplus(x - local_mean)
    return (channel_score * local_score).amax(dim=1, keepdim=True)


def instance_norm(channels: int) -> nn.GroupNorm:
    """InstanceNorm with scale and shift, as a group per channel.

    The parameters are those of `nn.InstanceNorm2d`, which copies channels-last maps twice.
    """
    return nn.GroupNorm(channels, channels)


class ConvInstanceNorm(nn.Module):
    """CONV-I of Fig. 4 (c): convolution, InstanceNorm, PReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # no bias: the normalization would cancel it
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = instance_norm(outputs)
        self.activation = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))


class Detector(nn.Module):
    """Bridge map, stem map and image -> keypoint score map (Eq. 7-13).

    Args:
        bridged, stem: channels of F_cn and F_0.
        left, right: channels of Layer_0 on the quarter-resolution and the image branch.
        hidden: channels of Layer_1.
        upsampled_kernel: size of Layer_1's kernel over the upsampled branch.
    """

    def __init__(
        self,
        bridged: int,
        stem: int,
        left: int,
        right: int,
        hidden: int,
        upsampled_kernel: int = 3,
    ) -> None:
        super().__init__()
        self.reliability = Reliability(bridged)
        self.layer0_left = ConvInstanceNorm(bridged + stem, left)
        self.layer0_right = ConvInstanceNorm(3, right)
        # a convolution of both branches, concatenated, is the sum of a convolution of each
        self.layer1_left = nn.Conv2d(
            left, hidden, upsampled_kernel, padding=upsampled_kernel // 2, bias=False
        )
        self.layer1_right = nn.Conv2d(right, hidden, 3, padding=1, bias=False)
        self.layer1_norm = instance_norm(hidden)
        self.layer1_activation = nn.PReLU()
        self.layer2 = nn.Conv2d(hidden, 1, 1, bias=False)
        # for one channel, GroupNorm is slower
        self.layer2_norm = nn.InstanceNorm2d(1, affine=True)

    def forward(
        self, image: torch.Tensor, bridged: torch.Tensor, stem: torch.Tensor
    ) -> torch.Tensor:
        """Score map of a normalized image.

        Args:
            image: (B, 3, H, W) normalized image I_o.
            bridged: (B, C, H/4, W/4), F_cn.
            stem: (B, 64, H/4, W/4), F_0.

        Returns:
            (B, 1, H, W) non-negative scores (Eq. 13), times the reliability.
        """
        maps = torch.cat([bridged, stem], dim=1)
        left_peaks, right_peaks = peakiness(maps), peakiness(image)
        left = self.layer0_left(left_peaks * maps)
        # at full resolution rounding moves keypoints, so these layers stay in fp32
        with torch.autocast(image.device.type, enabled=False):
            right = self.layer0_right(right_peaks * image)
            hidden = convolve_upsampled(self.layer1_left, left.float(), 4)
            hidden = self.layer1_activation(self.layer1_norm(hidden + self.layer1_right(right)))
            response = F.softplus(self.layer2_norm(self.layer2(hidden)))
        return upsample(left_peaks * self.reliability(bridged), 4) * right_peaks * response
