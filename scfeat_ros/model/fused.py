"""The network for inference: the same function as `SCFeat`, with less arithmetic and memory access.

Built from a trained `SCFeat`, which remains the readable reference. The differences, all exact in
real numbers:

- batch normalization is folded into the convolution before it;
- ReLU comes after max pooling, on a quarter of the values: the two commute; with compiled kernels
  the stem is one pass from the image to the pooled map (see `native/stem.cpp`);
- a 3x3 convolution of a map upsampled by s runs as nine 1x1 convolutions on the small map, whose
  results are upsampled, shifted and added: 1/s^2 of the arithmetic (see `kernels.upsampled_sum`);
- so does the head's Layer_1 over the upsampled branch, which is never upsampled itself;
- the side maps are written into one map, and Winograd convolutions (below) read two maps, so that
  nothing needs to be concatenated;
- normalizations become a scale and a shift of each channel, from sums that are taken while the map
  is written, and are applied together with the activation, into the next layer's input;
- cross normalization's weights are folded into its convolutions and its scales;
- with compiled kernels, 3x3 convolutions use Winograd's minimal filtering, with a quarter of the
  multiplications, in fp32 or of 16-bit integers (see `native/winograd.cpp`); the others are matrix
  products (`native/direct.cpp`). In bf16 on CPUs with AMX, which is faster, PyTorch convolves.

If everything is computed by compiled kernels, `native/replay.py` runs a frame in one call. On a
GPU, kernels in Triton (`triton_kernels.py`) compute what is between the convolutions.

Convolutions run in `dtype`; sums, normalizations, peakiness and scores in fp32. Maps at full
resolution are fp32, convolved in fp32 or with 16-bit integers: keypoints are local maxima of the
score, and half precision there moves three times as many of them as in the rest of the network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from scfeat_ros.model import kernels
from scfeat_ros.model.backbone import ConvBlock
from scfeat_ros.model.cross_norm import CrossNorm
from scfeat_ros.model.detector import ConvInstanceNorm
from scfeat_ros.model.kernels import Norm
from scfeat_ros.model.resnet import BasicBlock, Bottleneck
from scfeat_ros.model.scfeat import SCFeat, SCFeatOutput, fold_batch_norms
from scfeat_ros.native import kernels as native_kernels
from scfeat_ros.native import library, matching
from scfeat_ros.native.direct import DirectConv
from scfeat_ros.native.winograd import WinogradConv, WinogradStem

_ONEDNN = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_ONEDNN_PACK = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
_ONEDNN_HAS_HALF = {
    torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
    torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
}

KEPT = 6
"""Image sizes for which a convolution keeps its weights in oneDNN's order: the levels of a pyramid
alternate."""


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU supports a type in convolutions; True if PyTorch cannot tell."""
    has_half = _ONEDNN_HAS_HALF.get(dtype)
    return has_half is None or has_half()


class Conv(nn.Module):
    """Convolution in `dtype`, optionally fused with the addition of a map and ReLU.

    Args:
        weight: (C_out, C_in, k, k) in fp32.
        bias: (C_out,) or None.
        stride: of the convolution; it is padded by k // 2.
        dtype: of its input, weights and result.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.stride = stride
        self.padding = weight.shape[-1] // 2
        self._packed: dict[tuple[torch.Size, int], torch.Tensor] = {}
        self._winograd: WinogradConv | None = None
        self._direct: DirectConv | None = None
        self._finish: Callable[..., torch.Tensor] | None = None
        self._uses_onednn = _ONEDNN is not None and _ONEDNN_PACK is not None and cpu_computes(dtype)

    def use_kernels(self, int16: bool = False) -> None:
        """Use compiled kernels from now on, if there are suitable ones.

        Not in bf16 on CPUs with AMX, where PyTorch is faster.

        Args:
            int16: multiply 16-bit integers in the Winograd convolutions.
        """
        if self.weight.dtype == torch.bfloat16 and matching.has_tiles():
            return
        if self.stride == 1 and WinogradConv.fits(self.weight):
            self._winograd = WinogradConv.of(self.weight, self.bias, int16)
        if DirectConv.fits(self.weight):
            self._direct = DirectConv.of(self.weight, self.bias, self.stride)

    def use_finish(self, finish: Callable[..., torch.Tensor]) -> None:
        """Add bias and map, and apply ReLU, by one function from now on.

        Args:
            finish: as `triton_kernels.finish_convolution`.
        """
        self._finish = finish

    @functools.cached_property
    def by_outputs(self) -> torch.Tensor:
        """(C_in, k, k, C_out) weights in fp32, for the kernels of few channels."""
        return self.weight.float().permute(1, 2, 3, 0).contiguous()

    def _uses_winograd(self, height: int, width: int) -> bool:
        """Whether a result of a height and width is computed by the Winograd kernel."""
        return self._winograd is not None and self._winograd.pays(height, width)

    def products(self, height: int, width: int) -> int:
        """Multiplications for a result of a height and width."""
        if self._uses_winograd(height, width):
            return self._winograd.products(height, width)
        return self.weight.numel() * height * width

    def forward(
        self,
        x: torch.Tensor,
        relu: bool = False,
        plus: torch.Tensor | None = None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolve a map.

        Args:
            x: (B, C_in, h, w).
            relu: whether ReLU follows.
            plus: (B, C_out, h, w), added before ReLU.
            beside: (B, C, h, w), the last C of the C_in channels if `x` has only the others.
        """
        if self._uses_winograd(*x.shape[2:]):
            return self._winograd(x, relu, plus, beside)
        x = x if beside is None else torch.cat([x, beside], dim=1)
        if self._direct is not None:
            return self._direct(x, relu, plus)
        if self._finish is not None:
            y = F.conv2d(x, self.weight, None, self.stride, self.padding)
            return self._finish(y, self.bias, plus, relu)
        if x.device.type == "cpu" and self._uses_onednn:
            return self._onednn(x, relu, plus)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if plus is not None:
            y += plus
        return y.relu_() if relu else y

    def _onednn(self, x: torch.Tensor, relu: bool, plus: torch.Tensor | None) -> torch.Tensor:
        """By oneDNN, with addition and ReLU fused, and with weights in its preferred order."""
        place = [self.padding] * 2, [self.stride] * 2, [1, 1], 1
        # the order depends on the size and the number of threads; those of the last few are kept
        key = x.shape, torch.get_num_threads()
        weight = self._packed.get(key)
        if weight is None:
            weight = _ONEDNN_PACK(self.weight, *place, list(x.shape))
            kept = list(self._packed.items())[1 - KEPT :]
            self._packed = dict([*kept, (key, weight)])  # atomic: other threads may read it
        after = "relu" if relu else "none"
        if plus is None:
            return _ONEDNN(x, weight, self.bias, *place, after, [], "")
        return _ONEDNN.binary(
            x, plus, weight, self.bias, *place, "add", None, after if relu else None, [], None
        )


class Stem(Conv):
    """The encoder's first convolution, ReLU and max pooling, in `dtype`.

    Args:
        weight, bias: (64, 3, 7, 7) and (64,) in fp32.
        dtype: of the result.
        compiled: use the compiled kernel.
        int16: multiply 16-bit integers in it.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        dtype: torch.dtype,
        compiled: bool,
        int16: bool = False,
    ) -> None:
        super().__init__(weight, bias, 2, dtype)
        self._filtered = WinogradStem.of(weight, bias, dtype, int16) if compiled else None

    def products(self, height: int, width: int) -> int:
        """Multiplications for a pooled map of a height and width."""
        if self._filtered is not None:
            return self._filtered.products(height, width)
        return super().products(2 * height, 2 * width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalized, in fp32 -> (B, 64, H/4, W/4)."""
        if self._filtered is not None and len(image) == 1:
            return self._filtered(image)
        x = super().forward(image.to(self.weight.dtype, memory_format=torch.channels_last))
        return F.max_pool2d(x, 3, stride=2, padding=1).relu_()


def taps(weight: torch.Tensor, dtype: torch.dtype) -> Conv:
    """The taps of a (C_out, C_in, k, k) weight, row by row, as one 1x1 convolution."""
    return Conv(weight.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None], dtype=dtype)


def _norm(norm: nn.GroupNorm | nn.InstanceNorm2d) -> Norm:
    groups = getattr(norm, "num_groups", norm.weight.shape[0])
    return Norm(norm.weight.detach().float(), norm.bias.detach().float(), groups)


def _bridge(bridge: CrossNorm) -> tuple[nn.Conv2d, Norm]:
    """The two parts of the cross normalization, each times its weight."""
    w_s, w_c = (bridge.weights / bridge.weights.sum()).detach()
    parts = (bridge.spatial_scale, bridge.spatial_shift)
    spatial = nn.Conv2d(1, 2, 7, padding=3).to(bridge.weights.device)
    spatial.weight.data = torch.cat([part.weight.detach() * w_s for part in parts])
    spatial.bias.data = torch.cat([part.bias.detach() * w_s for part in parts])
    scale, shift = bridge.channel_scale.detach() * w_c, bridge.channel_shift.detach() * w_c
    return spatial, Norm(scale, shift, len(scale))


def _conv(conv: nn.Conv2d, dtype: torch.dtype) -> Conv:
    return Conv(conv.weight.detach(), conv.bias.detach(), conv.stride[0], dtype)


class Block(nn.Module):
    """A ResNet block whose batch normalizations are folded."""

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        convs = [block.conv1, block.conv2]
        if isinstance(block, Bottleneck):
            convs.append(block.conv3)
        self.convs = nn.ModuleList(_conv(conv, dtype) for conv in convs)
        self.shortcut = None if block.downsample is None else _conv(block.downsample, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv in self.convs[:-1]:
            x = conv(x, relu=True)
        return self.convs[-1](x, relu=True, plus=shortcut)


class FusedSCFeat(nn.Module):
    """`SCFeat` for inference; called like it, with the same results up to rounding.

    Args:
        model: the network; its weights are copied.
        dtype: of the convolutions.
        compiled: use the C++ kernels (CPU only; float32 or bfloat16).
        int16: multiply 16-bit integers in their Winograd convolutions.
        triton: use the Triton kernels (GPU only).

    Raises:
        library.CompilerError: `compiled` was asked for and is not possible.
        ValueError: `compiled` for another device or dtype.
        ImportError: `triton` was asked for and is not installed.
    """

    def __init__(
        self,
        model: SCFeat,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        int16: bool = False,
        triton: bool = False,
    ) -> None:
        super().__init__()
        self.kernels: ModuleType = kernels
        if compiled:
            if next(model.parameters()).device.type != "cpu" or dtype not in library.SUFFIX:
                raise ValueError("compiled kernels are for the CPU, in float32 or bfloat16")
            library.load()
            self.kernels = native_kernels
        elif triton:
            from scfeat_ros.model import triton_kernels  # needs triton

            self.kernels = triton_kernels
        self.dtype = dtype
        self.config = model.config
        model = fold_batch_norms(model)
        backbone, detector = model.backbone, model.detector
        encoder = backbone.encoder
        self.register_buffer("mean", model.mean.detach().flatten().clone())
        self.register_buffer("deviation", model.deviation.detach().flatten().clone())
        stem = encoder.conv1
        self.stem = Stem(stem.weight.detach(), stem.bias.detach(), dtype, compiled, int16)
        self.layers = nn.ModuleList(
            nn.Sequential(*(Block(block, dtype) for block in layer))
            for layer in (encoder.layer1, encoder.layer2, encoder.layer3)
        )
        self.eighth_taps = taps(backbone.decoder_0.up.conv.weight, dtype)
        self.quarter_taps = taps(backbone.decoder_1.up.conv.weight, dtype)
        self.side_0_taps = taps(backbone.side_0.conv.weight, dtype)
        self.side_1_taps = taps(backbone.side_1.conv.weight, dtype)
        self.eighth = Conv(backbone.decoder_0.conv.conv.weight, dtype=dtype)
        self.quarter = Conv(backbone.decoder_1.conv.conv.weight, dtype=dtype)
        self.side_2 = Conv(backbone.side_2.conv.weight, dtype=dtype)
        self.fuse = Conv(backbone.fuse.weight, backbone.fuse.bias, dtype=dtype)
        self.norms = {
            name: _norm(block.norm)
            for name, block in backbone.named_modules()
            if isinstance(block, ConvBlock)
        }
        self.spatial, self.norms["bridge"] = _bridge(model.bridge)
        self.layer0_left = Conv(detector.layer0_left.conv.weight, dtype=dtype)
        self.layer0_right = Conv(detector.layer0_right.conv.weight)
        self.layer1_left = taps(detector.layer1_left.weight, dtype)
        self.layer1_right = Conv(detector.layer1_right.weight)
        for name, block in detector.named_modules():
            if isinstance(block, ConvInstanceNorm):
                self.norms[name] = _norm(block.norm)
        self.norms["layer1"] = _norm(detector.layer1_norm)
        self.norms["layer2"] = _norm(detector.layer2_norm)
        self.slopes = {
            name: block.activation.weight.item()
            for name, block in detector.named_modules()
            if isinstance(block, ConvInstanceNorm)
        }
        self.slopes["layer1"] = detector.layer1_activation.weight.item()
        self.reliability = copy.deepcopy(detector.reliability)
        self.register_buffer("layer2", detector.layer2.weight.detach().float().flatten().clone())
        for module in self.modules():
            if isinstance(module, Conv):
                if compiled:
                    module.use_kernels(int16)
                elif triton:
                    module.use_finish(self.kernels.finish_convolution)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, image: torch.Tensor) -> SCFeatOutput:
        """As `SCFeat.forward`; `bridged` and `scores` are fp32, the others in `dtype`."""
        if self.kernels is native_kernels and len(image) > 1:
            outputs = [self._forward(one[None]) for one in image]
            return SCFeatOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
        return self._forward(image)

    def _forward(self, image: torch.Tensor) -> SCFeatOutput:
        k = self.kernels
        normalized = k.normalize_image(image, self.mean, self.deviation)
        stem = self.stem(normalized.values)
        descriptors, layer2, layer3 = self._describe(stem)
        bridge = self.spatial, self.norms["bridge"], self.reliability
        maps = k.bridge(descriptors, stem, *bridge)
        scores = self._detect(normalized, maps)
        return SCFeatOutput(descriptors, maps.bridged, scores, layer2, layer3)

    def _describe(self, stem: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """F_0 -> D_desc, layer2, layer3: encoder layers, decoders, side maps, fusion."""
        layer1 = self.layers[0](stem)
        layer2 = self.layers[1](layer1)
        layer3 = self.layers[2](layer2)
        dim = self.config.descriptor_dim
        eighth, quarter = self.config.decoder_channels
        sides = _empty_like(layer1, 3 * dim)

        up = _empty_like(layer2, eighth)
        self._up_conv("decoder_0.up", self.eighth_taps(layer3), 2, up)
        self._up_conv("side_0", self.side_0_taps(layer3), 4, sides[:, :dim])
        x = self._norm_elu("decoder_0.conv", self.eighth(up, beside=layer2))

        up = _empty_like(layer1, quarter)
        self._up_conv("decoder_1.up", self.quarter_taps(x), 2, up)
        self._up_conv("side_1", self.side_1_taps(x), 2, sides[:, dim : 2 * dim])
        x = self._norm_elu("decoder_1.conv", self.quarter(up, beside=layer1))
        self._norm_elu("side_2", self.side_2(x), sides[:, 2 * dim :])
        return self.fuse(sides), layer2, layer3

    def _up_conv(self, name: str, z: torch.Tensor, factor: int, out: torch.Tensor) -> None:
        """UP-CONV of Fig. 4 (b) from its nine taps (one for a 1x1 kernel), written to `out`."""
        self.kernels.up_conv(z, out.shape[1], factor, self.norms[name], out)

    def _norm_elu(
        self, name: str, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """GroupNorm and ELU of Fig. 4 (a)."""
        return self.kernels.normalize_activate(
            x, self.kernels.statistics(x), self.norms[name], out=out
        )

    def _detect(self, image: kernels.Image, maps: kernels.DetectorInput) -> torch.Tensor:
        """Score map from the normalized image, F_cn, F_0 (Eq. 7-13) and the reliability."""
        k = self.kernels
        left_peaks, left = k.weigh_by_peakiness(maps, self.dtype)
        left, totals = k.convolution(left, self.layer0_left)
        left = k.normalize_activate(
            left, totals, self.norms["layer0_left"], self.slopes["layer0_left"]
        )
        right_peaks, right, totals = k.image_branch(image, self.layer0_right)
        hidden, totals = k.hidden(
            *(right, totals, self.norms["layer0_right"], self.slopes["layer0_right"]),
            *(self.layer1_right, left, self.layer1_left),
        )
        value, totals = k.response(
            hidden, totals, self.norms["layer1"], self.slopes["layer1"], self.layer2
        )
        peaks = left_peaks, maps.reliability, right_peaks
        return k.score(value, totals, self.norms["layer2"], *peaks)


def _empty_like(like: torch.Tensor, channels: int) -> torch.Tensor:
    """An uninitialized map like another, but with a different number of channels."""
    batch, _, height, width = like.shape
    return torch.empty(
        (batch, channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
