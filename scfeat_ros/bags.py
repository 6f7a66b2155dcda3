"""Reading recorded bags without ROS: ROS 2 (mcap, sqlite3, compressed or not) and ROS 1."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rosbags.interfaces import Connection, MessageDefinition
from rosbags.rosbag1 import Reader as Ros1Reader
from rosbags.rosbag2 import Reader as Ros2Reader
from rosbags.typesys import Stores, get_typestore

from scfeat_ros.errors import InputError
from scfeat_ros.names import natural_order
from scfeat_ros.recovery import (
    Damage,
    McapRecovery,
    RawMessage,
    RecoveredFile,
    RosbagRecovery,
    SqliteRecovery,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
_MAGIC = {b"\x89MCAP0": ".mcap", b"SQLite": ".db3", b"#ROSBA": ".bag"}
_END_OF_TIME = 2**63
"""Nanoseconds; recorded times are smaller."""
_WAL_HEADER = 32
"""Bytes of SQLite's write-ahead log before its first page."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_RECOVERIES: dict[str, type[RecoveredFile]] = {
    ".mcap": McapRecovery,
    ".db3": SqliteRecovery,
    ".bag": RosbagRecovery,
}


class UnreadableMessageError(ValueError):
    """One message cannot be decoded; later ones may be fine.

    Args:
        message: the message that does not fit its type.
        error: the decoder's exception.
    """

    def __init__(self, message: RawMessage, error: Exception) -> None:
        super().__init__(
            f"message of {message.topic} at {message.time} ns is not a valid {message.type}: "
            f"{error!r}"
        )


class Topic(NamedTuple):
    """A topic of a bag."""

    name: str
    type: str
    count: int | None
    """Number of messages; None if unknown."""


class BagReader:
    """A bag, opened for reading; damaged files are read as far as possible.

    The files of a split bag are read one after the other. Nothing is written next to the input.

    Args:
        path: a rosbag2 folder, an .mcap or .db3 file, or a ROS 1 .bag file.

    Attributes:
        topics: of all files, by name.
        damage: what could not be read; complete once `messages` has come to its end.
        is_ros1: whether the messages are of ROS 1.
        typestore: the standard message types of ROS 2 Jazzy or ROS 1 Noetic.

    Raises:
        InputError: there is no bag, its format is not supported, or there is no disk space to
            decompress it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.damage = Damage()
        self._stack = ExitStack()
        # None: not known, since there is no metadata.yaml
        self._message_compression: bool | None = None
        with ExitStack() as undo:
            undo.push(self._stack)
            self._metadata_counts: dict[str, int] = {}
            self._metadata_start: int | None = None
            files = self._find_files()
            self.is_ros1 = any(_suffix(file) == ".bag" for file in files)
            self._files = [self._stack.enter_context(_BagFile(file, self.damage)) for file in files]
            undo.pop_all()
        self.typestore = get_typestore(Stores.ROS1_NOETIC if self.is_ros1 else Stores.ROS2_JAZZY)
        self.topics = self._list_topics()

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and remove temporary copies of them."""
        self._stack.close()

    @property
    def image_topics(self) -> list[Topic]:
        return [topic for topic in self.topics.values() if topic.type in IMAGE_TYPES]

    @property
    def start_time(self) -> int | None:
        """Time of the first message in nanoseconds; None without an index and metadata."""
        if self.is_indexed:
            return min(file.times[0] for file in self._files)
        return self._metadata_start

    @property
    def is_indexed(self) -> bool:
        """Whether a time range can be read without reading everything before it."""
        return all(file.times for file in self._files)

    def connection(self, topic: str) -> Connection | None:
        """rosbags' connection of a topic; None in a damaged file."""
        for file in self._files:
            for connection in file.connections:
                if connection.topic == topic:
                    return connection
        return None

    def definition(self, topic: str) -> MessageDefinition | None:
        """The definition of a topic's message type; None if the bag does not contain it."""
        for file in self._files:
            definition = file.definitions.get(self.topics[topic].type)
            if definition is not None and definition.data:
                return definition
        return None

    def messages(
        self,
        topics: Collection[str] | None = None,
        start: int | None = None,
        stop: int | None = None,
        complete: bool = True,
    ) -> Iterator[RawMessage]:
        """Messages in order of time, file by file.

        Args:
            topics: names, None for all.
            start, stop: only messages recorded in [start, stop), nanoseconds.
            complete: whether to compare the number of messages with the one that the bag states,
                and add what is missing to `damage`; only without a time range.
        """
        wanted = set(self.topics) if topics is None else set(topics)
        read: Counter[str] = Counter()
        known_lost = self.damage.messages_lost
        for file in self._files:
            for count, message in enumerate(file.messages(wanted, start, stop), start=1):
                if not 0 <= message.time < _END_OF_TIME:
                    self.damage.add(
                        f"{file.path.name}: a message of {message.topic}, number {count} of the "
                        f"file, has an impossible time ({message.time} ns)",
                        len(message.data),
                        1,
                    )
                    continue
                if self._is_compressed(message):
                    try:
                        message = message._replace(data=zstd.decompress(message.data))
                    except (zstd.ZstdError, EOFError) as error:
                        self.damage.add(
                            f"{file.path.name}: a message of {message.topic} at "
                            f"{message.time} ns cannot be decompressed ({error})",
                            len(message.data),
                            1,
                        )
                        continue
                read[message.topic] += 1
                yield message
        if complete and start is None and stop is None:
            self._compare_counts(wanted, read, known_lost)

    def _is_compressed(self, message: RawMessage) -> bool:
        if self._message_compression is None:
            # a serialized ROS 2 message begins with a zero byte
            return not self.is_ros1 and message.data[:4] == _ZSTD_MAGIC
        return self._message_compression

    def decode(self, message: RawMessage) -> Any:
        """The message as rosbags' dataclass.

        Raises:
            UnreadableMessageError: its bytes do not fit its type.
        """
        deserialize = (
            self.typestore.deserialize_ros1 if self.is_ros1 else self.typestore.deserialize_cdr
        )
        try:
            return deserialize(message.data, message.type)
        except Exception as error:  # generated code may raise anything on damaged bytes
            raise UnreadableMessageError(message, error) from error

    def _compare_counts(self, wanted: set[str], read: Counter[str], known_lost: int) -> None:
        """Add messages to `damage` that are missing without a read error."""
        explained = self.damage.messages_lost - known_lost
        for name in sorted(wanted & self.topics.keys()):
            expected = self.topics[name].count
            if expected is None or read[name] >= expected:
                continue
            missing = expected - read[name]
            self.damage.add(
                f"{self.path.name}: {missing} of {expected} messages of {name} are missing",
                lost_messages=max(0, missing - explained),
            )
            explained = max(0, explained - missing)

    def _list_topics(self) -> dict[str, Topic]:
        types: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for file in self._files:
            types |= file.topics
            counts.update(file.counts)
        expected = dict(counts) | self._metadata_counts
        return {name: Topic(name, types[name], expected.get(name)) for name in sorted(types)}

    def _find_files(self) -> list[Path]:
        path = self.path
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if not path.is_dir():
            return [self._readable(path)]
        if (path / "metadata.yaml").is_file():
            names = self._read_metadata(path / "metadata.yaml")
        else:
            names = []
        if not names:
            found = (f.name for f in path.iterdir() if _suffix(f) in (".mcap", ".db3"))
            names = sorted(found, key=natural_order)
            if not names:
                raise InputError(
                    f"{path}: this folder is not a bag, it has neither metadata.yaml nor .mcap or "
                    ".db3 files (for a folder of pictures use `scfeat images`)"
                )
            self.damage.add(f"{path.name}: metadata.yaml is missing or empty")
        present = [name for name in names if (path / name).is_file()]
        for name in names:
            if name not in present:
                self.damage.add(f"{path.name}: the file {name} is missing")
        if not present:
            raise InputError(f"{path}: metadata.yaml names {', '.join(names)}, none is there")
        return [self._readable(path / name) for name in present]

    def _read_metadata(self, path: Path) -> list[str]:
        """File names, message counts and compression of a rosbag2 folder."""
        try:
            metadata = yaml.safe_load(path.read_text(encoding="utf-8"))
            information = metadata["rosbag2_bagfile_information"]
            self._metadata_counts = {
                entry["topic_metadata"]["name"]: int(entry["message_count"])
                for entry in information["topics_with_message_count"]
            }
            mode = str(information.get("compression_mode") or "").lower()
            self._message_compression = mode == "message"
            start = int(information["starting_time"]["nanoseconds_since_epoch"])
            # an empty bag has the largest possible number here
            self._metadata_start = start if 0 <= start < _END_OF_TIME - 1 else None
            return [Path(name).name for name in information["relative_file_paths"]]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.damage.add(f"{path.name} cannot be read: {error}".replace("\n", " "))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.damage.add(f"{path.name} is damaged: {error!r}")
        self._metadata_counts, self._metadata_start = {}, None
        return []

    def _readable(self, path: Path) -> Path:
        """The file, or a temporary copy if it is compressed or its recorder was killed."""
        journal = path.with_name(f"{path.name}-wal")
        if path.suffix == ".zstd":
            return self._decompressed(path)
        if path.suffix == ".db3" and journal.is_file() and journal.stat().st_size > _WAL_HEADER:
            return self._completed(path, journal)
        return path

    def _temporary_folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="scfeat-")))

    def _completed(self, path: Path, journal: Path) -> Path:
        """A copy of a database into which SQLite's write-ahead log is merged."""
        copy = self._temporary_folder() / path.name
        try:
            shutil.copyfile(path, copy)
            shutil.copyfile(journal, copy.with_name(journal.name))
            with closing(sqlite3.connect(copy)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (OSError, sqlite3.Error) as error:
            self.damage.add(
                f"{journal.name}, left by a killed recorder, cannot be merged into a copy of the "
                f"bag in TMPDIR: {error}",
                journal.stat().st_size,
            )
            return path
        return copy

    def _decompressed(self, path: Path) -> Path:
        copy = self._temporary_folder() / path.stem
        with copy.open("wb") as out, path.open("rb") as packed:
            try:
                with zstd.open(packed, "rb") as unpacked:
                    shutil.copyfileobj(unpacked, out)
            except (zstd.ZstdError, EOFError) as error:
                self.damage.add(
                    f"{path.name}: cannot be decompressed beyond byte {packed.tell()} ({error})",
                    path.stat().st_size - packed.tell(),
                )
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be decompressed into {copy.parent.parent}: {error.strerror}; "
                    "set TMPDIR to a folder with more room"
                ) from error
        return copy


class _BagFile:
    """One storage file: read by rosbags, and, where that fails, by the recovery reader."""

    def __init__(self, path: Path, damage: Damage) -> None:
        self.path = path
        self.damage = damage
        self.connections: list[Connection] = []
        self.counts: dict[str, int] = {}
        self.definitions: dict[str, MessageDefinition] = {}
        self.times: tuple[int, int] | None = None
        self._reader: Ros1Reader | Ros2Reader | None = None
        self._recovery: RecoveredFile | None = None
        try:
            kind = _kind(path)
            self._reader = Ros1Reader(path) if kind == ".bag" else Ros2Reader(path)
            self._reader.open()
            self.connections = list(self._reader.connections)
        except InputError:
            raise
        except Exception as error:  # rosbags may raise anything on a damaged file
            self._reader = None
            self._recover(error)
        else:
            self.topics = {c.topic: c.msgtype for c in self.connections}
            self.definitions = {c.msgtype: c.msgdef for c in self.connections}
            for connection in self.connections:
                self.counts[connection.topic] = (
                    self.counts.get(connection.topic, 0) + connection.msgcount
                )
            if self._reader.message_count:
                self.times = self._reader.start_time, self._reader.end_time

    def __enter__(self) -> _BagFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._recovery is not None:
            self._recovery.close()

    def _recover(self, error: Exception, is_damage: bool = True) -> RecoveredFile:
        """Switch to the recovery reader."""
        if is_damage:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.damage.add(f"{self.path.name}: {reason}")
        self._recovery = _RECOVERIES[_kind(self.path)](self.path, self.damage)
        if self._reader is None:
            self.topics = self._recovery.topics
            self.counts = self._recovery.counts
            self.definitions = self._recovery.definitions
        return self._recovery

    def messages(
        self, topics: set[str], start: int | None, stop: int | None
    ) -> Iterator[RawMessage]:
        """Messages of the topics in [start, stop)."""
        seen = _Seen()
        in_file_order = False
        if self._recovery is None:
            chosen = [c for c in self.connections if c.topic in topics]
            if not chosen:
                return
            messages = self._reader.messages(chosen, start, stop)
            while True:
                try:
                    connection, time, data = next(messages)
                except StopIteration:
                    return
                except Exception as error:  # see above
                    # rosbags also refuses intact files whose messages are unsorted and not indexed
                    in_file_order = "timestamp order" in str(error)
                    self._recover(error, is_damage=not in_file_order)
                    break
                message = RawMessage(connection.topic, connection.msgtype, time, bytes(data))
                seen.add(message)
                yield message
        for message in self._recovery.messages():
            outside = (start is not None and message.time < start) or (
                stop is not None and message.time >= stop
            )
            if message.topic not in topics or outside:
                continue
            if not (seen.skip_first() if in_file_order else seen.skip(message)):
                yield message


class _Seen:
    """Which messages the first reader gave, for the second one, which starts from the beginning."""

    def __init__(self) -> None:
        self._count = 0
        self._latest = -1
        self._at_latest: Counter[str] = Counter()

    def add(self, message: RawMessage) -> None:
        """Note a message of the first reader."""
        self._count += 1
        if message.time > self._latest:
            self._latest = message.time
            self._at_latest.clear()
        self._at_latest[message.topic] += 1

    def skip(self, message: RawMessage) -> bool:
        """Whether the first reader, in order of time, gave this message."""
        if message.time == self._latest and self._at_latest[message.topic]:
            self._at_latest[message.topic] -= 1
            return True
        return message.time < self._latest

    def skip_first(self) -> bool:
        """Whether the first reader, in the order of the file, gave the next message."""
        self._count -= 1
        return self._count >= 0


def _suffix(path: Path) -> str:
    """The file's suffix without that of a compression."""
    return Path(path.stem).suffix if path.suffix == ".zstd" else path.suffix


def _kind(path: Path) -> str:
    """The format of a file by its name: .mcap, .db3 or .bag.

    Raises:
        InputError: another suffix.
    """
    if path.suffix in _RECOVERIES:
        return path.suffix
    try:
        with path.open("rb") as file:
            content = _MAGIC.get(file.read(6))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if content:
        raise InputError(f"{path}: rename this file so that its name ends with {content}")
    raise InputError(
        f"{path}: this file is not a bag; give a rosbag2 folder, an .mcap or .db3 file, or a ROS 1 "
        ".bag file (for a video use `scfeat images`)"
    )
