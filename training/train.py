"""`scfeat train`: the stages of the training, and the export of what was trained."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import distributed as dist

from scfeat_ros import __version__
from scfeat_ros.errors import InputError, OutputExistsError, ScfeatError
from scfeat_ros.memory import is_out_of_memory
from scfeat_ros.model.cross_norm import CrossNorm
from scfeat_ros.model.scfeat import SCFeat, save_model
from scfeat_ros.staging import make_parent, staged_file
from scfeat_training.config import STAGES, read_config
from scfeat_training.datasets import ImageCache
from scfeat_training.networks import load_network, mean_of
from scfeat_training.scenes import HELD_OUT_FROM, read_scenes, split_scenes
from scfeat_training.trainer import LeftOut, Trainer

HELP = {
    "warmup": "stage 0: descriptors from homographies and known correspondences",
    "descriptor": "stage 1: descriptors from camera poses alone",
    "detector": "stage 2: the keypoint detector, by policy gradient",
    "adaptation": "stage 3: the keypoint detector, by what it finds in other views",
    "distillation": "a smaller network, by the maps of the one given by --init",
}
SKIP_BAD = "go on without images that cannot be used"
CONFIGURED = "(default: the configuration's)"
SCENES = "scenes of the folder to use (default: all)"
PAIRS = "pairs of each kind (default: %(default)s)"
SIZE = "width and height of their images (default: {} {})"
OVERWRITE = "replace a file that is there"
_WH = ("W", "H")


def export(runs: Sequence[str | Path], output: str | Path, overwrite: bool = False) -> None:
    """Write the weights of a run as an fp16 safetensors file with provenance.

    Args:
        runs: a checkpoint, a run's folder, or weights by name or file; of several the mean is
            written, see `networks.mean_of`.
        output: a .safetensors file.
        overwrite: replace a file that is there.

    Raises:
        InputError: a network cannot be read or has no bridge (an ablation), or several are of
            different architectures.
        OutputExistsError: the output is there and `overwrite` is not set.
    """
    model, provenance = _complete_network(runs, output, overwrite)
    save_model(model, output, provenance)


def fit(
    run: str | Path,
    data: str | Path,
    output: str | Path,
    pairs: int,
    size: tuple[int, int],
    overwrite: bool = False,
    skip_bad: bool = False,
    names: Sequence[str] = (),
) -> LeftOut:
    """Write weights with projection and reliability fitted on the training scenes.

    Args:
        run: a checkpoint, a run's folder, or weights by name or file.
        data: folder of scenes; the held-out ones are not used.
        output: a .safetensors file.
        pairs, size: see `fitting.sampled_pairs`.
        overwrite: replace a file that is there.
        skip_bad: go on without images that cannot be used.
        names: scenes of the folder to use; empty for all.

    Returns:
        what was left out as bad.

    Raises:
        InputError: the network or the scenes cannot be used, or the output cannot be written.
        OutputExistsError: the output is there and `overwrite` is not set.
    """
    # here, since training itself needs nothing of the extractor
    from scfeat_training.fitting import sampled_pairs
    from scfeat_training.projection import fit_projection
    from scfeat_training.reliability import fit_reliability

    model, provenance = _complete_network([run], output, overwrite)
    left_out = LeftOut()
    scenes, _ = split_scenes(read_scenes(data, skip_bad, left_out, names))
    if not scenes:
        raise InputError(f"{data}: all scenes are held out for validation, none to fit on")
    images = ImageCache()
    kinds = sampled_pairs(model, scenes, pairs, size, images, skip_bad)
    model.projection = fit_projection(model, kinds)
    model.detector.reliability = fit_reliability(model, kinds)
    names = sorted(scene.name for scene in scenes)
    made = {"pairs": pairs, "size": list(size), "scenes": names, "version": __version__}
    save_model(model, output, {**provenance, "fitted": made})
    for line in images.bad.values():
        left_out(line)
    return left_out


def _complete_network(
    runs: Sequence[str | Path], output: str | Path, overwrite: bool
) -> tuple[SCFeat, dict[str, Any]]:
    """A network, or the mean of several, that may be written to `output`, and how it was made."""
    if Path(output).suffix != ".safetensors":
        raise InputError(f"{output}: the name must end with .safetensors")
    if Path(output).exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists already; use --overwrite")
    make_parent(output)
    loaded = [load_network(run) for run in runs]
    for run, (model, _) in zip(runs, loaded, strict=True):
        if not isinstance(model.bridge, CrossNorm):
            raise InputError(f"{run}: was trained without cross normalization; only for study")
    return loaded[0] if len(loaded) == 1 else mean_of(loaded, runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scfeat train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for stage in STAGES:
        one = commands.add_parser(stage, help=HELP[stage], description=HELP[stage])
        one.add_argument("--config", required=True, help="YAML file of settings")
        # torchrun takes an argument --run for an abbreviation of its own: -o is safe there
        one.add_argument(
            "-o", "--output", "--run", dest="run", required=True, help="folder of checkpoint, logs"
        )
        one.add_argument("--data", help=f"folder of scenes {CONFIGURED}")
        one.add_argument(
            "--encoder-weights", help=f"torchvision ResNet file for the encoder {CONFIGURED}"
        )
        one.add_argument("--init", help="checkpoint, weights file or installed model to start from")
        one.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
        one.add_argument("--steps", type=int, help=f"steps of the whole run {CONFIGURED}")
        one.add_argument("--stop-at", type=int, help="stop there; --resume goes on to --steps")
        one.add_argument("--time-limit", type=float, metavar="MIN", help="stop after MIN minutes")
        one.add_argument("--threads", type=int, help=f"threads of PyTorch {CONFIGURED}")
        one.add_argument("--workers", type=int, help=f"data processes {CONFIGURED}")
        one.add_argument("--seed", type=int, help=f"of all that is drawn by chance {CONFIGURED}")
        one.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
        one.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
        one.add_argument("--skip-bad", action="store_true", help=SKIP_BAD)
    study = commands.add_parser("ablation", help="table of trained variants on held-out pairs")
    study.add_argument(
        "runs", nargs="+", metavar="NAME=RUN", help="row's name and run's folder, or weights"
    )
    study.add_argument("--data", required=True, help="folder of scenes; the held-out ones count")
    study.add_argument("--scenes", nargs="+", default=[], metavar="NAME", help=SCENES)
    study.add_argument("--pairs", type=int, default=50, help=PAIRS)
    study.add_argument(
        "--size", type=int, nargs=2, default=[320, 240], metavar=_WH, help=SIZE.format(320, 240)
    )
    study.add_argument("-o", "--output", help="Markdown file, in place of the screen")
    study.add_argument("--skip-bad", action="store_true", help=SKIP_BAD)
    fitted = commands.add_parser(
        "fit", help="fit the projection to descriptors and the reliability, after the training"
    )
    fitted.add_argument("run", help="checkpoint file, a run's folder, or weights by name or file")
    fitted.add_argument(
        "--data", required=True, help="folder of scenes; held-out ones are not used"
    )
    fitted.add_argument("--scenes", nargs="+", default=[], metavar="NAME", help=SCENES)
    fitted.add_argument("-o", "--output", required=True, help="a .safetensors file")
    fitted.add_argument("--pairs", type=int, default=250, help=PAIRS)
    fitted.add_argument(
        "--size", type=int, nargs=2, default=[640, 480], metavar=_WH, help=SIZE.format(640, 480)
    )
    fitted.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    fitted.add_argument("--skip-bad", action="store_true", help=SKIP_BAD)
    out = commands.add_parser("export", help="checkpoints -> safetensors weights")
    out.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="checkpoint file, a run's folder, or weights by name or file; of several, which are "
        "of one architecture, the mean of the weights is written (fit it afterwards)",
    )
    out.add_argument("-o", "--output", required=True, help="a .safetensors file")
    out.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `scfeat train`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        if args.command == "export":
            export(args.runs, args.output, args.overwrite)
            print(f"wrote {args.output}")
            return 0
        if args.command == "fit":
            _check_pairs(args)
            where = args.run, args.data, args.output
            how = args.pairs, tuple(args.size), args.overwrite, args.skip_bad
            left_out = fit(*where, *how, args.scenes)
            print(f"wrote {args.output}{left_out}")
            return 0
        if args.command == "ablation":
            return _ablation(args)
        return _train(args, argv)
    except (ScfeatError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError):  # of a full disk's without a name
            places = error.filename, getattr(args, "output", None), getattr(args, "run", None)
            reason = f"{next(filter(None, places), args.command)}: {error.strerror or error}"
        print(f"scfeat train: {reason}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("scfeat train: out of memory: lower the batch or the images' size", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    if args.stop_at is not None and args.stop_at < 1:
        raise InputError(f"--stop-at {args.stop_at}: must be at least 1")
    if args.time_limit is not None and not args.time_limit > 0:
        raise InputError(f"--time-limit {args.time_limit:g}: must be above 0")
    if args.init is not None and args.encoder_weights is not None:
        raise InputError("--encoder-weights: the encoder's weights come from --init; give only one")
    names = ("data", "encoder_weights", "steps", "threads", "workers", "seed", "compile")
    changes = {name: getattr(args, name) for name in names}
    config = read_config(args.config, args.command, **changes)
    trainer = Trainer(
        config,
        args.run,
        resume=args.resume,
        init=args.init,
        skip_bad=args.skip_bad,
        device=args.device,
        command=shlex.join(["scfeat", "train", *argv]),
    )
    step = trainer.train(args.stop_at, args.time_limit)
    if trainer.world > 1:
        dist.destroy_process_group()
    if trainer.rank == 0:
        print(f"{args.command}: at step {step} of {config.steps}{trainer.left_out}; {args.run}")
    if trainer.signal is not None and step < config.steps:
        if trainer.rank == 0:
            print("stopped by a signal; --resume goes on", file=sys.stderr)
        return 128 + trainer.signal
    return 0


def _check_pairs(args: argparse.Namespace) -> None:
    if args.pairs < 1 or min(args.size) < 1:
        raise InputError("--pairs and both values of --size must be at least 1")


def _ablation(args: argparse.Namespace) -> int:
    # here, since training itself needs nothing of the evaluation
    from scfeat_training.ablation import table

    _check_pairs(args)
    runs = {}
    for text in args.runs:
        name, equals, run = text.partition("=")
        if not (name and equals):
            raise InputError(f"'{text}': wants NAME=RUN, say 'ours=runs/detector'")
        if name in runs:
            raise InputError(f"'{text}': the name '{name}' is given twice; rename the row")
        runs[name] = run
    # the output's folder is made, or found to be impossible, before anything is measured
    with staged_file(args.output, overwrite=True) if args.output else nullcontext() as partial:
        left_out = LeftOut()
        _, held_out = split_scenes(read_scenes(args.data, args.skip_bad, left_out, args.scenes))
        if not held_out:
            raise InputError(
                f"{args.data}: nothing is held out to measure on; that takes a scene of "
                f"{HELD_OUT_FROM} images or more"
            )
        text = table(runs, held_out, args.pairs, tuple(args.size), args.skip_bad, left_out)
        if partial is None:
            print(text, end="")
        else:
            partial.write_text(text, encoding="utf-8")
    if left_out.lines:
        print(f"measured{left_out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # By torchrun: DistributedDataParallel leaves gloo's threads behind, and one that wants the
        # interpreter while it shuts down aborts the process. All files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)
