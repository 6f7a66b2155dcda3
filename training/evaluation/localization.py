"""Poses of query images in a reference model (Aachen Day-Night, or any data in hloc's layout).

--data is a folder with
  images/              reference and query images (or --images)
  sfm/                 COLMAP model with the poses of the reference images (or --model); its points
                       are not used: they are triangulated from every method's features
  queries.txt          name MODEL width height parameters..., a query a line (or --queries)
  pairs-db.txt         pairs of reference images to triangulate from (or --db-pairs)
  pairs-query.txt      pairs of a query and a reference image (or --query-pairs)
  query-poses.txt      optional: name qw qx qy qz tx ty tz, world to camera (or --query-poses)
or Aachen Day-Night v1.1 as it is distributed, with the pairs files of hloc in it; or a scene
(images/ and scene.npz) or a COLMAP project (images/ and an undistorted sparse model) without
queries, of which every --every-th image becomes a query.
Positions are in the unit of the model, which must be metres for the thresholds to make sense.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scfeat_ros.errors import InputError
from scfeat_ros.export import listed_pairs
from scfeat_ros.features import Features
from scfeat_ros.text_files import read_text
from scfeat_training.evaluation import colmap
from scfeat_training.evaluation.cache import Cache, CorruptImageError, read_image
from scfeat_training.evaluation.colmap import pycolmap
from scfeat_training.evaluation.data import read_usable_scene, require_folder
from scfeat_training.evaluation.methods import Method, match_indices
from scfeat_training.evaluation.metrics import median_milliseconds, rotation_error
from scfeat_training.evaluation.report import (
    COLOURS,
    Figure,
    Report,
    Table,
    draw,
    progress_bar,
)
from scfeat_training.evaluation.sequences import quaternion_pose, read_rows
from scfeat_training.scenes import check_camera, is_colmap, is_scene, open_colmap_model

MAX_KEYPOINTS = 20_000
THRESHOLDS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))
"""Metres and degrees: the benchmark's high, medium and coarse precision."""
RESULT_VERSION = 2
MIN_OVERLAP = 0.1
QUERY_PAIRS = 10
AACHEN_MODEL = Path("3D-models/aachen_v_1_1")
AACHEN_IMAGES = Path("images/images_upright")
LAYOUT = (
    "images/, sfm/ (COLMAP model), queries.txt, pairs-db.txt, pairs-query.txt and, where known, "
    "query-poses.txt; or images/ with scene.npz or a COLMAP model (sparse/0)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task alone."""
    for name, text in (
        ("images", "image folder"),
        ("model", "COLMAP model of the reference images"),
        ("db-pairs", "pairs of reference images"),
        ("query-pairs", "pairs of a query and a reference image"),
        ("query-poses", "true poses of the queries"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=f"{text}, if not at its usual place")
    parser.add_argument(
        "--queries", type=Path, nargs="+", help="files of queries with intrinsics, likewise"
    )
    parser.add_argument(
        "--config", type=Path, help="YAML with parameters (default: the paper's, localization.yaml)"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=4,
        help="of a scene or COLMAP project, every n-th image is a query (default: 4)",
    )


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        images, model, db_pairs, query_pairs: see the module's text.
        queries: files of queries with intrinsics.
        query_poses: None where not known.
        skipped: images of a scene or COLMAP project that are not used, one sentence each.
    """

    images: Path
    model: Path
    queries: list[Path]
    db_pairs: Path
    query_pairs: Path
    query_poses: Path | None
    skipped: tuple[str, ...] = ()


def check_data(args: argparse.Namespace) -> None:
    """Refuse incomplete data before any model is loaded; make the layout of posed images."""
    colmap.require_pycolmap()
    require_folder(args.data, LAYOUT)
    args.parameters = load_parameters(args.config)
    if is_split(args):
        if args.every < 2:
            raise InputError("--every must be at least 2, else there is no reference image")
        args.layout = scene_to_hloc(args.data, args.output / "hloc", args.every)
    else:
        args.layout = find_layout(args)


def load_parameters(file: Path | None) -> dict[str, dict[str, Any]]:
    """The four groups of localization.yaml, those of `file` over the paper's.

    Raises:
        InputError: unreadable, an unknown group or name, or a value that is none.
    """
    default = Path(__file__).with_name("localization.yaml")
    parameters = yaml.safe_load(default.read_text(encoding="utf-8"))
    if file is None:
        return parameters
    try:
        given = yaml.safe_load(read_text(file)) or {}
    except yaml.YAMLError as error:
        raise InputError(f"--config {file}: cannot be read ({error})") from error
    if not isinstance(given, dict):
        raise InputError(f"--config {file}: want the groups {', '.join(parameters)}")
    for group, values in given.items():
        if group not in parameters or not isinstance(values, dict):
            raise InputError(
                f"--config {file}: '{group}' is none of the groups {', '.join(parameters)}"
            )
        known = parameters[group]
        unknown = set(values) - set(known) if group in ("matching", "pose") else set()
        if unknown:
            raise InputError(f"--config {file}: unknown '{group}.{unknown.pop()}'")
        known.update(values)
    for group, name, least, most in (
        ("matching", "ratio", 0, 1),
        ("pose", "threshold", 1e-3, 1e3),
        ("pose", "min_inliers", 0, 1e6),
    ):
        value = parameters[group][name]
        # YAML's true is a number to Python
        if type(value) not in (int, float) or not least <= value <= most:
            raise InputError(
                f"--config {file}: {group}.{name} is {value!r}, want a number from {least:g} to "
                f"{most:g}"
            )
    return parameters


def query_files(args: argparse.Namespace) -> list[Path]:
    """Files of queries by the flag, else by their usual names."""
    usual = {
        *args.data.glob("queries*.txt"),
        *args.data.glob("queries/*_with_intrinsics.txt"),
    }
    return args.queries or sorted(usual)


def is_split(args: argparse.Namespace) -> bool:
    """Whether the data are posed images without queries, some of which become queries."""
    return is_scene(args.data) or (is_colmap(args.data) and not query_files(args))


def find_layout(args: argparse.Namespace) -> Layout:
    """Files by the flags, else by their usual names.

    Raises:
        InputError: names what is missing.
    """
    data: Path = args.data
    queries = query_files(args)
    layout = Layout(
        images=_first(args.images, data / AACHEN_IMAGES, data / "images"),
        model=_first(args.model, data / AACHEN_MODEL, data / "sfm", data / "model"),
        queries=queries,
        db_pairs=_first(args.db_pairs, *sorted(data.glob("pairs-db*.txt"))),
        query_pairs=_first(args.query_pairs, *sorted(data.glob("pairs-query*.txt"))),
        query_poses=_first(args.query_poses, data / "query-poses.txt", required=False),
    )
    missing = [
        what
        for what, path in (
            ("images/", layout.images),
            ("sfm/", layout.model),
            ("pairs-db.txt", layout.db_pairs),
            ("pairs-query.txt", layout.query_pairs),
        )
        if path is None or not path.exists()
    ]
    missing += [] if queries else ["queries.txt"]
    missing += [str(path) for path in queries if not path.is_file()]
    if missing:
        raise InputError(f"--data {data}: {', '.join(missing)} missing. Expected: {LAYOUT}")
    return layout


def _first(given: Path | None, *usual: Path, required: bool = True) -> Path | None:
    if given is not None:
        return given
    found = next((path for path in usual if path.exists()), None)
    return found if found is not None or not required or not usual else usual[-1]


def scene_to_hloc(folder: Path, output: Path, every: int = 4) -> Layout:
    """Make hloc's layout from a scene or COLMAP project.

    Images `every` - 1, 2 * `every` - 1, ... are queries. Reference pairs overlap by at least
    `MIN_OVERLAP`; a query is paired with the `QUERY_PAIRS` reference images that overlap most. That
    stands in for image retrieval and is the same for all methods.

    Raises:
        InputError: the scene has too few images, or no pairs.
    """
    scene, skipped = read_usable_scene(folder)
    queries = list(range(every - 1, len(scene), every))
    references = [i for i in range(len(scene)) if i not in set(queries)]
    if len(references) < 3 or not queries or not len(scene.pairs):
        raise InputError(f"{folder}: too few images, or no pairs, to localize in")
    shutil.rmtree(output, ignore_errors=True)
    images = output / "images"
    images.mkdir(parents=True)
    # the copies' names: in hloc's files a space ends a name
    names = ["_".join(name.split()) for name in scene.names]
    if len(set(names)) < len(names):
        raise InputError(f"{folder}: names differ in spaces alone; rename the images")
    for name, path in zip(names, scene.paths, strict=True):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copyfile(path, images / name)
    overlap = np.zeros((len(scene), len(scene)))
    for (i, j), value in zip(scene.pairs, scene.overlap, strict=True):
        overlap[i, j] = overlap[j, i] = value
    model = colmap.model_from_poses(
        [names[i] for i in references],
        scene.K[references],
        scene.R[references],
        scene.t[references],
        scene.size_wh[references],
    )
    layout = Layout(
        images,
        output / "sfm",
        [output / "queries.txt"],
        output / "pairs-db.txt",
        output / "pairs-query.txt",
        output / "query-poses.txt",
        tuple(skipped),
    )
    layout.model.mkdir()
    model.write(layout.model)
    lines = []
    for i in queries:
        camera = colmap.pinhole(scene.K[i], scene.size_wh[i])
        parameters = " ".join(repr(float(v)) for v in camera.params)
        lines.append(f"{names[i]} PINHOLE {camera.width} {camera.height} {parameters}")
    colmap.write_text(layout.queries[0], lines)
    colmap.write_text(
        layout.db_pairs,
        [
            f"{names[i]} {names[j]}"
            for i in references
            for j in references
            if i < j and overlap[i, j] >= MIN_OVERLAP
        ],
    )
    lines = []
    for i in queries:
        best = sorted(references, key=lambda j, i=i: -overlap[i, j])[:QUERY_PAIRS]
        lines += [f"{names[i]} {names[j]}" for j in best if overlap[i, j] > 0]
    colmap.write_text(layout.query_pairs, lines)
    colmap.write_text(
        layout.query_poses, [pose_line(names[i], scene.R[i], scene.t[i]) for i in queries]
    )
    return layout


def pose_line(name: str, R: np.ndarray, t: np.ndarray) -> str:
    """A line of the benchmark's result file: name qw qx qy qz tx ty tz, world to camera."""
    x, y, z, w = pycolmap.Rotation3d(np.asarray(R, np.float64)).quat
    return " ".join([name, *(f"{float(v):.10g}" for v in (w, x, y, z, *t))])


def read_poses(file: Path, skipped: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """R (3, 3) and t (3,), world to camera, by image name; see `pose_line`.

    Lines that cannot be used are named in `skipped`.
    """

    def parse(fields: list[str]) -> tuple[str, np.ndarray]:
        if len(fields) != 8:
            raise ValueError(f"{len(fields)} fields, expected name qw qx qy qz tx ty tz")
        w, x, y, z, *t = (float(v) for v in fields[1:])
        return fields[0], quaternion_pose(t, [x, y, z, w])

    rows = [row for row in read_rows(file, parse, skipped) if row is not None]
    return {name: (matrix[:3, :3], matrix[:3, 3]) for name, matrix in rows}


def read_queries(files: list[Path], skipped: list[str]) -> dict[str, Any]:
    """pycolmap cameras by query name; lines that cannot be used are named in `skipped`.

    Raises:
        InputError: no line can be used.
    """

    def parse(fields: list[str]) -> tuple[str, Any]:
        try:
            name, model, width, height, *parameters = fields
            camera = pycolmap.Camera(
                model=model,
                width=int(width),
                height=int(height),
                params=[float(v) for v in parameters],
            )
            if not camera.verify_params():
                raise ValueError("wrong number of parameters")
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"expected name MODEL width height parameters ({reason})") from error
        problem = colmap.camera_problem(camera)
        if problem is not None:
            raise ValueError(problem)
        return name, camera

    bad: list[str] = []
    rows = [row for file in files for row in read_rows(file, parse, bad) if row is not None]
    if not rows:
        raise InputError(f"{files[0]}: no query in it can be used ({(bad or ['it is empty'])[0]})")
    skipped += bad
    return dict(rows)


@dataclass(frozen=True)
class Problem:
    """What has to be solved, read once for all methods.

    Attributes:
        reference: pycolmap reconstruction with poses of the reference images.
        names: readable reference images.
        queries: cameras of the readable queries.
        db_pairs: between reference images.
        query_pairs: reference images by query.
        truth: true poses of queries, empty where not known.
        digests: SHA-256 of all images.
    """

    reference: Any
    names: list[str]
    queries: dict[str, Any]
    db_pairs: list[tuple[str, str]]
    query_pairs: dict[str, list[str]]
    truth: dict[str, tuple[np.ndarray, np.ndarray]]
    digests: dict[str, str]


def load_problem(layout: Layout) -> tuple[Problem, list[str]]:
    """Read the layout; unreadable images and wrong cameras are left out and named.

    Raises:
        InputError: the model cannot be read, or nothing is left to localize.
    """
    reference = open_colmap_model(layout.model)
    skipped = list(layout.skipped)
    queries = read_queries(layout.queries, skipped)
    truth = read_poses(layout.query_poses, skipped) if layout.query_poses else {}
    digests: dict[str, str] = {}
    registered = _usable_references(reference, layout.model, skipped)
    for name in [*registered, *queries]:
        try:
            digests[name] = read_image(layout.images / name)[1]
        except CorruptImageError as error:
            skipped.append(str(error))
    names = sorted(name for name in registered if name in digests)
    queries = {name: camera for name, camera in queries.items() if name in digests}
    known = set(names)
    listed = listed_pairs(layout.db_pairs).values()
    db_pairs = colmap.unique_pairs(p for p in listed if p[0] in known and p[1] in known)
    query_pairs: dict[str, list[str]] = {name: [] for name in queries}
    unknown = 0
    for query, name in listed_pairs(layout.query_pairs).values():
        if query not in query_pairs or name not in known:
            unknown += 1
        elif name not in query_pairs[query]:
            query_pairs[query].append(name)
    if unknown:
        skipped.append(f"{unknown} pairs of {layout.query_pairs.name} name no query or reference")
    if not queries or not db_pairs or not any(query_pairs.values()):
        raise InputError(
            f"{layout.query_pairs.parent}: nothing to localize: {len(queries)} readable queries, "
            f"{len(db_pairs)} reference pairs, {sum(map(len, query_pairs.values()))} query pairs"
        )
    return Problem(reference, names, queries, db_pairs, query_pairs, truth, digests), skipped


def _usable_references(reference: Any, file: Path, skipped: list[str]) -> list[str]:
    """Registered images of a model whose camera and pose are right; the others are named."""
    names = []
    for image_id in reference.reg_image_ids():
        image = reference.image(image_id)
        matrix = image.cam_from_world().matrix()
        where = f"{file}: {image.name}"
        problem = colmap.camera_problem(reference.camera(image.camera_id))
        if problem is not None:
            problem = f"{where}: {problem}"
        problem = problem or check_camera(where, np.eye(3), matrix[:, :3], matrix[:, 3])
        if problem is None:
            names.append(image.name)
        else:
            skipped.append(problem)
    return names


def evaluate_method(
    reference_method: Method,
    query_method: Method,
    cache: Cache,
    problem: Problem,
    images: Path,
    folder: Path,
    parameters: dict[str, dict[str, Any]],
    progress: Any,
) -> dict[str, Any]:
    """Triangulate the reference model and localize all queries."""
    ratio = parameters["matching"]["ratio"] or None

    def reference_features(name: str) -> Features:
        return cache.extract(reference_method, images / name).features

    model, verified = _triangulated(problem, images, folder, reference_features, ratio, progress)
    points = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        points[image.name] = np.array(
            [p.point3D_id if p.has_point3D() else -1 for p in image.points2D], np.int64
        )
    estimation = pycolmap.AbsolutePoseEstimationOptions()
    estimation.ransac.max_error = float(parameters["pose"]["threshold"])
    estimation.ransac.random_seed = colmap.SEED
    poses, inliers, seconds = {}, {}, []
    for query, camera in problem.queries.items():
        extracted = cache.extract(query_method, images / query)
        seconds.append(extracted.seconds)
        rows: list[np.ndarray] = []
        for name in problem.query_pairs[query]:
            indices = match_indices(extracted.features, reference_features(name), ratio)
            ids = points[name][indices[:, 1]]
            rows.append(np.column_stack([indices[:, 0], ids])[ids >= 0])
            progress.update()
        found = np.unique(np.concatenate(rows), axis=0) if rows else np.zeros((0, 2), int)
        inliers[query] = 0
        if len(found) < 4:
            continue
        xyz = np.array([model.point3D(i).xyz for i in found[:, 1]])
        pixels = extracted.features.keypoints[found[:, 0]].astype(np.float64)
        answer = pycolmap.estimate_and_refine_absolute_pose(
            pixels + colmap.PIXEL_CENTRE, xyz, camera, estimation
        )
        if answer is None:
            continue
        inliers[query] = int(answer["num_inliers"])
        if inliers[query] >= parameters["pose"]["min_inliers"]:
            matrix = answer["cam_from_world"].matrix()
            poses[query] = [matrix[:, :3].tolist(), matrix[:, 3].tolist()]
    counts = [len(reference_features(name)) for name in problem.names]
    return {
        "features": float(np.mean(counts)),
        "points": model.num_points3D(),
        "track_length": model.compute_mean_track_length(),
        "reprojection_error": model.compute_mean_reprojection_error(),
        "verified_pairs": verified,
        "poses": poses,
        "inliers": inliers,
        "seconds": seconds,
    }


def _triangulated(
    problem: Problem,
    images: Path,
    folder: Path,
    features: Callable[[str], Features],
    ratio: float | None,
    progress: Any,
) -> tuple[Any, int]:
    """The reference images at their known poses, with points triangulated from features.

    Args:
        problem: with the reference images and their pairs.
        images: folder of the images.
        folder: for database and model; emptied before.
        features: of a reference image by name.
        ratio: of the matcher's ratio test, None for none.
        progress: a step for each pair.

    Returns:
        A pycolmap reconstruction, and the number of pairs that pass the verification.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model = pycolmap.Reconstruction(problem.reference)
    known = set(problem.names)
    cameras, entries = {}, []
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        if image.name in known:
            camera = model.camera(image.camera_id)
            key = str(image.camera_id)
            # a copy, since the database numbers its cameras itself
            cameras.setdefault(
                key,
                pycolmap.Camera(
                    model=camera.model,
                    width=camera.width,
                    height=camera.height,
                    params=camera.params,
                ),
            )
            entries.append(colmap.ColmapImage(image.name, key))
    database, sparse = folder / "database.db", folder / "sparse"
    colmap.write_database(
        database, entries, cameras, features, problem.db_pairs, ratio, progress.update
    )
    verified, _ = colmap.verify(database)
    sparse.mkdir(parents=True, exist_ok=True)
    model = colmap.posed_model(database, colmap.camera_poses(model))
    model = pycolmap.triangulate_points(
        model, database, images, sparse, options=colmap.mapping_options(True)
    )
    return model, verified


def query_errors(
    poses: dict[str, Any], truth: dict[str, tuple[np.ndarray, np.ndarray]], queries: list[str]
) -> np.ndarray:
    """(N, 2) position (model's unit) and rotation (degrees) errors; inf without a pose.

    N counts the queries whose true pose is known.
    """
    errors = []
    for name in queries:
        if name not in truth:
            continue
        if name not in poses:
            errors.append((np.inf, np.inf))
            continue
        R_true, t_true = truth[name]
        R, t = (np.array(v) for v in poses[name])
        distance = float(np.linalg.norm(R.T @ t - R_true.T @ t_true))
        errors.append((distance, rotation_error(R, R_true)))
    return np.array(errors).reshape(-1, 2)


def run(args: argparse.Namespace, methods: list[Method], cache: Cache) -> Report:
    """Localize all queries with every method and write the files that the benchmark takes."""
    layout: Layout = args.layout
    problem, skipped = load_problem(layout)
    parameters = args.parameters
    steps = len(problem.db_pairs) + sum(map(len, problem.query_pairs.values()))
    results, files = {}, {}
    # the benchmark's site knows queries by their file names alone
    bases = Counter(Path(name).name for name in problem.queries)
    paths = {name: Path(name).name for name in problem.queries}
    if max(bases.values()) > 1:
        paths = {name: name for name in problem.queries}
    with progress_bar(steps * len(methods), "localization", "pair") as progress:
        for number, method in enumerate(methods):
            progress.set_postfix_str(method.label, refresh=False)
            reference_method = method.with_options(**parameters["reference"])
            query_method = method.with_options(**parameters["query"])
            key = {
                "task": "localization",
                "version": RESULT_VERSION,
                "pycolmap": pycolmap.__version__,
                "methods": [reference_method.fingerprint(), query_method.fingerprint()],
                "images": problem.digests,
                "poses": [
                    [name, R.tolist(), t.tolist()]
                    for name, (R, t) in colmap.camera_poses(problem.reference).items()
                ],
                "cameras": {
                    image.name: colmap.camera_key(problem.reference.camera(image.camera_id))
                    for image in problem.reference.images.values()
                },
                "names": problem.names,
                "queries": {n: colmap.camera_key(c) for n, c in problem.queries.items()},
                "max_size": cache.max_size,
                "pairs": [problem.db_pairs, problem.query_pairs],
                "parameters": [parameters["matching"], parameters["pose"]],
            }
            folder = args.output / "models" / reference_method.fingerprint()
            results[method.label] = cache.result(
                key,
                lambda r=reference_method, q=query_method, f=folder: evaluate_method(
                    r, q, cache, problem, layout.images, f, parameters, progress
                ),
            )
            progress.update((number + 1) * steps - progress.n)
            files[method.label] = args.output / f"poses-{method.file_name}.txt"
            if list(files.values()).count(files[method.label]) > 1:  # of labels like a/b and a_b
                files[method.label] = args.output / f"poses-{method.file_name}-{number + 1}.txt"
            colmap.write_text(
                files[method.label],
                [
                    pose_line(paths[name], np.array(R), np.array(t))
                    for name, (R, t) in results[method.label]["poses"].items()
                ],
            )
    whole = any("/" in path for path in paths.values())
    return _report(args, methods, problem, results, files, whole, skipped)


def _report(
    args: argparse.Namespace,
    methods: list[Method],
    problem: Problem,
    results: dict[str, dict],
    files: dict[str, Path],
    whole_paths: bool,
    skipped: list[str],
) -> Report:
    queries = list(problem.queries)
    known = any(name in problem.truth for name in queries)
    columns = ["method", f"localized of {len(queries)}"]
    columns += [f"{d:g} m, {a:g} deg" for d, a in THRESHOLDS] if known else []
    columns += ["median, m", "median, deg"] if known else []
    columns += ["inliers / query", "points", "track length", "reproj. error, px", "features"]
    columns += ["ms / query"]
    rows = []
    for method in methods:
        value = results[method.label]
        row: list[Any] = [method.label, len(value["poses"])]
        if known:
            errors = query_errors(value["poses"], problem.truth, queries)
            row += [
                100 * float(((errors[:, 0] <= d) & (errors[:, 1] <= a)).mean())
                for d, a in THRESHOLDS
            ]
            row += [float(np.median(errors[:, 0])), float(np.median(errors[:, 1]))]
        row += [
            float(np.mean(list(value["inliers"].values()))),
            value["points"],
            value["track_length"],
            value["reprojection_error"],
            value["features"],
            median_milliseconds(value["seconds"]),
        ]
        rows.append(row)
    protocol = [
        f"{len(problem.names)} reference images, {len(queries)} queries, "
        f"{len(problem.db_pairs)} reference pairs, "
        f"{sum(map(len, problem.query_pairs.values()))} query pairs; at most "
        f"{args.max_keypoints} features; mutual nearest neighbours.",
        f"SCFeat's options: reference {args.parameters['reference']}, "
        f"query {args.parameters['query']}; matching {args.parameters['matching']}; "
        f"pose {args.parameters['pose']}.",
        f"COLMAP (pycolmap {pycolmap.__version__}): geometric verification, triangulation from "
        "the given reference poses, absolute pose by LO-RANSAC and refinement, fixed seeds.",
        "Share in % of all queries with a known pose within both limits; a query without a pose "
        "is outside of all."
        if known
        else "The poses of the queries are not known: hand the pose files in at "
        "https://www.visuallocalization.net.",
        "Pose files: "
        + ", ".join(str(file) for file in files.values())
        + (". Queries are named with their folders: file names repeat." if whole_paths else ""),
    ]
    if is_split(args):
        protocol.insert(
            1,
            f"Made from posed images: every {args.every}th is a query, its reference images are "
            f"the {QUERY_PAIRS} with the largest overlap; retrieval is not part of the test.",
        )
    figures = [_figure(methods, problem, results, queries)] if known else []
    return Report(
        task="localization",
        title=f"Localization: {args.data.resolve().name}",
        protocol=protocol,
        tables=[Table(f"Localization: {args.data.resolve().name}", columns, rows)],
        figures=figures,
        skipped=skipped,
        details={
            method.label: {**results[method.label], "file": str(files[method.label])}
            for method in methods
        },
    )


def _figure(
    methods: list[Method], problem: Problem, results: dict[str, dict], queries: list[str]
) -> Figure:
    def paint(axis: Any) -> None:
        for number, method in enumerate(methods):
            errors = query_errors(results[method.label]["poses"], problem.truth, queries)
            distances = np.sort(errors[:, 0])
            share = np.arange(1, len(distances) + 1) / len(distances)
            finite = np.isfinite(distances)
            axis.step(
                np.r_[1e-4, np.maximum(distances[finite], 1e-4), 1e3],
                np.r_[0, share[finite], finite.mean()],
                where="post",
                color=COLOURS[number % len(COLOURS)],
                label=method.label,
            )
        axis.set(xscale="log", xlim=(1e-3, 10), ylim=(0, 1.02), xlabel="position error, m")
        axis.set_ylabel("share of queries")
        for distance, _ in THRESHOLDS:
            axis.axvline(distance, color="#8a99a8", linewidth=0.8, linestyle=":")
        axis.legend(fontsize=8)

    return Figure(
        "Position errors of the queries", draw(paint), "Dotted: the benchmark's three limits."
    )
