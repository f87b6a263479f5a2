"""The control role at work: whoever serves durable tasks gets its streams and consumers.

It hears what workers announce (:mod:`agentweave_bus.tasks.announcing`), on every connection that it has, and
makes what is missing. It answers nobody. An announcement counts when all of this holds:

1. its subject names an identity that is known here
2. that agent has not announced itself too often lately, and this is small enough
3. it is an envelope whose sender is proved: chain, revocation, signature, payload
4. it is bound to here: a ``control`` for this role, ``announce``, on this subject, by the subject's agent
5. it is of now, within the limits of what acts at once
6. it lists at most 256 capabilities, may say how long the broker waits for a worker's word, and says nothing
   else; or whose events are wanted (:mod:`.events`), or that its sender stores large payloads

Replayed, it does no harm: what it asks for is there. What is waiting is bounded: one entry an agent, and so
many agents at once; what is dropped is announced again by a worker that still needs it. How many consumers
one agent can have made over time is bounded by its stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final

import anyio
from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.stream_limits import DEFAULT_STREAM_LIMITS, StreamLimits
from agentweave_bus.bus.streams import (
    MAX_CONSUMERS,
    StreamSpec,
    blob_stream,
    claim_stream,
    events_stream,
    parked_stream,
    task_consumers,
    task_streams,
)
from agentweave_bus.bus.subjects import ANNOUNCEMENTS, announce_subject, parse_subject
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.bus.token_bucket import TokenBucket
from agentweave_bus.control.events import EventPlaces
from agentweave_bus.control.operators import OperatorService
from agentweave_bus.control.reconcile import reconcile_consumers, reconcile_streams
from agentweave_bus.control.scheduler import Scheduler
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
    check_rules,
    check_time_now,
    decode_payload,
)
from agentweave_bus.exceptions import AgentWeaveError, MalformedEnvelopeError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.announcing import ANNOUNCE, TaskAnnouncement
from agentweave_bus.tasks.blob_announcing import ANNOUNCE_BLOBS, BlobAnnouncement
from agentweave_bus.tasks.event_announcing import ANNOUNCE_EVENTS, EventAnnouncement

__all__ = ["ControlRole"]

_log = logging.getLogger(__name__)

_QUEUE_GROUP: Final = "control"
_MAX_FRAME_BYTES: Final = 128 * 1024
_MAX_PENDING: Final = 1024
_MAX_BUFFERED_BYTES: Final = 16 * 1024 * 1024
_MAX_RATED: Final = 4096
_BURST: Final = 50.0
_PER_SECOND: Final = 10.0
_LINES_BURST: Final = 100.0
_LINES_PER_SECOND: Final = 1.0
_SESSION_S: Final = 15.0
_AGAIN_S: Final = 2.0
_ANNOUNCED: Final = frozenset({ANNOUNCE, ANNOUNCE_BLOBS, ANNOUNCE_EVENTS})


class ControlRole:
    """Makes streams and consumers, as asked and as announced. Owned by whoever runs :meth:`run`.

    ``me`` is the control role's own identity, with which ``keeper`` connects; make this before the keeper is
    opened. ``known`` says who has a user at this broker now. ``limits`` are those of the
    streams. ``is_me`` says which audience of an announcement is meant, by default ``me`` alone.
    ``events`` makes what events need; without it those who announce them are not heard. ``scheduler`` brings
    delayed and recurring tasks back; without it there are none. ``operators`` answers operators.
    """

    def __init__(
        self,
        me: SpiffeID,
        *,
        keeper: Keeper,
        verifier: EnvelopeVerifier,
        known: Callable[[SpiffeID], bool],
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        limits: StreamLimits = DEFAULT_STREAM_LIMITS,
        is_me: Callable[[SpiffeID], bool] | None = None,
        events: EventPlaces | None = None,
        scheduler: Scheduler | None = None,
        operators: OperatorService | None = None,
    ) -> None:
        self._is_me = is_me if is_me is not None else me.__eq__
        self._me = me
        self._keeper = keeper
        self._verifier = verifier
        self._known = known
        self._clock_ms = clock_ms
        self._limits = limits
        self._pending: OrderedDict[SpiffeID, TaskAnnouncement] = OrderedDict()
        self._events = events
        self._scheduler = scheduler
        self._operators = operators
        self._of_events: OrderedDict[tuple[SpiffeID, bool], EventAnnouncement] = OrderedDict()
        self._of_blobs: OrderedDict[SpiffeID, None] = OrderedDict()
        self._narrow = False
        self._arrived = asyncio.Event()
        self._buckets: OrderedDict[SpiffeID, TokenBucket] = OrderedDict()
        self._lines = TokenBucket(_LINES_BURST)
        self._told: OrderedDict[SpiffeID, str] = OrderedDict()
        keeper.on_session(self._listen)

    async def make(self, *streams: StreamSpec) -> list[str]:
        """Bring streams in line with what is declared; return the names of those that were made.

        Raises:
            BusError: the broker does not answer.
            ConfigurationError: one exists in a form that can't be changed into the declared one.
            UnreachableError: there is no connection to the broker.

        """
        return await reconcile_streams(await self._keeper.session(_SESSION_S), streams)

    async def make_claims(self, identities: Iterable[SpiffeID]) -> list[str]:
        """Make where ``identities`` claim calls; return as :meth:`make`, and raise as it does."""
        return await self.make(*(claim_stream(one, limits=self._limits) for one in identities))

    async def bring_in_line(self, identities: Iterable[SpiffeID]) -> None:
        """Bring those streams of ``identities`` that are there in line with what is declared now; make none.

        Raises as :meth:`make`.
        """
        session = await self._keeper.session(_SESSION_S)
        for one in identities:
            declared = (
                *task_streams(one, limits=self._limits),
                parked_stream(one, limits=self._limits),
                blob_stream(one, limits=self._limits),
                events_stream(one, limits=self._limits),
            )
            await reconcile_streams(session, declared, make=False)

    async def run(self) -> None:
        """Make what is announced, until cancelled. The caller owns this task, and keeps the keeper open."""
        async with owned_tasks() as group:
            if self._scheduler is not None:
                group.start_soon(self._look_after_parked, self._scheduler)
            if self._operators is not None:
                group.start_soon(self._operators.run)
            await self._make_what_is_announced()

    async def _look_after_parked(self, scheduler: Scheduler) -> None:
        while True:
            try:
                await scheduler.prepare()
            except Exception as error:  # noqa: BLE001 - what workers need is made all the same
                self._failed(self._me, error)
                await anyio.sleep(_AGAIN_S)
            else:
                break
        await scheduler.run()

    async def _make_what_is_announced(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await self._look_after_blobs()
            await self._look_after_events()
            while self._pending:
                agent, wanted = self._pending.popitem(last=False)
                try:
                    await self._serve(agent, wanted)
                    self._told.pop(agent, None)
                except Exception as error:  # noqa: BLE001 - of one agent; the others are served all the same
                    self._failed(agent, error)

    async def _look_after_blobs(self) -> None:
        """Make the streams of those who announced that they store large payloads."""
        while self._of_blobs:
            writer, _ = self._of_blobs.popitem(last=False)
            try:
                if await self.make(blob_stream(writer, limits=self._limits)):
                    _log.info("%s stores large payloads: made a stream for them", writer)
                self._told.pop(writer, None)
            except Exception as error:  # noqa: BLE001 - of one writer; the others are served all the same
                self._failed(writer, error)

    def grants_changed(self) -> None:
        """Take out of the consumers of events what their subscribers may not receive any more."""
        self._narrow = True
        self._arrived.set()

    async def operators_changed(self) -> None:
        """Go by the grants as they are now in what operators may; it does so within a second by itself."""
        if self._operators is not None:
            await self._operators.reload()

    async def _look_after_events(self) -> None:
        """Make what was announced about events, and keep to the grants."""
        if self._events is None:
            return
        while self._of_events:
            (agent, _), wanted = self._of_events.popitem(last=False)
            try:
                made = await self._events.serve(await self._keeper.session(_SESSION_S), agent, wanted)
                self._told.pop(agent, None)
                if made:
                    _log.info("%s publishes or hears of events: made what it needs", agent)
            except Exception as error:  # noqa: BLE001 - of one agent; the others are served all the same
                self._failed(agent, error)
        if self._narrow:
            self._narrow = False
            try:
                await self._events.narrow(await self._keeper.session(_SESSION_S))
            except Exception as error:  # noqa: BLE001 - announcements are served all the same
                self._narrow = True  # at the next announcement
                unforeseen = None if isinstance(error, AgentWeaveError) else error
                _log.error(
                    "the consumers of events do not follow the grants yet: %s", error, exc_info=unforeseen
                )

    async def _serve(self, agent: SpiffeID, wanted: TaskAnnouncement) -> None:
        session = await self._keeper.session(_SESSION_S)
        streams = task_streams(agent, limits=self._limits)
        # First, because a worker announces itself until it can pull: then everything is there.
        made = [] if self._scheduler is None else await self._scheduler.serve(session, agent)
        made += await reconcile_streams(session, streams)
        wait_s, names = wanted.ack_wait_s, sorted(wanted.capabilities)
        consumers = chain.from_iterable(task_consumers(agent, one, ack_wait_s=wait_s) for one in names)
        made += await reconcile_consumers(session, consumers)
        if made:
            _log.info("%s serves durable tasks (%s): made what it needs", agent, ", ".join(names))

    def _failed(self, agent: SpiffeID, error: Exception) -> None:
        """Say it once for each agent until it changes; the agent announces itself again."""
        said = f"{type(error).__name__}: {error}"
        if self._told.get(agent) == said:
            return
        self._told[agent] = said
        if len(self._told) > _MAX_RATED:
            self._told.popitem(last=False)
        level = logging.WARNING if isinstance(error, UnreachableError) else logging.ERROR
        unforeseen = None if isinstance(error, AgentWeaveError) else error
        _log.log(level, "what %s needs for durable tasks is not made: %s", agent, said, exc_info=unforeseen)

    # --- hearing -----------------------------------------------------------------------------------------

    async def _listen(self, session: Session) -> None:
        await session.serve(ANNOUNCEMENTS, _QUEUE_GROUP, self._heard, _MAX_BUFFERED_BYTES)

    async def _heard(self, message: Msg) -> None:
        try:
            agent = self._announcing(message)
            if agent is None:
                return
            announced = self._verified(agent, message)
        except AgentWeaveError as error:
            if self._lines.take(self._clock_ms(), size=_LINES_BURST, per_second=_LINES_PER_SECOND):
                _log.warning("an announcement on %s is ignored: %s", message.subject, error)
            return
        if isinstance(announced, EventAnnouncement):
            self._take(agent, announced)
            return
        if isinstance(announced, BlobAnnouncement):
            if len(self._of_blobs) < _MAX_PENDING:
                self._of_blobs[agent] = None
                self._arrived.set()
            return
        before = self._pending.get(agent)
        wanted = set(announced.capabilities).union(() if before is None else before.capabilities)
        if len(wanted) > MAX_CONSUMERS or len(self._pending.keys() | {agent}) > _MAX_PENDING:
            _log.debug("too much was announced at once; %s repeats its own", agent)
            return
        self._pending[agent] = TaskAnnouncement(tuple(wanted), announced.ack_wait_s)
        self._arrived.set()

    def _take(self, agent: SpiffeID, wanted: EventAnnouncement) -> None:
        if len(self._of_events) < 2 * _MAX_PENDING:
            # A later one stands for an earlier one; what was wanted and stands is kept in any case.
            self._of_events[agent, wanted.publishes] = wanted
            self._arrived.set()

    def _announcing(self, message: Msg) -> SpiffeID | None:
        """Return who is to announce itself on this subject (1, 2); ``None`` if it did too often."""
        agent = parse_subject(message.subject).agent
        if not self._known(agent):
            raise MalformedEnvelopeError(f"{agent} has no user at this broker")
        bucket = self._buckets.pop(agent, None) or TokenBucket(_BURST)
        self._buckets[agent] = bucket
        if len(self._buckets) > _MAX_RATED:
            self._buckets.popitem(last=False)
        if not bucket.take(self._clock_ms(), size=_BURST, per_second=_PER_SECOND):
            return None
        if len(message.data) > _MAX_FRAME_BYTES:
            raise MalformedEnvelopeError(f"it has {len(message.data)} bytes")
        return agent

    def _verified(
        self, agent: SpiffeID, message: Msg
    ) -> TaskAnnouncement | BlobAnnouncement | EventAnnouncement:
        """Return what ``agent`` announces (3 to 6)."""
        now_ms = self._clock_ms()
        opened = self._verifier.open(message.data, now_ms=now_ms)
        self._check_binding(opened, agent, message.subject)
        check_time_now(opened.head, now_ms, self._verifier.limits)
        payload = decode_payload(opened.payload)
        if opened.head.cap == ANNOUNCE_BLOBS:
            return BlobAnnouncement.read(payload)
        of_events = opened.head.cap == ANNOUNCE_EVENTS
        return EventAnnouncement.read(payload) if of_events else TaskAnnouncement.read(payload)

    def _check_binding(self, opened: OpenedEnvelope, agent: SpiffeID, subject: str) -> None:
        head = opened.head
        if head.kind is not Kind.CONTROL or head.cap not in _ANNOUNCED or head.ct != JSON_CONTENT_TYPE:
            raise MalformedEnvelopeError("it is no announcement")
        if not self._is_me(head.aud):
            raise MalformedEnvelopeError(f"it is for {head.aud}")
        if head.iss != agent:
            raise MalformedEnvelopeError(f"{head.iss} announces itself in the place of {agent}")
        if subject != announce_subject(agent) or head.sub != subject:
            raise MalformedEnvelopeError("it was sent on another subject")
        if head.re is not None or head.reply is not None:
            raise MalformedEnvelopeError("an announcement answers nothing and wants no answer")
        check_rules(head, opened.via, self._verifier.limits)
