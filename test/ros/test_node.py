"""The node's outputs, inputs, parameters and states, on a real ROS 2."""

import numpy as np
import pytest
from camera import intrinsics, picture
from waiting import wait_for

from scfeat_ros.camera import Camera
from scfeat_ros.messages import decode_features, decode_image, decode_matches, stamp_to_nanoseconds

FEATURES, MATCHES, OVERLAY = (f"/extractor/{name}" for name in ("features", "matches", "overlay"))


def send_and_take(rig, count=4, start=1000, kind="rgb8", topics=(FEATURES,), **command):
    """Send pictures one by one; returns for each topic the messages of them."""
    seen = {topic: len(rig.messages[topic]) for topic in topics}
    for i in range(count):
        rig.camera(send=kind, rate=0, start=start + i / 10, index=i, **command)
        for topic in topics:
            rig.received(topic, seen[topic] + i + 1)
    return [rig.messages[topic][seen[topic] :] for topic in topics]


def direct(weights, rgb_images, start=1000, camera=None, **matching):
    """Results of the front end on pictures, without ROS, with the node's options."""
    from conftest import NODE

    from scfeat_ros.extractor import Extractor
    from scfeat_ros.frontend import FrontEnd
    from scfeat_ros.parameters import MatcherOptions

    extractor = Extractor.from_pretrained(
        weights, "cpu", threads=1, max_keypoints=NODE["max_keypoints"]
    )
    front_end = FrontEnd(extractor, MatcherOptions(**matching))
    return [
        front_end.process(image, round((start + i / 10) * 1e9), "camera_optical", camera=camera)
        for i, image in enumerate(rgb_images)
    ]


@pytest.fixture
def listening(running):
    from sensor_msgs.msg import PointCloud2

    for topic in (FEATURES, MATCHES):
        if topic not in running.subscriptions:
            running.listen(topic, PointCloud2)
    # the node notices its new listeners before the test goes on
    wait_for(
        lambda: (
            running.camera(send="rgb8", rate=0) is None
            and running.messages[FEATURES]
            and running.messages[MATCHES]
        ),
        "features and matches arrive",
    )
    running.settle()
    return running


def test_features_and_matches_are_those_of_the_front_end(listening, weights):
    features, matches = send_and_take(listening, topics=(FEATURES, MATCHES))
    results = direct(weights, [picture(i, 160, 120) for i in range(4)])
    for i, (message, result) in enumerate(zip(features, results, strict=True)):
        assert stamp_to_nanoseconds(message.header.stamp) == result.stamp
        assert message.header.frame_id == "camera_optical"
        points = decode_features(message)
        np.testing.assert_array_equal(points["u"], result.features.keypoints[:, 0])
        np.testing.assert_array_equal(points["v"], result.features.keypoints[:, 1])
        np.testing.assert_array_equal(points["score"], result.features.scores)
        np.testing.assert_array_equal(points["descriptor"], result.features.descriptors)
        found = decode_matches(matches[i])
        np.testing.assert_array_equal(found["index"], result.matches.indices[:, 1])
        np.testing.assert_array_equal(found["prev_index"], result.matches.indices[:, 0])
        np.testing.assert_array_equal(found["prev_u"], result.previous_keypoints[:, 0])
        if i:
            assert len(found) > 20
            before = decode_features(features[i - 1])
            np.testing.assert_array_equal(
                points["track_id"][found["index"]], before["track_id"][found["prev_index"]]
            )
            stamp = features[i - 1].header.stamp
            assert set(found["prev_sec"]) == {stamp.sec}
            assert set(found["prev_nanosec"]) == {stamp.nanosec}


def test_bearings_are_those_of_the_camera_info(listening):
    from camera import DISTORTION

    [[message]] = send_and_take(listening, count=1)
    points = decode_features(message)
    camera = Camera(np.array(intrinsics(160, 120)), DISTORTION)
    bearings = np.stack([points["x"], points["y"], points["z"]], axis=1)
    pixels = np.stack([points["u"], points["v"]], axis=1)
    assert (points["z"] == 1).all()
    np.testing.assert_allclose(camera.project(bearings[:, :2]), pixels, atol=1e-2)
    # far from the centre the distortion counts, so it cannot have been left out
    plain = (pixels - [80, 60]) / 150
    assert np.abs(plain - bearings[:, :2]).max() > 1e-3


def test_the_epipolar_check_undistorts(listening, weights):
    from camera import DISTORTION

    camera = Camera(np.array(intrinsics(160, 120)), DISTORTION)
    assert listening.set_parameter("epipolar_threshold", 0.2) == (True, "")
    try:
        _, matches = send_and_take(listening, topics=(FEATURES, MATCHES))
    finally:
        listening.set_parameter("epipolar_threshold", 0.0)
    pictures = [picture(i, 160, 120) for i in range(4)]
    with_lens, without = (
        [result.matches.indices[:, 1].tolist() for result in results]
        for results in (
            direct(weights, pictures, camera=lens, epipolar_threshold=0.2)
            for lens in (camera, None)
        )
    )
    assert [decode_matches(message)["index"].tolist() for message in matches] == with_lens
    assert with_lens != without and min(map(len, with_lens[1:])) > 8


@pytest.mark.parametrize(
    "kind",
    [
        *("bgr8", "8UC3", "bgra8", "mono8", "8UC1", "mono16", "16UC3", "bayer_rggb8", "yuv422"),
        *("padded", "short_tail", "big_endian"),
    ],
)
def test_every_encoding_gives_the_picture(listening, weights, kind):
    """Colour channels in the right order, greys at the right scale, rows without padding."""
    import cv2

    rgb = picture(0, 160, 120)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    expected = {
        "mono8": lambda: grey,
        "8UC1": lambda: grey,
        "mono16": lambda: grey,
        "big_endian": lambda: grey,
        "bayer_rggb8": lambda: _demosaiced(rgb),
        "yuv422": lambda: _from_yuv(grey),
    }.get(kind, lambda: rgb)()
    [[message]] = send_and_take(listening, count=1, kind=kind, camera_info=False)
    [result] = direct(weights, [expected])
    points = decode_features(message)
    np.testing.assert_array_equal(points["u"], result.features.keypoints[:, 0])
    np.testing.assert_array_equal(points["score"], result.features.scores)


def _demosaiced(rgb):
    import cv2
    from camera import _bayer

    return cv2.cvtColor(_bayer(rgb), cv2.COLOR_BayerBG2RGB)


def _from_yuv(grey):
    import cv2
    from camera import _yuv422

    return cv2.cvtColor(_yuv422(grey), cv2.COLOR_YUV2RGB_UYVY)


def test_floats_without_a_range_are_stretched(listening, weights):
    import cv2

    grey = cv2.cvtColor(picture(0, 160, 120), cv2.COLOR_RGB2GRAY).astype(np.float64)
    stretched = ((grey - grey.min()) * 255 / (grey.max() - grey.min())).round().astype(np.uint8)
    [[message]] = send_and_take(listening, count=1, kind="32FC1", camera_info=False)
    [result] = direct(weights, [stretched])
    found = {(float(u), float(v)) for u, v in decode_features(message)[["u", "v"]]}
    expected = {(float(u), float(v)) for u, v in result.features.keypoints}
    # a rounding of float32 may fall the other way here and there
    assert len(found & expected) > 0.8 * len(expected)


def test_the_overlay_is_drawn_only_while_somebody_looks(listening):
    from sensor_msgs.msg import Image

    send_and_take(listening, count=2)
    listening.settle()
    assert listening.statuses()[-1][2]["outputs"] == "features matches"
    listening.listen(OVERLAY, Image)
    [overlays] = send_and_take(listening, count=3, start=1100, topics=(OVERLAY,))
    drawn = decode_image(overlays[-1])
    assert drawn.shape == (120, 160, 3)
    assert overlays[-1].header.frame_id == "camera_optical"
    changed = (drawn != picture(2, 160, 120)).any(axis=2).mean()
    assert 0.01 < changed < 0.9  # the picture is there, and something is drawn on it
    listening.settle()
    assert listening.statuses()[-1][2]["outputs"] == "features matches overlay"
    listening.set_parameter("overlay", False)
    seen = len(listening.messages[OVERLAY])
    send_and_take(listening, count=2, start=1200)
    listening.settle()
    assert listening.statuses()[-1][2]["outputs"] == "features matches"
    assert len(listening.messages[OVERLAY]) == seen
    listening.set_parameter("overlay", True)
    listening.unsubscribe(OVERLAY)


def test_diagnostics_tell_rates_latencies_and_what_runs(listening):
    send_and_take(listening, count=5)
    values = listening.settle()
    for stage in ("wait", "decode", "extract", "match", "track", "publish", "total", "overhead"):
        median, p95 = float(values[f"{stage} median (ms)"]), float(values[f"{stage} p95 (ms)"])
        assert 0 <= median <= p95
    assert float(values["overhead median (ms)"]) < float(values["total median (ms)"])
    assert values["device"] == "cpu" and values["threads"] == "1"
    assert values["state"] == "active"
    assert values["image_topic"] == "/image_raw"
    assert values["camera"] == "plumb_bob 160x120"
    assert values["image size"] == "160x120"
    assert int(values["keypoints"]) > 0 and int(values["matches"]) > 0
    assert float(values["rate in (Hz)"]) > 0 and float(values["rate out (Hz)"]) > 0
    from diagnostic_msgs.msg import DiagnosticArray

    listening.subscribe("/diagnostics", DiagnosticArray)
    [status] = listening.received("/diagnostics")[0].status
    listening.unsubscribe("/diagnostics")
    assert status.name == "extractor: features"
    assert status.hardware_id == "/image_raw"


# ------------------------------------------------------------------ parameters


def test_every_parameter_is_described_with_its_range(listening):
    from scfeat_ros.node_parameters import parameter_fields

    fields = parameter_fields()
    for descriptor in listening.describe_parameters(list(fields)):
        f = fields[descriptor.name]
        assert descriptor.description == f.metadata["help"]
        if type(f.default) is int:
            [limits] = descriptor.integer_range
        elif type(f.default) is float:
            [limits] = descriptor.floating_point_range
        else:
            continue
        assert (limits.from_value, limits.to_value) == (
            f.metadata["minimum"],
            f.metadata["maximum"],
        )
    [source] = listening.describe_parameters(["descriptor_source"])
    assert "one of bridge, backbone" in source.additional_constraints


def test_live_parameters_act_on_the_next_image(listening):
    [[before]] = send_and_take(listening, count=1)
    assert before.width > 50
    assert listening.set_parameter("max_keypoints", 50) == (True, "")
    assert listening.set_parameter("descriptor_type", "int8") == (True, "")
    [[after]] = send_and_take(listening, count=1, start=1010)
    assert after.width == 50
    points, full = decode_features(after), decode_features(before)[:50]
    np.testing.assert_array_equal(points["u"], full["u"])
    np.testing.assert_array_equal(points["descriptor"], np.rint(full["descriptor"] * 127))
    assert listening.set_parameter("levels", 3) == (True, "")
    [[pyramid]] = send_and_take(listening, count=1, start=1015)
    assert pyramid.width == 50 and (decode_features(pyramid)["u"] != points["u"]).any()
    # nothing is this similar
    assert listening.set_parameter("min_similarity", 1.0) == (True, "")
    seen = len(listening.messages[MATCHES])
    send_and_take(listening, count=2, start=1020)
    assert listening.received(MATCHES, seen + 2)[-1].width < 10
    for name, value in {
        "max_keypoints": 200,
        "descriptor_type": "float32",
        "min_similarity": -1.0,
        "levels": 1,
    }.items():
        assert listening.set_parameter(name, value) == (True, "")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_keypoints", 0, "out of range"),
        ("ratio", 1.5, "out of range"),
        ("min_similarity", float("nan"), "out of range"),
        ("descriptor_type", "float64", "one of float32, int8"),
        ("weights", "another", "deactivate and clean up first"),
        ("threads", 2, "deactivate and clean up first"),
        ("max_keypoints", "many", "type"),
        ("autostart", False, "read-only"),
    ],
)
def test_a_wrong_or_late_parameter_is_refused_with_the_reason(listening, name, value, told):
    successful, reason = listening.set_parameter(name, value)
    assert not successful
    assert told in reason


def test_values_that_stay_are_no_change(listening, node_parameters):
    """As of a file that `ros2 param dump` has made."""
    for name in ("weights", "threads", "warm_up_width"):
        value = node_parameters[name]
        value = value if isinstance(value, int) else str(value)
        assert listening.set_parameter(name, value) == (True, "")
    assert listening.set_parameter("compile", "auto") == (True, "")
    assert listening.set_parameter("tracks", False) == (True, "")  # how YAML reads `off`
    assert listening.set_parameter("tracks", "off") == (True, "")


def test_a_switch_that_yaml_reads_as_a_boolean_can_be_set_again(unconfigured):
    """`compile: off` in a file is False, and comes back from the node as False."""
    assert unconfigured.set_parameter("compile", False) == (True, "")
    try:
        assert unconfigured.transition("configure")
        assert unconfigured.set_parameter("compile", False) == (True, "")
        assert unconfigured.set_parameter("compile", "off") == (True, "")
        assert not unconfigured.set_parameter("compile", True)[0]
    finally:
        assert unconfigured.transition("cleanup")
        assert unconfigured.set_parameter("compile", "auto") == (True, "")


# ------------------------------------------------------------------ quality of service


def test_the_subscription_follows_the_publishers(listening):
    assert listening.statuses()[-1][2]["image_qos"].startswith("reliable")
    listening.camera(qos="best_effort")
    listening.connect()
    wait_for(
        lambda: listening.statuses()[-1][2]["image_qos"].startswith("best_effort"),
        "the subscription turns best effort",
    )
    send_and_take(listening, count=1)
    listening.camera(qos="reliable")
    listening.connect()
    wait_for(
        lambda: listening.statuses()[-1][2]["image_qos"].startswith("reliable"),
        "the subscription turns reliable",
    )
    send_and_take(listening, count=1)


@pytest.mark.parametrize(
    ("name", "topic", "remedy"),
    [
        ("image_reliability", "/image_raw", "leave image_reliability at auto, or"),
        ("qos_overrides./image_raw.subscription", "/image_raw", "take qos_overrides./image_raw."),
        ("qos_overrides./camera_info.subscription", "/camera_info", "take qos_overrides./camera_"),
    ],
)
def test_an_incompatible_publisher_is_told_with_the_remedy(
    rig, node_parameters, name, topic, remedy
):
    name += ".reliability" if name.startswith("qos") else ""
    rig.start_node(**node_parameters, **{name: "reliable"})
    rig.camera(qos="best_effort")
    rig.camera(send="rgb8", count=3)
    status = rig.wait_for_status("ERROR", topic, "RELIABILITY", "nothing comes from it")
    assert remedy in status[1]
    assert "nothing comes from it" in rig.log
    # a publisher that offers enough clears it
    rig.camera(qos="reliable")
    rig.connect()
    rig.wait_for_status("OK", "ok", since=len(rig.statuses()))


# ------------------------------------------------------------------ lifecycle


def test_states_do_what_they_say(unconfigured):
    from sensor_msgs.msg import PointCloud2

    rig = unconfigured
    assert "autostart is off" in rig.log and "and then '... activate'" in rig.log
    assert rig.state() == "unconfigured"
    assert rig.transition("configure")
    assert rig.state() == "inactive"
    rig.listen(FEATURES, PointCloud2)
    rig.camera(send="rgb8", count=3, rate=20)
    assert not rig.messages[FEATURES]
    assert rig.observer.count_subscribers("/image_raw") == 0
    assert rig.transition("activate")
    rig.connect()
    rig.received(FEATURES)
    assert "no camera_info on /camera_info" not in rig.statuses()[-1][2]["camera"]
    # a frame in work when the node is deactivated is served with its calibration
    rig.camera(send="rgb8", count=1, rate=0, size=(800, 600))
    assert rig.transition("deactivate")
    last = decode_features(rig.messages[FEATURES][-1])
    assert np.isfinite(last["x"]).mean() > 0.5  # the lens does not reach the corners
    seen = len(rig.messages[FEATURES])
    rig.camera(send="rgb8", count=3, rate=20)
    wait_for(lambda: rig.statuses()[-1][1] == "inactive", "diagnostics tell the state")
    assert len(rig.messages[FEATURES]) == seen
    assert rig.transition("activate")  # the network is still there
    rig.connect()
    assert len(rig.received(FEATURES, seen + 1)) > seen
    assert rig.transition("deactivate")
    assert rig.transition("cleanup")
    assert rig.state() == "unconfigured"
    assert rig.observer.count_publishers(FEATURES) == 0
    rig.unsubscribe(FEATURES)


def test_a_transition_that_a_state_does_not_have_is_refused(unconfigured):
    """And answered: a lifecycle manager that asks for it would wait for ever."""
    assert not unconfigured.transition("activate")
    assert unconfigured.state() == "unconfigured"
    assert "no transition" in unconfigured.log and "'unconfigured'" in unconfigured.log
    assert unconfigured.transition("configure")
    assert not unconfigured.transition("configure")
    assert unconfigured.state() == "inactive"


def test_without_camera_info_diagnostics_say_so(rig, node_parameters):
    rig.start_node(**node_parameters, compile=False)  # how YAML reads `compile: off`
    rig.connect(camera_info=False)
    values = rig.settle()
    assert values["camera"] == "no camera_info on /camera_info yet: no bearings"
    assert values["network"].endswith(", plain")


def test_rectified_images_have_the_bearings_of_p(rig, node_parameters):
    from sensor_msgs.msg import PointCloud2

    rig.start_node(**node_parameters, rectified=True)
    rig.connect()
    rig.listen(FEATURES, PointCloud2)
    rig.connect()
    points = decode_features(rig.received(FEATURES)[-1])
    pixels = np.stack([points["u"], points["v"]], axis=1)
    bearings = np.stack([points["x"], points["y"]], axis=1)
    np.testing.assert_allclose(bearings, (pixels - [80, 60]) / 150, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "value", "told", "right"),
    [
        ("depth", "ten", "must be a whole number from 1 on, got 'ten'", 10),
        ("depth", -1, "must be a whole number from 1 on, got -1", 10),
        ("history", "unknown", "one of system_default", "keep_last"),
        ("reliability", 1, "one of system_default", "best_effort"),
    ],
)
def test_an_override_that_cannot_be_is_told_and_mended(
    rig, node_parameters, policy, value, told, right
):
    name = f"qos_overrides./image_raw.subscription.{policy}"
    rig.start_node(ready=False, **node_parameters, **{name: value})
    rig.wait_for_status("ERROR", f"cannot activate: {name}", told)
    assert rig.state() == "inactive" and "Traceback" not in rig.log
    assert rig.set_parameter(name, right) == (True, "")
    assert rig.transition("activate")
    assert str(right) in rig.wait_for_status("OK", "ok")[2]["image_qos"]
    successful, reason = rig.set_parameter(name, value)
    assert not successful and "deactivate it first" in reason
    assert rig.set_parameter(name, right) == (True, "")


def test_an_override_of_an_output_that_cannot_be_is_told(rig, node_parameters):
    name = "qos_overrides./extractor/features.publisher.reliability"
    rig.start_node(ready=False, **node_parameters, **{name: "perfect"})
    rig.wait_for_status("ERROR", "cannot configure", "'~/features'", "perfect", "restart the node")
    assert rig.state() == "unconfigured" and "Traceback" not in rig.log


def test_names_of_parameters_that_there_are_not_are_told(rig, node_parameters):
    wrong = {
        "max_keypoint": "max_keypoints",
        "qos_overrides./image.subscription.depth": "qos_overrides./image_raw.subscription.depth",
    }
    right = {
        "use_sim_time": False,
        "qos_overrides./image_raw.subscription.depth": 2,
        "qos_overrides./extractor/features.publisher.depth": 2,
    }
    rig.start_node(**node_parameters, **dict.fromkeys(wrong, 2), **right)
    for name, meant in wrong.items():
        assert f"no parameter '{name}': its value has no effect (was '{meant}' meant?)" in rig.log
    assert rig.log.count("there is no parameter") == len(wrong)


def test_way_of_sampling_descriptors(unconfigured):
    from sensor_msgs.msg import PointCloud2

    rig = unconfigured
    found = []
    for sampling, other in (("bilinear", "pooled"), ("pooled", "bilinear")):
        assert rig.set_parameter("descriptor_sampling", sampling) == (True, "")
        assert rig.transition("configure") and rig.transition("activate")
        rig.listen(FEATURES, PointCloud2)
        rig.connect()
        points = decode_features(rig.received(FEATURES)[-1])
        found.append(points)
        np.testing.assert_allclose(np.linalg.norm(points["descriptor"], axis=1), 1, atol=1e-4)
        successful, reason = rig.set_parameter("descriptor_sampling", other)
        assert not successful and "cannot change while it runs" in reason
        rig.unsubscribe(FEATURES)
        assert rig.transition("deactivate") and rig.transition("cleanup")
    for field in ("x", "y"):
        np.testing.assert_array_equal(found[0][field], found[1][field])
    assert np.abs(found[0]["descriptor"] - found[1]["descriptor"]).max() > 1e-2


def test_shorter_descriptors(unconfigured):
    from sensor_msgs.msg import PointCloud2

    rig = unconfigured
    assert rig.set_parameter("descriptor_dim", 9) == (True, "")
    assert rig.transition("configure") and rig.transition("activate")
    rig.listen(FEATURES, PointCloud2)
    rig.connect()
    points = decode_features(rig.received(FEATURES)[-1])
    assert points["descriptor"].shape[1] == 9
    np.testing.assert_allclose(np.linalg.norm(points["descriptor"], axis=1), 1, atol=1e-4)
    rig.unsubscribe(FEATURES)
    assert rig.transition("deactivate") and rig.transition("cleanup")
    seen = len(rig.statuses())
    assert rig.set_parameter("descriptor_dim", 500) == (True, "")
    assert not rig.transition("configure")
    rig.wait_for_status("ERROR", "descriptor_dim 500: this network's descriptors have", since=seen)
    assert "Traceback" not in rig.log
    assert rig.set_parameter("descriptor_dim", 0) == (True, "")


def test_cleanup_frees_the_network(unconfigured, tmp_path):
    import torch

    from scfeat_ros.model.scfeat import CONFIGS, SCFeat, save_model

    def resident():
        pages = open(f"/proc/{rig.node_process.pid}/statm").read().split()[1]
        return int(pages) * 4096

    rig = unconfigured
    torch.manual_seed(0)
    model = SCFeat(CONFIGS["scfeat"])
    size = sum(p.numel() * 4 for p in model.parameters())
    path = tmp_path / "large.safetensors"
    save_model(model, path, {})
    assert rig.transition("configure") and rig.transition("cleanup")  # PyTorch is loaded now
    assert rig.set_parameter("weights", str(path)) == (True, "")
    assert rig.transition("configure")
    loaded = resident()
    assert rig.transition("cleanup")
    assert loaded - resident() > 0.6 * size


# ------------------------------------------------------------------ other inputs and outputs


def test_the_compressed_transport(rig, node_parameters, weights):
    from sensor_msgs.msg import PointCloud2

    rig.start_node(
        **node_parameters, image_transport="compressed", remap=["image_raw:=/front/image"]
    )
    wait_for(lambda: rig.observer.count_subscribers("/front/image/compressed"), "a subscription")
    rig.stop_node()
    rig.log_path.write_text("")
    rig.start_node(**node_parameters, image_transport="compressed")
    rig.connect(kind="png")
    rig.listen(FEATURES, PointCloud2)
    rig.connect(kind="png")
    [messages] = send_and_take(rig, count=2, kind="png")
    results = direct(weights, [picture(i, 160, 120) for i in range(2)])
    for message, result in zip(messages, results, strict=True):
        np.testing.assert_array_equal(
            decode_features(message)["u"], result.features.keypoints[:, 0]
        )
    seen = len(rig.statuses())
    rig.camera(send="cut_jpeg")
    rig.wait_for_status("ERROR", "'rgb8; jpg compressed bgr8' image is cut off", since=seen)
    send_and_take(rig, count=1, kind="png", start=1100)


def test_a_compressed_topic_of_any_name_can_be_remapped(rig, node_parameters):
    parameters = {**node_parameters, "image_transport": "compressed", "silence_timeout": 0.5}
    topic = "/front/image_raw/compressed"
    rig.start_node(**parameters, remap=[f"image_raw/compressed:={topic}"])
    assert f"active: images from {topic}" in rig.log
    rig.connect(kind="png", namespace="/front/")
    rig.wait_for_status("WARN", f"no image on {topic}: its 1 publisher(s)")


def test_a_topic_of_the_other_transport_is_told(rig, node_parameters):
    rig.start_node(**node_parameters, remap=["image_raw:=/image_raw/compressed"])
    rig.camera(send="jpeg", count=3)
    status = rig.wait_for_status("ERROR", "sensor_msgs/msg/CompressedImage")
    assert "set image_transport" in status[1]


@pytest.mark.parametrize(
    ("transport", "topic", "kind", "told"),
    [
        ("raw", "/image_raw", "png", "set image_transport to compressed"),
        ("compressed", "/image_raw", "rgb8", "set image_transport to raw"),
        ("compressed", "/image_raw/compressed", "png", "image_raw to the base topic /image_raw,"),
        ("raw", "/elsewhere", "png", "remap image_raw to the camera's topic"),
    ],
)
def test_images_that_come_beside_the_topic_are_told(
    rig, node_parameters, transport, topic, kind, told
):
    parameters = {**node_parameters, "image_transport": transport, "silence_timeout": 0.5}
    rig.camera(send=kind)
    rig.start_node(**parameters, remap=[f"image_raw:={topic}"])
    rig.wait_for_status("WARN", f"no image on {topic}", "nobody publishes there", told)
    assert told in rig.log


@pytest.mark.parametrize("consumer", ["vins_mono", "vins_fusion"])
def test_tracks_for_vins(rig, node_parameters, consumer):
    from sensor_msgs.msg import PointCloud, PointCloud2

    rig.start_node(**node_parameters, tracks=consumer, tracks_max=40, tracks_min_distance=8.0)
    rig.connect()
    rig.listen("/extractor/tracks", PointCloud)
    rig.listen(FEATURES, PointCloud2)
    rig.connect()
    wait_for(lambda: rig.messages["/extractor/tracks"], "tracks")
    features, tracks = send_and_take(rig, count=4, topics=(FEATURES, "/extractor/tracks"))
    names = [channel.name for channel in tracks[-1].channels]
    if consumer == "vins_mono":
        assert names == ["id", "u", "v", "velocity_x", "velocity_y"]
    else:
        # the back end reads channels 6 to 8 whenever it reads any
        assert names == ["id", "camera", "u", "v", "velocity_x", "velocity_y", "gx", "gy", "gz"]
        assert set(tracks[-1].channels[1].values) == {0.0}
    values = {c.name: np.array(c.values) for c in tracks[-1].channels}
    points = {int(p["track_id"]): p for p in decode_features(features[-1])}
    before = {int(p["track_id"]): p for p in decode_features(features[-2])}
    assert 10 < len(tracks[-1].points) <= 40
    old = 0
    for i, point in enumerate(tracks[-1].points):
        feature = points[int(values["id"][i])]
        assert (point.x, point.y, point.z) == (feature["x"], feature["y"], 1.0)
        assert (values["u"][i], values["v"][i]) == (feature["u"], feature["v"])
        velocity = values["velocity_x"][i], values["velocity_y"][i]
        if int(values["id"][i]) in before:
            old += 1
            previous = before[int(values["id"][i])]
            np.testing.assert_allclose(
                velocity,
                ((feature["x"] - previous["x"]) / 0.1, (feature["y"] - previous["y"]) / 0.1),
                atol=1e-3,
            )
        else:
            assert velocity == (0.0, 0.0)
    assert old > 10
    cells = np.floor(np.stack([values["u"], values["v"]], 1) / 8).astype(int)
    assert len(np.unique(cells, axis=0)) == len(cells)


def test_tracks_without_a_calibration_say_what_is_missing(rig, node_parameters):
    from sensor_msgs.msg import PointCloud

    rig.start_node(**node_parameters, tracks="vins_mono")
    rig.listen("/extractor/tracks", PointCloud)
    rig.connect(camera_info=False)
    rig.wait_for_status("WARN", "needs a calibrated camera")
    # nobody misses them any more
    rig.unsubscribe("/extractor/tracks")
    rig.connect(camera_info=False)
    rig.wait_for_status("OK", "ok", since=len(rig.statuses()))


def test_an_rgbd_image_for_rtabmap(rig, node_parameters):
    import zlib

    messages = pytest.importorskip(
        "rtabmap_msgs.msg", reason="rtabmap_msgs is not installed (ros-DISTRO-rtabmap-msgs)"
    )
    from sensor_msgs.msg import PointCloud2

    topic = "/extractor/rgbd_image"
    rig.start_node(**node_parameters, rgbd=True)
    rig.listen(topic, messages.RGBDImage)
    rig.listen(FEATURES, PointCloud2)
    rig.connect(depth=True)
    wait_for(
        lambda: rig.camera(send="rgb8", count=2, depth=True) is None and rig.messages[topic],
        "an RGBD image",
    )
    [features], [image] = send_and_take(rig, count=1, topics=(FEATURES, topic), depth=True)
    points = decode_features(features)
    assert image.header == features.header
    assert (image.rgb.width, image.depth.encoding) == (160, "16UC1")
    assert image.rgb_camera_info.k[0] == 150.0
    assert [p.pt.x for p in image.key_points] == points["u"].tolist()
    # rtabmap::uncompressData reads three int32 at the end and zlib's stream before them
    packed = bytes(image.descriptors)
    rows, columns, kind = np.frombuffer(packed[-12:], np.int32)
    assert kind == 5  # CV_32FC1
    stream = zlib.decompressobj()
    matrix = np.frombuffer(stream.decompress(packed), np.float32).reshape(rows, columns)
    assert stream.unused_data == packed[-12:]
    np.testing.assert_array_equal(matrix, points["descriptor"])
    rig.camera(send="rgb8", start=7000)
    rig.wait_for_status("WARN", "no depth image in time")
    rig.unsubscribe(topic)
    rig.connect()
    rig.wait_for_status("OK", "ok", since=len(rig.statuses()))
