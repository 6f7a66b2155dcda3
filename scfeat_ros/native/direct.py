"""Convolutions as matrix products, in C++: those that do not use Winograd's algorithm."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scfeat_ros.native.library import SUFFIX, call, channels_last, empty_map, query


class DirectConv(NamedTuple):
    """A 1x1 or 3x3 convolution, padded by half of that: see `direct.cpp`."""

    weights: torch.Tensor
    """In the kernel's order; of the maps' type."""
    bias: torch.Tensor | None
    """(C_out,) in fp32."""
    side: int
    """1 or 3."""
    stride: int
    outputs: int
    """C_out."""

    @classmethod
    def fits(cls, weight: torch.Tensor) -> bool:
        """Whether there is a kernel for (C_out, C_in, k, k)."""
        outputs, inputs, side, _ = weight.shape
        return side in (1, 3) and inputs % 2 == 0 and outputs % query("lanes") == 0

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, stride: int) -> DirectConv:
        """From (C_out, C_in, k, k) and (C_out,), for maps of their type."""
        outputs, _, side, _ = weight.shape
        pair = query(f"direct_pair_{SUFFIX[weight.dtype]}")
        by_depth = weight.permute(2, 3, 1, 0).flatten(0, 2)
        panels, channel = [], 0
        while channel < outputs:
            columns = query("direct_columns", channel, outputs)
            panel = by_depth[:, channel : channel + columns]
            panels.append(panel.unflatten(0, (-1, pair)).transpose(1, 2).flatten())
            channel += columns
        bias = None if bias is None else bias.float()
        return cls(torch.cat(panels), bias, side, stride, outputs)

    def __call__(
        self, x: torch.Tensor, relu: bool = False, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(1, C_in, h, w) -> (1, C_out, h / stride, w / stride), rounded up; see `Conv.forward`."""
        x = channels_last(x)
        _, inputs, height, width = x.shape
        size = ((length - 1) // self.stride + 1 for length in (height, width))
        out = empty_map(self.outputs, *size, x.dtype)
        plus = None if plus is None else channels_last(plus)
        call(
            "direct",
            x.dtype,
            *(x, height, width, inputs, self.weights, self.side, self.stride, self.outputs),
            *(self.bias, plus, relu, out),
        )
        return out
