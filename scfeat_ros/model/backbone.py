"""F2R-Backbone: ResNet encoder, two decoders, three side maps fused into one (Sec. III-A)."""

from __future__ import annotations

import torch
from torch import nn

from scfeat_ros.model.resnet import EncoderFeatures, ResNetEncoder
from scfeat_ros.model.sampling import convolve_upsampled

GROUPS = 32


class ConvBlock(nn.Module):
    """CONV and UP-CONV of Fig. 4 (a) and (b): bilinear upsampling, convolution, GroupNorm, ELU.

    Args:
        inputs, outputs: channels; `outputs` is a multiple of 32 or below it.
        kernel: size of the square kernel.
        factor: upsampling before the convolution, 1 for none.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(min(GROUPS, outputs), outputs)
        self.activation = nn.ELU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(convolve_upsampled(self.conv, x, self.factor)))


class Decoder(nn.Module):
    """Up-convolution by two, concatenation with the encoder's map of that size, convolution."""

    def __init__(self, inputs: int, skip: int, outputs: int, upsampled_kernel: int) -> None:
        super().__init__()
        self.up = ConvBlock(inputs, outputs, upsampled_kernel, factor=2)
        self.conv = ConvBlock(outputs + skip, outputs)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([self.up(x), skip], dim=1))


class F2RBackbone(nn.Module):
    """Image -> dense descriptor map D_desc at a quarter of the resolution (Eq. 1).

    Args:
        encoder: name of the ResNet.
        decoder_channels: channels of the decoders at 1/8 and at 1/4.
        descriptor_dim: channels of the side maps and of the result.
        upsampled_kernel: size of the kernels of the up-convolutions.

    Raises:
        ValueError: there is no such encoder, or the kernels' size is even.
    """

    def __init__(
        self,
        encoder: str,
        decoder_channels: tuple[int, int],
        descriptor_dim: int,
        upsampled_kernel: int = 3,
    ) -> None:
        super().__init__()
        if upsampled_kernel % 2 == 0:
            raise ValueError(f"upsampled_kernel is {upsampled_kernel}, but must be odd")
        self.encoder = ResNetEncoder(encoder)
        layer1, layer2, layer3 = self.encoder.channels
        eighth, quarter = decoder_channels
        self.decoder_0 = Decoder(layer3, layer2, eighth, upsampled_kernel)
        self.decoder_1 = Decoder(eighth, layer1, quarter, upsampled_kernel)
        self.side_0 = ConvBlock(layer3, descriptor_dim, upsampled_kernel, factor=4)
        self.side_1 = ConvBlock(eighth, descriptor_dim, upsampled_kernel, factor=2)
        self.side_2 = ConvBlock(quarter, descriptor_dim, kernel=1)
        self.fuse = nn.Conv2d(3 * descriptor_dim, descriptor_dim, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, EncoderFeatures]:
        """Describe a normalized (B, 3, H, W) image; H and W are multiples of 16.

        Returns:
            D_desc (B, descriptor_dim, H/4, W/4) and the encoder's maps.
        """
        encoded = self.encoder(image)
        eighth = self.decoder_0(encoded.layer3, encoded.layer2)
        quarter = self.decoder_1(eighth, encoded.layer1)
        sides = [self.side_0(encoded.layer3), self.side_1(eighth), self.side_2(quarter)]
        return self.fuse(torch.cat(sides, dim=1)), encoded
