"""Convolutions by minimal filtering (Winograd)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from scfeat_ros.native.kernels import FEW
from scfeat_ros.native.library import call, channels_last, empty_map

TILE = 4
"""Side of a tile of a 3x3 convolution's results, as in winograd.cpp."""
STEM_TILE = 3
"""Side of a tile of the stem's results, as in stem.cpp."""
MIN_TILES = 16
"""Tiles of a map from which on a Winograd convolution pays: it reads four times as many weights."""


def _tiles(height: int, width: int, side: int) -> int:
    return -(-height // side) * -(-width // side)


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """Weights of minimal filtering: G w G^T at its 36 places, for kernels of 3x3 and 4x4.

    Args:
        weight: (C_out, C_in, k, k).

    Returns:
        (36, panels, C_in, columns) fp32, in the order that the kernels read.
    """
    outputs, inputs, taps, _ = weight.shape
    scales = torch.tensor([1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24], dtype=torch.float64)
    points = torch.tensor([0, 1, -1, 2, -2], dtype=torch.float64)
    at_points = scales[:, None] * points[:, None] ** torch.arange(taps)
    at_infinity = torch.eye(taps, dtype=torch.float64)[-1:]
    G = torch.cat([at_points, at_infinity])
    transformed = torch.einsum("ia,ocab,jb->ijco", G, weight.double(), G).float()
    columns = call("winograd_columns", None, outputs)
    return transformed.reshape(36, inputs, -1, columns).transpose(1, 2).contiguous()


class WinogradConv(NamedTuple):
    """A 3x3 convolution, padded by one, in a quarter of the products: see `winograd.cpp`."""

    weight: torch.Tensor
    """(36, panels, C_in, columns): transformed, in the order that the kernel reads."""
    bias: torch.Tensor | None
    """(C_out,) in fp32."""
    outputs: int
    """C_out."""

    @classmethod
    def fits(cls, weight: torch.Tensor) -> bool:
        """Whether there is a kernel for (C_out, C_in, k, k), and it pays."""
        lanes = call("winograd_lanes", None)
        channels = weight.shape[:2]
        return weight.shape[2:] == (3, 3) and all(c > FEW and c % lanes == 0 for c in channels)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> WinogradConv:
        """From (C_out, C_in, 3, 3) and (C_out,)."""
        return cls(_transformed(weight), None if bias is None else bias.float(), len(weight))

    @staticmethod
    def pays(height: int, width: int) -> bool:
        """Whether it is faster than a plain convolution, for a result of a height and width."""
        return _tiles(height, width, TILE) >= MIN_TILES

    def products(self, height: int, width: int) -> int:
        """Multiplications for a result of a height and width, without those of the transforms."""
        return self.weight.numel() * _tiles(height, width, TILE)

    def __call__(
        self, x: torch.Tensor, relu: bool = False, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(1, C_in, h, w) -> (1, C_out, h, w) of its type; sum and ReLU as in `fused.Conv`."""
        x = channels_last(x)
        _, inputs, height, width = x.shape
        out = empty_map(self.outputs, height, width, x.dtype)
        plus = None if plus is None else channels_last(plus)
        call(
            "winograd_convolution",
            x.dtype,
            *(x, height, width, inputs, self.weight, self.outputs, self.bias, plus, relu, out),
        )
        return out


class WinogradStem(NamedTuple):
    """The encoder's 7x7 convolution of stride 2, ReLU and max pooling in one: see `stem.cpp`."""

    weight: torch.Tensor
    """(36, panels, 12, columns): transformed, in the order that the kernel reads."""
    bias: torch.Tensor
    """(C_out,) in fp32."""

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor) -> WinogradStem:
        """From (C_out, 3, 7, 7) and (C_out,)."""
        # an eighth tap of zeros before the others, and two taps each way are a cell's
        cells = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
        cells = cells.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        return cls(_transformed(cells), bias.float())

    def products(self, height: int, width: int) -> int:
        """Multiplications for a pooled map of a height and width, without the transforms'."""
        return self.weight.numel() * _tiles(2 * height, 2 * width, STEM_TILE)

    def __call__(self, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(1, 3, H, W) fp32 -> (1, C_out, H / 4, W / 4) in `dtype`; H and W multiples of 4."""
        image = image.contiguous()
        _, _, height, width = image.shape
        _, _, _, columns = self.weight.shape
        out = empty_map(len(self.bias), height // 4, width // 4, dtype)
        call(
            "stem",
            dtype,
            *(image, height, width, self.weight, columns, self.bias, len(self.bias), out),
        )
        return out
