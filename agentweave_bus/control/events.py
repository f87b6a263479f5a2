"""What events need on the broker: a stream for each publisher, two consumers for each of its subscribers.

Agents announce what they want (:mod:`agentweave_bus.tasks.event_announcing`); what they get is that of it
which the grants give them, so that a consumer never gives out an event that its subscriber may not see. When
the grants take something back, :meth:`EventPlaces.narrow` takes it out of the consumers.

What was announced before stays: while an agent is replaced by a new version of itself, both announce their
own, and an event that is in no filter when it is published would be lost to the subscriber.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from agentweave_bus.authz import Grants
from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.stream_limits import DEFAULT_STREAM_LIMITS, StreamLimits
from agentweave_bus.bus.streams import (
    dead_stream,
    event_consumer,
    event_consumer_name,
    events_stream,
    events_stream_name,
)
from agentweave_bus.control.broker import event_publishers
from agentweave_bus.control.reconcile import reconcile_consumers, reconcile_streams
from agentweave_bus.exceptions import BusError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.event_announcing import EventAnnouncement, common_patterns, patterns_of

__all__ = ["EventPlaces"]

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_NOT_THERE: Final = frozenset({10014, 10059})


class EventPlaces:
    """Makes streams of events and their consumers, as the grants allow.

    ``grants`` are those that hold now, ``everyone`` the identities that have a user at this broker.
    """

    def __init__(
        self,
        grants: Callable[[], Grants],
        everyone: Callable[[], Iterable[SpiffeID]],
        *,
        limits: StreamLimits = DEFAULT_STREAM_LIMITS,
    ) -> None:
        self._grants = grants
        self._everyone = everyone
        self._limits = limits

    async def serve(self, session: Session, agent: SpiffeID, wanted: EventAnnouncement) -> list[str]:
        """Make what ``agent`` announced, as far as it is granted; return the names of what was made.

        Raises:
            BusError: the broker does not answer.
            ConfigurationError: something exists in a form that can't be changed.

        """
        made: list[str] = []
        if wanted.publishes and self._publishes(agent):
            made += await reconcile_streams(session, [events_stream(agent, limits=self._limits)])
        granted = self._granted(agent)
        mine = [one for one in wanted.subscriptions if one.publisher in granted]
        if mine:
            made += await reconcile_streams(session, [dead_stream(agent, limits=self._limits)])
        for one in mine:
            made += await reconcile_streams(session, [events_stream(one.publisher, limits=self._limits)])
            for ordered in (False, True):
                before = await self._filters(session, one.publisher, agent, ordered=ordered)
                patterns = {*(before or ()), *one.of(ordered=ordered)}
                made += await self._give(
                    session, one.publisher, agent, granted[one.publisher], patterns, ordered=ordered
                )
        return made

    async def narrow(self, session: Session) -> None:
        """Take out of every consumer what its subscriber may not receive any more.

        Raises:
            BusError: the broker does not answer.

        """
        grants = self._grants()
        callees = {
            SpiffeID(callee) for grant in grants.grants if "event" in grant.kinds for callee in grant.callee
        }
        for subscriber in sorted(callees):
            for publisher, granted in sorted(self._granted(subscriber).items()):
                for ordered in (False, True):
                    before = await self._filters(session, publisher, subscriber, ordered=ordered)
                    if before and set(before) != set(common_patterns(granted, before)):
                        await self._give(session, publisher, subscriber, granted, before, ordered=ordered)

    def _publishes(self, agent: SpiffeID) -> bool:
        return any("event" in reach.kinds for reach in self._grants().callees_of(agent))

    def _granted(self, subscriber: SpiffeID) -> dict[SpiffeID, set[str]]:
        found: dict[SpiffeID, set[str]] = {}
        for publisher, patterns in event_publishers(subscriber, self._grants(), self._everyone()):
            found.setdefault(publisher, set()).update(patterns)
        return found

    async def _give(
        self,
        session: Session,
        publisher: SpiffeID,
        subscriber: SpiffeID,
        granted: Iterable[str],
        patterns: Iterable[str],
        *,
        ordered: bool,
    ) -> list[str]:
        """Let a consumer be for what is both wanted and granted; where that is nothing, take it away."""
        both = common_patterns(granted, patterns)
        if both:
            spec = event_consumer(publisher, subscriber, both, ordered=ordered)
            return await reconcile_consumers(session, [spec])
        place = f"{events_stream_name(publisher)}.{event_consumer_name(subscriber, ordered=ordered)}"
        answer = await _ask(session, f"$JS.API.CONSUMER.DELETE.{place}")
        if answer.get("success"):
            _log.info("%s may receive nothing of %s any more: consumer removed", subscriber, publisher)
        return []

    async def _filters(
        self, session: Session, publisher: SpiffeID, subscriber: SpiffeID, *, ordered: bool
    ) -> tuple[str, ...] | None:
        """Return the patterns that a consumer is for, or ``None`` when there is none."""
        place = f"{events_stream_name(publisher)}.{event_consumer_name(subscriber, ordered=ordered)}"
        answer = await _ask(session, f"$JS.API.CONSUMER.INFO.{place}")
        if "config" in answer:
            return patterns_of(answer["config"], publisher)
        if answer.get("error", {}).get("err_code") in _NOT_THERE:
            return None
        raise BusError(f"the broker can't tell about the consumer {place}: {answer.get('error')}")


async def _ask(session: Session, subject: str) -> dict[str, Any]:
    try:
        answer = json.loads((await session.ask(subject, b"", timeout_s=_TIMEOUT_S)).data)
    except (TimeoutError, ValueError) as error:
        raise BusError(f"the broker does not answer on {subject}") from error
    return answer if isinstance(answer, dict) else {}
