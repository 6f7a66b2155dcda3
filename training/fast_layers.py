"""Faster training on CPUs with bfloat16 instructions.

Parameters, activations and everything between the convolutions stay fp32; only the convolutions
themselves compute in bf16 (with fp32 accumulation). The faster backward pass depends on the CPU:

- AVX512-BF16 without AMX (AMD Zen 4): the library's bf16 convolution is twice as fast as fp32
  forward and backward, so it is used both ways.
- AMX (Intel Sapphire Rapids and later): the library's bf16 convolution is 3.5 times faster than
  fp32 forward but 2 to 8 times slower backward. There `bfloat16_conv2d` differentiates a stride-1
  convolution with forward convolutions and matrix products alone: the gradient for the input is a
  convolution with the flipped and transposed kernel, the gradient for the weights is one matrix
  product per tap of the kernel.

A convolution of an upsampled map is computed at the size before upsampling: the kernel's taps are
applied to the small map as matrix products, and two more matrix products upsample, shift and add
their results. For the ResNet-50 network this is half of the arithmetic of stages 0 and 1.

PReLU with one parameter for all channels sums its gradient directly; PyTorch first writes that of
every value.
"""

from __future__ import annotations

import functools
import types

import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.cpu import cpu_info

MIN_CHANNELS = 16
"""Convolutions with fewer channels stay fp32: the conversions cost more than they gain."""


class _BFloat16Conv2d(torch.autograd.Function):
    """Stride-1 convolution of fp32 tensors, computed in bf16 both ways."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: int,
    ) -> torch.Tensor:
        # bf16 in channels-last: the convolution and `_weight_gradient` need it
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        weight = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        ctx.has_bias = bias is not None
        y = F.conv2d(x, weight, padding=padding).float()
        return y if bias is None else y.add_(bias.view(1, -1, 1, 1))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kernel = weight.shape[-1]
        low = gradient.to(torch.bfloat16, memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            flipped = weight.flip(2, 3).transpose(0, 1).contiguous()
            grad_x = F.conv2d(low, flipped, padding=kernel - 1 - ctx.padding).float()
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, low, kernel, ctx.padding)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _weight_gradient(
    x: torch.Tensor, gradient: torch.Tensor, kernel: int, padding: int
) -> torch.Tensor:
    """(out, in, kernel, kernel) fp32 from channels-last bf16 maps of input and gradient.

    Both are laid out as rows of the padded input's pixel grid; the gradient is zero where that grid
    has no output. For each tap the input is then a range of rows at an offset, and the tap's
    gradient is one matrix product without a copy.
    """
    width = x.shape[-1] + 2 * padding
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0) + (padding,) * 4).view(-1, x.shape[1])
    more = kernel - 1
    out = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, more, 0, more)).view(-1, gradient.shape[1])
    count = len(rows) - more * (width + 1)
    out = out[:count].t()
    starts = [i * width + j for i in range(kernel) for j in range(kernel)]
    taps = torch.stack([out @ rows[start : start + count] for start in starts]).float()
    return taps.view(kernel, kernel, *taps.shape[1:]).permute(2, 3, 0, 1)


def bfloat16_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: int = 0
) -> torch.Tensor:
    """Convolution with stride 1, computed in bf16, with its gradients.

    Args:
        x: (B, in, H, W) fp32.
        weight: (out, in, k, k) fp32.
        bias: (out,) fp32 or None.
        padding: zeros on each side, at most k - 1.

    Returns:
        (B, out, H + 2 padding - k + 1, W + 2 padding - k + 1) fp32.
    """
    return _BFloat16Conv2d.apply(x, weight, bias, padding)


def cpu_has_bfloat16() -> bool:
    """Whether this x86 CPU multiplies bf16 in hardware (Linux only, False elsewhere)."""
    info = cpu_info()
    return "avx512_bf16" in info or "amx_bf16" in info


def cpu_has_amx() -> bool:
    """Whether the CPU has matrix tiles for bf16 (Linux only, False elsewhere)."""
    return "amx_bf16" in cpu_info()


def _suits(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    )


def _is_plain(conv: nn.Conv2d) -> bool:
    """Without stride and dilation, square and padded evenly; as `bfloat16_conv2d` needs it."""
    kernel = conv.kernel_size[0]
    return (
        conv.kernel_size == (kernel, kernel)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and not isinstance(conv.padding, str)
        and conv.padding[0] == conv.padding[1] <= kernel - 1
    )


def _forward_own(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return bfloat16_conv2d(x, conv.weight, conv.bias, conv.padding[0])


def _forward_library(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.to(torch.bfloat16)
    low = x.to(torch.bfloat16)
    return conv._conv_forward(low, conv.weight.to(torch.bfloat16), bias).float()


class _PReLU(torch.autograd.Function):
    """PReLU with a single parameter."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.slope = weight.item()
        return F.leaky_relu(x, ctx.slope)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        grad_x = torch.ops.aten.leaky_relu_backward(gradient, x, ctx.slope, False)
        return grad_x, x.clamp_max(0).mul_(gradient).sum().view(1)


def _forward_prelu(prelu: nn.PReLU, x: torch.Tensor) -> torch.Tensor:
    return _PReLU.apply(x, prelu.weight)


@functools.cache
def _upsampling_taps(size: int, factor: int, taps: int) -> torch.Tensor:
    """(factor size, taps, size) bf16: bilinear upsampling of an axis, shifted for each tap."""
    identity = torch.eye(size)[None]
    weights = F.interpolate(identity, scale_factor=factor, mode="linear", align_corners=False)[0]
    padded = F.pad(weights, (taps // 2, taps // 2))
    shifted = [padded[:, tap : tap + size * factor] for tap in range(taps)]
    return torch.stack(shifted).permute(2, 0, 1).contiguous().to(torch.bfloat16)


def _forward_upsampled(conv: nn.Conv2d, x: torch.Tensor, factor: int) -> torch.Tensor:
    """`conv` of the upsampled x; see `sampling.convolve_upsampled`."""
    taps = conv.kernel_size[0]
    batch, inputs, height, width = x.shape
    pixels = x.to(torch.bfloat16, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    kernel_rows = conv.weight.to(torch.bfloat16).permute(2, 3, 0, 1).reshape(taps, -1, inputs)
    # (B, taps h, w taps out): the rows of the kernel one below the other, its columns side by side
    applied = [F.linear(pixels, row).reshape(batch, height, -1) for row in kernel_rows]
    vertical = _upsampling_taps(height, factor, taps).flatten(1)
    rows = vertical @ torch.cat(applied, dim=1)
    horizontal = _upsampling_taps(width, factor, taps).transpose(1, 2).flatten(1)
    y = horizontal @ rows.view(batch, factor * height, width * taps, -1)
    y = y.permute(0, 3, 1, 2).float()
    return y if conv.bias is None else y + conv.bias.view(1, -1, 1, 1)


def accelerate(model: nn.Module, own_backward: bool | None = None) -> int:
    """Make the convolutions of a model compute in bf16, and its PReLUs faster; in place.

    Parameters and state dict do not change. Grouped convolutions and those with few channels stay
    fp32; with `own_backward` also those with a stride or dilation. `sampling.convolve_upsampled`
    computes at the small size with them.

    Args:
        model: the network, in channels-last for best speed.
        own_backward: differentiate by `bfloat16_conv2d`; None decides by the CPU (see above).

    Returns:
        how many layers were changed.
    """
    own = cpu_has_amx() if own_backward is None else own_backward
    count = 0
    for layer in model.modules():
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            layer.forward = types.MethodType(_forward_prelu, layer)
            count += 1
        elif isinstance(layer, nn.Conv2d) and _suits(layer):
            plain = _is_plain(layer)
            if own and not plain:
                continue
            layer.forward = types.MethodType(_forward_own if own else _forward_library, layer)
            if plain and layer.padding[0] == layer.kernel_size[0] // 2:
                layer.forward_upsampled = types.MethodType(_forward_upsampled, layer)
            count += 1
    return count
