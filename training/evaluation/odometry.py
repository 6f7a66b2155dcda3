"""Matches, tracks and a plain monocular visual odometry on consecutive frames.

--data is one of:
  a scene   images/ and scene.npz with one camera
  COLMAP    images/ in the order of their names, and a sparse model with one undistorted camera
  KITTI     image_0/ or image_2/, calib.txt, and poses.txt or ../../poses/NN.txt
  TUM       rgb.txt, groundtruth.txt, with --intrinsics
  EuRoC     mav0/cam0 with sensor.yaml and data.csv, mav0/state_groundtruth_estimate0
  a bag     .mcap, .db3, .bag or a ROS 2 bag folder, with an image topic and its CameraInfo
  images    any image folder, with --intrinsics
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_training.evaluation.cache import Cache, CorruptImageError, read_image
from scfeat_training.evaluation.estimators import (
    POSE_ESTIMATORS,
    check_estimators,
    poselib_version,
)
from scfeat_training.evaluation.methods import Method, match_indices
from scfeat_training.evaluation.metrics import (
    median_milliseconds,
    motion_errors,
    similarity_transform,
    track_lengths,
)
from scfeat_training.evaluation.report import (
    COLOURS,
    Figure,
    Report,
    Table,
    draw,
    format_cell,
    progress_bar,
)
from scfeat_training.evaluation.sequences import Sequence, load_sequence

MAX_KEYPOINTS = 1000
RESULT_VERSION = 3
SCORES = ("ate", "rpe_translation", "rpe_rotation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task alone."""
    parser.add_argument("--step", type=int, default=1, help="take every n-th frame (default: 1)")
    parser.add_argument(
        "--max-frames", type=int, default=0, help="stop after n frames; 0 never (default: 0)"
    )
    parser.add_argument(
        "--intrinsics",
        type=_numbers,
        help="fx,fy,cx,cy and 0, 4, 5 or 8 distortion coefficients, pixels; write "
        "--intrinsics=... where the first is negative",
    )
    parser.add_argument("--poses", type=Path, help="KITTI poses file, if it lies elsewhere")
    parser.add_argument("--topic", help="image topic of a bag")
    parser.add_argument(
        "--pose-topic",
        help="topic of a bag with ground-truth poses of the camera's optical frame (PoseStamped, "
        "Odometry or TransformStamped)",
    )
    parser.add_argument(
        "--estimator",
        default="poselib",
        help="of the motion between frames: poselib or magsac (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        help="inlier threshold of the essential matrix, pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="estimate every motion this many times, from matches in a different order: ATE "
        "and RPE are medians, and how far chance moves them is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--precision-threshold",
        type=float,
        default=2.0,
        help="a match is right within this distance of the true epipolar line, pixels "
        "(default: %(default)s)",
    )


def _numbers(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def check_data(args: argparse.Namespace) -> None:
    """Read the sequence before any model is loaded, and refuse it if it cannot be used."""
    if args.step < 1:
        raise InputError("--step must be at least 1")
    check_estimators([args.estimator], "--estimator")
    sequence = load_sequence(
        args.data, args.intrinsics, args.poses, args.topic, args.pose_topic, args.output / "frames"
    )
    if sequence.poses is not None and importlib.util.find_spec("evo") is None:
        raise InputError("evo is not installed: pip install evo (it scores the trajectory)")
    chosen = np.arange(0, len(sequence.frames), args.step)
    if args.max_frames:
        chosen = chosen[: args.max_frames]
    args.sequence = sequence.select(chosen)
    if len(chosen) < 2:
        raise InputError(f"--data {args.data}: fewer than 2 frames left after --step/--max-frames")


def match_errors(
    sequence: Sequence, step: int, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """(M,) distances of matches from what the true motion from frame `step` on allows, pixels."""
    motion = np.linalg.inv(sequence.poses[step + 1]) @ sequence.poses[step]
    K = sequence.camera.K
    return motion_errors(K, K, motion[:3, :3], motion[:3, 3], first, second)


def evaluate_method(
    method: Method, sequence: Sequence, cache: Cache, args: argparse.Namespace, progress: Any
) -> dict[str, Any]:
    """Match consecutive frames and chain the motions, in every run; frames are readable."""
    before = cache.extract(method, sequence.frames[0])
    counts, seconds = [len(before.features)], [before.seconds]
    kept: list[np.ndarray] = []
    shares, matches, inliers = [], [], []
    start = np.eye(4) if sequence.poses is None else sequence.poses[0]
    # without poses nothing is scored that differs between runs
    count = args.runs if sequence.poses is not None else 1
    runs: list[dict[str, Any]] = [
        {"failures": 0, "estimated_share": [], "trajectory": [start]} for _ in range(count)
    ]
    motions = [np.eye(4)] * count
    for step, path in enumerate(sequence.frames[1:]):
        now = cache.extract(method, path)
        indices = match_indices(before.features, now.features)
        first = sequence.undistort(before.features.keypoints[indices[:, 0]])
        second = sequence.undistort(now.features.keypoints[indices[:, 1]])
        usable = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
        indices, first, second = indices[usable], first[usable], second[usable]
        K = sequence.camera.K
        length = 1.0
        if sequence.poses is not None:
            length = float(
                np.linalg.norm(sequence.poses[step + 1][:3, 3] - sequence.poses[step][:3, 3])
            )
        agreements = []
        for number, run in enumerate(runs):
            # a fixed seed draws other samples from another order; the first run is in the own one
            order = np.arange(len(indices))
            if number:
                order = np.random.default_rng(number).permutation(order)
            found = POSE_ESTIMATORS[args.estimator](
                first[order], second[order], K, K, args.threshold
            )
            agree = np.zeros(len(indices), bool)
            if found is None:  # the motion goes on as it was
                run["failures"] += 1
            else:
                agree[order] = found[2]
                motions[number] = np.eye(4)
                motions[number][:3, :3], motions[number][:3, 3] = found[0], length * found[1]
            run["trajectory"].append(run["trajectory"][-1] @ np.linalg.inv(motions[number]))
            run["estimated_share"].append(float(agree.mean()) if len(agree) else 0.0)
            agreements.append(agree)
        right = (
            agreements[0]
            if sequence.poses is None
            else match_errors(sequence, step, first, second) <= args.precision_threshold
        )
        matches.append(len(indices))
        shares.append(float(right.mean()) if len(right) else 0.0)
        inliers.append(int(right.sum()))
        kept.append(indices[right])
        counts.append(len(now.features))
        seconds.append(now.seconds)
        before = now
        progress.update()
    lengths = track_lengths(kept, counts)
    return {
        "features": counts,
        "matches": matches,
        "inlier_share": shares,
        "inliers": inliers,
        "track_length": float(lengths.mean()) if len(lengths) else None,
        "seconds": seconds,
        "runs": [{**run, "trajectory": np.array(run["trajectory"]).tolist()} for run in runs],
    }


def score_trajectory(trajectory: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """ATE and RPE by evo; both (N, 4, 4) camera to world.

    Returns:
        ate: RMSE of positions after a rigid alignment, metres; None where any trajectory can be
        aligned, that is with two frames or a camera that stands still. rpe_translation (metres)
        and rpe_rotation (degrees): RMSE from frame to frame.
    """
    from evo.core.metrics import APE, RPE, PoseRelation, StatisticsType, Unit
    from evo.core.trajectory import PosePath3D

    reference = PosePath3D(poses_se3=list(_orthonormal(truth)))
    estimate = PosePath3D(poses_se3=list(_orthonormal(trajectory)))
    scores: dict[str, float | None] = {}
    for name, relation in (
        ("rpe_translation", PoseRelation.translation_part),
        ("rpe_rotation", PoseRelation.rotation_angle_deg),
    ):
        metric = RPE(relation, delta=1, delta_unit=Unit.frames, all_pairs=True)
        metric.process_data((reference, estimate))
        scores[name] = float(metric.get_statistic(StatisticsType.rmse))
    scores["ate"] = None
    if len(truth) < 3 or np.ptp(truth[:, :3, 3], axis=0).max() < 1e-9:
        return scores
    # evo's own alignment refuses a straight path, around which the rotation is undetermined; the
    # residuals are those of any rotation that fits best
    alignment = np.eye(4)
    _, alignment[:3, :3], _ = similarity_transform(trajectory[:, :3, 3], truth[:, :3, 3])
    mean, mean_true = (poses[:, :3, 3].mean(axis=0) for poses in (trajectory, truth))
    alignment[:3, 3] = mean_true - alignment[:3, :3] @ mean
    estimate.transform(alignment)
    metric = APE(PoseRelation.translation_part)
    metric.process_data((reference, estimate))
    scores["ate"] = float(metric.get_statistic(StatisticsType.rmse))
    return scores


def _orthonormal(poses: np.ndarray) -> np.ndarray:
    """Poses whose rotations are exactly such; text files round them."""
    poses = np.array(poses, np.float64)
    U, _, Vt = np.linalg.svd(poses[:, :3, :3])
    poses[:, :3, :3] = U @ Vt
    return poses


def run(args: argparse.Namespace, methods: list[Method], cache: Cache) -> Report:
    """Evaluate all methods on the sequence."""
    sequence: Sequence = args.sequence
    readable, skipped = [], list(sequence.skipped)
    digests = []
    for number, path in enumerate(sequence.frames):
        try:
            digests.append(read_image(path)[1])
            readable.append(number)
        except CorruptImageError as error:
            skipped.append(str(error))
    if len(readable) < 2:
        raise InputError(
            f"--data {args.data}: fewer than 2 readable images"
            + (f"; first reason: {skipped[0]}" if skipped else "")
        )
    sequence = sequence.select(np.array(readable))
    results = {}
    steps = len(sequence.frames) - 1
    with progress_bar(steps * len(methods), "odometry", "frame") as progress:
        for number, method in enumerate(methods):
            progress.set_postfix_str(method.label, refresh=False)
            key = {
                "task": "odometry",
                "version": RESULT_VERSION,
                "method": method.fingerprint(),
                "images": digests,
                "max_size": cache.max_size,
                "K": sequence.camera.K.tolist(),
                "distortion": [sequence.camera.model, *sequence.camera.D.tolist()],
                "poses": None if sequence.poses is None else sequence.poses.tolist(),
                "estimator": args.estimator,
                "poselib": poselib_version(),
                "runs": args.runs,
                "thresholds": [args.threshold, args.precision_threshold],
            }
            results[method.label] = cache.result(
                key, lambda m=method, s=sequence: evaluate_method(m, s, cache, args, progress)
            )
            progress.update((number + 1) * steps - progress.n)
    return _report(args, methods, sequence, results, skipped)


def _report(
    args: argparse.Namespace,
    methods: list[Method],
    sequence: Sequence,
    results: dict[str, dict],
    skipped: list[str],
) -> Report:
    known = sequence.poses is not None
    steps = len(sequence.frames) - 1
    rows, odometry_rows = [], []
    for method in methods:
        value = results[method.label]
        rows.append(
            [
                method.label,
                float(np.mean(value["features"])),
                float(np.mean(value["matches"])),
                float(np.mean(value["inlier_share"])),
                float(np.mean(value["inliers"])),
                value["track_length"],
                median_milliseconds(value["seconds"]),
            ]
        )
        if known:
            runs = []
            for one in value["runs"]:
                # where no motion was ever found, there is nothing to score
                scores = dict.fromkeys(SCORES)
                if one["failures"] < steps:
                    scores = score_trajectory(np.array(one["trajectory"]), sequence.poses)
                runs.append({**one, **scores})
            results[method.label] = {**value, "runs": runs}
            row: list[Any] = [method.label]
            for name in SCORES:
                values = [one[name] for one in runs]
                row.append(float(np.median([np.inf if v is None else v for v in values])))
                if args.runs > 1:
                    row.append(_range(values))
            failures = [one["failures"] for one in runs]
            row.append(float(np.mean([one["estimated_share"] for one in runs])))
            row.append(failures[0] if args.runs == 1 else float(np.mean(failures)))
            odometry_rows.append(row)
    tables = [
        Table(
            f"Consecutive frames: {sequence.name}, {len(sequence.frames)} frames",
            [
                "method",
                "features",
                "matches",
                "inlier share" if known else "inlier share (est.)",
                "inliers / frame",
                "track length",
                "ms / image",
            ],
            rows,
        )
    ]
    figures = []
    if known:
        length = float(np.linalg.norm(np.diff(sequence.poses[:, :3, 3], axis=0), axis=1).sum())
        columns = ["method"]
        for name in ("ATE, m", "RPE, m", "RPE, deg"):
            columns += [name, f"{name}: range"] if args.runs > 1 else [name]
        columns += ["RANSAC inlier share", "failures"]
        tables.append(Table(f"Visual odometry over {length:.1f} m", columns, odometry_rows))
        figures.append(_trajectories(methods, sequence, results))
    figures.append(_per_frame(methods, results, known))
    inlier = (
        f"Inlier: a match within {args.precision_threshold:g} px of the true epipolar lines in "
        "both images; shares are means over frames."
        if known
        else f"No poses: an inlier is a match that agrees with the estimated essential matrix at "
        f"{args.threshold:g} px; this flatters a method whose wrong matches agree by chance."
    )
    if sequence.camera.distorts:
        inlier += " Pixels are those of a pinhole camera with the same K, without the distortion."
    return Report(
        task="odometry",
        title=f"Odometry: {sequence.name}",
        protocol=[
            f"{len(sequence.frames)} frames (--step {args.step}), at most {args.max_keypoints} "
            "features; mutual nearest neighbours between consecutive frames.",
            inlier,
            "Track length: mean number of frames of the tracks that chained inliers make.",
            f"Visual odometry: essential matrix by {args.estimator} at {args.threshold:g} px for "
            "each step, length of the step from ground truth, no bundle adjustment over frames, no "
            "loop closing; where no motion is found, the last one is repeated and counted as a "
            "failure.",
            "ATE: RMSE of positions after rigid alignment; RPE: RMSE from frame to frame (evo)."
            + (_about_runs(args.runs) if known else ""),
            "ms / image: median time of one extraction on the machine named below, at the time "
            "when the features were made.",
        ],
        tables=tables,
        figures=figures,
        skipped=skipped,
        details=results,
    )


def _range(values: list[float | None]) -> str | None:
    """The lowest and the highest value as text; None where there is none."""
    known = [v for v in values if v is not None]
    return f"{format_cell(min(known))} to {format_cell(max(known))}" if known else None


def _about_runs(runs: int) -> str:
    if runs == 1:
        return ""
    return (
        f" Medians of {runs} runs on the same matches in different orders; range: of single runs. "
        "Inlier shares of the estimator and failures are means over the runs."
    )


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose ATE is in the middle."""
    order = sorted(runs, key=lambda one: np.inf if one["ate"] is None else one["ate"])
    return order[(len(order) - 1) // 2]


def _trajectories(methods: list[Method], sequence: Sequence, results: dict) -> Figure:
    """Top view: the two directions in which the true path reaches farthest."""
    truth = sequence.poses[:, :3, 3]
    spread = np.ptp(truth, axis=0)
    a, b = sorted(np.argsort(spread)[-2:])

    def paint(axis: Any) -> None:
        axis.plot(truth[:, a], truth[:, b], "k--", linewidth=1.5, label="ground truth")
        for number, method in enumerate(methods):
            path = np.array(_median_run(results[method.label]["runs"])["trajectory"])[:, :3, 3]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(path[:, a], path[:, b], color=colour, label=method.label)
        axis.set(xlabel=f"{'xyz'[a]}, m", ylabel=f"{'xyz'[b]}, m")
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(fontsize=8)

    return Figure(
        "Trajectories",
        draw(paint, height=5),
        "Started at the true first pose, not aligned; the two axes in which the path reaches "
        "farthest. Of several runs, the one whose ATE is in the middle.",
    )


def _per_frame(methods: list[Method], results: dict, known: bool) -> Figure:
    def paint(axes: Any) -> None:
        for number, method in enumerate(methods):
            colour = COLOURS[number % len(COLOURS)]
            axes[0].plot(results[method.label]["inlier_share"], color=colour, label=method.label)
            axes[1].plot(results[method.label]["inliers"], color=colour)
        axes[0].set(xlabel="frame", ylabel="inlier share", ylim=(0, 1))
        axes[1].set(xlabel="frame", ylabel="inliers")
        axes[1].set_ylim(bottom=0)
        axes[0].legend(fontsize=8)

    reference = "true epipolar lines" if known else "estimated essential matrix"
    return Figure("Frame by frame", draw(paint, width=9, columns=2), f"Against the {reference}.")
