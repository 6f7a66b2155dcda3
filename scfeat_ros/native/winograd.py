"""Convolutions by Winograd's minimal filtering."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from scfeat_ros.native.kernels import FEW
from scfeat_ros.native.library import call, channels_last, empty_map, query

TILE = 4
"""Side of a tile of a 3x3 convolution's results, as in winograd.cpp."""
STEM_TILE = 3
"""Side of a tile of the stem's results, as in stem.cpp."""
MIN_TILES = 16
"""Smallest number of tiles for which it is faster: it reads four times as many weights."""

LARGEST = 2**15 - 1
"""Largest int16."""
PEAK = 40
"""Ratio of a patch's bound to its typical magnitude. It divides the 31 bits of a sum between patch
and weights such that both are rounded equally."""
BOUNDS = (10, 10, 10, 6, 6, 10)
"""Sums of magnitudes of the rows of B^T, as in winograd.h."""


def has_int16() -> bool:
    """Whether Winograd convolutions are faster with 16-bit integers than with fp32 on this CPU."""
    return bool(query("has_int16"))


def _tiles(height: int, width: int, side: int) -> int:
    return -(-height // side) * -(-width // side)


class Weights(NamedTuple):
    """Transformed weights in the kernels' order."""

    values: torch.Tensor
    """(36, panels, C_in, columns) fp32, or, as int16, (36, panels, C_in / 2, columns, 2)."""
    scales: torch.Tensor | None
    """(36, C_out) fp32: factors of the int32 sums."""
    largest: float
    """Magnitude to which a transformed patch is scaled before it is rounded to int16."""

    @property
    def int16(self) -> bool:
        """Whether they are for products of int16."""
        return self.scales is not None

    @classmethod
    def of(cls, weight: torch.Tensor, int16: bool) -> Weights:
        """Transform weights: G w G^T, at its 36 positions.

        Args:
            weight: (C_out, C_in, k, k) with k = 3 or 4.
            int16: round it to int16.
        """
        outputs, inputs, taps, _ = weight.shape
        factors = torch.tensor([1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24], dtype=torch.float64)
        points = torch.tensor([0, 1, -1, 2, -2], dtype=torch.float64)
        at_points = factors[:, None] * points[:, None] ** torch.arange(taps)
        at_infinity = torch.eye(taps, dtype=torch.float64)[-1:]
        G = torch.cat([at_points, at_infinity])
        values = torch.einsum("ia,ocab,jb->ijco", G, weight.double(), G).flatten(0, 1)
        scales, largest, pair = None, 1.0, 1
        if int16:
            largest = min(LARGEST, int((PEAK * 2**31 / inputs) ** 0.5))
            values, scales = _rounded(values, largest)
            pair = 2
        columns = query("winograd_columns", outputs)
        panels = values.reshape(36, inputs // pair, pair, -1, columns).permute(0, 3, 1, 4, 2)
        values = panels.to(torch.int16 if pair == 2 else torch.float32).contiguous()
        return cls(values.squeeze(-1), scales, largest)


def _rounded(values: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round transformed weights to integers.

    No sum over the inputs reaches 2^31: the sum of the magnitudes of its weights is less than that
    divided by `largest`.

    Args:
        values: (36, C_in, C_out) float64.
        largest: largest magnitude in a patch.

    Returns:
        The integers, and (36, C_out) fp32 factors of their sums of products.
    """
    inputs = values.shape[1]
    magnitudes = values.abs()
    step = torch.maximum(
        magnitudes.sum(dim=1) / (2**31 / largest - inputs),  # each is rounded up by a half at most
        magnitudes.amax(dim=1) / LARGEST,
    ).clamp_min(1e-30)
    bounds = torch.tensor(BOUNDS, dtype=torch.float64)
    patch = torch.outer(bounds, bounds).flatten() / largest
    return (values / step[:, None]).round(), (step * patch[:, None]).float()


class WinogradConv(NamedTuple):
    """A 3x3 convolution with padding 1 and a quarter of the multiplications, see `winograd.cpp`."""

    weights: Weights
    bias: torch.Tensor | None
    """(C_out,) in fp32."""
    dtype: torch.dtype
    """Of its maps."""
    outputs: int
    """C_out."""

    @classmethod
    def fits(cls, weight: torch.Tensor) -> bool:
        """Whether there is a kernel for (C_out, C_in, k, k), and it is faster."""
        lanes = query("lanes")
        channels = weight.shape[:2]
        return weight.shape[2:] == (3, 3) and all(c > FEW and c % lanes == 0 for c in channels)

    @classmethod
    def of(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, int16: bool = False
    ) -> WinogradConv:
        """From (C_out, C_in, 3, 3) and (C_out,), for maps of their type.

        Args:
            weight, bias: of the convolution.
            int16: multiply int16.
        """
        bias = None if bias is None else bias.float()
        return cls(Weights.of(weight, int16), bias, weight.dtype, len(weight))

    @staticmethod
    def pays(height: int, width: int) -> bool:
        """Whether it is faster than a direct convolution, for a result of a height and width."""
        return _tiles(height, width, TILE) >= MIN_TILES

    def products(self, height: int, width: int) -> int:
        """Multiplications for a result of a height and width, not counting the transforms."""
        return self.weights.values.numel() * _tiles(height, width, TILE)

    def __call__(
        self,
        x: torch.Tensor,
        relu: bool = False,
        plus: torch.Tensor | None = None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(1, C_in, h, w) -> (1, C_out, h, w) of its type; the rest as in `fused.Conv`."""
        x = channels_last(x)
        _, inputs, height, width = x.shape
        more = 0 if beside is None else beside.shape[1]
        beside = None if beside is None else channels_last(beside)
        out = empty_map(self.outputs, height, width, self.dtype)
        plus = None if plus is None else channels_last(plus)
        call(
            "winograd_int16" if self.weights.int16 else "winograd",
            self.dtype,
            *(x, beside, height, width, inputs, more, *self.weights, self.outputs),
            *(self.bias, plus, relu, out),
        )
        return out


class WinogradStem(NamedTuple):
    """The encoder's 7x7 convolution of stride 2, ReLU and max pooling in one: see `stem.cpp`."""

    weights: Weights
    bias: torch.Tensor
    """(C_out,) in fp32."""
    dtype: torch.dtype
    """Of the result."""

    @classmethod
    def of(
        cls, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, int16: bool = False
    ) -> WinogradStem:
        """From (C_out, 3, 7, 7) and (C_out,).

        Args:
            weight, bias: of the convolution.
            dtype: of the result.
            int16: multiply int16.
        """
        # an eighth tap of zeros before the others, and two taps each way are a cell's
        cells = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
        cells = cells.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        return cls(Weights.of(cells, int16), bias.float(), dtype)

    def products(self, height: int, width: int) -> int:
        """Multiplications for a pooled map of a height and width, not counting the transforms."""
        return self.weights.values.numel() * _tiles(2 * height, 2 * width, STEM_TILE)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) fp32 -> (1, C_out, H / 4, W / 4); H and W multiples of 4."""
        image = image.contiguous()
        _, _, height, width = image.shape
        out = empty_map(len(self.bias), height // 4, width // 4, self.dtype)
        call(
            "stem_int16" if self.weights.int16 else "stem",
            self.dtype,
            *(image, height, width, *self.weights, self.bias, len(self.bias), out),
        )
        return out
