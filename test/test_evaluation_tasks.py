"""All five tasks on data whose answer is known, through `scfeat evaluate`."""

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path

import cv2
import encoded_images
import numpy as np
import pytest
import sample_bags
from encoded_images import World
from full_disk import files_up_to

from scfeat_ros.errors import InputError
from scfeat_ros.images import read_file
from scfeat_training.evaluation import hpatches, localization, main
from scfeat_training.evaluation.metrics import auc
from scfeat_training.evaluation.odometry import score_trajectory
from scfeat_training.evaluation.pose import worst_errors
from scfeat_training.evaluation.sequences import load_sequence
from scfeat_training.sample_bag import quaternion

ADAPTER = Path(encoded_images.__file__)


def evaluate(task, data, out, *options, methods="encoded"):
    """Run a task and return its result.json."""
    arguments = [task, "--data", str(data), "--methods", methods, "-o", str(out)]
    status = main([*arguments, "--adapter", str(ADAPTER), *map(str, options)])
    assert status == 0
    result = json.loads((out / "result.json").read_text())
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http-equiv" not in page and "src=" not in page, "the report must stand alone"
    return result


def row(result, table=0, line=0):
    """A line of a table by column name."""
    table = result["tables"][table]
    return dict(zip(table["columns"], table["rows"][line], strict=True))


H = np.array([[1.1, 0.05, -20], [-0.03, 0.95, 12], [1e-4, -5e-5, 1]])


def write_sequence(folder, noise, seed=0, count=1500):
    """A pair of images in HPatches' layout whose keypoints are exact up to Gaussian noise."""
    rng = np.random.default_rng(seed)
    first = rng.uniform([60, 40], [560, 430], (count, 2))
    mapped = np.c_[first, np.ones(count)] @ H.T
    second = mapped[:, :2] / mapped[:, 2:] + rng.normal(scale=noise, size=(count, 2))
    encoded_images.write(folder / "1.png", first, np.arange(count))
    encoded_images.write(folder / "2.png", second, np.arange(count))
    (folder / "H_1_2").write_text("\n".join(" ".join(f"{v:.17g}" for v in r) for r in H))


def test_hpatches_perfect_and_noisy_detector(tmp_path):
    write_sequence(tmp_path / "data" / "v_perfect", 0)
    write_sequence(tmp_path / "data" / "i_noisy", 2)
    result = evaluate("hpatches", tmp_path / "data", tmp_path / "out")
    noisy, perfect, overall = (row(result, i) for i in range(3))
    assert [perfect[f"MMA@{t}"] for t in (1, 3, 5, 10)] == [1, 1, 1, 1]
    assert perfect["MMAScore"] == pytest.approx(1)
    assert perfect["repeat."] == perfect["match. score"] == 1
    assert [perfect[f"H@{t}"] for t in (1, 3, 5)] == [1, 1, 1]
    assert perfect["features"] == perfect["matches"] == 1500
    # the length of a Gaussian error of 2 px in x and y has Rayleigh's distribution
    for t in (1, 3, 5, 10):
        assert noisy[f"MMA@{t}"] == pytest.approx(1 - np.exp(-(t**2) / 8), abs=0.03)
    assert overall["MMAScore"] == pytest.approx((noisy["MMAScore"] + 1) / 2)
    # published figures stand apart and say what they are
    assert "not measured" in result["tables"][-1]["title"]


def test_hpatches_leaves_out_what_is_broken_and_counts_it(tmp_path):
    data = tmp_path / "data"
    for name in ("v_good", "v_eight", "v_corrupt", "v_missing", "v_talent"):
        write_sequence(data / name, 0, count=50)
    (data / "v_eight" / "H_1_2").write_text("1 0 0 0 1 0 0 0")
    (data / "v_corrupt" / "2.png").write_bytes((data / "v_good" / "2.png").read_bytes()[:200])
    (data / "v_missing" / "2.png").unlink()
    result = evaluate("hpatches", data, tmp_path / "out")
    assert row(result)["pairs"] == 1
    text = "\n".join(result["skipped"])
    assert len(result["skipped"]) == 3
    assert "8 numbers" in text and "v_corrupt" in text and "v_missing" in text
    # v_talent is one of the eight that the paper leaves out: not an error
    assert "v_talent" not in text
    kept = evaluate("hpatches", data, tmp_path / "all", "--all-sequences")
    assert row(kept)["pairs"] == 2


def test_hpatches_counts_every_image_once(tmp_path):
    folder = tmp_path / "v_one"
    for number, count in enumerate((10, 20, 60), start=1):
        points = np.random.default_rng(number).uniform(50, 400, (count, 2))
        encoded_images.write(folder / f"{number}.png", points, np.arange(count))
        if number > 1:
            (folder / f"H_1_{number}").write_text("1 0 0 0 1 0 0 0 1")
    result = evaluate("hpatches", folder, tmp_path / "out")
    assert row(result)["features"] == pytest.approx(30)
    assert row(result)["pairs"] == 2


def test_hpatches_takes_the_region_that_both_images_show(tmp_path):
    """The second image is the first one's top left quarter."""
    folder = tmp_path / "v_one"
    points = np.random.default_rng(0).uniform([5, 5], [630, 470], (200, 2))
    both = (points <= (319.5, 239.5)).all(axis=1)
    assert 20 < both.sum() < 100
    encoded_images.write(folder / "1.png", points, np.arange(200))
    encoded_images.write(folder / "2.png", points[both], np.flatnonzero(both), (320, 240))
    (folder / "H_1_2").write_text("1 0 0 0 1 0 0 0 1")
    values = row(evaluate("hpatches", folder, tmp_path / "out"))
    assert values["repeat."] == 1 and values["match. score"] == 1
    assert values["features"] == (200 + both.sum()) / 2


def test_hpatches_of_another_homography_is_measured_again(tmp_path):
    folder = tmp_path / "v_one"
    write_sequence(folder, 0, count=50)
    assert row(evaluate("hpatches", folder, tmp_path / "out"))["MMA@10"] == 1
    (folder / "H_1_2").write_text("1 0 300 0 1 0 0 0 1")
    values = row(evaluate("hpatches", folder, tmp_path / "out"))
    assert values["MMA@10"] == values["H@5"] == 0


def test_hpatches_names_sequences_without_homographies(tmp_path):
    for name in ("v_one", "v_bare", "v_talent"):
        write_sequence(tmp_path / "data" / name, 0, count=50)
    (tmp_path / "data" / "v_bare" / "H_1_2").unlink()
    (tmp_path / "data" / "v_talent" / "H_1_2").unlink()
    (tmp_path / "data" / "notes").mkdir()
    (reason,) = evaluate("hpatches", tmp_path / "data", tmp_path / "out")["skipped"]
    assert "v_bare: images, but no homography" in reason


def test_hpatches_claims_the_papers_protocol_only_where_it_was_kept():
    names = [f"i_{n}" for n in range(52)] + [f"v_{n}" for n in range(56)]
    whole = [(name, str(k), {}) for name in names for k in range(2, 7)]

    def differences(values=whole, incomplete=False, **changes):
        flags = {"max_size": 0, "max_keypoints": 8000, "paper_options": True, **changes}
        return hpatches._differences(argparse.Namespace(**flags), {"m": values}, incomplete)

    assert differences() == []
    assert differences(whole[:-1]) == ["539 pairs in place of 540"]
    assert differences(whole[:-5]) == ["107 sequences", "535 pairs in place of 540"]
    assert differences(incomplete=True) == ["some images or pairs are left out"]
    assert differences(max_size=640) == ["images of at most 640 px"]
    assert differences(max_keypoints=5000) == ["5000 keypoints in place of 8000"]
    assert differences(paper_options=False) == ["SCFeat without the paper's options"]


def adapter_with(folder, comment=""):
    """A copy of the adapter that begins `extract` with what `statement.txt` beside it says."""
    text = ADAPTER.read_text()
    line = "        points, ids = decode(image)\n"
    assert text.count(line) == 1
    added = "        exec(Path(__file__).with_name('statement.txt').read_text())\n"
    path = folder / "adapter.py"
    path.write_text(comment + text.replace(line, added + line))
    return path


def test_a_second_run_does_not_extract_again(tmp_path):
    write_sequence(tmp_path / "data" / "v_one", 0, count=60)
    adapter, statement = adapter_with(tmp_path), tmp_path / "statement.txt"
    arguments = ["hpatches", "--data", str(tmp_path / "data"), "--methods", "encoded"]
    arguments += ["-o", str(tmp_path / "out"), "--adapter", str(adapter)]

    def run(status=0):
        assert main(arguments) == status
        return json.loads((tmp_path / "out" / "result.json").read_text())

    statement.write_text("")
    first = run()
    statement.write_text("raise AssertionError('extracted again')")
    again = run()
    assert again["tables"] == first["tables"] and again["skipped"] == []
    # features alone are enough where results were lost
    shutil.rmtree(tmp_path / "out" / "cache" / "results")
    again = run()
    assert again["tables"] == first["tables"] and again["skipped"] == []
    # another image under the same name is another image
    write_sequence(tmp_path / "data" / "v_one", 0, seed=1, count=60)
    assert "extracted again" in run(status=1)["skipped"][0]
    # an adapter whose file was changed is another method
    write_sequence(tmp_path / "data" / "v_one", 0, count=60)
    assert run()["skipped"] == []
    adapter_with(tmp_path, "# changed\n")
    assert "extracted again" in run(status=1)["skipped"][0]


def test_a_method_that_fails_on_an_image_is_named_and_the_rest_goes_on(tmp_path):
    world = World(cameras=3, points=60)
    scene = world.write_scene(tmp_path / "scene")
    adapter = adapter_with(tmp_path)
    statement = tmp_path / "statement.txt"
    arguments = ["pose", "--data", str(scene), "--methods", "encoded,orb"]
    arguments += ["-o", str(tmp_path / "out"), "--adapter", str(adapter)]
    # the first image fails, so that the length of descriptors is not known yet
    statement.write_text(f"if image[0, 4].tolist() == {world_bytes(scene, 0)}: image.colour")
    for _ in range(2):  # a failure is not taken from the cache, or it would not be named
        assert main(arguments) == 0
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        values = row(result)
        assert values["pairs"] == 3
        assert 30 < values["poselib AUC@5"] < 34  # one of three pairs has a pose
        (reason,) = result["skipped"]
        assert "000.png: encoded failed (AttributeError: 'numpy.ndarray' object" in reason
        assert "counts as one without features" in result["tables"][0]["note"]
        assert row(result, line=1)["ms / image"] is not None


def test_a_method_that_fails_on_every_image_is_an_error(tmp_path, capsys):
    scene = World(cameras=3, points=60).write_scene(tmp_path / "scene")
    adapter = adapter_with(tmp_path, "")
    (tmp_path / "statement.txt").write_text("image.colour")
    arguments = ["pose", "--data", str(scene), "--methods", "encoded,orb"]
    assert main([*arguments, "-o", str(tmp_path / "out"), "--adapter", str(adapter)]) == 1
    error = capsys.readouterr().err
    assert "encoded failed on every image; the first: " in error and "000.png" in error
    assert "orb failed" not in error
    # the other methods' rows are written all the same
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert row(result, line=1)["ms / image"] is not None


def world_bytes(scene, number):
    """R G B of the pixel of an image of a scene that holds its first point."""
    image = cv2.imread(str(scene / "images" / f"{number:03d}.png"))
    return image[0, 4, ::-1].tolist()


@pytest.mark.parametrize("task", ["hpatches", "pose", "odometry", "reconstruction"])
def test_an_image_of_one_pixel_does_not_end_the_run(tmp_path, task):
    data = tmp_path / "data"
    if task == "hpatches":
        write_sequence(data / "v_one", 0, count=50)
        pixel = data / "v_one" / "2.png"
    else:
        World(cameras=5, points=100).write_scene(data)
        pixel = data / "images" / "001.png"
        change_scene(data, 1, size_wh=(1, 1))
    cv2.imwrite(str(pixel), np.zeros((1, 1, 3), np.uint8))
    out = tmp_path / "out"
    arguments = [task, "--data", str(data), "--methods", "orb,akaze,rootsift", "-o", str(out)]
    assert main(arguments) == 0
    result = json.loads((out / "result.json").read_text())
    assert len(result["tables"][0]["rows"]) == 3
    assert any("akaze failed (error: OpenCV" in reason for reason in result["skipped"])


def test_features_that_find_no_room_name_the_cache(tmp_path, capsys):
    scene = World(cameras=3, points=200).write_scene(tmp_path / "scene")
    arguments = ["pose", "--data", str(scene), "--methods", "orb", "-o", str(tmp_path / "out")]
    with files_up_to(1000):
        assert main(arguments) == 1
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'out' / 'cache'}: File too large\n")
    assert main(arguments) == 0


def test_an_interrupted_run_goes_on(tmp_path, capsys):
    for name in ("v_one", "v_two"):
        write_sequence(tmp_path / "data" / name, 0, seed=len(name), count=60)
    write_sequence(tmp_path / "data" / "v_two", 0, seed=9, count=70)
    adapter, statement = adapter_with(tmp_path), tmp_path / "statement.txt"
    statement.write_text("if len(decode(image)[0]) == 70: raise KeyboardInterrupt")
    arguments = ["hpatches", "--data", str(tmp_path / "data"), "--methods", "encoded"]
    arguments += ["-o", str(tmp_path / "out"), "--adapter", str(adapter)]
    assert main(arguments) == 130
    assert "go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()
    statement.write_text("assert len(decode(image)[0]) == 70, 'done before'")
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert row(result)["pairs"] == 2
    assert result["skipped"] == []


@pytest.mark.parametrize("layout", ["scene", "COLMAP", "scenes", "pairs file"])
def test_pose_of_exact_matches(tmp_path, layout):
    world = World(cameras=4, points=150)
    write = world.write_colmap if layout == "COLMAP" else world.write_scene
    scene = write(tmp_path / "scenes" / "one")
    data, options = scene, ["--overlap", 0, 1]
    if layout == "scenes":
        data = tmp_path / "scenes"
    if layout == "pairs file":
        R = world.R[1] @ world.R[0].T
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = R, world.t[1] - R @ world.t[0]
        numbers = [0, 0, *world.K.ravel(), *world.K.ravel(), *pose.ravel()]
        line = " ".join(["000.png", "001.png", *(repr(float(v)) for v in numbers)])
        data = tmp_path / "pairs.txt"
        data.write_text(line + "\nonly three fields\n")
        options += ["--images", scene / "images"]
    result = evaluate("pose", data, tmp_path / "out", *options)
    values = row(result)
    assert values["pairs"] == (1 if layout == "pairs file" else 6)
    assert len(result["skipped"]) == (layout == "pairs file")
    assert values["precision"] == 1
    assert values["match. score"] == 1
    for estimator in ("magsac", "poselib"):
        assert values[f"{estimator} AUC@5"] > 98


def test_pose_of_images_of_two_lenses(tmp_path):
    world = World(cameras=3, points=150)
    scene = world.write_scene(tmp_path / "scene")
    half = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])  # of half the size
    encoded_images.write(
        scene / "images" / "001.png", world.images[1] / 2 - 0.25, np.arange(150), (320, 240)
    )
    change_scene(scene, 1, K=half @ world.K, size_wh=(320, 240))
    values = row(evaluate("pose", scene, tmp_path / "out", "--estimators", "magsac,poselib"))
    assert values["pairs"] == 3 and values["precision"] == 1
    assert values["magsac AUC@5"] > 98 and values["poselib AUC@5"] > 98


def test_the_larger_error_of_rotation_and_direction_counts_in_every_run():
    values = [
        {"errors": {"magsac": [[1, 5], [7, 2], None]}},
        {"errors": {"magsac": [[3, 4], [0, 0], [1, 1]]}},
    ]
    assert worst_errors(values, "magsac", 3).tolist() == [[5, 4], [7, 0], [np.inf, 1]]


def test_pose_of_images_with_different_numbers_of_features(tmp_path):
    world = World(cameras=2, points=150)
    scene = world.write_scene(tmp_path / "scene")
    encoded_images.write(scene / "images" / "001.png", world.images[1][:50], np.arange(50))
    values = row(evaluate("pose", scene, tmp_path / "out", "--estimators", "magsac"))
    assert (values["matches"], values["features"], values["precision"]) == (50, 100, 1)
    assert values["match. score"] == 0.5


def test_pose_of_wrong_matches_is_a_failure(tmp_path):
    world = World(cameras=2, points=200)
    scene = world.write_scene(tmp_path / "scene")
    shuffled = np.random.default_rng(0).permutation(200)
    encoded_images.write(scene / "images" / "001.png", world.images[1], shuffled)
    values = row(evaluate("pose", scene, tmp_path / "out"))
    assert values["matches"] == 200
    assert values["precision"] < 0.1
    assert values["magsac AUC@5"] < 20


def test_pose_over_several_runs(tmp_path):
    """Half of the matches wrong: poses differ with the samples that are drawn."""
    world = World(cameras=2, points=60)
    scene = world.write_scene(tmp_path / "scene")
    random = np.random.default_rng(0)
    ids = np.arange(60)
    ids[30:] = 30 + random.permutation(30)
    points = world.images[1] + random.normal(scale=1.0, size=(60, 2))
    encoded_images.write(scene / "images" / "001.png", points, ids)
    once = evaluate("pose", scene, tmp_path / "once")
    result = evaluate("pose", scene, tmp_path / "five", "--runs", 5)
    (label,) = result["details"]
    for name in ("magsac", "poselib"):
        (errors,) = (pair["errors"][name] for pair in result["details"][label])
        assert once["details"][label][0]["errors"][name] == errors[:1]
        assert len(errors) == 5
        by_run = [100 * auc([max(e) if e else np.inf], [10])[0] for e in errors]
        assert row(result)[f"{name} AUC@10"] == pytest.approx(np.mean(by_run))
        assert row(result)[f"{name} std@10"] == pytest.approx(np.std(by_run, ddof=1))
        assert len({tuple(e) for e in errors}) > 1
    assert "Mean of 5 runs" in " ".join(result["protocol"])


def test_pairs_of_an_overlap_range(tmp_path):
    world = World(cameras=4, points=60)
    scene = world.write_scene(tmp_path / "scene")
    with np.load(scene / "scene.npz") as data:
        arrays = dict(data)
    arrays["overlap"] = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.9])
    np.savez(scene / "scene.npz", **arrays)
    assert row(evaluate("pose", scene, tmp_path / "a"))["pairs"] == 3
    result = evaluate("pose", scene, tmp_path / "b", "--overlap", 0, 1, "--max-pairs", 2)
    assert row(result)["pairs"] == 2


def change_scene(scene, image, **arrays):
    """Change arrays of scene.npz at one image, or whole where `image` is None."""
    with np.load(scene / "scene.npz") as data:
        changed = dict(data)
    for key, value in arrays.items():
        if image is None:
            changed[key] = np.array(value)
        else:
            changed[key][image] = value
    np.savez(scene / "scene.npz", **changed)


BAD_CAMERAS = {
    "K": np.zeros((3, 3)),
    "R": np.full((3, 3), np.nan),
    "t": np.full(3, np.nan),
}


@pytest.mark.parametrize("array", BAD_CAMERAS)
def test_bad_cameras_of_a_scene_are_left_out_and_named(tmp_path, capsys, array):
    scene = World(cameras=9, points=200, noise=0.1).write_scene(tmp_path / "scene")
    change_scene(scene, 2, **{array: BAD_CAMERAS[array]})
    for task in ("pose", "odometry", "reconstruction", "localization"):
        if task in ("reconstruction", "localization"):
            pytest.importorskip("pycolmap")
        result = evaluate(task, scene, tmp_path / task)
        (reason,) = result["skipped"]
        assert "002.png" in reason and array in reason
        values = row(result)
        if task == "pose":
            assert values["pairs"] == 28
        elif task == "odometry":
            assert len(next(iter(result["details"].values()))["matches"]) == 7
        elif task == "reconstruction":
            assert values["registered of 8"] == 8
        else:
            assert values["localized of 2"] == 2
    change_scene(scene, slice(None), **{array: BAD_CAMERAS[array]})
    for task in ("pose", "odometry", "reconstruction", "localization"):
        arguments = [task, "--data", str(scene), "--methods", "orb", "-o", str(tmp_path / "all")]
        assert main(arguments) == 1
        assert "no usable camera" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["pose", "odometry", "reconstruction", "localization"])
def test_images_of_another_size_than_their_camera_is_for_are_left_out(tmp_path, task):
    if task in ("reconstruction", "localization"):
        pytest.importorskip("pycolmap")
    scene = World(cameras=9, points=200).write_scene(tmp_path / "scene")
    cv2.imwrite(str(scene / "images/002.png"), np.zeros((240, 320, 3), np.uint8))
    (reason,) = evaluate(task, scene, tmp_path / "out")["skipped"]
    assert "002.png: is 320x240, but its K is for 640x480" in reason


def test_bad_lines_of_a_pairs_file_are_left_out_and_named(tmp_path):
    world = World(cameras=2, points=100)
    scene = world.write_scene(tmp_path / "scene")
    R = world.R[1] @ world.R[0].T
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R, world.t[1] - R @ world.t[0]
    lines = []
    for K1, K2, factor in (
        (world.K, world.K, 1),
        (0 * world.K, world.K, 1),
        (world.K, 0 * world.K, 1),
        (world.K, world.K, np.nan),
        (world.K, world.K, 2),
    ):
        numbers = [0, 0, *K1.ravel(), *K2.ravel(), *(factor * pose).ravel()]
        lines.append(" ".join(["000.png", "001.png", *(repr(float(v)) for v in numbers)]))
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    result = evaluate(
        "pose", tmp_path / "pairs.txt", tmp_path / "out", "--images", scene / "images"
    )
    assert row(result)["pairs"] == 1
    for number, reason in enumerate(result["skipped"], start=2):
        assert f"pairs.txt, line {number}: " in reason
    assert len(result["skipped"]) == 4


def test_a_scene_without_a_usable_pair_has_no_figures(tmp_path):
    for name in ("a", "b", "c"):
        World(cameras=3, points=60).write_scene(tmp_path / "scenes" / name)
    shutil.rmtree(tmp_path / "scenes" / "a" / "images")
    change_scene(tmp_path / "scenes" / "b", slice(None), overlap=0.05)
    result = evaluate("pose", tmp_path / "scenes", tmp_path / "out", "--runs", 2)
    for table in (0, 1):
        values = row(result, table)
        assert values["pairs"] == 0
        assert all(values[name] is None for name in values if name not in ("method", "pairs"))
    assert row(result, 2)["poselib AUC@5"] > 98
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert any("scenes/b: no pair has an overlap in 0.1 to 0.7" in r for r in result["skipped"])


def test_a_scene_may_lack_pairs_with_their_overlap(tmp_path, capsys):
    scene = World(cameras=4, points=200).write_scene(tmp_path / "scene")
    file = scene / "scene.npz"
    with np.load(file) as data:
        arrays = dict(data)
    del arrays["overlap"]
    np.savez(file, **arrays)
    arguments = ["odometry", "--data", str(scene), "--methods", "orb", "-o", str(tmp_path / "bad")]
    for reason in (f"{file}: lacks the array(s) overlap", f"{file}: unreadable"):
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err
        file.write_bytes(file.read_bytes()[:1000])
    del arrays["pairs"]
    np.savez(file, **arrays)
    check_odometry(evaluate("odometry", scene, tmp_path / "out"), 4)


def check_odometry(result, frames):
    values, path = row(result), row(result, 1)
    assert values["inlier share"] == 1
    assert values["track length"] == frames
    assert path["ATE, m"] < 0.01
    assert path["RPE, m"] < 0.01
    assert path["RPE, deg"] < 0.05
    assert path["failures"] == 0


def test_odometry_on_a_scene(tmp_path):
    scene = World(cameras=8, points=200).write_scene(tmp_path / "scene")
    check_odometry(evaluate("odometry", scene, tmp_path / "out"), 8)
    result = evaluate("odometry", scene, tmp_path / "half", "--step", 2, "--estimator", "magsac")
    check_odometry(result, 4)


def test_odometry_where_nothing_or_little_can_be_aligned(tmp_path):
    """Two frames, a camera that stands still, and a method that never finds a motion."""
    for name, frames in (("two", 2), ("still", 5)):
        scene = World(cameras=frames, points=200).write_scene(tmp_path / name)
        if name == "still":
            for array in ("R", "t"):
                with np.load(scene / "scene.npz") as data:
                    change_scene(scene, slice(None), **{array: data[array][0]})
            for image in sorted((scene / "images").iterdir())[1:]:
                shutil.copyfile(scene / "images" / "000.png", image)
        for estimator in ("poselib", "magsac"):
            out = tmp_path / f"{name}-{estimator}"
            result = evaluate("odometry", scene, out, "--estimator", estimator)
            values = row(result, 1)
            assert values["ATE, m"] is None
            if values["failures"] < frames - 1:
                assert values["RPE, m"] < 0.01
    scene = World(cameras=5, points=200).write_scene(tmp_path / "scene")
    result = evaluate("odometry", scene, tmp_path / "none", "--runs", 2, methods="orb,encoded")
    failed = row(result, 1)
    assert failed["failures"] == 4
    assert failed["ATE, m"] is failed["RPE, m"] is failed["RPE, deg"] is None
    assert row(result, 1, 1)["ATE, m"] < 0.01


def test_a_straight_path_is_scored_as_a_bent_one():
    truth = np.tile(np.eye(4), (6, 1, 1))
    truth[:, 2, 3] = np.arange(6)
    estimate = truth.copy()
    estimate[:, 0, 3] = [0, 0.3, 0, 0, 0.3, 0]
    turn = np.eye(4)
    turn[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    expected = score_trajectory(estimate, truth)["ate"]
    assert 0.1 < expected < 0.15
    assert score_trajectory(turn @ estimate, truth)["ate"] == pytest.approx(expected)
    # one that evo can align itself
    from evo.core.metrics import APE, PoseRelation, StatisticsType
    from evo.core.trajectory import PosePath3D

    random = np.random.default_rng(0)
    truth[:, :3, 3], estimate[:, :3, 3] = random.normal(size=(2, 6, 3))
    paths = PosePath3D(poses_se3=list(truth)), PosePath3D(poses_se3=list(estimate))
    paths[1].align(paths[0])
    metric = APE(PoseRelation.translation_part)
    metric.process_data(paths)
    reference = metric.get_statistic(StatisticsType.rmse)
    assert score_trajectory(estimate, truth)["ate"] == pytest.approx(reference)


def test_odometry_over_several_runs(tmp_path):
    """Half of the matches wrong: motions differ with the samples that are drawn."""
    world = World(cameras=4, points=60)
    scene = world.write_scene(tmp_path / "scene")
    random = np.random.default_rng(0)
    for number in (1, 3):
        ids = np.arange(60)
        ids[30:] = 30 + random.permutation(30)
        points = world.images[number] + random.normal(scale=1.0, size=(60, 2))
        encoded_images.write(scene / "images" / f"{number:03d}.png", points, ids)
    once = evaluate("odometry", scene, tmp_path / "once")
    result = evaluate("odometry", scene, tmp_path / "five", "--runs", 5)
    runs = result["details"]["encoded"]["runs"]
    assert len(runs) == 5
    assert once["details"]["encoded"]["runs"] == runs[:1]
    values = row(result, 1)
    for column, name in (("ATE, m", "ate"), ("RPE, deg", "rpe_rotation")):
        found = [run[name] for run in runs]
        assert len(set(found)) > 1
        assert values[column] == pytest.approx(np.median(found))
        lowest, highest = map(float, values[f"{column}: range"].split(" to "))
        assert lowest == pytest.approx(min(found), rel=0.05)
        assert highest == pytest.approx(max(found), rel=0.05)
    assert "Medians of 5 runs" in " ".join(result["protocol"])
    assert "ATE, m: range" not in row(once, 1)


def test_odometry_in_kittis_layout(tmp_path, capsys):
    world = World(cameras=6, points=200)
    data = tmp_path / "sequences" / "07"
    world.write_images(data / "image_0", [f"{i:06d}.png" for i in range(6)])
    P = np.column_stack([world.K, np.zeros(3)]).ravel()
    (data / "calib.txt").write_text("P0: " + " ".join(map(repr, map(float, P))) + "\n")
    (tmp_path / "poses").mkdir()
    rows = world.poses[:, :3].reshape(6, 12)
    np.savetxt(tmp_path / "poses" / "07.txt", rows)
    check_odometry(evaluate("odometry", data, tmp_path / "out"), 6)
    # poses that are none are left out and named
    rows[0, 3], rows[5] = np.nan, 2 * rows[5]
    np.savetxt(tmp_path / "poses" / "07.txt", rows)
    result = evaluate("odometry", data, tmp_path / "bad")
    check_odometry(result, 4)
    assert len(result["skipped"]) == 2
    assert "07.txt, line 1 left out: no finite pose" in result["skipped"][0]
    assert "07.txt, line 6 left out: no finite pose" in result["skipped"][1]
    arguments = ["odometry", "--data", str(data), "--methods", "orb", "-o", str(tmp_path / "out")]
    for text, reason in (
        ("P0: " + "0 " * 12, "calib.txt, P0: K is not an intrinsic matrix"),
        ("P0: " + "a " * 12, "calib.txt: no line 'P0:' with twelve numbers"),
    ):
        (data / "calib.txt").write_text(text)
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err


def test_odometry_in_tums_layout(tmp_path, capsys):
    world = World(cameras=6, points=200)
    data = tmp_path / "tum"
    names = [f"rgb/{i}.png" for i in range(6)]
    world.write_images(data, names)
    lines = [f"{10 + 0.1 * i:.4f} {name}" for i, name in enumerate(names)]
    (data / "rgb.txt").write_text("# timestamp filename\n" + "\n".join(lines))
    truth = []
    for i, pose in enumerate(world.poses[:5]):  # the last image has no pose
        numbers = [*pose[:3, 3], *quaternion(pose[:3, :3])]
        truth.append(" ".join([f"{10.004 + 0.1 * i:.4f}", *(repr(float(v)) for v in numbers)]))
    (data / "groundtruth.txt").write_text("\n".join(truth))
    K = world.K
    intrinsics = ",".join(str(v) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
    result = evaluate("odometry", data, tmp_path / "out", "--intrinsics", intrinsics)
    check_odometry(result, 5)
    assert result["skipped"] == ["1 images without a ground-truth pose left out"]
    # lines that cannot be used are left out and named
    file = data / "groundtruth.txt"
    numbers = truth[4].split()
    bad = [" ".join([*numbers[:k], text, *numbers[k + 1 :]]) for k, text in ((2, "x"), (1, "nan"))]
    bad += [" ".join(numbers[:4] + ["0"] * 4), "1 2 3"]
    file.write_text("\n".join(["# comment", *truth[:4], *bad]))
    result = evaluate("odometry", data, tmp_path / "bad", "--intrinsics", intrinsics)
    check_odometry(result, 4)
    for number, reason in enumerate(result["skipped"][:4], start=6):
        assert f"groundtruth.txt, line {number} left out: " in reason
    arguments = ["odometry", "--data", str(data), "--methods", "orb", "-o", str(tmp_path / "out")]
    file.write_text("# comments\n# alone\n")
    assert main([*arguments, "--intrinsics", intrinsics]) == 1
    assert "groundtruth.txt: no line can be used (it is empty)" in capsys.readouterr().err
    assert main([*arguments, "--intrinsics", "0,0,310,245"]) == 1
    assert "--intrinsics: " in capsys.readouterr().err
    for flag, value, least in (("--max-frames", "-5", 0), ("--runs", "0", 1)):
        assert main([*arguments, "--intrinsics", intrinsics, flag, value]) == 1
        assert f"{flag} {value}: must be at least {least}" in capsys.readouterr().err


def test_odometry_in_eurocs_layout_with_distortion(tmp_path, capsys):
    world = World(cameras=6, points=200)
    data = tmp_path / "V1_01_easy"
    coefficients = np.array([-0.28, 0.07, 2e-4, 1e-4])
    camera_in_body = np.eye(4)
    camera_in_body[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    camera_in_body[:3, 3] = 0.1, -0.05, 0.02
    stamps = [1403636579763555584 + 50_000_000 * i for i in range(6)]
    rows, truth = ["#timestamp [ns],filename"], ["#timestamp, p, q, v"]
    for stamp, pose, R, t in zip(stamps, world.poses, world.R, world.t, strict=True):
        pixels, _ = cv2.projectPoints(world.points, cv2.Rodrigues(R)[0], t, world.K, coefficients)
        name = f"{stamp}.png"
        file = data / "mav0" / "cam0" / "data" / name
        encoded_images.write(file, pixels[:, 0], np.arange(200))
        rows.append(f"{stamp},{name}")
        body = pose @ np.linalg.inv(camera_in_body)
        x, y, z, w = quaternion(body[:3, :3])
        numbers = [*body[:3, 3], w, x, y, z, 0, 0, 0]
        truth.append(",".join([str(stamp), *(repr(float(v)) for v in numbers)]))
    (data / "mav0" / "cam0" / "data.csv").write_text("\n".join(rows))
    folder = data / "mav0" / "state_groundtruth_estimate0"
    folder.mkdir()
    (folder / "data.csv").write_text("\n".join(truth))
    K = world.K
    (data / "mav0" / "cam0" / "sensor.yaml").write_text(
        f"T_BS:\n  data: {camera_in_body.ravel().tolist()}\n"
        f"intrinsics: {[float(v) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])]}\n"
        "distortion_model: radial-tangential\n"
        f"distortion_coefficients: {coefficients.tolist()}\n"
    )
    check_odometry(evaluate("odometry", data, tmp_path / "out"), 6)
    # lines that cannot be used are left out and named
    truth[1] = truth[1].replace(",", ",nan,", 1)
    (folder / "data.csv").write_text("\n".join(truth))
    (data / "mav0" / "cam0" / "data.csv").write_text("\n".join([*rows, "17"]))
    result = evaluate("odometry", data, tmp_path / "bad")
    check_odometry(result, 5)
    assert "cam0/data.csv, line 8 left out: 1 fields" in result["skipped"][0]
    assert "data.csv, line 2 left out: no finite position" in result["skipped"][1]
    sensor = data / "mav0" / "cam0" / "sensor.yaml"
    right = sensor.read_text()
    arguments = ["odometry", "--data", str(data), "--methods", "orb", "-o", str(tmp_path / "out")]
    for text in (
        right.replace("intrinsics: [500.0", "intrinsics: [0.0"),
        right.replace("data: [0.0", "data: [.nan"),
    ):
        assert text != right
        sensor.write_text(text)
        assert main(arguments) == 1
        assert "sensor.yaml: cannot be used (" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["plumb_bob", "equidistant"])
def test_odometry_on_a_bag(model, tmp_path):
    world = World(cameras=5, points=200)
    focal, centre = np.diag(world.K)[:2], world.K[:2, 2]
    messages = []
    for i, (points, pose) in enumerate(zip(world.images, world.poses, strict=True)):
        time = sample_bags.stamp(i)
        if model == "equidistant":  # without coefficients no pinhole either
            directions = (points - centre) / focal
            radius = np.linalg.norm(directions, axis=1, keepdims=True)
            points = directions * np.arctan(radius) / radius * focal + centre
        image = encoded_images.encode(points, np.arange(200), world.size)
        position = pose[:3, 3], quaternion(pose[:3, :3]), time
        info = sample_bags.info_message(world.K, world.size, time, D=(0.0,) * 4, model=model)
        messages += [
            ("/info", time, info),
            ("/truth", time, sample_bags.pose_message(*position)),
            ("/image", time, sample_bags.image_message(image, time)),
        ]
    bag = sample_bags.write_bag(tmp_path / "bag", messages)
    result = evaluate("odometry", bag, tmp_path / "out", "--pose-topic", "/truth")
    check_odometry(result, 5)
    assert any("without the distortion" in line for line in result["protocol"]) == (
        model == "equidistant"
    )


def test_images_of_a_bag_with_the_same_stamp_are_kept_apart(tmp_path):
    pictures = [np.full((48, 64), level, np.uint8) for level in (10, 20, 30)]
    images = [sample_bags.image_message(picture, time=5) for picture in pictures]
    rows = [("/image", sample_bags.stamp(i), image) for i, image in enumerate(images)]
    bag = sample_bags.write_bag(tmp_path / "bag", rows)
    numbers = [100.0, 100.0, 31.5, 23.5]
    frames = tmp_path / os.fsdecode(b"caf\xe9")  # over which OpenCV itself crashes
    sequence = load_sequence(bag, numbers, frames_folder=frames)
    assert [read_file(file)[0, 0] for file in sequence.frames] == [10, 20, 30]


def test_images_of_a_bag_that_find_no_room_are_named(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (96, 128), np.uint8) for _ in range(2)]
    bag = sample_bags.write_bag(tmp_path / "bag", sample_bags.camera_messages(pictures))
    with (
        files_up_to(2_000),
        pytest.raises(InputError, match=r"000000\.png: cannot be written \(File too large"),
    ):
        load_sequence(bag, [100.0, 100.0, 63.5, 47.5], frames_folder=tmp_path / "frames")


def test_odometry_without_poses_says_so(tmp_path):
    world = World(cameras=4, points=200)
    world.write_images(tmp_path / "images", [f"{i}.png" for i in range(4)])
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    flags = ("--intrinsics=500,505,310,245", "--runs", 3)
    result = evaluate("odometry", tmp_path / "images", tmp_path / "out", *flags)
    assert len(result["details"]["encoded"]["runs"]) == 1
    assert row(result)["inlier share (est.)"] > 0.95
    assert len(result["tables"]) == 1, "no trajectory is scored without poses"
    assert len(result["skipped"]) == 1 and "2.png" in result["skipped"][0]


def test_reconstruction_of_a_known_scene(tmp_path):
    pytest.importorskip("pycolmap")
    scene = World(cameras=8, points=300, noise=0.1).write_scene(tmp_path / "scene")
    (scene / "images" / "003.png").write_bytes(b"no image")
    result = evaluate("reconstruction", scene, tmp_path / "out")
    values = row(result)
    assert values["registered of 7"] == 7
    assert values["points"] >= 295
    assert values["track length"] > 6.9
    assert 0.05 < values["reproj. error, px"] < 0.2
    assert values["position error of registered (median)"] < 0.01
    assert values["rotation error of registered (median), deg"] < 0.1
    assert values["of 7 within 0.05 m, 0.5 deg, %"] == 100
    assert len(result["skipped"]) == 1 and "003.png" in result["skipped"][0]
    (entry,) = result["details"].values()
    assert (Path(entry["model"]) / "0" / "points3D.bin").is_file()


def test_reconstruction_of_plain_images_calibrates_itself(tmp_path):
    pytest.importorskip("pycolmap")
    world = World(cameras=8, points=300)
    names = [f"{i}.png" for i in range(8)]
    world.write_images(tmp_path / "images", names)
    (tmp_path / "pairs.txt").write_text(
        "".join(f"{a} {b}\n" for a, b in itertools.pairwise(names))
        + "".join(f"{a} {b}\n" for a, b in zip(names, names[2:], strict=False))
        + "0.png nowhere.png\n"
    )
    result = evaluate(
        "reconstruction",
        tmp_path / "images",
        tmp_path / "out",
        *("--camera", "single", "--pairs", tmp_path / "pairs.txt"),
    )
    assert row(result)["registered of 8"] == 8
    assert row(result)["verified pairs"] == 13
    assert not any("position error" in column for column in row(result))
    assert "1 pairs" in result["skipped"][0]


def test_a_colmap_projects_poses_are_known_to_every_task(tmp_path, capsys):
    pytest.importorskip("pycolmap")
    project = World(cameras=9, points=300, noise=0.1).write_colmap(tmp_path / "project")
    shutil.copy(project / "images/000.png", project / "images/900.png")
    (project / "images" / "002.png").write_bytes(b"no image")
    values = {}
    for task in ("odometry", "reconstruction", "localization"):
        result = evaluate(task, project, tmp_path / task)
        values[task] = row(result)
        assert sum("002.png" in reason for reason in result["skipped"]) == 1
        assert len(result["skipped"]) == (2 if task == "reconstruction" else 1)
    assert values["odometry"]["inlier share"] > 0.99
    assert values["reconstruction"]["of 8 within 0.05 m, 0.5 deg, %"] == 100
    assert values["localization"]["localized of 2"] == 2
    assert values["localization"]["median, m"] < 0.01
    # a camera that distorts: only the reconstruction does without
    file = project / "sparse/0/cameras.txt"
    file.write_text("1 SIMPLE_RADIAL 640 480 500 311 246 0.1\n")
    result = evaluate("reconstruction", project, tmp_path / "radial", "--camera", "single")
    assert row(result)["registered of 9"] == 9
    assert not any("position error" in column for column in row(result))
    assert any("its COLMAP model is not used" in reason for reason in result["skipped"])
    for task in ("odometry", "localization"):
        arguments = [task, "--data", str(project), "--methods", "orb", "-o", str(tmp_path / "bad")]
        assert main(arguments) == 1
        assert "image with a usable camera" in capsys.readouterr().err


def test_reconstruction_counts_images_that_are_missing_or_not_registered(tmp_path):
    pytest.importorskip("pycolmap")
    world = World(cameras=8, points=300, noise=0.1)
    scene = world.write_scene(tmp_path / "scene")
    (scene / "images" / "003.png").unlink()
    # image 7 shows points that nobody else sees
    encoded_images.write(scene / "images" / "007.png", world.images[7], np.arange(3000, 3300))
    result = evaluate("reconstruction", scene, tmp_path / "out")
    (reason,) = result["skipped"]
    assert "003.png: in scene.npz, but missing" in reason
    assert "7 of 8 images" in result["protocol"][0]
    values = row(result)
    assert values["registered of 7"] == 6
    assert values["of 7 within 0.05 m, 0.5 deg, %"] == pytest.approx(600 / 7)


def test_reconstruction_takes_each_listed_pair_once(tmp_path):
    pytest.importorskip("pycolmap")
    scene = World(cameras=4, points=200).write_scene(tmp_path / "scene")
    listed = tmp_path / "pairs.txt"
    once = "000.png 001.png\n001.png 002.png\n002.png 003.png\n"
    listed.write_text(once + "001.png 000.png\n002.png 002.png\n001.png 002.png\n")
    result = evaluate("reconstruction", scene, tmp_path / "out", "--pairs", listed)
    assert row(result)["verified pairs"] == 3
    assert "3 pairs" in result["protocol"][0]
    (reason,) = result["skipped"]
    assert reason.startswith("3 pairs") and "twice" in reason


@pytest.mark.parametrize(
    "function", ["cv2.__version__", "scfeat_training.evaluation.pose.poselib_version"]
)
def test_results_of_another_version_are_computed_again(tmp_path, monkeypatch, function):
    scene = World(cameras=3, points=60).write_scene(tmp_path / "scene")
    results = tmp_path / "out" / "cache" / "results"
    for _ in range(2):
        evaluate("pose", scene, tmp_path / "out")
        assert len(list(results.iterdir())) == 3
    monkeypatch.setattr(function, "0" if "cv2" in function else lambda: "0")
    evaluate("pose", scene, tmp_path / "out")
    assert len(list(results.iterdir())) == 6


def hlocs_layout(scene, folder):
    """A scene as the files of hloc's layout, which its localization makes; their folder."""
    evaluate("localization", scene, folder / "out")
    return shutil.copytree(folder / "out" / "hloc", folder / "hloc")


def test_results_are_kept_by_camera_model_and_intrinsics(tmp_path):
    """Another camera of the same features is another result."""
    pycolmap = pytest.importorskip("pycolmap")
    scene = World(cameras=9, points=300, noise=0.1).write_scene(tmp_path / "scene")
    data = hlocs_layout(scene, tmp_path)
    cache = ("--cache", tmp_path / "cache")
    first = row(evaluate("localization", data, tmp_path / "first", *cache))
    lines = (data / "queries.txt").read_text()
    # the same four numbers: focal length, centre, radial distortion
    (data / "queries.txt").write_text(
        "".join(
            f"{line.split()[0]} SIMPLE_RADIAL 640 480 500 310.5 245.5 -0.3\n"
            for line in lines.splitlines()
        )
    )
    second = row(evaluate("localization", data, tmp_path / "second", *cache))
    assert second["median, m"] > first["median, m"]
    model = pycolmap.Reconstruction(data / "sfm")
    (data / "queries.txt").write_text(lines)
    for camera in model.cameras.values():
        camera.params = camera.params * [1.2, 1.2, 1, 1]
    model.write(data / "sfm")
    third = row(evaluate("localization", data, tmp_path / "third", *cache))
    assert third["reproj. error, px"] > first["reproj. error, px"]


def test_localization_in_a_scene_and_in_hlocs_layout(tmp_path):
    pytest.importorskip("pycolmap")
    world = World(cameras=9, points=300, noise=0.1)
    scene = world.write_scene(tmp_path / "scene")
    result = evaluate("localization", scene, tmp_path / "out")
    values = row(result)
    assert values["localized of 2"] == 2  # images 3 and 7
    assert [values[name] for name in ("0.25 m, 2 deg", "0.5 m, 5 deg", "5 m, 10 deg")] == [100] * 3
    assert values["median, m"] < 0.01
    assert values["inliers / query"] > 290
    lines = (tmp_path / "out" / "poses-encoded.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["003.png", "007.png"]
    numbers = lines[0].split()[1:]
    w, x, y, z, *t = map(float, numbers)
    assert quaternion(world.R[3]) == pytest.approx([x, y, z, w], abs=1e-3)
    assert t == pytest.approx(world.t[3], abs=0.02)
    # the same as a folder in hloc's layout, with a query whose pose is not known, and one broken
    data = tmp_path / "hloc"
    shutil.copytree(tmp_path / "out" / "hloc", data)
    poses = (data / "query-poses.txt").read_text().splitlines()
    (data / "query-poses.txt").write_text(poses[0] + "\n")
    (data / "images" / "000.png").write_bytes(b"no image")
    again = evaluate("localization", data, tmp_path / "again")
    assert row(again)["localized of 2"] == 2
    assert row(again)["0.25 m, 2 deg"] == 100
    assert any("000.png" in reason for reason in again["skipped"])


def test_localization_in_a_scene_whose_names_have_spaces(tmp_path):
    pytest.importorskip("pycolmap")
    scene = World(cameras=9, points=200).write_scene(tmp_path / "scene")
    names = [f"{i:03d}.png" for i in range(9)]
    for name in names:
        (scene / "images" / name).rename(scene / "images" / f"left {name}")
    change_scene(scene, None, names=[f"left {name}" for name in names])
    result = evaluate("localization", scene, tmp_path / "out")
    assert row(result)["localized of 2"] == 2 and result["skipped"] == []


def test_aachen_as_it_is_distributed_is_found(tmp_path):
    pytest.importorskip("pycolmap")
    for folder in ("3D-models/aachen_v_1_1", "images/images_upright", "queries"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("pairs-db-covis20.txt", "pairs-query-netvlad50.txt"):
        (tmp_path / file).touch()
    queries = [
        tmp_path / "queries" / f"{name}_time_queries_with_intrinsics.txt"
        for name in ("day", "night")
    ]
    for file in queries:
        file.touch()
    flags = ("images", "model", "db_pairs", "query_pairs", "query_poses", "queries")
    arguments = argparse.Namespace(data=tmp_path, **dict.fromkeys(flags))
    layout = localization.find_layout(arguments)
    assert layout.model == tmp_path / "3D-models/aachen_v_1_1"
    assert layout.images == tmp_path / "images/images_upright"
    assert layout.queries == queries
    assert layout.db_pairs.name == "pairs-db-covis20.txt"
    assert layout.query_pairs.name == "pairs-query-netvlad50.txt"
    assert layout.query_poses is None
    queries[0].unlink()
    queries[1].unlink()
    with pytest.raises(InputError, match=r"queries\.txt missing"):
        localization.find_layout(arguments)


def test_pose_files_keep_folders_where_names_repeat(tmp_path):
    pytest.importorskip("pycolmap")
    world = World(cameras=9, points=300)
    scene = world.write_scene(tmp_path / "scene")
    names = [f"cam{i % 2}/{i // 2}.png" for i in range(9)]  # queries are 3 and 7: cam1/1, cam1/3
    for repeat, expected in ((False, ["1.png", "3.png"]), (True, ["cam1/1.png", "cam0/1.png"])):
        names[7] = "cam0/1.png" if repeat else "cam1/3.png"
        names[2] = "cam0/9.png"
        shutil.rmtree(scene / "images")
        world.write_images(scene / "images", names)
        change_scene(scene, None, names=names)
        result = evaluate("localization", scene, tmp_path / f"out{repeat}")
        lines = (tmp_path / f"out{repeat}" / "poses-encoded.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == expected
        assert ("file names repeat" in " ".join(result["protocol"])) == repeat


def test_localization_leaves_out_and_names_what_is_wrong_in_hlocs_layout(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    scene = World(cameras=13, points=300, noise=0.1).write_scene(tmp_path / "scene")
    data = hlocs_layout(scene, tmp_path)
    queries = (data / "queries.txt").read_text().splitlines()
    name = queries[0].split()[0]
    queries[0] = f"{name} PINHOLE 640 480 0 0 310.5 245.5"
    queries += ["x.png PINHOLE 640 480 1 2 3", "y.png NONE 1 1 1", "z.png"]
    (data / "queries.txt").write_text("\n".join(queries))
    poses = (data / "query-poses.txt").read_text().splitlines()
    poses[1] = poses[1].split()[0] + " 0 0 0 0 nan 0 0"
    (data / "query-poses.txt").write_text("\n".join(poses))
    model = pycolmap.Reconstruction(data / "sfm")
    camera = model.camera(model.find_image_with_name("000.png").camera_id)
    camera.params = camera.params * 0
    bad = model.find_image_with_name("001.png")
    matrix = np.column_stack([np.eye(3), [np.nan] * 3])
    model.frame(bad.frame_id).set_cam_from_world(bad.camera_id, pycolmap.Rigid3d(matrix))
    model.write(data / "sfm")
    result = evaluate("localization", data, tmp_path / "again")
    values = row(result)
    assert values["localized of 2"] == 2
    assert values["0.25 m, 2 deg"] == 100
    text = "\n".join(result["skipped"])
    for reason in (
        "queries.txt, line 1 left out: the parameters",
        "queries.txt, line 4 left out",
        "queries.txt, line 5 left out",
        "queries.txt, line 6 left out",
        "query-poses.txt, line 2 left out",
        "sfm: 000.png: the parameters",
        "sfm: 001.png: K, R or t is not finite",
    ):
        assert reason in text


def test_localization_in_half_a_model_says_so(tmp_path, capsys):
    """pycolmap itself may read on for ever."""
    pytest.importorskip("pycolmap")
    scene = World(cameras=9, points=300, noise=0.1).write_scene(tmp_path / "scene")
    file = hlocs_layout(scene, tmp_path) / "sfm" / "images.bin"
    file.write_bytes(file.read_bytes()[:13])
    arguments = ["localization", "--data", str(tmp_path / "hloc"), "-o", str(tmp_path / "again")]
    assert main([*arguments, "--methods", "orb"]) == 1
    assert f"{file}: ends too early, at 13 bytes" in capsys.readouterr().err


def test_localization_of_an_impossible_query_counts_as_a_miss(tmp_path):
    pytest.importorskip("pycolmap")
    world = World(cameras=9, points=200)
    scene = world.write_scene(tmp_path / "scene")
    # image 7 shows points that nobody else sees
    encoded_images.write(scene / "images" / "007.png", world.images[7], np.arange(3000, 3200))
    values = row(evaluate("localization", scene, tmp_path / "out"))
    assert values["localized of 2"] == 1
    assert values["5 m, 10 deg"] == 50


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("hpatches", "H_1_2"),
        ("pose", "scene.npz"),
        ("odometry", "scene.npz"),
        ("reconstruction", "folder of images"),
        ("localization", "queries.txt"),
    ],
)
def test_wrong_and_empty_folders_say_what_is_expected(tmp_path, capsys, task, expected):
    if task in ("reconstruction", "localization"):
        pytest.importorskip("pycolmap")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (tmp_path / "empty").mkdir()
    (wrong / "notes.md").write_text("nothing")
    for name, reason in (("nowhere", "no such folder"), ("empty", "empty"), ("wrong", expected)):
        arguments = [task, "--data", str(tmp_path / name), "--methods", "orb"]
        assert main([*arguments, "-o", str(tmp_path / "out")]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message
        assert reason in message and name in message
        assert expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "flag", "given"),
    [("pose", "--estimators", "magsac,ransac"), ("odometry", "--estimator", "ransac")],
)
def test_an_unknown_estimator_is_named(tmp_path, capsys, task, flag, given):
    scene = World(cameras=3, points=50).write_scene(tmp_path / "scene")
    arguments = [task, "--data", str(scene), "--methods", "orb", "-o", str(tmp_path / "out")]
    assert main([*arguments, flag, given]) == 1
    assert f"{flag} ransac: unknown; choose from magsac" in capsys.readouterr().err
    assert main([*arguments, flag, "" if task == "odometry" else ","]) == 1
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["-o", "--cache"])
def test_a_folder_that_cannot_be_written_is_named_first(tmp_path, capsys, flag):
    scene = World(cameras=3, points=50).write_scene(tmp_path / "scene")
    arguments = ["pose", "--data", str(scene), "--methods", "orb", "-o", str(tmp_path / "out")]
    assert main([*arguments, flag, str(scene / "scene.npz")]) == 1
    error = capsys.readouterr().err
    name = {"-o": "result.json", "--cache": "features"}[flag]
    assert error.startswith(f"scfeat evaluate: error: {scene}/scene.npz/{name}: cannot be written")


def test_localization_parameters(tmp_path):
    paper = localization.load_parameters(None)
    assert paper["reference"] == {"nms_radius": 2, "score_threshold": 1.0}
    assert paper["query"] == {"nms_radius": 1, "score_threshold": 0.5}
    file = tmp_path / "own.yaml"
    file.write_text("query: {score_threshold: 0.1}\nmatching: {ratio: 0.9}\n")
    own = localization.load_parameters(file)
    assert own["query"] == {"nms_radius": 1, "score_threshold": 0.1}
    assert own["matching"]["ratio"] == 0.9
    assert own["pose"] == paper["pose"]
    for text in (
        "nothing: {a: 1}",
        "matching: {ration: 0.9}",
        "a: [",
        "query: 3",
        "- a\n- b",
        "pose: {threshold: abc}",
        "matching: {ratio: 1.5}",
        "pose: {min_inliers: true}",
        "pose: {threshold: .nan}",
        "pose: {threshold: 0}",
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=r"own\.yaml"):
            localization.load_parameters(file)
