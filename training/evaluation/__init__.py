"""Evaluation of local features: `scfeat evaluate TASK`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.staging import make_parent

TASKS = {
    "hpatches": "matching accuracy on image sequences related by homographies",
    "pose": "relative pose of image pairs with known poses",
    "odometry": "matches, tracks and visual odometry on consecutive frames",
    "reconstruction": "structure from motion on an image folder (ETH benchmark's protocol)",
    "localization": "poses of query images in a reference model (Aachen, hloc's layout)",
}
"""Each is a module here with `MAX_KEYPOINTS`, `add_arguments`, `check_data` and `run`."""


def build_parser(task: str | None) -> argparse.ArgumentParser:
    """The command line; only the named task's module is imported."""
    parser = argparse.ArgumentParser(
        prog="scfeat evaluate",
        description=__doc__,
        epilog="scfeat evaluate TASK -h says what a task does and which data it takes.",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, text in TASKS.items():
        sub = tasks.add_parser(name, help=text, description=text.capitalize() + ".")
        if name != task:
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        sub.description = module.__doc__
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        sub.add_argument("--data", type=Path, required=True, help="folder with the data, see above")
        sub.add_argument(
            "--methods",
            default="scfeat-s,orb,rootsift",
            help="comma-separated names or weights files; options follow as NAME:option=value "
            "(default: %(default)s)",
        )
        sub.add_argument("-o", "--output", type=Path, required=True, help="folder of the report")
        sub.add_argument("--cache", type=Path, help="folder of the cache (default: OUTPUT/cache)")
        sub.add_argument(
            "--max-keypoints",
            type=int,
            default=module.MAX_KEYPOINTS,
            help="most features per image, all methods (default: %(default)s)",
        )
        sub.add_argument(
            "--max-size",
            type=int,
            default=0,
            help="shrink images to this longer side for all methods, pixels; 0 never "
            "(default: %(default)s)",
        )
        sub.add_argument("--device", default="auto", help="of learned methods (default: auto)")
        sub.add_argument(
            "--adapter", type=Path, action="append", default=[], help="Python file with own methods"
        )
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one task. Returns the exit status; errors that a user can fix are printed as one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except (ScfeatError, ValueError) as error:
        print(f"scfeat evaluate: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"scfeat evaluate: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    for package in ("matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: pip install '.[evaluate]'")
    task = next((a for a in argv if not a.startswith("-")), None)
    args = build_parser(task).parse_args(argv)
    args.data = Path(os.path.abspath(args.data))  # scenes are called as their folders, also '.'
    if args.max_keypoints < 1 or args.max_size < 0:
        raise InputError("--max-keypoints must be at least 1 and --max-size at least 0")
    for name in ("threshold", "precision_threshold"):
        value = getattr(args, name, 1.0)
        if not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name, least in (("max_pairs", 0), ("max_frames", 0), ("runs", 1)):
        value = getattr(args, name, least)
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    from scfeat_training.evaluation.cache import Cache
    from scfeat_training.evaluation.methods import create_methods, load_adapter
    from scfeat_training.evaluation.report import write_report

    for adapter in args.adapter:
        load_adapter(adapter)
    module = importlib.import_module(f"{__name__}.{args.task}")
    module.check_data(args)
    methods = create_methods(args.methods, args.max_keypoints, args.device)
    cache = Cache(args.cache or args.output / "cache", args.max_size)
    for path in (args.output / "result.json", cache.folder / "features"):
        make_parent(path)  # else the first pairs would be said to be at fault
    try:
        report = module.run(args, methods, cache)
    except OSError as error:
        if error.filename:
            raise
        raise InputError(f"{cache.folder}: {error.strerror or error}") from error  # a full disk
    notes = []
    if report.skipped:
        notes.append(f"{len(report.skipped)} left out, see the list.")
    if cache.failures:
        count = len(cache.failures)
        note = f"A method failed on an image {count} times: it counts as one without features."
        notes.append(note)
        report.skipped += cache.failures.values()
    report.tables[0].note = " ".join(notes)
    report.protocol += [f"{m.label}: {m.remark()}." for m in methods if m.remark()]
    write_report(report, args.output, ["scfeat", "evaluate", *argv])
    useless: dict[str, str] = {}
    for (label, _), text in cache.failures.items():
        if label not in cache.succeeded:
            useless.setdefault(label, text)
    for label, text in useless.items():
        reason = f"{label} failed on every image; the first: {text}"
        print(f"scfeat evaluate: error: {reason}", file=sys.stderr)
    return 1 if useless else 0
