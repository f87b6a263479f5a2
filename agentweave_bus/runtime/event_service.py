"""Hearing of events: an agent's subscriptions, kept up while it serves.

Whose events an agent may receive is said by the grants. For each publisher that they name, and whose events
its handlers are for, it asks the broker whether its consumers there are for them, has the control role told
until they are, and pulls. The grants are followed: one that comes later is heeded within seconds. What is not
durable is heard by subscriptions to the publishers' subjects.

A grant to all below a path (``agent/*``) says no names, so its publishers can't be followed; that is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import anyio
from nats.aio.msg import Msg

from agentweave_bus.agent import EventHandler, EventHandlers
from agentweave_bus.bus.connection import NotPermittedError, Session
from agentweave_bus.bus.event_admission import EventAdmission
from agentweave_bus.bus.reception import received
from agentweave_bus.bus.streams import event_consumer_name, events_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, event_pattern_subject
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import AgentWeaveError, BusError, UnreachableError
from agentweave_bus.names import covers_event
from agentweave_bus.observability.metrics import DeadCause, Direction
from agentweave_bus.runtime.wiring import Connected, server_id
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.event_announcing import (
    EventAnnouncement,
    Subscription,
    announce_events,
    common_patterns,
    patterns_of,
)
from agentweave_bus.tasks.event_performer import EventPerformer, EventWork, RunEvent, Subscriber
from agentweave_bus.tasks.event_puller import EventPuller, PullSource
from agentweave_bus.tasks.pulling import drained
from agentweave_bus.tasks.queue import Acknowledgements
from agentweave_bus.tasks.traced_deliveries import describe_message, traced_deliveries

__all__ = ["EventService"]

_log = logging.getLogger(__name__)

_CONCURRENCY: Final = 32
"""How many events of one publisher are handled at once, where they need not be in order."""

_MOST_LIVE: Final = 256
"""How many live events are handled at once; some thousands wait, and what comes on top is lost."""

_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 2.0
_LOOK_S: Final = 0.5
"""How often it is looked whether the grants have changed."""
_CHECK_S: Final = 30.0
"""How often it is looked whether the consumers are as they should be."""
_ASK_S: Final = 2.0
_READY_S: Final = 10.0

_Key = tuple[SpiffeID, bool]


class EventService:
    """The subscriptions of one served agent. ``run`` runs one attempt of a handler in its context."""

    def __init__(
        self, parts: Connected, admission: EventAdmission, handlers: EventHandlers, run: RunEvent
    ) -> None:
        self._parts = parts
        self._handlers = handlers
        for one in handlers:
            parts.metrics.declare_capability(Direction.INBOUND, one.bound.name)
            parts.metrics.declare_deliveries(one.bound.name)
        self._performer = EventPerformer(
            EventWork(
                admission=admission,
                find=handlers.durable,
                run=run,
                seconds_of=self._seconds_of,
                acknowledgements=Acknowledgements(parts.keeper),
                dead_letters=DeadLetters(parts.me, parts.desk, self._given_up),
                audit=parts.audit,
                metrics=parts.metrics,
            )
        )
        self._pullers: dict[_Key, EventPuller] = {}
        self._running: set[EventPuller] = set()  # with those that were dropped and have not ended yet
        self._draining = False
        self._group: Any = None
        self._look = asyncio.Event()
        self._standing = asyncio.Event()
        self._unnamed: set[str] = set()
        self._live: set[asyncio.Task[None]] = set()
        self._heard: WeakKeyDictionary[Session, set[tuple[str, str]]] = WeakKeyDictionary()
        parts.keeper.on_session(self._listen)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the subscriptions up for the length of the block.

        It begins when the consumers stand of those publishers that the grants name, or after 10 s.
        """
        if not len(self._handlers):
            yield
            return
        async with owned_tasks() as group:
            self._group = group
            group.start_soon(self._keep)
            with anyio.move_on_after(_READY_S) as waited:
                await self._standing.wait()
            if waited.cancelled_caught:
                _log.warning("not all subscriptions stand yet; is a control role running?")
            try:
                yield
            finally:
                group.cancel_scope.cancel()
                for task in self._live:
                    task.cancel()
                await asyncio.gather(*self._live, return_exceptions=True)

    @property
    def idle_s(self) -> float | None:
        """For how long some events were not asked for although there is room, in seconds; else ``None``."""
        pullers = list(self._pullers.values())
        return max((idle for one in pullers if (idle := one.idle_s) is not None), default=None)

    async def drain(self) -> None:
        """Take nothing more, and return when what runs has ended, or has been given back."""
        self._draining = True
        await drained(list(self._running), self._parts.config.bus.drain_timeout, "events")
        while self._live:
            await asyncio.wait(self._live)

    # --- what is wanted ----------------------------------------------------------------------------------

    def _granted(self) -> dict[SpiffeID, set[str]]:
        """Return whose events this agent may receive, and which, as far as the grants give names."""
        grants = self._parts.authorizer.grants
        found: dict[SpiffeID, set[str]] = {}
        for reach in grants.callers_of(self._parts.me) if grants is not None else ():
            if "event" not in reach.kinds:
                continue
            if reach.agent.endswith("/*"):
                self._say_unnamed(reach.agent)
            else:
                found.setdefault(SpiffeID(reach.agent), set()).update(reach.capabilities)
        return found

    def _say_unnamed(self, pattern: str) -> None:
        if pattern not in self._unnamed:
            self._unnamed.add(pattern)
            _log.warning("events of %s are not heard: name each publisher in a grant of its own", pattern)

    def _wanted(self) -> list[Subscription]:
        wanted = []
        for publisher, granted in sorted(self._granted().items()):
            one = Subscription(
                publisher,
                common_patterns(granted, self._handlers.patterns(ordered=False)),
                common_patterns(granted, self._handlers.patterns(ordered=True)),
            )
            if one.plain or one.ordered:
                wanted.append(one)
        return wanted

    # --- durable -----------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Have consumers made for what is wanted, and pull from those that stand, until cancelled."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                session = await self._parts.keeper.session(_CHECK_S)
                await self._hear(session)
                wanted = self._wanted()
                missing = await self._missing(session, wanted)
                self._drop(wanted)
                if not missing:
                    self._standing.set()
                    pause = _FIRST_PAUSE_S
                    await self._until_changed(session)
                    continue
                await self._announce(session, wanted)
            except UnreachableError:
                _log.debug("no connection to subscribe on yet")
            except AgentWeaveError as error:
                _log.warning("the subscriptions to events can't be looked after: %s", error)
            await anyio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)

    async def _missing(self, session: Session, wanted: list[Subscription]) -> bool:
        """Pull from the consumers that are as wanted; say whether there are others."""
        missing = False
        for one in wanted:
            for ordered in (False, True):
                patterns = one.of(ordered=ordered)
                if not patterns:
                    continue
                if await self._stands(session, one.publisher, patterns, ordered=ordered):
                    self._pull(one.publisher, ordered=ordered)
                else:
                    missing = True
        return missing

    async def _stands(
        self, session: Session, publisher: SpiffeID, patterns: tuple[str, ...], *, ordered: bool
    ) -> bool:
        name = event_consumer_name(self._parts.me, ordered=ordered)
        place = f"$JS.API.CONSUMER.INFO.{events_stream_name(publisher)}.{name}"
        try:
            answer: Any = json.loads((await session.ask(place, b"", timeout_s=_ASK_S)).data)
        except (TimeoutError, NotPermittedError):
            return False  # the broker may not have been told of the grant yet
        except ValueError as error:
            raise BusError(f"the broker's answer on {place} is not understood") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("config"), dict):
            return False
        has = patterns_of(answer["config"], publisher)
        return all(any(covers_event(broad, one) for broad in has) for one in patterns)

    def _pull(self, publisher: SpiffeID, *, ordered: bool) -> None:
        if self._draining or (publisher, ordered) in self._pullers:
            return
        parts = self._parts
        prefix = f"{agent_prefix(Family.EVENT, publisher)}."
        name = event_consumer_name(parts.me, ordered=ordered)
        puller = self._pullers[publisher, ordered] = EventPuller(
            parts.me,
            PullSource(events_stream_name(publisher), name, f"{prefix}>", partial(_is_below, prefix)),
            keeper=parts.keeper,
            concurrency=1 if ordered else _CONCURRENCY,
            perform=traced_deliveries(parts.tracing, partial(self._performer.perform, publisher)),
            announce=self._look_again,
            monotonic=parts.surroundings.monotonic_s,
        )
        self._running.add(puller)
        self._group.start_soon(self._run, puller)

    async def _run(self, puller: EventPuller) -> None:
        try:
            await puller.run()
        finally:
            self._running.discard(puller)

    def _drop(self, wanted: list[Subscription]) -> None:
        """Pull no more from those whose events may not be received any more."""
        both = ((one, ordered) for one in wanted for ordered in (False, True))
        keys = {(one.publisher, ordered) for one, ordered in both if one.of(ordered=ordered)}
        for key in self._pullers.keys() - keys:
            self._pullers.pop(key).stop()

    async def _look_again(self, _session: Session) -> None:
        """Take note that a consumer is not there any more, and wait before pulling again."""
        self._look.set()
        await anyio.sleep(_LOOK_S)

    async def _until_changed(self, session: Session) -> None:
        """Wait until the consumers should be looked at again."""
        grants = self._parts.authorizer.grants
        self._look.clear()
        with anyio.move_on_after(_CHECK_S):
            while self._parts.authorizer.grants is grants and session.usable:
                with anyio.move_on_after(_LOOK_S):
                    await self._look.wait()
                    return

    async def _announce(self, session: Session, wanted: list[Subscription]) -> None:
        parts = self._parts
        await announce_events(
            session,
            parts.me,
            control_role(server_id(parts.config).trust_domain),
            EventAnnouncement(subscriptions=tuple(wanted)),
            sealer=parts.sealer,
            clock_ms=parts.surroundings.clock_ms,
        )

    def _given_up(self, event: str, cause: DeadCause) -> None:
        handler = self._handlers.durable(event)
        self._parts.metrics.given_up(event if handler is None else handler.bound.name, cause)

    def _seconds_of(self, subscriber: Subscriber) -> float:
        assert isinstance(subscriber, EventHandler)
        return subscriber.spec.timeout or self._parts.config.bus.task_timeout

    # --- live --------------------------------------------------------------------------------------------

    async def _listen(self, session: Session) -> None:
        await self._hear(session)

    async def _hear(self, session: Session) -> None:
        """Subscribe on this session to what is heard live and is not subscribed to on it yet."""
        if self._draining:
            return
        heard = self._heard.setdefault(session, set())
        heard -= {key for key in heard if not session.hears(key[0])}  # the broker may know the grant now
        live = [one for one in self._handlers if not one.spec.durable]
        for publisher, granted in self._granted().items() if live else ():
            for handler in live:
                for pattern in common_patterns(granted, [handler.spec.pattern]):
                    subject = event_pattern_subject(publisher, pattern)
                    queue = "" if handler.spec.every else _queue_of(handler)
                    if (key := (subject, handler.source)) not in heard:
                        heard.add(key)
                        await session.serve(subject, queue, partial(self._on_live, publisher, handler))

    async def _on_live(self, publisher: SpiffeID, handler: EventHandler, message: Msg) -> None:
        while len(self._live) >= _MOST_LIVE:
            await asyncio.wait(self._live, return_when=asyncio.FIRST_COMPLETED)
        handling: Coroutine[Any, Any, None] = self._performer.perform_live(
            publisher, message.subject, message.data, handler, self._parts.surroundings.clock_ms()
        )
        if self._parts.tracing.enabled:
            handling = self._traced(message.subject, handling)
        task = asyncio.get_running_loop().create_task(_guarded(handling))
        self._live.add(task)
        task.add_done_callback(self._live.discard)

    async def _traced(self, subject: str, handling: Coroutine[Any, Any, None]) -> None:
        with received(self._parts.tracing, "consumer", describe_message(subject)):
            await handling


async def _guarded(handling: Coroutine[Any, Any, None]) -> None:
    try:
        await handling
    except Exception:  # noqa: BLE001 - the last boundary: one event must not stop the others
        _log.exception("a live event ended in an error of the bus itself")


def _is_below(prefix: str, subject: str) -> bool:
    return subject.startswith(prefix)


def _queue_of(handler: EventHandler) -> str:
    return hashlib.sha256(handler.source.encode()).hexdigest()[:16]
