"""The `scfeat` command: exit codes, messages and outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
import sample_bags
from rosbags.highlevel import AnyReader

from scfeat_ros import __version__
from scfeat_ros.cli import DAMAGED, ERROR, INTERRUPTED, OK, USAGE, main


@pytest.fixture
def network(tiny_weights):
    return ["--weights", str(tiny_weights), "--max-keypoints", "100", "--device", "cpu"]


def run(*arguments):
    """Exit code of the command line, in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code or OK


def one_line(capsys):
    """The single line of an error on stderr; before it stands at most which network runs."""
    captured = capsys.readouterr()
    *others, line = captured.err.strip().splitlines()
    assert all(other.startswith("scfeat: the network runs in") for other in others), captured.err
    assert line.startswith("scfeat: error: ")
    return line


def test_version(capsys):
    assert run("--version") == OK
    assert capsys.readouterr().out == f"scfeat {__version__}\n"


def test_help_names_all_commands_and_exit_codes(capsys):
    assert run("--help") == OK
    text = capsys.readouterr().out
    for command in ("bag", "images", "match", "export", "train", "evaluate", "benchmark"):
        assert f"    {command}" in text
    assert "exit codes:" in text and "130" in text


@pytest.mark.parametrize("command", ["bag", "images", "match", "export"])
def test_every_command_has_an_example(capsys, command):
    assert run(command, "--help") == OK
    text = capsys.readouterr().out
    assert f"example:\n  scfeat {command} " in text
    assert "--max-keypoints" in text and "--ratio" in text and "exit codes:" in text


@pytest.mark.parametrize(
    "command",
    [
        "bag",
        "export",
        "benchmark",
        *(f"train {name}" for name in ("warmup", "ablation", "fit", "export")),
        *(f"evaluate {name}" for name in ("hpatches", "odometry", "localization")),
    ],
)
def test_every_option_is_explained(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(*command.split(), "--help") == OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for line, following in pairwise(lines):
        if line.startswith("  -") and "  " not in line.strip():
            assert following.startswith(" " * 20), f"{line.strip()} is not explained"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["bag"],
        ["bag", "in"],
        ["bag", "in", "-o", "out", "--max-keypoints", "many"],
        ["bag", "-o", "out", "--video", "in"],
        ["images", "in", "-o", "out", "--video", "../up.mp4"],
        ["export", "in", "-o", "out.db", "--sequential", "3", "--pairs", "p.txt"],
    ],
)
def test_a_wrong_command_line(capsys, arguments):
    assert run(*arguments) == USAGE
    assert "usage: scfeat" in capsys.readouterr().err


def test_bag(tmp_path, camera_bag, network, capsys):
    out = tmp_path / "out"
    code = run("bag", camera_bag, "-o", out, *network, "--video", "--every", 2, "--resize", 128)
    assert code == OK
    text = capsys.readouterr().out
    assert f"report                     {out}/report/index.html" in text
    assert "frames                     3," in text
    for name in ("features/features.mcap", "overlay.mp4", "report/index.html", "summary.json"):
        assert (out / name).stat().st_size > 0


def test_flags_of_bag_are_what_is_done(tmp_path, images, intrinsics, network):
    rows = []
    for topic, when, message in sample_bags.camera_messages(images, intrinsics):
        rows.append((topic, when, message))
        if topic == sample_bags.INFO_TOPIC:
            rows.append(("/other/camera_info", when, message))
        else:
            rows.append(("/pose", when, sample_bags.pose_message((0, 0, 0), time=when)))
    bag = sample_bags.write_bag(tmp_path / "bag", rows)
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((120, 160), np.uint8))
    flags = {
        "topic": sample_bags.IMAGE_TOPIC,
        "camera-info": "/other/camera_info",
        "poses": "/pose",
        "every": 2,
        "start": 0.05,
        "duration": 0.4,
        "mask": tmp_path / "mask.png",
        "descriptor-type": "int8",
        "ratio": 0.9,
        "max-gap": 0.5,
        "border": 7,
    }
    flags = [part for name, value in flags.items() for part in (f"--{name}", value)]
    flags += ["--rectified", "--overlay", "--passthrough", "--no-subpixel"]
    assert run("bag", bag, "-o", tmp_path / "out", *network, *flags) == OK
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["frames"] == 2
    assert summary["input"] == {
        "path": str(bag),
        "image_topic": sample_bags.IMAGE_TOPIC,
        "camera_info_topic": "/other/camera_info",
        "rectified": True,
        "pose_topic": "/pose",
        "every": 2,
        "start_s": 0.05,
        "duration_s": 0.4,
    }
    expected = {
        "descriptor_type": "int8",
        "overlay": True,
        "passthrough": True,
        "ratio": 0.9,
        "max_gap": 0.5,
        "border": 7,
        "subpixel": False,
        "max_keypoints": 100,
    }
    assert expected.items() <= summary["options"].items()
    assert any("--mask too strict" in text for text in summary["warnings"])
    with AnyReader([tmp_path / "out" / "features"]) as reader:
        topics = set(reader.topics)
    assert {"/extractor/overlay/compressed", "/other/camera_info"} <= topics


def test_a_damaged_bag_has_an_exit_code_of_its_own(tmp_path, images, network, capsys):
    path = sample_bags.write_bag(tmp_path / "bag", sample_bags.camera_messages(images))
    file = sample_bags.storage_file(path)
    file.write_bytes(file.read_bytes()[:-30_000])
    assert run("bag", path, "-o", tmp_path / "out", *network) == DAMAGED
    text = capsys.readouterr().out
    assert "lost" in text and "bytes" in text and "messages" in text
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--topic", "/nowhere"], "/nowhere is not in the bag"),
        (["--every", "0"], "--every"),
        (["--start", "-1"], "--start"),
        (["--start", "nan"], "--start must not be negative"),
        (["--duration", "inf"], "--duration must be positive"),
        (["--start", "1000"], "is the time range empty"),
        (["--max-keypoints", "0"], "max_keypoints must lie between 1"),
        (["--ratio", "2"], "ratio must lie between"),
        (["--weights", "nothing.safetensors"], "nothing.safetensors"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--device", "meta"], "device 'meta': only auto, cpu, cuda"),
        (["--mask", "nothing.png"], "nothing.png: cannot be read"),
    ],
)
def test_errors_of_bag_are_one_line(tmp_path, camera_bag, network, capsys, extra, text):
    assert run("bag", camera_bag, "-o", tmp_path / "out", *network, *extra) == ERROR
    assert text in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_or_is_no_bag(tmp_path, camera_bag, network, capsys):
    (tmp_path / "out").mkdir()
    assert run("bag", camera_bag, "-o", tmp_path / "out", *network) == ERROR
    assert "out exists already; give another name or --overwrite" in one_line(capsys)
    assert run("bag", tmp_path / "none", "-o", tmp_path / "new", *network) == ERROR
    assert "none: no such file or folder" in one_line(capsys)
    assert run("bag", tmp_path / "out", "-o", tmp_path / "new", *network) == ERROR
    assert "this folder is not a bag" in one_line(capsys)


def test_an_output_that_cannot_be_written(camera_bag, network, capsys):
    assert run("bag", camera_bag, "-o", "/proc/scfeat/out", *network) == ERROR
    assert "/proc/scfeat" in one_line(capsys)


def test_images(tmp_path, images, network):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(images[:3]):
        cv2.imwrite(str(folder / f"{index}.jpg"), image)
    assert run("images", folder, "-o", tmp_path / "out", *network, "--rate", 20) == OK
    assert (tmp_path / "out" / "report" / "index.html").exists()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["frames"], summary["duration_s"]) == (3, pytest.approx(0.1))
    flags = ["--every", 2, "--start", 0.05, "--duration", 0.02]
    assert run("images", folder, "-o", tmp_path / "part", *network, "--rate", 20, *flags) == OK
    assert json.loads((tmp_path / "part" / "summary.json").read_text())["frames"] == 1
    assert run("images", folder, folder, "-o", tmp_path / "two", *network) == ERROR


def test_match(tmp_path, images, network, capsys):
    for name, image in (("a.png", images[0]), ("b.png", images[2])):
        cv2.imwrite(str(tmp_path / name), image)
    arguments = ["match", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "m.png"]
    assert run(*arguments, *network) == OK
    assert "100 and 100 keypoints" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "m.png")).astype(int)
    assert picture.shape == (120, 328, 3)
    green = (picture[..., 1] > picture[..., 2] + 60) & (picture[..., 1] > picture[..., 0] + 60)
    assert green.sum() > 200
    assert run(*arguments, *network) == ERROR
    assert "m.png exists already" in one_line(capsys)
    assert run(*arguments, *network, "--overwrite", "--min-similarity", 1) == OK
    assert " 0 matches" in capsys.readouterr().out
    assert run(*arguments, *network, "--overwrite", "--min-similarity", 2) == ERROR
    assert "min_similarity must lie between" in one_line(capsys)
    arguments[-1] = tmp_path / "m.txt"
    assert run(*arguments, *network) == ERROR
    assert "must end with .png or .jpg" in one_line(capsys)
    assert run("match", tmp_path / "none.png", tmp_path / "b.png", "-o", arguments[-1]) == ERROR


def test_export(tmp_path, images, network, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(images[:3]):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    out = tmp_path / "out.npz"
    assert run("export", folder, "-o", out, *network, "--sequential", 1, "--quiet") == OK
    assert "3 images, 300 keypoints, 2 pairs" in capsys.readouterr().out
    with np.load(out) as data:
        assert "matches/0.png/1.png/indices" in data
        assert "matches/0.png/2.png/indices" not in data
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("0.png 2.png\n")
    assert run("export", folder, "-o", tmp_path / "p.npz", *network, "--pairs", pairs) == OK
    with np.load(tmp_path / "p.npz") as data:
        assert "matches/0.png/2.png/indices" in data
        assert "matches/0.png/1.png/indices" not in data
    strict = ["--ratio", 0.5, "--min-similarity", 1]
    assert run("export", folder, "-o", tmp_path / "s.npz", *network, *strict) == OK
    assert "3 pairs, 0 matches" in capsys.readouterr().out


def test_export_for_colmap(tmp_path, images, network):
    pycolmap = pytest.importorskip("pycolmap")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images[:3]):
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), image)
    flags = ["--recursive", "--camera-model", "PINHOLE", "--single-camera"]
    assert run("export", tmp_path, "-o", tmp_path / "out.db", *network, *flags) == OK
    with pycolmap.Database.open(tmp_path / "out.db") as database:
        (camera,) = database.read_all_cameras()
        names = {image.name for image in database.read_all_images()}
    assert camera.model.name == "PINHOLE"
    assert names == {f"images/{index}.png" for index in range(3)}


def test_export_leaves_images_out_that_cannot_be_read(tmp_path, images, network, capsys):
    folder = tmp_path / "images"
    (folder / "folder.png").mkdir(parents=True)
    for index, image in enumerate(images[:3]):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    (folder / "1.png").write_bytes(b"no picture")
    assert run("export", folder, "-o", tmp_path / "out.npz", *network) == DAMAGED
    printed = capsys.readouterr().out
    assert "2 images" in printed and "1 pairs" in printed
    assert "left out: " in printed and "1.png" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "out.npz", "--onnx", "n.onnx"], "leave FOLDER and -o out"),
        (["-o", "out.txt"], "must end with one of .npz"),
        (["-o", "out.db", "--camera-model", "LENS"], "COLMAP has no such model"),
    ],
)
def test_export_is_refused_before_the_network_is_loaded(
    tmp_path, monkeypatch, capsys, arguments, text
):
    if ".db" in arguments[1]:
        pytest.importorskip("pycolmap")
    monkeypatch.chdir(tmp_path)
    assert run("export", tmp_path, *arguments, "--weights", "nothing.safetensors") == ERROR
    assert text in one_line(capsys)


def test_a_name_that_is_no_utf_8(tmp_path, images, network, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"0.png", b"caf\xe9.png"):
        (folder / os.fsdecode(name)).write_bytes(cv2.imencode(".png", images[0])[1].tobytes())
    assert run("images", folder, "-o", tmp_path / "out", *network) == OK
    assert "caf\ufffd.png" in (tmp_path / "out" / "report" / "index.html").read_text("utf-8")
    assert run("export", folder, "-o", tmp_path / "out.npz", *network) == ERROR
    assert "rename this image, its name is not UTF-8" in one_line(capsys)
    folder = folder.rename(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    assert run("images", folder, "-o", folder / "out", *network) == ERROR
    assert "caf\ufffd lie in one another" in one_line(capsys)
    assert run("images", folder, "-o", os.fspath(folder) + "_out", *network) == OK
    assert "caf\ufffd_out/summary.json" in capsys.readouterr().out


def test_the_output_does_not_go_into_the_bag(camera_bag, network, capsys):
    file = sample_bags.storage_file(camera_bag)
    assert run("bag", file, "-o", camera_bag / "out", *network) == ERROR
    assert "lie in one another" in one_line(capsys)


@pytest.mark.parametrize("threshold", ["0", "-1", "nan", "inf"])
def test_an_impossible_inlier_threshold(tmp_path, images, network, capsys, threshold):
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    pair = [tmp_path / "a.png"] * 2
    flag = f"--inlier-threshold={threshold}"
    assert run("match", *pair, "-o", tmp_path / "m.png", *network, flag) == ERROR
    assert "--inlier-threshold must be positive" in one_line(capsys)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_cleans_up(tmp_path, tiny_weights, number, code):
    # long enough that the signal comes in the middle
    rows = sample_bags.camera_messages(sample_bags.sequence(240, 160, 120, step=1))
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    command = [
        sys.executable,
        "-c",
        "import sys; from scfeat_ros.cli import main; sys.exit(main())",
    ]
    arguments = ["bag", path, "-o", tmp_path / "out", "--weights", tiny_weights, "--threads", "1"]
    process = subprocess.Popen(
        [*command, *map(str, arguments), "--quiet"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores the key that interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(tmp_path.glob(".out*/features/features.mcap")):
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in error
    assert [f.name for f in tmp_path.iterdir()] == ["bag"]


@pytest.mark.parametrize(
    "statement",
    [
        "import scfeat_training.evaluation.colmap",
        "from scfeat_training.scenes import open_colmap_model as f; f(Path('nowhere'))",
        "from scfeat_ros.export import ColmapOptions, check_export as f\n"
        "f(Path('a.db'), ColmapOptions(camera_model='none'), False)",
    ],
    ids=["evaluation", "training", "export"],
)
def test_sigterm_ends_a_process_in_order_where_pycolmap_is_used(statement):
    pytest.importorskip("pycolmap")
    # in a process of its own: pycolmap takes the signal for itself when it is first imported
    code = f"""
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from scfeat_ros.errors import InputError
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with suppress(InputError):
    exec({statement!r})
assert "pycolmap" in sys.modules
os.kill(os.getpid(), signal.SIGTERM)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (143, "")


def test_colour_images_of_a_bag_are_no_reason_for_a_warning(tmp_path, tiny_weights):
    # in a process of its own: PyTorch warns once in a process
    grey = sample_bags.sequence(2, 160, 112)
    rows = sample_bags.camera_messages([np.dstack([image] * 3) for image in grey])
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    command = [sys.executable, "-m", "scfeat_ros", "bag", path, "-o", tmp_path / "out", "--quiet"]
    command += ["--weights", tiny_weights, "--device", "cpu", "--threads", "1"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (OK, "")


def test_an_interrupted_training_claims_no_clean_up(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("scfeat_training.train.main", interrupted)
    assert main(["train", "warmup"]) == INTERRUPTED
    assert capsys.readouterr().err == "scfeat: interrupted\n"
