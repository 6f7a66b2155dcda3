"""Options of extractor and front end: one declaration for Python, command line and ROS.

Every field carries its description and, for a number, its range in the dataclass metadata. The
command line builds its flags from it, the node its parameters and their descriptors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from scfeat_ros.errors import OptionError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A dataclass field with a description.

    Args:
        default: default value; its type is the option's type.
        help: description, with the unit.
        minimum, maximum: inclusive range of a number.
        choices: allowed values of a string.
        live: whether a running node can change it.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "live": live,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ExtractorOptions:
    """How keypoints are chosen from the score map, and how the network is run."""

    max_keypoints: int = option(
        2048, "top-K: keep at most this many keypoints, best first", 1, 100_000, live=True
    )
    score_threshold: float = option(
        0.0,
        "smallest score (the paper's epsilon_s); 0 leaves the choice to max_keypoints",
        0.0,
        1e6,
        live=True,
    )
    nms_radius: int = option(
        1,
        "non-maximum suppression in an N x N window with N = 2 * radius + 1 pixels "
        "(paper: N = 1, 3 or 5); 0 switches it off",
        0,
        64,
        live=True,
    )
    border: int = option(
        4, "ignore keypoints closer than this to the image border, pixels", 0, 1000, live=True
    )
    subpixel: bool = option(
        True, "refine keypoints by the score-weighted mean of their 3x3 neighbourhood", live=True
    )
    max_size: int = option(
        0,
        "shrink images whose longer side exceeds this, pixels; 0 never shrinks (keypoints are in "
        "pixels of the original image either way)",
        0,
        100_000,
        live=True,
    )
    levels: int = option(
        1,
        "sizes at which the network sees the image, each smaller by the square root of 2: 3 finds "
        "more again from twice the distance or more, in about twice the time",
        1,
        9,
        live=True,
    )
    descriptor_source: str = option(
        "bridge",
        "where descriptors are sampled: 'bridge', after the cross normalization, or 'backbone', "
        "before it (the paper's pruning), with which fewer matches are right; the projection is "
        "not fitted to the latter",
        choices=("bridge", "backbone"),
    )
    descriptor_sampling: str = option(
        "pooled",
        "how descriptors are sampled: 'pooled', the map close to the keypoint and the means of its "
        "surroundings, projected, or 'bilinear', the paper's way (Eq. 23), with which fewer "
        "matches are right",
        choices=("pooled", "bilinear"),
    )
    descriptor_dim: int = option(
        0,
        "length of a descriptor: its first values, which tell most, for shorter messages and "
        "faster matching; 0 keeps all",
        0,
        4096,
    )
    descriptor_norm: str = option(
        "l2",
        "'l2' (paper Eq. 22) or 'fusion', the paper's ablation of Eq. 25",
        choices=("l2", "fusion"),
    )
    precision: str = option(
        "auto",
        "arithmetic of the network's convolutions; 'auto' takes the fastest that the device "
        "multiplies in hardware and that finds the same features as fp32 in a check at the start",
        choices=("auto", "fp32", "bf16", "fp16", "int16"),
    )
    compile: str = option(
        "auto",
        "'auto': the fast network; on the CPU its kernels are compiled on first use, and without a "
        "C++ compiler the plain network runs; 'on': an error instead; 'off': the plain network",
        choices=("auto", "on", "off"),
    )
    threads: int = option(0, "CPU threads of the network; 0 leaves it to PyTorch", 0, 1024)


@dataclass(frozen=True)
class MatcherOptions:
    """How the features of consecutive frames are matched and tracked."""

    ratio: float = option(
        0.0,
        "ratio test: keep a match whose distance is below ratio times the second nearest "
        "(paper: 0.80 for reconstruction); 0 switches it off",
        0.0,
        1.0,
        live=True,
    )
    min_similarity: float = option(
        -1.0, "smallest cosine similarity of a match", -1.0, 1.0, live=True
    )
    epipolar_threshold: float = option(
        0.0,
        "drop matches farther than this from the epipolar line of the best fundamental matrix, "
        "pixels (MAGSAC++; undistorted by the camera_info, if there is one); 0 switches it off",
        0.0,
        1000.0,
        live=True,
    )
    max_gap: float = option(
        1.0, "seconds without a frame after which all tracks end", 0.0, 1e9, live=True
    )


def option_fields(options: type | object) -> Iterator[Field]:
    """The fields of an options dataclass that were declared with `option`."""
    return (f for f in fields(options) if "help" in f.metadata)


def validate(options: object) -> None:
    """Check every field of an options dataclass against its type, range and choices.

    Raises:
        OptionError: names the field, the value and what is allowed.
    """
    for f in option_fields(options):
        problem = check_value(f, getattr(options, f.name))
        if problem:
            raise OptionError(problem)


def check_value(f: Field, value: Any) -> str | None:
    """What is wrong with a value for a field; None if it is valid."""
    expected = type(f.default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number if expected is float else type(value) is expected
    if not fits:
        return f"{f.name} must be of type {expected.__name__}, got {value!r}"
    low, high, choices = (f.metadata[key] for key in ("minimum", "maximum", "choices"))
    # written so that NaN fails
    if is_number and not ((low is None or value >= low) and (high is None or value <= high)):
        return f"{f.name} must lie between {low} and {high}, got {value}"
    if choices and value not in choices:
        return f"{f.name} must be one of {', '.join(choices)}, got '{value}'"
    return None


def add_arguments(parser: argparse.ArgumentParser, options: type) -> None:
    """Add one flag for every field of an options dataclass."""
    for f in option_fields(options):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        if isinstance(f.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=f.default, help=text
            )
        else:
            parser.add_argument(
                flag,
                type=type(f.default),
                default=f.default,
                choices=f.metadata["choices"] or None,
                metavar=None if f.metadata["choices"] else f.name.split("_")[-1].upper(),
                help=text,
            )


def from_arguments(options: type[T], arguments: argparse.Namespace) -> T:
    """Build an options dataclass from parsed flags.

    Raises:
        OptionError: a value outside its range.
    """
    values = options(**{f.name: getattr(arguments, f.name) for f in option_fields(options)})
    validate(values)
    return values
