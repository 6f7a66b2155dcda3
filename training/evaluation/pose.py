"""Relative pose of image pairs, as AUC of the pose error.

--data is one of:
  a scene          images/ and scene.npz (names, K, R, t, size_wh, pairs, overlap)
  a COLMAP project images/ and sparse/0, without distortion; the overlap of two images is the
                   number of 3D points that both see, over the smaller number that one of them sees
  several scenes   a folder of such folders
  a pairs file     SuperGlue's format, 38 fields a line (two names, two rotations, K, K, 4x4 pose),
                   or a folder with exactly one such .txt; --images names the image folder
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_training.evaluation.cache import Cache
from scfeat_training.evaluation.data import (
    PosedPair,
    find_scenes,
    parse_pairs_file,
    read_usable_scene,
    require_folder,
)
from scfeat_training.evaluation.estimators import (
    POSE_ESTIMATORS,
    check_estimators,
    poselib_version,
)
from scfeat_training.evaluation.methods import Method, match_indices
from scfeat_training.evaluation.metrics import (
    auc,
    direction_error,
    median_milliseconds,
    motion_errors,
    rotation_error,
)
from scfeat_training.evaluation.report import (
    COLOURS,
    Figure,
    Report,
    Table,
    draw,
    progress_bar,
)
from scfeat_training.geometry import relative_pose
from scfeat_training.scenes import Scene

MAX_KEYPOINTS = 2048
AUC_THRESHOLDS = (5, 10, 20)
RESULT_VERSION = 3
LAYOUT = (
    "a scene (images/ and scene.npz, or a COLMAP project: images/ and sparse/0), a folder of "
    "scenes, or a SuperGlue pairs file (38 fields a line) with --images"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task alone."""
    parser.add_argument("--images", type=Path, help="image folder of a pairs file")
    parser.add_argument(
        "--overlap",
        type=float,
        nargs=2,
        default=(0.1, 0.7),
        metavar=("LOW", "HIGH"),
        help="pairs of a scene with an overlap in this range (default: 0.1 0.7)",
    )
    parser.add_argument(
        "--max-pairs",
        type=int,
        default=0,
        help="of each scene, drawn with a fixed seed; 0 takes all (default: %(default)s)",
    )
    parser.add_argument(
        "--estimators",
        default="magsac,poselib",
        help="comma-separated: magsac and poselib with 10,000 iterations, magsac-1000 with "
        "OpenCV's default of 1,000 on normalized points (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        help="inlier threshold of the estimators, pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="estimate every pose this many times, from matches in a different order: AUC is "
        "the mean, and how far chance moves it is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--precision-threshold",
        type=float,
        default=2.0,
        help="a match is right within this distance of the true epipolar line, pixels "
        "(default: %(default)s)",
    )


def check_data(args: argparse.Namespace) -> None:
    """Refuse a wrong folder or estimator before any model is loaded."""
    _groups(args)
    check_estimators(_estimators(args), "--estimators")


def _estimators(args: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in args.estimators.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def scene_pairs(scene: Scene, overlap: tuple[float, float], max_pairs: int = 0) -> list[PosedPair]:
    """Pairs of a scene whose overlap lies in a range, at most `max_pairs`, drawn at random."""
    chosen = np.flatnonzero((scene.overlap >= overlap[0]) & (scene.overlap <= overlap[1]))
    if max_pairs and len(chosen) > max_pairs:
        chosen = chosen[np.random.default_rng(0).permutation(len(chosen))[:max_pairs]]
    pairs = []
    for i, j in scene.pairs[chosen]:
        R, t = relative_pose(scene.R[i], scene.t[i], scene.R[j], scene.t[j])
        pairs.append(PosedPair(scene.paths[i], scene.paths[j], scene.K[i], scene.K[j], R, t))
    return pairs


def _groups(args: argparse.Namespace) -> tuple[dict[str, list[PosedPair]], list[str]]:
    """Pairs by scene name, and what could not be used."""
    data: Path = args.data
    if data.is_file():
        images = args.images or data.parent
        pairs, problems = parse_pairs_file(data, images)
        return {data.stem: pairs}, problems
    require_folder(data, LAYOUT)
    scenes = find_scenes(data)
    if scenes:
        groups, problems = {}, []
        for folder in scenes:
            try:
                scene, bad = read_usable_scene(folder)
            except InputError as error:
                if len(scenes) == 1:
                    raise
                problems.append(str(error))
                continue
            problems += bad
            groups[folder.name] = scene_pairs(scene, args.overlap, args.max_pairs)
            if not groups[folder.name]:
                problems.append(
                    f"{folder}: no pair has an overlap in {args.overlap[0]:g} to "
                    f"{args.overlap[1]:g}; widen --overlap"
                )
        if not any(groups.values()):
            raise InputError(f"--data {data}: no pair can be used; first reason: {problems[0]}")
        return groups, problems
    files = sorted(data.glob("*.txt"))
    if len(files) != 1:
        raise InputError(
            f"--data {data}: no scene, and {len(files)} .txt files in it. Expected: {LAYOUT}"
        )
    folders = sorted(p for p in data.iterdir() if p.is_dir())
    images = args.images or (folders[0] if len(folders) == 1 else data)
    pairs, problems = parse_pairs_file(files[0], images)
    return {files[0].stem: pairs}, problems


def evaluate_pair(
    method: Method, cache: Cache, pair: PosedPair, estimators: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """All measures of one pair; by estimator a pose error for each run, None for a failure."""
    first, second = cache.extract(method, pair.first), cache.extract(method, pair.second)
    a, b = first.features, second.features
    indices = match_indices(a, b)
    points_a, points_b = a.keypoints[indices[:, 0]], b.keypoints[indices[:, 1]]
    distances = motion_errors(pair.K1, pair.K2, pair.R, pair.t, points_a, points_b)
    right = int((distances <= args.precision_threshold).sum())
    errors: dict[str, list] = {name: [] for name in estimators}
    for run in range(args.runs):
        # a fixed seed draws other samples from another order; the first run is in the own one
        order = np.random.default_rng(run).permutation(len(indices)) if run else slice(None)
        for name in estimators:
            found = POSE_ESTIMATORS[name](
                points_a[order], points_b[order], pair.K1, pair.K2, args.threshold
            )
            errors[name].append(
                None
                if found is None
                else [rotation_error(found[0], pair.R), direction_error(found[1], pair.t)]
            )
    keypoints = (len(a) + len(b)) / 2
    return {
        "features": keypoints,
        "matches": len(indices),
        "precision": right / len(indices) if len(indices) else 0.0,
        "matching_score": right / keypoints if keypoints else 0.0,
        "errors": errors,
        "seconds": [first.seconds, second.seconds],
    }


def run(args: argparse.Namespace, methods: list[Method], cache: Cache) -> Report:
    """Evaluate all methods on all pairs."""
    groups, skipped = _groups(args)
    estimators = _estimators(args)
    total = sum(map(len, groups.values()))
    results: dict[tuple[str, str], list[dict]] = {}
    broken: dict[tuple[Path, Path], str] = {}
    with progress_bar(total * len(methods), "pose", "pair") as progress:
        for method in methods:
            for group, pairs in groups.items():
                values = results.setdefault((method.label, group), [])
                progress.set_postfix_str(f"{method.label} {group}", refresh=False)
                for pair in pairs:
                    try:
                        key = {
                            "task": "pose",
                            "version": RESULT_VERSION,
                            "method": method.fingerprint(),
                            "images": [cache.digest(pair.first), cache.digest(pair.second)],
                            "max_size": cache.max_size,
                            "pair": [v.tolist() for v in (pair.K1, pair.K2, pair.R, pair.t)],
                            "estimators": estimators,
                            "poselib": poselib_version(),
                            "thresholds": [args.threshold, args.precision_threshold],
                            "runs": args.runs,
                        }
                        value = cache.result(
                            key,
                            lambda m=method, p=pair: evaluate_pair(m, cache, p, estimators, args),
                        )
                        values.append(
                            {"first": pair.first.name, "second": pair.second.name, **value}
                        )
                    except InputError as error:
                        broken[pair.first, pair.second] = str(error)
                    progress.update()
    skipped += [f"pair left out: {reason}" for reason in broken.values()]
    if len(broken) == total:
        raise InputError(f"--data {args.data}: no pair can be used; first reason: {skipped[0]}")
    return _report(args, methods, cache, results, skipped)


def worst_errors(values: list[dict], estimator: str, runs: int) -> np.ndarray:
    """(runs, pairs): the larger of rotation and direction error in degrees, inf for a failure."""
    errors = [np.inf if e is None else max(e) for v in values for e in v["errors"][estimator]]
    return np.array(errors).reshape(-1, runs).T


def _report(
    args: argparse.Namespace,
    methods: list[Method],
    cache: Cache,
    results: dict[tuple[str, str], list[dict]],
    skipped: list[str],
) -> Report:
    estimators = _estimators(args)
    groups = list(dict.fromkeys(group for _, group in results))
    tables = []
    for group in groups:
        rows = []
        for method in methods:
            values = results[method.label, group]
            row: list[Any] = [method.label, len(values)]
            for name in estimators:
                if not values:
                    row += [None] * (len(AUC_THRESHOLDS) + (args.runs > 1))
                    continue
                by_run = 100 * np.array(
                    [
                        auc(errors, AUC_THRESHOLDS)
                        for errors in worst_errors(values, name, args.runs)
                    ]
                )
                row += by_run.mean(axis=0).tolist()
                if args.runs > 1:
                    row.append(float(by_run[:, 1].std(ddof=1)))
            for key in ("precision", "matching_score", "matches", "features"):
                row.append(float(np.mean([v[key] for v in values])) if values else None)
            row.append(median_milliseconds([s for v in values for s in v["seconds"]]))
            rows.append(row)
        columns = ["method", "pairs"]
        for name in estimators:
            columns += [f"{name} AUC@{t}" for t in AUC_THRESHOLDS]
            if args.runs > 1:
                columns.append(f"{name} std@{AUC_THRESHOLDS[1]}")
        columns += ["precision", "match. score", "matches", "features", "ms / image"]
        tables.append(Table(f"Relative pose: {group}", columns, rows))
    return Report(
        task="pose",
        title=f"Relative pose: {args.data.resolve().name}",
        protocol=[
            f"At most {args.max_keypoints} features per image, {cache.size_limit()}; mutual "
            "nearest neighbours.",
            f"Inlier threshold {args.threshold:g} px, confidence 0.99999, fixed seeds. magsac: "
            "essential matrix by OpenCV's USAC_MAGSAC, 10,000 iterations; poselib: LO-RANSAC with "
            "refinement, 10,000 iterations; magsac-1000: USAC_MAGSAC on normalized points with "
            "1,000 iterations.",
            "Error: the larger of the rotation's angle and the angle between the translations "
            "(sign left out). AUC in %, the area under the recall curve up to 5, 10, 20 degrees; a "
            "pair without a pose counts as a failure." + _about_runs(args.runs),
            f"Precision: share of matches within {args.precision_threshold:g} px of the true "
            "epipolar lines in both images, mean over pairs. Matching score: such matches over "
            "the mean number of features.",
            "ms / image: median time of one extraction on the machine named below, at the time "
            "when the features were made.",
        ],
        tables=tables,
        figures=[
            _figure(methods, results, group, estimators[0], args.runs)
            for group in groups
            if all(results[method.label, group] for method in methods)
        ],
        skipped=skipped,
        details={f"{label}, {group}": values for (label, group), values in results.items()},
    )


def _about_runs(runs: int) -> str:
    if runs == 1:
        return ""
    return (
        f" Mean of {runs} runs on the same matches in different orders; std: standard deviation "
        f"of a single run's AUC@{AUC_THRESHOLDS[1]}."
    )


def _figure(
    methods: list[Method],
    results: dict[tuple[str, str], list[dict]],
    group: str,
    estimator: str,
    runs: int,
) -> Figure:
    def paint(axis: Any) -> None:
        for number, method in enumerate(methods):
            errors = np.sort(worst_errors(results[method.label, group], estimator, runs).ravel())
            recall = np.arange(1, len(errors) + 1) / max(len(errors), 1)
            axis.step(
                np.r_[0, errors, 1e9],
                np.r_[0, recall, recall[-1:]],
                where="post",
                color=COLOURS[number % len(COLOURS)],
                label=method.label,
            )
        axis.set(xlabel="pose error, degrees", ylabel="share of poses", xlim=(0, 20), ylim=(0, 1))
        axis.legend(fontsize=8)

    return Figure(f"Recall against pose error: {group}", draw(paint), f"Estimator: {estimator}.")
