"""Image sequences for the odometry task: scene, KITTI, TUM, EuRoC, bag or plain images.

All become one `Sequence`: image files, intrinsics, distortion, and camera poses where known.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import yaml

from scfeat_ros.camera import Camera
from scfeat_ros.errors import InputError
from scfeat_ros.ground_truth import rotation_of
from scfeat_ros.sources import BagSource
from scfeat_training.evaluation.data import list_images, require_folder
from scfeat_training.scenes import is_scene, read_scene_file

LAYOUT = (
    "a scene (images/ and scene.npz), a KITTI sequence (image_0/ or image_2/, calib.txt, "
    "poses.txt), a TUM sequence (rgb.txt, groundtruth.txt), a EuRoC sequence (mav0/cam0), a bag "
    "(.mcap, .db3, .bag or a ROS 2 bag folder), or a folder of images with --intrinsics"
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
        if not self.camera.D.any():
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
        if is_scene(data):
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
        InputError: another count.
    """
    if len(numbers) not in (4, 8, 9, 12):
        raise InputError(
            f"--intrinsics has {len(numbers)} numbers; it takes fx,fy,cx,cy and then 0, 4, 5 or 8 "
            "distortion coefficients (k1,k2,p1,p2,k3,...)"
        )
    model = "rational_polynomial" if len(numbers) == 12 else "plumb_bob"
    return Camera(intrinsic_matrix(*numbers[:4]), np.array(numbers[4:]), model)


def intrinsic_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """(3, 3) intrinsics."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def invert(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(4, 4) camera to world from world to camera."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R.T, -R.T @ t
    return pose


def quaternion_pose(position: np.ndarray, xyzw: np.ndarray) -> np.ndarray:
    """(4, 4) matrix from a position and a quaternion in the order x, y, z, w."""
    pose = np.eye(4)
    pose[:3, :3] = rotation_of(np.asarray(xyzw, np.float64) / np.linalg.norm(xyzw))
    pose[:3, 3] = position
    return pose


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
    scene = read_scene_file(folder)
    if np.abs(scene.K - scene.K[0]).max() > 1e-6:
        raise InputError(f"{folder}: the images have different intrinsics, so this is no sequence")
    poses = np.stack([invert(R, t) for R, t in zip(scene.R, scene.t, strict=True)])
    return Sequence(folder.name, scene.paths, camera or Camera(scene.K[0]), poses)


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
            file = frames_folder / f"{frame.stamp:020d}.png"
            image = frame.image if frame.image.ndim == 2 else frame.image[..., ::-1]
            # level 1 is quick; the format is lossless, so features are those of the bag's image
            cv2.imwrite(str(file), image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
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
    K = None
    for line in (folder / "calib.txt").read_text(encoding="utf-8").splitlines():
        label, _, numbers = line.partition(":")
        if label.strip() == key:
            values = np.array(numbers.split(), float)
            if len(values) == 12:
                P = values.reshape(3, 4)
                K = P[:, :3]
    if K is None:
        raise InputError(f"{folder / 'calib.txt'}: no line '{key}:' with twelve numbers")
    sequence = Sequence(folder.name, images, camera or Camera(K))
    if poses_file is not None and not poses_file.is_file():
        raise InputError(f"--poses {poses_file}: no such file")
    beside = folder.parent.parent / "poses" / f"{folder.name}.txt"
    candidates = [poses_file, folder / "poses.txt", beside]
    file = next((f for f in candidates if f is not None and f.is_file()), None)
    if file is not None:
        rows = np.loadtxt(file, ndmin=2)
        if rows.shape != (len(images), 12):
            raise InputError(
                f"{file}: {rows.shape[0]} rows of {rows.shape[1]} numbers for {len(images)} "
                "images, expected 12 numbers for each image"
            )
        poses = np.tile(np.eye(4), (len(images), 1, 1))
        poses[:, :3] = rows.reshape(-1, 3, 4)
        # the poses are those of camera 0; another camera sits beside it by P[:, 3]
        offset = np.eye(4)
        offset[:3, 3] = -np.linalg.inv(K) @ P[:, 3]
        sequence.poses = poses @ offset
    return sequence


def _read_tum_list(file: Path) -> list[list[str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def _load_tum(folder: Path, camera: Camera | None) -> Sequence:
    if camera is None:
        raise InputError(
            f"{folder}: a TUM sequence does not hold its intrinsics; give --intrinsics, e.g. "
            "--intrinsics 517.3,516.5,318.6,255.3,0.2624,-0.9531,-0.0054,0.0026,1.1633 (freiburg1)"
        )
    rows = [row for row in _read_tum_list(folder / "rgb.txt") if len(row) == 2]
    stamps = np.array([float(row[0]) for row in rows])
    frames = [folder / row[1] for row in rows]
    sequence = Sequence(folder.name, frames, camera, stamps=stamps)
    file = folder / "groundtruth.txt"
    if not file.is_file():
        return sequence
    truth = np.array([row for row in _read_tum_list(file) if len(row) == 8], float)
    poses = np.stack([quaternion_pose(row[1:4], row[4:8]) for row in truth])
    return attach_poses(sequence, truth[:, 0], poses)


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
        rows = _read_csv(source / "data.csv")
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{source}: sensor.yaml or data.csv cannot be read ({error})") from error
    frames = [source / "data" / row[1].strip() for row in rows]
    stamps = np.array([int(row[0]) * 1e-9 for row in rows])
    sequence = Sequence(folder.name, frames, camera, stamps=stamps)
    file = root / "state_groundtruth_estimate0" / "data.csv"
    if not file.is_file():
        return sequence
    truth = _read_csv(file)
    # position, then the quaternion as w, x, y, z
    values = np.array([[float(v) for v in row[1:8]] for row in truth])
    poses = np.stack([quaternion_pose(v[:3], v[[4, 5, 6, 3]]) @ camera_in_body for v in values])
    return attach_poses(sequence, np.array([int(row[0]) * 1e-9 for row in truth]), poses)


def _read_csv(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8") as stream:
        return [row for row in csv.reader(stream) if row and not row[0].startswith("#")]


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
