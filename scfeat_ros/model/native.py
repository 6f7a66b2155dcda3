"""The kernels of `kernels.py` in C++, compiled on first use for the CPU that they run on.

Compiling them takes about three seconds of one core, once: the library is kept under
`$XDG_CACHE_HOME/scfeat_ros` (by default ~/.cache/scfeat_ros), named after the source, the compiler,
its flags and the CPU. Without a compiler, `load` says so and the caller uses PyTorch's operators.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros.model.kernels import Image, Maps, Norm

if TYPE_CHECKING:
    from scfeat_ros.model.fused import Conv
    from scfeat_ros.parameters import ExtractorOptions

LOG = logging.getLogger(__name__)

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -pthread -shared -fPIC "
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -ffinite-math-only -ffp-contract=fast"
)
if platform.machine() == "x86_64":
    FLAGS += " -mprefer-vector-width=512"  # else compilers leave half of AVX-512 idle
FEW = 8
"""Channels at the image's resolution for which there are kernels of their own, as in kernels.cpp.

Such maps are (1, FEW, height, width) with a line of each channel in every row, see `_lines`.
"""
FACTOR = 4
"""Between the detector's two resolutions, as in kernels.cpp."""

COMPILE_TIMEOUT = 120
"""Seconds."""


class CompilerError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scfeat_ros"


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the kernels, or take them from the cache, and load them.

    The compiler is $CXX, else g++, else clang++, else c++.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise CompilerError("the compiled kernels need Linux or macOS")
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    compiler = next((c for c in candidates if c and shutil.which(shlex.split(c)[0])), None)
    if compiler is None:
        raise CompilerError("no C++ compiler was found (install g++, or set CXX)")
    command = [*shlex.split(compiler), *FLAGS.split()]
    version = subprocess.run([*command[:1], "--version"], capture_output=True, text=True)
    key = ([file.read_text() for file in (*SOURCES, *HEADERS)], command, version.stdout, _cpu())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{name}.so"
    if not library.is_file():
        _compile(command, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilerError(f"{library} cannot be loaded ({error}): delete it") from error


def _cpu() -> str:
    """What decides which instructions the compiler may use."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() + platform.machine()
    lines = info.read_text(errors="replace").split("\n\n")[0].splitlines()
    kept = ("flags", "features", "model name", "cpu part")
    return "\n".join(line for line in lines if line.lower().startswith(kept))


def _compile(command: list[str], library: Path) -> None:
    started = time.perf_counter()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # beside the final name and renamed: two processes may be compiling at once
        handle, partial = tempfile.mkstemp(dir=library.parent, suffix=".partial")
        os.close(handle)
    except OSError as error:
        raise CompilerError(f"compiled kernels cannot be kept in {library.parent}: {error}") from (
            error
        )
    try:
        result = subprocess.run(
            [*command, *map(str, SOURCES), "-o", partial],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT,
        )
        if result.returncode != 0:
            first = (result.stderr.strip() or "no message").splitlines()[0]
            raise CompilerError(f"{command[0]} failed: {first}")
        os.replace(partial, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    LOG.info("compiled CPU kernels in %.1f s: %s", time.perf_counter() - started, library)


@contextlib.contextmanager
def cores_awake(device: torch.device = CPU) -> Iterator[None]:
    """Keep the cores of PyTorch's threads from falling asleep between two operations.

    A virtual machine's cores, and those of small computers with deep idle states, take as long to
    wake as a small layer takes to compute. While the context is open, threads of the scheduler's
    idle class spin on these cores; any other work goes before them at once. See `awake.cpp`.

    Args:
        device: that computes; nothing is done for another one than the CPU.
    """
    if device.type != "cpu" or not keeps_cores_awake():
        yield
        return
    library = load()
    library.awake_begin()
    try:
        yield
    finally:
        library.awake_end()


def keeps_cores_awake() -> bool:
    """Whether `cores_awake` does anything.

    It does not where there are one thread or threads for less than half of the cores, a limit on
    CPU time (which spinning would use up), no compiler, or another system than Linux.
    """
    if sys.platform != "linux" or has_cpu_quota():
        return False
    threads = torch.get_num_threads()
    return threads > 1 and 2 * threads >= len(os.sched_getaffinity(0)) and is_compiled()


@functools.cache
def is_compiled() -> bool:
    """Whether there are kernels; they are compiled if need be."""
    try:
        load()
    except CompilerError:
        return False
    return True


@functools.cache
def has_cpu_quota(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> bool:
    """Whether a control group, as a container's or a service's, limits this process's CPU time."""
    files = [groups / "cpu.max", groups / "cpu/cpu.cfs_quota_us"]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        number, _, path = line.split(":", 2)
        own = groups / path.lstrip("/")
        if number == "0":  # of version 2; every group above counts as well
            files += [group / "cpu.max" for group in (own, *own.parents)]
    return any(
        file.is_file() and file.read_text().split()[0] not in ("max", "-1") for file in files
    )


ARGUMENTS = {
    "channel_sums": "pliipi",
    "upsampled": "piiiipppi",
    "upsampled_sum": "piiiipppi",
    "scale_activate": "plippifpli",
    "pixel_statistics": "pliipppi",
    "bridge_and_stem": "ppliippppppppi",
    "weigh_by_peakiness": "ppfiiippi",
    "normalize_bytes": "plpppi",
    "normalize_floats": "plpppi",
    "weigh_image_by_peakiness": "pfiippi",
    "response": "pliippfpppi",
    "normalization": "pliipppp",
    "image_branch": "pfiippppi",
    "hidden": "pppfppiiipppi",
    "response_of_lines": "piippfpppi",
    "score": "pffppiiii",
    "local_maxima": "piiifiplppi",
    "subpixel_points": "piiplp",
    "sample": "piiilpliipi",
    "block_means": "piiilipi",
    "stem": "piipipipi",
    "winograd_lanes": "",
    "winograd_columns": "i",
    "winograd_convolution": "piiipippipi",
    "has_tiles": "",
    "nearest": "pipiiipppppi",
}
"""Types of the C functions' arguments: pointer, long, int, float."""

WITHOUT_THREADS = (
    *("normalization", "subpixel_points", "has_tiles"),
    *("winograd_lanes", "winograd_columns"),
)
RETURNS = {
    "bridge_and_stem": ctypes.c_float,
    "normalize_bytes": ctypes.c_float,
    "normalize_floats": ctypes.c_float,
    "local_maxima": ctypes.c_long,
    "has_tiles": ctypes.c_int,
    "winograd_lanes": ctypes.c_int,
    "winograd_columns": ctypes.c_int,
}
"""Of the functions that return something."""
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@functools.cache
def _function(name: str, dtype: torch.dtype | None) -> ctypes._CFuncPtr:
    function = getattr(load(), name if dtype is None else f"{name}_{SUFFIX[dtype]}")
    function.argtypes = [TYPES[letter] for letter in ARGUMENTS[name]]
    function.restype = RETURNS.get(name)
    return function


def _value(argument: torch.Tensor | np.ndarray | float | None) -> float | None:
    """What a C function is given: the address of an array."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


def _call(
    name: str, dtype: torch.dtype | None, *arguments: torch.Tensor | np.ndarray | float | None
) -> float:
    """Call a kernel for a type, None for those of no type; the number of threads is added."""
    values = [_value(argument) for argument in arguments]
    if name not in WITHOUT_THREADS:
        values.append(torch.get_num_threads())
    return _function(name, dtype)(*values)


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((1, channels, height, width), dtype=dtype, memory_format=torch.channels_last)


def _lines(height: int, width: int) -> torch.Tensor:
    return torch.empty((height, FEW, width)).permute(1, 0, 2)[None]


def _is_lines(x: torch.Tensor) -> bool:
    _, channels, _, width = x.shape
    return channels == FEW and x.stride()[1:] == (width, FEW * width, 1)


def _totals(channels: int) -> torch.Tensor:
    return torch.empty((1, 2, channels), dtype=torch.float64)


def normalize_image(image: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> Image:
    if image.dtype == torch.uint8:  # normalized by whole numbers
        mean, deviation = 255 * mean, 255 * deviation
    else:
        image = image.float()
    image = _last(image)
    _, _, height, width = image.shape
    values = torch.empty((1, 3, height, width))
    largest = _call(
        "normalize_bytes" if image.dtype == torch.uint8 else "normalize_floats",
        None,
        *(image, height * width, mean, deviation, values),
    )
    return Image(values, largest)


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
    columns = _call("winograd_columns", None, outputs)
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
        lanes = _call("winograd_lanes", None)
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
        x = _last(x)
        _, inputs, height, width = x.shape
        out = _empty(self.outputs, height, width, x.dtype)
        plus = None if plus is None else _last(plus)
        _call(
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
        out = _empty(len(self.bias), height // 4, width // 4, dtype)
        _call(
            "stem",
            dtype,
            *(image, height, width, self.weight, columns, self.bias, len(self.bias), out),
        )
        return out


def statistics(x: torch.Tensor) -> torch.Tensor:
    x = _last(x)
    _, channels, height, width = x.shape
    totals = _totals(channels)
    _call("channel_sums", x.dtype, x, height, width, channels, totals)
    return totals


def convolution(x: torch.Tensor, conv: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    y = conv(x)
    return y, statistics(y)


def scale_and_shift(
    totals: torch.Tensor, norm: Norm, pixels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = totals.shape[2]
    scale, shift = torch.empty((2, channels)).unbind()
    _call(
        "normalization",
        None,
        *(totals, pixels, channels, norm.groups, norm.weight, norm.bias, scale, shift),
    )
    return scale, shift


def normalize_activate(
    x: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    x = _last(x)
    _, channels, height, width = x.shape
    scale, shift = scale_and_shift(totals, norm, height * width)
    out = torch.empty_like(x) if out is None else out
    is_elu = slope is None
    _call(
        "scale_activate",
        x.dtype,
        *(x, height * width, channels, scale, shift, is_elu, slope or 0.0, out, out.stride(3)),
    )
    return out


def upsampled_sum(
    taps: torch.Tensor, channels: int, factor: int, plus: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    taps = _last(taps)
    _, count, height, width = taps.shape
    plus = None if plus is None else _last(plus)
    out = _empty(channels, height * factor, width * factor, taps.dtype)
    totals = _totals(channels)
    _call(
        "upsampled" if count == channels else "upsampled_sum",
        taps.dtype,
        *(taps, height, width, factor, channels, plus, out, totals),
    )
    return out, totals


def bridge_and_stem(
    descriptors: torch.Tensor,
    stem: torch.Tensor,
    spatial: torch.nn.Conv2d,
    channel: Norm,
) -> Maps:
    descriptors, stem = _last(descriptors), _last(stem)
    _, channels, height, width = descriptors.shape
    mean, inverse = torch.empty((2, 1, 1, height, width)).unbind()
    totals = _totals(channels)
    _call(
        "pixel_statistics",
        descriptors.dtype,
        *(descriptors, height, width, channels, mean, inverse, totals),
    )
    factor, offset = spatial(mean).contiguous()[0].unbind()
    scale, shift = scale_and_shift(totals, channel, height * width)
    maps = _empty(channels + stem.shape[1], height, width, torch.float32)
    maps_mean = torch.empty((height, width))
    largest = _call(
        "bridge_and_stem",
        descriptors.dtype,
        *(descriptors, stem, height * width, channels, stem.shape[1]),
        *(mean, inverse, factor, offset, scale, shift, maps, maps_mean),
    )
    return Maps(maps, maps_mean, largest)


def weigh_by_peakiness(maps: Maps | Image, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    _, channels, height, width = maps.values.shape
    peaks = torch.empty((1, 1, height, width))
    weighted = _empty(channels, height, width, dtype)
    scale = 1.0 / max(maps.largest, 1e-6)
    if isinstance(maps, Image):
        _call(
            "weigh_image_by_peakiness",
            dtype,
            *(maps.values, scale, height, width, peaks, weighted),
        )
    else:
        _call(
            "weigh_by_peakiness",
            dtype,
            *(maps.values, maps.mean, scale, height, width, channels, peaks, weighted),
        )
    return peaks, weighted


def image_branch(image: Image, conv: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if conv.weight.shape[0] != FEW:
        peaks, weighted = weigh_by_peakiness(image, torch.float32)
        return peaks, *convolution(weighted, conv)
    _, _, height, width = image.values.shape
    peaks, out, totals = torch.empty((1, 1, height, width)), _lines(height, width), _totals(FEW)
    scale = 1.0 / max(image.largest, 1e-6)
    weights = conv.weight.permute(1, 2, 3, 0).contiguous()
    _call(
        "image_branch",
        None,
        *(image.values, scale, height, width, weights, peaks, out, totals),
    )
    return peaks, out, totals


def hidden(
    right: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    slope: float,
    conv: Conv,
    left: torch.Tensor,
    left_taps: Conv,
) -> tuple[torch.Tensor, torch.Tensor]:
    left = _last(left)
    _, channels, height, width = left.shape
    factor = right.shape[3] // width
    few = _is_lines(right) and conv.weight.shape[0] == left_taps.weight.shape[0] == FEW
    if not few or factor != FACTOR:
        right = conv(normalize_activate(right, totals, norm, slope))
        return upsampled_sum(left_taps(left.float()), right.shape[1], factor, right)
    scale, shift = scale_and_shift(totals, norm, right.shape[2] * right.shape[3])
    weights = conv.weight.permute(1, 2, 3, 0).contiguous()
    left_weights = left_taps.weight.view(FEW, channels).t().contiguous()
    out, totals = _lines(height * FACTOR, width * FACTOR), _totals(FEW)
    _call(
        "hidden",
        left.dtype,
        *(right, scale, shift, slope, weights),
        *(left, height, width, channels, left_weights, out, totals),
    )
    return out, totals


def response(
    x: torch.Tensor, totals: torch.Tensor, norm: Norm, slope: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _, channels, height, width = x.shape
    scale, shift = scale_and_shift(totals, norm, height * width)
    out, sums = torch.empty((1, 1, height, width)), _totals(1)
    if _is_lines(x):
        _call(
            "response_of_lines",
            None,
            *(x, height, width, scale, shift, slope, weight, out, sums),
        )
        return out, sums
    x = _last(x)
    _call(
        "response",
        x.dtype,
        *(x, height, width, channels, scale, shift, slope, weight, out, sums),
    )
    return out, sums


def score(
    value: torch.Tensor,
    totals: torch.Tensor,
    norm: Norm,
    left_peaks: torch.Tensor,
    right_peaks: torch.Tensor,
) -> torch.Tensor:
    """As in `kernels`; `value` is overwritten."""
    _, _, height, width = left_peaks.shape
    factor = value.shape[2] // height
    scale, shift = scale_and_shift(totals, norm, value.shape[2] * value.shape[3])
    _call(
        "score",
        None,
        *(value, float(scale), float(shift), left_peaks, right_peaks, height, width, factor),
    )
    return value


def local_maxima(
    scores: torch.Tensor, image: np.ndarray, mask: np.ndarray | None, options: ExtractorOptions
) -> np.ndarray:
    """As `selection.local_maxima`."""
    height, width = scores.shape
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    if mask is not None:
        mask = np.ascontiguousarray(mask)
    places = np.empty(height * width, np.int64)
    count = _call(
        "local_maxima",
        None,
        *(scores, height, width),
        *(options.nms_radius, options.score_threshold, options.border),
        *(image, image.strides[0], mask, places),
    )
    return places[:count].copy()


def subpixel_points(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(N, 2) x and y of places, moved as by `selection.subpixel_offsets`."""
    points = torch.empty((len(places), 2))
    _call("subpixel_points", None, scores, *scores.shape, places, len(places), points)
    return points


def sample(
    feature_map: torch.Tensor, points: torch.Tensor, stride: int = 4, smooth: bool = False
) -> torch.Tensor:
    """As `sampling.sample_few`."""
    feature_map, pitch = _pixels(feature_map)
    channels, height, width = feature_map.shape
    out = torch.empty((len(points), channels))
    _call(
        "sample",
        feature_map.dtype,
        *(feature_map, height, width, channels, pitch),
        *(points.contiguous(), len(points), stride, smooth, out),
    )
    return out


def block_means(feature_map: torch.Tensor, side: int) -> torch.Tensor:
    """As `sampling.block_means`."""
    feature_map, pitch = _pixels(feature_map)
    channels, height, width = feature_map.shape
    out = _empty(channels, -(-height // side), -(-width // side), torch.float32)
    _call(
        "block_means",
        feature_map.dtype,
        *(feature_map, height, width, channels, pitch, side, out),
    )
    return out[0]


def _pixels(feature_map: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A (C, h, w) map whose channels lie beside each other, and how far apart its pixels lie."""
    channels, _, width = feature_map.shape
    pitch = feature_map.stride(2)
    if feature_map.stride() == (1, pitch * width, pitch):
        return feature_map, pitch
    return feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1), channels


class Nearest(NamedTuple):
    """Nearest neighbours both ways between (N, D) and (M, D); of equally near ones the first."""

    of_row: np.ndarray
    """(N,) int64"""
    similarity: np.ndarray
    """(N,) float32, of the nearest."""
    second: np.ndarray
    """(N,) float32, the second largest similarity; hugely negative where there is none."""
    of_column: np.ndarray
    """(M,) int64"""
    second_of_column: np.ndarray
    """(M,) float32"""


def has_tiles() -> bool:
    """Whether `nearest` can multiply by AMX's tiles of bf16."""
    return bool(_call("has_tiles", None))


def nearest(a: np.ndarray, b: np.ndarray, by_tiles: bool = True) -> Nearest:
    """Of (N, D) and (M, D) float32, neither empty, by inner product.

    Args:
        a, b: the vectors.
        by_tiles: multiply by AMX's tiles where the CPU has them. Every factor is then the sum of
            two numbers of bf16; inner products of unit vectors are within 2e-5.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    found = Nearest(
        *(np.empty(len(a), dtype) for dtype in (np.int64, np.float32, np.float32)),
        *(np.empty(len(b), dtype) for dtype in (np.int64, np.float32)),
    )
    _call("nearest", None, a, len(a), b, len(b), a.shape[1], by_tiles, *found)
    return found
