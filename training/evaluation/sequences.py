"""Image sequences for the odometry task: scene, COLMAP, KITTI, TUM, EuRoC, bag or plain images.

All become one `Sequence`: image files, intrinsics, distortion, and camera poses where known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from scfeat_ros.camera import Camera
from scfeat_ros.errors import InputError
from scfeat_ros.ground_truth import rotation_of
from scfeat_ros.sources import BagSource
from scfeat_ros.text_files import read_text
from scfeat_training.evaluation.data import (
    is_posed,
    list_images,
    read_usable_scene,
    require_folder,
)
from scfeat_training.geometry import intrinsic_matrix
from scfeat_training.image_files import write_image
from scfeat_training.scenes import check_camera

LAYOUT = (
    "a scene (images/ and scene.npz), a COLMAP project (images/ and sparse/0), a KITTI sequence "
    "(image_0/ or image_2/, calib.txt, poses.txt), a TUM sequence (rgb.txt, groundtruth.txt), a "
    "EuRoC sequence (mav0/cam0), a bag (.mcap, .db3, .bag or a ROS 2 bag folder), or a folder of "
    "images with --intrinsics"
)
MAX_TIME_DIFFERENCE = 0.02
"""Seconds between an image and the ground-truth pose that is taken for it."""

BAG_SUFFIXES = (".mcap", ".db3", ".bag")


@dataclass
class Sequence:
    """Consecutive images of one camera.

    Attributes:
        name: for titles.
        frames: image files in order.
        camera: intrinsics and distortion.
        poses: (N, 4, 4) camera to world in metres, or None.
        stamps: (N,) seconds, or None.
        skipped: what was left out, one sentence each.
    """

    name: str
    frames: list[Path]
    camera: Camera
    poses: np.ndarray | None = None
    stamps: np.ndarray | None = None
    skipped: list[str] = field(default_factory=list)

    def undistort(self, points: np.ndarray) -> np.ndarray:
        """(M, 2) pixels as stored -> float64 pixels of the ideal pinhole camera with the same K.

        NaN where the lens model has no inverse.
        """
        if not self.camera.distorts:
            return np.asarray(points, np.float64)
        return (self.camera.bearings(points).astype(np.float64) @ self.camera.K.T)[:, :2]

    def select(self, chosen: np.ndarray) -> Sequence:
        """The frames at the given indices."""
        return Sequence(
            self.name,
            [self.frames[i] for i in chosen],
            self.camera,
            None if self.poses is None else self.poses[chosen],
            None if self.stamps is None else self.stamps[chosen],
            self.skipped,
        )


def load_sequence(
    data: Path,
    intrinsics: list[float] | None = None,
    poses: Path | None = None,
    topic: str | None = None,
    pose_topic: str | None = None,
    frames_folder: Path | None = None,
) -> Sequence:
    """Find out which layout a path has and read it.

    Args:
        data: folder or bag.
        intrinsics: fx, fy, cx, cy and distortion coefficients; goes before those of the data.
        poses: KITTI poses file, where it does not lie in the sequence's folder.
        topic: image topic of a bag, needed where it has several.
        pose_topic: topic of a bag with PoseStamped, Odometry or TransformStamped poses of the
            camera's optical frame.
        frames_folder: where the images of a bag are put.

    Raises:
        InputError: no known layout, or an incomplete one.
    """
    data = Path(data)
    camera = camera_from_numbers(intrinsics) if intrinsics else None
    if data.suffix in BAG_SUFFIXES or (data / "metadata.yaml").is_file():
        sequence = _load_bag(data, camera, topic, pose_topic, frames_folder)
    else:
        require_folder(data, LAYOUT)
        if is_posed(data):
            sequence = _load_scene_sequence(data, camera)
        elif (data / "calib.txt").is_file():
            sequence = _load_kitti(data, camera, poses)
        elif (data / "rgb.txt").is_file():
            sequence = _load_tum(data, camera)
        elif (data / "mav0" / "cam0").is_dir() or (data / "cam0").is_dir():
            sequence = _load_euroc(data, camera)
        else:
            sequence = _load_images(data, camera)
    if len(sequence.frames) < 2:
        raise InputError(f"--data {data}: {len(sequence.frames)} images, odometry needs at least 2")
    return sequence


def camera_from_numbers(numbers: list[float]) -> Camera:
    """A pinhole camera from fx, fy, cx, cy and 0, 4, 5 or 8 distortion coefficients.

    Raises:
        InputError: another count, or no focal length.
    """
    if len(numbers) not in (4, 8, 9, 12):
        raise InputError(
            f"--intrinsics has {len(numbers)} numbers; it takes fx,fy,cx,cy and then 0, 4, 5 or 8 "
            "distortion coefficients (k1,k2,p1,p2,k3,...)"
        )
    model = "rational_polynomial" if len(numbers) == 12 else "plumb_bob"
    try:
        return Camera(intrinsic_matrix(*numbers[:4]), np.array(numbers[4:]), model)
    except InputError as error:
        raise InputError(f"--intrinsics: {error}") from error


def invert(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(4, 4) camera to world from world to camera."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R.T, -R.T @ t
    return pose


def quaternion_pose(position: np.ndarray, xyzw: np.ndarray) -> np.ndarray:
    """(4, 4) matrix from a position and a quaternion in the order x, y, z, w.

    Raises:
        ValueError: they are not seven finite numbers, or the quaternion is zero.
    """
    numbers = np.array([*position, *xyzw], np.float64)
    norm = np.linalg.norm(numbers[3:])
    if len(numbers) != 7 or not np.isfinite(numbers).all() or norm == 0:
        raise ValueError("no finite position and quaternion")
    pose = np.eye(4)
    pose[:3, :3] = rotation_of(numbers[3:] / norm)
    pose[:3, 3] = position
    return pose


def read_rows(
    file: Path, parse: Callable[[list[str]], Any], skipped: list[str], separator: str | None = None
) -> list[Any]:
    """What `parse` makes of the fields of each line that is neither empty nor a comment.

    A line that it refuses by a ValueError gives None and one sentence in `skipped`.

    Raises:
        InputError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            rows.append(parse([field.strip() for field in line.split(separator)]))
        except ValueError as error:
            skipped.append(f"{file}, line {number} left out: {error}")
            rows.append(None)
    return rows


def read_stamped(
    file: Path, parse: Callable[[list[str]], Any], skipped: list[str], separator: str | None = None
) -> tuple[np.ndarray, list[Any]]:
    """Time stamps (N,), seconds, and what belongs to them; lines that cannot be used are skipped.

    Raises:
        InputError: the file cannot be read, or no line can be used.
    """
    bad: list[str] = []
    rows = [row for row in read_rows(file, parse, bad, separator) if row is not None]
    if not rows:
        raise InputError(f"{file}: no line can be used ({bad[0] if bad else 'it is empty'})")
    skipped += bad
    return np.array([row[0] for row in rows]), [row[1] for row in rows]


def _stamp(text: str, unit: float = 1.0) -> float:
    """Seconds from a number in the given unit; raises ValueError if it is not finite."""
    stamp = (int(text) if unit < 1 else float(text)) * unit
    if not np.isfinite(stamp):
        raise ValueError(f"the time stamp {text} is not finite")
    return stamp


def attach_poses(sequence: Sequence, pose_stamps: np.ndarray, poses: np.ndarray) -> Sequence:
    """Keep the frames that have a pose within `MAX_TIME_DIFFERENCE`, with the nearest one.

    Raises:
        InputError: no frame has one.
    """
    order = np.argsort(pose_stamps)
    pose_stamps, poses = pose_stamps[order], poses[order]
    right = np.clip(np.searchsorted(pose_stamps, sequence.stamps), 1, len(pose_stamps) - 1)
    nearest = right - (
        np.abs(sequence.stamps - pose_stamps[right - 1])
        < np.abs(sequence.stamps - pose_stamps[right])
    )
    near = np.abs(sequence.stamps - pose_stamps[nearest]) <= MAX_TIME_DIFFERENCE
    if near.sum() < 2:
        raise InputError(
            f"{sequence.name}: fewer than two images have a ground-truth pose within "
            f"{1000 * MAX_TIME_DIFFERENCE:g} ms; are the time stamps of one clock?"
        )
    kept = sequence.select(np.flatnonzero(near))
    kept.poses = poses[nearest[near]]
    if not near.all():
        kept.skipped.append(f"{int((~near).sum())} images without a ground-truth pose left out")
    return kept


def _load_scene_sequence(folder: Path, camera: Camera | None) -> Sequence:
    scene, skipped = read_usable_scene(folder, None if camera is None else camera.K)
    if np.abs(scene.K - scene.K[0]).max() > 1e-6:
        raise InputError(
            f"{folder}: the images have different intrinsics, so this is not a sequence"
        )
    poses = np.stack([invert(R, t) for R, t in zip(scene.R, scene.t, strict=True)])
    camera = camera or Camera(scene.K[0])
    return Sequence(folder.name, scene.paths, camera, poses, skipped=skipped)


def _load_bag(
    path: Path,
    camera: Camera | None,
    topic: str | None,
    pose_topic: str | None,
    frames_folder: Path,
) -> Sequence:
    """Images of a bag, written as PNG files, with the bag's CameraInfo and poses."""
    source = BagSource(path, topic, poses=pose_topic)
    frames_folder.mkdir(parents=True, exist_ok=True)
    frames, stamps, poses = [], [], []
    try:
        for frame in source.frames():
            camera = camera or frame.camera
            # by number: stamps may come twice
            file = frames_folder / f"{len(frames):06d}.png"
            image = frame.image if frame.image.ndim == 2 else frame.image[..., ::-1]
            # level 1 is quick; the format is lossless, so features are those of the bag's image
            write_image(file, image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            frames.append(file)
            stamps.append(frame.stamp * 1e-9)
            poses.append(None if frame.pose is None else (frame.pose.R, frame.pose.position))
    finally:
        source.close()
    if camera is None:
        raise InputError(f"{path}: no CameraInfo for {source.topic}; give --intrinsics")
    account = source.account
    skipped = [f"{count} images: {reason}" for reason, count in account.skipped.items()]
    skipped += account.damage.places
    sequence = Sequence(path.stem, frames, camera, stamps=np.array(stamps), skipped=skipped)
    known = [i for i, pose in enumerate(poses) if pose is not None]
    if not known:
        return sequence
    if len(known) < len(poses):
        skipped.append(f"{len(poses) - len(known)} images without a ground-truth pose left out")
    sequence = sequence.select(np.array(known))
    sequence.poses = np.tile(np.eye(4), (len(known), 1, 1))
    for row, index in enumerate(known):
        sequence.poses[row, :3, :3], sequence.poses[row, :3, 3] = poses[index]
    return sequence


def _load_kitti(folder: Path, camera: Camera | None, poses_file: Path | None) -> Sequence:
    cameras = {"image_0": "P0", "image_2": "P2"}
    found = [name for name in cameras if (folder / name).is_dir() and list_images(folder / name)]
    if not found:
        raise InputError(f"{folder}: calib.txt, but no images in image_0/ or image_2/")
    images, key = list_images(folder / found[0]), cameras[found[0]]
    P = None
    for line in read_text(folder / "calib.txt").splitlines():
        label, _, numbers = line.partition(":")
        if label.strip() == key:
            try:
                P = np.array(numbers.split(), float).reshape(3, 4)
            except ValueError:
                P = None
    if P is None:
        raise InputError(f"{folder / 'calib.txt'}: no line '{key}:' with twelve numbers")
    K = P[:, :3]
    problem = check_camera(f"{folder / 'calib.txt'}, {key}", K, np.eye(3), P[:, 3])
    if problem is not None:
        raise InputError(problem)
    sequence = Sequence(folder.name, images, camera or Camera(K))
    if poses_file is not None and not poses_file.is_file():
        raise InputError(f"--poses {poses_file}: no such file")
    beside = folder.parent.parent / "poses" / f"{folder.name}.txt"
    candidates = [poses_file, folder / "poses.txt", beside]
    file = next((f for f in candidates if f is not None and f.is_file()), None)
    if file is not None:
        rows = read_rows(file, _kitti_pose, sequence.skipped)
        if len(rows) != len(images):
            raise InputError(
                f"{file}: {len(rows)} rows for {len(images)} images, expected 12 numbers for each "
                "image"
            )
        good = [i for i, row in enumerate(rows) if row is not None]
        if not good:
            raise InputError(f"{file}: no pose can be used ({sequence.skipped[-1]})")
        sequence = sequence.select(np.array(good))
        poses = np.stack([rows[i] for i in good])
        # the poses are those of camera 0; another camera sits beside it by P[:, 3]
        offset = np.eye(4)
        offset[:3, 3] = -np.linalg.inv(K) @ P[:, 3]
        sequence.poses = poses @ offset
    return sequence


def _kitti_pose(fields: list[str]) -> np.ndarray:
    """(4, 4) camera to world from twelve numbers."""
    if len(fields) != 12:
        raise ValueError(f"{len(fields)} fields in place of 12")
    pose = np.eye(4)
    pose[:3] = np.array(fields, float).reshape(3, 4)
    if check_camera("", np.eye(3), pose[:3, :3], pose[:3, 3]) is not None:
        raise ValueError("no finite pose with a rotation")
    return pose


def _tum_image(fields: list[str]) -> tuple[float, str]:
    if len(fields) != 2:
        raise ValueError(f"{len(fields)} fields in place of 2")
    return _stamp(fields[0]), fields[1]


def _tum_pose(fields: list[str]) -> tuple[float, np.ndarray]:
    """Seconds, position, and a quaternion as x, y, z, w."""
    if len(fields) != 8:
        raise ValueError(f"{len(fields)} fields in place of 8")
    values = [float(v) for v in fields[1:]]
    return _stamp(fields[0]), quaternion_pose(values[:3], values[3:])


def _load_tum(folder: Path, camera: Camera | None) -> Sequence:
    if camera is None:
        raise InputError(
            f"{folder}: a TUM sequence does not hold its intrinsics; give --intrinsics, e.g. "
            "--intrinsics 517.3,516.5,318.6,255.3,0.2624,-0.9531,-0.0054,0.0026,1.1633 (freiburg1)"
        )
    skipped: list[str] = []
    stamps, names = read_stamped(folder / "rgb.txt", _tum_image, skipped)
    frames = [folder / name for name in names]
    sequence = Sequence(folder.name, frames, camera, stamps=stamps, skipped=skipped)
    file = folder / "groundtruth.txt"
    if not file.is_file():
        return sequence
    pose_stamps, poses = read_stamped(file, _tum_pose, skipped)
    return attach_poses(sequence, pose_stamps, np.stack(poses))


def _euroc_image(fields: list[str]) -> tuple[float, str]:
    if len(fields) < 2:
        raise ValueError(f"{len(fields)} fields in place of 2")
    return _stamp(fields[0], 1e-9), fields[1]


def _euroc_pose(fields: list[str]) -> tuple[float, np.ndarray]:
    """Nanoseconds, position, and a quaternion as w, x, y, z; what follows is not read."""
    if len(fields) < 8:
        raise ValueError(f"{len(fields)} fields in place of 8")
    values = [float(v) for v in fields[1:8]]
    return _stamp(fields[0], 1e-9), quaternion_pose(values[:3], [*values[4:], values[3]])


def _load_euroc(folder: Path, camera: Camera | None) -> Sequence:
    root = folder / "mav0" if (folder / "mav0").is_dir() else folder
    source = root / "cam0"
    try:
        sensor = yaml.safe_load((source / "sensor.yaml").read_text(encoding="utf-8"))
        camera = camera or Camera(
            intrinsic_matrix(*sensor["intrinsics"]),
            np.array(sensor["distortion_coefficients"], float),
            {"radial-tangential": "plumb_bob"}.get(
                sensor["distortion_model"], sensor["distortion_model"]
            ),
        )
        camera_in_body = np.array(sensor["T_BS"]["data"], float).reshape(4, 4)
        R, t = camera_in_body[:3, :3], camera_in_body[:3, 3]
        if check_camera("", np.eye(3), R, t) is not None:
            raise ValueError("T_BS is not a finite pose with a rotation")
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError, InputError) as error:
        raise InputError(f"{source / 'sensor.yaml'}: cannot be used ({error})") from error
    skipped: list[str] = []
    stamps, names = read_stamped(source / "data.csv", _euroc_image, skipped, ",")
    frames = [source / "data" / name for name in names]
    sequence = Sequence(folder.name, frames, camera, stamps=stamps, skipped=skipped)
    file = root / "state_groundtruth_estimate0" / "data.csv"
    if not file.is_file():
        return sequence
    pose_stamps, poses = read_stamped(file, _euroc_pose, skipped, ",")
    return attach_poses(sequence, pose_stamps, np.stack(poses) @ camera_in_body)


def _load_images(folder: Path, camera: Camera | None) -> Sequence:
    frames = list_images(folder)
    if not frames:
        raise InputError(f"--data {folder}: no images found. Expected: {LAYOUT}")
    if camera is None:
        raise InputError(
            f"--data {folder}: a plain image folder needs --intrinsics fx,fy,cx,cy "
            "(an essential matrix is estimated)"
        )
    return Sequence(folder.name, frames, camera)
