"""Features, matches and overlay to ROS messages and back."""

from __future__ import annotations

import array
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader
from sample_bags import ROS2, image_message, storage_file

from scfeat_ros import messages
from scfeat_ros.feature_bag import FeatureBagWriter
from scfeat_ros.features import Features, FrameResult, Matches

TYPES = messages.rosbags_types(ROS2)
CLOUD = "sensor_msgs/msg/PointCloud2"
FLOAT32, INT8, UINT32, INT32 = 7, 1, 6, 5


def make_result(keypoints=5, matches=3, dim=8, seed=0, previous_stamp=1_699_999_999_900_000_001):
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(keypoints, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return FrameResult(
        stamp=1_700_000_000_000_000_007,
        frame_id="camera_optical",
        features=Features(
            rng.uniform(0, 640, (keypoints, 2)).astype(np.float32),
            np.sort(rng.random(keypoints).astype(np.float32))[::-1],
            descriptors,
            (640, 480),
        ),
        track_ids=rng.integers(1, 2**32, keypoints, np.uint32),
        track_lengths=np.ones(keypoints, np.int32),
        matches=Matches(
            np.stack([rng.permutation(9)[:matches], rng.permutation(keypoints)[:matches]], 1),
            rng.random(matches).astype(np.float32),
        ),
        previous_stamp=previous_stamp,
        previous_keypoints=rng.uniform(0, 640, (matches, 2)).astype(np.float32),
        reset=None,
    )


def over_the_wire(message):
    """Serialized as ROS does it and read again."""
    return ROS2.deserialize_cdr(
        bytes(ROS2.serialize_cdr(message, message.__msgtype__)), message.__msgtype__
    )


@pytest.mark.parametrize(
    ("descriptor_type", "datatype", "point_step"), [("float32", FLOAT32, 60), ("int8", INT8, 36)]
)
def test_features_have_the_documented_fields(descriptor_type, datatype, point_step):
    message = messages.encode_features(make_result(), None, TYPES, descriptor_type)
    floats = [(name, 4 * i, FLOAT32, 1) for i, name in enumerate(("x", "y", "z", "u", "v"))]
    assert [(f.name, f.offset, f.datatype, f.count) for f in message.fields] == [
        *floats,
        ("score", 20, FLOAT32, 1),
        ("track_id", 24, UINT32, 1),
        ("descriptor", 28, datatype, 8),
    ]
    assert (message.width, message.height) == (5, 1)
    assert (message.point_step, message.row_step) == (point_step, 5 * point_step)
    assert len(message.data) == 5 * point_step
    assert message.header.frame_id == "camera_optical"
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1_700_000_000, 7)


def test_stamps_of_both_ros_are_nanoseconds():
    ros1, ros2 = SimpleNamespace(secs=3, nsecs=7), SimpleNamespace(sec=-1, nanosec=7)
    assert messages.stamp_to_nanoseconds(ros1) == 3_000_000_007
    assert messages.stamp_to_nanoseconds(ros2) == -999_999_993


def test_matches_have_the_documented_fields():
    message = messages.encode_matches(make_result(), None, TYPES)
    names = ("x", "y", "z", "u", "v", "prev_u", "prev_v", "similarity")
    assert [(f.name, f.datatype, f.count) for f in message.fields] == [
        *((name, FLOAT32, 1) for name in names),
        *((name, UINT32, 1) for name in ("index", "prev_index", "track_id")),
        ("prev_sec", INT32, 1),
        ("prev_nanosec", UINT32, 1),
    ]
    assert message.width == 3


def test_features_survive_the_round_trip():
    result = make_result(keypoints=40, dim=64)
    bearings = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    points = messages.decode_features(
        over_the_wire(messages.encode_features(result, bearings, TYPES))
    )
    np.testing.assert_array_equal(np.stack([points["x"], points["y"], points["z"]], 1), bearings)
    np.testing.assert_array_equal(points["track_id"], result.track_ids)
    features = messages.to_features(points, (640, 480))
    np.testing.assert_array_equal(features.keypoints, result.features.keypoints)
    np.testing.assert_array_equal(features.scores, result.features.scores)
    np.testing.assert_array_equal(features.descriptors, result.features.descriptors)


def test_int8_descriptors_are_the_rounded_multiples_of_127():
    result = make_result(keypoints=40, dim=64)
    points = messages.decode_features(
        over_the_wire(messages.encode_features(result, None, TYPES, "int8"))
    )
    assert points["descriptor"].dtype == np.int8
    np.testing.assert_array_equal(
        points["descriptor"], np.rint(result.features.descriptors * 127).astype(np.int8)
    )
    descriptors = messages.to_features(points, (640, 480)).descriptors
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-6)
    assert ((descriptors * result.features.descriptors).sum(axis=1) > 0.998).all()
    points = points.copy()
    points["descriptor"][0] = 0
    assert not messages.to_features(points, (640, 480)).descriptors[0].any()


def test_bearings_are_nan_without_a_camera():
    message = messages.encode_features(make_result(), None, TYPES)
    points = messages.decode_features(message)
    assert all(np.isnan(points[name]).all() for name in "xyz")
    assert not message.is_dense
    bearings = np.ones((5, 3), np.float32)
    assert messages.encode_features(make_result(), bearings, TYPES).is_dense
    bearings[3] = np.nan  # a single one that the lens cannot have made
    assert not messages.encode_features(make_result(), bearings, TYPES).is_dense


def test_matches_survive_the_round_trip():
    result = make_result(keypoints=9, matches=4)
    bearings = np.arange(27, dtype=np.float32).reshape(9, 3)
    points = messages.decode_matches(
        over_the_wire(messages.encode_matches(result, bearings, TYPES))
    )
    previous, current = result.matches.indices.T
    np.testing.assert_array_equal(points["index"], current)
    np.testing.assert_array_equal(points["prev_index"], previous)
    np.testing.assert_array_equal(points["similarity"], result.matches.similarity)
    np.testing.assert_array_equal(points["track_id"], result.track_ids[current])
    np.testing.assert_array_equal(points["x"], bearings[current, 0])
    np.testing.assert_array_equal(points["u"], result.features.keypoints[current, 0])
    np.testing.assert_array_equal(points["v"], result.features.keypoints[current, 1])
    np.testing.assert_array_equal(points["prev_u"], result.previous_keypoints[:, 0])
    np.testing.assert_array_equal(points["prev_v"], result.previous_keypoints[:, 1])
    assert set(points["prev_sec"]) == {1_699_999_999}
    assert set(points["prev_nanosec"]) == {900_000_001}


def test_nothing_at_all_is_a_message_too():
    result = make_result(keypoints=0, matches=0, previous_stamp=None)
    features = over_the_wire(messages.encode_features(result, None, TYPES))
    assert messages.decode_features(features).shape == (0,)
    assert messages.decode_features(features)["descriptor"].shape == (0, 8)
    empty = messages.to_features(messages.decode_features(features), (64, 48))
    assert len(empty) == 0 and empty.descriptors.shape == (0, 8)
    assert len(messages.decode_matches(messages.encode_matches(result, None, TYPES))) == 0


def test_rclpy_style_classes_get_an_array_that_they_take_unchecked():
    class Message(SimpleNamespace):
        pass

    types = messages.MessageTypes(Message, Message, Message, Message, Message, messages.pack_array)
    result = make_result()
    message = messages.encode_features(result, None, types)
    assert isinstance(message.data, array.array)
    assert message.data.typecode == "B"
    np.testing.assert_array_equal(
        messages.decode_features(message)["u"], result.features.keypoints[:, 0]
    )


def test_an_unknown_descriptor_type_is_refused():
    with pytest.raises(ValueError, match="float16"):
        messages.encode_features(make_result(), None, TYPES, "float16")


def foreign_cloud(order, width=3, height=2, padding=5):
    """A cloud as another program may send it: any byte order, gaps, padded rows."""
    dtype = np.dtype(
        {
            "names": ["a", "b"],
            "formats": [order + "f8", (order + "u2", (3,))],
            "offsets": [2, 12],
            "itemsize": 20,
        }
    )
    points = np.zeros(width * height, dtype)
    points["a"] = np.arange(width * height) + 0.5
    points["b"] = np.arange(width * height * 3).reshape(-1, 3)
    rows = np.frombuffer(points.tobytes(), np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)))
    field = TYPES.point_field
    return points, TYPES.point_cloud2(
        header=messages.encode_header(0, "", TYPES),
        height=height,
        width=width,
        fields=[
            field(name="a", offset=2, datatype=8, count=1),
            field(name="b", offset=12, datatype=4, count=3),
        ],
        is_bigendian=order == ">",
        point_step=20,
        row_step=rows.shape[1],
        data=rows.reshape(-1),
        is_dense=True,
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_clouds_of_other_programs_are_read(order):
    points, message = foreign_cloud(order)
    for missing in (0, 5):  # the last row's padding
        message.data = message.data[: len(message.data) - missing]
        decoded = messages.decode_cloud(message)
        np.testing.assert_array_equal(decoded["a"], points["a"])
        np.testing.assert_array_equal(decoded["b"], points["b"])
    message.height = 0
    assert messages.decode_cloud(message).shape == (0,)


def test_clouds_that_do_not_fit_are_refused():
    _, message = foreign_cloud("<")
    with pytest.raises(ValueError, match=r"lacks the field\(s\) x, y, z"):
        messages.decode_features(message)
    with pytest.raises(ValueError, match=r"lacks the field\(s\) prev_u, prev_v, similarity"):
        messages.decode_matches(messages.encode_features(make_result(), None, TYPES))
    message.row_step = 59  # rows that overlap
    with pytest.raises(ValueError, match="2 x 3 points"):
        messages.decode_cloud(message)
    message.row_step = 65
    message.data = message.data[:60]
    with pytest.raises(ValueError, match="holds 60 bytes"):
        messages.decode_cloud(message)
    message.fields[0].datatype = 99
    with pytest.raises(ValueError, match="'a' has unknown datatype 99"):
        messages.decode_cloud(message)
    message.fields[0].datatype = 8
    message.point_step = 4
    with pytest.raises(ValueError, match="point_step"):
        messages.decode_cloud(message)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 30),
    dim=st.integers(1, 130),
    kind=st.sampled_from(messages.DESCRIPTOR_TYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_number_of_points_and_dimensions_survives(count, dim, kind, seed):
    result = make_result(count, min(count, 9), dim, seed)
    expected = messages.feature_array(result, None, kind)
    decoded = messages.decode_features(
        over_the_wire(messages.encode_features(result, None, TYPES, kind))
    )
    assert decoded.tobytes() == expected.tobytes()
    assert messages.to_features(decoded, (64, 48)).descriptors.shape == (count, dim)


def test_the_overlay_survives_the_round_trip():
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    message = over_the_wire(messages.encode_image(picture, 5 * 10**9 + 3, "cam", TYPES))
    assert (message.encoding, message.step, message.header.stamp.nanosec) == ("rgb8", 15, 3)
    np.testing.assert_array_equal(messages.decode_image(message), picture)
    padded = image_message(picture, padding=6)
    np.testing.assert_array_equal(messages.decode_image(padded), picture)
    mirrored = messages.encode_image(picture[:, ::-1], 0, "", TYPES)
    np.testing.assert_array_equal(messages.decode_image(mirrored), picture[:, ::-1])


def test_no_overlay_is_refused():
    for shape in ((4, 4), (4, 4, 4)):
        with pytest.raises(ValueError, match="uint8"):
            messages.encode_image(np.zeros(shape, np.uint8), 0, "", TYPES)
    message = image_message(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="mono8"):
        messages.decode_image(message)
    message = image_message(np.zeros((4, 4, 3), np.uint8))
    message.data = message.data[:-1]
    with pytest.raises(ValueError, match="47 bytes"):
        messages.decode_image(message)
    message.step = 11
    with pytest.raises(ValueError, match="4 rows of 11 bytes for 4 pixels"):
        messages.decode_image(message)


@pytest.fixture
def feature_bag(tmp_path):
    results = [make_result(seed=seed) for seed in range(3)]
    writer = FeatureBagWriter(tmp_path / "features")
    for index, result in enumerate(results):
        writer.write(result, None, 1000 + index)
    writer.close()
    return tmp_path / "features", results


def test_rosbags_reads_what_was_written(feature_bag):
    path, results = feature_bag
    with AnyReader([path]) as reader:
        rows = [
            (connection.topic, time, reader.deserialize(data, connection.msgtype))
            for connection, time, data in reader.messages()
        ]
    for index, result in enumerate(results):
        (features,) = (
            m for topic, time, m in rows if (topic, time) == ("/extractor/features", 1000 + index)
        )
        (matches,) = (
            m for topic, time, m in rows if (topic, time) == ("/extractor/matches", 1000 + index)
        )
        assert (
            messages.decode_features(features).tobytes() == messages.feature_array(result).tobytes()
        )
        assert messages.decode_matches(matches).tobytes() == messages.match_array(result).tobytes()


def test_the_mcap_package_reads_what_was_written(feature_bag):
    path, results = feature_bag
    with storage_file(path).open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        rows = [
            (schema.name, channel.topic, message.log_time, decoded)
            for schema, channel, message, decoded in reader.iter_decoded_messages()
        ]
    assert len(rows) == 6
    assert {name for name, *_ in rows} == {CLOUD}
    for index, result in enumerate(results):
        (features,) = (
            m for _, topic, time, m in rows if topic.endswith("features") and time == 1000 + index
        )
        decoded = messages.decode_features(features)
        assert decoded.tobytes() == messages.feature_array(result).tobytes()
