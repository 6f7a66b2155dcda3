"""A bag played to the node gives what the offline job writes for it."""

import subprocess
import sys

import numpy as np
import pytest
import sample_bags as bags
from waiting import PATIENCE

from scfeat_ros.messages import decode_features, decode_matches, stamp_to_nanoseconds

COUNT = 10
OPTIONS = {"max_keypoints": 150, "threads": 1}
TOPICS = {"features": decode_features, "matches": decode_matches}


def by_stamp(messages, decode):
    return {stamp_to_nanoseconds(message.header.stamp): decode(message) for message in messages}


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A bag of colour images with a calibration."""
    K = np.array([[150.0, 0, 80], [0, 150, 60], [0, 0, 1]])
    messages = []
    for i, grey in enumerate(bags.sequence(COUNT)):
        image = np.stack([grey, grey[::-1], 255 - grey], axis=2)
        time = bags.stamp(i)
        info = bags.info_message(K, (160, 120), time, (-0.1, 0.02, 0.0, 0.0, 0.0))
        messages.append((bags.INFO_TOPIC, time, info))
        messages.append((bags.IMAGE_TOPIC, time + 1000, bags.image_message(image, time)))
    return bags.write_bag(tmp_path_factory.mktemp("bag") / "drive", messages)


@pytest.fixture(scope="module")
def offline(bag, weights, tmp_path_factory):
    """What `scfeat bag` writes: for each topic the decoded points by stamp."""
    from rosbags.highlevel import AnyReader

    output = tmp_path_factory.mktemp("offline") / "result"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = "import sys; from scfeat_ros.cli import main; sys.exit(main())"
    subprocess.run(
        [
            *(sys.executable, "-c", command, "bag", bag, "-o", output, "--quiet"),
            *("--weights", weights, "--device", "cpu"),
            *options,
        ],
        check=True,
    )
    with AnyReader([output / "features"]) as reader:
        found = {name: [] for name in TOPICS}
        for connection, _, data in reader.messages():
            name = connection.topic.removeprefix("/extractor/")
            if name in found:
                found[name].append(reader.deserialize(data, connection.msgtype))
    return {name: by_stamp(found[name], decode) for name, decode in TOPICS.items()}


def play(rig, bag, rate, delay):
    subprocess.run(
        ["ros2", "bag", "play", bag, "--rate", str(rate), "--delay", str(delay)],
        env=rig.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=4 * PATIENCE,
        check=True,
    )


def test_a_played_bag_gives_the_same_as_the_offline_job(rig, bag, offline, node_parameters):
    from sensor_msgs.msg import PointCloud2

    known = subprocess.run(["ros2", "bag", "play", "--help"], env=rig.environment, text=True)
    if known.returncode:
        pytest.skip("needs `ros2 bag play` (ros-DISTRO-ros2bag, rosbag2-storage-mcap)")
    rig.start_node(
        **{**node_parameters, **OPTIONS},
        remap=[f"image_raw:={bags.IMAGE_TOPIC}", f"camera_info:={bags.INFO_TOPIC}"],
    )
    for name in TOPICS:
        rig.listen(f"/extractor/{name}", PointCloud2)
    # slower and slower, until nothing is dropped: this machine may be busy
    for rate, delay in ((0.3, 3), (0.1, 6), (0.05, 10)):
        for name in TOPICS:
            rig.messages[f"/extractor/{name}"].clear()
        play(rig, bag, rate, delay)
        rig.settle()
        if all(len(rig.messages[f"/extractor/{name}"]) == COUNT for name in TOPICS):
            break
    live = {
        name: by_stamp(rig.messages[f"/extractor/{name}"], decode)
        for name, decode in TOPICS.items()
    }
    assert list(live["features"]) == list(offline["features"])
    assert list(live["matches"]) == list(offline["matches"])
    assert len(live["features"]) == COUNT
    for stamp, points in live["features"].items():
        expected = offline["features"][stamp]
        assert len(points) > 20
        for field in ("x", "y", "z", "u", "v", "score", "descriptor"):
            np.testing.assert_array_equal(points[field], expected[field], err_msg=field)
    for stamp, points in live["matches"].items():
        expected = offline["matches"][stamp]
        for field in set(points.dtype.names) - {"track_id"}:  # ids count from the node's start
            np.testing.assert_array_equal(points[field], expected[field], err_msg=field)
    assert sum(len(points) for points in live["matches"].values()) > 20 * (COUNT - 1)
