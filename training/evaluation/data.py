"""What the tasks read: scenes, pairs files, homography sequences, image folders.

The scene format is a folder with `images/` and `scene.npz`: names (N,), K (N, 3, 3), R (N, 3, 3)
and t (N, 3), world to camera, size_wh (N, 2), pairs (M, 2) and overlap (M,), the share of common
3D points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_ros.sources import image_files


def require_folder(path: Path, layout: str) -> Path:
    """The folder, if it is there and not empty.

    Raises:
        InputError: the message says what layout is expected.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--data {path}: no such folder. Expected: {layout}")
    if not path.is_dir():
        raise InputError(f"--data {path}: not a folder. Expected: {layout}")
    if not any(path.iterdir()):
        raise InputError(f"--data {path}: the folder is empty. Expected: {layout}")
    return path


def list_images(folder: Path) -> list[Path]:
    """Image files in a folder and below it, in natural order."""
    return image_files(Path(folder).rglob("*"))


@dataclass(frozen=True)
class Scene:
    """Posed images; see the module's text. Arrays as stored, `pairs` and `overlap` may be empty."""

    folder: Path
    names: list[str]
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    size_wh: np.ndarray
    pairs: np.ndarray
    overlap: np.ndarray

    def path(self, index: int) -> Path:
        """Image file of an image."""
        return self.folder / "images" / self.names[index]

    def __len__(self) -> int:
        return len(self.names)


def is_scene(folder: Path) -> bool:
    """Whether a folder holds a scene."""
    return (Path(folder) / "scene.npz").is_file()


def load_scene(folder: Path) -> Scene:
    """Read a scene.

    Raises:
        InputError: scene.npz is unreadable or lacks a key.
    """
    folder = Path(folder)
    file = folder / "scene.npz"
    try:
        with np.load(file) as data:
            count = len(data["names"])
            has_pairs = "pairs" in data.files
            scene = Scene(
                folder,
                [str(name) for name in data["names"]],
                np.asarray(data["K"], np.float64).reshape(count, 3, 3),
                np.asarray(data["R"], np.float64).reshape(count, 3, 3),
                np.asarray(data["t"], np.float64).reshape(count, 3),
                np.asarray(data["size_wh"], np.int64).reshape(count, 2),
                np.asarray(data["pairs"] if has_pairs else np.zeros((0, 2)), np.int64),
                np.asarray(data["overlap"] if has_pairs else np.zeros(0), np.float64),
            )
    except KeyError as error:
        raise InputError(f"{file}: {error.args[0]}") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    return scene


def find_scenes(folder: Path) -> list[Path]:
    """The folder itself if it is a scene, else the scenes directly inside it."""
    folder = Path(folder)
    if is_scene(folder):
        return [folder]
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_scene(p))


@dataclass(frozen=True)
class PosedPair:
    """Two images with intrinsics and relative pose x_2 = R x_1 + t."""

    first: Path
    second: Path
    K1: np.ndarray
    K2: np.ndarray
    R: np.ndarray
    t: np.ndarray


def parse_pairs_file(file: Path, images: Path) -> tuple[list[PosedPair], list[str]]:
    """Read a pairs file in SuperGlue's format.

    A line has 38 fields: two names, two EXIF rotations (which must be 0), K of both images row by
    row, and the 4x4 pose of the second camera relative to the first.

    Returns:
        The pairs, and one sentence for each line that cannot be used.

    Raises:
        InputError: no line can be used.
    """
    pairs, problems = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 38:
            problems.append(f"{file.name}, line {number}: {len(fields)} fields in place of 38")
            continue
        try:
            values = np.array([float(v) for v in fields[2:]])
        except ValueError:
            problems.append(f"{file.name}, line {number}: a field is no number")
            continue
        if values[:2].any():
            problems.append(f"{file.name}, line {number}: rotated images are not supported")
            continue
        pose = values[20:].reshape(4, 4)
        pairs.append(
            PosedPair(
                images / fields[0],
                images / fields[1],
                values[2:11].reshape(3, 3),
                values[11:20].reshape(3, 3),
                pose[:3, :3],
                pose[:3, 3],
            )
        )
    if not pairs:
        raise InputError(
            f"{file}: no line can be used as a pair ({problems[0] if problems else 'it is empty'})"
        )
    return pairs, problems


def load_homography(file: Path) -> np.ndarray:
    """(3, 3) homography from a text file of nine numbers.

    Raises:
        InputError: missing, not nine finite numbers, or singular.
    """
    try:
        values = [float(v) for v in file.read_text(encoding="utf-8").split()]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{file}: not a text file of nine numbers") from error
    if len(values) != 9:
        raise InputError(f"{file}: {len(values)} numbers, a homography has nine")
    H = np.array(values).reshape(3, 3)
    if not np.isfinite(H).all() or np.linalg.cond(H) > 1e12:
        raise InputError(f"{file}: the homography is singular or not finite")
    return H
