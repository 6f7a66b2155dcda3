"""Tables on the terminal, results as JSON, and a stand-alone HTML report with plots."""

from __future__ import annotations

import html
import io
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from scfeat_ros import __version__
from scfeat_ros.cpu import cpu_name
from scfeat_ros.errors import InputError
from scfeat_ros.names import printable
from scfeat_ros.staging import staged_file
from scfeat_training.evaluation.cache import write_json

COLOURS = ("#0b6fb8", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#4a4a4a", "#17a2a2", "#b5651d")
"""One per measured method, in the order of --methods."""


@dataclass
class Table:
    """Rows of cells under column names; a cell is text, a number or None (shown as a dash)."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    printed: bool = True
    """Whether it is shown on the terminal, too."""


@dataclass
class Figure:
    """A plot: `svg` is the drawing itself."""

    title: str
    svg: str
    caption: str = ""


@dataclass
class Report:
    """What one task found.

    Attributes:
        task: name of the subcommand.
        title: headline.
        protocol: sentences that say how it was measured, thresholds included.
        tables, figures: in the order of reading.
        skipped: what could not be used, one sentence each.
        details: values by method and item, for the JSON alone.
    """

    task: str
    title: str
    protocol: list[str]
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def format_cell(value: Any) -> str:
    """How a cell is printed; a number with three decimals below 10, one below 1000, else none."""
    if value is None:
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        if not np.isfinite(value):
            return "-"
        decimals = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
        return f"{value:.{decimals}f}"
    return str(value)


def format_table(table: Table) -> str:
    """The table as aligned text, first column to the left, the others to the right."""
    cells = [table.columns, *[[format_cell(v) for v in row] for row in table.rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    note = f"\n{table.note}" if table.note else ""
    return f"{table.title}\n" + "\n".join(lines) + note


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scfeat_ros": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "processor": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def progress_bar(total: int, name: str, unit: str) -> tqdm:
    """A progress bar; where standard error is no terminal, a line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=name, unit=unit, mininterval=interval, maxinterval=interval)


def skipped_note(report: Report) -> str:
    """One sentence about what was left out."""
    count = len(report.skipped)
    more = f"; and {count - 3} more (listed in result.json)" if count > 3 else ""
    return f"{count} left out: {'; '.join(report.skipped[:3])}{more}"


def write_report(report: Report, folder: Path, command: Sequence[str]) -> None:
    """Print the tables and write result.json and report.html into a folder.

    Raises:
        InputError: the folder cannot be written.
    """
    for table in report.tables:
        if table.printed:
            print("\n" + printable(format_table(table)))
    if report.skipped:
        print("\n" + printable(skipped_note(report)))
    surroundings = environment(command)
    try:
        write_json(
            folder / "result.json",
            {
                "task": report.task,
                "title": report.title,
                "environment": surroundings,
                "protocol": report.protocol,
                "tables": [_plain(asdict(table)) for table in report.tables],
                "skipped": report.skipped,
                "details": _plain(report.details),
            },
        )
        with staged_file(folder / "report.html", overwrite=True) as partial:
            partial.write_text(printable(render(report, surroundings)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be written ({error.strerror})") from error
    print(printable(f"\nwritten: {folder / 'result.json'}, {folder / 'report.html'}"))


def _plain(value: Any) -> Any:
    """Numpy values as Python's, values that JSON cannot hold as None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def draw(
    paint: Callable[[Any], None], width: float = 7.0, height: float = 4.2, columns: int = 1
) -> str:
    """An SVG drawing: `paint` gets a matplotlib axes, or the list of them for several columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # text as text keeps the file small and lets a reader search it; a fixed salt keeps ids stable
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "scfeat",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
        try:
            paint(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2733;max-width:1100px;margin:2rem auto}
body{padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.sub{color:#5a6b7b;margin-top:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}
.scroll{overflow-x:auto}
th,td{padding:.35rem .55rem;text-align:right;border-bottom:1px solid #dfe5ea}
td{white-space:nowrap}
th{background:#f2f5f8;font-weight:600;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
tbody tr:hover{background:#f8fafc}
.note{color:#5a6b7b;font-size:13px;margin:.4rem 0}
.warning{background:#fff6e0;border-left:4px solid #e0a800;padding:.5rem 1rem}
figure{margin:1rem 0}figure svg{max-width:100%;height:auto}figcaption{color:#5a6b7b;font-size:13px}
code{background:#f2f5f8;padding:.1rem .3rem;border-radius:3px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:13px}
dt{color:#5a6b7b}dd{margin:0}
"""


def render(report: Report, surroundings: dict[str, Any]) -> str:
    """The report as one HTML page that needs no other file and no network."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{_text(report.title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(report.title)}</h1>",
        f"<p class='sub'>scfeat evaluate {_text(report.task)}, {_text(surroundings['date'])}</p>",
    ]
    if report.skipped:
        items = "".join(f"<li>{_text(reason)}</li>" for reason in report.skipped[:50])
        rest = len(report.skipped) - 50
        more = f"<li>and {rest} more, see result.json</li>" if rest > 0 else ""
        parts.append(
            f"<div class='warning'><b>{len(report.skipped)} left out</b>"
            f"<ul>{items}{more}</ul></div>"
        )
    for table in report.tables:
        head = "".join(f"<th>{_text(c)}</th>" for c in table.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(format_cell(v))}</td>" for v in row) + "</tr>"
            for row in table.rows
        )
        parts.append(
            f"<h2>{_text(table.title)}</h2><div class='scroll'><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        if table.note:
            parts.append(f"<p class='note'>{_text(table.note)}</p>")
    for figure in report.figures:
        parts.append(
            f"<h2>{_text(figure.title)}</h2><figure>{figure.svg}"
            f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
        )
    protocol = "".join(f"<li>{_text(line)}</li>" for line in report.protocol)
    facts = "".join(
        f"<dt>{_text(key)}</dt><dd><code>{_text(value)}</code></dd>"
        for key, value in surroundings.items()
        if value is not None
    )
    parts.append(f"<h2>How it was measured</h2><ul>{protocol}</ul><dl>{facts}</dl></body></html>")
    return "\n".join(parts) + "\n"


def _text(value: Any) -> str:
    return html.escape(str(value))
