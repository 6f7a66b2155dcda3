"""The output bag: features and matches of every frame, as ROS 2 messages in an mcap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.convert.converter import migrate_bytes
from rosbags.interfaces import MessageDefinitionFormat
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from scfeat_ros.bags import BagReader, UnreadableMessageError
from scfeat_ros.features import FrameResult
from scfeat_ros.messages import (
    encode_features,
    encode_header,
    encode_matches,
    rosbags_types,
)
from scfeat_ros.recovery import RawMessage

NAMESPACE = "/extractor"
"""Namespace of the output topics: the node's name."""
_CLOUD = "sensor_msgs/msg/PointCloud2"
_COMPRESSED = "sensor_msgs/msg/CompressedImage"


class FeatureBagWriter:
    """Writes a rosbag2 folder in mcap with ROS 2 Jazzy's message types.

    Args:
        path: the folder; it must not exist.
        descriptor_type: "float32" or "int8".
        overlay: whether overlay images are written, too.

    Attributes:
        not_passed: input topics that could not be passed through, with the reason.
    """

    def __init__(self, path: Path, descriptor_type: str = "float32", overlay: bool = False) -> None:
        self.descriptor_type = descriptor_type
        self.not_passed: dict[str, str] = {}
        self._typestore = get_typestore(Stores.ROS2_JAZZY)
        self._types = rosbags_types(self._typestore)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._features = self._add("features", _CLOUD)
        self._matches = self._add("matches", _CLOUD)
        self._overlay = self._add("overlay/compressed", _COMPRESSED) if overlay else None
        self._inputs: dict[str, Any] = {}
        self._migration_cache: dict[str, object] = {}

    def _add(self, name: str, message_type: str) -> Any:
        return self._writer.add_connection(
            f"{NAMESPACE}/{name}", message_type, typestore=self._typestore
        )

    def write(self, result: FrameResult, bearings: np.ndarray | None, time: int) -> None:
        """Append `~/features` and `~/matches` of a frame.

        Args:
            result: of the front end.
            bearings: (N, 3) of its keypoints, None if unknown.
            time: recording time, nanoseconds; the messages' headers have the image's own stamp.
        """
        features = encode_features(result, bearings, self._types, self.descriptor_type)
        matches = encode_matches(result, bearings, self._types)
        for connection, message in ((self._features, features), (self._matches, matches)):
            self._writer.write(connection, time, self._typestore.serialize_cdr(message, _CLOUD))

    def write_overlay(self, picture: np.ndarray, result: FrameResult, time: int) -> None:
        """Append `~/overlay/compressed`, a JPEG of an (H, W, 3) uint8 RGB picture."""
        data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
        message = self._typestore.types[_COMPRESSED](
            header=encode_header(result.stamp, result.frame_id, self._types),
            format="rgb8; jpeg compressed bgr8",
            data=data.reshape(-1),
        )
        self._writer.write(self._overlay, time, self._typestore.serialize_cdr(message, _COMPRESSED))

    def write_input(self, message: RawMessage, reader: BagReader) -> None:
        """Append a message of the input as it is, one of ROS 1 in the ROS 2 form of its type.

        Raises:
            UnreadableMessageError: the message does not fit its type.
        """
        if message.topic in self.not_passed:
            return
        if message.topic not in self._inputs:
            try:
                self._inputs[message.topic] = self._add_input(message, reader)
            except Exception as error:  # parsing unknown message definitions may raise anything
                self.not_passed[message.topic] = " ".join(str(error).split()) or repr(error)
                return
        data = self._as_ros2(message, reader) if reader.is_ros1 else message.data
        self._writer.write(self._inputs[message.topic], message.time, data)

    def _as_ros2(self, message: RawMessage, reader: BagReader) -> bytes:
        try:
            return migrate_bytes(
                reader.typestore,
                self._typestore,
                message.type,
                message.type,
                self._migration_cache,
                message.data,
                src_is2=False,
                dst_is2=True,
            )
        except Exception as error:  # generated code may raise anything on damaged bytes
            raise UnreadableMessageError(message, error) from error

    def _add_input(self, message: RawMessage, reader: BagReader) -> Any:
        if message.topic.startswith(f"{NAMESPACE}/"):
            raise ValueError("the output has a topic of that name")
        known = reader.connection(message.topic)
        options: dict[str, Any] = {"typestore": self._typestore}
        if known is not None and not reader.is_ros1:
            options["offered_qos_profiles"] = known.ext.offered_qos_profiles
            if known.msgdef.data and known.digest:
                options |= {"msgdef": known.msgdef.data, "rihs01": known.digest}
        if "msgdef" not in options:
            for store in (self._typestore, reader.typestore):
                _register_type(store, message, reader)
        return self._writer.add_connection(message.topic, message.type, **options)

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Close without writing an index; the folder will be removed."""
        self._writer.abort()


def _register_type(store: Typestore, message: RawMessage, reader: BagReader) -> None:
    """Register a message's type from the bag's definition, unless the store knows it.

    Raises:
        ValueError: the bag does not define it.
    """
    if message.type in store.fielddefs:
        return
    definition = reader.definition(message.topic)
    if definition is None:
        raise ValueError(f"the type {message.type} is not known")
    if definition.format == MessageDefinitionFormat.IDL:
        types = get_types_from_idl(definition.data)
    else:
        types = get_types_from_msg(definition.data, message.type)
    store.register({name: type_ for name, type_ in types.items() if name not in store.fielddefs})
