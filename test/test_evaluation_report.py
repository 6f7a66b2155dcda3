"""How results are printed and written."""

import json
import os

import numpy as np

from scfeat_training.evaluation.report import (
    Figure,
    Report,
    Table,
    draw,
    format_cell,
    format_table,
    write_report,
)


def test_cells():
    cells = [None, 3, np.int64(12345), 0.12345, np.float32(45.678), 1234.5, float("inf"), "a"]
    expected = ["-", "3", "12345", "0.123", "45.7", "1234", "-", "a"]
    assert [format_cell(cell) for cell in cells] == expected


def test_a_table_is_aligned():
    table = Table("T", ["method", "x"], [["a", 1.0], ["longer name", None]], "a note")
    lines = format_table(table).splitlines()
    assert lines == [
        "T",
        "method           x",
        "-----------  -----",
        "a            1.000",
        "longer name      -",
        "a note",
    ]


def test_a_report_holds_everything_and_escapes_it(tmp_path, capsys):
    figure = Figure("plot", draw(lambda axis: axis.plot([0, 1], label="curve")), "caption")
    report = Report(
        task="pose",
        title="a <title>",
        protocol=["how & why"],
        tables=[
            Table("shown", ["method", "v"], [["<b>", float("nan")]]),
            Table("kept off the terminal", ["method"], [["x"]], printed=False),
        ],
        figures=[figure],
        skipped=[f"reason {i}" for i in range(60)],
        details={"a": {"error": np.float64("inf"), "values": np.arange(3)}},
    )
    write_report(report, tmp_path / "out", ["scfeat", "evaluate", "--data", "a folder"])
    text = capsys.readouterr().out
    assert "shown" in text and "kept off" not in text
    assert "60 left out" in text and "57 more" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;title&gt;" in page and "&lt;b&gt;" in page and "how &amp; why" in page
    assert "kept off the terminal" in page and page.count("<svg") == 1
    assert "--data &#x27;a folder&#x27;" in page
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["details"] == {"a": {"error": None, "values": [0, 1, 2]}}
    assert len(result["skipped"]) == 60
    assert [path.name for path in (tmp_path / "out").iterdir() if "partial" in path.name] == []


def test_a_path_that_is_no_utf_8(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    report = Report("pose", f"of {folder.name}", [], [Table("t", ["method"], [["a"]])])
    report.skipped.append(f"{folder}: is left out")
    write_report(report, folder, ["scfeat", "evaluate", "-o", str(folder)])
    assert "caf\ufffd/report.html" in capsys.readouterr().out
    assert "of caf\ufffd" in (folder / "report.html").read_text(encoding="utf-8")


def test_drawings_are_the_same_every_time():
    def paint(axis):
        axis.plot([0, 1, 2], [1, 0, 1])

    assert draw(paint) == draw(paint)
