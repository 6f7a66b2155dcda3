"""Structure from motion on an image folder, the protocol of the ETH local feature benchmark.

--data is a folder of images (searched through), a folder with images/, or one with poses: a scene
(images/ and scene.npz) or a COLMAP project (images/ and an undistorted sparse model). Every image
is matched with every other one, or as --pairs says (two names a line, relative to the image
folder).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_ros.export import exhaustive_pairs, listed_pairs
from scfeat_training.evaluation import colmap
from scfeat_training.evaluation.cache import Cache, CorruptImageError, read_image
from scfeat_training.evaluation.data import list_images, read_usable_scene, require_folder
from scfeat_training.evaluation.methods import PAPER_OPTIONS, Method
from scfeat_training.evaluation.metrics import (
    median_milliseconds,
    rotation_error,
    similarity_transform,
)
from scfeat_training.evaluation.report import (
    COLOURS,
    Figure,
    Report,
    Table,
    draw,
    progress_bar,
)
from scfeat_training.scenes import SCENE_FILE, Scene, is_colmap, is_scene, read_scene_file

MAX_KEYPOINTS = 20_000
RESULT_VERSION = 2
POSE_LIMIT = (0.05, 0.5)
"""Unit of the ground truth (metres) and degrees: a camera within both counts as right."""
LAYOUT = "a folder of images, or images/ with scene.npz or a COLMAP model (sparse/0)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task alone."""
    parser.add_argument(
        "--ratio", type=float, default=0.8, help="ratio test; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=Path, help="file of image pairs to match")
    parser.add_argument(
        "--camera",
        choices=("per-image", "single"),
        default="per-image",
        help="whether images without known intrinsics share one camera (default: per-image)",
    )
    parser.add_argument("--self-calibrate", action="store_true", help="ignore known intrinsics")
    parser.add_argument(
        "--paper-options",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="SCFeat with the paper's NMS 3x3 and score threshold 1.0 (default: yes)",
    )


def image_root(data: Path) -> Path:
    """The folder that image names are relative to."""
    return data / "images" if (data / "images").is_dir() else data


def check_data(args: argparse.Namespace) -> None:
    """Refuse a wrong folder before any model is loaded."""
    colmap.require_pycolmap()
    require_folder(args.data, LAYOUT)
    if not 0 <= args.ratio <= 1:
        raise InputError(f"--ratio must lie between 0 and 1, got {args.ratio:g}")
    if len(list_images(image_root(args.data))) < 2:
        raise InputError(f"--data {args.data}: fewer than two images in it. Expected: {LAYOUT}")


def evaluate_method(
    method: Method,
    cache: Cache,
    images: list[colmap.ColmapImage],
    cameras: dict[str, Any],
    pairs: list[tuple[str, str]],
    fix_intrinsics: bool,
    args: argparse.Namespace,
    progress: Any,
) -> dict[str, Any]:
    """Match, verify and map with one method; the model is left in the output folder."""
    root = image_root(args.data)
    folder = args.output / "models" / f"{method.fingerprint()}"
    shutil.rmtree(folder, ignore_errors=True)
    extracted = [cache.extract(method, root / image.name) for image in images]
    counts = [len(e.features) for e in extracted]
    seconds = [e.seconds for e in extracted]
    del extracted
    started = time.perf_counter()
    colmap.write_database(
        folder / "database.db",
        images,
        cameras,
        lambda name: cache.extract(method, root / name).features,
        pairs,
        args.ratio or None,
        progress.update,
    )
    verified, inliers = colmap.verify(folder / "database.db")
    model = colmap.reconstruct(
        folder / "database.db", root, folder / "sparse", fix_intrinsics, progress.update
    )
    result: dict[str, Any] = {
        "model": str(folder / "sparse"),
        "features": counts,
        "seconds": seconds,
        "verified_pairs": verified,
        "inliers": inliers,
        "pipeline_seconds": time.perf_counter() - started,
        "registered": 0,
        "points": 0,
        "track_length": None,
        "reprojection_error": None,
        "observations": None,
        "poses": {},
        "xyz": [],
    }
    if model is None:
        return result
    xyz = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    chosen = np.random.default_rng(0).permutation(len(xyz))[:4000]  # for the drawing
    result |= {
        "registered": model.num_reg_images(),
        "points": model.num_points3D(),
        "track_length": model.compute_mean_track_length(),
        "reprojection_error": model.compute_mean_reprojection_error(),
        "observations": model.compute_mean_observations_per_reg_image(),
        "poses": {
            name: [R.tolist(), t.tolist()] for name, (R, t) in colmap.camera_poses(model).items()
        },
        "xyz": np.round(xyz[chosen], 4).tolist(),
    }
    return result


def pose_errors(
    poses: dict[str, Any], scene: Scene
) -> tuple[np.ndarray, np.ndarray, tuple[float, np.ndarray, np.ndarray]] | None:
    """Errors of camera poses after the similarity alignment of their centres.

    Returns:
        Position errors in the scene's unit and rotation errors in degrees, (N,) each, and the
        alignment; None with fewer than three common images.
    """
    common = [name for name in scene.names if name in poses]
    if len(common) < 3:
        return None
    rows = [scene.names.index(name) for name in common]
    R_true, t_true = scene.R[rows], scene.t[rows]
    centres_true = -np.einsum("nij,ni->nj", R_true, t_true)
    R = np.array([poses[name][0] for name in common])
    t = np.array([poses[name][1] for name in common])
    centres = -np.einsum("nij,ni->nj", R, t)
    scale, rotation, translation = similarity_transform(centres, centres_true)
    aligned = scale * centres @ rotation.T + translation
    positions = np.linalg.norm(aligned - centres_true, axis=1)
    rotations = [rotation_error(a @ rotation.T, b) for a, b in zip(R, R_true, strict=True)]
    return positions, np.array(rotations), (scale, rotation, translation)


def run(args: argparse.Namespace, methods: list[Method], cache: Cache) -> Report:
    """Reconstruct the images with every method."""
    root = image_root(args.data)
    scene: Scene | None = None
    skipped: list[str] = []
    listed: set[str] = set()
    if is_scene(args.data):
        listed = set(read_scene_file(args.data).names)
        scene, skipped = read_usable_scene(args.data)
    elif is_colmap(args.data):
        try:
            scene, skipped = read_usable_scene(args.data)
        except InputError as error:  # of a camera that distorts, too
            skipped.append(f"{args.data}: its COLMAP model is not used: {error}")
    fix_intrinsics = scene is not None and not args.self_calibrate
    images, cameras, digests = [], {}, []
    files = list_images(root)
    source = SCENE_FILE if listed else "the COLMAP model"
    there = {file.relative_to(root).as_posix() for file in files}
    skipped += [f"{root / name}: in {SCENE_FILE}, but missing" for name in sorted(listed - there)]

    def is_named(file: Path) -> bool:
        """Whether it is said already why an image is left out."""
        return any(line.startswith(f"{file}: ") for line in skipped)

    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            picture, digest = read_image(file)
        except CorruptImageError as error:
            if not is_named(file):
                skipped.append(str(error))
            continue
        if fix_intrinsics and name not in scene.names:
            if not is_named(file):
                skipped.append(f"{file}: not in {source}")
            continue
        size = picture.shape[1], picture.shape[0]
        if fix_intrinsics:
            key, camera = name, colmap.pinhole(scene.K[scene.names.index(name)], size)
        else:
            key = f"{size[0]}x{size[1]}" if args.camera == "single" else name
            camera = cameras.get(key) or colmap.pycolmap.infer_camera_from_image(file)
        cameras[key] = camera
        images.append(colmap.ColmapImage(name, key))
        digests.append(digest)
    if len(images) < 2:
        raise InputError(f"--data {args.data}: fewer than two readable images; {skipped[:1]}")
    names = [image.name for image in images]
    if args.pairs:
        given = listed_pairs(args.pairs).values()
        known = [(a, b) for a, b in given if a in set(names) and b in set(names)]
        pairs = colmap.unique_pairs(known)
        if len(known) < len(given):
            skipped.append(f"{len(given) - len(known)} pairs of {args.pairs} name no image here")
        if len(pairs) < len(known):
            skipped.append(
                f"{len(known) - len(pairs)} pairs of {args.pairs} are there twice or of an image "
                "with itself"
            )
        if not pairs:
            raise InputError(f"--pairs {args.pairs}: none of its pairs names two images of {root}")
    else:
        pairs = exhaustive_pairs(names)
    if args.paper_options:
        methods = [m.with_options(**PAPER_OPTIONS) for m in methods]
    results = {}
    steps = len(pairs) + len(images)
    with progress_bar(steps * len(methods), "reconstruction", "step") as progress:
        for number, method in enumerate(methods):
            progress.set_postfix_str(method.label, refresh=False)
            key = {
                "task": "reconstruction",
                "version": RESULT_VERSION,
                "pycolmap": colmap.pycolmap.__version__,
                "method": method.fingerprint(),
                "images": dict(zip(names, digests, strict=True)),
                "cameras": {k: colmap.camera_key(c) for k, c in cameras.items()},
                "max_size": cache.max_size,
                "pairs": pairs,
                "ratio": args.ratio,
                "fix_intrinsics": fix_intrinsics,
                "output": str(args.output.resolve()),
            }
            results[method.label] = cache.result(
                key,
                lambda m=method: evaluate_method(
                    m, cache, images, cameras, pairs, fix_intrinsics, args, progress
                ),
            )
            progress.update((number + 1) * steps - progress.n)
    posed = sum(name in scene.names for name in names) if scene is not None else 0
    counts = len(images), len(there | listed), posed
    return _report(args, methods, cache, results, scene, counts, pairs, skipped)


def _report(
    args: argparse.Namespace,
    methods: list[Method],
    cache: Cache,
    results: dict[str, dict],
    scene: Scene | None,
    counts: tuple[int, int, int],
    pairs: list[tuple[str, str]],
    skipped: list[str],
) -> Report:
    """counts: of images that are reconstructed, that the data have, and with a known pose."""
    image_count, all_count, posed_count = counts
    columns = ["method", f"registered of {image_count}", "points", "track length"]
    columns += ["reproj. error, px", "features", "verified pairs", "inliers / pair"]
    if scene is not None:
        columns += ["position error of registered (median)", "(max)"]
        columns += ["rotation error of registered (median), deg", "(max)"]
        columns += [f"of {posed_count} within {POSE_LIMIT[0]:g} m, {POSE_LIMIT[1]:g} deg, %"]
    columns += ["ms / image", "pipeline, s"]
    rows = []
    for method in methods:
        value = results[method.label]
        row = [
            method.label,
            value["registered"],
            value["points"],
            value["track_length"],
            value["reprojection_error"],
            float(np.mean(value["features"])),
            value["verified_pairs"],
            value["inliers"],
        ]
        if scene is not None:
            errors = pose_errors(value["poses"], scene)
            if errors is None:
                row += [None, None, None, None, 0.0]
            else:
                positions, rotations, _ = errors
                row += [float(np.median(positions)), float(positions.max())]
                row += [float(np.median(rotations)), float(rotations.max())]
                right = (positions <= POSE_LIMIT[0]) & (rotations <= POSE_LIMIT[1])
                row.append(100 * int(right.sum()) / posed_count)
        rows.append([*row, median_milliseconds(value["seconds"]), value["pipeline_seconds"]])
    ratio = f"ratio test {args.ratio:g} both ways" if args.ratio else "no ratio test"
    intrinsics = (
        "known intrinsics, fixed"
        if scene is not None and not args.self_calibrate
        else f"self-calibrated from Exif or 1.2 times the longer side, {args.camera}"
    )
    return Report(
        task="reconstruction",
        title=f"Structure from motion: {args.data.resolve().name}",
        protocol=[
            f"{image_count} of {all_count} images, {cache.size_limit()}, {len(pairs)} pairs; at "
            f"most {args.max_keypoints} features; mutual nearest neighbours, {ratio}. On binary "
            "descriptors the ratio of Euclidean distances is the square root of that of Hamming "
            "distances.",
            "SCFeat with NMS 3x3 and score threshold 1.0, as in the paper (Sec. IV-D)."
            if args.paper_options
            else "SCFeat with the options given, not the paper's.",
            f"COLMAP (pycolmap {colmap.pycolmap.__version__}): geometric verification and "
            f"incremental mapping, fixed seeds, {intrinsics}. The largest model is counted.",
            "Track length: mean observations of a 3D point; reprojection error: mean over points.",
            *(
                [
                    "Pose errors after the least-squares similarity alignment of the camera "
                    "centres with ground truth; positions in the unit of the ground truth (metres "
                    "for Strecha's scenes). Medians and maxima are over the registered images "
                    "alone, so a method that registers fewer may look better; the share within "
                    f"the limits is of all {posed_count} images with a known pose, registered or "
                    "not."
                ]
                if scene is not None
                else []
            ),
        ],
        tables=[Table(f"Reconstruction: {args.data.resolve().name}", columns, rows)],
        figures=[_figure(methods, results, scene)],
        skipped=skipped,
        details=results,
    )


def _figure(methods: list[Method], results: dict[str, dict], scene: Scene | None) -> Figure:
    """Points and cameras of every model, seen along the direction of least spread."""

    def paint(axes: Any) -> None:
        for number, (axis, method) in enumerate(zip(np.atleast_1d(axes), methods, strict=True)):
            value = results[method.label]
            axis.set_title(f"{method.label}: {value['registered']} images", fontsize=10)
            axis.set_aspect("equal", adjustable="datalim")
            if not value["xyz"]:
                axis.text(0.5, 0.5, "no model", transform=axis.transAxes, ha="center")
                continue
            points = np.array(value["xyz"])
            R = np.array([pose[0] for pose in value["poses"].values()])
            t = np.array([pose[1] for pose in value["poses"].values()])
            centres = -np.einsum("nij,ni->nj", R, t)
            aligned = pose_errors(value["poses"], scene) if scene is not None else None
            if aligned is not None:
                scale, rotation, translation = aligned[2]
                points = scale * points @ rotation.T + translation
                centres = scale * centres @ rotation.T + translation
                up = (-scene.R[:, 1]).mean(axis=0)
            else:
                up = -R[:, 1].mean(axis=0)
            # a view from above: the cameras' mean up direction is projected out
            basis = np.linalg.svd(up[None] / np.linalg.norm(up))[2][1:]
            middle = np.median(points, axis=0)
            points, centres = (points - middle) @ basis.T, (centres - middle) @ basis.T
            reach = 3 * np.percentile(np.linalg.norm(points, axis=1), 90)
            near = np.linalg.norm(points, axis=1) < reach
            axis.plot(*points[near].T, ".", color="#8a99a8", markersize=1, rasterized=True)
            if aligned is not None:
                truth = -np.einsum("nij,ni->nj", scene.R, scene.t)
                truth = (truth - middle) @ basis.T
                axis.plot(*truth.T, "k+", markersize=8, label="true cameras")
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(*centres.T, "o", color=colour, markersize=4, label="cameras")
            axis.legend(fontsize=7)

    columns = len(methods)
    return Figure(
        "Models from above",
        draw(paint, width=min(4.2 * columns, 14), height=4.2, columns=columns),
        "At most 4,000 points of each model.",
    )
