"""Many inputs on a local Ray cluster of two workers, one of which is killed."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import cv2
import pytest
from sample_bags import sequence

from scfeat_ros import cli, ray_jobs

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

OPTIONS = ["--max-keypoints", "100", "--quiet", "--precision", "fp32", "--compile", "off"]


def make_folder(path):
    path.mkdir(parents=True)
    for index, image in enumerate(sequence(4)):
        cv2.imwrite(str(path / f"{index}.png"), image)
    return str(path)


def worker_of(name):
    """Process that runs the task of an input, None while there is none."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::") and name in title:
                return int(folder.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_lost_worker_costs_nothing_but_time(tmp_path, capfd):
    inputs = [make_folder(tmp_path / "in" / name) for name in ("a", "b", "c")]
    not_there = str(tmp_path / "in" / "missing")
    output = tmp_path / "out"
    # two workers for this test, whatever the machine has
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    killed = []

    def kill_one():
        for _ in range(3000):
            worker = worker_of(f"-> {output / 'a'}")
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        arguments = ["images", *inputs, not_there, "-o", str(output), "--ray", "auto", *OPTIONS]
        assert cli.main(arguments) == cli.ERROR  # of the input that is not there
        killer.join()
        assert killed
        printed = capfd.readouterr()
        assert "3 done, 0 were done already, 1 failed" in printed.out
        assert "missing" in printed.err
        assert sorted(p.name for p in output.iterdir()) == ["a", "b", "c"]
        written = {p: p.stat().st_mtime_ns for p in output.glob("*/summary.json")}
        assert len(written) == 3

        # again: what is done is not done twice
        arguments = ["images", *inputs, "-o", str(output), "--ray", "auto", *OPTIONS]
        assert cli.main(arguments) == 0
        assert "0 done, 3 were done already, 0 failed" in capfd.readouterr().out
        assert written == {p: p.stat().st_mtime_ns for p in output.glob("*/summary.json")}
    finally:
        killer.join()
        ray.shutdown()


def test_more_cores_than_a_machine_has_are_refused(tmp_path, capsys):
    inputs = [make_folder(tmp_path / "in" / name) for name in "ab"]
    output = tmp_path / "out"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        arguments = ["images", *inputs, "-o", str(output), "--ray", "auto", *OPTIONS]
        for more, says in (
            (["--threads", "3"], "--threads 3: no machine of the cluster has more than 2 cores"),
            (["--device", "cuda"], "--device cuda: no machine of the cluster has a GPU"),
        ):
            assert cli.main([*arguments, *more]) == cli.ERROR
            assert says in capsys.readouterr().err
    finally:
        ray.shutdown()
    assert not output.exists()


def test_two_inputs_with_one_output_are_refused(tmp_path, capsys):
    inputs = [make_folder(tmp_path / side / "photos") for side in ("left", "right")]
    assert cli.main(["images", *inputs, "-o", str(tmp_path / "out"), "--ray", "local"]) == 1
    assert "another input has the same output" in capsys.readouterr().err


def test_many_inputs_without_ray_are_refused(tmp_path, capsys):
    inputs = [make_folder(tmp_path / name) for name in "ab"]
    assert cli.main(["images", *inputs, "-o", str(tmp_path / "out")]) == 1
    assert "--ray local" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "in_task"), [("cuda:1", "cuda"), ("cuda", "cuda"), ("auto", "auto"), ("cpu", "cpu")]
)
def test_a_task_takes_the_gpu_that_it_was_given(tmp_path, device, in_task):
    cluster = MagicMock(exceptions=ray.exceptions)
    cluster.cluster_resources.return_value = {"GPU": 2}
    cluster.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 4, "GPU": 2}}]
    cluster.wait.side_effect = lambda tasks, num_returns: (tasks[:1], tasks[1:])
    cluster.get.return_value = ray_jobs.JobResult(tmp_path, 0)
    remote = cluster.remote.return_value.return_value.options.return_value.remote
    arguments = SimpleNamespace(device=device, threads=0, quiet=True)
    ray_jobs._collect(cluster, arguments, {tmp_path: tmp_path / "out"})
    assert remote.call_args.args[0].device == in_task
    assert cluster.remote.call_args.kwargs["num_gpus"] == (device != "cpu")
