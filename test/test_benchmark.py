"""`scfeat benchmark` from the outside."""

import json
import os

import pytest
import torch
from test_fused import needs_compiler

from scfeat_ros import benchmark
from scfeat_ros.acceleration import GRAPHED, Network
from scfeat_ros.benchmark import count_gflop, main
from scfeat_ros.cuda_graphs import CudaGraphs
from scfeat_ros.errors import InputError
from scfeat_ros.extractor import Extractor
from scfeat_ros.model.fused import FusedSCFeat
from scfeat_ros.model.scfeat import CONFIGS, SCFeat

BRIEF = ["--sizes", "128x96", "--top-k", "100", "--rounds", "2", "--warm-up", "1"]
SMALL = [*BRIEF, "--devices", "cpu"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "speed.json"
    assert main([*SMALL, "--ways", "fp32,fp32:off", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_stage_of_every_way_is_measured(report):
    rows = report["rows"]
    stages = [row["stage"] for row in rows if row["model"] == "scfeat-s"]
    assert stages == 2 * ["decode", "extract", "match", "encode", "frame"]
    assert {row["model"] for row in rows} == {"scfeat-s", "orb", "sift"}
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["rounds"] == 2
        assert row["peak_memory_mib"] is None  # on the CPU it is the process's, and of no row
    assert report["peak_memory_mib"] > 10
    paths = [row["path"] for row in rows if row["stage"] == "extract"]
    assert paths[0].startswith("fp32, fused") and paths[1] == "fp32, plain"


def test_the_offline_tool_is_measured_beside_bare_extraction(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SEQUENCE", 6)
    file = tmp_path / "speed.json"
    stages = ["--ways", "auto", "--stages", "extract,sequence,offline", "--peers", ""]
    assert main([*SMALL, *stages, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["stage"] for row in rows] == ["extract", "sequence", "offline"]
    assert len({row["path"] for row in rows}) == 1
    assert all(row["rounds"] == 2 and row["median_ms"] > 0 for row in rows)


def test_arithmetic_is_counted_as_it_is_run(report):
    fast, plain = (
        row for row in report["rows"] if row["stage"] == "extract" and row["model"] == "scfeat-s"
    )
    # the first layer alone: 7 x 7 x 3 x 64 multiply-adds at half the resolution
    stem = 2 * 7 * 7 * 3 * 64 * 64 * 48 / 1e9
    assert plain["gflop"] > stem
    assert fast["gflop"] < plain["gflop"]
    peak = report["measured_peaks"]["cpu fp32"]
    rate = plain["gflop"] / (plain["median_ms"] / 1e3)
    assert plain["share_of_peak"] == pytest.approx(rate / peak)
    assert 1e-3 < rate / peak < 1e2  # of one unit; how fast it is depends on who else is busy


@needs_compiler
def test_fast_network_needs_less_arithmetic():
    model = SCFeat(CONFIGS["scfeat-m"])
    fast, plain = (
        count_gflop(Extractor(model, "cpu", precision="fp32", compile=compile), (320, 240))
        for compile in ("on", "off")
    )
    # minimal filtering takes a quarter of the products, of most convolutions
    assert 0.25 < fast / plain < 0.5


def test_arithmetic_of_captured_graphs_is_that_of_the_fast_network(tiny_weights):
    extractor = Extractor.from_pretrained(tiny_weights, "cpu", compile="off")
    plain = count_gflop(extractor, (320, 240))
    fast = FusedSCFeat(extractor.model)
    extractor.network = Network(CudaGraphs(fast), "fp32", GRAPHED)
    captured = count_gflop(extractor, (320, 240))
    extractor.network = Network(fast, "fp32", "fused")
    assert captured == count_gflop(extractor, (320, 240)) < plain


def test_numbers_of_keypoints_are_measured_with_one_network(tiny_weights):
    extractor = Extractor.from_pretrained(tiny_weights, "cpu", compile="off")
    other = benchmark._with_top_k(extractor, 10)
    assert other.network is extractor.network
    assert (other.options.max_keypoints, extractor.options.max_keypoints) == (10, 2048)


def test_a_gpu_is_measured(tmp_path, monkeypatch, gpu):
    if torch.version.cuda is None:  # the simulated one is slow
        monkeypatch.setattr(benchmark, "GPU_WORK", benchmark.CPU_WORK)
    file = tmp_path / "speed.json"
    options = ["--devices", "cuda", "--ways", "auto", "--peers", "", "--json", str(file)]
    assert main([*BRIEF, *options]) == 0
    report = json.loads(file.read_text())
    (row,) = (row for row in report["rows"] if row["stage"] == "extract")
    assert row["path"].endswith(GRAPHED)
    assert row["peak_memory_mib"] > 0
    assert 0 < row["share_of_peak"] < 1
    assert report["machine"]["gpus"]


def test_a_gpu_that_cannot_be_used_is_left_out_of_the_report(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as the driver's library counts
    assert benchmark._machine()["gpus"] == []


def test_table_names_paths_and_machine(capsys):
    assert (
        main(
            [
                *SMALL,
                "--ways",
                "fp32:off",
                "--stages",
                "extract",
                "--peers",
                "orb",
                "--warm-up",
                "0",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "fp32, plain" in printed and "OpenCV" in printed
    assert "GFLOP/s" in printed and "copy GB/s" in printed and "load average" in printed
    assert f"OMP_WAIT_POLICY {os.environ['OMP_WAIT_POLICY']}" in printed
    assert "cores kept awake: " in printed
    assert "peak memory of the whole process: " in printed


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "scaling.png"
    options = ["--sizes", "96x64,128x96", "--top-k", "50,100", "--rounds", "2", "--peers", ""]
    options += ["--stages", "extract,match", "--ways", "fp32", "--warm-up", "1"]
    assert main([*options, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [file]


def test_outputs_that_cannot_be_written_are_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_measure", None)
    (tmp_path / "file").write_text("")
    for outputs, message in (
        (["--json", str(tmp_path)], "this is a folder"),
        (["--json", str(tmp_path / "file" / "a.json")], "cannot be written"),
        (["--plot", str(tmp_path / "file" / "a.png")], "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            main([*SMALL, *outputs])
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"a\.txt: the name must end with one of .*\.png"):
        main([*SMALL, "--plot", str(tmp_path / "a.txt")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "640"], "WIDTHxHEIGHT"),
        (["--stages", "dance"], "stage 'dance' is unknown"),
        (["--peers", "surf"], "peer 'surf' is unknown"),
        (["--top-k", "many"], "whole numbers"),
        (["--ways", "fp8"], "precision must be one of"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        main([*SMALL, *arguments])
