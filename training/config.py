"""The settings of a training run: one dataclass, filled from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scfeat_ros.errors import InputError

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
        cross_norm: False takes the bridge out (Table III, "w/o cross norm.").
        posed_share: share of pairs that come from posed scenes (the others are homographies);
            stages 1 and 2 alone read it from their own sections.
        synthetic_share: share of the posed pairs that are views of random 3D scenes.
        homography, posed, synthetic: fields of `HomographyPairsConfig`, `PosedPairsConfig` and
            `SyntheticPairsConfig`.
        photometric: fields of `Photometric`, for all three.
        loss: options of the stage's loss or policy.
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
    workers: int = 1
    threads: int = 0
    compile: bool = False
    log_every: int = 10
    picture_every: int = 500
    validate_every: int = 300
    validation_pairs: int = 24
    checkpoint_every: int = 100


STAGES = ("warmup", "descriptor", "detector", "adaptation", "distillation")


def read_config(path: str | Path, stage: str, **changes: Any) -> TrainConfig:
    """Read a YAML file of `TrainConfig` fields; `changes` that are not None replace its values.

    Raises:
        InputError: the file is missing or no mapping, or a field is unknown or of another type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: no valid YAML ({error})".replace("\n", " ")) from error
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
    for key, value in values.items():
        default = getattr(defaults, key)
        if isinstance(default, float) and isinstance(value, str):
            value = values[key] = _number(value, key, where)  # YAML reads 1e-3 as a string
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = values[key] = float(value)
        if default is not None and not isinstance(value, type(default)):
            raise InputError(f"{where}: '{key}' must be {type(default).__name__}, got {value!r}")
    config = TrainConfig(**values)
    if config.stage not in STAGES:
        raise InputError(f"{where}: stage '{config.stage}' is none of {', '.join(STAGES)}")
    if config.steps < 1 or min(config.threads, config.workers) < 0:
        raise InputError(f"{where}: steps must be at least 1, threads and workers not negative")
    if config.schedule not in ("constant", "cosine"):
        raise InputError(f"{where}: schedule '{config.schedule}' is neither constant nor cosine")
    if len(config.size) != 2 or any(side % 16 or side <= 0 for side in config.size):
        raise InputError(f"{where}: size {config.size} must be [width, height], multiples of 16")
    return config


def _number(text: str, key: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{where}: '{key}' must be a number, got {text!r}") from error


def options_of(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass of options from a section of the configuration; lists become tuples.

    Raises:
        InputError: an unknown field, or a section inside of the section.
    """
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f"config section '{where}': unknown field '{key}'; known: {known}")
        if isinstance(values[key], dict):
            raise InputError(
                f"config section '{where}': '{key}' takes no fields; a section stands at the top "
                "level of the file"
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
