"""The methods under evaluation: name -> something that extracts features from an image.

An adapter for any other extractor takes five lines in a file that is given as `--adapter FILE`:

    from scfeat_training.evaluation.methods import Method, register, to_features
    @register("mine")
    class Mine(Method):
        def extract(self, image):  # (H, W, 3) uint8 RGB
            return to_features(*my_extractor(image, self.max_keypoints), image)

where the extractor gives (N, 2) keypoints in pixels, (N,) scores and (N, D) descriptors. All
methods get the same images and the same limits and are matched by the same matcher. Binary
descriptors enter as vectors of plus and minus one (`from_bits`): the order of their cosine
similarities is that of the Hamming distances.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
import yaml

from scfeat_ros import __version__
from scfeat_ros.errors import InputError, ModelError, ScfeatError, one_line
from scfeat_ros.extractor import Extractor, select_device
from scfeat_ros.features import Features
from scfeat_ros.matcher import match
from scfeat_ros.model.scfeat import CONFIGS, find_weights

PAPER_OPTIONS = {"nms_radius": 1, "score_threshold": 1.0}
"""SCFeat's options in the paper: epsilon_s = 1.0; N = 3x3 (Sec. IV-D), and N = 1x1 read as a radius
of 1 (Sec. IV-B): a window of one pixel would suppress nothing, and the paper lists "w/o NMS" as a
row of its own."""

GIVEN_ELSEWHERE = {
    "max_keypoints": "--max-keypoints, for all methods",
    "device": "--device, for all methods",
    "weights": "a .safetensors file's path in place of the name",
    "label": "the name with its options",
}
"""What looks like an option of a method and is none."""


class Method(ABC):
    """One local feature method with its options.

    Args:
        label: how tables call it.
        max_keypoints: most features per image.
        device: torch device of learned methods.
        **options: the method's own options, from `name:option=value`.
    """

    version: ClassVar[str] = "1"
    """Change it when features change with something outside the adapter's file: it is part of the
    cache's key, as the file itself is."""
    registered_as: str = ""
    """The name it was asked for by, if it is a registered one."""
    adapter: str | None = None
    """SHA-256 of the adapter file that registers this name."""

    def __init__(self, label: str, max_keypoints: int, device: str, **options: Any) -> None:
        self.label = label
        self.max_keypoints = max_keypoints
        self.device = device
        self.options = options
        self.prepare()

    def prepare(self) -> None:
        """Load what is needed once; here, refuse options that nothing reads."""
        if self.options:
            raise InputError(f"method '{self.label}': unknown option '{next(iter(self.options))}'")

    @property
    def file_name(self) -> str:
        """The label with `_` in place of characters that a file's name should not have."""
        return "".join(c if c.isalnum() or c in "-_" else "_" for c in self.label)

    @abstractmethod
    def extract(self, image: np.ndarray) -> Features:
        """Features of an (H, W, 3) uint8 RGB image, best `max_keypoints` first."""

    def identity(self) -> dict[str, Any]:
        """Everything that its features depend on besides the image."""
        return {
            "class": type(self).__qualname__,
            "name": self.registered_as,
            "adapter": self.adapter,
            "version": self.version,
            "max_keypoints": self.max_keypoints,
            "options": self.options,
        }

    def fingerprint(self) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def remark(self) -> str:
        """What a reader of the table should know about how it ran; empty for nothing."""
        return ""

    def with_options(self, **changes: Any) -> Method:
        """The same method with parameters of a paper's protocol; only SCFeat has any."""
        return self


REGISTRY: dict[str, Callable[..., Method]] = {}
ADAPTERS: dict[str, str] = {}
"""SHA-256 of the adapter file by the names that it registers."""


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a `Method` available under a name."""

    def add(cls: type[Method]) -> type[Method]:
        REGISTRY[name] = cls
        return cls

    return add


def to_features(
    keypoints: np.ndarray, scores: np.ndarray, descriptors: np.ndarray, image: np.ndarray
) -> Features:
    """Features sorted by score with unit-norm float32 descriptors, from plain arrays.

    Args:
        keypoints: (N, 2) x and y in pixels of `image`; N may be 0.
        scores: (N,), larger is better.
        descriptors: (N, D), of any length but 0.
        image: (H, W, ...), for its size.

    Raises:
        ValueError: the arrays are not of these shapes, or not of finite numbers.
    """
    keypoints = np.asarray(keypoints, np.float32)
    scores = np.asarray(scores, np.float32)
    descriptors = np.asarray(descriptors, np.float32)
    count = len(scores)
    if keypoints.shape != (count, 2) or descriptors.ndim != 2 or len(descriptors) != count:
        raise ValueError(
            f"keypoints {keypoints.shape}, scores {scores.shape} and descriptors "
            f"{descriptors.shape} do not belong together: expected (N, 2), (N,) and (N, D)"
        )
    named = {"keypoints": keypoints, "scores": scores, "descriptors": descriptors}
    for name, values in named.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold NaN or infinity")
    descriptors = descriptors / np.maximum(
        np.linalg.norm(descriptors, axis=1, keepdims=True), 1e-12
    )
    order = np.argsort(-scores, kind="stable")
    size = image.shape[1], image.shape[0]
    return Features(keypoints[order], scores[order], descriptors[order], size)


def from_bits(packed: np.ndarray) -> np.ndarray:
    """(N, bytes) uint8 binary descriptors -> (N, bits) float32 of unit norm.

    The cosine of two rows is 1 - 2 * Hamming distance / bits.
    """
    bits = np.unpackbits(np.asarray(packed, np.uint8), axis=1)
    return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(bits.shape[1]))


def match_indices(first: Features, second: Features, ratio: float | None = None) -> np.ndarray:
    """(M, 2) indices of mutual nearest neighbours; none where either side is empty.

    An image on which a method failed has no descriptors, not even their length.
    """
    if not len(first) or not len(second):
        return np.zeros((0, 2), np.int64)
    return match(first, second, ratio).indices


class OpenCVMethod(Method):
    """A detector and descriptor of OpenCV on the grey image, with OpenCV's own settings."""

    binary: ClassVar[bool] = True
    bytes_per_descriptor: ClassVar[int]

    @abstractmethod
    def create(self) -> Any:
        """The OpenCV object."""

    def prepare(self) -> None:
        super().prepare()
        self.detector = self.create()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "opencv": cv2.__version__}

    def extract(self, image: np.ndarray) -> Features:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        keypoints, descriptors = self.detector.detectAndCompute(grey, None)
        if descriptors is None or not len(keypoints):
            dimension = self.bytes_per_descriptor * (8 if self.binary else 1)
            return Features.empty(dimension, grey.shape[::-1])
        order = np.argsort([-k.response for k in keypoints], kind="stable")[: self.max_keypoints]
        points = np.float32([keypoints[i].pt for i in order])
        scores = np.float32([keypoints[i].response for i in order])
        return to_features(points, scores, self.transform(descriptors[order]), image)

    def transform(self, descriptors: np.ndarray) -> np.ndarray:
        return from_bits(descriptors) if self.binary else descriptors


@register("orb")
class ORB(OpenCVMethod):
    """ORB, 256 bits."""

    bytes_per_descriptor = 32

    def create(self) -> Any:
        return cv2.ORB_create(nfeatures=self.max_keypoints)


@register("akaze")
class AKAZE(OpenCVMethod):
    """AKAZE with its MLDB descriptor, 486 bits."""

    bytes_per_descriptor = 61

    def create(self) -> Any:
        return cv2.AKAZE_create()


@register("sift")
class SIFT(OpenCVMethod):
    """SIFT, 128 values."""

    binary = False
    bytes_per_descriptor = 128

    def create(self) -> Any:
        return cv2.SIFT_create(nfeatures=self.max_keypoints)


@register("rootsift")
class RootSIFT(SIFT):
    """SIFT with the Hellinger kernel (Arandjelovic and Zisserman, 2012)."""

    def transform(self, descriptors: np.ndarray) -> np.ndarray:
        total = np.maximum(np.abs(descriptors).sum(axis=1, keepdims=True), 1e-12)
        return np.sqrt(descriptors / total)


class SCFeatMethod(Method):
    """SCFeat: weights by name or path; options are those of `ExtractorOptions`.

    `descriptor_source=backbone` and `descriptor_sampling=bilinear` are the paper's descriptors,
    `descriptor_norm=fusion` its ablation of Eq. 25, `nms_radius=0` the one without non-maximum
    suppression.
    """

    def __init__(
        self, label: str, max_keypoints: int, device: str, weights: str, **options: Any
    ) -> None:
        self.weights = find_weights(weights)
        super().__init__(label, max_keypoints, device, **options)

    def prepare(self) -> None:
        self.digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        try:
            self.extractor = Extractor.from_pretrained(
                self.weights, self.device, **{"max_keypoints": self.max_keypoints, **self.options}
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"method '{self.label}': {error}") from error

    def identity(self) -> dict[str, Any]:
        return {
            "class": "SCFeat",
            "version": __version__,
            "weights": self.digest,
            "options": asdict(self.extractor.options),
            # which arithmetic "auto" has come to on this machine
            "network": str(self.extractor.network),
        }

    def extract(self, image: np.ndarray) -> Features:
        return self.extractor(image)

    def remark(self) -> str:
        return f"the network runs in {self.extractor.network}"

    def with_options(self, **changes: Any) -> SCFeatMethod:
        # what the user gave with the method's name goes before the protocol's values
        changes = {key: value for key, value in changes.items() if key not in self.options}
        changed = copy.copy(self)
        changed.extractor = copy.copy(self.extractor)
        try:
            changed.extractor.set_options(**changes)
        except (TypeError, ValueError) as error:
            raise InputError(f"method '{self.label}': {error}") from error
        return changed


class LightGlueMethod(Method):
    """SuperPoint, DISK or ALIKED of the `lightglue` package, where a user has installed it."""

    class_name: ClassVar[str]

    def prepare(self) -> None:
        try:
            import lightglue
        except ImportError as error:
            if error.name != "lightglue":
                raise InputError(
                    f"method '{self.label}': the 'lightglue' package cannot be imported ({error}); "
                    "it needs torchvision and kornia"
                ) from error
            raise InputError(
                f"method '{self.label}' needs the 'lightglue' package of cvg/LightGlue: install "
                "it with pip from that repository, or leave the method out"
            ) from error
        extractor = getattr(lightglue, self.class_name)
        # the package takes any option and reads those of `default_conf`
        known = set(getattr(extractor, "default_conf", self.options)) - {"max_num_keypoints"}
        for option in self.options:
            if option not in known:
                raise InputError(f"method '{self.label}': unknown option '{option}'")
        try:
            self.extractor = extractor(max_num_keypoints=self.max_keypoints, **self.options)
        except OSError as error:
            raise InputError(
                f"method '{self.label}': its weights can be neither found in "
                f"{torch.hub.get_dir()}/checkpoints nor downloaded ({error})"
            ) from error
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"method '{self.label}': {type(error).__name__}: {error}") from error
        self.extractor = self.extractor.eval().to(self.torch_device)
        digest = hashlib.sha256()
        for name, value in self.extractor.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        self.digest = digest.hexdigest()

    @property
    def torch_device(self) -> torch.device:
        return select_device(self.device)

    def identity(self) -> dict[str, Any]:
        # the package has no version of its own ("0.0")
        return {**super().identity(), "weights": self.digest}

    def extract(self, image: np.ndarray) -> Features:
        tensor = torch.from_numpy(image).permute(2, 0, 1).float().div(255).to(self.torch_device)
        with torch.inference_mode():
            found = self.extractor.extract(tensor, resize=None)
        arrays = (
            found[key][0].cpu().numpy() for key in ("keypoints", "keypoint_scores", "descriptors")
        )
        return to_features(*arrays, image)


@register("superpoint")
class SuperPoint(LightGlueMethod):
    """SuperPoint through LightGlue's package."""

    class_name = "SuperPoint"


@register("disk")
class DISK(LightGlueMethod):
    """DISK through LightGlue's package."""

    class_name = "DISK"


@register("aliked")
class ALIKED(LightGlueMethod):
    """ALIKED through LightGlue's package."""

    class_name = "ALIKED"


def load_adapter(path: str | Path) -> None:
    """Run a Python file that registers methods.

    Raises:
        InputError: the file is missing or fails.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--adapter {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"scfeat_adapter_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = dict(REGISTRY)
    try:
        content = path.read_bytes()
        # not by `exec_module`: kept bytecode may be that of another file of this size and second
        exec(compile(content, path, "exec"), module.__dict__)
    except Exception as error:
        raise InputError(f"--adapter {path}: {type(error).__name__}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    ADAPTERS.update({n: digest for n, cls in REGISTRY.items() if before.get(n) is not cls})


def create_methods(specification: str, max_keypoints: int, device: str = "auto") -> list[Method]:
    """Methods from a comma-separated list such as `scfeat-s,scfeat-s:nms_radius=0,orb`.

    A name is a registered method, an installed model or a .safetensors file; options follow
    after colons.

    Raises:
        InputError: an unknown name or option, or one that is listed twice.
        ModelError: weights that cannot be used.
    """
    names = [name.strip() for name in specification.split(",") if name.strip()]
    if not names:
        raise InputError("--methods is empty; for example --methods scfeat-s,orb,rootsift")
    return [
        _create(name, label, max_keypoints, device)
        for name, label in zip(names, _labels(names), strict=True)
    ]


def _labels(specifications: list[str]) -> list[str]:
    """How tables call the methods: a file by its name and as much of its path as is needed.

    Raises:
        InputError: a method is named twice.
    """
    depths = [1] * len(specifications)
    while True:
        labels = [_label(s, depth) for s, depth in zip(specifications, depths, strict=True)]
        counts = Counter(labels)
        same = [i for i, label in enumerate(labels) if counts[label] > 1]
        if not same:
            return labels
        # a name, or a path in its full length, cannot be lengthened
        if all(_label(specifications[i], depths[i] + 1) == labels[i] for i in same):
            raise InputError(f"--methods names a method twice: {','.join(specifications)}")
        for i in same:
            depths[i] += 1


def _label(specification: str, depth: int) -> str:
    """The method's name and options, of a path the last `depth` parts without the suffix."""
    name, *assignments = specification.split(":")
    if name.endswith(".safetensors") and "/" in name:
        name = str(Path(*Path(name).absolute().with_suffix("").parts[-depth:]))
    return ":".join([name, *assignments])


def _create(specification: str, label: str, max_keypoints: int, device: str) -> Method:
    name, *assignments = specification.split(":")
    options = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise InputError(
                f"method '{specification}': '{assignment}' is not of the form option=value; "
                "for example scfeat-s:nms_radius=2"
            )
        key = key.strip().replace("-", "_")
        if key in GIVEN_ELSEWHERE:
            raise InputError(f"method '{specification}': {key} is given by {GIVEN_ELSEWHERE[key]}")
        # YAML 1.1 takes on and off for truth values; here they are words, as in compile=off
        word = value.strip().lower() in ("on", "off")
        try:
            options[key] = value.strip() if word else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"method '{specification}': '{value}' is not a valid value") from error
    if name in REGISTRY:
        try:
            method = REGISTRY[name](label, max_keypoints, device, **options)
        except ScfeatError:
            raise
        except Exception as error:  # of an adapter's own code
            raise InputError(
                f"method '{specification}': cannot be set up ({one_line(error)})"
            ) from error
        method.registered_as, method.adapter = name, ADAPTERS.get(name)
        return method
    if name.endswith(".safetensors") or name in CONFIGS:
        try:
            return SCFeatMethod(label, max_keypoints, device, weights=name, **options)
        except ModelError as error:
            raise ModelError(f"method '{specification}': {error}") from error
    try:
        find_weights(name)
    except ModelError as error:
        known = ", ".join([*CONFIGS, *sorted(REGISTRY)])
        raise InputError(
            f"method '{name}' is unknown; known are {known}, and paths of .safetensors files"
        ) from error
    return SCFeatMethod(label, max_keypoints, device, weights=name, **options)
