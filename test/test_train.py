"""The training loop on a small scene: resuming, signals, several processes, export."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import scfeat_training
from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, load_model, read_metadata, save_model
from scfeat_training import trainer
from scfeat_training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from scfeat_training.config import STAGES, make_config, read_config
from scfeat_training.correspondences import CorrespondencePairs, MixedPairs, textured_points
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    ImageCache,
    PosedPairs,
    PosedPairsConfig,
)
from scfeat_training.keypoint_policy import epipolar_errors, homography_errors
from scfeat_training.networks import make_model
from scfeat_training.sampling_order import Numbered, collate
from scfeat_training.scenes import photo_paths, read_scenes, split_scenes
from scfeat_training.stages import STAGE_CLASSES, homography_pairs, posed_pairs
from scfeat_training.train import export, main
from scfeat_training.trainer import LOG, Trainer, only_writer


def write_scene(folder, seed):
    """A textured wall seen by five cameras that move sideways: photos, poses and 3D points."""
    rng = np.random.default_rng(seed)
    wall = cv2.resize(rng.integers(0, 256, (60, 80, 3), np.uint8), (320, 240))
    wall = cv2.addWeighted(
        wall, 0.5, cv2.resize(rng.integers(0, 256, (15, 20, 3), np.uint8), (320, 240)), 0.5, 0
    )
    K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
    count, depth = 5, 3.0
    t = np.stack([np.array([0.25 * (2 - k), 0.02 * k, 0.0]) for k in range(count)])
    R = np.tile(np.eye(3), (count, 1, 1))
    (folder / "images").mkdir(parents=True)
    # the wall's pixel u lies at X = (u - 159.5) / 100, Y likewise, Z = depth
    to_plane = np.array([[0.01, 0, -1.595], [0, 0.01, -1.195], [0, 0, 1]])
    xyz = np.column_stack([rng.uniform(-1, 1, 80), rng.uniform(-0.8, 0.8, 80), np.full(80, depth)])
    observations = []
    names = [f"{k}.png" for k in range(count)]
    for k in range(count):
        P = K @ np.column_stack([R[k][:, :2], R[k][:, 2] * depth + t[k]])
        image = cv2.warpPerspective(wall, P @ to_plane, (160, 120))
        cv2.imwrite(str(folder / "images" / names[k]), image)
        camera = xyz @ R[k].T + t[k]
        xy = (camera @ K.T)[:, :2] / camera[:, 2:]
        seen = ((xy > 0) & (xy < (159, 119))).all(1)
        observations += [(k, p, *xy[p]) for p in np.flatnonzero(seen)]
    pairs = np.array([(i, j) for i in range(count) for j in range(i + 1, count)])
    table = np.array(observations)
    np.savez(
        folder / "scene.npz",
        names=np.array(names),
        K=np.tile(K, (count, 1, 1)),
        R=R,
        t=t,
        size_wh=np.tile([160, 120], (count, 1)),
        pairs=pairs,
        overlap=np.full(len(pairs), 0.5),
        shared=np.full(len(pairs), 50),
    )
    np.savez(
        folder / "points.npz",
        xyz=xyz,
        obs_image=table[:, 0].astype(int),
        obs_point=table[:, 1].astype(int),
        obs_xy=table[:, 2:],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scene(root / "wall", 0)
    write_scene(root / "fern", 1)  # a name that is held out for validation
    return root


@pytest.fixture
def settings(data, tmp_path):
    """Writes a configuration file and gives its path."""

    def write(stage, **values):
        path = tmp_path / f"{stage}.yaml"
        common = dict(
            stage=stage, data=str(data), size=[96, 64], batch=2, steps=6, warmup_steps=2,
            log_every=1, validate_every=1000, validation_pairs=0, workers=0, threads=1,
            model="scfeat-s",
            posed_share={"warmup": 0.5, "descriptor": 1.0, "detector": 0.5}.get(stage, 0.0),
        )  # fmt: skip
        path.write_text(yaml.safe_dump(common | values))
        return path

    return write


def losses_or_none(run):
    return (run / LOG).exists() and losses(run)


def losses(run):
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return {row["step"]: row["train"]["loss"] for row in rows if "train" in row}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of weights of a network to learn from."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_model(SCFeat(CONFIGS["scfeat-m"]), path, {})
    return str(path)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_the_same_to_the_bit(stage, settings, teacher, tmp_path):
    config = str(settings(stage, loss={"scores": 0.3} if stage == "distillation" else {}))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start = ["--init", teacher] if stage == "distillation" else []
    # on the CPU, since some of CUDA's gradients are summed in any order
    common = [stage, "--config", config, "--device", "cpu", "--run"]
    assert main([*common, str(straight), *start]) == 0
    assert main([*common, str(broken), "--stop-at", "3", *start]) == 0
    assert load_checkpoint(broken)["step"] == 3
    assert main([*common, str(broken), "--resume"]) == 0
    first, second = load_checkpoint(straight), load_checkpoint(broken)
    assert first["step"] == second["step"] == 6
    assert same(first["model"], second["model"])
    assert same(first["ema"], second["ema"])
    assert losses(straight) == losses(broken)
    assert [part["to_step"] for part in second["history"]] == [3, 6]


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("warmup", {}),
        ("descriptor", {"posed_share": 0.5, "loss": {"contrast_weight": 0.5}}),
        ("detector", {}),
        ("adaptation", {}),
        ("adaptation", {"teacher": "scfeat-s"}),
        ("distillation", {"model": "scfeat-s", "loss": {"scores": 0.1}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of a PyTorch without CUDA
def test_a_gpu_trains_like_the_cpu(stage, values, gpu, settings, teacher, tmp_path):
    values = {"model": "scfeat-m"} | values
    values |= dict(steps=3, validate_every=3, validation_pairs=2, picture_every=3)
    config = read_config(settings(stage, **values), stage)
    trained = {}
    for device in ("cpu", gpu):
        run = tmp_path / str(device)
        assert Trainer(config, run, device=str(device), init=teacher).train(stop_at=2) == 2
        resumed = Trainer(config, run, device=str(device), resume=True)
        assert {p.device.type for p in resumed.network.parameters()} == {torch.device(device).type}
        assert resumed.train() == 3
        trained[device] = list(losses(run).values())
    np.testing.assert_allclose(trained[gpu], trained["cpu"], rtol=0.05)


def test_one_process_trains_without_torch_distributed(monkeypatch, settings, tmp_path):
    """Which PyTorch's builds for Jetsons are without."""
    for module in ("train", "trainer"):
        monkeypatch.setattr(f"scfeat_training.{module}.dist", None)
    config = str(settings("warmup", steps=1))
    run = ["--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["warmup", "--config", config, *run]) == 0


@pytest.mark.parametrize(
    ("name", "looked_at"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")]
)
def test_a_process_of_several_looks_at_its_own_gpu_alone(monkeypatch, name, looked_at):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(trainer, "select_device", torch.device)
    assert trainer._device(name) == torch.device(looked_at)
    assert seen == [torch.device(looked_at)]


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_covers_the_network_and_not_the_losses(
    stage, settings, teacher, tmp_path, monkeypatch
):
    autocast, seen = torch.autocast, []

    def on_cpu(device, dtype=None, enabled=True):
        if device != "cuda":
            return autocast(device, dtype, enabled)
        assert not enabled  # there is no GPU
        return autocast("cpu", dtype)

    def watched(self, network, batch):
        self.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        assert not torch.is_autocast_enabled("cpu")
        return losses(self, network, batch)

    losses = STAGE_CLASSES[stage].losses
    monkeypatch.setattr(STAGE_CLASSES[stage], "losses", watched)
    monkeypatch.setattr("scfeat_training.trainer.torch.autocast", on_cpu)
    config = str(settings(stage, steps=1))
    start = ["--init", teacher] if stage == "distillation" else []
    run = ["--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main([stage, "--config", config, *run, *start]) == 0
    assert seen == [True]


@pytest.mark.parametrize("stage", ["detector", "adaptation"])
def test_the_detectors_stages_leave_descriptors_and_bridge_as_they_are(settings, tmp_path, stage):
    before = tmp_path / "before"
    assert main(["warmup", "--config", str(settings("warmup", steps=2)), "--run", str(before)]) == 0
    after = tmp_path / "after"
    config = str(settings(stage, steps=4))
    assert main([stage, "--config", config, "--run", str(after), "--init", str(before)]) == 0
    old, new = load_checkpoint(before)["ema"], load_checkpoint(after)
    for weights in (new["model"], new["ema"]):
        changed = {key.split(".")[0] for key in old if not torch.equal(old[key], weights[key])}
        assert changed == {"detector"}
    assert [part["stage"] for part in new["history"]] == ["warmup", stage]


def test_the_detector_goes_on_where_no_keypoint_is_drawn(settings, data):
    config = read_config(settings("detector"), "detector")
    stage = STAGE_CLASSES["detector"](config, make_model(config).eval())
    pairs = stage.dataset(read_scenes(data), skip_bad=False)
    batch = collate([Numbered(pairs, ImageCache())[i] for i in range(2)])

    def black(images):
        scores, maps = stage.network(images)
        return 0 * scores, maps

    losses, terms = stage.losses(black, batch)
    losses.mean().backward()
    assert losses.tolist() == [0.0, 0.0] and terms["keypoints"] == 0


def test_adaptation_brings_the_views_scores_together(settings, tmp_path, capsys):
    run = tmp_path / "run"
    config = str(settings("adaptation", steps=40, lr=1e-2))
    assert main(["adaptation", "--config", config, "--run", str(run)]) == 0
    values = list(losses(run).values())
    assert sum(values[-10:]) < 0.9 * sum(values[:10])
    more = tmp_path / "more"
    arguments = ["--config", config, "--run", str(more), "--init", "scfeat-s", "--stop-at", "1"]
    assert main(["adaptation", *arguments]) == 0
    assert len(load_checkpoint(more)["history"]) > 2
    config = str(settings("adaptation", posed_share=0.5))
    assert main(["adaptation", "--config", config, "--run", str(tmp_path / "other")]) == 1
    assert "takes homographies alone" in capsys.readouterr().err
    config = str(settings("adaptation", loss={"threshold": 1.0}))
    assert main(["adaptation", "--config", config, "--run", str(tmp_path / "other")]) == 1
    assert "no section 'loss'" in capsys.readouterr().err


def test_adaptation_learns_the_detections_of_another_network(settings, teacher, tmp_path, capsys):
    config = str(settings("adaptation", steps=40, lr=1e-2, teacher=teacher))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(["adaptation", "--config", config, "--run", str(straight)]) == 0
    values = list(losses(straight).values())
    assert sum(values[-10:]) < 0.9 * sum(values[:10])
    assert main(["adaptation", "--config", config, "--run", str(broken), "--stop-at", "3"]) == 0
    weights = load_checkpoint(broken)["stage_state"]
    assert same(weights, load_model(teacher).state_dict())
    assert main(["adaptation", "--config", config, "--run", str(broken), "--resume"]) == 0
    assert same(load_checkpoint(straight)["model"], load_checkpoint(broken)["model"])
    # from the start, scores are as peaked as those it learns
    config = str(settings("adaptation", teacher="scfeat-m", model="scfeat-m", lr=1e-3))
    arguments = ["--config", config, "--run", str(tmp_path / "peaked"), "--init", teacher]
    assert main(["adaptation", *arguments, "--stop-at", "1"]) == 0
    found = load_checkpoint(tmp_path / "peaked")["model"]
    for name, value in load_model("scfeat-m").detector.layer2_norm.state_dict().items():
        assert abs(found[f"detector.layer2_norm.{name}"] - value) < 0.01
    config = str(settings("adaptation", teacher="scfeat-xl"))
    assert main(["adaptation", "--config", config, "--run", str(tmp_path / "other")]) == 1
    assert "scfeat-xl" in capsys.readouterr().err


def test_distillation_brings_the_maps_together(settings, teacher, tmp_path, capsys):
    for scores in (0.0, 0.3):
        run = tmp_path / str(scores)
        config = str(settings("distillation", steps=30, lr=2e-3, loss={"scores": scores}))
        arguments = ["--config", config, "--run", str(run)]
        assert main(["distillation", *arguments, "--init", teacher]) == 0
        values = list(losses(run).values())
        assert sum(values[-5:]) < 0.7 * sum(values[:5])
        found = load_checkpoint(run)["ema"]
        before = load_model(teacher).state_dict()
        same_detector = all(torch.equal(found[k], before[k]) for k in before if "detector.l" in k)
        assert same_detector == (scores == 0)
    arguments = ["--config", config, "--run", str(tmp_path / "other")]
    assert main(["distillation", *arguments]) == 1
    assert "--init" in capsys.readouterr().err


def test_frozen_layers_stay_as_they_are(settings, teacher, tmp_path):
    config = str(settings("distillation", steps=3, frozen=["stem", "layer1"]))
    run = tmp_path / "run"
    assert main(["distillation", "--config", config, "--run", str(run), "--init", teacher]) == 0
    found, before = load_checkpoint(run)["model"], load_model(teacher).state_dict()
    changed = {key for key in before if not torch.equal(found[key], before[key])}
    layers = {key.split(".")[2] for key in changed if ".encoder." in key}
    assert layers == {"layer2", "layer3"}


def test_descriptor_loss_falls(settings, tmp_path):
    config = str(settings("warmup", steps=25, lr=2e-3))
    assert main(["warmup", "--config", config, "--run", str(tmp_path / "run")]) == 0
    values = list(losses(tmp_path / "run").values())
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


def test_steps_without_posed_pairs_log_no_epipolar_loss(settings, tmp_path):
    values = {"batch": 1, "posed_share": 0.5, "loss": {"contrast_weight": 0.5}, "steps": 4}
    config = str(settings("descriptor", **values))
    assert main(["descriptor", "--config", config, "--run", str(tmp_path / "run")]) == 0
    rows = [json.loads(line)["train"] for line in (tmp_path / "run" / LOG).open()]
    assert [row.get("epipolar", 0.0) > 0 for row in rows] == [False, True] * 2
    assert ["epipolar" in row for row in rows] == [False, True] * 2


def test_validation_is_logged(settings, tmp_path):
    config = str(settings("detector", steps=2, validate_every=2, validation_pairs=2))
    assert main(["detector", "--config", config, "--run", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    (figures,) = [row["validation"] for row in rows if "validation" in row]
    for name in ("corner/mma3", "bridged/mma3", "own/mma3", "own/line"):
        assert 0 <= figures[name] <= 1


def test_terminated_run_leaves_a_checkpoint(settings, tmp_path):
    run = tmp_path / "run"
    config = settings("warmup", steps=100_000, checkpoint_every=100_000)
    command = [sys.executable, "-m", "scfeat_training.train", "warmup"]
    process = subprocess.Popen(
        [*command, "--config", str(config), "--run", str(run)], stdout=subprocess.PIPE
    )
    try:
        while not losses_or_none(run):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert load_checkpoint(run)["step"] >= 1


def start_training(settings, run, *more, **values):
    """A process of its own, in a group of its own, that trains without end by one data worker."""
    config = settings("warmup", steps=100_000, checkpoint_every=100_000, workers=1, **values)
    command = [sys.executable, "-m", "scfeat_training.train", "warmup", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--run", str(run), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def children(process):
    """Process numbers of the children, and of theirs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == process:
            found += [int(folder.name), *children(int(folder.name))]
    return found


def spawned(process):
    """Its data workers."""
    found = []
    for child in children(process):
        with suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [child] if b"spawn_main" in command else []
    return found


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("waits", [True, False], ids=["before the first pair", "while it trains"])
def test_a_signal_to_all_processes_leaves_a_checkpoint(waits, settings, tmp_path):
    run = tmp_path / "run"
    process = start_training(settings, run)
    try:
        # there is a worker, still importing
        while not spawned(process.pid) if waits else not losses_or_none(run):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.splitlines()[-1] == "stopped by a signal; --resume goes on"
    assert "Traceback" not in error
    assert load_checkpoint(run)["step"] >= (not waits)


@needs_proc
def test_workers_end_with_a_trainer_that_is_killed(settings, tmp_path):
    run = tmp_path / "run"
    process = start_training(settings, run)
    workers = []
    try:
        while not losses_or_none(run):
            assert process.poll() is None
            time.sleep(0.1)
        workers = children(process.pid)
        assert len(workers) >= 1
        process.kill()
        process.communicate()
        ends = time.monotonic() + 60  # PyTorch's workers look for their parent every five seconds
        while any(map(is_running, workers)):
            assert time.monotonic() < ends
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a data process was"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a data process"),
        (ConnectionResetError(104, "Connection reset by peer"), "a data process was"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: lower"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: lower"),
    ],
)
def test_want_of_memory_is_one_line(error, message, settings, tmp_path, monkeypatch, capsys):
    def batches(self, end):
        raise error
        yield

    monkeypatch.setattr(Trainer, "_loader", batches)
    arguments = ["--config", str(settings("warmup")), "--run", str(tmp_path / "run")]
    assert main(["warmup", *arguments]) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "step" not in one]
    assert line.startswith(f"scfeat train: {message}")


def test_a_resumed_run_logs_every_step_once(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = str(settings("warmup", steps=8, checkpoint_every=3))
    assert main(["warmup", "--config", config, "--run", str(run), "--stop-at", "3"]) == 0
    kept = (run / CHECKPOINT).read_bytes()
    arguments = ["warmup", "--config", config, "--run", str(run), "--resume"]
    assert main([*arguments, "--stop-at", "5"]) == 0
    (run / CHECKPOINT).write_bytes(kept)  # as if the run had been killed at step 5
    with (run / LOG).open("a") as file:
        file.write('{"step": 3, "skipped": ["a pair"]}\n{"step": 6, "tra')
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all("train" in row for row in rows)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert not [path.name for path in run.iterdir() if "partial" in path.name]


def test_a_run_goes_on_with_the_parts_it_trains(settings, teacher, tmp_path, capsys):
    run = ["--run", str(tmp_path / "run")]
    config = str(settings("distillation", steps=1, frozen=["stem"]))
    assert main(["distillation", "--config", config, *run, "--init", teacher]) == 0
    for change in ({"frozen": ["layer1"]}, {"loss": {"scores": 0.3}, "frozen": ["stem"]}):
        config = str(settings("distillation", steps=2, **change))
        capsys.readouterr()
        assert main(["distillation", "--config", config, *run, "--resume"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / "run") in error
        assert ("'frozen: ['stem']'" in error) == (len(change) == 1), error
        assert ("'loss: scores'" in error) == (len(change) == 2)
        assert "another run" in error


def test_a_resumed_run_takes_the_rates_of_its_settings(settings, tmp_path):
    run = tmp_path / "run"
    first = read_config(settings("warmup"), "warmup", steps=1)
    Trainer(first, run).train()
    rates = {"lr": 3e-4, "lr_encoder": 2e-4, "weight_decay": 0.25}
    trainer = Trainer(read_config(settings("warmup"), "warmup", **rates), run, resume=True)
    groups = trainer.optimizer.param_groups
    assert [group["peak"] for group in groups] == [2e-4, 3e-4]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.25]


def test_a_resumed_run_names_the_settings_that_changed(settings, tmp_path, capsys):
    arguments = ["warmup", "--config", str(settings("warmup")), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--stop-at", "1", "--seed", "7"]) == 0
    assert main([*arguments, "--stop-at", "2", "--resume", "--seed", "7"]) == 0
    assert "other settings" not in capsys.readouterr().err
    assert main([*arguments, "--stop-at", "3", "--resume"]) == 0
    assert "run: goes on with other settings: seed 0 (was 7)\n" in capsys.readouterr().err


def test_nothing_to_resume_leaves_no_folder(settings, tmp_path, capsys):
    arguments = ["warmup", "--config", str(settings("warmup")), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--resume"]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_one_line_says_so(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["warmup", "--config", str(settings("warmup")), "--run", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install '.[train]'" in error
    assert not (tmp_path / "run").exists()


# --- damaged and missing data -------------------------------------------------------------------


def damage_pixels(path):
    """Write a JPEG file whose header is right and whose pixels cannot be decoded."""
    picture = cv2.imread(str(path))
    content = bytearray(cv2.imencode(".jpg", picture)[1].tobytes())
    tables = content.index(b"\xff\xc4")
    content[tables + 6 : tables + 30] = 24 * b"\xff"
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_loading_is_one_line(settings, data, tmp_path, workers, capfd):
    shutil.copytree(data / "wall", tmp_path / "data" / "wall")
    bad = tmp_path / "data/wall/images/2.png"
    damage_pixels(bad)
    values = {"data": str(tmp_path / "data"), "steps": 12, "workers": workers, "posed_share": 0.5}
    config = str(settings("warmup", **values))
    assert main(["warmup", "--config", config, "--run", str(tmp_path / "strict")]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "step" not in line]
    assert len(lines) == 1 and f"{bad}: no image that can be decoded" in lines[0]
    assert not multiprocessing.active_children()
    run = tmp_path / "run"
    assert main(["warmup", "--config", config, "--run", str(run), "--skip-bad"]) == 0
    printed = capfd.readouterr()
    assert printed.err.count(f"left out: {bad}") == printed.err.count("left out") == 1
    assert "at step 12 of 12, 1 bad inputs left out;" in printed.out
    assert not multiprocessing.active_children()


def test_damage_in_held_out_images(settings, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    bad = tmp_path / "data/fern/images/2.png"
    damage_pixels(bad)
    values = {"data": str(tmp_path / "data"), "steps": 1, "validation_pairs": 6}
    arguments = ["warmup", "--config", str(settings("warmup", **values)), "--run"]
    assert main([*arguments, str(tmp_path / "strict")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(bad) in error
    assert main([*arguments, str(tmp_path / "run"), "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count(f"left out: {bad}") == 1 and ", 1 bad inputs left out" in printed.out
    run = f"ours={tmp_path / 'run'}"
    ablation = ["ablation", run, "--data", values["data"], "--pairs", "6", "--size", "96", "64"]
    assert main(ablation) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(bad) in error
    assert main([*ablation, "--skip-bad"]) == 0
    assert "1 bad inputs left out" in capsys.readouterr().err


def change_scene(folder, **arrays):
    with np.load(folder / "scene.npz") as file:
        np.savez(folder / "scene.npz", **(dict(file) | arrays))


def test_posed_pairs_of_the_warm_up_want_points(settings, data, tmp_path, capsys):
    shutil.copytree(data / "wall", tmp_path / "data" / "wall")
    (tmp_path / "data/wall/points.npz").unlink()
    values = {"data": str(tmp_path / "data"), "steps": 1}
    arguments = ["--run", str(tmp_path / "run")]
    assert main(["warmup", "--config", str(settings("warmup", **values)), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sparse 3D points" in error and "posed_share: 0" in error
    config = str(settings("warmup", **values, posed_share=0.0))
    assert main(["warmup", "--config", config, *arguments]) == 0


def test_validation_goes_without_what_is_not_there(settings, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    nothing = {"pairs": np.zeros((0, 2), int), "overlap": np.zeros(0)}
    change_scene(tmp_path / "data/fern", **nothing)
    values = {"data": str(tmp_path / "data"), "steps": 1, "validation_pairs": 2}
    config = str(settings("detector", **values))
    assert main(["detector", "--config", config, "--run", str(tmp_path / "run")]) == 0
    assert "validation by homographies alone" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    (figures,) = [row["validation"] for row in rows if "validation" in row]
    assert "own/mma3" in figures and "own/line" not in figures
    ablation = ["ablation", f"ours={tmp_path / 'run'}", "--data", values["data"], "--pairs", "1"]
    assert main([*ablation, "--size", "96", "64"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split("|")[5].strip() == "-"
    shutil.rmtree(tmp_path / "data/fern")
    assert main(["detector", "--config", config, "--run", str(tmp_path / "more")]) == 0
    assert capsys.readouterr().err.count("no validation: images are held out of scenes of 30") == 1
    assert main(ablation) == 1
    assert "takes a scene of 30 images or more" in capsys.readouterr().err


def test_all_pairs_of_a_stage_share_their_images(settings, data):
    for stage in ("warmup", "descriptor", "detector"):
        values = {"synthetic_share": 0.5, "posed_share": 0.5, "loss": {}}
        if stage == "descriptor":
            values["loss"] = {"contrast_weight": 0.5}
        config = read_config(settings(stage, **values), stage)
        images = ImageCache()
        mixed = STAGE_CLASSES[stage](config, make_model(config)).dataset(
            read_scenes(data), False, images
        )
        posed = mixed.second.pairs
        for pairs in (mixed.first.pairs, posed.posed, posed.synthetic):
            assert pairs.images is images


def train_by_two_processes(*command):
    """What a module or script of the training, run by torchrun, prints on stderr."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *command,
            *("--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_two_processes_train_like_one(settings, tmp_path):
    config = str(settings("warmup", steps=3))
    one = ["--run", str(tmp_path / "one"), "--device", "cpu"]
    assert main(["warmup", "--config", config, *one]) == 0
    two = ["warmup", "--config", config, "-o", str(tmp_path / "two")]
    train_by_two_processes("-m", "scfeat_training.train", *two)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    assert list(two.values()) == pytest.approx(list(one.values()), rel=5e-3)
    assert len(load_checkpoint(tmp_path / "two")["history"]) == 1


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        *((stage, {}) for stage in STAGES),
        ("warmup", {"bridged_weight": 0.0}),
        ("descriptor", {"contrast_weight": 0.5}),
        ("distillation", {"scores": 0.3}),
    ],
)
def test_all_that_is_trained_has_a_gradient(stage, loss, settings, teacher, tmp_path):
    """Else several processes wait for it in vain."""
    config = read_config(settings(stage, steps=1, loss=loss), stage)
    init = teacher if stage == "distillation" else None
    one = Trainer(config, tmp_path / "run", init=init, device="cpu")
    one.train()
    parameters = list(one.network.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters)
    assert any(p.requires_grad for p in parameters)


BROKEN_LOSS = """
import os, sys, torch
from scfeat_training import stages, train
plain = stages.WarmupStage.losses
def losses(self, network, batch):
    values, terms = plain(self, network, batch)
    return torch.where(batch["index"] == 3, torch.nan, values), terms
stages.WarmupStage.losses = losses
os._exit(train.main(sys.argv[1:]))
"""


def test_a_pair_of_another_process_is_named_once(settings, tmp_path):
    script, run = tmp_path / "broken.py", tmp_path / "run"
    script.write_text(BROKEN_LOSS)
    config = str(settings("warmup", steps=2))
    error = train_by_two_processes(str(script), "warmup", "--config", config, "-o", str(run))
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    (skipped,) = [row for row in rows if "skipped" in row]
    assert skipped["step"] == 1 and len(skipped["skipped"]) == 1
    assert error.count("not finite") == error.count(f"({skipped['skipped'][0]})") == 1


SHIPPED = sorted((Path(scfeat_training.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_settings_are_taken(path, data):
    stage = path.stem.split("_")[-1]
    config = read_config(path, stage)
    model = make_model(config)
    made = STAGE_CLASSES[stage](config, model)
    assert sum(len(group["params"]) for group in made.parameter_groups()) > 5
    scenes, _ = split_scenes(read_scenes(data))
    assert len(made.dataset(scenes, skip_bad=False)) > 0


def test_loss_that_is_not_finite_names_the_pair_and_goes_on(settings, tmp_path, capsys):
    trainer = Trainer(read_config(settings("warmup", steps=3), "warmup"), tmp_path / "run")
    plain = trainer.stage.losses
    seen = []

    def broken(network, batch):
        values, terms = plain(network, batch)
        seen.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        if len(seen) == 2:
            seen.append(batch["name"][1])
            values = values * torch.tensor([1.0, torch.nan])
        return values, terms

    trainer.stage.losses = broken
    assert trainer.train() == 3
    before, name, after = seen[1], seen[2], seen[3]
    assert same(before, after)  # the second step changed nothing
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == [[name]]
    assert name in capsys.readouterr().err
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_exported_weights_are_the_averaged_ones_with_their_history(settings, tmp_path):
    run, output = tmp_path / "run", tmp_path / "model.safetensors"
    config = str(settings("warmup", steps=2))
    main(["warmup", "--config", config, "--run", str(run)])
    assert main(["export", str(run), "-o", str(output)]) == 0
    averaged = load_checkpoint(run)["ema"]
    loaded = load_model(output).state_dict()
    for key, value in loaded.items():
        assert torch.allclose(value, averaged[key], rtol=1e-3, atol=1e-4)
    (part,) = read_metadata(output)["provenance"]["history"]
    assert part["command"].startswith("scfeat train warmup --config")
    assert part["to_step"] == 2 and part["seed"] == 0 and part["scenes"] == ["wall"]
    assert part["seconds"] > 0 and "cores" in part["hardware"]
    with pytest.raises(OutputExistsError, match="exists already"):
        export([run], output)
    more = tmp_path / "more"
    arguments = ["--run", str(more), "--init", str(output), "--steps", "1"]
    assert main(["detector", "--config", str(settings("detector")), *arguments]) == 0
    further = load_checkpoint(more)
    assert [part["stage"] for part in further["history"]] == ["warmup", "detector"]
    assert torch.equal(further["ema"]["backbone.fuse.weight"], loaded["backbone.fuse.weight"])
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_mean_of_several_networks_is_exported(tmp_path, capsys):
    torch.manual_seed(0)
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "other", "mean")]
    one, two = networks = [SCFeat(CONFIGS["scfeat-s"]) for _ in range(2)]
    for number, (network, path) in enumerate(zip(networks, paths, strict=False)):
        network.detector.reliability.weight.fill_(1.0)
        network.projection.matrix = torch.randn_like(network.projection.matrix)
        save_model(network, path, {"stage": "detector", "history": [{"seed": number}]})
    save_model(SCFeat(CONFIGS["scfeat-m"]), paths[2], {})
    command = ["export", *map(str, paths[:2]), "-o", str(paths[3])]
    assert main(command) == 0
    mean, made = load_model(paths[3]), read_metadata(paths[3])["provenance"]
    triples = zip(*(network.backbone.parameters() for network in (mean, one, two)), strict=True)
    for value, first, second in triples:
        torch.testing.assert_close(value, (first + second) / 2, rtol=1e-2, atol=1e-3)
    # fitted to the networks, but not to their mean
    assert not mean.detector.reliability.weight.any()
    assert torch.equal(mean.projection.matrix, one.projection.unfitted().matrix)
    assert made["history"] == [{"seed": 0}]
    assert made["mean_with"] == [{"stage": "detector", "history": [{"seed": 1}]}]
    assert main(["export", *map(str, paths[1:3]), "-o", str(tmp_path / "no.safetensors")]) == 1
    assert "other.safetensors: is a scfeat-m" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


def test_a_checkpoint_of_another_network_is_named(settings, tmp_path, capsys):
    run = tmp_path / "run"
    main(["warmup", "--config", str(settings("warmup", steps=1)), "--run", str(run)])
    state = load_checkpoint(run)
    del state["ema"]["backbone.fuse.bias"]
    save_checkpoint(run / CHECKPOINT, state)
    assert main(["export", str(run), "-o", str(tmp_path / "model.safetensors")]) == 1
    assert f"{run}: weights of another network (Missing key" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(settings, tmp_path):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    def fails(*arguments):
        command = [sys.executable, "-m", "scfeat_training.train", *map(str, arguments)]
        found = subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True)
        assert found.returncode == 1 and "Traceback" not in found.stderr
        return found.stderr.splitlines()[-1]

    run, output = tmp_path / "run", tmp_path / "model.safetensors"
    train = ["warmup", "--config", settings("warmup", steps=2), "--run", run]
    assert fails(*train) == f"scfeat train: {run / CHECKPOINT}: cannot be written (File too large)"
    assert not list(run.glob(f"{CHECKPOINT}*"))
    assert main([str(argument) for argument in train]) == 0
    kept = (run / CHECKPOINT).read_bytes()
    assert "cannot be written" in fails(*train, "--resume", "--steps", "3")
    assert (run / CHECKPOINT).read_bytes() == kept
    reason = fails("export", run, "-o", output)
    assert reason == f"scfeat train: {output}: File too large"
    assert [path.name for path in tmp_path.iterdir() if "model" in path.name] == []


@pytest.mark.parametrize("stage", ["warmup", "detector"])
def test_training_on_forgets_what_was_fitted_to_what_it_trains(settings, tmp_path, stage):
    run, fitted, more = (tmp_path / name for name in ("run", "fitted.safetensors", "more"))
    main(["warmup", "--config", str(settings("warmup", steps=1)), "--run", str(run)])
    export([run], fitted)
    model = load_model(fitted)
    model.projection.matrix = torch.randn(100, model.projection.matrix.shape[1])
    model.detector.reliability.weight.fill_(0.5)
    save_model(model, fitted, read_metadata(fitted)["provenance"])
    start = load_model(fitted).projection
    config = str(settings(stage, steps=1))
    assert main([stage, "--config", config, "--run", str(more), "--init", str(fitted)]) == 0
    found = load_checkpoint(more)["model"]
    assert not found["detector.reliability.weight"].any()
    kept = start if stage == "detector" else start.unfitted()  # descriptors stay as they are
    assert torch.equal(found["projection.matrix"], kept.matrix)
    assert main([stage, "--config", config, "--run", str(more), "--resume", "--steps", "2"]) == 0
    found = load_checkpoint(more)
    assert found["step"] == 2 and torch.equal(found["model"]["projection.matrix"], kept.matrix)


def test_run_without_cross_normalization_is_for_study_only(settings, tmp_path):
    run = tmp_path / "run"
    config = str(settings("warmup", steps=1, cross_norm=False))
    assert main(["warmup", "--config", config, "--run", str(run)]) == 0
    assert not any(key.startswith("bridge") for key in load_checkpoint(run)["model"])
    for runs in ([run], ["scfeat-s", run]):
        with pytest.raises(InputError, match="run: was trained without cross normalization"):
            export(runs, tmp_path / "model.safetensors")


def test_ablation_table(settings, data, tmp_path, capsys):
    run = tmp_path / "run"
    main(["detector", "--config", str(settings("detector", steps=1)), "--run", str(run)])
    plain, config = tmp_path / "plain", settings("detector", steps=1, cross_norm=False)
    main(["detector", "--config", str(config), "--run", str(plain), "--init", str(run)])
    capsys.readouterr()
    weights = tmp_path / "model.safetensors"
    export([run], weights)
    rows_of = [f"ours={run}", f"again={run}", f"w/o cross normalization={plain}"]
    rows_of.append(f"exported={weights}")
    arguments = ["ablation", "--data", str(data), *rows_of]
    assert main([*arguments, "--pairs", "2", "--size", "96", "64"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    names = [row[0].strip() for row in rows[2:]]
    variants = ["bilinear", "with pruning", "fusion", "scores without", "all three"]
    variants = [f"ours, {variant}" for variant in variants]
    starts = ["ours", *variants, "again", "w/o cross normalization", "exported"]
    assert [name.startswith(start) for name, start in zip(names, starts, strict=True)] == 9 * [True]
    assert rows[2][1:] == rows[8][1:]
    assert all(0 <= float(cell) <= 1 for row in rows[2:] for cell in row[1:5])
    assert main([*arguments, "--scenes", "wall"]) == 1
    assert "nothing is held out to measure on" in capsys.readouterr().err
    assert main(["ablation", str(run), "--data", str(data)]) == 1
    assert "NAME=RUN" in capsys.readouterr().err
    assert main(["ablation", f"={run}", "--data", str(data)]) == 1
    assert "NAME=RUN" in capsys.readouterr().err
    assert main([*arguments, f"ours={plain}"]) == 1
    assert "'ours' is given twice" in capsys.readouterr().err
    assert main([*arguments, "--pairs", "0"]) == 1
    assert "--pairs" in capsys.readouterr().err


def test_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"step": 1})
    assert load_checkpoint(tmp_path) == {"step": 1}
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=CHECKPOINT):
        load_checkpoint(path)
    path.write_text("batch: 2\n")  # where PyTorch's reader finds instructions of its own
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown field 'stepz'"),
        ({"batch": "four"}, "'batch' must be a whole number, got 'four'"),
        ({"batch": 0}, "warmup.yaml: 'batch' is 0, but must be at least 1"),
        ({"batch": True}, "'batch' must be a whole number, got True"),
        ({"checkpoint_every": 0}, "'checkpoint_every' is 0, but must be at least 1"),
        ({"seed": -1}, "'seed' is -1, but must be from 0"),
        ({"lr": float("nan")}, "'lr' is nan, but must be at least 0"),
        ({"clip": 0}, "'clip' is 0, but must be above 0"),
        ({"ema": 2}, "'ema' is 2, but must be from 0 to 1"),
        ({"posed_share": 1.5}, "'posed_share' is 1.5, but must be from 0 to 1"),
        ({"size": [64, "a"]}, "'size' must be a list of 2 whole numbers, got 'a'"),
        ({"size": [64.0, 48.0]}, "'size' must be a list of 2 whole numbers, got 64.0"),
        ({"photos": [1]}, "'photos' must be a list of names, got 1"),
        ({"encoder_weights": 5}, "'encoder_weights' must be text, got 5"),
        ({"lr": "fast"}, "'lr' must be a number"),
        ({"size": [100, 64]}, "multiples of 16"),
        ({"schedule": "linear"}, "neither constant nor cosine"),
        ({"teacher": "scfeat-m"}, "stage warmup has no 'teacher', only adaptation has"),
        ({"model": "scfeat-xl"}, "none of scfeat, scfeat-m, scfeat-s"),
        ({"loss": {"temprature": 1}}, "unknown field 'temprature'"),
        ({"loss": {"temperature": "a"}}, "section 'loss': 'temperature' must be a number, got 'a'"),
        ({"loss": {"temperature": 0}}, "'temperature' is 0, but must be above 0"),
        ({"photometric": {"glow": 1}}, "warmup.yaml: section 'photometric': unknown field 'glow'"),
        ({"photometric": {"jpeg": 200}}, "'jpeg' is 200, but must be from 0 to 95"),
        ({"homography": {"rotation": 5}}, "'rotation' must be a list of 2 numbers, got 5"),
        ({"homography": {"scale": [2.0]}}, "'scale' must be a list of 2 numbers, got [2.0]"),
        ({"homography": {"scale": [2, 1]}}, "'scale' is [2, 1], but the smaller value comes first"),
        ({"posed": {"overlap": [0.9, 0.1]}}, "[0.9, 0.1], but the smaller value comes first"),
        ({"posed": {"size": [64, 64]}}, "section 'posed': 'size' is [64, 64], but all pairs have"),
        ({"photometric": {"motion": 99999}}, "'motion' is 99999, but must be from 0 to 255"),
        ({"seed": 2**70}, "but must be from 0 to 9223372036854775807"),
        ({"threads": 99999}, "'threads' is 99999, but must be from 0 to 1024"),
        ({"homography": {"overlap": 2}}, "'overlap' is 2, but must be from 0 to 1"),
        ({"network": {"decoder_channels": 5}}, "'decoder_channels' must be a list of 2 whole"),
        ({"network": {"upsampled_kernel": 2}}, "network: upsampled_kernel is 2, but must be odd"),
        ({"network": {"encoder": "vgg"}}, "network: unknown encoder 'vgg', choose one of resnet"),
        ({"homography": {"photometric": {"blur": 1}}}, "'photometric' takes no fields"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"encoder_weights": "/nowhere.pth"}, "/nowhere.pth"),
        ({"scenes": ["fern"]}, "none to train on"),
        ({"frozen": ["layer9"]}, "'layer9' is none of stem, layer1"),
    ],
)
def test_wrong_settings_give_one_line(values, message, settings, tmp_path, capsys):
    config = str(settings("warmup", **values))
    assert main(["warmup", "--config", config, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_cell_larger_than_the_crops_is_refused(settings, tmp_path, capsys):
    config = str(settings("descriptor", loss={"cell": 80}))
    assert main(["descriptor", "--config", config, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a cell of 80 does not fit into the size [96, 64]" in error


@pytest.mark.parametrize(
    ("option", "value"), [("--stop-at", "-5"), ("--time-limit", "-1"), ("--time-limit", "nan")]
)
def test_limits_below_any_step_give_one_line(option, value, settings, tmp_path, capsys):
    arguments = ["warmup", "--config", str(settings("warmup")), "--run", str(tmp_path / "run")]
    assert main([*arguments, option, value]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{option} {value}: must be" in error


def test_encoder_weights_beside_a_whole_network_give_one_line(settings, tmp_path, capsys):
    arguments = ["warmup", "--config", str(settings("warmup")), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--encoder-weights", "resnet18.pth", "--init", "scfeat-m"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--encoder-weights" in error and "--init" in error
    assert not (tmp_path / "run").exists()


def test_numbers_are_taken_as_yaml_reads_them(settings):
    values = {"lr": "1e-3", "clip": float("inf"), "homography": {"scale": [1, "2e0"]}}
    config = read_config(settings("warmup", **values), "warmup")
    assert (config.lr, config.clip) == (1e-3, float("inf"))
    assert homography_pairs(config, read_scenes(config.data), False).config.scale == (1.0, 2.0)


def test_photometric_section_holds_for_all_pairs(data):
    scenes = read_scenes(data)
    values = {"stage": "detector", "size": [96, 64], "synthetic_share": 0.5}
    dark = {"brightness": 0.0, "contrast": 0.0, "gamma": 0.0, "colour": 0.0, "probability": 0.0}
    config = make_config({**values, "photometric": dark | {"grey": 1.0}}, "here")
    for pairs in (homography_pairs(config, scenes, False), posed_pairs(config, scenes, False)):
        for index in range(2):  # with synthetic_share 0.5 one of two is synthetic
            for name in ("image1", "image2"):
                image = pairs[index][name]
                assert (image == image[:1]).all()


def test_existing_run_is_not_overwritten(settings, tmp_path, capsys):
    arguments = ["warmup", "--config", str(settings("warmup", steps=1)), "--run", str(tmp_path)]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    other = ["detector", "--config", str(settings("detector")), "--run", str(tmp_path)]
    assert main([*other, "--resume"]) == 1
    assert "stage 'warmup'" in capsys.readouterr().err


def test_a_folder_is_trained_in_by_one_process_at_a_time(settings, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    arguments = ["warmup", "--config", str(settings("warmup", steps=1)), "--run", str(run)]
    with only_writer(run):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{run}: another process is training there" in error
        assert not list(run.iterdir())
    assert main(arguments) == 0


def test_correspondences_fit_the_geometry(data):
    scenes = read_scenes(data)
    posed = CorrespondencePairs(
        PosedPairs(scenes, PosedPairsConfig(size=(96, 64), tracks=40)), count=60
    )
    planar = CorrespondencePairs(
        HomographyPairs(photo_paths(scenes), HomographyPairsConfig(size=(96, 64))), count=60
    )
    mixed = MixedPairs(planar, posed, 0.25)
    kinds = []
    for index in range(8):
        sample = mixed[index]
        kinds.append(bool(sample["planar"]))
        valid = sample["valid"]
        at1, at2 = sample["points1"][valid], sample["points2"][valid]
        assert len(at1) > 5 and sample["points1"].shape == (60, 2)
        measure = homography_errors if sample["planar"] else epipolar_errors
        assert measure(sample["geometry"], at1, at2).diagonal().max() < 0.1
        again = mixed[index]
        assert all(torch.equal(sample[k], again[k]) for k in ("points1", "points2", "image1"))
    assert kinds == [True, True, True, False] * 2


def test_points_prefer_texture():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[:, 36] = 255  # a line in every cell of one column of cells
    rng = np.random.default_rng(0)
    points = np.concatenate([textured_points(image, 64, rng) for _ in range(20)])
    assert len(points) == 20 * 64 and points.min() >= -0.5 and points.max() <= 63.5
    of_column = points[(points[:, 0] >= 31.5) & (points[:, 0] < 39.5)]
    near = (abs(of_column[:, 0] - 36) < 3).mean()
    assert near > 0.9  # 5 of 8 columns of pixels would be 0.6
