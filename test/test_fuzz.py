"""Whatever comes in: no crash, no hang, and nothing lost without a word."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sample_bags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_bags import IMAGE_TOPIC, INFO_TOPIC, ROS2

from scfeat_ros import messages
from scfeat_ros.bags import BagReader, UnreadableMessageError
from scfeat_ros.decoded_image import UnknownEncodingError, UnreadableImageError
from scfeat_ros.errors import InputError
from scfeat_ros.frontend import FrontEnd
from scfeat_ros.images import ENCODINGS, from_message
from scfeat_ros.parameters import MatcherOptions

COUNT = 12
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


# --- images ------------------------------------------------------------------------------------


@st.composite
def image_arrays(draw):
    """uint8 images of odd shapes and contents."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    shape = (height, width, 3) if draw(st.booleans()) else (height, width)
    kind = draw(st.sampled_from(["black", "white", "noise", "stripes", "one pixel", "half"]))
    image = np.zeros(shape, np.uint8)
    if kind == "white":
        image[:] = 255
    elif kind == "noise":
        image[:] = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, shape)
    elif kind == "stripes":
        image[:, :: draw(st.integers(1, 5))] = 255
    elif kind == "one pixel":
        image[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 255
    elif kind == "half":
        image[height // 2 :] = 200
    return image


@settings(max_examples=40, **SETTINGS)
@given(
    frames=st.lists(image_arrays(), min_size=1, max_size=3),
    steps=st.lists(st.integers(-(10**9), 3 * 10**9), min_size=3, max_size=3),
    epipolar=st.sampled_from([0.0, 1.0]),
)
def test_the_front_end_takes_any_image(tiny_extractor, frames, steps, epipolar):
    front_end = FrontEnd(tiny_extractor, MatcherOptions(ratio=0.9, epipolar_threshold=epipolar))
    time = 10**10
    for image, step in zip(frames, steps, strict=False):
        time += step
        result = front_end.process(image, time, "cam")
        features = result.features
        count = len(features)
        assert features.image_size == image.shape[1::-1]
        assert features.keypoints.shape == (count, 2)
        assert features.keypoints.dtype == features.scores.dtype == np.float32
        assert features.descriptors.shape == (count, 32)
        assert np.isfinite(features.descriptors).all() and np.isfinite(features.scores).all()
        assert (features.keypoints >= -0.5).all()
        assert (features.keypoints <= np.array(features.image_size) - 0.5).all()
        np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-4)
        assert len(set(result.track_ids.tolist())) == count
        assert len(result.previous_keypoints) == len(result.matches)
        # and into messages and out of them
        points = messages.decode_features(
            messages.encode_features(result, None, messages.rosbags_types(ROS2))
        )
        np.testing.assert_array_equal(points["track_id"], result.track_ids)


@settings(max_examples=40, **SETTINGS)
@given(
    image=st.one_of(
        st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda s: np.zeros(s, np.uint8)),
        st.sampled_from([np.float32, np.uint16, np.int8, bool]).map(
            lambda dtype: np.zeros((20, 20, 3), dtype)
        ),
        st.sampled_from([(20,), (20, 20, 1), (20, 20, 4), (2, 20, 20, 3), ()]).map(
            lambda shape: np.zeros(shape, np.uint8)
        ),
    )
)
def test_the_extractor_refuses_what_is_no_image(tiny_extractor, image):
    valid = image.dtype == np.uint8 and (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    )
    if valid:
        assert len(tiny_extractor(image)) == 0
    else:
        with pytest.raises(ValueError, match="image must be"):
            tiny_extractor(image)


@settings(max_examples=150, **SETTINGS)
@given(
    encoding=st.one_of(st.sampled_from(ENCODINGS), st.text(max_size=12)),
    height=st.integers(0, 2**32 - 1) | st.integers(0, 6),
    width=st.integers(0, 2**32 - 1) | st.integers(0, 6),
    step=st.integers(0, 2**32 - 1) | st.integers(0, 60),
    big=st.integers(0, 1),
    data=st.binary(max_size=400),
)
def test_image_messages_of_any_content(encoding, height, width, step, big, data):
    message = SimpleNamespace(
        encoding=encoding,
        height=height,
        width=width,
        step=step,
        is_bigendian=big,
        data=np.frombuffer(data, np.uint8),
    )
    try:
        picture = from_message(message).pixels
    except (UnknownEncodingError, UnreadableImageError):
        return
    assert picture.dtype == np.uint8
    assert picture.shape[:2] == (height, width) and picture.shape[2:] in ((), (3,))


@settings(max_examples=60, **SETTINGS)
@given(
    ending=st.sampled_from([".png", ".jpg"]),
    flips=st.lists(st.integers(0, 10**6), max_size=4),
    keep=st.floats(0, 1),
)
def test_compressed_images_of_any_content(ending, flips, keep):
    message = sample_bags.compressed_message(sample_bags.texture(64), ending=ending)
    data = message.data.copy()
    for flip in flips:
        data[flip // 8 % len(data)] ^= 1 << (flip % 8)
    message.data = data[: round(keep * len(data))]
    try:
        picture = from_message(message).pixels
    except (UnknownEncodingError, UnreadableImageError):
        return
    assert picture.dtype == np.uint8 and picture.size


@settings(max_examples=150, **SETTINGS)
@given(
    fields=st.lists(
        st.tuples(st.text(max_size=4), st.integers(0, 40), st.integers(0, 9), st.integers(0, 9)),
        max_size=5,
    ),
    height=st.integers(0, 2**32 - 1) | st.integers(0, 3),
    width=st.integers(0, 2**32 - 1) | st.integers(0, 3),
    point_step=st.integers(0, 64),
    row_step=st.integers(0, 200),
    big=st.booleans(),
    data=st.binary(max_size=300),
)
def test_point_clouds_of_any_content(fields, height, width, point_step, row_step, big, data):
    cloud = SimpleNamespace(
        fields=[
            SimpleNamespace(name=name, offset=offset, datatype=datatype, count=count)
            for name, offset, datatype, count in fields
        ],
        height=height,
        width=width,
        point_step=point_step,
        row_step=row_step,
        is_bigendian=big,
        data=data,
    )
    try:
        points = messages.decode_cloud(cloud)
    except ValueError:
        return
    assert len(points) == height * width or point_step == 0
    with pytest.raises(ValueError, match="lacks the field"):
        messages.decode_features(cloud)


# --- bags --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mcap", "mcap zstd", "mcap message", "sqlite3"])
def sound_bag(request, tmp_path_factory):
    """A bag of twelve images with CameraInfo."""
    storage, _, compression = request.param.partition(" ")
    compression = {"zstd": "storage"}.get(compression, compression or "none")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 60), np.uint8) for _ in range(COUNT)]
    rows = sample_bags.camera_messages(pictures, np.diag([50.0, 50.0, 1.0]))
    path = tmp_path_factory.mktemp("fuzz") / "bag"
    return sample_bags.write_bag(path, rows, storage, compression)


@contextmanager
def damaged_copy(bag, change):
    """The bag with its storage file's bytes changed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bag"
        shutil.copytree(bag, copy)
        file = sample_bags.storage_file(copy)
        data = change(bytearray(file.read_bytes()))
        file.write_bytes(data)
        yield copy


def check_account(path):
    """Every message is read, or accounted as lost."""
    try:
        reader = BagReader(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    with reader:
        known = set(reader.topics)
        read = 0
        for message in reader.messages():
            assert message.topic in known
            read += 1
            try:
                content = reader.decode(message)
            except UnreadableMessageError:
                continue
            if message.topic == IMAGE_TOPIC:
                with suppress(UnknownEncodingError, UnreadableImageError):
                    from_message(content)
        missing = 2 * COUNT - read
        if missing > 0:
            assert reader.damage, "messages are missing without a word"
            topics = {IMAGE_TOPIC, INFO_TOPIC} & known
            if len(topics) == 2:
                assert reader.damage.messages_lost >= missing


@settings(max_examples=25, **SETTINGS)
@given(share=st.floats(0, 1))
def test_cut_off_bags(sound_bag, share):
    with damaged_copy(sound_bag, lambda data: data[: round(share * len(data))]) as path:
        check_account(path)


@settings(max_examples=40, **SETTINGS)
@given(flips=st.lists(st.floats(0, 0.9999999), min_size=1, max_size=30), bit=st.integers(0, 7))
def test_bags_with_flipped_bits(sound_bag, flips, bit):
    def change(data):
        for flip in flips:
            data[int(flip * len(data))] ^= 1 << bit
        return data

    with damaged_copy(sound_bag, change) as path:
        check_account(path)


@settings(max_examples=25, **SETTINGS)
@given(start=st.floats(0, 1), length=st.integers(1, 9000), fill=st.sampled_from([0, 255, None]))
def test_bags_with_a_stretch_overwritten(sound_bag, start, length, fill):
    def change(data):
        begin = int(start * len(data))
        end = min(begin + length, len(data))
        noise = np.random.default_rng(length).bytes(end - begin)
        data[begin:end] = noise if fill is None else bytes([fill]) * (end - begin)
        return data

    with damaged_copy(sound_bag, change) as path:
        check_account(path)


@settings(max_examples=25, **SETTINGS)
@given(content=st.binary(max_size=2000), suffix=st.sampled_from([".mcap", ".db3", ".bag"]))
def test_files_that_were_never_bags(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"thing{suffix}"
        path.write_bytes(content)
        with BagReader(path) as reader:
            assert list(reader.messages()) == []
            assert reader.damage
