"""The offline tool end to end: bag, folder and video in; bag, video, report out."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from html.parser import HTMLParser

import av
import cv2
import numpy as np
import pytest
import sample_bags
import torch
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sample_bags import IMAGE_TOPIC, INFO_TOPIC, POSE_TOPIC, ROS1

from scfeat_ros import offline
from scfeat_ros.camera import Camera
from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_ros.extractor import Extractor
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.ground_truth import Pose, right_matches, rotation_of
from scfeat_ros.matcher import epipolar_inliers
from scfeat_ros.messages import decode_features, decode_matches, feature_array, match_array
from scfeat_ros.offline import OutputOptions
from scfeat_ros.parameters import MatcherOptions
from scfeat_ros.recovery import RawMessage
from scfeat_ros.sources import BagSource, Frame, open_images
from scfeat_ros.video import VideoWriter

COUNT = 6


def run(source, extractor, output, **options):
    matching = options.pop("matching", None)
    mask = options.pop("mask", None)
    return offline.run(
        source, extractor, output, matching, OutputOptions(**options), mask, progress=False
    )


def read_output(folder):
    """Messages of the output bag: topic -> [(time, message)]."""
    found = {}
    with AnyReader([folder / "features"]) as reader:
        for connection, when, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            found.setdefault(connection.topic, []).append((when, message))
    return found


def stamp_of(message):
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def test_on_a_gpu_one_frame_is_uploaded_while_another_is_computed(images):
    both = threading.Barrier(2)

    class ExtractorOnGpu:
        device = torch.device("cuda", 0)

        def __call__(self, image, mask):
            both.wait(60)  # for the other frame's
            return image

    class FrontEndOnGpu:
        extractor = ExtractorOnGpu()

        def follow(self, features, *_):
            return features

    groups = [offline._Group([], Frame(image, k, "", k, "")) for k, image in enumerate(images)]
    found = [features for _, features in offline._process(groups, FrontEndOnGpu(), None)]
    assert len(found) == COUNT
    assert all(features is image for features, image in zip(found, images, strict=True))


def test_a_gpu_gives_the_same_output(tmp_path, gpu, camera_bag, tiny_weights):
    found = []
    for device in ("cpu", str(gpu)):
        options = {"precision": "fp32", "max_keypoints": 150}
        extractor = Extractor.from_pretrained(tiny_weights, device, **options)
        summary = run(BagSource(camera_bag), extractor, tmp_path / device)
        found.append([summary[key]["mean"] for key in ("keypoints_per_frame", "matches_per_frame")])
        assert summary["model"]["device"] == device
        assert summary["model"]["network"].endswith("CUDA graphs") == (device != "cpu")
    np.testing.assert_allclose(found[1], found[0], rtol=0.01)


@pytest.fixture(scope="module")
def full_output(tmp_path_factory, camera_bag, tiny_extractor):
    """An output with everything that can be asked for."""
    path = tmp_path_factory.mktemp("full") / "out"
    summary = run(
        BagSource(camera_bag, passthrough=True),
        tiny_extractor,
        path,
        video="overlay.mp4",
        overlay=True,
        passthrough=True,
    )
    return path, summary


def test_the_bag_holds_what_the_front_end_gives(full_output, tiny_extractor, images, intrinsics):
    path, _ = full_output
    found = read_output(path)
    front_end = FrontEnd(tiny_extractor)
    camera = Camera(intrinsics)
    for index, image in enumerate(images):
        stamp = sample_bags.stamp(index)
        result = front_end.process(image, stamp, sample_bags.FRAME_ID)
        bearings = camera.bearings(result.features.keypoints)
        when, features = found["/extractor/features"][index]
        assert when == stamp + 5_000_000
        assert stamp_of(features) == stamp
        assert features.header.frame_id == sample_bags.FRAME_ID
        expected = feature_array(result, bearings)
        np.testing.assert_array_equal(decode_features(features), expected)
        matches = found["/extractor/matches"][index][1]
        assert stamp_of(matches) == stamp
        np.testing.assert_array_equal(decode_matches(matches), match_array(result, bearings))
    assert len(found["/extractor/features"]) == len(images)


def test_a_lens_is_undistorted_for_the_epipolar_check(tmp_path, tiny_extractor, images, intrinsics):
    D = (-0.3, 0.05, 0.0, 0.0, 0.0)
    rows = sample_bags.camera_messages(images, intrinsics, D)
    bag = sample_bags.write_bag(tmp_path / "bag", rows)
    checked = MatcherOptions(epipolar_threshold=0.3)
    run(BagSource(bag), tiny_extractor, tmp_path / "checked", matching=checked)
    found = [
        decode_matches(message)["index"].tolist()
        for _, message in read_output(tmp_path / "checked")["/extractor/matches"]
    ]
    plain = run(BagSource(bag), tiny_extractor, tmp_path / "plain")
    for camera, same in ((Camera(intrinsics, D), True), (None, False)):
        strict, loose = FrontEnd(tiny_extractor, checked), FrontEnd(tiny_extractor)
        indices, ratios = [], []
        for index, image in enumerate(images):
            stamp = sample_bags.stamp(index)
            result = strict.process(image, stamp, camera=camera)
            indices.append(result.matches.indices[:, 1].tolist())
            result = loose.process(image, stamp)
            if index:
                points = result.features.keypoints[result.matches.indices[:, 1]]
                inliers, _ = epipolar_inliers(result.previous_keypoints, points, camera=camera)
                ratios.append(inliers.mean())
        assert (indices == found) == same
        assert (
            plain["epipolar_inlier_ratio"]["mean"] == pytest.approx(np.mean(ratios), abs=1e-4)
        ) == same


def test_the_input_is_passed_through_as_it_was(full_output, camera_bag):
    path, _ = full_output

    def raw(folder):
        with AnyReader([folder]) as reader:
            return [
                (c.topic, c.msgtype, when, data)
                for c, when, data in reader.messages()
                if not c.topic.startswith("/extractor")
            ]

    assert raw(path / "features") == raw(camera_bag)


def test_messages_without_a_frame_after_them_do_not_wait_for_one(tmp_path, images, tiny_extractor):
    rows = sample_bags.camera_messages(images[:2])
    end = rows[-1][1]
    text = sample_bags.ROS2.types["std_msgs/msg/String"](data="the end")
    rows += [("/said", end + n, text) for n in range(3)]
    bag = sample_bags.write_bag(tmp_path / "bag", rows)
    source = BagSource(bag, passthrough=True)
    run(source, tiny_extractor, tmp_path / "out", passthrough=True)
    said = read_output(tmp_path / "out")["/said"]
    assert [when for when, _ in said] == [end, end + 1, end + 2]
    # nor are they gathered in memory
    data = bytes(offline.GROUP_BYTES // 4 + 1)
    message = RawMessage("/points", "sensor_msgs/msg/PointCloud2", 0, data)
    group = next(offline._grouped(itertools.repeat(message)))
    assert len(group.messages) == 4 and group.frame is None


def test_a_mask_holds_beside_that_of_valid_pixels():
    image, valid = np.zeros((2, 2), np.uint8), np.array([[True, False], [True, True]])
    wanted = np.array([[255, 255], [0, 1]], np.uint8)
    frame = Frame(image, 0, "", 0, "", mask=valid)
    assert offline._mask_of(frame, wanted).tolist() == [[True, False], [False, True]]
    assert offline._mask_of(frame, None) is valid
    assert offline._mask_of(Frame(image, 0, "", 0, ""), wanted) is wanted


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_frames_in_the_network_at_the_same_time_change_nothing(
    tmp_path, full_output, camera_bag, tiny_extractor, two_threads
):
    source = BagSource(camera_bag, passthrough=True)
    run(source, tiny_extractor, tmp_path / "out", overlay=True, passthrough=True)

    def raw(folder):
        with AnyReader([folder / "features"]) as reader:
            return [(c.topic, when, bytes(data)) for c, when, data in reader.messages()]

    assert raw(tmp_path / "out") == raw(full_output[0])


@pytest.fixture
def settings_of_another():
    """What a program may have set for itself before it calls the tool."""
    before = cv2.getNumThreads(), sys.getswitchinterval()
    cv2.setNumThreads(2)
    sys.setswitchinterval(0.003)
    yield
    cv2.setNumThreads(before[0])
    sys.setswitchinterval(before[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(
    tmp_path, camera_bag, tiny_extractor, two_threads, settings_of_another, fails
):
    mask = np.ones((2, 3)) if fails else None
    with pytest.raises(InputError) if fails else nullcontext():
        run(BagSource(camera_bag), tiny_extractor, tmp_path / "out", mask=mask)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
    assert sys.getswitchinterval() == pytest.approx(0.003)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scfeat")]


def test_an_error_in_the_network_leaves_nothing(tmp_path, camera_bag, tiny_extractor, two_threads):
    with pytest.raises(InputError, match="the mask is 3x2 pixels, the images are 160x120"):
        run(BagSource(camera_bag), tiny_extractor, tmp_path / "out", mask=np.ones((2, 3)))
    assert list(tmp_path.iterdir()) == []


def test_the_overlay_is_in_the_bag_and_in_the_video(full_output, images):
    path, _ = full_output
    pictures = [m for _, m in read_output(path)["/extractor/overlay/compressed"]]
    assert len(pictures) == len(images)
    picture = cv2.imdecode(pictures[-1].data, cv2.IMREAD_COLOR)
    assert picture.shape == (120, 160, 3)
    # coloured rings on a grey image
    assert (picture.max(axis=2).astype(int) - picture.min(axis=2)).max() > 60
    with av.open(str(path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        times = [float(frame.time) for frame in container.decode(stream)]
    np.testing.assert_allclose(times, np.arange(COUNT) * 0.1, atol=1e-3)


def test_the_summary_counts(full_output, images):
    path, summary = full_output
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary["frames"] == len(images)
    assert summary["keypoints_per_frame"]["max"] <= 150
    assert summary["matches_per_frame"]["mean"] > 20
    assert 0 <= summary["epipolar_inlier_ratio"]["mean"] <= 1
    assert summary["tracks"]["longest"] == len(images)
    assert summary["duration_s"] == pytest.approx(0.5)
    assert set(summary["latency_ms"]) == {"decode", "extract", "match", "track", "output"}
    assert summary["input"]["image_topic"] == IMAGE_TOPIC
    assert summary["input"]["camera_info_topic"] == INFO_TOPIC
    assert not summary["damaged"] and summary["warnings"] == []
    assert summary["ground_truth"] is None


def test_track_statistics_agree_with_the_ids_in_the_bag(full_output):
    path, summary = full_output
    ids = np.concatenate(
        [decode_features(m)["track_id"] for _, m in read_output(path)["/extractor/features"]]
    )
    lengths = np.unique(ids, return_counts=True)[1]
    assert summary["tracks"]["count"] == len(lengths)
    assert summary["tracks"]["mean_length"] == pytest.approx(lengths.mean(), abs=1e-3)
    assert summary["tracks"]["median_length"] == np.sort(lengths)[(len(lengths) - 1) // 2]


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags are closed."""

    VOID = ("meta", "img", "br", "line", "rect", "path", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_stands_alone(full_output, images):
    path, _ = full_output
    text = (path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    title = re.search("<title>(.*)</title>", text)[1]
    assert title.startswith("SCFeat on ") and f"<h1>{title}</h1>" in text
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    # one per frame here, and the heat map
    assert page.tags.count("img") == len(images) + 1
    assert page.tags.count("svg") == 4
    for heading in (
        "Keypoints and matches per frame",
        "Inlier ratio",
        "Track lengths",
        "Keypoint coverage",
        "Latency by stage",
        "Sample frames",
        "Settings",
    ):
        assert heading in page.text
    assert "nan" not in re.sub(r'src="[^"]*"', "", text).lower()


def test_the_report_shows_eight_frames_of_many(tmp_path, tiny_extractor):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(sample_bags.sequence(40, 96, 64, step=1)):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    run(open_images(folder), tiny_extractor, tmp_path / "out")
    text = (tmp_path / "out" / "report" / "index.html").read_text()
    shown = [int(n) for n in re.findall(r"<figcaption>Frame (\d+),", text)]
    assert len(shown) == 8
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] >= 32
    assert np.diff(shown).max() <= 8


def drive_with_poses(images, intrinsics, poses_later=False):
    """A camera that slides to the right, with its poses; by choice all after the images."""
    rows = sample_bags.camera_messages(images, intrinsics)
    poses = []
    for index in range(len(images)):
        when = sample_bags.stamp(index)
        message = sample_bags.pose_message((index * 0.1, 0, 0), time=when)
        poses.append((POSE_TOPIC, when + (50_000_000 if poses_later else 1_000_000), message))
    return sorted(rows + poses, key=lambda row: row[1])


@pytest.mark.parametrize("later", [False, True], ids=["before", "after the image"])
def test_matches_are_judged_by_poses(tmp_path, images, intrinsics, tiny_extractor, later):
    rows = drive_with_poses(images, intrinsics, later)
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert summary["input"]["pose_topic"] == POSE_TOPIC
    truth = summary["ground_truth"]
    # every frame but the first is judged
    assert truth["matches"] == round(summary["matches_per_frame"]["mean"] * (COUNT - 1))
    # the camera moves along the rows: right is what stays within two pixels of its row
    found = [decode_matches(m) for _, m in read_output(tmp_path / "out")["/extractor/matches"]]
    vertical = np.concatenate([np.abs(m["v"] - m["prev_v"]) for m in found])
    assert truth["right"] == (vertical <= 2).sum()
    assert truth["share"] > 0.5
    text = Page((tmp_path / "out" / "report" / "index.html").read_text()).text
    assert f"{100 * truth['share']:.1f} %right by ground truth" in text


def test_every_match_is_judged_by_the_poses_of_its_two_images(
    tmp_path, images, intrinsics, tiny_extractor
):
    rows = sample_bags.camera_messages(images, intrinsics)
    poses = []
    for index in range(COUNT):
        position = np.array([0.1 * index, 0.02 * index**2, 0.05 * index])
        quaternion = (0, np.sin(0.01 * index), 0, np.cos(0.01 * index))
        poses.append(Pose(rotation_of(np.array(quaternion)), position))
        when = sample_bags.stamp(index)
        message = sample_bags.pose_message(tuple(position), quaternion, when)
        rows.append((POSE_TOPIC, when, message))
    rows.sort(key=lambda row: row[1])
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    summary = run(source, tiny_extractor, tmp_path / "out")
    found = read_output(tmp_path / "out")
    bearings = [
        np.stack([points[axis] for axis in "xyz"], axis=1)
        for points in (decode_features(m) for _, m in found["/extractor/features"])
    ]
    right = 0
    for index in range(1, COUNT):
        rows = decode_matches(found["/extractor/matches"][index][1])
        before, now = bearings[index - 1][rows["prev_index"]], bearings[index][rows["index"]]
        right += right_matches(
            Camera(intrinsics), poses[index - 1], poses[index], before, now
        ).sum()
    assert 0 < summary["ground_truth"]["right"] == right < summary["ground_truth"]["matches"]


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"every": 2}, [0, 2, 4]),
        ({"start": 0.15}, [2, 3, 4, 5]),
        ({"start": 0.15, "duration": 0.2}, [2, 3]),
        ({"every": 2, "duration": 0.35}, [0, 2]),
    ],
)
def test_a_part_of_the_bag(tmp_path, camera_bag, tiny_extractor, options, frames):
    run(BagSource(camera_bag, **options), tiny_extractor, tmp_path / "out")
    stamps = [stamp_of(m) for _, m in read_output(tmp_path / "out")["/extractor/features"]]
    assert stamps == [sample_bags.stamp(index) for index in frames]


def test_a_calibration_sent_once_counts_for_all(tmp_path, images, intrinsics, tiny_extractor):
    rows = sample_bags.camera_messages(images)
    rows.insert(0, (INFO_TOPIC, rows[0][1], sample_bags.info_message(intrinsics, (160, 120))))
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    run(BagSource(path, start=0.25), tiny_extractor, tmp_path / "out")
    found = read_output(tmp_path / "out")["/extractor/features"]
    assert len(found) == 3
    assert all(np.isfinite(decode_features(m)["x"]).all() for _, m in found)


def test_poses_that_say_nothing_are_noted(tmp_path, images, intrinsics, tiny_extractor):
    rows = sample_bags.camera_messages(images, intrinsics)
    rows.append((POSE_TOPIC, rows[-1][1], sample_bags.pose_message((0, 0, 0), time=77)))
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert summary["frames"] == COUNT and summary["ground_truth"] is None
    assert any(f"judged by {POSE_TOPIC}" in warning for warning in summary["warnings"])


@pytest.mark.parametrize(
    ("frame", "noted"), [(sample_bags.FRAME_ID, False), ("", False), ("base_link", True)]
)
def test_odometry_of_another_frame_is_noted(
    tmp_path, images, intrinsics, tiny_extractor, frame, noted
):
    rows = [
        (topic, when, message)
        if topic != POSE_TOPIC
        else ("/odom", when, sample_bags.odometry_message(message, frame))
        for topic, when, message in drive_with_poses(images, intrinsics)
    ]
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    summary = run(BagSource(path, poses="/odom"), tiny_extractor, tmp_path / "out")
    assert summary["ground_truth"]["share"] > 0.5
    told = [text for text in summary["warnings"] if "has the poses of" in text]
    assert len(told) == noted and all("/odom has the poses of 'base_link'" in t for t in told)


def test_int8_descriptors(tmp_path, camera_bag, tiny_extractor):
    run(BagSource(camera_bag), tiny_extractor, tmp_path / "out", descriptor_type="int8")
    (_, message), *_ = read_output(tmp_path / "out")["/extractor/features"]
    assert decode_features(message)["descriptor"].dtype == np.int8


def test_a_mask_keeps_keypoints_away(tmp_path, camera_bag, tiny_extractor):
    mask = np.zeros((120, 160), bool)
    mask[:, :80] = True
    run(BagSource(camera_bag), tiny_extractor, tmp_path / "out", mask=mask)
    for _, message in read_output(tmp_path / "out")["/extractor/features"]:
        points = decode_features(message)
        assert len(points) and (points["u"] < 80.6).all()
    with pytest.raises(InputError, match="mask is 80x120 pixels, the images are 160x120"):
        run(BagSource(camera_bag), tiny_extractor, tmp_path / "o", mask=np.ones((120, 80), bool))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_matcher_options_count(tmp_path, camera_bag, tiny_extractor):
    loose = run(BagSource(camera_bag), tiny_extractor, tmp_path / "loose")
    matching = MatcherOptions(ratio=0.6, max_gap=0.05)
    strict = run(BagSource(camera_bag), tiny_extractor, tmp_path / "strict", matching=matching)
    assert strict["matches_per_frame"] is None and loose["matches_per_frame"]
    assert strict["tracker_resets"] == {"gap": COUNT - 1}
    assert any("--max-gap" in warning for warning in strict["warnings"])


@pytest.mark.parametrize("kind", ["compressed", "ros 1"])
def test_other_bags(tmp_path, images, intrinsics, tiny_extractor, kind):
    path = tmp_path / "drive.bag"
    if kind == "ros 1":
        rows = [
            (INFO_TOPIC, 5, sample_bags.info_message(intrinsics, (160, 120), types=ROS1.types))
        ] + [
            (
                IMAGE_TOPIC,
                sample_bags.stamp(i),
                sample_bags.image_message(image, sample_bags.stamp(i), types=ROS1.types),
            )
            for i, image in enumerate(images)
        ]
        sample_bags.write_ros1_bag(path, rows)
    else:
        rows = [
            (
                f"{IMAGE_TOPIC}/compressed",
                sample_bags.stamp(i),
                sample_bags.compressed_message(image, sample_bags.stamp(i)),
            )
            for i, image in enumerate(images)
        ]
        rows.insert(0, (INFO_TOPIC, 5, sample_bags.info_message(intrinsics, (160, 120))))
        sample_bags.write_bag(path, rows)
    summary = run(
        BagSource(path, passthrough=True), tiny_extractor, tmp_path / "out", passthrough=True
    )
    assert summary["frames"] == COUNT and summary["warnings"] == []
    found = read_output(tmp_path / "out")
    points = decode_features(found["/extractor/features"][0][1])
    assert np.isfinite(points["x"]).all()
    info = found[INFO_TOPIC][0][1]
    np.testing.assert_array_equal(info.k, intrinsics.reshape(-1))
    topic = IMAGE_TOPIC if kind == "ros 1" else f"{IMAGE_TOPIC}/compressed"
    assert len(found[topic]) == COUNT
    assert stamp_of(found[topic][3][1]) == sample_bags.stamp(3)


def add_custom_type(store):
    """Register a message type that is none of ROS's own; returns a maker of messages."""
    text = "uint32 number\nstd_msgs/Header header\nmy_pkg/Part[] parts\n"
    part = "float64 value\nstring name\n"
    types = get_types_from_msg(text, "my_pkg/msg/Foo") | get_types_from_msg(part, "my_pkg/msg/Part")
    if "my_pkg/msg/Foo" not in store.fielddefs:
        store.register(types)

    def make(number):
        made = store.types["my_pkg/msg/Part"](value=0.5 * number, name=f"part {number}")
        header = sample_bags.header(store.types, sample_bags.stamp(number), "base")
        return store.types["my_pkg/msg/Foo"](number=number, header=header, parts=[made])

    return make


@pytest.mark.parametrize("kind", ["mcap", "mcap, cut off", "sqlite3", "ros 1", "ros 1, cut off"])
def test_types_that_the_bag_defines_are_passed_through(tmp_path, images, tiny_extractor, kind):
    ros1 = kind.startswith("ros 1")
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
    make = add_custom_type(store)
    rows = []
    for i, image in enumerate(images):
        image = sample_bags.image_message(image, sample_bags.stamp(i), types=store.types)
        rows += [
            ("/foo", sample_bags.stamp(i), make(i)),
            (IMAGE_TOPIC, sample_bags.stamp(i), image),
        ]
    path = tmp_path / ("drive.bag" if ros1 else "drive")
    write = sample_bags.write_ros1_bag if ros1 else sample_bags.write_bag
    options = {} if ros1 else {"storage": kind.split(",")[0]}
    write(path, rows, **options, store=store)
    if not ros1:
        path = sample_bags.storage_file(path)
    if kind.endswith("cut off"):
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 20])
    source = BagSource(path, passthrough=True)
    summary = run(source, tiny_extractor, tmp_path / "out", passthrough=True)
    assert not any("not passed through" in text for text in summary["warnings"])
    found = read_output(tmp_path / "out")["/foo"]
    assert len(found) >= COUNT - 1
    for number, (_, message) in enumerate(found):
        assert message.number == number and message.parts[0].name == f"part {number}"
        assert stamp_of(message) == sample_bags.stamp(number)


def test_topics_that_cannot_be_passed_through_are_told(tmp_path, images, tiny_extractor):
    rows = sample_bags.camera_messages(images)
    text = sample_bags.ROS2.types["std_msgs/msg/String"](data="of an earlier run")
    rows += [("/extractor/features", rows[-1][1] + n, text) for n in range(2)]
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows), passthrough=True)
    summary = run(source, tiny_extractor, tmp_path / "out", passthrough=True)
    (warning,) = summary["warnings"]
    assert warning.startswith("/extractor/features was not passed through: the output has a topic")
    assert len(read_output(tmp_path / "out")["/extractor/features"]) == COUNT


def test_a_damaged_message_of_ros_1_is_lost_alone(tmp_path, images, tiny_extractor):
    rows = []
    for i, image in enumerate(images):
        rows.append(
            ("/said", sample_bags.stamp(i), ROS1.types["std_msgs/msg/String"](data="x" * 40))
        )
        message = sample_bags.image_message(image, sample_bags.stamp(i), types=ROS1.types)
        rows.append((IMAGE_TOPIC, sample_bags.stamp(i), message))
    path = tmp_path / "drive.bag"
    sample_bags.write_ros1_bag(path, rows)
    data = bytearray(path.read_bytes())
    third = [m.start() for m in re.finditer(b"x" * 40, data)][2]
    data[third - 4 : third] = b"\xff" * 4  # the text's length
    path.write_bytes(data)
    source = BagSource(path, passthrough=True)
    summary = run(source, tiny_extractor, tmp_path / "out", passthrough=True)
    assert len(read_output(tmp_path / "out")["/said"]) == COUNT - 1
    assert summary["damage"]["messages_lost"] == 1 and summary["damaged"]
    assert "/said" in summary["damage"]["places"][0]


def test_odd_bags_are_processed_with_a_warning(tmp_path, images, intrinsics, tiny_extractor):
    rows = [(INFO_TOPIC, 0, sample_bags.info_message(intrinsics, (320, 240)))]
    for index, image in enumerate(images):
        rows.append((IMAGE_TOPIC, sample_bags.stamp(index), sample_bags.image_message(image, 0)))
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert any("no stamps" in warning for warning in summary["warnings"])
    assert any("320x240" in warning for warning in summary["warnings"])
    found = read_output(tmp_path / "out")["/extractor/features"]
    assert [stamp_of(m) for _, m in found] == [sample_bags.stamp(i) for i in range(COUNT)]
    assert np.isnan(decode_features(found[0][1])["x"]).all()


def test_unreadable_frames_are_skipped_and_counted(tmp_path, images, tiny_extractor):
    rows = sample_bags.camera_messages(images)
    rows[1][2].encoding = "nv21"
    rows[3][2].data = rows[3][2].data[:100]
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert summary["frames"] == COUNT - 2
    assert sum(summary["frames_skipped"].values()) == 2
    assert any("nv21" in reason for reason in summary["frames_skipped"])
    assert summary["damaged"]
    assert "2 frames" not in summary["frames_skipped"]


def test_floating_point_images_have_keypoints_where_they_are_numbers(
    tmp_path, images, tiny_extractor
):
    rows = []
    for index, image in enumerate(images):
        pixels = image.astype(np.float32) / 1000
        pixels[:, :80] = np.nan
        message = sample_bags.image_message(pixels, sample_bags.stamp(index), "32FC1")
        rows.append((IMAGE_TOPIC, sample_bags.stamp(index), message))
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    mask = np.ones(images[0].shape, np.uint8)
    mask[:60] = 0
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out", mask=mask)
    assert summary["frames"] == COUNT and not summary["damaged"]
    assert any("NaN" in warning for warning in summary["warnings"])
    for _, message in read_output(tmp_path / "out")["/extractor/features"]:
        found = decode_features(message)
        assert len(found) and found["u"].min() > 79 and found["v"].min() > 59


def test_a_damaged_bag_is_processed_and_reported(tmp_path, images, intrinsics, tiny_extractor):
    rows = sample_bags.camera_messages(images, intrinsics)
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    file = sample_bags.storage_file(path)
    file.write_bytes(file.read_bytes()[: int(0.7 * file.stat().st_size)])
    summary = run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert 3 <= summary["frames"] < COUNT
    assert summary["damaged"] and summary["damage"]["bytes_lost"] > 0
    assert summary["damage"]["messages_lost"] >= COUNT - summary["frames"]
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "The input is damaged" in page and "bytes can be read" in page


def save_folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        cv2.imwrite(str(path / f"view{index + 8}.png"), image)
    return path


def test_a_folder_of_images(tmp_path, images, tiny_extractor):
    folder = save_folder(tmp_path / "images", images)
    (folder / "view9.png").write_bytes(b"broken")
    (folder / "notes.txt").write_text("no image")
    summary = run(open_images(folder, rate=5.0), tiny_extractor, tmp_path / "out", video="o.mp4")
    assert summary["frames"] == COUNT - 1 and summary["damaged"]
    assert "view9.png" in summary["damage"]["places"][0]
    stamps = [stamp_of(m) for _, m in read_output(tmp_path / "out")["/extractor/features"]]
    # natural order, 8 before 10, and the time of the missing one is left free
    assert stamps == [i * 200_000_000 for i in (0, 2, 3, 4, 5)]
    assert (tmp_path / "out" / "o.mp4").stat().st_size > 500


def test_names_with_marks_of_html_are_shown_as_they_are(tmp_path, images, tiny_extractor):
    folder = save_folder(tmp_path / "a<b>&c", images[:2])
    (folder / "<u>x.png").write_bytes(b"broken")
    run(open_images(folder), tiny_extractor, tmp_path / "out")
    page = Page((tmp_path / "out" / "report" / "index.html").read_text())
    assert page.open == [] and "u" not in page.tags
    for shown in ("SCFeat on a<b>&c", f"{folder}/<u>x.png", f"input: path{folder}"):
        assert shown in page.text


def test_a_video(tmp_path, images, tiny_extractor):
    save_folder(tmp_path / "images", images)
    source = open_images(tmp_path / "images")
    run(source, tiny_extractor, tmp_path / "first", video="overlay.mp4")
    video = tmp_path / "first" / "overlay.mp4"
    summary = run(open_images(video, every=2), tiny_extractor, tmp_path / "second")
    assert summary["frames"] == 3 and not summary["damaged"]
    stamps = [stamp_of(m) for _, m in read_output(tmp_path / "second")["/extractor/features"]]
    np.testing.assert_allclose(stamps, [0, 2e8, 4e8], atol=1e6)


def test_a_part_of_a_video_or_folder(tmp_path, images):
    save_folder(tmp_path / "images", images)
    writer = VideoWriter(tmp_path / "video.mp4", (160, 120))
    for index, image in enumerate(images):
        writer.write(np.repeat(image[..., None], 3, axis=2), index * 100_000_000)
    writer.close()
    for name in ("images", "video.mp4"):
        source = open_images(tmp_path / name, start=0.1, duration=0.2)
        times = [round(frame.stamp * 1e-9, 2) for frame in source.frames()]
        assert times == [0.1, 0.2] and not source.account.is_damaged
        every = open_images(tmp_path / name, every=2, start=0.1)
        assert [round(frame.stamp * 1e-9, 2) for frame in every.frames()] == [0.1, 0.3, 0.5]
        with pytest.raises(InputError, match="--duration must be positive"):
            open_images(tmp_path / name, duration=0.0)


def test_a_part_of_a_video_counts_from_its_first_frame(tmp_path):
    with av.open(str(tmp_path / "video.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for index in range(6):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts = 100 + index  # as of a stream that somebody tuned in to
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    source = open_images(tmp_path / "video.mkv", start=0.1, duration=0.2)
    found = [(round(frame.stamp * 1e-9, 2), frame.name) for frame in source.frames()]
    assert found == [(10.1, "0.10 s"), (10.2, "0.20 s")]


@pytest.mark.parametrize(("size", "level"), [((640, 480), 31), ((1920, 1080), 42)])
def test_players_are_not_told_of_a_thousand_frames_a_second(tmp_path, size, level):
    path = tmp_path / "video.mp4"
    writer = VideoWriter(path, size)
    for index in range(3):
        writer.write(np.zeros((size[1], size[0], 3), np.uint8), index * 100_000_000)
    writer.close()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        described = stream.codec_context.extradata  # avcC: version, profile, constraints, level
        assert described[3] <= level
        assert float(stream.duration * stream.time_base) == pytest.approx(0.2 + 1 / 30, abs=0.01)


@pytest.mark.parametrize(
    ("ending", "told"),
    [(".mp4", "of 20 frames are missing"), (".mkv", "s of 1.93 s: is it cut off?")],
)
def test_a_video_that_is_cut_off_says_so(tmp_path, ending, told):
    path = tmp_path / f"video{ending}"
    writer = VideoWriter(path, (160, 120))
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    for index in range(20):
        writer.write(np.roll(noise, 3 * index, axis=1), index * 100_000_000)
    writer.close()
    source = open_images(path)
    assert len(list(source.frames())) == 20
    assert not source.account.is_damaged and not source.account.warnings
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_images(path)
    assert 0 < len(list(source.frames())) < 20
    assert told in (source.account.damage.places + source.account.warnings)[-1]


@pytest.mark.parametrize("name", ["nothing", "empty", "text.mp4", "text.txt", "one.png"])
def test_what_is_no_source_of_images_is_refused(tmp_path, tiny_extractor, name):
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name != "nothing":
        path.write_text("hello")
    with pytest.raises(InputError, match=re.escape(str(path))):
        run(open_images(path), tiny_extractor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- topics ------------------------------------------------------------------------------------


def two_cameras(tmp_path, images):
    rows = []
    for index, image in enumerate(images[:2]):
        when = sample_bags.stamp(index)
        for side in ("left", "right"):
            rows.append((f"/{side}/image", when, sample_bags.image_message(image, when)))
            info = sample_bags.info_message(np.diag([9.0, 9, 1]), (160, 120), when)
            rows.append((f"/{side}/camera_info", when, info))
    return sample_bags.write_bag(tmp_path / "bag", rows)


def test_several_image_topics_are_listed(tmp_path, images):
    path = two_cameras(tmp_path, images)
    with pytest.raises(InputError, match=r"--topic: /left/image \(Image, 2\), /right/image"):
        BagSource(path)
    with pytest.raises(InputError, match=r"/up/image is not in the bag; .*/left/image"):
        BagSource(path, topic="/up/image")
    with pytest.raises(InputError, match="CameraInfo, not an image"):
        BagSource(path, topic="/left/camera_info")
    with pytest.raises(InputError, match="no CameraInfo topic /up"):
        BagSource(path, topic="/left/image", camera_info="/up")
    with pytest.raises(InputError, match="no pose topic /up"):
        BagSource(path, topic="/left/image", poses="/up")
    assert BagSource(path, topic="/right/image").camera_info == "/right/camera_info"


def test_a_bag_without_images_says_what_it_has(tmp_path):
    rows = [(POSE_TOPIC, 1, sample_bags.pose_message((0, 0, 0)))]
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with pytest.raises(InputError, match=f"no image topic, its topics are {POSE_TOPIC}"):
        BagSource(path)


def test_a_bag_of_unknown_encoding_is_refused(tmp_path, images, tiny_extractor):
    rows = sample_bags.camera_messages(images)
    for _, _, message in rows:
        message.encoding = "nv21"
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with pytest.raises(InputError, match=f"{IMAGE_TOPIC}: image encoding 'nv21'.*mono8"):
        run(BagSource(path), tiny_extractor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bag_without_a_single_good_frame_is_refused(tmp_path, images, tiny_extractor):
    rows = sample_bags.camera_messages(images)
    for _, _, message in rows:
        message.data = message.data[:50]
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with pytest.raises(InputError, match=r"not a single frame .*6 x image of 160x120 .* holds 50"):
        run(BagSource(path), tiny_extractor, tmp_path / "out")


# --- output ------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_when_asked(tmp_path, camera_bag, tiny_extractor):
    out = tmp_path / "out"
    run(BagSource(camera_bag, every=3), tiny_extractor, out)
    before = (out / "summary.json").read_text()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run(BagSource(camera_bag), tiny_extractor, out)
    assert (out / "summary.json").read_text() == before
    run(BagSource(camera_bag), tiny_extractor, out, overwrite=True)
    assert json.loads((out / "summary.json").read_text())["frames"] == COUNT
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_is_no_output_is_never_replaced(tmp_path, camera_bag, tiny_extractor):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("Years of work")
    with pytest.raises(OutputExistsError, match="not an earlier output"):
        run(BagSource(camera_bag), tiny_extractor, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "Years of work"


@pytest.mark.parametrize("inside", [".", "out", ".."])
def test_output_and_input_stay_apart(camera_bag, tiny_extractor, inside):
    before = hashlib.sha256(sample_bags.storage_file(camera_bag).read_bytes()).hexdigest()
    with pytest.raises((InputError, OutputExistsError)):
        run(BagSource(camera_bag), tiny_extractor, camera_bag / inside, overwrite=True)
    after = hashlib.sha256(sample_bags.storage_file(camera_bag).read_bytes()).hexdigest()
    assert after == before and len(list(camera_bag.iterdir())) == 2


def test_an_error_in_the_middle_leaves_nothing(tmp_path, camera_bag, tiny_extractor):
    class Failing(BagSource):
        def frames(self):
            for index, frame in enumerate(super().frames()):
                if index == 3:
                    raise RuntimeError("the disk is on fire")
                yield frame

    with pytest.raises(RuntimeError, match="on fire"):
        run(Failing(camera_bag), tiny_extractor, tmp_path / "out", video="v.mp4")
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_nothing_stands_there_and_the_next_run_works(
    tmp_path, camera_bag, tiny_weights, tiny_extractor
):
    program = f"""
import time
from pathlib import Path
from scfeat_ros.extractor import Extractor
from scfeat_ros.offline import OutputOptions, run
from scfeat_ros.sources import BagSource

class Slow(BagSource):
    def frames(self):
        for index, frame in enumerate(super().frames()):
            yield frame
            if index == 2:
                print("halfway", flush=True)
                time.sleep(600)

run(Slow(Path({str(camera_bag)!r})), Extractor.from_pretrained({str(tiny_weights)!r}, threads=1),
    Path({str(tmp_path / "out")!r}), options=OutputOptions(video="v.mp4"), progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "halfway\n"
        # printed on the reading thread, when the output has long been begun
        (partial,) = tmp_path.iterdir()
        assert (partial / "features" / "features.mcap").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    summary = run(BagSource(camera_bag), tiny_extractor, tmp_path / "out", video="v.mp4")
    assert summary["frames"] == COUNT
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
