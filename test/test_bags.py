"""Reading bags, sound and damaged."""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
import struct
import tempfile
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import sample_bags
from full_disk import files_up_to
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from sample_bags import IMAGE_TOPIC, INFO_TOPIC, PERIOD, ROS1, ROS2, START, storage_file

from scfeat_ros.bags import BagReader, UnreadableMessageError, zstd
from scfeat_ros.errors import InputError
from scfeat_ros.images import from_message
from scfeat_ros.recovery import Damage

COUNT = 20
TOPICS = {IMAGE_TOPIC: COUNT, INFO_TOPIC: COUNT}


@pytest.fixture(scope="module")
def pictures():
    """Twenty noisy images, which no compression shrinks much."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (90, 120), np.uint8) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def rows(pictures):
    return sample_bags.camera_messages(pictures, np.diag([100.0, 100.0, 1.0]))


def read(path):
    """All messages by topic, and the reader's damage."""
    found = {}
    with BagReader(path) as reader:
        for message in reader.messages():
            found.setdefault(message.topic, []).append(message)
        return found, reader.damage


def check_images(messages, pictures, expected):
    """The messages hold these pictures, by their number."""
    indices = []
    for message in messages:
        content = ROS2.deserialize_cdr(message.data, message.type)
        stamp = content.header.stamp.sec * 10**9 + content.header.stamp.nanosec
        index = (stamp - sample_bags.stamp(0)) // PERIOD
        np.testing.assert_array_equal(from_message(content).pixels, pictures[index])
        assert message.time == sample_bags.stamp(index) + 5_000_000
        indices.append(index)
    assert indices == list(expected)


@pytest.mark.parametrize(
    ("storage", "compression"),
    [
        ("mcap", "none"),
        ("mcap", "storage"),
        ("mcap", "file"),
        ("mcap", "message"),
        ("sqlite3", "none"),
        ("sqlite3", "file"),
        ("sqlite3", "message"),
    ],
)
def test_sound_bags_of_ros_2(tmp_path, rows, pictures, storage, compression):
    path = sample_bags.write_bag(tmp_path / "bag", rows, storage, compression)
    found, damage = read(path)
    assert {topic: len(messages) for topic, messages in found.items()} == TOPICS
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert not damage and damage.bytes_lost == 0
    with BagReader(path) as reader:
        assert [t.name for t in reader.image_topics] == [IMAGE_TOPIC]
        assert reader.topics[IMAGE_TOPIC].count == COUNT
        assert not reader.is_ros1


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_storage_file_alone_is_a_bag(tmp_path, rows, pictures, storage):
    path = sample_bags.write_bag(tmp_path / "bag", rows, storage)
    found, damage = read(storage_file(path))
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert not damage


def test_a_bag_of_ros_1(tmp_path, pictures):
    path = tmp_path / "drive.bag"
    messages = [
        (IMAGE_TOPIC, sample_bags.stamp(i), sample_bags.image_message(p, types=ROS1.types))
        for i, p in enumerate(pictures)
    ]
    sample_bags.write_ros1_bag(path, messages)
    with BagReader(path) as reader:
        assert reader.is_ros1
        decoded = [from_message(reader.decode(message)).pixels for message in reader.messages()]
    np.testing.assert_array_equal(decoded, pictures)


def test_a_time_range_and_topics(tmp_path, rows, pictures):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with BagReader(path) as reader:
        start = reader.start_time + 3 * PERIOD
        chosen = list(reader.messages([IMAGE_TOPIC], start, start + 4 * PERIOD))
        first = list(reader.messages([IMAGE_TOPIC], stop=start))
        last = list(reader.messages([IMAGE_TOPIC], start))
        assert not reader.damage
    check_images(chosen, pictures, range(3, 7))
    check_images(first, pictures, range(3))
    check_images(last, pictures, range(3, COUNT))


def split_bag(tmp_path, rows):
    """A bag of two files, as a recorder with a size limit makes it."""
    first = sample_bags.write_bag(tmp_path / "a", rows[:COUNT])
    second = sample_bags.write_bag(tmp_path / "b", rows[COUNT:])
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copy(storage_file(first), folder / "split_0.mcap")
    shutil.copy(storage_file(second), folder / "split_1.mcap")
    text = (first / "metadata.yaml").read_text()
    text = text.replace("- a.mcap", "- split_0.mcap\n  - split_1.mcap", 1)
    text = text.replace(f"message_count: {COUNT // 2}", f"message_count: {COUNT}")
    (folder / "metadata.yaml").write_text(text)
    return folder


def test_a_split_bag(tmp_path, rows, pictures):
    folder = split_bag(tmp_path, rows)
    found, damage = read(folder)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert not damage, damage.places


def test_files_that_metadata_names_with_the_folder_are_found(tmp_path, rows, pictures):
    """As early recorders of ROS 2 wrote them."""
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    text = (path / "metadata.yaml").read_text()
    assert text.count("- bag.mcap") == 1
    (path / "metadata.yaml").write_text(text.replace("- bag.mcap", "- bag/bag.mcap"))
    found, damage = read(path)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert not damage


def test_a_split_bag_with_a_file_missing(tmp_path, rows, pictures):
    folder = split_bag(tmp_path, rows)
    (folder / "split_0.mcap").unlink()
    found, damage = read(folder)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT // 2, COUNT))
    assert damage.messages_lost == COUNT
    assert any("split_0.mcap is missing" in place for place in damage.places)


def test_files_without_metadata_are_read_by_their_numbers(tmp_path, rows, pictures):
    (tmp_path / "split").mkdir()
    for number in range(12):
        bag = sample_bags.write_bag(tmp_path / f"part{number}", rows[2 * number : 2 * number + 2])
        shutil.copy(storage_file(bag), tmp_path / "split" / f"drive_{number}.mcap")
    found, _ = read(tmp_path / "split")
    check_images(found[IMAGE_TOPIC], pictures, range(12))


@pytest.mark.parametrize("compression", ["none", "message"])
def test_a_folder_without_metadata(tmp_path, rows, pictures, compression):
    path = sample_bags.write_bag(tmp_path / "bag", rows, compression=compression)
    (path / "metadata.yaml").unlink()
    found, damage = read(path)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert "metadata.yaml" in damage.places[0] and damage.messages_lost == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"a: [",
        b"hello",
        b"rosbag2_bagfile_information: 5",
        b"rosbag2_bagfile_information: {topics_with_message_count: [{message_count: x}]}",
    ],
    ids=["empty", "no text", "no yaml", "text", "number", "no topic"],
)
def test_damaged_metadata_costs_no_message(tmp_path, rows, pictures, content):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    (path / "metadata.yaml").write_bytes(content)
    found, damage = read(path)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert damage.messages_lost == 0 and "metadata.yaml" in damage.places[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "this folder is not a bag"),
        (lambda path: path.write_text("hello"), "this file is not a bag"),
        (lambda path: path.write_bytes(b"\x89MCAP0\r\n"), r"name ends with \.mcap"),
    ],
    ids=["missing", "folder", "text", "misnamed"],
)
def test_what_is_no_bag_is_refused(tmp_path, make, text):
    make(tmp_path / "thing")
    with pytest.raises(InputError, match=text):
        BagReader(tmp_path / "thing")


def test_a_message_that_does_not_fit_its_type_is_unreadable(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with BagReader(path) as reader:
        message = next(reader.messages([IMAGE_TOPIC]))
        with pytest.raises(UnreadableMessageError, match=IMAGE_TOPIC):
            reader.decode(message._replace(data=message.data[:40]))


@pytest.mark.parametrize("kind", ["no chunks", "small chunks", "zstd"])
def test_messages_out_of_order_are_no_damage(tmp_path, rows, kind):
    order = [*range(10), 14, 12, 13, 10, 11, *range(15, len(rows))]
    path = write_mcap(tmp_path / "bag.mcap", [rows[i] for i in order], **MCAPS[kind])
    found, damage = read(path)
    assert not damage, damage.places
    for topic in TOPICS:
        times = [message.time for message in found[topic]]
        expected = [rows[i][1] for i in order if rows[i][0] == topic]
        # files without an index are read as they are, others by time
        assert times == (expected if kind == "no chunks" else sorted(expected))


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file"])
def test_what_a_killed_recorder_left_in_the_journal_is_read(tmp_path, rows, pictures, alone):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "sqlite3")
    (path / "metadata.yaml").unlink()
    file = storage_file(path)
    with closing(sqlite3.connect(file)) as database:
        kept = database.execute("SELECT * FROM messages ORDER BY timestamp").fetchall()
        database.execute("DELETE FROM messages WHERE timestamp > ?", [kept[9][2]])
        database.commit()
        database.execute("PRAGMA journal_mode=WAL")
        places = ",".join("?" * len(kept[0]))
        database.executemany(f"INSERT INTO messages VALUES ({places})", kept[10:])
        database.commit()
        killed = tmp_path / "killed"  # as the files are while the recorder runs
        shutil.copytree(path, killed, ignore=shutil.ignore_patterns("*-shm"))
    names = {f.name for f in killed.iterdir()}
    assert names == {"bag.db3", "bag.db3-wal"}
    found, damage = read(killed / "bag.db3" if alone else killed)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert damage.messages_lost == 0
    assert {f.name for f in killed.iterdir()} == names


def test_records_of_an_application_are_passed_over(tmp_path, rows, pictures):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS["no chunks"])
    data = path.read_bytes()
    (header,) = struct.unpack_from("<Q", data, 9)
    place = 8 + 9 + header  # behind magic and header
    data = data[:place] + struct.pack("<BQ", 0x81, 5) + b"hello" + data[place:]
    path.write_bytes(data[:-37])  # without footer and magic, so that the index is of no use
    found, damage = read(path)
    check_images(found[IMAGE_TOPIC], pictures, range(COUNT))
    assert damage.bytes_lost == 0, damage.places


# --- damage ------------------------------------------------------------------------------------


def test_of_very_many_places_fifty_are_named_and_all_counted():
    damage = Damage()
    for number in [*range(60), *range(60)]:
        damage.add(f"place {number}", 3, 2)
    assert damage.places == [*(f"place {number}" for number in range(50)), "... and more places"]
    assert (damage.bytes_lost, damage.messages_lost) == (180, 120)


def cut(path, share):
    """Leave the first part of a file; returns the bytes taken away."""
    data = path.read_bytes()
    keep = int(len(data) * share)
    path.write_bytes(data[:keep])
    return len(data) - keep


def write_mcap(path, rows, **options):
    """An mcap by another writer, with checksums; also without chunks."""
    with path.open("wb") as file:
        writer = McapWriter(file, **options)
        writer.start("ros2")
        channels = {}
        for topic, time, message in rows:
            name = message.__msgtype__
            if topic not in channels:
                text, _ = ROS2.generate_msgdef(name, ros_version=2)
                schema = writer.register_schema(name, "ros2msg", text.encode())
                channels[topic] = writer.register_channel(topic, "cdr", schema)
            data = bytes(ROS2.serialize_cdr(message, name))
            writer.add_message(channels[topic], time, data, time)
        writer.finish()
    return path


def sizes(rows):
    """Bytes of the messages up to and including each."""
    lengths = [len(ROS2.serialize_cdr(message, message.__msgtype__)) for _, _, message in rows]
    return np.cumsum(lengths)


MCAPS = {
    "one chunk": {"chunk_size": 10**9, "compression": CompressionType.NONE},
    "small chunks": {"chunk_size": 30_000, "compression": CompressionType.NONE},
    "no chunks": {"use_chunking": False},
    "zstd": {"chunk_size": 30_000, "compression": CompressionType.ZSTD},
    "lz4": {"chunk_size": 30_000, "compression": CompressionType.LZ4},
}


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999])
@pytest.mark.parametrize("kind", MCAPS)
def test_a_cut_off_mcap_gives_all_that_is_there(tmp_path, rows, pictures, kind, share):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS[kind])
    lost = cut(path, share)
    size = path.stat().st_size
    found, damage = read(path)
    images = len(found[IMAGE_TOPIC])
    check_images(found[IMAGE_TOPIC], pictures, range(images))
    assert abs(len(found[INFO_TOPIC]) - images) <= 1
    # all but the message that was cut through; records around messages take some bytes, and a
    # compressor has some of the last block still in its hands
    whole = int(np.searchsorted(sizes(rows), size - 10_000))
    behind = 31_000 / 11_000 if kind in ("zstd", "lz4") else 1
    assert images >= whole / 2 - behind - 1
    assert damage
    assert any("byte" in place for place in damage.places)
    assert lost > 0 and str(size) in " ".join(damage.places)
    # nothing is counted twice, nor what was read
    assert damage.bytes_lost < lost + 40_000
    if kind == "one chunk" and share < 0.9:
        assert any("hold no whole message" in place for place in damage.places)


def test_a_cut_off_mcap_in_a_folder_counts_lost_messages(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    cut(storage_file(path), 0.5)
    found, damage = read(path)
    read_messages = sum(len(messages) for messages in found.values())
    assert 15 <= read_messages <= 22
    assert damage.messages_lost == 2 * COUNT - read_messages
    assert damage.bytes_lost > 0


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_cut_off_compressed_file_gives_all_that_is_there(tmp_path, rows, pictures, storage):
    path = sample_bags.write_bag(tmp_path / "bag", rows, storage, "file")
    cut(storage_file(path), 0.7)
    found, damage = read(path)
    images = len(found[IMAGE_TOPIC])
    check_images(found[IMAGE_TOPIC], pictures, range(images))
    assert 0.7 * COUNT - 6 <= images < COUNT
    assert "cannot be decompressed beyond byte" in damage.places[0]
    read_messages = sum(len(messages) for messages in found.values())
    assert damage.messages_lost == 2 * COUNT - read_messages


@pytest.mark.parametrize("kind", ["small chunks", "zstd", "lz4"])
def test_a_broken_chunk_costs_that_chunk_only(tmp_path, rows, kind):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS[kind])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    found, damage = read(path)
    images = len(found[IMAGE_TOPIC])
    # a chunk holds three images
    assert COUNT - 3 <= images <= COUNT
    assert damage
    if images < COUNT:
        assert damage.messages_lost >= COUNT - images


def test_a_broken_chunk_costs_nothing_beside_it_of_the_same_time(tmp_path, rows):
    """Reading goes on behind it with what has not been given yet, each message once."""
    same = [
        (topic, rows[14][1] if 14 <= index < 20 else time, message)
        for index, (topic, time, message) in enumerate(rows)
    ]
    options = {"chunk_size": 1, "compression": CompressionType.ZSTD}  # a message in each
    path = write_mcap(tmp_path / "bag.mcap", same, **options)
    data = bytearray(path.read_bytes())
    frames = [m.start() for m in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)]
    assert len(frames) == 2 * COUNT
    data[frames[17]] ^= 0xFF  # the second of three images, with a CameraInfo each
    path.write_bytes(data)
    found, damage = read(path)
    assert [(m.time, m.data) for m in found[INFO_TOPIC]] == [
        (time, bytes(ROS2.serialize_cdr(message, message.__msgtype__)))
        for topic, time, message in same
        if topic == INFO_TOPIC
    ]
    expected = [time for topic, time, _ in same if topic == IMAGE_TOPIC]
    assert [m.time for m in found[IMAGE_TOPIC]] == expected[:8] + expected[9:]
    assert damage


@pytest.mark.parametrize("kind", ["small chunks", "no chunks", "zstd"])
def test_a_hole_without_an_index_is_skipped(tmp_path, rows, pictures, kind):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS[kind])
    cut(path, 0.97)
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : third + 40_000] = np.random.default_rng(0).bytes(40_000)
    path.write_bytes(data)
    found, damage = read(path)
    indices = [(m.time - 5_000_000 - sample_bags.stamp(0)) // PERIOD for m in found[IMAGE_TOPIC]]
    # the first third, and what comes after the hole
    assert set(range(5)) <= set(indices) and set(range(13, 18)) <= set(indices)
    assert 10_000 < damage.bytes_lost < 110_000


def test_messages_of_a_wrong_checksum_are_used_and_told(tmp_path, rows, pictures):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS["small chunks"])
    data = bytearray(path.read_bytes())
    at = data.find(pictures[7].tobytes()) + 5000
    data[at] ^= 1
    path.write_bytes(data[:-37])
    found, damage = read(path)
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT
    assert sum("wrong checksum" in place for place in damage.places) == 1
    assert damage.bytes_lost == damage.messages_lost == 0


def test_messages_of_a_topic_whose_declaration_is_lost_are_counted(tmp_path, rows):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS["small chunks"])
    declaration = IMAGE_TOPIC.encode() + b"\3\0\0\0"
    data = path.read_bytes()
    assert declaration + b"cdr" in data
    path.write_bytes(data.replace(declaration + b"cdr", declaration + b"???")[:-37])
    found, damage = read(path)
    assert {topic: len(messages) for topic, messages in found.items()} == {INFO_TOPIC: COUNT}
    assert damage.messages_lost == COUNT
    assert any("messages of unknown topics" in place for place in damage.places)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_off_database_gives_all_that_is_there(tmp_path, rows, pictures, share):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "sqlite3")
    lost = cut(storage_file(path), share)
    found, damage = read(path)
    images = len(found[IMAGE_TOPIC])
    check_images(found[IMAGE_TOPIC], pictures, range(images))
    assert images >= share * COUNT - 3
    assert damage.bytes_lost == lost
    read_messages = sum(len(messages) for messages in found.values())
    assert damage.messages_lost == 2 * COUNT - read_messages


@pytest.mark.parametrize("page_size", [512, 65536])
def test_a_cut_off_database_of_other_pages_is_read_by_time(tmp_path, rows, page_size):
    order = [*range(0, 2 * COUNT, 2), *range(1, 2 * COUNT, 2)]  # by topic
    path = sample_bags.write_bag(tmp_path / "bag", [rows[i] for i in order], "sqlite3")
    (path / "metadata.yaml").unlink()
    with closing(sqlite3.connect(storage_file(path))) as database:
        database.execute(f"PRAGMA page_size={page_size}")
        database.execute("VACUUM")
    cut(storage_file(path), 0.95)
    with BagReader(path) as reader:
        found = list(reader.messages())
    times = [message.time for message in found]
    assert times == sorted(times)
    topics = Counter(message.topic for message in found)
    assert topics[INFO_TOPIC] == COUNT and topics[IMAGE_TOPIC] >= 0.6 * COUNT


def test_a_database_with_a_broken_page_gives_the_rest(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "sqlite3")
    file = storage_file(path)
    data = bytearray(file.read_bytes())
    connection = sqlite3.connect(file)
    (root,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'messages'"
    ).fetchone()
    connection.close()
    # the tree's root is gone, its leaves are not
    data[(root - 1) * 4096 : root * 4096] = bytes(4096)
    file.write_bytes(data)
    found, damage = read(path)
    assert {topic: len(messages) for topic, messages in found.items()} == TOPICS
    assert damage and damage.messages_lost == 0


def test_a_row_that_is_told_to_reach_beyond_the_database_is_counted(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "sqlite3")
    file = storage_file(path)
    data = bytearray(file.read_bytes())
    at = data.rindex(b"\xd4\x7c")  # the length of the last image's row
    data[at + 1] = (
        0x7F  # its end does not fit into the last page, the number of the next is past it
    )
    file.write_bytes(data)
    found, damage = read(path)
    assert damage.messages_lost == 1
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT - 1


def test_a_cut_off_bag_of_ros_1_gives_all_that_is_there(tmp_path, pictures):
    path = tmp_path / "drive.bag"
    messages = [
        (IMAGE_TOPIC, sample_bags.stamp(i), sample_bags.image_message(p, types=ROS1.types))
        for i, p in enumerate(pictures)
    ]
    sample_bags.write_ros1_bag(path, messages)
    cut(path, 0.5)
    with BagReader(path) as reader:
        decoded = [from_message(reader.decode(message)).pixels for message in reader.messages()]
        assert 8 <= len(decoded) <= 10
        np.testing.assert_array_equal(decoded, pictures[: len(decoded)])
        assert reader.damage.bytes_lost > 0


@pytest.mark.parametrize("compression", ["bz2", "lz4"])
def test_a_cut_off_compressed_bag_of_ros_1_gives_all_that_is_there(tmp_path, pictures, compression):
    path = tmp_path / "drive.bag"
    writer = Ros1Writer(path)
    writer.set_compression(Ros1Writer.CompressionFormat[compression.upper()])
    writer.chunk_threshold = 2 * pictures[0].nbytes
    with writer:
        connection = writer.add_connection(IMAGE_TOPIC, "sensor_msgs/msg/Image", typestore=ROS1)
        for number, picture in enumerate(pictures):
            message = sample_bags.image_message(picture, types=ROS1.types)
            data = ROS1.serialize_ros1(message, message.__msgtype__)
            writer.write(connection, sample_bags.stamp(number), data)
    lost = cut(path, 0.6)
    with BagReader(path) as reader:
        decoded = [from_message(reader.decode(message)).pixels for message in reader.messages()]
        assert 0.6 * COUNT - 4 <= len(decoded) <= 0.6 * COUNT
        np.testing.assert_array_equal(decoded, pictures[: len(decoded)])
        assert 0 < reader.damage.bytes_lost < lost + 40_000


@pytest.mark.parametrize("where", ["header", "length"])
def test_behind_a_damaged_chunk_of_ros_1_reading_goes_on(tmp_path, pictures, where):
    path = tmp_path / "drive.bag"
    messages = [
        (IMAGE_TOPIC, sample_bags.stamp(i), sample_bags.image_message(p, types=ROS1.types))
        for i, p in enumerate(pictures)
    ]
    sample_bags.write_ros1_bag(path, messages, chunk_bytes=2 * pictures[0].nbytes)
    data = bytearray(path.read_bytes())
    chunks = [m.start() for m in re.finditer(rb"compression=none", data)]
    assert len(chunks) > 4
    header = chunks[2] - 8  # the lengths of the header and of its first field
    (length,) = struct.unpack_from("<I", data, header)
    place = header if where == "header" else header + 4 + length
    data[place : place + 4] = b"\xff\xff\x7f\x00"
    path.write_bytes(data[:-20])  # without its end, so that the index is of no use
    with BagReader(path) as reader:
        found = [message.time for message in reader.messages()]
        assert found == sorted(set(found))
        assert len(found) >= COUNT - 3 and found[-1] == sample_bags.stamp(COUNT - 1)
        assert reader.damage


def test_a_message_that_cannot_be_decompressed_is_counted(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "mcap", "message")
    file = storage_file(path)
    data = bytearray(file.read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 4] == b"\x28\xb5\x2f\xfd"]
    data[places[7]] ^= 0xFF
    file.write_bytes(data)
    found, damage = read(path)
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT - 1
    assert damage.messages_lost == 1
    # one that vanished besides is not taken for it, whatever topic it was on
    metadata = (path / "metadata.yaml").read_text()
    assert metadata.count(f"message_count: {COUNT}\n") == 2
    (path / "metadata.yaml").write_text(
        metadata.replace(f"message_count: {COUNT}\n", f"message_count: {COUNT + 1}\n")
    )
    assert read(path)[1].messages_lost == 3


def test_a_message_of_an_impossible_time_is_counted(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows, "sqlite3")
    with closing(sqlite3.connect(storage_file(path))) as database:
        database.execute("UPDATE messages SET timestamp = -5 WHERE id = 3")
        database.commit()
    found, damage = read(path)
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT - 1
    assert damage.messages_lost == 1 and "impossible time (-5 ns)" in damage.places[0]
    late = [*rows[:-1], (rows[-1][0], 2**63, rows[-1][2])]
    found, damage = read(write_mcap(tmp_path / "late.mcap", late))
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT - 1
    assert damage.messages_lost == 1 and f"({2**63} ns)" in damage.places[0]


@pytest.mark.parametrize("kind", ["mcap", "ros 1"])
def test_definitions_of_types_are_found_in_damaged_files_too(tmp_path, rows, pictures, kind):
    if kind == "mcap":
        path = storage_file(sample_bags.write_bag(tmp_path / "bag", rows))
    else:
        path = tmp_path / "drive.bag"
        message = sample_bags.image_message(pictures[0], types=ROS1.types)
        sample_bags.write_ros1_bag(path, [(IMAGE_TOPIC, START + i, message) for i in range(9)])
    cut(path, 0.7)
    with BagReader(path) as reader:
        assert "uint32 height" in reader.definition(IMAGE_TOPIC).data


def test_damage_that_is_read_twice_is_counted_once(tmp_path, rows):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS["zstd"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: len(data) * 3 // 4])
    with BagReader(path) as reader:
        once = [message.time for message in reader.messages()]
        before = reader.damage.bytes_lost, reader.damage.messages_lost, len(reader.damage.places)
        assert [message.time for message in reader.messages()] == once
        again = reader.damage.bytes_lost, reader.damage.messages_lost, len(reader.damage.places)
    assert before == again and before[0] > 0


@pytest.mark.parametrize("kind", ["no chunks", "one chunk"])
def test_a_message_with_a_wrong_first_bit_is_no_record_of_an_application(tmp_path, rows, kind):
    path = write_mcap(tmp_path / "bag.mcap", rows, **MCAPS[kind])
    data = bytearray(path.read_bytes())
    payload = bytes(ROS2.serialize_cdr(rows[7][2], rows[7][2].__msgtype__))
    record = data.find(payload) - 22 - 9  # behind the headers of record and message
    assert data[record] == 0x05
    data[record] = 0x85
    path.write_bytes(data[:-37])
    found, damage = read(path)
    assert sum(len(messages) for messages in found.values()) == 2 * COUNT - 1
    assert damage.bytes_lost >= len(payload)
    assert damage.messages_lost == 1


def test_no_room_to_decompress_a_file_is_named(tmp_path, rows, monkeypatch):
    file = storage_file(sample_bags.write_bag(tmp_path / "bag", rows))
    packed = tmp_path / f"{file.name}.zstd"
    packed.write_bytes(zstd.compress(file.read_bytes()))
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    with (
        files_up_to(20_000),
        pytest.raises(InputError, match=r"zstd: .* into .*/small: File too large; set TMPDIR"),
    ):
        BagReader(packed)
    assert not list((tmp_path / "small").iterdir())


def test_messages_that_vanish_without_an_error_are_counted(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    text = (path / "metadata.yaml").read_text()
    (path / "metadata.yaml").write_text(
        text.replace(f"message_count: {COUNT}\n", f"message_count: {COUNT + 4}\n", 1)
    )
    found, damage = read(path)
    missing = Counter(TOPICS)
    missing.subtract({topic: len(messages) for topic, messages in found.items()})
    assert not any(missing.values())
    assert damage.messages_lost == 4
    assert "4 of 24 messages" in damage.places[0]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_reading_changes_nothing(tmp_path, rows, storage, damaged):
    path = sample_bags.write_bag(tmp_path / "bag", rows, storage)
    if damaged:
        cut(storage_file(path), 0.7)

    def state():
        return {
            f.name: (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns)
            for f in path.iterdir()
        }

    before = state()
    read(path)
    assert state() == before


def test_start_time_is_that_of_the_first_message(tmp_path, rows):
    path = sample_bags.write_bag(tmp_path / "bag", rows)
    with BagReader(path) as reader:
        assert reader.start_time == START + 123 + 5_000_000
    with BagReader(sample_bags.write_bag(tmp_path / "empty", [])) as reader:
        assert reader.start_time is None and list(reader.messages()) == [] and not reader.damage
