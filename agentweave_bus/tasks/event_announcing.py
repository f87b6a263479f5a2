"""Telling the control role whose events are wanted, and that events are published.

It is an announcement like that of capabilities (:mod:`.announcing`): signed, on the same subject, answered by
nobody. Who publishes sees that its stream is there when something is stored in it; who subscribes asks the
broker which events its consumers are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.subjects import event_pattern_subject
from agentweave_bus.envelope import Sealer, encode_payload
from agentweave_bus.exceptions import ConfigurationError, InvalidSpiffeIdError, PayloadError
from agentweave_bus.names import EVENT_PATTERN, common_event, covers_event
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.announcing import send_announcement

__all__ = [
    "ANNOUNCE_EVENTS",
    "MAX_PUBLISHERS",
    "EventAnnouncement",
    "Subscription",
    "announce_events",
    "broadest",
    "common_patterns",
    "patterns_of",
]

ANNOUNCE_EVENTS: Final = "announce_events"
"""The ``cap`` of such an announcement's head."""

MAX_PUBLISHERS: Final = 256
"""Whose events one agent can subscribe to, durably."""

MAX_PATTERNS: Final = 64
"""How many patterns of one publisher's events."""


def broadest(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return patterns of events without those that another one covers; none of them overlap then."""
    every = sorted(set(patterns))
    return tuple(
        one for one in every if not any(other != one and covers_event(other, one) for other in every)
    )


def common_patterns(granted: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for what both are for; none of them overlap."""
    others = tuple(wanted)
    both = (common_event(one, other) for one in granted for other in others)
    return broadest(one for one in both if one is not None)


def patterns_of(consumer: Mapping[str, Any], publisher: SpiffeID) -> tuple[str, ...]:
    """Return which patterns of ``publisher``'s events a consumer is for, by its configuration."""
    prefix = event_pattern_subject(publisher, "*")[:-1]
    filters = consumer.get("filter_subjects") or [consumer.get("filter_subject") or ""]
    found = (one.removeprefix(prefix) for one in filters if one.startswith(prefix))
    return tuple(f"{one[:-1]}*" if one.endswith(">") else one for one in found)


@dataclass(frozen=True, slots=True)
class Subscription:
    """Which events of one publisher an agent wants: ``plain`` as they come, ``ordered`` one by one."""

    publisher: SpiffeID
    plain: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()

    def of(self, *, ordered: bool) -> tuple[str, ...]:
        """Return the patterns of one of the two."""
        return self.ordered if ordered else self.plain


@dataclass(frozen=True, slots=True)
class EventAnnouncement:
    """What is announced: whether its sender publishes, and to whom it subscribes."""

    publishes: bool = False
    subscriptions: tuple[Subscription, ...] = ()

    def encoded(self) -> bytes:
        """Return it as a payload.

        Raises:
            ConfigurationError: there are too many publishers or patterns.

        """
        wanted = sorted(self.subscriptions, key=lambda one: one.publisher)
        if len(wanted) > MAX_PUBLISHERS or any(
            len(one.of(ordered=ordered)) > MAX_PATTERNS for one in wanted for ordered in (False, True)
        ):
            raise ConfigurationError(
                f"an agent hears of {MAX_PUBLISHERS} publishers at most, of {MAX_PATTERNS} patterns of each"
            )
        return encode_payload(
            {
                "publishes": self.publishes,
                "subscriptions": [
                    {"publisher": one.publisher, "plain": list(one.plain), "ordered": list(one.ordered)}
                    for one in wanted
                ],
            }
        )

    @classmethod
    def read(cls, payload: Any) -> EventAnnouncement:
        """Read it as decoded; the inverse of :meth:`encoded`.

        Raises:
            PayloadError: it says something else.

        """
        if type(payload) is not dict or payload.keys() != {"publishes", "subscriptions"}:
            raise PayloadError("an announcement of events says 'publishes' and 'subscriptions'")
        publishes, listed = payload["publishes"], payload["subscriptions"]
        if type(publishes) is not bool or type(listed) is not list or len(listed) > MAX_PUBLISHERS:
            raise PayloadError(f"an announcement of events names at most {MAX_PUBLISHERS} publishers")
        read = tuple(_subscription(one) for one in listed)
        if len({one.publisher for one in read}) != len(read):
            raise PayloadError("an announcement of events names each publisher once")
        return cls(publishes, read)


def _subscription(value: Any) -> Subscription:
    if type(value) is not dict or value.keys() != {"publisher", "plain", "ordered"}:
        raise PayloadError("a subscription says 'publisher', 'plain' and 'ordered'")
    try:
        publisher = SpiffeID(str(value["publisher"]))
    except InvalidSpiffeIdError as error:
        raise PayloadError(f"a subscription to nobody: {error}") from error
    if not publisher.path:
        raise PayloadError("a subscription is to an agent, not to a trust domain")
    return Subscription(publisher, _patterns(value["plain"]), _patterns(value["ordered"]))


def _patterns(value: Any) -> tuple[str, ...]:
    if type(value) is not list or len(value) > MAX_PATTERNS:
        raise PayloadError(f"a subscription lists at most {MAX_PATTERNS} patterns")
    if not all(type(one) is str and EVENT_PATTERN.fullmatch(one) for one in value):
        raise PayloadError("a subscription lists what is no pattern of events")
    return broadest(value)


async def announce_events(
    session: Session,
    me: SpiffeID,
    control: SpiffeID,
    what: EventAnnouncement,
    *,
    sealer: Sealer,
    clock_ms: Callable[[], int],
) -> None:
    """Tell the control role once.

    Raises:
        BusError: the connection is lost.
        ConfigurationError: there are too many publishers or patterns.
        SvidUnavailableError: there is no valid SVID to sign with.

    """
    payload = what.encoded()
    await send_announcement(session, me, control, ANNOUNCE_EVENTS, payload, sealer=sealer, now_ms=clock_ms())
