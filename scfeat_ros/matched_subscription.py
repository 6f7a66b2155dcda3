"""A subscription whose QoS matches the publishers', and is updated when they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

from scfeat_ros.errors import InputError

_ENUMS = {
    "history": HistoryPolicy,
    "reliability": ReliabilityPolicy,
    "durability": DurabilityPolicy,
}
MATCH = "match"
"""Value of a qos_overrides parameter by which a policy follows the publishers (depth: 0)."""


class MatchedSubscription:
    """Subscribes with the quality of service of the topic's publishers.

    Reliable and transient-local are requested only if every publisher offers them, so that all
    publishers are compatible; best effort and volatile if there is no publisher. The parameters
    `qos_overrides.<topic>.subscription.<policy>` take precedence; they are read once, here.

    Args:
        node: on which to subscribe.
        message_type: class of the messages.
        topic: fully resolved name.
        callback: called with every message.
        on_incompatible: called with a text when a publisher offers less than is requested.
        reliability: "auto", "reliable" or "best_effort".
        depth: of the queue.

    Raises:
        InputError: an override with an invalid value.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any], None],
        on_incompatible: Callable[[str], None],
        reliability: str = "auto",
        depth: int = 1,
    ) -> None:
        self.topic = topic
        self._node = node
        self._type = message_type
        self._callback = callback
        self._on_incompatible = on_incompatible
        self._reliability = reliability
        self._depth = depth
        self._overrides = _overrides(node, topic)
        self._subscription: Any = None
        self.profile: QoSProfile | None = None
        self.update()

    @property
    def publisher_count(self) -> int:
        return self._node.count_publishers(self.topic)

    @property
    def description(self) -> str:
        """The QoS profile, such as "reliable volatile keep_last 1"."""
        return " ".join(str(part) for part in self._key(self.profile))

    def update(self) -> bool:
        """Check the publishers, and subscribe again if what they offer has changed.

        Returns:
            Whether there is a new subscription.
        """
        wanted = self._wanted()
        if self.profile is not None and self._key(wanted) == self._key(self.profile):
            return False
        self.destroy()
        self.profile = wanted
        self._subscription = self._node.create_subscription(
            self._type,
            self.topic,
            self._callback,
            wanted,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=self._incompatible),
        )
        return True

    def incompatible_publishers(self) -> list[str]:
        """Names of the nodes whose publishers offer less than this subscription requests."""
        asked = self.profile
        return [
            f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            for info in self._node.get_publishers_info_by_topic(self.topic)
            if (asked.reliability, info.qos_profile.reliability)
            == (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT)
            or (asked.durability, info.qos_profile.durability)
            == (DurabilityPolicy.TRANSIENT_LOCAL, DurabilityPolicy.VOLATILE)
        ]

    def other_types(self) -> list[str]:
        """Types, other than the subscription's, with which the topic is published."""
        mine = f"{self._type.__module__.split('.')[0]}/msg/{self._type.__name__}"
        infos = self._node.get_publishers_info_by_topic(self.topic)
        return sorted({info.topic_type for info in infos} - {mine})

    def destroy(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None
        self.profile = None

    def _wanted(self) -> QoSProfile:
        offers = [i.qos_profile for i in self._node.get_publishers_info_by_topic(self.topic)]
        reliable = {
            "auto": bool(offers)
            and all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers),
            "reliable": True,
            "best_effort": False,
        }[self._reliability]
        latched = bool(offers) and all(
            offer.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers
        )
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=self._depth,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            # transient-local delivery to late subscribers works only if reliable
            durability=DurabilityPolicy.TRANSIENT_LOCAL
            if latched and reliable
            else DurabilityPolicy.VOLATILE,
        )
        for policy, value in self._overrides.items():
            setattr(profile, policy, value)
        return profile

    def _incompatible(self, event: Any) -> None:
        remedies = []
        if self._reliability != "auto":
            remedies.append("leave image_reliability at auto")
        if self._overrides:
            remedies.append(f"take {overrides_of(self.topic)}* out of the parameters")
        if not remedies:
            return  # the next update adapts to the publisher
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        self._on_incompatible(
            f"a publisher of {self.topic} offers less {policy} than this subscription asks for "
            f"({self.description}), so nothing comes from it: {' and '.join(remedies)}, or make "
            "the publisher offer it"
        )

    @staticmethod
    def _key(profile: QoSProfile) -> tuple:
        return (
            profile.reliability.name.lower(),
            profile.durability.name.lower(),
            profile.history.name.lower(),
            profile.depth,
        )


def overrides_of(topic: str) -> str:
    """Prefix of the parameters' names for a subscription to a topic."""
    return f"qos_overrides.{topic}.subscription."


def _overrides(node: Node, topic: str) -> dict[str, Any]:
    """The policies that the user has overridden for a subscription to a topic.

    rclpy's own QoSOverridingOptions would store the first matched profile as the parameters'
    values, which would then override every later match; and a wrong value could not be corrected.
    """
    overrides: dict[str, Any] = {}
    for policy in ("history", "depth", "reliability", "durability"):
        name = overrides_of(topic) + policy
        default = 0 if policy == "depth" else MATCH
        if not node.has_parameter(name):
            text = f"{policy} of the subscription to {topic}; {default} leaves it to the node"
            # of any type, so that a value of the wrong type can be corrected like other values
            descriptor = ParameterDescriptor(description=text, dynamic_typing=True)
            node.declare_parameter(name, default, descriptor)
        value = node.get_parameter(name).value
        if value == default:
            continue
        if policy == "depth":
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a whole number from 1 on, got {value!r}")
            overrides[policy] = value
            continue
        known = {n.lower(): v for n, v in _ENUMS[policy].__members__.items() if n != "UNKNOWN"}
        if str(value).lower() not in known:
            raise InputError(f"{name} must be {MATCH} or one of {', '.join(known)}, got {value!r}")
        overrides[policy] = known[str(value).lower()]
    return overrides
