"""The offline tool's report: one HTML page without external files."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from scfeat_ros import charts
from scfeat_ros.ground_truth import RIGHT_WITHIN
from scfeat_ros.run_statistics import LONGEST_TRACK, STAGES, RunStatistics

SAMPLES = 8
_SAMPLE_WIDTH = 720
_BLUE, _GREEN, _ORANGE, _VIOLET = "#3b6fd4", "#2f9e5f", "#e08a1e", "#8a4fbf"


@dataclass(frozen=True)
class Sample:
    """A frame for the report: its picture as JPEG, and a caption."""

    jpeg: bytes
    caption: str


class SampleFrames:
    """Samples frames evenly from a run of unknown length; keeps at most twice as many as shown."""

    def __init__(self) -> None:
        self._kept: list[Sample] = []
        self._stride = 1
        self._count = 0

    def wants_next(self) -> bool:
        """Whether to call `add` for the next frame; otherwise call `skip`."""
        return self._count % self._stride == 0

    def skip(self) -> None:
        self._count += 1

    def add(self, picture: np.ndarray, caption: str) -> None:
        """Keep a picture, (H, W, 3) uint8 RGB."""
        self._count += 1
        height, width = picture.shape[:2]
        if width > _SAMPLE_WIDTH:
            size = _SAMPLE_WIDTH, max(1, round(height * _SAMPLE_WIDTH / width))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
        self._kept.append(Sample(jpeg.tobytes(), caption))
        if len(self._kept) == 2 * SAMPLES + 1:
            self._kept = self._kept[::2]
            self._stride *= 2

    def chosen(self) -> list[Sample]:
        """At most `SAMPLES` of them, from first to last."""
        if len(self._kept) <= SAMPLES:
            return self._kept
        indices = np.linspace(0, len(self._kept) - 1, SAMPLES).round().astype(int)
        return [self._kept[i] for i in indices]


_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1d2733;
background:#f4f6f9;margin:0}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:18px;margin:0 0 4px}
p{margin:0 0 10px;color:#52606f}section,.card,.note{background:#fff;border:1px solid #e1e6ec;
border-radius:10px;padding:18px 20px;margin-top:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:12px;
margin-top:18px}.card{margin:0;padding:12px 14px}.card b{display:block;font-size:24px;
font-weight:600;line-height:1.3}.card span{color:#52606f;font-size:13px}
.note{background:#fff7e6;border-color:#f0cf8b}.note p{color:inherit}
.note ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
.two{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.samples{display:grid;grid-template-columns:1fr 1fr;gap:14px}
figure{margin:0}figure img{width:100%;display:block;border-radius:6px}
figcaption{font-size:13px;color:#52606f;margin-top:4px}
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:#52606f}
.grid{stroke:#e6ebf0}.line{fill:none;stroke-width:1.8;stroke-linejoin:round;
stroke-linecap:round}
.legend span{margin-right:18px;font-size:13px;color:#52606f}.legend i{display:inline-block;
width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.heat{width:100%;image-rendering:pixelated;border-radius:6px;display:block}
table{border-collapse:collapse;font-size:13px;width:100%}td{padding:3px 14px 3px 0;
vertical-align:top;overflow-wrap:anywhere}td:first-child{color:#52606f;white-space:nowrap;
width:1%}
@media(max-width:720px){.two,.samples{grid-template-columns:1fr}}
@media print{body{background:#fff}section,figure{break-inside:avoid}}
"""


def render(
    title: str, summary: dict[str, Any], statistics: RunStatistics, samples: list[Sample]
) -> str:
    """The page as a string.

    Args:
        title: what was processed.
        summary: content of summary.json.
        statistics: the same run's.
        samples: frames to show.
    """
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(_subtitle(summary))}</p>",
        _notes(summary),
        _cards(summary),
    ]
    if statistics.frames:
        body += [
            _matches(statistics),
            _ratios(statistics),
            f'<div class="two">{_tracks(statistics)}{_coverage(statistics)}</div>',
            _latency(summary),
            _samples(samples),
        ]
    body.append(_details(summary))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _subtitle(summary: dict[str, Any]) -> str:
    topic = summary["input"].get("image_topic")
    parts = [
        f"{topic} of {summary['input']['path']}" if topic else summary["input"]["path"],
        f"model {summary['model']['name']} on {summary['model']['device']}",
        f"scfeat_ros {summary['version']}",
    ]
    return " · ".join(parts)


def _notes(summary: dict[str, Any]) -> str:
    """Damage and warnings; empty if there are none."""
    damage = summary["damage"]
    items = []
    for reason, count in summary["frames_skipped"].items():
        items.append(f"{count} frame{'s' * (count != 1)} skipped: {reason}")
    if damage["places"]:
        lost = [f"{damage['bytes_lost']:,} bytes"]
        if damage["messages_lost"]:
            lost.append(f"{damage['messages_lost']:,} messages")
        items.append(f"Lost: {' and '.join(lost)}")
        items += damage["places"]
    items += summary["warnings"]
    if not items:
        return ""
    heading = "The input is damaged" if damage["places"] else "Please note"
    rows = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<div class="note"><h2>{heading}</h2><ul>{rows}</ul></div>'


def _cards(summary: dict[str, Any]) -> str:
    def mean(key: str) -> float | None:
        return summary[key]["mean"] if summary.get(key) else None

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.1f} %"

    def count(value: float | None) -> str | None:
        return None if value is None else f"{value:,.0f}"

    truth, tracks = summary.get("ground_truth"), summary.get("tracks")
    cards = [
        (count(summary["frames"]), "frames"),
        (f"{summary['frames_per_second']:.1f}", "frames per second"),
        (count(mean("keypoints_per_frame")), "keypoints per frame"),
        (count(mean("matches_per_frame")), "matches per frame"),
        (percent(mean("epipolar_inlier_ratio")), "fit one epipolar geometry"),
        (
            percent(truth["share"] if truth else None),
            f"right by ground truth (within {RIGHT_WITHIN:g} px)",
        ),
        (f"{tracks['mean_length']:.1f}" if tracks else None, "frames per track, mean"),
    ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{value}</b><span>{escape(label)}</span></div>'
            for value, label in cards
            if value is not None
        )
        + "</div>"
    )


def _per_frame(statistics: RunStatistics) -> str:
    stride = statistics.keypoints.stride
    return "frame" if stride == 1 else f"frame (mean of {stride} frames each)"


def _matches(statistics: RunStatistics) -> str:
    chart = charts.lines(
        [
            ("keypoints", _BLUE, statistics.keypoints.values),
            ("matches with the previous frame", _ORANGE, statistics.matches.values),
            ("of these, epipolar inliers", _GREEN, statistics.inliers.values),
        ],
        statistics.keypoints.stride,
        _per_frame(statistics),
    )
    return (
        "<section><h2>Keypoints and matches per frame</h2><p>Matches are mutual nearest "
        "neighbours between consecutive frames. A gap means that tracking was reset.</p>"
        f"{chart}</section>"
    )


def _ratios(statistics: RunStatistics) -> str:
    series = [("fit one epipolar geometry", _GREEN, statistics.inlier_ratio.values)]
    text = (
        "The share of matches that agree with the best fundamental matrix (RANSAC, 1 px). "
        "A high share means that the matches describe one rigid motion."
    )
    if statistics.judged:
        series.append(("right by ground truth", _VIOLET, statistics.right_share.values))
        text += (
            f" Right by ground truth: within {RIGHT_WITHIN:g} px of the epipolar lines of the "
            "recorded poses."
        )
    chart = charts.lines(series, statistics.keypoints.stride, _per_frame(statistics), top=1.0)
    return f"<section><h2>Inlier ratio</h2><p>{text}</p>{chart}</section>"


def _tracks(statistics: RunStatistics) -> str:
    edges = [1, 2, 3, 4, 6, 11, 21, 51, 101, LONGEST_TRACK + 1]
    counts = [int(statistics.track_lengths[a:b].sum()) for a, b in pairwise(edges)]
    labels = ["1", "2", "3", "4-5", "6-10", "11-20", "21-50", "51-100", ">100"]
    share = [100 * count / max(1, sum(counts)) for count in counts]
    chart = charts.bars(labels, share, "length of track in frames", _BLUE)
    return (
        "<section><h2>Track lengths</h2><p>Share of tracks in % by the number of consecutive "
        f"frames in which they were seen.</p>{chart}</section>"
    )


def _coverage(statistics: RunStatistics) -> str:
    picture = cv2.imencode(".png", _heat_picture(statistics.heat))[1].tobytes()
    mean = statistics.coverage.summary()["mean"]
    return (
        "<section><h2>Keypoint coverage</h2><p>Where in the image keypoints lie, over all frames "
        "(dark: none, bright: many). On average "
        f"{100 * mean:.0f} % of an 8 x 8 grid hold a keypoint.</p>"
        f'<img class="heat" alt="heat map of keypoints" src="{_data_uri(picture, "png")}">'
        "</section>"
    )


def _heat_picture(heat: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) uint8 BGR; the square root keeps single hot cells from hiding the rest."""
    level = np.sqrt(heat / max(1.0, float(np.percentile(heat, 99.5)))).clip(0, 1)
    return cv2.applyColorMap((255 * level).astype(np.uint8), cv2.COLORMAP_INFERNO)


def _latency(summary: dict[str, Any]) -> str:
    latency = summary["latency_ms"]
    stages = [stage for stage in STAGES if stage in latency]
    chart = charts.ranges(
        stages,
        [latency[stage]["median"] for stage in stages],
        [latency[stage]["p95"] for stage in stages],
        "ms",
        _BLUE,
    )
    return (
        "<section><h2>Latency by stage</h2><p>Median (bar) and 95th percentile (line) per frame. "
        "The stages overlap, and two frames may be extracted at the same time, so these "
        f"add up to more than the time between frames.</p>{chart}</section>"
    )


def _samples(samples: list[Sample]) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(sample.caption)}" src="{_data_uri(sample.jpeg, "jpeg")}">'
        f"<figcaption>{escape(sample.caption)}</figcaption></figure>"
        for sample in samples
    )
    return (
        "<section><h2>Sample frames</h2><p>Grey rings: new keypoints. Coloured rings: tracked "
        "ones, from blue (seen for 2 frames) to red (30 and more), with their recent path.</p>"
        f'<div class="samples">{figures}</div></section>'
    )


def _details(summary: dict[str, Any]) -> str:
    rows = []
    for group in ("input", "model", "options"):
        for key, value in summary[group].items():
            if value is not None:
                rows.append(
                    f"<tr><td>{group}: {escape(key.replace('_', ' '))}</td>"
                    f"<td>{escape(str(value))}</td></tr>"
                )
    return f"<section><h2>Settings</h2><table>{''.join(rows)}</table></section>"


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
