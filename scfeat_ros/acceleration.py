"""Chooses how the network runs on a device, and checks it against plain fp32 when it is loaded.

The choice is a precision of the convolutions and a backend: the fast network (`model/fused.py`) in
one of its forms, or the plain one. `auto` starts with the fastest choice that the device supports
and falls back towards plain fp32, with a warning, wherever a choice cannot run or its features of a
synthetic image differ from those of plain fp32.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros import selection
from scfeat_ros.cpu import cpu_info
from scfeat_ros.cuda_graphs import CudaGraphs
from scfeat_ros.errors import ScfeatError
from scfeat_ros.memory import keep_freed_memory
from scfeat_ros.model.descriptors import Maps
from scfeat_ros.model.fused import FusedSCFeat, cpu_computes
from scfeat_ros.model.sampling import sample
from scfeat_ros.model.scfeat import SCFeat, SCFeatOutput, fold_batch_norms
from scfeat_ros.native import library
from scfeat_ros.native.replay import Replays
from scfeat_ros.native.winograd import has_int16
from scfeat_ros.onnx_export import OnnxSCFeat
from scfeat_ros.parameters import ExtractorOptions

LOG = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.float32,
}
"""Type of the feature maps, by precision. With int16 the Winograd convolutions multiply 16-bit
integers; so they do with bf16 on CPUs that are faster with integers."""

CHECK_SIZE = (160, 128)
"""Width and height of the self-check's image."""
CHECK_KEYPOINTS = 200
MIN_KEYPOINTS_FOUND = 0.9
"""Smallest share of the best keypoints that must be found again within a pixel. (Not all of them:
the weakest compete with others of nearly the same score, even where nothing is wrong.)"""
MIN_COSINE = 0.998
"""Smallest median cosine similarity of the descriptors."""

COMPILED = "fused, compiled kernels"
"""The backend that uses the kernels of `native/`."""
GRAPHED = "fused, CUDA graphs"
TRITON = "fused, Triton kernels, CUDA graphs"


class Network(NamedTuple):
    """A network that is ready to run."""

    run: Callable[[torch.Tensor], SCFeatOutput]
    """Takes images (B, 3, H, W) as uint8 RGB, or as float in [0, 1]."""
    precision: str
    """"fp32", "bf16", "fp16" or "int16"."""
    backend: str
    """"plain", "fused" (PyTorch's operators), "fused, compiled kernels", "fused, CUDA graphs",
    "fused, Triton kernels, CUDA graphs" or "onnxruntime"."""

    @property
    def compiled(self) -> bool:
        """Whether the kernels of `native/` are used."""
        return self.backend == COMPILED

    @property
    def in_triton(self) -> bool:
        """Whether the kernels of `model/triton_kernels.py` are used."""
        return self.backend == TRITON

    @property
    def graphed(self) -> bool:
        """Whether it runs through CUDA graphs."""
        return isinstance(self.run, CudaGraphs)

    def clear(self) -> None:
        """Free the memory that is kept for the image sizes seen so far."""
        if isinstance(self.run, CudaGraphs | Replays):
            self.run.clear()

    def __str__(self) -> str:
        return f"{self.precision}, {self.backend}"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CPU or CUDA device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = cpu_info()
    return any(name in info for name in ("avx512_bf16", "amx_bf16", " bf16"))


def choose(
    model: SCFeat | OnnxSCFeat, device: torch.device, precision: str, compile: str
) -> Network:
    """Choose the fastest allowed precision and backend that pass the self-check.

    Args:
        model: the plain network, fp32, on the device; or an exported one, which is run as it is.
        device: CPU or CUDA.
        precision: "auto", or the precision of the convolutions.
        compile: "auto": the fast network; on a GPU through CUDA graphs, on the CPU only if the
            kernels can be compiled (without them it is slower than the plain one). "on": the
            same, with an error if they cannot be compiled. "off": the plain network.

    Raises:
        ScfeatError: `compile` is "on" and kernels cannot be compiled.
    """
    if isinstance(model, OnnxSCFeat):
        model.prepare(device)
        return Network(model, model.precision, "onnxruntime")
    if device.type == "cpu":
        keep_freed_memory()
        if compile != "off" and not _can_compile(compile):
            compile = "off"
    for candidate, fast in _candidates(device, precision, compile != "off"):
        problem = _unsupported(device, candidate, fast)
        if problem is not None:
            LOG.warning("%s was not taken: %s", candidate, problem)
            continue
        for network in _fast(model, device, candidate) if fast else [_plain(model, candidate)]:
            problem = check(network.run, model, device)
            if problem is None and network.in_triton:
                problem = _check_triton(network.run, model, device)
            if problem is None:
                return network
            LOG.warning("%s was not taken: %s", network, problem)
    return _plain(model, "fp32")


def _candidates(device: torch.device, precision: str, fast: bool) -> list[tuple[str, bool]]:
    """Precisions, each with whether to use the fast network, in the order in which to try them.

    The last resort, plain fp32, is not among them.
    """
    if precision != "auto":
        precisions = [precision]
    elif device.type == "cuda":
        precisions = ["bf16" if has_bfloat16(device) else "fp16"]
    else:
        # (PyTorch's own convolutions in bf16 were timed on x86 alone)
        gains = has_bfloat16(device) and (fast or platform.machine() == "x86_64")
        precisions = ["bf16"] * gains + ["int16"] * (fast and has_int16())
    candidates = [(p, True) for p in dict.fromkeys([*precisions, "fp32"])] if fast else []
    # int16 exists in the fast network alone
    plain = (p for p in precisions if p != "fp32" and not (fast and p == "int16"))
    return candidates + [(p, False) for p in plain]


def _unsupported(device: torch.device, precision: str, fast: bool) -> str | None:
    """Why a precision is not available; None if it is."""
    if precision == "int16":
        if device.type != "cpu" or not fast:
            return "only the fast network on a CPU, with compiled kernels, supports it"
        return None if has_int16() else "there are no kernels for this CPU"
    if device.type == "cpu" and not cpu_computes(DTYPES[precision]):
        return "this CPU does not support it"
    if device.type == "cuda" and precision == "bf16" and not has_bfloat16(device):
        return "this GPU does not support it"  # cuDNN has none, and PyTorch's own are far slower
    return None


def _plain(model: SCFeat, precision: str) -> Network:
    device = next(model.parameters()).device.type
    model = fold_batch_norms(model)
    if precision == "fp32":
        return Network(model, precision, "plain")

    def run_in_precision(image: torch.Tensor) -> SCFeatOutput:
        with torch.autocast(device, DTYPES[precision]):
            return model(image)

    return Network(run_in_precision, precision, "plain")


def _fast(model: SCFeat, device: torch.device, precision: str) -> Iterator[Network]:
    """Forms of the fast network, each made when those before it have failed."""
    dtype = DTYPES[precision]
    if device.type == "cuda":
        if has_triton():
            LOG.info("Triton compiles kernels at their first use, and keeps them in its cache")
            network = FusedSCFeat(model, dtype, triton=True)
            yield Network(CudaGraphs(network), precision, TRITON)
        yield Network(CudaGraphs(FusedSCFeat(model, dtype)), precision, GRAPHED)
    elif dtype in library.SUFFIX:
        int16 = precision != "fp32" and has_int16()
        network = FusedSCFeat(model, dtype, compiled=True, int16=int16)
        yield Network(Replays(network), precision, COMPILED)
    else:
        yield Network(FusedSCFeat(model, dtype), precision, "fused")


def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch's CUDA builds for Linux."""
    try:
        import scfeat_ros.model.triton_kernels  # noqa: F401
    except Exception as error:  # it is not, or does not fit to this Python or PyTorch
        LOG.info("the kernels in Triton are not used: %s", error)
        return False
    return True


def _can_compile(compile: str) -> bool:
    """Whether the kernels can be compiled; if not, a warning says why.

    Raises:
        ScfeatError: they cannot, and `compile` is "on".
    """
    try:
        library.load()
    except library.CompilerError as error:
        if compile == "on":
            raise ScfeatError(
                f"compile 'on': {error}; compile 'auto' runs without compiled kernels"
            ) from error
        LOG.warning("the plain network is used, which is slower: %s", error)
        return False
    return True


def check(
    run: Callable[[torch.Tensor], SCFeatOutput], model: SCFeat, device: torch.device
) -> str | None:
    """Compare features of a synthetic image with those of the plain network.

    Returns:
        What is wrong; None if nothing is.
    """
    started = time.perf_counter()
    image = check_image().to(device)
    with torch.inference_mode():
        expected = model(image)
        try:
            for _ in range(2):  # another image first: nothing of it may show in the result
                run(image.flip(3))
            found = run(image)
            if isinstance(run, CudaGraphs) and not run.is_captured(image):
                return "it cannot be captured in a CUDA graph"
        except Exception as error:  # the device lacks an operator, Triton cannot compile
            return _does_not_run(error)
        problem = _compare(expected, found)
    LOG.debug("self-check took %.0f ms", 1e3 * (time.perf_counter() - started))
    return problem


@torch.inference_mode()
def _check_triton(
    run: Callable[[torch.Tensor], SCFeatOutput], model: SCFeat, device: torch.device
) -> str | None:
    """Compare keypoints and descriptors in Triton with those of PyTorch, as in `check`."""
    from scfeat_ros.model import triton_kernels

    image = check_image().to(device)
    output, pixels = run(image), (255 * image[0]).byte()
    maps = Maps(output.bridged[0], output.layer2[0], output.layer3[0])
    rest = pixels, None, ExtractorOptions(max_keypoints=CHECK_KEYPOINTS)
    expected = selection.on_device(output.scores[0, 0], *rest)
    try:
        with torch.cuda.device(device):
            found = triton_kernels.select(output.scores[0, 0], *rest)
            descriptors = triton_kernels.describe(model.projection, maps, expected.points)
    except Exception as error:
        return _does_not_run(error)
    away = (found.points - expected.points).abs().amax(dim=1)
    if (away > 0.1).any() or not torch.equal(found.scores, expected.scores):
        return "it finds other keypoints than PyTorch's operators in the self-check's image"
    return _dissimilar(descriptors, model.projection(maps, expected.points), "PyTorch's operators")


def _does_not_run(error: Exception) -> str:
    return f"it does not run here ({(str(error) or repr(error)).splitlines()[0]})"


def check_image() -> torch.Tensor:
    """(1, 3, height, width) image in [0, 1]: noise at several scales, with edges and corners."""
    random = np.random.default_rng(7)
    width, height = CHECK_SIZE
    image = torch.zeros(1, 3, height, width, dtype=torch.float32, device="cpu")
    for cells in (4, 10, 24):
        noise = torch.from_numpy(random.random((1, 3, cells, cells), np.float32))
        image += F.interpolate(noise, size=(height, width), mode="bicubic")
    for _ in range(60):
        x, y = random.integers(0, width), random.integers(0, height)
        w, h = random.integers(4, 30, 2)
        colour = torch.from_numpy(random.random(3).astype(np.float32)) * 3
        image[0, :, y : y + h, x : x + w] = colour[:, None, None]
    image = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    return (image / 3).clamp(0, 1).contiguous(memory_format=torch.channels_last)


def _compare(expected: SCFeatOutput, found: SCFeatOutput) -> str | None:
    if not all(part.isfinite().all() for part in found):
        return "its result is not finite"
    points, others = (_keypoints(output.scores) for output in (expected, found))
    # not by a matrix product, which may round its factors to TF32
    distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    again = (distance.amin(dim=1) <= 1.0).float().mean().item()
    if again < MIN_KEYPOINTS_FOUND:
        return f"it finds {again:.0%} of the keypoints of plain fp32 in the self-check's image"
    for field in ("bridged", "descriptors"):
        a, b = (sample(getattr(o, field).float(), points[None])[0] for o in (expected, found))
        problem = _dissimilar(a, b, "plain fp32")
        if problem is not None:
            return problem
    return None


def _dissimilar(a: torch.Tensor, b: torch.Tensor, reference: str) -> str | None:
    """What is wrong if (N, D) descriptors differ from those of a reference; None if nothing is."""
    cosine = F.cosine_similarity(a, b).median().item()
    if cosine < MIN_COSINE:
        return f"its descriptors have a median cosine similarity of {cosine:.4f} to {reference}"
    return None


def _keypoints(scores: torch.Tensor) -> torch.Tensor:
    """(N, 2) float x and y of the `CHECK_KEYPOINTS` largest local maxima."""
    scores = scores.float()
    peaks = torch.where(scores == F.max_pool2d(scores, 3, stride=1, padding=1), scores, -1.0)
    best = peaks.flatten().topk(CHECK_KEYPOINTS).indices
    width = scores.shape[-1]
    return torch.stack([best % width, best // width], dim=1).float()
