"""Scenes to train and evaluate on: images with intrinsics and poses, read from three layouts.

    scene.npz      a folder with images/, scene.npz and optionally points.npz; the evaluation takes
                   this one alone
    COLMAP         a folder with images/ and a sparse model, text or binary: sparse/0, sparse,
                   sparse/manhattan/0 (MegaDepth), colmap/sparse/0, or beside the images folder;
                   cameras without lens distortion
    CAPS           MegaDepth as released with CAPS (Wang et al., ECCV 2020): scene/dense*/aligned
                   with images/, img_cam.txt and pairs.txt

Pixel centres are at integers here; COLMAP has them at halves, which is undone on reading.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError, ScfeatError, import_optional
from scfeat_ros.text_files import read_text
from scfeat_training.image_files import image_size

SCENE_FILE = "scene.npz"
POINTS_FILE = "points.npz"
NO_PAIRS = {"pairs": np.zeros((0, 2)), "overlap": np.zeros(0)}
COLMAP_MODELS = ("sparse/0", "sparse", "sparse/manhattan/0", "colmap/sparse/0", ".")
CAPS_CAMERAS = "aligned/img_cam.txt"
CAPS_DEPTH = (4.0, 400.0)  # the range that CAPS takes for all of its MegaDepth
UNKNOWN_DEPTH = (0.0, np.inf)
UNKNOWN_OVERLAP = 0.5  # of a listed pair whose covisibility is not known
LEAST_SHARED = 15  # points that make a pair of a COLMAP model covisible
HALF_PIXEL = 0.5

# Scenes of the training data that are held out: validation on them selects between models.
VALIDATION_SCENES = ("strecha_castle", "fern", "scodive_cafe")
VALIDATION_TAILS = {"kitti_seq1": 41}  # scene: first frame of its held-out tail
HELD_OUT_FROM = 30  # images of another scene of which the last tenth is held out
SCENE_WEIGHTS = {"liberty": 0.2}  # approximate poses


@dataclass
class Scene:
    """Images of one place with intrinsics and poses.

    names: N files relative to the folder `images`; `paths` are the two joined.
    K (N, 3, 3), R (N, 3, 3), t (N, 3): float64, world to camera, x_cam = R X + t.
    size_wh (N, 2): int, pixels. pairs (M, 2): int, covisible images; overlap (M,) in [0, 1].
    tracks: for each image the sorted ids (n,) of the 3D points that it sees and where, (n, 2)
    pixels; None where there are no points. depth_range (N, 2): near and far z in the scene's
    unit, (0, inf) where unknown. weight: how often the scene is drawn, relative to others.
    """

    name: str
    images: Path
    names: list[str]
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    size_wh: np.ndarray
    pairs: np.ndarray
    overlap: np.ndarray
    tracks: list[tuple[np.ndarray, np.ndarray]] | None = None
    depth_range: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.paths = [self.images / name for name in self.names]
        if len(self.depth_range) != len(self):
            self.depth_range = np.tile(UNKNOWN_DEPTH, (len(self), 1))

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, keep: Sequence[int] | np.ndarray) -> Scene:
        """The scene with the images of the given indices only, in that order."""
        keep = np.asarray(keep, dtype=int)
        new_index = np.full(len(self), -1)
        new_index[keep] = np.arange(len(keep))
        pairs = new_index[self.pairs]
        inside = (pairs >= 0).all(1)
        return replace(
            self,
            names=[self.names[i] for i in keep],
            K=self.K[keep],
            R=self.R[keep],
            t=self.t[keep],
            size_wh=self.size_wh[keep],
            pairs=pairs[inside],
            overlap=self.overlap[inside],
            tracks=None if self.tracks is None else [self.tracks[i] for i in keep],
            depth_range=self.depth_range[keep],
        )

    def shared_points(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (n, 2) in image i and in image j of the 3D points that both see."""
        if self.tracks is None:
            return np.zeros((0, 2)), np.zeros((0, 2))
        ids_i, xy_i = self.tracks[i]
        ids_j, xy_j = self.tracks[j]
        _, at_i, at_j = np.intersect1d(ids_i, ids_j, assume_unique=True, return_indices=True)
        return xy_i[at_i], xy_j[at_j]


def check_camera(where: str, K: np.ndarray, R: np.ndarray, t: np.ndarray) -> str | None:
    """What is wrong with a camera, as one line with `where` and the remedy; None if it is valid."""
    if not (np.isfinite(K).all() and np.isfinite(R).all() and np.isfinite(t).all()):
        return f"{where}: K, R or t is not finite; remove the image from the scene"
    if K[0, 0] <= 0 or K[1, 1] <= 0 or abs(K[2] - (0, 0, 1)).max() > 1e-6 or abs(K[1, 0]) > 1e-6:
        return f"{where}: K is not an intrinsic matrix: want [[fx, s, cx], [0, fy, cy], [0, 0, 1]]"
    if abs(R @ R.T - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0:
        return f"{where}: R is not a rotation: want R R^T = 1 and det R = 1, world to camera"
    return None


def check_file(path: Path, size_wh: np.ndarray) -> str | None:
    """What is wrong with an image file, as one line with its name and the remedy, or None.

    size_wh: (width, height) of the image that K belongs to.
    """
    if not path.is_file():
        return f"{path}: missing; put the file there or remove it from the scene"
    try:
        return check_size(path, size_wh)
    except InputError as error:
        return str(error)


def check_size(path: Path, size_wh: np.ndarray) -> str | None:
    """As `check_file`, of the image's size alone; InputError where the file cannot be read."""
    width, height = image_size(path)
    if (width, height) != tuple(size_wh):
        return (
            f"{path}: is {width}x{height}, but its K is for {size_wh[0]}x{size_wh[1]}; scale K or "
            "the image"
        )
    return None


def is_scene(folder: Path) -> bool:
    """Whether a folder holds scene.npz."""
    return (folder / SCENE_FILE).is_file()


def is_colmap(folder: Path) -> bool:
    """Whether a folder is a COLMAP project, with images/ and a sparse model."""
    return (folder / "images").is_dir() and colmap_model(folder) is not None


def read_scene_file(folder: Path, need_pairs: bool = False) -> Scene:
    """Read only scene.npz of a folder, without checking images and cameras or reading points.

    It holds names (N,), K (N, 3, 3), R (N, 3, 3), t (N, 3), size_wh (N, 2), pairs (M, 2) and
    overlap (M,); see `Scene`. Without `need_pairs` the last two may both be left out.

    Raises:
        InputError: the file cannot be read, lacks an array, or holds one of a wrong shape or
            pairs of images that are not there; the message names file and array.
    """
    file = folder / SCENE_FILE
    keys = ("names", "K", "R", "t", "size_wh", "pairs", "overlap")
    data = _read_npz(file, keys, None if need_pairs else NO_PAIRS)
    if not data["pairs"].size:
        data["pairs"] = NO_PAIRS["pairs"]
    count, pair_count = data["names"].size, data["overlap"].size
    shapes = {"names": (count,), "K": (count, 3, 3), "R": (count, 3, 3), "t": (count, 3)}
    shapes |= {"size_wh": (count, 2), "pairs": (pair_count, 2), "overlap": (pair_count,)}
    _check_arrays(file, data, shapes)
    pairs = data["pairs"].astype(int)
    _check_indices(file, "pairs", pairs, count, "images")
    return Scene(
        name=folder.name,
        images=folder / "images",
        names=[str(name) for name in data["names"]],
        **{key: data[key].astype(np.float64) for key in ("K", "R", "t", "overlap")},
        size_wh=data["size_wh"].astype(int),
        pairs=pairs,
    )


def read_scene(
    folder: str | Path, skip_bad: bool = False, on_bad: Callable[[str], None] = lambda line: None
) -> Scene:
    """Read images/, scene.npz and (where there is one) points.npz of a folder.

    An image that is missing or whose camera is wrong raises InputError; with skip_bad it is left
    out and `on_bad` gets the line. points.npz holds xyz (P, 3) and, for each of M observations,
    obs_image (M,), obs_point (M,) and obs_xy (M, 2).
    """
    folder = Path(folder)
    scene = read_scene_file(folder, need_pairs=True)
    scene.weight = SCENE_WEIGHTS.get(scene.name, 1.0)
    if (folder / POINTS_FILE).exists():
        points = _read_points(folder / POINTS_FILE, len(scene))
        observations = points["obs_image"], points["obs_point"], points["obs_xy"]
        scene.tracks = _tracks(*observations, len(scene))
        scene.depth_range = _depth_ranges(points["xyz"], scene.tracks, scene.R, scene.t)
    return without_bad_images(scene, skip_bad, on_bad)


def without_bad_images(
    scene: Scene, skip_bad: bool = False, on_bad: Callable[[str], None] = lambda line: None
) -> Scene:
    """Check every image's file and camera; raise InputError at the first that is wrong.

    With skip_bad wrong images are left out, and `on_bad` gets one line for each.
    """
    good = []
    for i, path in enumerate(scene.paths):
        problem = check_file(path, scene.size_wh[i])
        problem = problem or check_camera(str(path), scene.K[i], scene.R[i], scene.t[i])
        if problem is None:
            good.append(i)
        elif skip_bad:
            on_bad(problem)
        else:
            raise InputError(f"{problem}, or go on without it by --skip-bad")
    if not good:
        raise InputError(f"{scene.name}: no usable image")
    return scene if len(good) == len(scene) else scene.subset(good)


def read_scenes(
    root: str | Path,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] = lambda line: None,
    names: Sequence[str] = (),
) -> list[Scene]:
    """Read the scenes of a folder, of any layout: those in its folders, or the one it is.

    With skip_bad, scenes and images that cannot be used are left out, and `on_bad` gets a line
    for each; otherwise the first raises InputError. With `names` only these scenes are looked at;
    one that is not there raises InputError.
    """
    root = Path(os.path.abspath(root))  # scenes are called as their folders, also '.'
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder of the training scenes")
    readers = _scene_readers(root)
    if not readers:
        raise InputError(
            f"{root}: no scene in it; want folders with {SCENE_FILE}, with a COLMAP model "
            f"(sparse/0) and images/, or scene/dense*/{CAPS_CAMERAS}"
        )
    known = {name for name, _, _ in readers}
    for name in names:
        if name not in known:
            raise InputError(f"{root}: has no scene '{name}'; it has {sorted(known)}")
    scenes = []
    for name, reader, folder in readers:
        if names and name not in names:
            continue
        try:
            scenes.append(reader(folder, skip_bad, on_bad))
        except InputError as error:
            if not skip_bad:
                raise
            on_bad(str(error))
    if not scenes:
        count = len(names) or len(readers)
        raise InputError(f"{root}: none of its {count} scenes is usable")
    return scenes


Reader = Callable[[Path, bool, Callable[[str], None]], Scene]


def _scene_readers(root: Path) -> list[tuple[str, Reader, Path]]:
    """The scenes in or at `root`, by name: the name, what reads it and its folder."""
    found: list[tuple[str, Reader, Path]] = []
    children = sorted(child for child in root.iterdir() if child.is_dir())
    for folder in (root, *children):
        if is_scene(folder):
            found.append((folder.name, read_scene, folder))
        elif is_colmap(folder):
            found.append((folder.name, read_colmap, folder))
    for depth in ("", "dense*/", "*/dense*/", "*/*/dense*/"):
        for path in sorted(root.glob(depth + CAPS_CAMERAS)):
            found.append((_caps_name(path.parent), read_caps, path.parent))
    return found


def colmap_model(folder: Path) -> Path | None:
    """The folder of the sparse model of a COLMAP project, None where there is none."""
    for name in COLMAP_MODELS:
        model = folder / name
        for ending in (".bin", ".txt"):
            if all((model / f"{part}{ending}").is_file() for part in ("cameras", "images")):
                return model
    return None


def read_colmap(
    folder: str | Path, skip_bad: bool = False, on_bad: Callable[[str], None] = lambda line: None
) -> Scene:
    """Read images/ and the sparse model of a COLMAP project (`COLMAP_MODELS` says where).

    Pairs are images that share `LEAST_SHARED` points or more; overlap is the number shared over
    the smaller of the two numbers seen. Raises InputError for a model that cannot be read, a
    camera with lens distortion, and what `without_bad_images` finds.
    """
    folder = Path(folder)
    model = colmap_model(folder)
    if model is None:
        raise InputError(f"{folder}: no COLMAP model; want cameras and images in sparse/0")
    reconstruction = open_colmap_model(model)
    images = sorted(
        (image for image in reconstruction.images.values() if image.has_pose),
        key=lambda image: image.name,
    )
    if not images:
        raise InputError(f"{model}: no image of the model has a pose")
    names, K, R, t, sizes, observations = [], [], [], [], [], []
    for image in images:
        camera = reconstruction.cameras[image.camera_id]
        if not _is_pinhole(camera):
            line = (
                f"{folder / 'images' / image.name}: its camera model {camera.model_name} distorts; "
                "run colmap image_undistorter and give the result"
            )
            if not skip_bad:
                raise InputError(line)
            on_bad(line)
            continue
        matrix = np.array(camera.calibration_matrix(), float)
        matrix[:2, 2] -= HALF_PIXEL
        pose = image.cam_from_world
        pose = pose() if callable(pose) else pose  # a property before pycolmap 3.12
        matrix34 = np.asarray(pose.matrix(), float)
        seen = image.get_observation_points2D()
        ids = np.array([point.point3D_id for point in seen], dtype=np.int64)
        xy = np.array([point.xy for point in seen], dtype=float).reshape(-1, 2) - HALF_PIXEL
        observations.append((np.full(len(ids), len(names)), ids, xy))
        names.append(image.name)
        K.append(matrix)
        R.append(matrix34[:, :3])
        t.append(matrix34[:, 3])
        sizes.append((camera.width, camera.height))
    if not names:
        raise InputError(f"{model}: no image with a usable camera")

    point_ids = np.array(sorted(reconstruction.points3D), dtype=np.int64)
    xyz = np.array([reconstruction.points3D[i].xyz for i in point_ids]).reshape(-1, 3)
    where, ids, xy = (np.concatenate(column) for column in zip(*observations, strict=True))
    points = np.searchsorted(point_ids, ids)
    tracks = _tracks(where, points, xy, len(names))
    R, t = np.array(R), np.array(t)
    pairs, overlap = _covisible([ids for ids, _ in tracks])
    scene = Scene(
        name=folder.name,
        images=folder / "images",
        names=names,
        K=np.array(K),
        R=R,
        t=t,
        size_wh=np.array(sizes, dtype=int),
        pairs=pairs,
        overlap=overlap,
        tracks=tracks,
        depth_range=_depth_ranges(xyz, tracks, R, t),
    )
    return without_bad_images(scene, skip_bad, on_bad)


def _is_pinhole(camera: Any) -> bool:
    # of a fisheye or spherical camera COLMAP says that it is undistorted
    name = camera.model_name
    return "FISHEYE" not in name and name != "EQUIRECTANGULAR" and camera.is_undistorted()


def open_colmap_model(model: Path) -> Any:
    """The pycolmap.Reconstruction in a folder.

    Raises:
        InputError: pycolmap is not installed, or there is no whole model in the folder.
    """
    try:
        pycolmap = import_optional("pycolmap", f"{model}: reading a COLMAP model")
    except ScfeatError as error:  # the scene's fault, which --skip-bad leaves out
        raise InputError(str(error)) from error
    ending = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    for part in ("cameras", "images", "points3D"):
        if not (model / f"{part}{ending}").is_file():
            raise InputError(f"{model}: {part}{ending} is missing; export the whole model")
    if ending == ".bin":
        for part, end in _RECORD_ENDS.items():
            if (model / part).is_file():  # rigs and frames came with COLMAP 3.12
                _check_whole(model / part, end)
    else:
        _check_names(model / "images.txt")
    try:
        reconstruction = pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap passes on whatever its C++ side throws
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged file"
        raise InputError(f"{model}: the COLMAP model cannot be read ({reason})") from error
    if ending == ".bin":
        # id, model, size and parameters, whose number only the model tells
        cameras = reconstruction.cameras.values()
        _check_size(model / "cameras.bin", 8 + sum(24 + 8 * len(c.params) for c in cameras))
    return reconstruction


def _check_names(path: Path) -> None:
    """Raise InputError where a name in images.txt has a space: COLMAP reads it up to there."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    for number, line in lines:
        if line.strip() and not line.startswith("#"):
            if len(line.split()) > 10:
                raise InputError(
                    f"{path}, line {number}: COLMAP reads no name with spaces from a text model; "
                    "give the binary one"
                )
            next(lines, None)  # the image's points, which may be none


def _check_whole(path: Path, end: Callable[[bytes, int], int]) -> None:
    """Check that a binary model file is complete; COLMAP's reader may hang on a truncated file.

    end: function of the file's content and a record's offset that returns the record's end.
    """
    content = path.read_bytes()
    try:
        (count,) = struct.unpack_from("<Q", content)
        at = 8
        for _ in range(count):
            at = end(content, at)
    except (struct.error, ValueError):
        at = len(content) + 1
    _check_size(path, at)


def _check_size(path: Path, wanted: int) -> None:
    """Raise InputError where a model file has fewer bytes than its records take."""
    size = path.stat().st_size
    if size < wanted:
        raise InputError(f"{path}: ends too early, at {size} bytes; copy or export the model again")


def _image_end(content: bytes, at: int) -> int:
    # id, rotation, translation, camera; a name that ends with a zero byte; x, y, id per point
    name_end = content.index(b"\0", at + 64)
    (points,) = struct.unpack_from("<Q", content, name_end + 1)
    return name_end + 9 + 24 * points


def _point_end(content: bytes, at: int) -> int:
    # id, position, colour, error; image and number of each observation
    (observations,) = struct.unpack_from("<Q", content, at + 43)
    return at + 51 + 8 * observations


def _frame_end(content: bytes, at: int) -> int:
    # id, rig, pose; sensor and number of each image
    (images,) = struct.unpack_from("<I", content, at + 64)
    return at + 68 + 16 * images


def _rig_end(content: bytes, at: int) -> int:
    # id; the reference sensor, then the others, each with or without a pose
    (sensors,) = struct.unpack_from("<I", content, at + 4)
    at += 16 if sensors else 8
    for _ in range(sensors - 1):
        (posed,) = struct.unpack_from("<B", content, at + 8)
        at += 9 + (56 if posed else 0)
    return at


_RECORD_ENDS = {
    "images.bin": _image_end,
    "points3D.bin": _point_end,
    "frames.bin": _frame_end,
    "rigs.bin": _rig_end,
}


def _covisible(seen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (M, 2) of images that share points, i < j, and their overlap (M,).

    seen: for each image the ids of its points.
    """
    count = len(seen)
    image = np.repeat(np.arange(count), [len(ids) for ids in seen])
    point = np.concatenate(seen)
    order = np.lexsort((image, point))
    image, point = image[order], point[order]
    starts = np.flatnonzero(np.diff(point, prepend=-1))
    lengths = np.diff(starts, append=len(point))
    shared = np.zeros(count * count, np.int64)
    for length in np.unique(lengths[lengths > 1]):  # all tracks of a length at a time
        begin = starts[lengths == length]
        first, second = np.triu_indices(length, 1)
        for some in np.array_split(begin, 1 + len(begin) * len(first) // 4_000_000):
            code = image[some[:, None] + first] * count + image[some[:, None] + second]
            shared += np.bincount(code.ravel(), minlength=count * count)
    pairs = np.argwhere(shared.reshape(count, count) >= LEAST_SHARED)
    number = np.array([len(ids) for ids in seen])
    smaller = np.minimum(number[pairs[:, 0]], number[pairs[:, 1]])
    return pairs, shared.reshape(count, count)[pairs[:, 0], pairs[:, 1]] / np.maximum(smaller, 1)


def read_caps(
    folder: str | Path, skip_bad: bool = False, on_bad: Callable[[str], None] = lambda line: None
) -> Scene:
    """Read an `aligned` folder of the MegaDepth that CAPS released.

    img_cam.txt has a line per image: name, width, height, fx, fy, cx, cy, nine entries of R row
    by row, three of t (world to camera); pairs.txt two names a line. The covisibility of pairs
    is not known and counts as `UNKNOWN_OVERLAP`; the depth range is `CAPS_DEPTH`. pairs.txt may be
    absent: then the scene has no pairs, its photos serve for homographies, and `on_bad` is told.
    """
    folder = Path(folder)
    listing, pair_file = folder / "img_cam.txt", folder / "pairs.txt"
    names, values = [], []
    for number, words in _words(listing):
        try:
            numbers = np.array([float(word) for word in words[1:]])
            if len(numbers) != 18:
                raise ValueError(f"{len(words)} columns instead of 19")
        except ValueError as error:
            line = f"{listing}, line {number}: {error}; remove or correct the line"
            if not skip_bad:
                raise InputError(line) from None
            on_bad(line)
            continue
        names.append(words[0])
        values.append(numbers)
    if not names:
        raise InputError(f"{listing}: names no image")
    table = np.array(values)
    K = np.tile(np.eye(3), (len(names), 1, 1))
    K[:, 0, 0], K[:, 1, 1] = table[:, 2], table[:, 3]
    K[:, :2, 2] = table[:, 4:6] - HALF_PIXEL
    index = {name: number for number, name in enumerate(names)}
    pairs = []
    lines = _words(pair_file) if pair_file.exists() else []
    if not pair_file.exists():
        on_bad(f"{pair_file}: is not there, so the scene has no posed pairs; its photos are used")
    for number, words in lines:
        if len(words) != 2 or not all(word in index for word in words):
            line = f"{pair_file}, line {number}: not two images of {listing.name}; remove the line"
            if not skip_bad:
                raise InputError(line)
            on_bad(line)
            continue
        pairs.append(sorted(index[word] for word in words))
    scene = Scene(
        name=_caps_name(folder),
        images=folder / "images",
        names=names,
        K=K,
        R=table[:, 6:15].reshape(-1, 3, 3),
        t=table[:, 15:18],
        size_wh=table[:, :2].astype(int),
        pairs=np.array(pairs, dtype=int).reshape(-1, 2),
        overlap=np.full(len(pairs), UNKNOWN_OVERLAP),
        depth_range=np.tile(CAPS_DEPTH, (len(names), 1)),
    )
    return without_bad_images(scene, skip_bad, on_bad)


def _caps_name(folder: Path) -> str:
    """What the scene of an `aligned` folder is called, 0042_dense0."""
    return "_".join(folder.parts[-3:-1])


def _words(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and words of the lines of a text file that are not empty or comments."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    split = [(number, line.split()) for number, line in lines]
    return [(number, words) for number, words in split if words and not words[0].startswith("#")]


def split_scenes(scenes: Sequence[Scene]) -> tuple[list[Scene], list[Scene]]:
    """Training scenes and held-out scenes for validation; no image is in both.

    `VALIDATION_SCENES` and `VALIDATION_TAILS` are held out; if none of these is among the scenes,
    the last tenth of the images of each scene of `HELD_OUT_FROM` or more is.
    """
    known = any(s.name in VALIDATION_SCENES or s.name in VALIDATION_TAILS for s in scenes)
    train, held_out = [], []
    for scene in scenes:
        tail = VALIDATION_TAILS.get(scene.name)
        if not known and len(scene) >= HELD_OUT_FROM:
            tail = len(scene) - len(scene) // 10
        if scene.name in VALIDATION_SCENES:
            held_out.append(scene)
        elif tail is not None and tail < len(scene):
            train.append(scene.subset(np.arange(tail)))
            held_out.append(scene.subset(np.arange(tail, len(scene))))
        else:
            train.append(scene)
    return train, held_out


def has_pairs(scenes: Sequence[Scene]) -> bool:
    """Whether any of the scenes has covisible pairs of images."""
    return any(len(scene.pairs) for scene in scenes)


def photo_paths(scenes: Sequence[Scene]) -> list[Path]:
    """The image files of all scenes."""
    return [path for scene in scenes for path in scene.paths]


def _read_npz(
    path: Path, keys: tuple[str, ...], optional: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Arrays of a file; those of `optional` stand in where the file has none of them."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in keys if key in data}
    except Exception as error:  # numpy, zipfile and pickle each raise their own
        raise InputError(f"{path}: unreadable ({error}); make it again") from error
    if optional is not None and optional.keys().isdisjoint(arrays):
        arrays |= optional
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InputError(f"{path}: lacks the array(s) {', '.join(missing)}")
    return arrays


def _read_points(file: Path, images: int) -> dict[str, np.ndarray]:
    """The arrays of points.npz of a scene of so many images; raises InputError as it does."""
    points = _read_npz(file, ("xyz", "obs_image", "obs_point", "obs_xy"))
    count, observed = len(np.atleast_1d(points["xyz"])), points["obs_image"].size
    shapes = {"xyz": (count, 3), "obs_image": (observed,), "obs_point": (observed,)}
    _check_arrays(file, points, {**shapes, "obs_xy": (observed, 2)})
    for key, most, what in (("obs_image", images, "images"), ("obs_point", count, "points")):
        points[key] = points[key].astype(int)
        _check_indices(file, key, points[key], most, what)
    return points


def _check_arrays(
    file: Path, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise InputError where an array of a file is of another shape, or none of numbers."""
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise InputError(f"{file}: {key} has shape {arrays[key].shape}, want {shape}")
        if key != "names" and arrays[key].dtype.kind not in "biuf":
            raise InputError(f"{file}: {key} holds {arrays[key].dtype}, want numbers")


def _check_indices(file: Path, key: str, indices: np.ndarray, count: int, what: str) -> None:
    """Raise InputError where indices of a file are not below `count`."""
    if indices.size and not (0 <= indices.min() and indices.max() < count):
        raise InputError(f"{file}: {key} name {what} beyond the {count} there are")


def _tracks(
    image: np.ndarray, point: np.ndarray, xy: np.ndarray, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations grouped by image, each sorted by point, one per point."""
    order = np.lexsort((point, image))
    image, point, xy = image[order], point[order], xy[order].astype(np.float64)
    starts = np.searchsorted(image, np.arange(count + 1))
    tracks = []
    for begin, end in itertools.pairwise(starts):
        ids, first = np.unique(point[begin:end], return_index=True)
        tracks.append((ids, xy[begin:end][first]))
    return tracks


def _depth_ranges(
    xyz: np.ndarray,
    tracks: list[tuple[np.ndarray, np.ndarray]],
    R: np.ndarray,
    t: np.ndarray,
) -> np.ndarray:
    """Near and far depth (N, 2) of the sparse points of each image, with a margin."""
    ranges = np.tile(UNKNOWN_DEPTH, (len(tracks), 1))
    for i, (ids, _) in enumerate(tracks):
        depth = xyz[ids] @ R[i, 2] + t[i, 2]
        depth = depth[depth > 0]
        if len(depth) >= 10:
            near, far = np.percentile(depth, [1, 99])
            ranges[i] = 0.7 * near, 1.5 * far
    return ranges
