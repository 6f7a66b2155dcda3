"""The network as an ONNX file: `scfeat export --onnx`, and running such a file in the Extractor.

The file takes one input `image`, (batch, 3, height, width) fp32 RGB in [0, 1] with height and width
multiples of 16, all three free, and gives what `SCFeat` does: the fields of `SCFeatOutput`.
The configuration, the precision and the projection to descriptors are in its metadata.
"""

from __future__ import annotations

import base64
import inspect
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from scfeat_ros.errors import ModelError, ScfeatError, import_optional
from scfeat_ros.model.descriptors import Projection
from scfeat_ros.model.scfeat import (
    STRIDE,
    SCFeat,
    SCFeatOutput,
    config_of,
    fold_batch_norms,
    load_model,
    unit_range,
)
from scfeat_ros.staging import staged_file

OPSET = 17
OUTPUTS = SCFeatOutput._fields
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class _HalfConv(nn.Module):
    """A convolution in fp16 between fp32 neighbours."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.half()
        self.kernel_size = conv.kernel_size  # `sampling.convolve_upsampled` asks for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.half()).float()


def export_onnx(
    weights: str | os.PathLike,
    path: str | os.PathLike,
    precision: str = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write a model as ONNX (opset 17).

    Args:
        weights: an installed model's name or a .safetensors file.
        path: the .onnx file; it is written under a temporary name and renamed.
        precision: "fp32", or "fp16": the convolutions of backbone and of the head's Layer_0 on
            the small maps in fp16, everything else in fp32, with the casts written out, as
            TensorRT's strongly typed networks want it.
        overwrite: replace a file that is there.

    Raises:
        ModelError: the weights cannot be read.
        OutputExistsError, InputError: see `staging.staged_file`.
        ScfeatError: the `onnx` package is missing, or this PyTorch is too old for the precision.
        ValueError: another precision, or another file name extension.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the file's name must end in .onnx")
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"an ONNX file is of precision fp32 or fp16, not '{precision}'")
    with staged_file(path, overwrite) as partial:
        onnx = import_optional("onnx", "ONNX")
        model = load_model(weights)
        network = fold_batch_norms(model)
        if precision == "fp16":
            _use_half(network)
        try:
            _write(network, partial)
        except RuntimeError as error:  # old versions do not compute in fp16 on the CPU
            raise ScfeatError(
                f"PyTorch {torch.__version__} cannot write the network in {precision} "
                f"({str(error).splitlines()[0]}); use a newer version, or another precision"
            ) from error
        written = onnx.load(partial)
        metadata = {"format": "scfeat", "precision": precision}
        metadata["config"] = json.dumps(asdict(model.config))
        metadata["encoder_channels"] = json.dumps(model.projection.channels[-2:])
        metadata["projection"] = base64.b64encode(save(model.projection.state_dict())).decode()
        onnx.helper.set_model_props(written, metadata)
        onnx.checker.check_model(written)
        onnx.save(written, partial)
    return path


def _use_half(model: SCFeat) -> None:
    for part in (model.backbone, model.detector.layer0_left):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, _HalfConv(child))


def _write(network: SCFeat, path: Path) -> None:
    arguments = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        arguments["dynamo"] = False  # the tracer: free sizes, and no further package
    sizes = {0: "batch", 2: "height", 3: "width"}
    small = {s: {0: "batch", 2: f"height_{s}", 3: f"width_{s}"} for s in (4, 8, 16)}
    axes = {"image": sizes, "scores": sizes, "layer2": small[8], "layer3": small[16]}
    axes |= {"descriptors": small[4], "bridged": small[4]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on numbers that are constants here
        torch.onnx.export(
            network,
            (torch.rand(1, 3, 4 * STRIDE, 6 * STRIDE),),
            str(path),
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
            opset_version=OPSET,
            **arguments,
        )


class OnnxSCFeat(nn.Module):
    """An exported network, run by onnxruntime; called like `SCFeat`.

    Args:
        path: the .onnx file.

    Attributes:
        config, precision: of the network, from the file's metadata.

    Raises:
        ModelError: the file is missing, damaged or not an exported SCFeat network.
        ScfeatError: the `onnxruntime` package is missing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"weights '{path}': no such file")
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        self._runtime = import_optional("onnxruntime", "ONNX")
        self._session = self._open([_CPU])
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("format") != "scfeat":
            raise ModelError(f"{path}: not written by `scfeat export --onnx`")
        if "projection" not in metadata:
            raise ModelError(f"{path}: written by an earlier version; export it again")
        self.config = config_of(json.loads(metadata["config"]), self.path)
        self.precision = metadata["precision"]
        self.projection = Projection(
            self.config.descriptor_dim, *json.loads(metadata["encoder_channels"])
        )
        self.projection.load_state_dict(load(base64.b64decode(metadata["projection"])))

    def __reduce__(self) -> tuple:
        """Copy and pickle by the path: a session of onnxruntime supports neither."""
        return type(self), (self.path,)

    def _open(self, providers: list[Any]) -> object:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            return self._runtime.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no common class of their own
            first = str(error).splitlines()[0]
            raise ModelError(f"{self.path}: onnxruntime cannot read it ({first})") from error

    @property
    def default_device(self) -> str:
        """ "auto", or "cpu" where this onnxruntime has no CUDA."""
        return "auto" if _CUDA in self._runtime.get_available_providers() else "cpu"

    def prepare(self, device: torch.device) -> None:
        """Run on a device, with the threads that PyTorch has.

        Raises:
            ScfeatError: this onnxruntime does not run on the device.
        """
        if device.type != "cuda":
            self._session = self._open([_CPU])
            return
        if _CUDA not in self._runtime.get_available_providers():
            raise ScfeatError("this onnxruntime has no CUDA: pip install onnxruntime-gpu")
        self._session = self._open([(_CUDA, {"device_id": device.index or 0}), _CPU])
        if _CUDA not in self._session.get_providers():
            raise ScfeatError(
                "onnxruntime cannot use CUDA here: it does not find the CUDA or cuDNN libraries "
                "that it was built with; use device 'cpu'"
            )

    def forward(self, image: torch.Tensor) -> SCFeatOutput:
        values = unit_range(image).float().cpu().numpy()
        outputs = self._session.run(list(OUTPUTS), {"image": values})
        return SCFeatOutput(*(torch.from_numpy(o).to(image.device) for o in outputs))
