"""Frames of bags: time ranges, calibration, stamps, on sound and damaged bags."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import sample_bags
from sample_bags import INFO_TOPIC, PERIOD, ROS2, storage_file
from test_bags import cut

from scfeat_ros.errors import InputError
from scfeat_ros.sources import Account, BagSource, FolderSource, Frame

COUNT = 12
K = np.diag([100.0, 100.0, 1.0])
OTHER_K = np.diag([300.0, 300.0, 1.0])


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (90, 120), np.uint8) for _ in range(COUNT)]


def indices(source):
    """Numbers of the frames that a source gives, by their stamps."""
    return [round((frame.stamp - sample_bags.stamp(0)) / PERIOD) for frame in source.frames()]


def split(folder, rows, files):
    """A bag of several files, without metadata.yaml; returns its folder."""
    split = folder / "split"
    split.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        bag = sample_bags.write_bag(folder / f"part{number}", [rows[i] for i in part])
        shutil.copy(storage_file(bag), split / f"split_{number}.mcap")
    return split


def test_a_range_of_a_split_bag_counts_from_its_damaged_first_file(tmp_path, pictures):
    folder = split(tmp_path, sample_bags.camera_messages(pictures), 3)
    cut(folder / "split_0.mcap", 0.75)
    every = indices(BagSource(folder))
    assert every[0] == 0 and every[-1] == COUNT - 1 and len(every) < COUNT
    assert indices(BagSource(folder, duration=100.0)) == every
    assert indices(BagSource(folder, start=0.55)) == [i for i in every if i >= 6]


def test_a_range_of_a_damaged_bag_counts_from_the_first_message_of_any_topic(tmp_path, pictures):
    rows = sample_bags.camera_messages(pictures)
    text = ROS2.types["std_msgs/msg/String"](data="hello")
    rows.insert(0, ("/said", rows[0][1] - 4 * PERIOD, text))
    path = storage_file(sample_bags.write_bag(tmp_path / "bag", rows))
    sound = indices(BagSource(path, start=0.85, duration=0.4))
    assert sound == [5, 6, 7, 8]
    cut(path, 0.95)
    assert indices(BagSource(path, start=0.85, duration=0.4)) == sound


@pytest.mark.parametrize("share", [1, 0.97], ids=["sound", "damaged"])
def test_the_last_calibration_before_a_range_holds_in_it(tmp_path, pictures, share):
    rows = sample_bags.camera_messages(pictures)
    first = rows[0][1]
    for seconds, matrix in ((0.0, OTHER_K), (0.3, K)):
        time = first + round(seconds * 1e9)
        rows.append((INFO_TOPIC, time, sample_bags.info_message(matrix, (120, 90), time)))
    rows.sort(key=lambda row: row[1])
    path = storage_file(sample_bags.write_bag(tmp_path / "bag", rows))
    if share < 1:
        cut(path, share)
    source = BagSource(path, start=0.65)
    frames = list(source.frames())
    assert len(frames) >= 4
    assert all(frame.camera.K[0, 0] == 100.0 for frame in frames)


def test_damage_is_counted_once_with_a_range_too(tmp_path, pictures):
    path = storage_file(
        sample_bags.write_bag(tmp_path / "bag", sample_bags.camera_messages(pictures, K))
    )
    cut(path, 0.6)
    lost = []
    for start in (0.0, 0.05):
        source = BagSource(path, start=start)
        assert list(source.frames())
        lost.append((source.account.damage.bytes_lost, source.account.damage.places))
    assert lost[0] == lost[1]


def test_a_calibration_of_long_ago_holds_in_a_range(tmp_path, pictures):
    """Sent once, when the camera started, and more than ten seconds before the range."""
    begin = sample_bags.START
    rows = [(INFO_TOPIC, begin, sample_bags.info_message(K, (120, 90), begin))]
    rows += [
        (topic, when + 20_000_000_000, message)
        for topic, when, message in sample_bags.camera_messages(pictures)
    ]
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows), start=20.5)
    frames = list(source.frames())
    assert 0 < len(frames) < COUNT
    assert all(frame.camera.K[0, 0] == 100.0 for frame in frames)


def test_a_calibration_that_cannot_be_ends_the_one_before(tmp_path, pictures):
    rows = []
    for index, row in enumerate(sample_bags.camera_messages(pictures)):
        if index in (0, 6, 9):
            D = (0.1,) * 7 if index == 6 else ()
            info = sample_bags.info_message(K, (120, 90), row[1], D=D)
            rows.append((INFO_TOPIC, row[1], info))
        rows.append(row)
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    known = [frame.camera is not None for frame in source.frames()]
    assert known == [True] * 6 + [False] * 3 + [True] * 3
    assert any("7 distortion coefficients" in text for text in source.account.warnings)


def test_images_wait_for_a_calibration(tmp_path, pictures):
    rows = sample_bags.camera_messages(pictures)
    time = rows[-1][1]
    rows.append((INFO_TOPIC, time, sample_bags.info_message(K, (120, 90), time)))
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    assert all(frame.camera is not None for frame in source.frames())
    assert not source.account.warnings
    source = BagSource(source.path, duration=0.5)
    assert all(frame.camera is None for frame in source.frames())
    assert source.account.warnings == [f"no usable message on {INFO_TOPIC}: bearings are NaN"]


def test_the_calibration_of_another_camera_is_not_taken(tmp_path, pictures):
    image = sample_bags.image_message(pictures[0], 1)
    info = sample_bags.info_message(K, (120, 90), 1)
    rows = [("/left/image", 1, image), ("/left/camera_info", 1, info)]
    alone = sample_bags.write_bag(tmp_path / "alone", [("/image", 1, image), rows[1]])
    assert BagSource(alone).camera_info == "/left/camera_info"
    both = sample_bags.write_bag(tmp_path / "both", [*rows, ("/right/image", 1, image)])
    assert BagSource(both, "/left/image").camera_info == "/left/camera_info"
    assert BagSource(both, "/right/image").camera_info is None


def test_unknown_encodings_once_in_a_while_do_not_end_the_run(tmp_path, pictures):
    rows = sample_bags.camera_messages(pictures)
    for row in rows[4:9]:
        row[2].encoding = "nv21"
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    assert indices(source) == [0, 1, 2, 3, 9, 10, 11]
    assert source.account.skipped.total() == 5


def test_the_expected_number_of_frames_is_told_where_it_is_known(tmp_path, pictures):
    bag = sample_bags.write_bag(tmp_path / "bag", sample_bags.camera_messages(pictures))
    assert [len(BagSource(bag, every=every)) for every in (1, 5, 12, 13)] == [12, 3, 1, 1]
    assert len(BagSource(bag, start=0.5)) == len(BagSource(bag, duration=0.5)) == 0


def test_reasons_that_differ_in_numbers_are_counted_together():
    account = Account()
    for reason in ("image of 5 bytes", "image of 7 bytes", "image without end"):
        account.skip(reason)
    assert account.skipped == {"image of 5 bytes": 2, "image without end": 1}
    assert account.is_damaged and not account.damage


def test_images_of_a_folder_are_stamped_by_the_rate(tmp_path, pictures):
    for index, name in enumerate(("1.png", "2.PNG", "10.png", ".hidden.png")):
        cv2.imwrite(str(tmp_path / name), pictures[index])
    (tmp_path / "3.png").mkdir()
    source = FolderSource(tmp_path, rate=3)
    found = [(frame.name, frame.stamp) for frame in source.frames()]
    assert found == [("1.png", 0), ("2.PNG", 333_333_333), ("10.png", 666_666_667)]
    assert len(source) == 3 and not source.account.is_damaged
    for rate in (0, -1, float("nan"), 1e9):
        with pytest.raises(InputError, match="--rate must lie"):
            FolderSource(tmp_path, rate)


def test_images_before_the_first_calibration_are_told(tmp_path, pictures):
    rows = sample_bags.camera_messages([pictures[i % COUNT] for i in range(40)])
    time = rows[30][1]
    rows.append((INFO_TOPIC, time, sample_bags.info_message(K, (120, 90), time)))
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    without = [frame.camera is None for frame in source.frames()].count(True)
    assert 0 < without < 40
    assert any(f"{without} images came before" in text for text in source.account.warnings)


@pytest.mark.parametrize(("sec", "nanosec"), [(2**31 - 1, 4_000_000_000)])
def test_a_stamp_that_ros_cannot_express_costs_its_frame(tmp_path, pictures, sec, nanosec):
    rows = sample_bags.camera_messages(pictures)
    rows[4][2].header.stamp = ROS2.types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    source = BagSource(sample_bags.write_bag(tmp_path / "bag", rows))
    assert indices(source) == [i for i in range(COUNT) if i != 4]
    assert source.account.skipped.total() == 1 and source.account.is_damaged


def test_names_that_are_no_utf_8_can_be_told(tmp_path, pictures):
    bag = storage_file(
        sample_bags.write_bag(tmp_path / "bag", sample_bags.camera_messages(pictures))
    )
    named = Path(str(tmp_path / "caf") + "\udce9.mcap")
    shutil.copy(bag, named)
    cut(named, 0.7)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "im\udce9.jpg").write_bytes(b"no picture")
    for source in (BagSource(named), FolderSource(folder)):
        assert all(isinstance(frame, Frame) for frame in source.frames())
        told = [*source.account.damage.places, *source.account.warnings, *source.account.skipped]
        assert "\ufffd" in "".join(told)
        "".join(told).encode()
