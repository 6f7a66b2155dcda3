"""The settings of a training run: one dataclass, filled from a YAML file."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scfeat_ros.errors import InputError
from scfeat_ros.model.scfeat import CONFIGS
from scfeat_ros.text_files import read_text
from scfeat_training.datasets import HomographyPairsConfig, PosedPairsConfig
from scfeat_training.descriptor_loss import DescriptorOptions
from scfeat_training.distillation import DistillationOptions
from scfeat_training.keypoint_policy import PolicyOptions
from scfeat_training.photometric import Photometric
from scfeat_training.synthetic import SyntheticPairsConfig
from scfeat_training.warmup_loss import WarmupOptions

T = TypeVar("T")


@dataclass
class TrainConfig:
    """Settings of one stage.

    Attributes:
        stage: warmup, descriptor, detector, adaptation or distillation.
        model: a key of `scfeat_ros.model.scfeat.CONFIGS`.
        network: fields of `SCFeatConfig` that differ from that model's, to try other sizes.
        encoder_weights: a torchvision ResNet state dict to start the encoder from.
        data: folder of scenes as `datasets.read_scenes` takes it.
        scenes: names of the scenes to use; empty for all.
        photos: folders of photos without poses, further ones for the homographies.
        batch: pairs a step, over all processes together.
        steps: steps of the whole run; the learning-rate schedule ends there.
        lr, lr_encoder: peak learning rates.
        schedule: constant, or cosine down to a twentieth; both after `warmup_steps` of rise.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights; that average is validated and exported.
        frozen: parts of the encoder that are not trained: stem (conv1, bn1), layer1 to layer3.
        cross_norm: False removes the bridge (Table III, "w/o cross norm.").
        posed_share: share of pairs that come from posed scenes (the others are homographies), in
            stages 0 to 2.
        synthetic_share: share of the posed pairs that are views of random 3D scenes.
        homography, posed, synthetic: fields of `HomographyPairsConfig`, `PosedPairsConfig` and
            `SyntheticPairsConfig`.
        photometric: fields of `Photometric`, for all three.
        loss: options of the stage's loss or policy.
        teacher: a trained network whose detections stage 3 learns, by name, file or run; None for
            the network's own.
        workers: data processes; threads: of PyTorch, 0 for its own choice.
    """

    stage: str
    model: str = "scfeat-s"
    network: dict[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = None
    data: str = "data/train"
    scenes: list[str] = field(default_factory=list)
    photos: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=lambda: [320, 240])
    batch: int = 4
    steps: int = 10_000
    seed: int = 0
    lr: float = 1e-3
    lr_encoder: float = 1e-4
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    clip: float = 1.0
    ema: float = 0.998
    frozen: list[str] = field(default_factory=list)
    cross_norm: bool = True
    posed_share: float = 0.0
    synthetic_share: float = 0.0
    homography: dict[str, Any] = field(default_factory=dict)
    posed: dict[str, Any] = field(default_factory=dict)
    synthetic: dict[str, Any] = field(default_factory=dict)
    photometric: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    workers: int = 1
    threads: int = 0
    compile: bool = False
    log_every: int = 10
    picture_every: int = 500
    validate_every: int = 300
    validation_pairs: int = 24
    checkpoint_every: int = 100


STAGES = ("warmup", "descriptor", "detector", "adaptation", "distillation")
LOSSES = {
    "warmup": WarmupOptions,
    "descriptor": DescriptorOptions,
    "detector": PolicyOptions,
    "distillation": DistillationOptions,
}
"""Options of the section `loss` by stage; adaptation has none."""


@dataclass(frozen=True)
class Range:
    """Valid range of a number: from `least` to `most`, with `above` excluding `least` itself."""

    least: float
    most: float = sys.float_info.max
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range; NaN never is."""
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most < sys.float_info.max:
            return f"from {self.least} to {self.most}"
        return f"{'above' if self.above else 'at least'} {self.least}"


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a section of fields",
}
LISTED = {int: "whole numbers", float: "numbers", str: "names"}
"""Names of types, and of the types of a list's values, in messages."""

RANGES = {
    name: allowed
    for allowed, names in (
        (
            Range(1),
            "batch steps log_every picture_every validate_every checkpoint_every length textures "
            "refresh supersample anchors grid place_points bridged_points cell "
            "line_samples draws resamples decoder_channels descriptor_dim head_channels "
            "upsampled_kernel",
        ),
        (
            Range(0),
            "lr lr_encoder weight_decay warmup_steps validation_pairs curriculum tracks "
            "perspective translation brightness contrast gamma colour noise blur light near "
            "window jitter place_weight bridged_weight contrast_weight false_match "
            "penalty_rise keypoint_cost regularization layers scores",
        ),
        (
            Range(0, above=True),
            "scale crop_scale focal temperature place_sharpness sharpness threshold max_cost",
        ),
        (Range(0, math.inf, above=True), "clip"),
        (
            Range(0, 1),
            "ema posed_share synthetic_share overlap lines_inside filled mirror grey shadow "
            "probability precision",
        ),
        (Range(0, 2**63 - 1), "seed"),
        (Range(0, 1024), "workers threads"),
        (Range(0, 255), "motion"),
        (Range(0, 180), "rotation roll"),
        (Range(16), "texture_size"),
        (Range(0, 95), "jpeg"),
    )
    for name in names.split()
}
"""By field name, in any section; all values of a list must be in the range."""
ASCENDING = ("scale", "crop_scale", "focal", "overlap")
"""Fields whose values are the ends of a range, where they have two."""


def read_config(path: str | Path, stage: str, **changes: Any) -> TrainConfig:
    """Read a YAML file of `TrainConfig` fields; `changes` that are not None replace its values.

    Raises:
        InputError: the file cannot be read or is no mapping, or a field is unknown, of another
            type or outside its range; the line names file, field, value and what is allowed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold 'name: value' lines, fields of TrainConfig")
    values |= {key: value for key, value in changes.items() if value is not None}
    named = values.setdefault("stage", stage)
    if named != stage:
        raise InputError(f"{path}: is for stage '{named}', but '{stage}' was asked for")
    return make_config(values, str(path))


def make_config(values: dict[str, Any], where: str) -> TrainConfig:
    """A `TrainConfig` from plain values; `where` names their source in errors.

    Raises:
        InputError: see `read_config`.
    """
    known = {f.name: f for f in fields(TrainConfig)}
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown field '{key}'; known: {', '.join(known)}")
    defaults = TrainConfig(stage="warmup")
    config = TrainConfig(
        **{
            key: _converted(value, getattr(defaults, key), key, where)
            for key, value in values.items()
        }
    )
    if config.stage not in STAGES:
        raise InputError(f"{where}: stage '{config.stage}' is none of {', '.join(STAGES)}")
    if config.model not in CONFIGS:
        raise InputError(f"{where}: model '{config.model}' is none of {', '.join(CONFIGS)}")
    if config.schedule not in ("constant", "cosine"):
        raise InputError(f"{where}: schedule '{config.schedule}' is neither constant nor cosine")
    if config.teacher and config.stage != "adaptation":
        raise InputError(
            f"{where}: stage {config.stage} has no 'teacher', only adaptation has; take it out"
            + (" and name it by --init" if config.stage == "distillation" else "")
        )
    if len(config.size) != 2 or any(side % 16 or side <= 0 for side in config.size):
        raise InputError(f"{where}: size {config.size} must be [width, height], multiples of 16")
    for name, start in _sections(config).items():
        section = getattr(config, name)
        options_of(start, section, f"{where}: section '{name}'")
        if "size" in section and list(section["size"]) != config.size:
            raise InputError(
                f"{where}: section '{name}': 'size' is {section['size']}, but all pairs have the "
                f"{config.size} of the top level; take it out"
            )
    return config


def _sections(config: TrainConfig) -> dict[str, Any]:
    """The default options of the configuration's sections."""
    sections = {
        "network": CONFIGS[config.model],
        "homography": HomographyPairsConfig(),
        "posed": PosedPairsConfig(),
        "synthetic": SyntheticPairsConfig(),
        "photometric": Photometric(),
    }
    if config.stage in LOSSES:
        sections["loss"] = LOSSES[config.stage]()
    return sections


def options_of(start: T, values: dict[str, Any], where: str) -> T:
    """A dataclass of options, updated by a section of the configuration; lists become tuples.

    Args:
        start: defaults for options that the section does not contain; it is not changed.
        values: the section.
        where: its name in errors.

    Raises:
        InputError: an unknown field, a value of another type than the one in `start` or outside
            its range, or a section inside of the section.
    """
    known = [f.name for f in fields(start)]
    taken = {}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{where}: unknown field '{key}'; known: {', '.join(known)}")
        if isinstance(value, dict):
            raise InputError(
                f"{where}: '{key}' takes no fields; a section stands at the top level of the file"
            )
        taken[key] = _converted(value, getattr(start, key), key, where)
    return replace(start, **taken)


def _converted(value: Any, default: Any, name: str, where: str) -> Any:
    """The value of a field in the type of its default."""
    if isinstance(default, list | tuple):
        kind = type(default[0]) if default else str
        count = f"{len(default)} " if default else ""
        wanted = f"a list of {count}{LISTED[kind]}"
        fits = isinstance(value, list | tuple)
        if not fits or (isinstance(default, tuple) and len(value) != len(default)):
            raise InputError(f"{where}: '{name}' must be {wanted}, got {value!r}")
        taken = type(default)(_plain(one, kind, name, where, wanted) for one in value)
        if name in ASCENDING and taken[0] > taken[1]:
            raise InputError(f"{where}: '{name}' is {value!r}, but the smaller value comes first")
        return taken
    if default is None or is_dataclass(default):  # a value may be None as well
        kind = str if default is None else type(default)
        return None if value is None else _plain(value, kind, name, where, WORDS.get(kind, "null"))
    return _plain(value, type(default), name, where, WORDS[type(default)])


def _plain(value: Any, kind: type, name: str, where: str, wanted: str) -> Any:
    """A single value; a float may be given as an int or, as YAML reads 1e-3, as a string."""
    taken = value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            taken = float(value)
        except (ValueError, OverflowError):
            pass
    if type(taken) is not kind:
        raise InputError(f"{where}: '{name}' must be {wanted}, got {value!r}")
    allowed = RANGES.get(name) if kind in (int, float) else None
    if allowed is not None and not allowed.holds(taken):
        raise InputError(f"{where}: '{name}' is {value!r}, but must be {allowed}")
    return taken
