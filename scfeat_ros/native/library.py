"""The C++ sources beside this file, compiled on first use for the CPU that they run on, and called.

Compiling them takes about twelve seconds of one core, or seven of two, once: the library is kept
under `$XDG_CACHE_HOME/scfeat_ros` (by default ~/.cache/scfeat_ros), named after the source, the
compiler, its flags and the CPU. Without a compiler, `load` says so and the caller uses PyTorch's
operators.
"""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

LOG = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -pthread -shared -fPIC "
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -ffinite-math-only -ffp-contract=fast"
)
if platform.machine() == "x86_64":
    FLAGS += " -mprefer-vector-width=512"  # else compilers leave half of AVX-512 idle
COMPILE_TIMEOUT = 120
"""Seconds, of a source."""


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
        scratch = tempfile.TemporaryDirectory(dir=library.parent, suffix=".partial")
    except OSError as error:
        raise CompilerError(f"compiled kernels cannot be kept in {library.parent}: {error}") from (
            error
        )
    with scratch as folder:
        objects = [f"{folder}/{source.stem}.o" for source in SOURCES]
        steps = [[*command, "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, steps))
        _run([*command, *objects, "-o", f"{folder}/{library.name}"])
        try:
            os.replace(f"{folder}/{library.name}", library)
        except OSError as error:
            raise CompilerError(f"{library} cannot be written: {error}") from error
    LOG.info("compiled CPU kernels in %.1f s: %s", time.perf_counter() - started, library)


def _run(command: list[str]) -> None:
    """Run the compiler.

    Raises:
        CompilerError: it fails, or takes too long.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from error
    if result.returncode != 0:
        first = (result.stderr.strip() or "no message").splitlines()[0]
        raise CompilerError(f"{command[0]} failed: {first}")


@functools.cache
def is_compiled() -> bool:
    """Whether there are kernels; they are compiled if need be."""
    try:
        load()
    except CompilerError:
        return False
    return True


ARGUMENTS = {
    "channel_sums": "pliipi",
    "upsampled": "piiiipppi",
    "upsampled_sum": "piiiipppi",
    "upsampled_sums": "piiiipi",
    "upsampled_elu": "piiiipppli",
    "scale_activate": "plippifpli",
    "bridge": "ppiiiipppppfpppi",
    "weigh_by_peakiness": "pppfiiiippi",
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
    "describe": "piiipiiipiiiplpipi",
    **dict.fromkeys(("stem", "stem_shorts"), "piippfipipi"),
    "lanes": "",
    "winograd_columns": "i",
    **dict.fromkeys(("winograd", "winograd_shorts"), "ppiiiippfippipi"),
    "direct_columns": "ii",
    "direct_pair": "",
    "direct": "piiipiiippipi",
    "has_tiles": "",
    "has_shorts": "",
    "nearest": "pipiiipppppi",
}
"""Types of the C functions' arguments: pointer, long, int, float."""

QUICK = ("normalization", "has_tiles", "has_shorts", "lanes", "winograd_columns", "direct_columns", "direct_pair")
"""Over in a microsecond: Python's lock is kept while they run, since another thread that got it
might keep it for much longer."""
WITHOUT_THREADS = (*QUICK, "subpixel_points")
RETURNS = {
    "bridge": ctypes.c_float,
    "normalize_bytes": ctypes.c_float,
    "normalize_floats": ctypes.c_float,
    "local_maxima": ctypes.c_long,
    "has_tiles": ctypes.c_int,
    "has_shorts": ctypes.c_int,
    "lanes": ctypes.c_int,
    "direct_columns": ctypes.c_int,
    "direct_pair": ctypes.c_int,
    "winograd_columns": ctypes.c_int,
}
"""Of the functions that return something."""
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@functools.cache
def _function(name: str, dtype: torch.dtype | None) -> ctypes._CFuncPtr:
    library = ctypes.PyDLL(load()._name) if name in QUICK else load()
    function = getattr(library, name if dtype is None else f"{name}_{SUFFIX[dtype]}")
    function.argtypes = [TYPES[letter] for letter in ARGUMENTS[name]]
    function.restype = RETURNS.get(name)
    return function


def _value(argument: torch.Tensor | np.ndarray | float | None) -> float | None:
    """What a C function is given: the address of an array."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


def call(
    name: str, dtype: torch.dtype | None, *arguments: torch.Tensor | np.ndarray | float | None
) -> float:
    """Call a kernel for a type, None for those of no type; the number of threads is added."""
    values = [_value(argument) for argument in arguments]
    if name not in WITHOUT_THREADS:
        values.append(torch.get_num_threads())
    return _function(name, dtype)(*values)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map as the kernels read it."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A (1, channels, height, width) map for a kernel to write."""
    return torch.empty((1, channels, height, width), dtype=dtype, memory_format=torch.channels_last)
