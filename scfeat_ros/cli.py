"""The `scfeat` command."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scfeat_ros import __version__
from scfeat_ros.errors import ScfeatError
from scfeat_ros.memory import is_out_of_memory
from scfeat_ros.messages import DESCRIPTOR_TYPES
from scfeat_ros.names import printable
from scfeat_ros.parameters import ExtractorOptions, MatcherOptions, add_arguments, from_arguments

# everything that imports torch, OpenCV or rosbags is imported where it is used: --help is quick
if TYPE_CHECKING:
    from scfeat_ros.extractor import Extractor
    from scfeat_ros.sources import Source

OK, ERROR, USAGE, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 130
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_EXIT_CODES = """exit codes:
  0    all is well
  1    an error that you can fix; the last line on stderr says how
  2    a wrong command line
  3    done, but the input is damaged: something of it was lost or skipped
  130  interrupted (Ctrl-C); 143 terminated"""

_DELEGATED = {
    "train": ("scfeat_training.train", "train the network"),
    "evaluate": ("scfeat_training.evaluation", "measure features on benchmarks"),
    "benchmark": ("scfeat_ros.benchmark", "measure speed and memory"),
}
"""Commands that parse their own arguments: module with main(argv) -> exit code, and help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace()
    try:
        # SIGTERM removes unfinished output, as Ctrl-C does
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if argv and argv[0] in _DELEGATED:
            return _delegate(argv[0], argv[1:])
        arguments = _parser().parse_args(argv)
        with _log_on_stderr(getattr(arguments, "quiet", False)):
            return arguments.run(arguments)
    except (ScfeatError, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        where = error.filename
        if where is None and error.errno in _NO_SPACE:
            where = getattr(arguments, "output", None) or getattr(arguments, "onnx", None)
        return _fail(f"{where}: {error.strerror or error}" if where else str(error))
    except KeyboardInterrupt:
        # training and evaluation keep their partial results
        removed = "" if argv and argv[0] in _DELEGATED else "; what was not complete is removed"
        print(f"scfeat: interrupted{removed}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not (is_out_of_memory(error) and hasattr(arguments, "max_size")):
            raise
        return _fail("out of memory: shrink the images with --max-size")


@contextmanager
def _log_on_stderr(quiet: bool) -> Iterator[None]:
    """Print the package's log: how the network runs, and why not faster."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("scfeat: %(message)s"))
    log = logging.getLogger("scfeat_ros")
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _fail(message: str) -> int:
    print(printable(f"scfeat: error: {' '.join(message.split())}"), file=sys.stderr)
    return ERROR


def _tell(text: str | Path) -> None:
    """Print a line; file names may contain bytes that a terminal cannot show."""
    print(printable(text))


def _delegate(command: str, argv: list[str]) -> int:
    module = _DELEGATED[command][0]
    try:
        run = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise ScfeatError(
                f"`scfeat {command}` needs the Python package {error.name}: "
                f"pip install {error.name}"
            ) from error
        raise ScfeatError(
            f"`scfeat {command}` is not part of this installation: install from the source tree "
            "(pip install PATH_TO_CHECKOUT)"
        ) from error
    return run(argv) or OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scfeat",
        description="SCFeat local features for recorded bags, images and videos.",
        epilog="example:\n  scfeat bag drive.mcap -o drive_features --video\n\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scfeat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_bag(commands)
    _add_images(commands)
    _add_match(commands)
    _add_export(commands)
    for name, (_, text) in _DELEGATED.items():
        commands.add_parser(name, help=f"{text} (`scfeat {name} --help`)", add_help=False)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_bag(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "bag",
        "extract and match features in a recorded bag",
        "scfeat bag drive.mcap -o drive_features --video --every 2",
    )
    parser.add_argument(
        "input",
        type=Path,
        nargs="+",
        metavar="IN",
        help="a rosbag2 folder, an .mcap or .db3 file, or a ROS 1 .bag file; it is only read; "
        "with --ray any number of them",
    )
    output = _add_output(parser)
    output.add_argument(
        "--passthrough", action="store_true", help="copy the input's topics into the output bag"
    )
    group = parser.add_argument_group("input")
    group.add_argument("--topic", help="image topic (default: the only one)")
    group.add_argument(
        "--camera-info",
        metavar="TOPIC",
        help="CameraInfo topic (default: in the image topic's namespace)",
    )
    group.add_argument(
        "--rectified",
        action="store_true",
        help="the images are rectified (image_proc's image_rect): bearings are made with the "
        "CameraInfo's P, without its distortion",
    )
    group.add_argument(
        "--poses",
        metavar="TOPIC",
        help="pose of the camera's optical frame in the world, PoseStamped or Odometry: the "
        "share of right matches is measured against it (default: /ground_truth/pose if there)",
    )
    _add_range(group)
    _add_network(parser)
    parser.set_defaults(run=_bag)


def _add_range(group: argparse._ArgumentGroup) -> None:
    """Flags for a part of the input."""
    group.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th image")
    group.add_argument(
        "--start", type=float, default=0.0, metavar="SECONDS", help="leave out the first seconds"
    )
    group.add_argument(
        "--duration", type=float, metavar="SECONDS", help="process only this many seconds"
    )


def _add_images(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "images",
        "extract and match features in a folder of images or a video",
        "scfeat images holiday.mp4 -o holiday_features --video",
    )
    parser.add_argument(
        "input",
        type=Path,
        nargs="+",
        metavar="IN",
        help="a folder of images, or a video; with --ray any number of them",
    )
    _add_output(parser)
    group = parser.add_argument_group("input")
    _add_range(group)
    group.add_argument(
        "--rate",
        type=float,
        default=10.0,
        metavar="HZ",
        help="images per second of a folder, for the stamps (default: %(default)s)",
    )
    _add_network(parser)
    parser.set_defaults(run=_images)


def _add_match(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "match",
        "match two images and draw the matches side by side",
        "scfeat match left.jpg right.jpg -o matches.png",
    )
    parser.add_argument("first", type=Path, metavar="A", help="an image")
    parser.add_argument("second", type=Path, metavar="B", help="another image")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="picture, .png or .jpg: matches that fit one epipolar geometry green, others red",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the picture")
    parser.add_argument(
        "--inlier-threshold",
        type=float,
        default=1.0,
        metavar="PIXELS",
        help="largest distance of an inlier from its epipolar line (default: %(default)s)",
    )
    _add_network(parser)
    parser.set_defaults(run=_match)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "export",
        "write features and matches of a folder of images for other tools",
        "scfeat export photos -o photos.db --sequential 10",
    )
    parser.add_argument("input", type=Path, nargs="?", metavar="FOLDER", help="a folder of images")
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE.onnx",
        help="write the network itself instead, fp32 or with --precision fp16 for TensorRT; "
        "`--weights FILE.onnx` runs it",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".npz (numpy), .h5 (hloc; matches and pairs go into two more files) or .db (COLMAP)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files")
    parser.add_argument(
        "--recursive", action="store_true", help="images in folders of FOLDER too, by their paths"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bars, and on stderr only what is wrong"
    )
    pairs = parser.add_argument_group("pairs").add_mutually_exclusive_group()
    pairs.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="match the pairs of a text file, two names a line (default: all pairs)",
    )
    pairs.add_argument(
        "--sequential", type=int, metavar="N", help="match each image with the next N"
    )
    colmap = parser.add_argument_group("COLMAP")
    colmap.add_argument(
        "--camera-model",
        default="SIMPLE_RADIAL",
        help="COLMAP's camera model (default: %(default)s)",
    )
    colmap.add_argument("--single-camera", action="store_true", help="all images are of one camera")
    _add_network(parser)
    parser.set_defaults(run=_export)


def _video_name(text: str) -> str:
    if Path(text).name != text or not text.endswith(".mp4"):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not the name of an .mp4 file (without a folder, it is put into OUT; IN "
            "goes before --video)"
        )
    return text


def _add_output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of the commands that write an output folder; returns their group."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder to make: features/ (a bag), report/index.html, summary.json",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--video",
        nargs="?",
        type=_video_name,
        const="overlay.mp4",
        metavar="NAME.mp4",
        help="write a video with keypoints and tracks into OUT (default name: overlay.mp4)",
    )
    group.add_argument(
        "--overlay", action="store_true", help="put the overlay pictures into the output bag"
    )
    group.add_argument(
        "--descriptor-type",
        choices=DESCRIPTOR_TYPES,
        default="float32",
        help="of the descriptors in the output bag (default: %(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    group.add_argument(
        "--quiet", action="store_true", help="no progress bar, and on stderr only what is wrong"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="process every IN as a task of a Ray cluster, each into a folder of its own under "
        "OUT; 'auto' for the one of this machine, 'local' to start one (needs the extra 'ray')",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="image: keypoints lie only where it is not black"
    )
    return group


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        default="scfeat-s",
        metavar="NAME_OR_FILE",
        help="an installed model (scfeat-s, or the larger scfeat-m or scfeat), or a .safetensors "
        "or exported .onnx file (default: %(default)s)",
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)"
    )
    extractor = parser.add_argument_group("extractor")
    add_arguments(extractor, ExtractorOptions)
    extractor.add_argument(
        "--resize",
        dest="max_size",
        type=int,
        metavar="SIZE",
        default=argparse.SUPPRESS,
        help="the same as --max-size",
    )
    add_arguments(parser.add_argument_group("matcher"), MatcherOptions)


def _load_extractor(arguments: argparse.Namespace) -> Extractor:
    from scfeat_ros.extractor import Extractor

    options = asdict(from_arguments(ExtractorOptions, arguments))
    return Extractor.from_pretrained(arguments.weights, arguments.device, **options)


def _bag(arguments: argparse.Namespace) -> int:
    if arguments.ray:
        return _on_ray(arguments)
    from scfeat_ros.sources import BagSource

    source = BagSource(
        _only_input(arguments),
        topic=arguments.topic,
        camera_info=arguments.camera_info,
        rectified=arguments.rectified,
        poses=arguments.poses,
        every=arguments.every,
        start=arguments.start,
        duration=arguments.duration,
        passthrough=arguments.passthrough,
    )
    return _process(arguments, source, arguments.passthrough)


def _images(arguments: argparse.Namespace) -> int:
    if arguments.ray:
        return _on_ray(arguments)
    from scfeat_ros.sources import open_images

    source = open_images(
        _only_input(arguments),
        arguments.rate,
        arguments.every,
        arguments.start,
        arguments.duration,
    )
    return _process(arguments, source)


def _only_input(arguments: argparse.Namespace) -> Path:
    if len(arguments.input) > 1:
        raise ValueError(f"{len(arguments.input)} inputs: give one, or --ray local for many")
    return arguments.input[0]


def _on_ray(arguments: argparse.Namespace) -> int:
    """Process every input as a task of its own; returns the worst exit code."""
    from scfeat_ros import ray_jobs

    results = ray_jobs.run(arguments)
    _tell(f"{ray_jobs.summary(results)}\n{arguments.output}")
    codes = {result.code for result in results}
    return ERROR if ERROR in codes else max(codes)


def _process(arguments: argparse.Namespace, source: Source, passthrough: bool = False) -> int:
    """Process a source into an output folder and print the statistics."""
    from scfeat_ros.images import read_mask
    from scfeat_ros.offline import OutputOptions, figures_text, run
    from scfeat_ros.staging import check_apart, check_output

    with closing(source):
        options = OutputOptions(
            video=arguments.video,
            overlay=arguments.overlay,
            passthrough=passthrough,
            descriptor_type=arguments.descriptor_type,
            overwrite=arguments.overwrite,
        )
        matching = from_arguments(MatcherOptions, arguments)
        mask = read_mask(arguments.mask) if arguments.mask else None
        # before the network is loaded, which takes a while
        check_output(arguments.output, options.overwrite)
        check_apart(arguments.output, source.path)
        summary = run(
            source,
            _load_extractor(arguments),
            arguments.output,
            matching,
            options,
            mask,
            model_name=arguments.weights,
            progress=False if arguments.quiet else None,
        )
    _tell(figures_text(summary, arguments.output))
    return DAMAGED if summary["damaged"] else OK


def _match(arguments: argparse.Namespace) -> int:
    from scfeat_ros.image_pair import check_picture, match_pair

    check_picture(arguments.output, arguments.overwrite)  # before the network is loaded
    result = match_pair(
        arguments.first,
        arguments.second,
        arguments.output,
        _load_extractor(arguments),
        from_arguments(MatcherOptions, arguments),
        arguments.inlier_threshold,
        arguments.overwrite,
    )
    _tell(
        f"{result.keypoints[0]} and {result.keypoints[1]} keypoints, {result.matches} matches, "
        f"{result.inliers} of them fit one epipolar geometry\n{arguments.output}"
    )
    return OK


def _export(arguments: argparse.Namespace) -> int:
    if arguments.onnx is not None:
        if arguments.input or arguments.output:
            raise ValueError("--onnx writes the network alone: leave FOLDER and -o out")
        from scfeat_ros.onnx_export import export_onnx

        precision = "fp32" if arguments.precision == "auto" else arguments.precision
        _tell(export_onnx(arguments.weights, arguments.onnx, precision, arguments.overwrite))
        return OK
    if arguments.input is None or arguments.output is None:
        raise ValueError("give FOLDER and -o FILE for features, or --onnx FILE for the network")
    from scfeat_ros import export

    colmap = export.ColmapOptions(arguments.camera_model, arguments.single_camera)
    export.check_export(arguments.output, colmap, arguments.overwrite)  # before it is loaded
    if arguments.pairs is not None:
        choose_pairs = partial(export.read_pairs, arguments.pairs)
    elif arguments.sequential is not None:
        choose_pairs = partial(export.sequential_pairs, overlap=arguments.sequential)
    else:
        choose_pairs = export.exhaustive_pairs
    result = export.export(
        arguments.input,
        arguments.output,
        _load_extractor(arguments),
        choose_pairs,
        from_arguments(MatcherOptions, arguments),
        colmap,
        arguments.overwrite,
        progress=False if arguments.quiet else None,
        recursive=arguments.recursive,
    )
    _tell(
        f"{result.images} images, {result.keypoints} keypoints, {result.pairs} pairs, "
        f"{result.matches} matches"
    )
    for reason in result.left_out:
        _tell(f"left out: {reason}")
    for file in result.files:
        _tell(file)
    return DAMAGED if result.left_out else OK
