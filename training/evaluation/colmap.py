"""Features and matches in, COLMAP databases and models out, through pycolmap.

COLMAP puts the centre of the top-left pixel at (0.5, 0.5), this package at (0, 0): half a pixel is
added to keypoints and principal points on the way in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError, ScfeatError, import_optional
from scfeat_ros.features import Features
from scfeat_ros.staging import staged_file
from scfeat_training.evaluation.methods import match_indices

try:
    pycolmap = import_optional("pycolmap", "this task")
except ScfeatError:  # said by `require_pycolmap`, once the task is known to need it
    pycolmap = None

SEED = 0
PIXEL_CENTRE = 0.5


def require_pycolmap() -> None:
    """Refuse to go on without pycolmap.

    Raises:
        InputError: pycolmap is missing or older than version 4.
    """
    if pycolmap is None or int(pycolmap.__version__.split(".")[0]) < 4:
        raise InputError(
            "this task needs pycolmap 4 or newer: pip install 'pycolmap>=4' "
            "(or pip install '.[evaluate]')"
        )
    # COLMAP reports every registered image; keep the terminal for the table
    pycolmap.logging.minloglevel = pycolmap.logging.Level.WARNING.value


@dataclass(frozen=True)
class ColmapImage:
    """An image of a database.

    Attributes:
        name: as in the database, relative to the image folder.
        camera: key of the camera; images with the same key share one.
    """

    name: str
    camera: str


def pinhole(K: np.ndarray, size: tuple[int, int]) -> Any:
    """A pycolmap camera with fixed intrinsics from a (3, 3) K with pixel centres at integers."""
    parameters = [K[0, 0], K[1, 1], K[0, 2] + PIXEL_CENTRE, K[1, 2] + PIXEL_CENTRE]
    camera = pycolmap.Camera(
        model="PINHOLE", width=int(size[0]), height=int(size[1]), params=parameters
    )
    camera.has_prior_focal_length = True
    return camera


def camera_key(camera: Any) -> list[Any]:
    """Everything that a pycolmap camera says, for the cache's keys."""
    return [camera.model.name, camera.width, camera.height, camera.params.tolist()]


def camera_problem(camera: Any) -> str | None:
    """What is wrong with a pycolmap camera's numbers; None if nothing is."""
    if camera.width < 1 or camera.height < 1:
        return "the image size is not positive"
    K = np.asarray(camera.calibration_matrix())
    if not np.isfinite(camera.params).all() or not (K[0, 0] > 0 and K[1, 1] > 0):
        return "the parameters are not finite with a positive focal length"
    return None


def write_database(
    path: Path,
    images: list[ColmapImage],
    cameras: dict[str, Any],
    features: Callable[[str], Features],
    pairs: Iterable[tuple[str, str]],
    ratio: float | None,
    on_pair: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Make a database with keypoints and matches, not yet verified.

    Args:
        path: replaced if it is there.
        images: their order gives the image ids, from 1.
        cameras: pycolmap cameras by key.
        features: image name -> features.
        pairs: image names to match.
        ratio: ratio test of the matcher, None for none.
        on_pair: called after each pair.

    Returns:
        Image ids by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    ids: dict[str, int] = {}
    with pycolmap.Database.open(path) as database:
        rigs, camera_ids = {}, {}
        for key in dict.fromkeys(image.camera for image in images):
            camera = cameras[key]
            camera_ids[key] = camera.camera_id = database.write_camera(camera)
            rig = pycolmap.Rig()
            rig.add_ref_sensor(camera.sensor_id)
            rigs[key] = database.write_rig(rig)
        for number, image in enumerate(images, start=1):
            entry = pycolmap.Image(
                name=image.name, camera_id=camera_ids[image.camera], image_id=number
            )
            ids[image.name] = database.write_image(entry, use_image_id=True)
            frame = pycolmap.Frame()
            frame.rig_id = rigs[image.camera]
            frame.add_data_id(entry.data_id)
            database.write_frame(frame)
            keypoints = features(image.name).keypoints.astype(np.float32) + PIXEL_CENTRE
            database.write_keypoints(ids[image.name], np.ascontiguousarray(keypoints))
        for first, second in pairs:
            matches = match_indices(features(first), features(second), ratio)
            if len(matches):
                database.write_matches(
                    ids[first], ids[second], np.ascontiguousarray(matches, np.uint32)
                )
            on_pair()
    return ids


def verify(path: Path) -> tuple[int, float]:
    """Geometric verification of all matches of a database.

    Returns:
        Number of image pairs that pass, and the mean number of inliers of those.
    """
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = SEED
    pycolmap.set_random_seed(SEED)
    pycolmap.geometric_verification(path, two_view_geometry_options=options)
    with pycolmap.Database.open(path) as database:
        _, counts = database.read_two_view_geometry_num_inliers()
    passed = [count for count in counts if count > 0]
    return len(passed), float(np.mean(passed)) if passed else 0.0


def mapping_options(fix_intrinsics: bool) -> Any:
    """Options of incremental mapping and triangulation with fixed seeds."""
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = SEED
    options.mapper.random_seed = SEED
    options.triangulation.random_seed = SEED
    options.min_model_size = 3
    options.multiple_models = False
    options.extract_colors = False
    if fix_intrinsics:
        options.ba_refine_focal_length = False
        options.ba_refine_extra_params = False
        options.mapper.abs_pose_refine_focal_length = False
        options.mapper.abs_pose_refine_extra_params = False
    return options


def reconstruct(
    database: Path, images: Path, output: Path, fix_intrinsics: bool, on_image: Callable[[], None]
) -> Any | None:
    """Incremental mapping; the largest model, or None where nothing can be reconstructed."""
    output.mkdir(parents=True, exist_ok=True)
    pycolmap.set_random_seed(SEED)
    models = pycolmap.incremental_mapping(
        database,
        images,
        output,
        mapping_options(fix_intrinsics),
        next_image_callback=on_image,
    )
    if not models:
        return None
    return max(models.values(), key=lambda model: model.num_reg_images())


def camera_poses(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """R (3, 3) and t (3,), world to camera, of the registered images by name."""
    poses = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        matrix = image.cam_from_world().matrix()
        poses[image.name] = matrix[:, :3], matrix[:, 3]
    return poses


def model_from_poses(
    names: list[str],
    K: np.ndarray,
    R: np.ndarray,
    t: np.ndarray,
    sizes: np.ndarray,
) -> Any:
    """A pycolmap reconstruction of posed images without points; images have ids from 1.

    Args:
        names: N image names.
        K, R, t: (N, 3, 3), (N, 3, 3), (N, 3), world to camera.
        sizes: (N, 2) width and height.
    """
    model = pycolmap.Reconstruction()
    for number, name in enumerate(names, start=1):
        camera = pinhole(K[number - 1], sizes[number - 1])
        camera.camera_id = number
        model.add_camera_with_trivial_rig(camera)
        image = pycolmap.Image(name=name, camera_id=number, image_id=number)
        pose = pycolmap.Rigid3d(np.column_stack([R[number - 1], t[number - 1]]))
        model.add_image_with_trivial_frame(image, pose)
    return model


def unique_pairs(listed: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each pair once, in either direction, without those of an image with itself."""
    return list(dict.fromkeys(tuple(sorted(pair)) for pair in listed if pair[0] != pair[1]))


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Write lines atomically."""
    with staged_file(path, overwrite=True) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def posed_model(database: Path, poses: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """A reconstruction with the cameras, images and keypoints of a database at given poses.

    Args:
        database: as `write_database` makes it.
        poses: R and t, world to camera, of every image of it by name.
    """
    options = pycolmap.DatabaseCacheOptions()
    options.load_all_images = True
    with pycolmap.Database.open(database) as opened:
        cache = pycolmap.DatabaseCache.create(opened, options)
    model = pycolmap.Reconstruction()
    model.load(cache)
    for image in list(model.images.values()):
        R, t = poses[image.name]
        frame = model.frame(image.frame_id)
        frame.set_cam_from_world(image.camera_id, pycolmap.Rigid3d(np.column_stack([R, t])))
        model.register_frame(image.frame_id)
    return model
