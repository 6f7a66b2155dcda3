"""SCFeat: the whole network; its configurations; saving and loading weights."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scfeat_ros import __version__
from scfeat_ros.errors import ModelError
from scfeat_ros.model.backbone import F2RBackbone
from scfeat_ros.model.cross_norm import CrossNorm
from scfeat_ros.model.descriptors import Maps, Projection
from scfeat_ros.model.detector import Detector
from scfeat_ros.model.resnet import (
    STEM_CHANNELS,
    BasicBlock,
    Bottleneck,
    EncoderFeatures,
    ResNetEncoder,
)
from scfeat_ros.staging import staged_file

STRIDE = 16
"""Height and width of the network's input are multiples of this."""

DESCRIPTOR_STRIDE = 4
"""Image pixels per cell of the descriptor map."""

FITTED = ("projection.", "detector.reliability.")
"""Prefixes of weights that are fitted after the training; older files lack them."""


@dataclass(frozen=True)
class SCFeatConfig:
    """Sizes of the network.

    Attributes:
        name: of the configuration.
        encoder: a key of `resnet.RESNETS`.
        decoder_channels: channels of the decoders at 1/8 and at 1/4.
        descriptor_dim: channels of D_desc and F_cn; length of the paper's descriptors, and of
            those that are not projected.
        head_channels: channels of the head's Layer_0 on the quarter-resolution branch, of
            Layer_0 on the image branch, and of Layer_1.
        upsampled_kernel: size of the kernels over upsampled maps: of up-convolutions, and of the
            head's Layer_1 over its quarter-resolution branch.
    """

    name: str
    encoder: str
    decoder_channels: tuple[int, int]
    descriptor_dim: int
    head_channels: tuple[int, int, int]
    upsampled_kernel: int = 3


CONFIGS = {
    "scfeat": SCFeatConfig("scfeat", "resnet50", (512, 256), 128, (192, 64, 128)),
    "scfeat-m": SCFeatConfig("scfeat-m", "resnet16", (64, 32), 64, (16, 8, 8), upsampled_kernel=1),
    "scfeat-s": SCFeatConfig(
        "scfeat-s", "resnet16-narrow", (64, 32), 64, (16, 8, 8), upsampled_kernel=1
    ),
}
"""scfeat: the paper's network. scfeat-m: a smaller one for robots. scfeat-s: the default, distilled
from scfeat-m. Weights of all three are installed."""


class Description(NamedTuple):
    """Output of backbone and bridge for an image."""

    descriptors: torch.Tensor
    """(B, D, H/4, W/4): D_desc, not normalized; the paper samples descriptors here."""
    bridged: torch.Tensor
    """(B, D, H/4, W/4): F_cn, after the bridge; the input of training loss and detector, and where
    descriptors are sampled by default."""
    encoded: EncoderFeatures
    """The encoder's maps; its stem is F_0."""

    @property
    def maps(self) -> Maps:
        """The maps from which descriptors are made by default, of the whole batch."""
        return Maps(self.bridged, self.encoded.layer2, self.encoded.layer3)


class SCFeatOutput(NamedTuple):
    """Dense output for an image; see `Description` and `Detector`."""

    descriptors: torch.Tensor
    bridged: torch.Tensor
    scores: torch.Tensor
    """(B, 1, H, W) keypoint scores."""
    layer2: torch.Tensor
    """(B, C2, H/8, W/8): of the encoder, for the surroundings in descriptors, see `Projection`."""
    layer3: torch.Tensor
    """(B, C3, H/16, W/16)"""


def unit_range(image: torch.Tensor) -> torch.Tensor:
    """A uint8 image as fp32 in [0, 1]; a float image as it is."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


class SCFeat(nn.Module):
    """The whole network (Fig. 3), and the projection that makes descriptors from its maps.

    Images are (B, 3, H, W) RGB, float in [0, 1] or uint8, with H and W multiples of `STRIDE`; they
    are normalized with ImageNet's mean and deviation inside.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, config: SCFeatConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = F2RBackbone(
            config.encoder, config.decoder_channels, config.descriptor_dim, config.upsampled_kernel
        )
        self.bridge = CrossNorm(config.descriptor_dim)
        self.detector = Detector(
            config.descriptor_dim, STEM_CHANNELS, *config.head_channels, config.upsampled_kernel
        )
        self.projection = Projection(config.descriptor_dim, *self.backbone.encoder.channels[1:])
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32).view(1, 3, 1, 1)
        deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return (unit_range(image) - self.mean).div_(self.deviation)

    def describe(self, image: torch.Tensor) -> Description:
        """Backbone and bridge."""
        return self._describe(self.normalize(image))

    def _describe(self, normalized: torch.Tensor) -> Description:
        descriptors, encoded = self.backbone(normalized)
        return Description(descriptors, self.bridge(descriptors), encoded)

    def detect(self, image: torch.Tensor, description: Description) -> torch.Tensor:
        """Score map (B, 1, H, W) of an image that has been described."""
        return self._detect(self.normalize(image), description)

    def forward(self, image: torch.Tensor) -> SCFeatOutput:
        normalized = self.normalize(image)
        description = self._describe(normalized)
        scores = self._detect(normalized, description)
        bridged, layer2, layer3 = description.maps
        return SCFeatOutput(description.descriptors, bridged, scores, layer2, layer3)

    def _detect(self, normalized: torch.Tensor, description: Description) -> torch.Tensor:
        return self.detector(normalized, description.bridged, description.encoded.stem)


def fold_batch_norms(model: SCFeat) -> SCFeat:
    """A copy for inference with the batch normalizations folded into the convolutions."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck, ResNetEncoder)):
            for number in (1, 2, 3):
                conv, norm = f"conv{number}", f"bn{number}"
                if hasattr(module, norm):
                    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                    setattr(module, conv, fused)
                    setattr(module, norm, nn.Identity())
            if getattr(module, "downsample", None) is not None:
                module.downsample = fuse_conv_bn_eval(*module.downsample)
    return model


def save_model(model: SCFeat, path: str | os.PathLike, provenance: dict) -> None:
    """Write weights as fp16 and metadata (configuration, version, provenance) to one file.

    Args:
        model: the network.
        path: a .safetensors file; an existing one is replaced when the new one is complete.
        provenance: how the weights were made; any JSON value.

    Raises:
        ModelError: a weight is too large for fp16, or not finite.
        InputError: see `staging.staged_file`.
    """
    tensors = {
        key: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype)
        for key, value in model.state_dict().items()
    }
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ModelError(f"{path}: weight '{key}' is not finite in fp16, so nothing is written")
    metadata = {
        "format": "scfeat",
        "version": __version__,
        "config": json.dumps(asdict(model.config)),
        "provenance": json.dumps(provenance),
    }
    # serialized here and written by Python, so that the file gets the user's usual permissions
    data = save({k: v.contiguous() for k, v in tensors.items()}, metadata)
    with staged_file(path, overwrite=True) as partial:
        partial.write_bytes(_in_order(data, metadata))


def _in_order(data: bytes, metadata: dict[str, str]) -> bytes:
    """A serialized file with its metadata in their own order; the library's is one of chance."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]


def available_models() -> list[str]:
    """Names of the weights that are installed with the package."""
    folder = resources.files("scfeat_ros") / "weights"
    if not folder.is_dir():
        return []
    suffix = ".safetensors"
    return sorted(f.name.removesuffix(suffix) for f in folder.iterdir() if f.name.endswith(suffix))


def find_weights(name_or_path: str | os.PathLike) -> Path:
    """The file of an installed model, or the path itself.

    Raises:
        ModelError: neither exists.
    """
    if str(name_or_path) in available_models():
        return Path(str(resources.files("scfeat_ros") / "weights" / f"{name_or_path}.safetensors"))
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(available_models()) or "none"
        raise ModelError(
            f"weights '{name_or_path}': no such file, and no model of that name is installed "
            f"(installed: {known})"
        )
    return path


def read_metadata(path: str | os.PathLike) -> dict:
    """Configuration, version and provenance of a weights file.

    Raises:
        ModelError: the file cannot be read or is no SCFeat model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file, it may be truncated ({error})"
        ) from error
    if metadata.get("format") != "scfeat" or "config" not in metadata:
        raise ModelError(
            f"{path}: the metadata has no SCFeat 'config', so this is not an SCFeat model"
        )
    try:
        config = json.loads(metadata["config"])
        provenance = json.loads(metadata.get("provenance", "{}"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: the metadata is not valid JSON ({error})") from error
    return {"version": metadata.get("version"), "config": config, "provenance": provenance}


def config_of(values: object, path: Path) -> SCFeatConfig:
    """A configuration from a file's metadata.

    Raises:
        ModelError: it is invalid; the message names the file and the first wrong field.
    """
    if not isinstance(values, dict):
        raise ModelError(f"{path}: the metadata's config is not a table of fields but {values!r}")
    for field in fields(SCFeatConfig):
        if field.name not in values and field.default is MISSING:
            raise ModelError(f"{path}: config field '{field.name}' is missing")
    unknown = sorted(set(values) - {field.name for field in fields(SCFeatConfig)})
    if unknown:
        raise ModelError(
            f"{path}: config field '{unknown[0]}' is unknown to scfeat_ros {__version__}; "
            "the file may need a newer version"
        )
    lists = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return SCFeatConfig(**lists)


def load_model(name_or_path: str | os.PathLike) -> SCFeat:
    """Read a network, in fp32 and evaluation mode.

    Args:
        name_or_path: an installed model's name or a .safetensors file.

    Raises:
        ModelError: the file is missing, damaged or of another architecture; the message names
            the first field or key that differs.
    """
    path = find_weights(name_or_path)
    config = config_of(read_metadata(path)["config"], path)
    try:
        with torch.device("cpu"):  # as fp32, whatever device and type PyTorch is told to use
            model = SCFeat(config).float()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path}: the config describes no network ({error})") from error
    tensors = load_file(path)
    for key, value in model.state_dict().items():
        if key not in tensors and key.startswith(FITTED):
            tensors[key] = value  # unfitted, as in files that were written before it existed
        if key not in tensors:
            raise ModelError(f"{path}: weight '{key}' is missing")
        given, needed = tensors[key].shape, value.shape
        if key == "projection.matrix":
            needed = (*given[:1], *needed[1:])  # descriptors may be of any length
        if not tensors[key].isfinite().all():
            raise ModelError(f"{path}: weight '{key}' is not finite: its training has diverged")
        if given != needed:
            raise ModelError(
                f"{path}: weight '{key}' has shape {tuple(given)}, "
                f"but config '{config.name}' needs {tuple(needed)}"
            )
    unknown = sorted(set(tensors) - set(model.state_dict()))
    if unknown:
        raise ModelError(f"{path}: weight '{unknown[0]}' is not part of config '{config.name}'")
    model.load_state_dict(tensors)
    return model.eval().to(memory_format=torch.channels_last)
