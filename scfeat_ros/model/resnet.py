"""ResNet encoder up to layer3, with torchvision's state-dict keys (torchvision is not needed)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

STEM_CHANNELS = 64

WIDTHS = (64, 128, 256)
"""Inner channels of layer1, layer2 and layer3 in a standard ResNet."""


class Layout(NamedTuple):
    """The architecture of a ResNet."""

    block: str
    """"basic" or "bottleneck"."""
    blocks: tuple[int, int, int]
    """Their number in layer1, layer2 and layer3."""
    inner: tuple[int, int, int] = WIDTHS
    """Channels between a block's convolutions in each of these."""


RESNETS: dict[str, Layout] = {
    "resnet10": Layout("basic", (1, 1, 1)),
    "resnet16": Layout("basic", (1, 2, 2)),
    "resnet16-narrow": Layout("basic", (1, 2, 2), inner=(64, 96, 128)),
    "resnet18": Layout("basic", (2, 2, 2)),
    "resnet34": Layout("basic", (3, 4, 6)),
    "resnet50": Layout("bottleneck", (3, 4, 6)),
}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution; None if it is the identity."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(inner, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut (ResNet-50); the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class EncoderFeatures(NamedTuple):
    """Feature maps of the encoder; strides relative to the image."""

    stem: torch.Tensor
    """(B, 64, H/4, W/4): after max pooling, the paper's F_0."""
    layer1: torch.Tensor
    """(B, C1, H/4, W/4)"""
    layer2: torch.Tensor
    """(B, C2, H/8, W/8)"""
    layer3: torch.Tensor
    """(B, C3, H/16, W/16)"""


class ResNetEncoder(nn.Module):
    """ResNet without layer4 and classifier.

    Args:
        name: a key of `RESNETS`.

    Attributes:
        channels: channels of layer1, layer2 and layer3.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"unknown encoder '{name}', choose one of {', '.join(RESNETS)}")
        layout = RESNETS[name]
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[layout.block]
        self.channels = tuple(width * block.expansion for width in WIDTHS)
        self.conv1 = _conv(3, STEM_CHANNELS, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        layers, inputs = [], STEM_CHANNELS
        for i, (outputs, inner) in enumerate(zip(self.channels, layout.inner, strict=True)):
            first = block(inputs, outputs, inner, stride=1 if i == 0 else 2)
            rest = [block(outputs, outputs, inner, stride=1) for _ in range(layout.blocks[i] - 1)]
            layers.append(nn.Sequential(first, *rest))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = layers

    def forward(self, image: torch.Tensor) -> EncoderFeatures:
        """Encode a normalized (B, 3, H, W) image."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        layer1 = self.layer1(stem)
        layer2 = self.layer2(layer1)
        return EncoderFeatures(stem, layer1, layer2, self.layer3(layer2))

    def load_torchvision(self, state: dict[str, torch.Tensor]) -> None:
        """Load weights with torchvision's names; other layers are ignored.

        Of a ResNet with more blocks than this encoder (ResNet-18 into `resnet10`) the first ones
        are used.

        Raises:
            ValueError: a weight of this encoder is missing or has another shape.
        """
        own = self.state_dict()
        for key, value in own.items():
            if key not in state:
                if key.endswith("num_batches_tracked"):
                    continue
                raise ValueError(f"encoder weights: '{key}' is missing")
            if state[key].shape != value.shape:
                raise ValueError(
                    f"encoder weights: '{key}' has shape {tuple(state[key].shape)}, "
                    f"expected {tuple(value.shape)}"
                )
            value.copy_(state[key])
