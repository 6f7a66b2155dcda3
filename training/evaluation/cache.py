"""Features and results that outlive a run, keyed by image content and method options.

A second run is quick and an interrupted one resumes: entries are written atomically, and found by
content, never by date or path.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from scfeat_ros import __version__
from scfeat_ros.decoded_image import UnreadableImageError, decode
from scfeat_ros.errors import InputError, one_line
from scfeat_ros.features import Features
from scfeat_ros.preprocessing import working_size
from scfeat_ros.staging import staged_file
from scfeat_training.evaluation.methods import Method


class CorruptImageError(InputError):
    """An image file that is missing or cannot be decoded."""


class Extracted(NamedTuple):
    """Features of one image file."""

    features: Features
    """Keypoints in pixels of the stored image, not of the size at which it was processed."""
    seconds: float
    """How long the extraction took when it was done; NaN where it failed."""
    digest: str
    """SHA-256 of the file's content."""


def read_image(path: Path) -> tuple[np.ndarray, str]:
    """(H, W, 3) uint8 RGB, as stored (no EXIF rotation), and the SHA-256 of the file.

    Raises:
        CorruptImageError: missing or undecodable.
    """
    try:
        content = Path(path).read_bytes()
        image = decode(np.frombuffer(content, np.uint8), "the image")
    except OSError as error:
        raise CorruptImageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnreadableImageError as error:
        raise CorruptImageError(f"{path}: {error}") from error
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return image, hashlib.sha256(content).hexdigest()


def shrink(image: np.ndarray, max_size: int) -> np.ndarray:
    """The image with its longer side at most `max_size` pixels; 0 leaves it as it is."""
    size = image.shape[1::-1]
    new = working_size(size, max_size)
    return image if new == size else cv2.resize(image, new, interpolation=cv2.INTER_AREA)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with staged_file(path, overwrite=True) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class Cache:
    """A folder of features and results.

    Args:
        folder: created at the first write.
        max_size: longer side of the images that methods see, pixels; 0 for no limit.
        recent: entries that are kept in memory.
    """

    def __init__(self, folder: Path, max_size: int = 0, recent: int = 32) -> None:
        self.folder = Path(folder)
        self.max_size = max_size
        self._recent: OrderedDict[tuple[str, str], Extracted] = OrderedDict()
        self._recent_limit = recent
        self._warm: set[str] = set()
        self._lengths: dict[str, int] = {}
        """Of a method's descriptors, as its first features have them."""
        self._digests: dict[str, str] = {}
        self.failures: dict[tuple[str, str], str] = {}
        """Images on which a method failed, one sentence by label and path."""
        self.succeeded: set[str] = set()
        """Labels of the methods that found the features of an image."""
        self._failed = 0

    def size_limit(self) -> str:
        """At what size methods see the images, for a report's protocol."""
        return f"longer side at most {self.max_size} px" if self.max_size else "full size"

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, read once per run."""
        key = str(path)
        if key not in self._digests:
            try:
                self._digests[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as error:
                raise CorruptImageError(f"{path}: cannot be read ({error.strerror})") from error
        return self._digests[key]

    def extract(self, method: Method, path: Path) -> Extracted:
        """Features of an image file, from the cache or by the method.

        If the method raises anything, the image counts as one without features and is listed in
        `failures`. This is not cached: the next run tries again.

        Raises:
            CorruptImageError: missing or undecodable.
        """
        key = method.fingerprint(), str(path)
        if key not in self._recent:
            self._recent[key] = self._load_or_extract(method, Path(path))
            if len(self._recent) > self._recent_limit:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        extracted = self._recent[key]
        if np.isnan(extracted.seconds):
            self._failed += 1
        else:
            self.succeeded.add(method.label)
        return extracted

    def _load_or_extract(self, method: Method, path: Path) -> Extracted:
        digest = self.digest(path)
        folder = self.folder / "features" / f"{method.file_name[:60]}-{method.fingerprint()}"
        file = folder / f"{digest[:32]}-{self.max_size}.npz"
        if file.is_file():
            try:
                return _load(file, digest)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # an entry that cannot be read is made again
        image, _ = read_image(path)
        working = shrink(image, self.max_size)
        size = image.shape[1], image.shape[0]
        factors = np.float32(size) / np.float32(working.shape[1::-1])
        try:
            if method.fingerprint() not in self._warm:  # the first image must not pay for start-up
                method.extract(working)
                self._warm.add(method.fingerprint())
            started = time.perf_counter()
            found = method.extract(working)
            seconds = time.perf_counter() - started
            found = found.select(slice(method.max_keypoints))  # an adapter may have found more
            length = found.descriptors.shape[1]
            first = self._lengths.setdefault(method.fingerprint(), length) if len(found) else length
            if length != first:
                raise ValueError(f"descriptors of length {length}, on images before of {first}")
            keypoints = (found.keypoints + np.float32(0.5)) * factors - np.float32(0.5)
            features = Features(keypoints, found.scores, found.descriptors, size)
        except Exception as error:  # of any library, or of an adapter's own code
            text = f"{path}: {method.label} failed ({one_line(error)})"
            self.failures[method.label, str(path)] = text
            return Extracted(Features.empty(1, size), np.nan, digest)
        with staged_file(file, overwrite=True) as partial:
            np.savez(
                partial,
                keypoints=features.keypoints,
                scores=features.scores,
                image_size=np.int64(size),
                seconds=seconds,
                **_pack(features.descriptors),
            )
        return Extracted(features, seconds, digest)

    def result(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """A JSON value that was computed before under the same key, or `compute()`.

        It is not kept if a method failed on an image meanwhile, so that every run says so.
        """
        versions = {"scfeat_ros": __version__, "opencv": cv2.__version__}
        text = json.dumps({**key, **versions}, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        file = self.folder / "results" / f"{name}.json"
        if file.is_file():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                if stored["key"] == json.loads(text):
                    return stored["value"]
            except (OSError, ValueError, KeyError, TypeError):
                pass
        failed = self._failed
        value = compute()
        if self._failed == failed:
            write_json(file, {"key": json.loads(text), "value": value})
        return value


def _pack(descriptors: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays that hold (N, D) descriptors; binary ones (plus and minus one value) as bits."""
    magnitudes = np.abs(descriptors)
    if magnitudes.size and magnitudes.min() == magnitudes.max():
        bits = np.packbits(descriptors > 0, axis=1)
        return {"bits": bits, "like": descriptors[:1]}
    return {"descriptors": descriptors}


def _unpack(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Descriptors from the arrays of `_pack`, exactly."""
    if "bits" not in data:
        return data["descriptors"]
    like = data["like"]
    bits = np.unpackbits(data["bits"], axis=1, count=like.shape[1])
    magnitude = np.abs(like[0, 0])
    return np.where(bits.astype(bool), magnitude, -magnitude)


def _load(file: Path, digest: str) -> Extracted:
    with np.load(file) as data:
        width, height = (int(v) for v in data["image_size"])
        features = Features(data["keypoints"], data["scores"], _unpack(data), (width, height))
        return Extracted(features, float(data["seconds"]), digest)
