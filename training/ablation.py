"""The table of ablations (Table III): trained runs and inference options on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scfeat_ros.extractor import Extractor
from scfeat_ros.matcher import match
from scfeat_training.datasets import match_errors, pair_images
from scfeat_training.evaluation.metrics import mma_score
from scfeat_training.networks import load_network
from scfeat_training.scenes import Scene
from scfeat_training.validation import NEAR, held_out_pairs, share

THRESHOLDS = range(1, 11)
VARIANTS = {
    "": {},
    "bilinear samples (Eq. 23)": {"descriptor_sampling": "bilinear"},
    "with pruning (descriptors before the bridge)": {"descriptor_source": "backbone"},
    "fusion normalization (Eq. 25)": {"descriptor_norm": "fusion"},
}
"""Options of the extractor that make the rows of one run."""
WITHOUT_RELIABILITY = {
    "scores without the reliability": {},
    "all three, as in the paper": {
        "descriptor_source": "backbone",
        "descriptor_sampling": "bilinear",
    },
}
"""And those of rows in which the detector's own scores count."""


def measure(extractor: Extractor, pairs: Sequence[dict]) -> dict[str, float]:
    """Figures of one extractor on pairs of `HomographyPairs` and `PosedPairs`.

    Returns:
        mma1, mma3, mma_score: on homographies, a pair without matches counts 0; line: share of
        matches within `NEAR` px of the epipolar line, NaN without posed pairs; matches: mutual
        matches a pair.
    """
    accuracies, line, counts = [], [], []
    for pair in pairs:
        first, second = map(extractor, pair_images(pair))
        one, other = match(first, second).indices.T
        errors = match_errors(pair, first.keypoints[one], second.keypoints[other])
        counts.append(len(errors))
        if "H" in pair:
            accuracies.append([share(errors, threshold) for threshold in THRESHOLDS])
        else:
            line.append(share(errors, NEAR))
    mean = np.mean(accuracies, axis=0)
    return {
        "mma1": float(mean[0]),
        "mma3": float(mean[2]),
        "mma_score": mma_score(mean),
        "line": float(np.mean(line)) if line else float("nan"),
        "matches": float(np.mean(counts)),
    }


def table(
    runs: dict[str, str | Path],
    scenes: Sequence[Scene],
    count: int,
    size: tuple[int, int],
    skip_bad: bool = False,
    on_bad: Callable[[str], None] = lambda line: None,
) -> str:
    """A Markdown table: every run, and the first one with every variant of the extractor.

    Args:
        runs: name of a row: checkpoint, run's folder, or weights by name or file.
        scenes: held-out scenes.
        count: homography pairs, and as many posed pairs.
        size: (width, height) of the pairs.
        skip_bad, on_bad: see `held_out_pairs`.
    """
    models = {name: load_network(run)[0] for name, run in runs.items()}
    pairs = held_out_pairs(scenes, count, size, skip_bad, on_bad)
    lines = [
        "| variant | MMA@1 | MMA@3 | MMAScore | within 2 px of the line | matches |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, (name, model) in enumerate(models.items()):
        variants = {"": {}} if number else VARIANTS | WITHOUT_RELIABILITY
        for variant, options in variants.items():
            if variant in WITHOUT_RELIABILITY:
                model.detector.reliability = model.detector.reliability.unfitted()
            # the plain network: the fast one knows the complete architecture only
            plain = {"precision": "fp32", "compile": "off", "max_keypoints": 1000}
            figures = measure(Extractor(model, "cpu", **plain, **options), pairs)
            row = [f"{name}, {variant}" if variant else name]
            shown = (figures[key] for key in ("mma1", "mma3", "mma_score", "line"))
            row += ["-" if np.isnan(figure) else f"{figure:.3f}" for figure in shown]
            lines.append("| " + " | ".join([*row, f"{figures['matches']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"
