"""Charts as inline SVG, for a page without external files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, BARS_WIDTH = 960, 260, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between two values."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = np.ceil(low / step - 1e-9) * step
    return [float(round(v, 10)) for v in np.arange(first, high + step * 1e-6, step)]


def nice_top(largest: float) -> float:
    """A round number slightly above a positive value, as the end of an axis that begins at 0."""
    if not largest > 0:
        return 1.0
    step = nice_ticks(0, largest)[1]
    return float(step * np.ceil(1.05 * largest / step))


def number(value: float) -> str:
    """A short decimal: 0.25, 12.5, 1,200."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


class _Axes:
    """Maps data to the drawing and draws grid, numbers and titles."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], width: int, height: int
    ) -> None:
        self.x_range = x if x[1] > x[0] else (x[0], x[0] + 1)
        self.y_range = y if y[1] > y[0] else (y[0], y[0] + 1)
        self.width, self.height = width, height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def grid(self) -> str:
        parts = []
        for value in nice_ticks(*self.y_range):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{number(value)}</text>"
            )
        return "".join(parts)

    def x_numbers(self, ticks: Sequence[tuple[float, str]], title: str) -> str:
        y = self.height - _BOTTOM
        parts = [
            f'<text x="{self.x(value):.1f}" y="{y + 17}" text-anchor="middle">{escape(text)}</text>'
            for value, text in ticks
        ]
        middle = (_LEFT + self.width - _RIGHT) / 2
        parts.append(
            f'<text class="title" x="{middle}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(title)}</text>"
        )
        return "".join(parts)


def _svg(width: int, height: int, content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{content}</svg>"
    )


def lines(
    series: Sequence[tuple[str, str, np.ndarray]],
    stride: int,
    x_title: str,
    top: float | None = None,
) -> str:
    """Lines over the frames, with a legend.

    Args:
        series: name, CSS colour and values; NaN leaves a gap.
        stride: frames per value.
        x_title: of the horizontal axis.
        top: largest value of the vertical axis, which begins at 0; None: from the data.
    """
    length = max((len(values) for _, _, values in series), default=0)
    known = [values[np.isfinite(values)] for _, _, values in series]
    largest = max((float(values.max()) for values in known if len(values)), default=1.0)
    if top is None:
        top = nice_top(largest)
    axes = _Axes((0, max(1, (length - 1) * stride)), (0, top), WIDTH, HEIGHT)
    ticks = [(v, number(v)) for v in nice_ticks(*axes.x_range, 8) if v == int(v)]
    parts = [axes.grid(), axes.x_numbers(ticks, x_title)]
    for _, colour, values in series:
        path, pen_down = [], False
        for index, value in enumerate(values):
            if np.isfinite(value):
                command = "L" if pen_down else "M"
                path.append(f"{command}{axes.x(index * stride):.1f} {axes.y(value):.1f}")
                if not pen_down:  # so that a lone value between gaps is seen
                    path.append("h0.1")
            pen_down = bool(np.isfinite(value))
        parts.append(f'<path class="line" style="stroke:{colour}" d="{"".join(path)}"/>')
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour, _ in series
    )
    names = ", ".join(name for name, _, _ in series)
    return f'<div class="legend">{legend}</div>' + _svg(WIDTH, HEIGHT, "".join(parts), names)


def bars(labels: Sequence[str], values: Sequence[float], x_title: str, colour: str) -> str:
    """Vertical bars from 0, with the number above each."""
    axes = _Axes((0, max(1, len(values))), (0, nice_top(max(values))), BARS_WIDTH, HEIGHT)
    parts = [axes.grid()]
    for index, value in enumerate(values):
        left, right, y = axes.x(index + 0.1), axes.x(index + 0.9), axes.y(value)
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" '
            f'height="{axes.y(0) - y:.1f}" style="fill:{colour}"/>'
            f'<text x="{(left + right) / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">'
            f"{number(value)}</text>"
        )
    ticks = [(index + 0.5, label) for index, label in enumerate(labels)]
    parts.append(axes.x_numbers(ticks, x_title))
    return _svg(BARS_WIDTH, HEIGHT, "".join(parts), x_title)


def ranges(
    labels: Sequence[str], low: Sequence[float], high: Sequence[float], unit: str, colour: str
) -> str:
    """Horizontal bars from 0 to `low` with a thin line on to `high`, both written out."""
    row, left, right = 30, 84, 230
    width, height = WIDTH, row * len(labels) + 10
    largest = max([v for v in high if np.isfinite(v)], default=1.0) or 1.0
    scale = (width - left - right) / largest
    parts = []
    for index, (label, a, b) in enumerate(zip(labels, low, high, strict=True)):
        if not np.isfinite(a):
            continue
        y = index * row + row / 2 + 5
        parts.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{left}" y="{y - 8}" width="{max(a * scale, 1):.1f}" height="16" '
            f'style="fill:{colour}"/>'
            f'<line x1="{left}" x2="{left + b * scale:.1f}" y1="{y}" y2="{y}" '
            f'style="stroke:{colour};stroke-width:2"/>'
            f'<text x="{left + b * scale + 8:.1f}" y="{y + 4}">{number(a)} {unit}, '
            f"95 % below {number(b)} {unit}</text>"
        )
    return _svg(width, height, "".join(parts), ", ".join(labels))
