"""Compiles the C++ kernels of this folder on first use, for the CPU they run on, and calls them.

Compiling takes about fifteen seconds of one core, or eight of two, once: the library is cached in
`$XDG_CACHE_HOME/scfeat_ros` (by default ~/.cache/scfeat_ros), under a hash of the sources, the
compiler, its flags and the CPU. Without a compiler `load` raises, and the caller uses PyTorch's
operators.
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from scfeat_ros import subprocesses
from scfeat_ros.cpu import cpu_info

LOG = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = [
    FOLDER / f"{name}.cpp"  # listed: upgrading an installation may leave old files behind
    for name in (
        "awake",
        "descriptors",
        "direct",
        "kernels",
        "keypoints",
        "matching",
        "matching_integers",
        "replay",
        "stem",
        "winograd",
    )
]
HEADERS = sorted(FOLDER.glob("*.h"))
FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -pthread -shared -fPIC "
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -ffinite-math-only -ffp-contract=fast"
)
if platform.machine() == "x86_64":
    FLAGS += " -mprefer-vector-width=512"  # by default compilers prefer 256 bits
COMPILE_TIMEOUT = 120
"""Seconds, for one source file."""


class CompilerError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are cached.

    Raises:
        CompilerError: there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scfeat_ros"
    except RuntimeError as error:  # a user id without an account, as in containers
        raise CompilerError(
            "compiled kernels cannot be kept: there is no home folder (set XDG_CACHE_HOME)"
        ) from error


def load() -> ctypes.CDLL:
    """Compile the kernels, or find them in the cache, and load them.

    The compiler is $CXX, else g++, else clang++, else c++. It is tried once per process.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    library = _load_once()
    if isinstance(library, CompilerError):
        raise library
    return library


@functools.cache
def _load_once() -> ctypes.CDLL | CompilerError:
    try:
        return _load()
    except CompilerError as error:
        return error


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise CompilerError("the compiled kernels need Linux or macOS")
    try:
        candidates = [shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"], ["c++"]]
    except ValueError as error:
        raise CompilerError(f"CXX cannot be read: {error}") from error
    compiler = next((words for words in candidates if words and shutil.which(words[0])), None)
    if compiler is None:
        raise CompilerError("no C++ compiler was found (install g++, or set CXX)")
    command = [*compiler, *FLAGS.split()]
    version = _run([*compiler, "--version"])
    key = ([file.read_text() for file in (*SOURCES, *HEADERS)], command, version, _cpu())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{name}.so"
    if not library.is_file():
        _compile(command, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilerError(
            f"compiled kernels cannot be loaded: {error} (delete the file; if programs must not "
            "run from its folder, set XDG_CACHE_HOME to another)"
        ) from error


def _cpu() -> str:
    """The CPU's model and features, which decide what instructions the compiler may use."""
    lines = cpu_info().split("\n\n")[0].splitlines()
    kept = ("flags", "features", "model name", "cpu part")
    described = "\n".join(line for line in lines if line.lower().startswith(kept))
    return described or platform.processor() + platform.machine()


def _compile(command: list[str], library: Path) -> None:
    started = time.perf_counter()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder, to be renamed: several processes may compile concurrently
        scratch = tempfile.TemporaryDirectory(dir=library.parent, suffix=".partial")
    except OSError as error:
        raise CompilerError(
            f"compiled kernels cannot be kept in {library.parent}: {error.strerror} "
            "(set XDG_CACHE_HOME to another folder)"
        ) from error
    LOG.info("compiling kernels for this CPU, once; it takes some 15 s")
    _remove_abandoned(library.parent)
    with scratch as folder:
        objects = [f"{folder}/{source.stem}.o" for source in SOURCES]
        steps = [[*command, "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                list(pool.map(_run, steps))
            except BaseException:  # KeyboardInterrupt, too: the pool would wait for the others
                subprocesses.kill_all()
                raise
        _run([*command, *objects, "-o", f"{folder}/{library.name}"])
        try:
            with open(f"{folder}/{library.name}", "rb") as built:
                os.fsync(built)  # loading a file truncated by a power failure would crash
            os.replace(built.name, library)
        except OSError as error:
            raise CompilerError(f"{library} cannot be written: {error}") from error
    LOG.info("compiled CPU kernels in %.1f s: %s", time.perf_counter() - started, library)


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary folders of processes that were killed while compiling."""
    for scratch in folder.glob("*.partial"):
        with contextlib.suppress(OSError):
            # a folder in use changes whenever a compiler finishes an object file
            if time.time() - scratch.stat().st_mtime > COMPILE_TIMEOUT:
                shutil.rmtree(scratch)


def _run(command: list[str]) -> str:
    """Run the compiler and return its output.

    Raises:
        CompilerError: it fails or times out.
    """
    try:
        result = subprocesses.run(command, COMPILE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        cause = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
        raise CompilerError(f"{command[0]} failed: {cause.strip()}")
    return result.stdout


@functools.cache
def is_compiled() -> bool:
    """Whether the kernels are available; they are compiled if necessary."""
    try:
        load()
    except CompilerError:
        return False
    return True


ARGUMENTS = {
    "channel_sums": "pnnnp",
    **dict.fromkeys(
        ("upsampled", "upsampled_sum", "add_upsampled", "add_upsampled_sum"), "pnnnnpp"
    ),
    "upsampled_sums": "pnnnnp",
    "upsampled_elu": "pnnnnpnpppn",
    "normalize_activate": "pnnpnppnfpn",
    "bridge": "ppnnnnpppppppppp",
    "weigh_by_peakiness": "ppppnnnnpp",
    "normalize_bytes": "pnpppp",
    "normalize_floats": "pnpppp",
    "weigh_image_by_peakiness": "ppnnpp",
    "response": "pnnnpnppfppp",
    "image_branch": "ppnnpppp",
    "hidden": "ppnppfppnnnppp",
    "response_of_lines": "pnnpnppfppp",
    "score": "pppppppnnn",
    "select": "pnnpnpnfnnnppp",
    "describe": "pnnnpnnnpnnnpnpnp",
    "l2_normalize": "pnn",
    **dict.fromkeys(("stem", "stem_int16"), "pnnppfpnp"),
    **dict.fromkeys(("winograd", "winograd_int16"), "ppnnnnppfnppnp"),
    "direct": "pnnnpnnnppnp",
    **dict.fromkeys(("nearest", "nearest_by_tiles", "nearest_by_integers"), "pnpnnppppp"),
}
"""Signatures of the kernels: p pointer, n integer, f float; the number of threads comes last."""

WORDS = {"p": "Q", "n": "q", "f": "f4x"}
"""struct formats of these, eight bytes each, as in call.h."""
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16"}

Argument = torch.Tensor | np.ndarray | float | None


class Kernel(NamedTuple):
    """A function of the library."""

    function: ctypes._CFuncPtr
    words: struct.Struct
    """Layout of its arguments."""


@functools.cache
def kernel(name: str, dtype: torch.dtype | None) -> Kernel:
    """A kernel, for maps of a type; None if it is not templated by type."""
    symbol = name if dtype is None else f"{name}_{SUFFIX[dtype]}"
    function = getattr(load(), f"scfeat_{symbol}")
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    words = struct.Struct("<" + "".join(WORDS[a] for a in ARGUMENTS[name] + "n"))
    return Kernel(function, words)


def _word(argument: Argument) -> float:
    """An argument as a number: the address of an array, 0 for None."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data
    return 0 if argument is None else argument


class _Watching(threading.local):
    recorder: Recorder | None = None


_watching = _Watching()


class Recorder(Protocol):
    """Is notified of the kernels that a thread calls."""

    def called(self, kernel: Kernel, words: bytes, arguments: tuple[Argument, ...]) -> None: ...


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Notify a recorder of the kernels that this thread calls."""
    _watching.recorder = recorder
    try:
        yield
    finally:
        _watching.recorder = None


def call(name: str, dtype: torch.dtype | None, *arguments: Argument) -> None:
    """Call a kernel with PyTorch's number of threads; see `kernel`.

    Arrays must be contiguous in the kernel's order.

    Raises:
        MemoryError: there is not enough memory.
    """
    chosen = kernel(name, dtype)
    words = chosen.words.pack(*map(_word, arguments), torch.get_num_threads())
    if not chosen.function(words):
        raise MemoryError(f"there is not enough memory for '{name}'")
    if _watching.recorder is not None:
        _watching.recorder.called(chosen, words, arguments)


def query(name: str, *arguments: int) -> int:
    """An integer constant of the library, such as the number of floats in a vector register."""
    return getattr(load(), name)(*arguments)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map in the kernels' memory order."""
    return x.contiguous(memory_format=torch.channels_last)


def floats(*shape: int) -> torch.Tensor:
    """Uninitialized fp32 on the CPU, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def empty_map(channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized (1, channels, height, width) map on the CPU."""
    return torch.empty(
        (1, channels, height, width),
        dtype=dtype,
        device="cpu",
        memory_format=torch.channels_last,
    )
