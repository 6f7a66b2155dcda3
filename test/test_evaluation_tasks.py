"""All five tasks on data whose answer is known, through `scfeat evaluate`."""

import argparse
import itertools
import json
import shutil
from pathlib import Path

import cv2
import encoded_images
import numpy as np
import pytest
import sample_bags
from encoded_images import World

from scfeat_ros.errors import InputError
from scfeat_training.evaluation import localization, main
from scfeat_training.evaluation.metrics import auc

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


def adapter_with(folder, statement):
    """A copy of the adapter with a statement at the start of `extract`."""
    text = ADAPTER.read_text()
    line = "        points, ids = decode(image)\n"
    assert text.count(line) == 1
    path = folder / "adapter.py"
    path.write_text(text.replace(line, f"        {statement}\n{line}"))
    return path


def test_a_second_run_does_not_extract_again(tmp_path):
    write_sequence(tmp_path / "data" / "v_one", 0, count=60)
    first = evaluate("hpatches", tmp_path / "data", tmp_path / "out")
    refuses = adapter_with(tmp_path, "raise AssertionError('extracted again')")
    arguments = ["hpatches", "--data", str(tmp_path / "data"), "--methods", "encoded"]
    arguments += ["-o", str(tmp_path / "out"), "--adapter", str(refuses)]
    assert main(arguments) == 0
    again = json.loads((tmp_path / "out" / "result.json").read_text())
    assert again["tables"] == first["tables"]
    # features alone are enough where results were lost
    shutil.rmtree(tmp_path / "out" / "cache" / "results")
    assert main(arguments) == 0
    # another image under the same name is another image
    write_sequence(tmp_path / "data" / "v_one", 0, seed=1, count=60)
    with pytest.raises(AssertionError, match="extracted again"):
        main(arguments)


def test_an_interrupted_run_goes_on(tmp_path, capsys):
    for name in ("v_one", "v_two"):
        write_sequence(tmp_path / "data" / name, 0, seed=len(name), count=60)
    write_sequence(tmp_path / "data" / "v_two", 0, seed=9, count=70)
    stops = adapter_with(tmp_path, "if len(decode(image)[0]) == 70: raise KeyboardInterrupt")
    arguments = ["hpatches", "--data", str(tmp_path / "data"), "--methods", "encoded"]
    arguments += ["-o", str(tmp_path / "out"), "--adapter"]
    assert main([*arguments, str(stops)]) == 130
    assert "go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()
    goes_on = adapter_with(tmp_path, "assert len(decode(image)[0]) == 70, 'done before'")
    assert main([*arguments, str(goes_on)]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert row(result)["pairs"] == 2


@pytest.mark.parametrize("layout", ["scene", "scenes", "pairs file"])
def test_pose_of_exact_matches(tmp_path, layout):
    world = World(cameras=4, points=150)
    scene = world.write_scene(tmp_path / "scenes" / "one")
    data, options = scene, []
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
        options = ["--images", scene / "images"]
    result = evaluate("pose", data, tmp_path / "out", *options)
    values = row(result)
    assert values["pairs"] == (1 if layout == "pairs file" else 6)
    assert len(result["skipped"]) == (layout == "pairs file")
    assert values["precision"] == 1
    assert values["match. score"] == 1
    for estimator in ("magsac", "poselib"):
        assert values[f"{estimator} AUC@5"] > 98


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


def test_odometry_in_kittis_layout(tmp_path):
    world = World(cameras=6, points=200)
    data = tmp_path / "sequences" / "07"
    world.write_images(data / "image_0", [f"{i:06d}.png" for i in range(6)])
    P = np.column_stack([world.K, np.zeros(3)]).ravel()
    (data / "calib.txt").write_text("P0: " + " ".join(map(repr, map(float, P))) + "\n")
    (tmp_path / "poses").mkdir()
    np.savetxt(tmp_path / "poses" / "07.txt", world.poses[:, :3].reshape(6, 12))
    check_odometry(evaluate("odometry", data, tmp_path / "out"), 6)


def quaternion(R):
    """x, y, z, w of a rotation that is not a half turn."""
    w = np.sqrt(1 + np.trace(R)) / 2
    return [
        (R[2, 1] - R[1, 2]) / (4 * w),
        (R[0, 2] - R[2, 0]) / (4 * w),
        (R[1, 0] - R[0, 1]) / (4 * w),
        w,
    ]


def test_odometry_in_tums_layout(tmp_path):
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


def test_odometry_in_eurocs_layout_with_distortion(tmp_path):
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


def test_odometry_on_a_bag(tmp_path):
    world = World(cameras=5, points=200)
    messages = []
    for i, (points, pose) in enumerate(zip(world.images, world.poses, strict=True)):
        time = sample_bags.stamp(i)
        image = encoded_images.encode(points, np.arange(200), world.size)
        position = pose[:3, 3], quaternion(pose[:3, :3]), time
        messages += [
            ("/info", time, sample_bags.info_message(world.K, world.size, time)),
            ("/truth", time, sample_bags.pose_message(*position)),
            ("/image", time, sample_bags.image_message(image, time)),
        ]
    bag = sample_bags.write_bag(tmp_path / "bag", messages)
    check_odometry(evaluate("odometry", bag, tmp_path / "out", "--pose-topic", "/truth"), 5)


def test_odometry_without_poses_says_so(tmp_path):
    world = World(cameras=4, points=200)
    world.write_images(tmp_path / "images", [f"{i}.png" for i in range(4)])
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    result = evaluate(
        "odometry", tmp_path / "images", tmp_path / "out", "--intrinsics=500,505,310,245"
    )
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
    assert values["position error (median)"] < 0.01
    assert values["rotation error (median), deg"] < 0.1
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
    assert "position error (median)" not in row(result)
    assert "1 pairs" in result["skipped"][0]


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
    assert not (tmp_path / "out").exists()


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
    for text in ("nothing: {a: 1}", "matching: {ration: 0.9}", "a: [", "query: 3"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"own\.yaml"):
            localization.load_parameters(file)
