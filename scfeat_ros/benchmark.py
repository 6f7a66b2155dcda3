"""`scfeat benchmark`: time and memory of every stage, compared to the machine's peak speed."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from scfeat_ros.acceleration import DTYPES, has_bfloat16
from scfeat_ros.cpu import cpu_name
from scfeat_ros.cuda_graphs import CudaGraphs
from scfeat_ros.extractor import Extractor
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.images import read_file
from scfeat_ros.matcher import match
from scfeat_ros.messages import encode_features, encode_matches, rosbags_types
from scfeat_ros.model import kernels
from scfeat_ros.model.fused import Conv, FusedSCFeat
from scfeat_ros.model.scfeat import STRIDE
from scfeat_ros.native import library, matching
from scfeat_ros.native.awake import keeps_cores_awake
from scfeat_ros.native.replay import Replays
from scfeat_ros.offline import OutputOptions, peak_memory
from scfeat_ros.offline import run as run_offline
from scfeat_ros.sources import FolderSource
from scfeat_ros.staging import check_file, make_parent, staged_file

SCALING_SIZES = "320x240,640x480,960x720,1280x960,1920x1080"
SCALING_TOP_K = "512,1024,2048,4096,8192"
CPU_WORK = 1024, 64 << 20, 1
"""Rows of the matrices and bytes of the copy that measure the machine's peaks, and repetitions."""
GPU_WORK = 4096, 256 << 20, 10
"""The same on a GPU, which needs larger matrices to reach its peak; a Jetson takes seconds."""
MIN_SIDE = 32
"""Smallest side of an image, pixels."""
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""How long OpenMP's threads spin before they sleep, which can double the time of a frame (less
where the cores are kept awake, see `native/awake.py`)."""
SEQUENCE = 300
"""Frames of the stages `sequence` and `offline`."""
PEAK_INTERVAL = 4
"""Rounds between two measurements of the machine's peaks."""


@dataclass
class Row:
    """Measurements of one stage in one configuration."""

    stage: str
    model: str
    size: str = ""
    top_k: int = 0
    device: str = "cpu"
    path: str = ""
    """Precision and backend of the network, see `acceleration.Network`."""
    gflop: float | None = None
    """Of the network's convolutions as computed, 2 for a multiply-add."""
    features: int | None = None
    first_use_s: float | None = None
    """Loading, compiling, self-check and the first frame."""
    seconds: list[float] = field(default_factory=list)
    peak_memory_mib: float | None = None
    """What PyTorch allocated on a GPU; on the CPU memory is the process's, see `main`'s report."""

    def figures(self, peaks: dict[str, float]) -> dict[str, Any]:
        """The row as it is written to JSON."""
        values = asdict(self)
        ordered = sorted(values.pop("seconds"))
        milliseconds = [1e3 * s for s in ordered]
        values |= {
            "median_ms": statistics.median(milliseconds),
            "p95_ms": milliseconds[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "min_ms": milliseconds[0],
            "rounds": len(ordered),
        }
        precision = self.path.split(",")[0]
        peak = peaks.get(f"{self.device} {precision}")
        if self.gflop is not None and peak:
            values["gflops"] = self.gflop / (values["median_ms"] / 1e3)
            values["share_of_peak"] = values["gflops"] / peak
        return values


@dataclass
class Case:
    """A row and the function that it times."""

    row: Row
    run: Callable[[], object]
    device: torch.device
    frames: int = 1
    """Number of frames that a call processes; the row's times are per frame."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.rounds < 1 or min(arguments.warm_up, arguments.threads) < 0:
        raise ValueError("--rounds must be at least 1, --warm-up and --threads not negative")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        cv2.setNumThreads(arguments.threads)
    _check_outputs(arguments.json, arguments.plot)
    sizes = [_size(text) for text in arguments.sizes.split(",")]
    pictures = {size: _picture(arguments.image, size) for size in sizes}
    top_k, stages = _integers(arguments.top_k), arguments.stages.split(",")
    with tempfile.TemporaryDirectory(prefix="scfeat-") as scratch:
        cases = [
            case
            for model, device, way in itertools.product(
                arguments.models.split(","), arguments.devices.split(","), arguments.ways.split(",")
            )
            for case in _cases(model, device, way, pictures, top_k, stages, Path(scratch))
        ]
        for name in filter(None, arguments.peers.split(",")):
            cases += _peer_cases(name, pictures, max(top_k))
        devices = {str(case.device): case.device for case in cases}
        peaks = _measure(cases, list(devices.values()), arguments.rounds, arguments.warm_up)
    report = {
        "machine": _machine(),
        "peak_memory_mib": peak_memory(),
        "measured_peaks": peaks,
        "rows": [case.row.figures(peaks) for case in cases],
    }
    print(table(report))
    if arguments.json:
        with staged_file(arguments.json, overwrite=True) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot_scaling(report, arguments.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scfeat benchmark",
        description="Measure extraction, matching, decoding, encoding and the whole frame. Rounds\n"
        "go over all cases in turn, so that a busy moment of the machine meets them alike.\n"
        f"Of {SEQUENCE} frames at a time, and only if asked for: 'sequence', extraction of one\n"
        "after the other, and 'offline', `scfeat bag`'s work on them, with the output written.",
        epilog="example:\n  scfeat benchmark --ways auto,fp32:off --json speed.json\n\n"
        f"how cost grows:\n  scfeat benchmark --sizes {SCALING_SIZES} \\\n"
        f"    --top-k {SCALING_TOP_K} --stages extract,match --plot scaling.png\n\n"
        "the offline tool against bare extraction:\n"
        "  scfeat benchmark --ways auto --stages sequence,offline --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--models",
        default="scfeat-s",
        help="models, names or files, comma-separated (default: %(default)s)",
    )
    add("--sizes", default="640x480", help="WIDTHxHEIGHT, comma-separated (default: %(default)s)")
    add("--top-k", default="2048", help="keypoints, comma-separated (default: %(default)s)")
    add(
        "--devices",
        default="auto",
        help="auto, cpu, cuda ..., comma-separated (default: %(default)s)",
    )
    add(
        "--ways",
        default="auto,fp32:off",
        help="PRECISION[:COMPILE] as in the options of the same names, comma-separated "
        "(default: %(default)s, the fastest and the plain network)",
    )
    add(
        "--stages",
        default="decode,extract,match,encode,frame",
        help="which to measure, of these and sequence, offline (default: %(default)s)",
    )
    add(
        "--peers",
        default="orb,sift",
        help="OpenCV's features alongside; '' for none (default: %(default)s)",
    )
    add("--image", type=Path, help="image to work on (default: a synthetic one)")
    add("--rounds", type=int, default=20, help="how often (default: %(default)s)")
    add("--warm-up", type=int, default=3, help="rounds before (default: %(default)s)")
    add(
        "--threads",
        type=int,
        default=0,
        help="CPU threads; 0 leaves it to PyTorch (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE.png", help="plot how cost grows (needs matplotlib)")
    return parser


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Check before the measurement that the results can be written.

    Raises:
        InputError: a file cannot be written there.
        ValueError: matplotlib is missing or has no format of the plot's ending.
    """
    for path in filter(None, (json_file, plot)):
        check_file(path, overwrite=True)
        make_parent(path)
    if plot is not None:
        known = _pyplot().FigureCanvasBase.get_supported_filetypes()
        if _picture_format(plot) not in known:
            raise ValueError(f"--plot {plot}: the name must end with one of .{', .'.join(known)}")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"'{text}' is not a comma-separated list of whole numbers") from error


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise ValueError(f"size '{text}' is not of the form WIDTHxHEIGHT") from error
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"size '{text}': both sides must be at least {MIN_SIDE}")
    return width, height


def _picture(path: Path | None, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the given image resized, or a synthetic one."""
    if path is not None:
        return cv2.resize(read_file(path), size, interpolation=cv2.INTER_AREA)
    random = np.random.default_rng(0)
    width, height = size
    picture = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    for _ in range(width * height // 800):
        x, y = int(random.integers(width)), int(random.integers(height))
        w, h = (int(v) for v in random.integers(4, 40, 2))
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        cv2.rectangle(picture, (x, y), (x + w, y + h), colour, -1)
    noise = random.normal(0, 2, picture.shape)
    return np.clip(cv2.GaussianBlur(picture, (3, 3), 0) + noise, 0, 255).astype(np.uint8)


def _cases(
    model: str,
    device: str,
    way: str,
    pictures: dict[tuple[int, int], np.ndarray],
    top_k: list[int],
    stages: list[str],
    scratch: Path,
) -> list[Case]:
    """The cases of one model with one precision and `compile` option on one device."""
    precision, _, compile = way.partition(":")
    started = time.perf_counter()
    extractor = Extractor.from_pretrained(
        model, device, precision=precision, compile=compile or "auto"
    )
    extractor(next(iter(pictures.values())))
    first_use = time.perf_counter() - started
    cases = []
    for (size, picture), count in itertools.product(pictures.items(), top_k):
        cases += _stage_cases(extractor, picture, size, count, model, stages, scratch)
    for case in cases:
        if case.row.stage == "extract":
            case.row.first_use_s = first_use
    return cases


def _stage_cases(
    shared: Extractor,
    picture: np.ndarray,
    size: tuple[int, int],
    top_k: int,
    model: str,
    stages: list[str],
    scratch: Path,
) -> list[Case]:
    from rosbags.typesys import Stores, get_typestore

    extractor = _with_top_k(shared, top_k)
    types = rosbags_types(get_typestore(Stores.ROS2_JAZZY))
    device = extractor.device
    _, jpeg = cv2.imencode(".jpg", picture[..., ::-1])
    moved = np.roll(picture, (3, 5), axis=(0, 1))
    if device.type == "cuda":
        extractor.clear()
    _reset_peak_memory(device)
    first, second = extractor(picture), extractor(moved)
    peak_memory = _peak_gpu_memory(device)  # a CUDA graph takes its memory when it is captured
    front_end = FrontEnd(extractor)
    front_end.process(moved, 0)
    result = front_end.process(picture, 1)
    stamps = itertools.count(2)

    def decode() -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def encode() -> None:
        encode_features(result, None, types)
        encode_matches(result, None, types)

    def frame() -> None:
        done = front_end.process(decode(), next(stamps))
        encode_features(done, None, types)
        encode_matches(done, None, types)

    images = scratch / f"{size[0]}x{size[1]}"
    if "offline" in stages and not images.exists():
        _write_sequence(picture, images)

    def sequence() -> None:
        for k in range(SEQUENCE):
            extractor((picture, moved)[k % 2])

    def offline() -> None:
        options = OutputOptions(overwrite=True)
        run_offline(
            FolderSource(images), extractor, scratch / "out", options=options, progress=False
        )

    runs = {
        "decode": decode,
        "extract": lambda: extractor(picture),
        "match": lambda: match(first, second, device=device),
        "encode": encode,
        "frame": frame,
        "sequence": sequence,
        "offline": offline,
    }
    unknown = sorted(set(stages) - set(runs))
    if unknown:
        raise ValueError(f"stage '{unknown[0]}' is unknown, choose of {', '.join(runs)}")
    of_network = {"extract", "frame", "sequence", "offline"} & set(stages)
    gflop = count_gflop(extractor, size) if of_network else None
    cases = []
    for stage in stages:
        row = Row(stage, model, f"{size[0]}x{size[1]}", top_k, str(device))
        if stage in of_network:
            row.path, row.features = str(extractor.network), len(first)
            row.gflop, row.peak_memory_mib = gflop, peak_memory
        if stage == "match":
            compiled = device.type == "cpu" and library.is_compiled()
            row.path = matching.arithmetic() if compiled else "fp32"
            products = 3 if row.path.startswith("bf16") else 1
            row.gflop = products * 2e-9 * len(first) * len(second) * extractor.descriptor_dim
        frames = SEQUENCE if stage in ("sequence", "offline") else 1
        cases.append(Case(row, runs[stage], device, frames))
    return cases


def _write_sequence(picture: np.ndarray, folder: Path) -> None:
    """Write the picture as JPEG files, shifted by some pixels from frame to frame."""
    folder.mkdir()
    for k in range(SEQUENCE):
        moved = np.roll(picture, (3 * k, 5 * k), axis=(0, 1))
        _, jpeg = cv2.imencode(".jpg", moved[..., ::-1])  # (`imwrite` wants paths of UTF-8)
        (folder / f"{k}.jpg").write_bytes(jpeg)


def _with_top_k(extractor: Extractor, top_k: int) -> Extractor:
    """A copy of the extractor with another number of keypoints, on the same network."""
    other = copy.copy(extractor)
    other.set_options(max_keypoints=top_k)
    return other


def _peer_cases(name: str, pictures: dict[tuple[int, int], np.ndarray], top_k: int) -> list[Case]:
    """OpenCV's ORB or SIFT on the same pictures."""
    makers = {"orb": cv2.ORB_create, "sift": cv2.SIFT_create}
    if name not in makers:
        raise ValueError(f"peer '{name}' is unknown, choose of {', '.join(makers)}")
    peer = makers[name](nfeatures=top_k)
    cases = []
    for size, picture in pictures.items():
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        row = Row("extract", name, f"{size[0]}x{size[1]}", top_k, path="OpenCV")
        row.features = len(peer.detect(grey, None))
        run = lambda grey=grey: peer.detectAndCompute(grey, None)  # noqa: E731
        cases.append(Case(row, run, torch.device("cpu")))
    return cases


def count_gflop(extractor: Extractor, size: tuple[int, int]) -> float:
    """GFLOP of the network's convolutions for an image of a (width, height), 2 a multiply-add.

    Counted for the network that runs: the fast one needs fewer than the plain one.
    """
    network = extractor.network.run
    if isinstance(network, CudaGraphs):
        network = network.function
    elif isinstance(network, Replays):
        network = network.network
    network = network if isinstance(network, FusedSCFeat) else extractor.model
    total = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        height, width = output.shape[-2:]
        if isinstance(module, Conv):
            total += 2 * module.products(height, width)
        else:
            total += 2 * module.weight.numel() * height * width

    kinds = (torch.nn.Conv2d, Conv)
    shown = getattr(network, "kernels", None)
    if shown is not None:
        network.kernels = kernels  # compiled kernels convolve without calling the module
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    width, height = (side + -side % STRIDE for side in size)
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, height, width, device=extractor.device))
    finally:
        for hook in hooks:
            hook.remove()
        if shown is not None:
            network.kernels = shown
    return total / 1e9


def _measure(
    cases: list[Case], devices: list[torch.device], rounds: int, warm_up: int
) -> dict[str, float]:
    """Time all cases in turn; returns the machine's peaks, measured in the same rounds."""
    peaks: dict[str, float] = {}
    for number in range(warm_up + rounds):
        for device in devices if number % PEAK_INTERVAL == 0 else ():
            for name, value in _peaks(device).items():
                peaks[name] = max(peaks.get(name, 0.0), value)
        for case in cases:
            _reset_peak_memory(case.device)
            started = time.perf_counter()
            case.run()
            if case.device.type == "cuda":
                torch.cuda.synchronize(case.device)
            seconds = time.perf_counter() - started
            if case.device.type == "cuda":
                peak = case.row.peak_memory_mib or 0.0
                case.row.peak_memory_mib = max(peak, _peak_gpu_memory(case.device))
            if number >= warm_up:
                case.row.seconds.append(seconds / case.frames)
        _progress(number + 1, warm_up + rounds)
    return peaks


def _peaks(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a matrix product by precision, and GB/s of a copy (read and written)."""
    size, copied, times = GPU_WORK if device.type == "cuda" else CPU_WORK
    found = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as convolutions do
    for name, dtype in DTYPES.items():
        if name == "int16" or (device.type == "cpu" and name == "fp16"):
            continue
        if device.type == "cuda" and name == "bf16" and not has_bfloat16(device):
            continue  # which PyTorch would emulate
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = _time(lambda a=a: a @ a, device, times)
        found[f"{device} {name}"] = 2e-9 * size**3 / seconds
    torch.backends.cuda.matmul.allow_tf32 = tf32
    source = torch.empty(copied, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    found[f"{device} copy GB/s"] = (
        2e-9 * copied / _time(lambda: target.copy_(source), device, times)
    )
    return found


def _time(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds per run, the better of two series of `times` runs."""
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - started) / times)
    return best


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gpu_memory(device: torch.device) -> float | None:
    """MiB since the last reset; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rround {done} of {total}", end=end, file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    """Hardware and software that the figures were measured on."""
    # counted are also those that this PyTorch cannot use, and these have no names
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": {name: os.environ.get(name, "") for name in OPENMP},
        "keeps_cores_awake": keeps_cores_awake(),
        "gpus": gpus,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "python": platform.python_version(),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    machine = report["machine"]
    head = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load average {machine['load_average']:.1f}, PyTorch {machine['torch']}"
    ]
    waiting = [f"{name} {value or 'not set'}" for name, value in machine["openmp"].items()]
    waiting.append(f"cores kept awake: {'yes' if machine['keeps_cores_awake'] else 'no'}")
    head.append(", ".join(waiting))
    head += machine["gpus"]
    if report["peak_memory_mib"] is not None:
        head.append(f"peak memory of the whole process: {report['peak_memory_mib']:.0f} MiB")
    for name, value in report["measured_peaks"].items():
        unit = "" if "GB/s" in name else " GFLOP/s"
        head.append(f"measured best, {name}: {value:.0f}{unit}")
    titles = ("stage", "model", "size", "top-K", "path", "median", "p95", "min ms")
    titles += ("GFLOP", "of peak", "GPU MiB", "first use s")
    lines = [titles]
    for row in report["rows"]:
        lines.append(
            (
                row["stage"],
                Path(row["model"]).stem,
                row["size"],
                str(row["top_k"]),
                row["path"] if row["device"] == "cpu" else f"{row['device']}, {row['path']}",
                f"{row['median_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['min_ms']:.2f}",
                "" if row["gflop"] is None else f"{row['gflop']:.1f}",
                f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else "",
                "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
                "" if row["first_use_s"] is None else f"{row['first_use_s']:.1f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text = [
        "  ".join(c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(zip(
            line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([*head, "", *text])


def _pyplot() -> Any:
    """matplotlib's module for figures, set to draw into files."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    return pyplot


def _picture_format(path: Path) -> str:
    """Format of a plot, by its suffix."""
    return path.suffix.lstrip(".").lower() or "png"


def plot_scaling(report: dict[str, Any], path: Path) -> None:
    """Extraction over pixels and matching over keypoints, both axes logarithmic.

    Raises:
        ValueError: matplotlib is missing.
    """
    pyplot = _pyplot()
    from matplotlib import ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    largest = max(row["top_k"] for row in report["rows"])
    smallest_size = min((r["size"] for r in report["rows"]), key=_pixels)
    series: dict[tuple[Any, str], list[tuple[float, float]]] = {}
    for row in report["rows"]:
        name = f"{Path(row['model']).stem} ({row['path']})"
        if row["stage"] == "extract" and row["top_k"] == min(2048, largest):
            series.setdefault((left, name), []).append((_pixels(row["size"]), row["median_ms"]))
        elif row["stage"] == "match" and row["size"] != smallest_size:
            point = (row["top_k"], row["median_ms"])
            series.setdefault((right, f"{Path(row['model']).stem}, {row['size']}"), []).append(
                point
            )
    for (axes, name), points in series.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    sizes = {_pixels(row["size"]): row["size"].replace("x", "x\n") for row in report["rows"]}
    counts = {row["top_k"]: f"{row['top_k']:,}" for row in report["rows"] if row["top_k"]}
    for axes, label, ticks in ((left, "image", sizes), (right, "keypoints (top-K)", counts)):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="median, ms")
        axes.set_xticks(list(ticks), list(ticks.values()), fontsize="small")
        axes.set_xticks([], minor=True)
        axes.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.yaxis.set(minor_locator=ticker.NullLocator())
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    left.set_title("extraction")
    right.set_title("matching")
    with staged_file(path, overwrite=True) as partial:
        figure.savefig(partial, format=_picture_format(path), dpi=110)
    pyplot.close(figure)


def _pixels(size: str) -> int:
    width, height = _size(size)
    return width * height


if __name__ == "__main__":
    sys.exit(main())
