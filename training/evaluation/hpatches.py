"""Matching accuracy on sequences of images related by homographies (Sec. IV-B).

--data is a folder in HPatches' layout: one folder per sequence with images 1, 2, ... (.ppm, .jpg
or .png) and text files H_1_2, H_1_3, ..., each the homography from image 1 as nine numbers. A
folder that is one sequence itself will do. Names that begin with i_ and v_ are counted as
illumination and viewpoint; the eight sequences that the paper leaves out are left out. HPatches is
at https://github.com/hpatches/hpatches-dataset (hpatches-sequences-release).
"""

from __future__ import annotations

import argparse
import csv
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_ros.errors import InputError
from scfeat_ros.sources import IMAGE_SUFFIXES
from scfeat_training.evaluation.cache import Cache
from scfeat_training.evaluation.data import list_images, load_homography, require_folder
from scfeat_training.evaluation.estimators import estimate_homography
from scfeat_training.evaluation.methods import PAPER_OPTIONS, Method, match_indices
from scfeat_training.evaluation.metrics import (
    MMA_THRESHOLDS,
    corner_error,
    homography_errors,
    homography_matching_score,
    matching_accuracy,
    median_milliseconds,
    mma_score,
    repeatability,
)
from scfeat_training.evaluation.report import (
    COLOURS,
    Figure,
    Report,
    Table,
    draw,
    progress_bar,
)

MAX_KEYPOINTS = 8000
COMPLETE = {"illumination": 52, "viewpoint": 56}
"""Sequences of the paper's protocol, with five pairs each."""

LEFT_OUT = {
    "i_contruction",
    "i_crownnight",
    "i_dc",
    "i_pencils",
    "i_whitebuilding",
    "v_artisans",
    "v_astronautis",
    "v_talent",
}
"""Sequences of high resolution that D2-Net's protocol, and so the paper, leaves out."""

HOMOGRAPHY_THRESHOLDS = (1, 3, 5)
REPEATABILITY_THRESHOLD = 3.0
PUBLISHED_STYLES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
RESULT_VERSION = 2
LAYOUT = (
    "one folder per sequence with images 1.ppm, 2.ppm, ... (or .jpg, .png) and homographies "
    "H_1_2, H_1_3, ..."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task alone."""
    parser.add_argument(
        "--all-sequences", action="store_true", help="keep the sequences that the paper leaves out"
    )
    parser.add_argument(
        "--paper-options",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="SCFeat with the paper's NMS radius 1 and score threshold 1.0 (default: yes)",
    )


def check_data(args: argparse.Namespace) -> None:
    """Refuse a wrong folder before any model is loaded."""
    find_sequences(args.data, args.all_sequences)


def find_sequences(folder: Path, all_sequences: bool = False) -> tuple[list[Path], list[str]]:
    """Sequence folders, those with an H_1_k file, and one sentence for each with images alone.

    Raises:
        InputError: no such folder, an empty one, or none of its folders is a sequence.
    """
    folder = require_folder(folder, LAYOUT)
    candidates = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    found = [p for p in candidates if any(p.glob("H_1_*"))]
    if not found:
        raise InputError(f"--data {folder}: no folder in it has a file H_1_2. Expected: {LAYOUT}")
    bare = [p for p in candidates[1:] if p not in found and list_images(p)]
    kept, bare = (
        [p for p in some if all_sequences or p.name not in LEFT_OUT] for some in (found, bare)
    )
    if not kept:
        raise InputError(
            f"--data {folder}: all of its sequences are among the eight that the paper leaves out; "
            "--all-sequences keeps them"
        )
    return kept, [f"{p}: images, but no homography H_1_2, H_1_3, ..." for p in bare]


def _image(folder: Path, stem: str) -> Path:
    for suffix in IMAGE_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise InputError(f"{folder}: there is no image {stem} (.ppm, .jpg or .png)")


def split_of(sequence: str) -> str:
    """Which split a sequence's name says it belongs to."""
    return {"i_": "illumination", "v_": "viewpoint"}.get(sequence[:2], "other")


def evaluate_pair(
    method: Method, cache: Cache, first_path: Path, second_path: Path, H: np.ndarray
) -> dict[str, Any]:
    """All measures of one image pair."""
    first = cache.extract(method, first_path)
    second = cache.extract(method, second_path)
    a, b = first.features, second.features
    indices = match_indices(a, b)
    points_a, points_b = a.keypoints[indices[:, 0]], b.keypoints[indices[:, 1]]
    errors = homography_errors(H, points_a, points_b)
    corners = corner_error(estimate_homography(points_a, points_b), H, a.image_size)
    sizes = a.image_size, b.image_size
    return {
        "features": [len(a), len(b)],
        "matches": len(indices),
        "accuracy": matching_accuracy(errors, MMA_THRESHOLDS).tolist(),
        "repeatability": repeatability(
            a.keypoints, b.keypoints, H, *sizes, REPEATABILITY_THRESHOLD
        ),
        "matching_score": homography_matching_score(
            a.keypoints, b.keypoints, indices, H, *sizes, REPEATABILITY_THRESHOLD
        ),
        "homography": [float(corners <= threshold) for threshold in HOMOGRAPHY_THRESHOLDS],
        "seconds": [first.seconds, second.seconds],
    }


def run(args: argparse.Namespace, methods: list[Method], cache: Cache) -> Report:
    """Evaluate all methods on all sequences."""
    sequences, skipped = find_sequences(args.data, args.all_sequences)
    pairs: list[tuple[str, Path, Path, np.ndarray]] = []
    for sequence in sequences:
        for file in sorted(sequence.glob("H_1_*")):
            try:
                H = load_homography(file)
                target = file.name.removeprefix("H_1_").split(".")[0]
                pairs.append((sequence.name, _image(sequence, "1"), _image(sequence, target), H))
            except InputError as error:
                skipped.append(str(error))
    if not pairs:
        raise InputError(f"--data {args.data}: no pair can be used; first reason: {skipped[0]}")
    if args.paper_options:
        methods = [m.with_options(**PAPER_OPTIONS) for m in methods]
    results: dict[str, list[tuple[str, str, dict]]] = {m.label: [] for m in methods}
    broken: dict[tuple[Path, Path], str] = {}
    with progress_bar(len(methods) * len(pairs), "hpatches", "pair") as progress:
        for method in methods:
            for name, first, second, H in pairs:
                progress.set_postfix_str(f"{method.label} {name}", refresh=False)
                try:
                    key = {
                        "task": "hpatches",
                        "version": RESULT_VERSION,
                        "method": method.fingerprint(),
                        "images": [cache.digest(first), cache.digest(second)],
                        "max_size": cache.max_size,
                        "H": H.tolist(),
                    }
                    value = cache.result(
                        key,
                        lambda m=method, a=first, b=second, H=H: evaluate_pair(m, cache, a, b, H),
                    )
                    results[method.label].append((name, second.stem, value))
                except InputError as error:
                    broken[first, second] = str(error)
                progress.update()
    skipped += [f"pair left out: {reason}" for reason in broken.values()]
    if len(broken) == len(pairs):
        raise InputError(f"--data {args.data}: no pair can be used; first reason: {skipped[0]}")
    return _report(args, methods, results, skipped, cache)


def _report(
    args: argparse.Namespace,
    methods: list[Method],
    results: dict[str, list[tuple[str, str, dict]]],
    skipped: list[str],
    cache: Cache,
) -> Report:
    names = {name for name, _, _ in next(iter(results.values()))}
    splits = [
        s for s in ("illumination", "viewpoint", "other") if any(split_of(n) == s for n in names)
    ]
    groups = [*splits, "overall"] if len(splits) > 1 else splits
    tables, curves = [], {}
    for group in groups:
        rows = []
        for method in methods:
            chosen = [
                value
                for name, _, value in results[method.label]
                if group == "overall" or split_of(name) == group
            ]
            mma = np.mean([v["accuracy"] for v in chosen], axis=0)
            curves[method.label, group] = mma
            homography = np.mean([v["homography"] for v in chosen], axis=0)
            features = _by_image(results[method.label], group, "features")
            seconds = _by_image(results[method.label], group, "seconds")
            rows.append(
                [
                    method.label,
                    len(chosen),
                    float(np.mean(features)),
                    float(np.mean([v["matches"] for v in chosen])),
                    mma_score(mma),
                    *(float(mma[t - 1]) for t in (1, 3, 5, 10)),
                    float(np.mean([v["repeatability"] for v in chosen])),
                    float(np.mean([v["matching_score"] for v in chosen])),
                    *(float(h) for h in homography),
                    median_milliseconds(seconds),
                ]
            )
        columns = ["method", "pairs", "features", "matches", "MMAScore"]
        columns += [f"MMA@{t}" for t in (1, 3, 5, 10)] + ["repeat.", "match. score"]
        columns += [f"H@{t}" for t in HOMOGRAPHY_THRESHOLDS] + ["ms / image"]
        count = len({n for n in names if group in ("overall", split_of(n))})
        plural = "sequence" if count == 1 else "sequences"
        tables.append(Table(f"{group}, {count} {plural}", columns, rows))
    if len(names) > 1:
        tables.append(_by_sequence(methods, results))
    if {"illumination", "viewpoint"} & set(groups):
        tables.append(_published_table())
    differences = _differences(args, results, bool(skipped or cache.failures))
    return Report(
        task="hpatches",
        title=f"Matching accuracy: {args.data.resolve().name}",
        protocol=[
            f"{len(names)} sequences, image 1 against each other one; at most "
            f"{args.max_keypoints} features per image, {cache.size_limit()}; mutual nearest "
            "neighbours.",
            "SCFeat with NMS radius 1 and score threshold 1.0, as in the paper (Sec. IV-B)."
            if args.paper_options
            else "SCFeat with the options given, not the paper's.",
            "MMA@t: share of a pair's matches within t px of the true place in the second image, "
            "mean over pairs; a pair without matches counts 0. MMAScore: Eq. 24.",
            f"Repeatability and matching score at {REPEATABILITY_THRESHOLD:g} px, both directions, "
            "in the region that both images show.",
            "H@t: share of pairs whose homography (USAC_MAGSAC, 3 px, fixed seed) moves the four "
            "image corners by at most t px on average.",
            "ms / image: median time of one extraction on the machine named below, at the time "
            "when the features were made. Here and in the number of features image 1 of a sequence "
            "counts once.",
            f"This is not the paper's protocol on its 108 sequences ({'; '.join(differences)}): "
            "compare the methods in this table with one another, not with published figures."
            if differences
            else "This is the paper's protocol on all of its 108 sequences.",
        ],
        tables=tables,
        figures=[_figure(methods, curves, groups)],
        skipped=skipped,
        details={
            label: [{"sequence": n, "image": i, **v} for n, i, v in values]
            for label, values in results.items()
        },
    )


def _by_image(values: list[tuple[str, str, dict]], group: str, key: str) -> list[float]:
    """One value for each image of a group's sequences; image 1 is in all pairs of its sequence."""
    found = {}
    for name, image, value in values:
        if group in ("overall", split_of(name)):
            found[name, "1"], found[name, image] = value[key]
    return list(found.values())


def _differences(
    args: argparse.Namespace, results: dict[str, list[tuple[str, str, dict]]], incomplete: bool
) -> list[str]:
    """How a run differs from the paper's protocol on all of its sequences."""
    names = {name for values in results.values() for name, _, _ in values}
    counts = {split: sum(split_of(name) == split for name in names) for split in COMPLETE}
    pairs = min(map(len, results.values()))
    found = []
    if counts != COMPLETE or len(names) != sum(COMPLETE.values()):
        found.append(f"{len(names)} sequences")
    if pairs != 5 * sum(COMPLETE.values()):
        found.append(f"{pairs} pairs in place of 540")
    if incomplete:
        found.append("some images or pairs are left out")
    if args.max_size:
        found.append(f"images of at most {args.max_size} px")
    if args.max_keypoints != MAX_KEYPOINTS:
        found.append(f"{args.max_keypoints} keypoints in place of {MAX_KEYPOINTS}")
    if not args.paper_options:
        found.append("SCFeat without the paper's options")
    return found


def _by_sequence(methods: list[Method], results: dict[str, list[tuple[str, str, dict]]]) -> Table:
    names = sorted({name for name, _, _ in next(iter(results.values()))})
    rows = []
    for name in names:
        row: list[Any] = [name]
        for method in methods:
            curves = [v["accuracy"] for n, _, v in results[method.label] if n == name]
            row.append(mma_score(np.mean(curves, axis=0)))
        rows.append(row)
    return Table("MMAScore by sequence", ["sequence", *(m.label for m in methods)], rows)


def published() -> list[dict[str, str]]:
    """Rows of published.csv: HPatches figures that others printed, with their sources."""
    file = resources.files("scfeat_training.evaluation") / "published.csv"
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def _published_table() -> Table:
    rows: dict[str, list[Any]] = {}
    for entry in published():
        row = rows.setdefault(entry["method"], [entry["method"], None, None, None, None, None, ""])
        column = {"viewpoint": 3, "illumination": 4, "overall": 5}[entry["split"]]
        row[column] = float(entry["mma_score"]) / 100
        if entry["features"]:
            row[1:3] = float(entry["features"]), float(entry["matches"])
        row[6] = entry["source"].split(";")[0].removeprefix("curve: ")
    columns = ["method", "features", "matches", "viewpoint", "illumination", "overall", "source"]
    return Table(
        "Published MMAScores on all 108 sequences: not measured here",
        columns,
        list(rows.values()),
        "Copied from the sources named; published.csv lists them in full.",
        printed=False,
    )


def _figure(
    methods: list[Method], curves: dict[tuple[str, str], np.ndarray], groups: list[str]
) -> Figure:
    """MMA against the threshold, one panel per split, like the paper's Fig. 8."""
    others = [entry for entry in published() if entry["mma_1"]]
    if not {"illumination", "viewpoint"} & set(groups):
        others = []
    names = list(dict.fromkeys(entry["method"] for entry in others))

    def paint(axes: Any) -> None:
        for axis, group in zip(np.atleast_1d(axes), groups, strict=True):
            for entry in others:
                if entry["split"] == group:
                    number = names.index(entry["method"])
                    axis.plot(
                        MMA_THRESHOLDS,
                        [float(entry[f"mma_{t}"]) for t in MMA_THRESHOLDS],
                        color=str(0.45 + 0.06 * (number % 6)),
                        linestyle=PUBLISHED_STYLES[number % len(PUBLISHED_STYLES)],
                        linewidth=1.1,
                        label=f"{entry['method']} (published)",
                    )
            for number, method in enumerate(methods):
                axis.plot(
                    MMA_THRESHOLDS,
                    curves[method.label, group],
                    color=COLOURS[number % len(COLOURS)],
                    marker="o",
                    markersize=3,
                    label=method.label,
                )
            axis.set(title=group, xlabel="threshold, px", ylim=(0, 1), xticks=MMA_THRESHOLDS)
        first = np.atleast_1d(axes)[0]
        first.set_ylabel("MMA")
        handles, labels = first.get_legend_handles_labels()
        first.figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)

    caption = "Coloured: measured here."
    if others:
        caption += (
            " Grey: published by others for all 108 sequences of HPatches, not measured here; they "
            "compare with the coloured curves only where all of HPatches was run."
        )
    # the legend stands beside the panels, as wide as its longest label
    longest = max(map(len, [*(m.label for m in methods), *(f"{n} (published)" for n in names)]))
    width = 3.4 * len(groups) + 0.6 + 0.065 * longest
    return Figure("MMA against the threshold", draw(paint, width, columns=len(groups)), caption)
