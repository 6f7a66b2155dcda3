"""What the tasks read besides scenes: folders of them, pairs files, homographies, image folders."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_ros.sources import image_files
from scfeat_ros.text_files import read_text
from scfeat_training.scenes import (
    Scene,
    check_camera,
    check_size,
    is_colmap,
    is_scene,
    read_colmap,
    read_scene_file,
)


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


def find_scenes(folder: Path) -> list[Path]:
    """The folder itself if it is a scene or a COLMAP project, else those directly inside it."""
    folder = Path(folder)
    if is_posed(folder):
        return [folder]
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_posed(p))


def is_posed(folder: Path) -> bool:
    """Whether a folder is a scene or a COLMAP project."""
    return is_scene(folder) or is_colmap(folder)


def read_usable_scene(folder: Path, K: np.ndarray | None = None) -> tuple[Scene, list[str]]:
    """A scene without the images whose camera is wrong, and one sentence for each of these.

    Wrong is a camera for another size than the image's, too. Images that cannot be read stay: who
    wants their features says so.

    Args:
        folder: with scene.npz, or a COLMAP project (see `scenes.read_colmap`).
        K: (3, 3) intrinsics that go before those of the scene.

    Raises:
        InputError: the cameras cannot be read, or none of them is right.
    """
    if not is_scene(folder):
        problems: list[str] = []
        scene = read_colmap(folder, skip_bad=True, on_bad=problems.append)
        if K is not None:
            scene.K[:] = K
        return scene, problems
    scene = read_scene_file(folder)
    if K is not None:
        scene.K[:] = K
    good: list[int] = []
    problems = []
    for i, path in enumerate(scene.paths):
        problem = check_camera(str(path), scene.K[i], scene.R[i], scene.t[i])
        if problem is None and scene.size_wh[i].min() < 1:
            problem = f"{path}: size_wh is not positive"
        if problem is None and K is None:
            with suppress(InputError):
                problem = check_size(path, scene.size_wh[i])
        if problem is None:
            good.append(i)
        else:
            problems.append(problem)
    if not good:
        raise InputError(f"{folder}: no usable camera; first reason: {(problems or ['none'])[0]}")
    return (scene.subset(good) if problems else scene), problems


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
        InputError: the file cannot be read, or no line of it can be used.
    """
    pairs, problems = [], []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 38:
            problems.append(f"{file.name}, line {number}: {len(fields)} fields in place of 38")
            continue
        try:
            values = np.array([float(v) for v in fields[2:]])
        except ValueError:
            problems.append(f"{file.name}, line {number}: a field is not a number")
            continue
        if values[:2].any():
            problems.append(f"{file.name}, line {number}: rotated images are not supported")
            continue
        K1, K2, pose = (values[a:b] for a, b in ((2, 11), (11, 20), (20, 36)))
        K1, K2, pose = K1.reshape(3, 3), K2.reshape(3, 3), pose.reshape(4, 4)
        R, t = pose[:3, :3], pose[:3, 3]
        where = f"{file.name}, line {number}"
        problem = check_camera(where, K1, R, t) or check_camera(where, K2, R, t)
        if problem is not None:
            problems.append(problem)
            continue
        pairs.append(PosedPair(images / fields[0], images / fields[1], K1, K2, R, t))
    if not pairs:
        raise InputError(
            f"{file}: no line can be used as a pair ({problems[0] if problems else 'it is empty'})"
        )
    return pairs, problems


def load_homography(file: Path) -> np.ndarray:
    """(3, 3) homography from a text file of nine numbers.

    Raises:
        InputError: the file cannot be read, or holds not nine finite numbers or a singular matrix.
    """
    try:
        values = [float(v) for v in read_text(file).split()]
    except ValueError as error:
        raise InputError(f"{file}: not a text file of nine numbers") from error
    if len(values) != 9:
        raise InputError(f"{file}: {len(values)} numbers, a homography has nine")
    H = np.array(values).reshape(3, 3)
    if not np.isfinite(H).all() or np.linalg.cond(H) > 1e12:
        raise InputError(f"{file}: the homography is singular or not finite")
    return H
