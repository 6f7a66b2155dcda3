"""Readers of damaged bag files: they recover every intact message and list what is lost.

A recording that was cut off (power loss, full disk, interrupted copy) lacks the index that ordinary
readers need. These readers scan the file itself: an mcap or ROS 1 bag chunk by chunk, a sqlite3
database page by page. Parts that cannot be read are recorded and skipped.
"""

from __future__ import annotations

import bz2
import mmap
import re
import struct
import sys
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import lz4.frame
from rosbags.interfaces import MessageDefinition, MessageDefinitionFormat

from scfeat_ros.names import printable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LONGEST_LIST = 50


@dataclass
class Damage:
    """What could not be read.

    Attributes:
        bytes_lost: bytes of files that could not be used.
        messages_lost: messages known to be lost; where their number is unknown, only bytes are
            counted.
        places: one line for each damaged place, at most 50 and then one that says there are more.
    """

    bytes_lost: int = 0
    messages_lost: int = 0
    places: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: set[str] = set()

    def add(self, place: str, lost_bytes: int = 0, lost_messages: int = 0) -> None:
        """Record a place, once even if it is read again."""
        if place in self._known:
            return
        self._known.add(place)
        self.bytes_lost += lost_bytes
        self.messages_lost += lost_messages
        if len(self.places) < _LONGEST_LIST:
            self.places.append(printable(place))
        elif len(self.places) == _LONGEST_LIST:
            self.places.append("... and more places")

    def __bool__(self) -> bool:
        return bool(self.places)


class RawMessage(NamedTuple):
    """A serialized message of a bag."""

    topic: str
    type: str
    time: int
    """When it was recorded, nanoseconds."""
    data: bytes


class RecoveredFile:
    """Base of the readers: a file mapped into memory, its topics and its damage.

    Attributes:
        topics: topic -> message type, as far as known.
        counts: topic -> number of messages, if the file states it.
        definitions: message type -> its definition, if the file contains it.
        damage: grows while messages are read.
    """

    def __init__(self, path: Path, damage: Damage) -> None:
        self.path = path
        self.damage = damage
        self.topics: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.definitions: dict[str, MessageDefinition] = {}
        self._file = path.open("rb")
        self.size = path.stat().st_size
        # an empty file cannot be mapped
        self._bytes = (
            mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        )

    def messages(self) -> Iterator[RawMessage]:
        """All messages that can be read, in the order of the file."""
        raise NotImplementedError

    def close(self) -> None:
        if self.size:
            self._bytes.close()
        self._file.close()


# --- mcap --------------------------------------------------------------------------------------

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _STATISTICS = 0x02, 0x03, 0x04, 0x05, 0x06, 0x0B
_OPCODES = frozenset([*range(0x01, 0x10), *range(0x80, 0x100)])
"""Of the format's records and, from 0x80 on, of application-specific ones, which readers skip."""
_DEFINITION_FORMATS = {
    "ros2msg": MessageDefinitionFormat.MSG,
    "ros2idl": MessageDefinitionFormat.IDL,
}
_LONGEST_STRETCH = 2**22
_RECORD_HEADER = struct.Struct("<BQ")
_MESSAGE_HEADER = struct.Struct("<HIQQ")
# start, end, decompressed size, CRC-32, length of the compression's name
_CHUNK_HEADER = struct.Struct("<QQQII")
_CHUNK_PATTERN = re.compile(rb"\x06.{6}\0\0.{28}(?:\0{4}|\x03\0{3}lz4|\x04\0{3}zstd)", re.DOTALL)
_MESSAGE_PATTERN = re.compile(rb"\x05.{4}\0{4}", re.DOTALL)


class _Stretch(NamedTuple):
    """Part of an mcap that holds messages: a chunk's content, or bare message records."""

    start: int
    stop: int
    compression: str = ""
    crc: int = 0
    size: int | None = None
    """Decompressed size where it is a chunk."""


class McapRecovery(RecoveredFile):
    """Reads an mcap from front to back without its index."""

    def __init__(self, path: Path, damage: Damage) -> None:
        super().__init__(path, damage)
        self._schemas: dict[int, str] = {}
        self._channels: dict[int, tuple[str, str]] = {}
        self._counts: dict[int, int] = {}
        self._stretches = list(self._scan())
        # without the summary, channels are found in the chunks
        if not self._channels:
            for stretch in self._stretches:
                self._messages(stretch, Damage())
        self.topics = dict(self._channels.values())
        self.counts = {
            self._channels[key][0]: count
            for key, count in self._counts.items()
            if key in self._channels
        }

    def messages(self) -> Iterator[RawMessage]:
        for stretch in self._stretches:
            yield from self._messages(stretch, self.damage)

    def _scan(self) -> Iterator[_Stretch]:
        """Find all stretches, and read the schemas and channels between them."""
        position = len(_MCAP_MAGIC)
        while position < self.size:
            record = self._record(position)
            if record is None:
                position = yield from self._skip_damage(position)
                continue
            opcode, start, stop = record
            if opcode == _FOOTER:
                return
            if opcode == _CHUNK:
                chunk = self._chunk(start, stop)
                if chunk is None:
                    position = yield from self._skip_damage(position)
                    continue
                yield chunk
            elif opcode == _MESSAGE:
                while (
                    stop - position < _LONGEST_STRETCH
                    and (after := self._record(stop))
                    and after[0] == _MESSAGE
                ):
                    stop = after[2]
                yield _Stretch(position, stop)
            elif self._is_flipped(opcode, self._bytes[start : start + _MESSAGE_HEADER.size]):
                position = yield from self._skip_damage(position)
                continue
            else:
                self._declare(opcode, bytes(self._bytes[start:stop]), self.damage)
            position = stop
        self.damage.add(f"{self.path.name}: ends after {self.size} bytes without an index")

    def _record(self, position: int) -> tuple[int, int, int] | None:
        """Opcode, start and end of the record at a position; None if there is no whole one."""
        if position + _RECORD_HEADER.size > self.size:
            return None
        opcode, length = _RECORD_HEADER.unpack_from(self._bytes, position)
        start = position + _RECORD_HEADER.size
        if opcode not in _OPCODES or start + length > self.size:
            return None
        return opcode, start, start + length

    def _chunk(self, start: int, stop: int) -> _Stretch | None:
        """The content of the chunk whose record is [start, stop); None if it is no chunk.

        Where the file ends before `stop`, so does the content.
        """
        if start + _CHUNK_HEADER.size > self.size:
            return None
        _, _, size, crc, name_length = _CHUNK_HEADER.unpack_from(self._bytes, start)
        if name_length > 4:
            return None
        content = start + _CHUNK_HEADER.size + name_length + 8
        name = bytes(self._bytes[content - 8 - name_length : content - 8])
        if content > self.size or name not in (b"", b"lz4", b"zstd"):
            return None
        (length,) = struct.unpack_from("<Q", self._bytes, content - 8)
        if content + length != stop:
            return None
        return _Stretch(content, min(stop, self.size), name.decode(), crc, size)

    def _skip_damage(self, position: int) -> Generator[_Stretch, None, int]:
        """Record the damage at a position, yield what is left of it, return where to continue."""
        resume = self._resynchronize(position + 1)
        if resume is None and position + _RECORD_HEADER.size <= self.size:
            # cut off: the last chunk or message reaches beyond the end of the file
            opcode, length = _RECORD_HEADER.unpack_from(self._bytes, position)
            start = position + _RECORD_HEADER.size
            chunk = self._chunk(start, start + length) if opcode == _CHUNK else None
            if chunk is not None:
                yield chunk
                return self.size
        resume = self.size if resume is None else resume
        self.damage.add(
            f"{self.path.name}: bytes {position} to {resume} cannot be read", resume - position
        )
        return resume

    def _resynchronize(self, position: int) -> int | None:
        """The next place from a position on where a chunk or a known channel's message starts."""
        chunks = (m.start() for m in _CHUNK_PATTERN.finditer(self._bytes, position))
        places = [next(filter(self._is_chunk, chunks), None)]
        # channels are known at this point only where messages lie outside of chunks
        if self._channels:
            messages = (m.start() for m in _MESSAGE_PATTERN.finditer(self._bytes, position))
            places.append(next(filter(self._is_message, messages), None))
        return min((place for place in places if place is not None), default=None)

    def _is_chunk(self, position: int) -> bool:
        (length,) = struct.unpack_from("<Q", self._bytes, position + 1)
        start = position + _RECORD_HEADER.size
        return self._chunk(start, start + length) is not None

    def _is_message(self, position: int) -> bool:
        record = self._record(position)
        if record is None or record[2] - record[1] < _MESSAGE_HEADER.size:
            return False
        channel = _MESSAGE_HEADER.unpack_from(self._bytes, record[1])[0]
        return channel in self._channels and (
            record[2] == self.size or self._record(record[2]) is not None
        )

    def _messages(self, stretch: _Stretch, damage: Damage) -> list[RawMessage]:
        """The messages of a stretch; its schemas and channels are registered."""
        place = f"{self.path.name}: chunk at byte {stretch.start}"
        data = bytes(self._bytes[stretch.start : stretch.stop])
        if stretch.compression:
            data = _decompress_prefix(data, stretch.compression)
        if stretch.size is not None and len(data) != stretch.size:
            damage.add(
                f"{place}: {len(data)} of {stretch.size} bytes can be read",
                max(0, stretch.size - len(data)),
            )
        elif stretch.crc and zlib.crc32(data) != stretch.crc:
            damage.add(f"{place}: wrong checksum, its messages are used as they are")
        found, unknown, position = [], 0, 0
        while position + _RECORD_HEADER.size <= len(data):
            opcode, length = _RECORD_HEADER.unpack_from(data, position)
            start = position + _RECORD_HEADER.size
            stop = start + length
            if opcode not in _OPCODES or stop > len(data):
                break
            if opcode == _MESSAGE and length >= _MESSAGE_HEADER.size:
                channel, _, time, _ = _MESSAGE_HEADER.unpack_from(data, start)
                if channel in self._channels:
                    content = data[start + _MESSAGE_HEADER.size : stop]
                    found.append(RawMessage(*self._channels[channel], time, content))
                else:
                    unknown += 1
            elif self._is_flipped(opcode, data[start:stop]):
                damage.add(f"{place}: the record at {position} in it is damaged", length, 1)
            else:
                self._declare(opcode, data[start:stop], damage)
            position = stop
        if position < len(data):
            rest = len(data) - position
            damage.add(f"{place}: the last {rest} bytes hold no whole message", rest)
        if unknown:
            damage.add(f"{place}: {unknown} messages of unknown topics", lost_messages=unknown)
        # messages of a chunk are sorted, as by other readers; others are in the order of the file
        return found if stretch.size is None else sorted(found, key=lambda message: message.time)

    def _is_flipped(self, opcode: int, body: bytes) -> bool:
        """Whether a seemingly application-specific record is a message with a flipped high bit."""
        if opcode != _MESSAGE | 0x80 or len(body) < _MESSAGE_HEADER.size:
            return False
        return _MESSAGE_HEADER.unpack_from(body)[0] in self._channels

    def _declare(self, opcode: int, body: bytes, damage: Damage) -> None:
        """Register a schema, a channel or the statistics."""
        try:
            if opcode == _SCHEMA:
                (key,) = struct.unpack_from("<H", body)
                name, end = _string(body, 2)
                encoding, end = _string(body, end)
                self._schemas[key] = name
                if encoding in _DEFINITION_FORMATS:
                    text, _ = _string(body, end)
                    kind = _DEFINITION_FORMATS[encoding]
                    self.definitions[name] = MessageDefinition(kind, text)
            elif opcode == _CHANNEL:
                key, schema = struct.unpack_from("<HH", body)
                topic, end = _string(body, 4)
                encoding, _ = _string(body, end)
                if encoding == "cdr" and schema in self._schemas:
                    self._channels[key] = (topic, self._schemas[schema])
            elif opcode == _STATISTICS:
                (length,) = struct.unpack_from("<I", body, 42)
                self._counts = dict(struct.iter_unpack("<HQ", body[46 : 46 + length]))
        except (struct.error, UnicodeDecodeError) as error:
            damage.add(f"{self.path.name}: a declaration cannot be read ({error})", len(body))


def _string(data: bytes, position: int) -> tuple[str, int]:
    """The length-prefixed text at a position, and where it ends."""
    (length,) = struct.unpack_from("<I", data, position)
    end = position + 4 + length
    if end > len(data):
        raise struct.error(f"text of {length} bytes")
    return data[position + 4 : end].decode(), end


def _decompress_prefix(data: bytes, compression: str) -> bytes:
    """As much of a damaged or truncated zstd, lz4 or bz2 frame as can be decompressed."""
    decompressors = {
        "zstd": zstd.ZstdDecompressor,
        "lz4": lz4.frame.LZ4FrameDecompressor,
        "bz2": bz2.BZ2Decompressor,
    }
    if compression not in decompressors:
        return b""
    decompressor = decompressors[compression]()
    pieces, step = [], 1 << 14
    try:
        for start in range(0, len(data), step):
            pieces.append(decompressor.decompress(data[start : start + step]))
            if decompressor.eof:
                break
    except (zstd.ZstdError, RuntimeError, EOFError, OSError):
        pass
    return b"".join(pieces)


# --- ROS 1 bags --------------------------------------------------------------------------------

_ROS1_MESSAGE, _ROS1_CHUNK, _ROS1_CONNECTION = 2, 5, 7
_ROS1_HEADER = 100
"""Bytes of a chunk's header, at most."""


class RosbagRecovery(RecoveredFile):
    """Reads a ROS 1 bag from front to back without its index.

    The format is that of http://wiki.ros.org/Bags/Format/2.0.
    """

    def __init__(self, path: Path, damage: Damage) -> None:
        super().__init__(path, damage)
        self._connections: dict[int, tuple[str, str]] = {}
        # connections are declared inside of chunks, before their first message
        for _ in self._messages(Damage()):
            pass
        self.topics = dict(self._connections.values())

    def messages(self) -> Iterator[RawMessage]:
        yield from self._messages(self.damage)

    def _messages(self, damage: Damage) -> Iterator[RawMessage]:
        position = searched = self._bytes.find(b"\n") + 1 if self.size else 0
        while position < self.size:
            header, start, stop = _ros1_record(self._bytes, position)
            if header is None or b"op" not in header:
                # the previous record's length may be damaged and too large
                following = _next_ros1_chunk(self._bytes, searched)
                lost = max(0, following - position)
                damage.add(f"{self.path.name}: damaged before byte {following}", lost)
                position = searched = following
                continue
            searched = start
            if header.get(b"op") == bytes([_ROS1_CHUNK]):
                place = f"{self.path.name}: chunk at byte {position}"
                data = bytes(self._bytes[start : min(stop, self.size)])
                compression = header.get(b"compression", b"none").decode(errors="replace")
                if compression != "none":
                    data = _decompress_prefix(data, compression)
                size = int.from_bytes(header.get(b"size", b""), "little")
                if len(data) < size:
                    damage.add(
                        f"{place}: {len(data)} of {size} bytes can be read", size - len(data)
                    )
                yield from self._chunk_messages(data, place, damage)
            elif stop > self.size:
                damage.add(
                    f"{self.path.name}: ends inside of the record at byte {position}",
                    self.size - position,
                )
            position = stop if stop <= self.size else _next_ros1_chunk(self._bytes, start)

    def _chunk_messages(self, data: bytes, place: str, damage: Damage) -> Iterator[RawMessage]:
        position = 0
        while position < len(data):
            header, start, stop = _ros1_record(data, position)
            if header is None or stop > len(data):
                rest = len(data) - position
                damage.add(f"{place}: the last {rest} bytes hold no whole message", rest)
                return
            operation = int.from_bytes(header.get(b"op", b""), "little")
            connection = int.from_bytes(header.get(b"conn", b""), "little")
            if operation == _ROS1_CONNECTION and b"topic" in header:
                fields = _ros1_fields(data[start:stop]) or {}
                package, _, name = fields.get(b"type", b"").decode(errors="replace").partition("/")
                topic = header[b"topic"].decode(errors="replace")
                self._connections[connection] = (topic, f"{package}/msg/{name}")
                text = fields.get(b"message_definition", b"").decode(errors="replace")
                self.definitions[f"{package}/msg/{name}"] = MessageDefinition(
                    MessageDefinitionFormat.MSG, text
                )
            elif operation == _ROS1_MESSAGE and len(header.get(b"time", b"")) == 8:
                seconds, nanoseconds = struct.unpack("<II", header[b"time"])
                if connection in self._connections:
                    yield RawMessage(
                        *self._connections[connection],
                        seconds * 10**9 + nanoseconds,
                        data[start:stop],
                    )
                else:
                    damage.add(
                        f"{place}: the message at {start} in it is of an unknown topic",
                        lost_messages=1,
                    )
            position = stop


def _ros1_record(
    data: bytes | mmap.mmap, position: int
) -> tuple[dict[bytes, bytes] | None, int, int]:
    """Header of the record at a position (None if damaged), and where its data start and end."""
    if position + 4 > len(data):
        return None, position, position
    (length,) = struct.unpack_from("<I", data, position)
    start = position + 4 + length
    if start + 4 > len(data):
        return None, position, position
    header = _ros1_fields(bytes(data[position + 4 : start]))
    (length,) = struct.unpack_from("<I", data, start)
    return header, start + 4, start + 4 + length


def _next_ros1_chunk(data: mmap.mmap, position: int) -> int:
    """Where the next chunk's record begins, from a position on; the end if there is none."""
    mark = b"op=" + bytes([_ROS1_CHUNK])
    found = data.find(mark, position)
    while found >= 0:
        for start in range(max(position, found - _ROS1_HEADER), found):
            header, _, _ = _ros1_record(data, start)
            if header is not None and {b"op", b"compression", b"size"} <= header.keys():
                return start
        found = data.find(mark, found + 1)
    return len(data)


def _ros1_fields(data: bytes) -> dict[bytes, bytes] | None:
    """name=value fields, each with its length before it."""
    fields, position = {}, 0
    while position < len(data):
        if position + 4 > len(data):
            return None
        (length,) = struct.unpack_from("<I", data, position)
        name, equals, value = data[position + 4 : position + 4 + length].partition(b"=")
        if not equals:
            return None
        fields[name] = value
        position += 4 + length
    return fields


# --- sqlite3 -----------------------------------------------------------------------------------

_LEAF = 0x0D
_INTEGER_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class _Row(NamedTuple):
    time: int
    topic: int
    page: int
    cell: int
    """Offset of the row in its page."""


class SqliteRecovery(RecoveredFile):
    """Reads a rosbag2 database page by page: every row whose pages are all there.

    The format is that of https://www.sqlite.org/fileformat2.html.
    """

    def __init__(self, path: Path, damage: Damage) -> None:
        super().__init__(path, damage)
        self._page_size, self._usable, pages = self._read_header()
        missing = pages * self._page_size - self.size
        if missing > 0:
            damage.add(f"{path.name}: ends at byte {self.size}, {missing} bytes early", missing)
        self._topics: dict[int, tuple[str, str]] = {}
        self._rows: list[_Row] = []
        for page in range(self.size // self._page_size):
            self._read_leaf(page)
        self._rows.sort()
        self.topics = dict(self._topics.values())

    def messages(self) -> Iterator[RawMessage]:
        for row in self._rows:
            place = f"{self.path.name}: the message at byte {self._byte(row.page, row.cell)}"
            try:
                values = self._read_row(row.page, row.cell)[1]
            except (IndexError, struct.error):
                self.damage.add(f"{place} cannot be read", lost_messages=1)
                continue
            if row.topic not in self._topics:
                self.damage.add(f"{place} belongs to an unknown topic", lost_messages=1)
            elif not isinstance(values[3], bytes):
                self.damage.add(f"{place} is incomplete", lost_messages=1)
            else:
                yield RawMessage(*self._topics[row.topic], row.time, values[3])

    def _byte(self, page: int, offset: int) -> int:
        return page * self._page_size + offset

    def _read_header(self) -> tuple[int, int, int]:
        """Size of a page, its usable bytes, and the number of pages."""
        if self.size < 100:
            return 4096, 4096, 0
        size, _, _, reserved = struct.unpack_from(">HBBB", self._bytes, 16)
        (pages,) = struct.unpack_from(">I", self._bytes, 28)
        size = 65536 if size == 1 else size
        if size < 512 or size & (size - 1):
            self.damage.add(f"{self.path.name}: the header is damaged")
            return 4096, 4096, 0
        return size, size - reserved, pages

    def _read_leaf(self, page: int) -> None:
        """Register the rows of a page if it is a leaf of a table."""
        start = self._byte(page, 0)
        base = 100 if page == 0 else 0  # the first page begins with the file's header
        if self._bytes[start + base] != _LEAF:
            return
        (count,) = struct.unpack_from(">H", self._bytes, start + base + 3)
        pointers = start + base + 8
        if base + 8 + 2 * count > self._page_size:
            self.damage.add(f"{self.path.name}: the page at byte {start} is damaged")
            return
        for cell in struct.unpack_from(f">{count}H", self._bytes, pointers):
            try:
                key, values = self._read_row(page, cell, whole=False)
            except (IndexError, struct.error):
                self.damage.add(f"{self.path.name}: the row at byte {start + cell} is damaged")
                continue
            kinds = [type(value) for value in values[:4]]
            if kinds == [type(None), int, int, bytes] or kinds == [type(None), int, int, _Missing]:
                self._rows.append(_Row(values[2], values[1], page, cell))
            elif kinds[1:] == [str, str, str] and "/msg/" in values[2]:
                self._topics[key] = (values[1], values[2])

    def _read_row(self, page: int, cell: int, whole: bool = True) -> tuple[int, list]:
        """Row id and values of a row; without `whole`, without its overflow pages."""
        start = self._byte(page, cell)
        length, position = _varint(self._bytes, start)
        key, position = _varint(self._bytes, position)
        local = _local_length(length, self._usable)
        payload = bytearray(self._bytes[position : position + local])
        if whole and local < length <= self.size:
            (following,) = struct.unpack_from(">I", self._bytes, position + local)
            while following and len(payload) < length:
                link = self._byte(following - 1, 0)
                if link + self._page_size > self.size:
                    break
                (following,) = struct.unpack_from(">I", self._bytes, link)
                payload += self._bytes[link + 4 : link + self._usable]
            del payload[length:]
        return key, _record_values(bytes(payload))


class _Missing:
    """A value that is not there in full."""


def _local_length(length: int, usable: int) -> int:
    """How many bytes of a row lie in the leaf itself; the rest is in overflow pages."""
    if length <= usable - 35:
        return length
    least = (usable - 12) * 32 // 255 - 23
    local = least + (length - least) % (usable - 4)
    return local if local <= usable - 35 else least


def _varint(data: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """SQLite's variable-length integer at a position, and where it ends."""
    value = 0
    for index in range(9):
        byte = data[position + index]
        if index == 8:
            return value << 8 | byte, position + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, position + index + 1
    raise AssertionError("unreachable")


def _record_values(payload: bytes) -> list:
    """The values of a row: None, int, float, bytes, str or _Missing()."""
    end, position = _varint(payload, 0)
    kinds = []
    while position < end:
        kind, position = _varint(payload, position)
        kinds.append(kind)
    values: list = []
    for kind in kinds:
        size = (kind - 12) // 2 if kind >= 12 else 8 if kind == 7 else _INTEGER_SIZES.get(kind, 0)
        body = payload[position : position + size]
        position += size
        if len(body) < size:
            values.append(_Missing())
        elif kind >= 12:
            values.append(body if kind % 2 == 0 else body.decode(errors="replace"))
        elif kind == 7:
            values.append(struct.unpack(">d", body)[0])
        else:
            constants = {0: None, 8: 0, 9: 1}
            values.append(constants.get(kind, int.from_bytes(body, "big", signed=True)))
    return values
