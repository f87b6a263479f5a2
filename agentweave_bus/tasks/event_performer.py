"""From an event that was given out to one that is done with, in this order.

1. Admission opens it (steps 1 to 8). What can't be verified is acknowledged: it was audited, and the stream
   keeps it. What may be genuine, of an authority that is not known here yet, comes again.
2. An event that was handled here before, and is stored a second time, is acknowledged unrun (step 9).
3. Admission admits it (steps 10 to 12). What is refused is acknowledged and audited; data that its handler
   can't take are a dead letter as well. While the policy can't be asked or the audit log not be written, the
   event is held here, for as long as its deadline lets it and this worker runs; each time it is opened anew.
4. The handler runs. The broker is told every few seconds that it does, until the attempt's time is up.
5. A failure that may pass is tried again later, as often as the handler's rule says; the broker counts. Any
   other, or the last one, is a dead letter.
6. The event is acknowledged.

A worker that dies before the last step has acknowledged nothing, so another replica gets the event: handlers
see an event at least once, and sometimes twice.

Attempts are what the broker counts: how often it gave the event out. That is more than the handler was run
where an event was given back unrun (by a replica that is older than the handler, or does not know the
authority yet, or was stopped while it held the event), and nobody has a record of which. So what was given
out more often than the handler's rule allows attempts is run all the same, each time as if it were the last,
until giving back can't be why: by those that can't take it an event is given back ``_MOST_LOOKS`` - 1 times
at most. What was given out ``attempts`` times more than that, and comes again, was as often lost, or stopped,
with its worker. It is a dead letter.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import anyio

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.admission import AdmissionRefusedError, Step
from agentweave_bus.bus.admitted import Admitted, Capability, OpenedTask, StoredArrival
from agentweave_bus.bus.event_admission import NO_HANDLER, EventAdmission
from agentweave_bus.bus.records import outcome_facts
from agentweave_bus.bus.streams import TASK_ACK_WAIT_S
from agentweave_bus.envelope import claim_key, encode_payload
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import AuditError, BusError, EnvelopeError, SvidUnavailableError
from agentweave_bus.observability.metrics import DeadCause, Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.attempt import Attempted, Kept
from agentweave_bus.tasks.dead_letters import DeadEvent, DeadLetters
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.retry import LONGEST_DELAY, Retry

__all__ = ["EventPerformer", "EventRun", "EventWork", "RunEvent", "SeenEvents", "Subscriber"]

_log = logging.getLogger(__name__)

_LATE_S: Final = 30.0
"""How long after the end of its time an attempt may still take to end. Then the broker is told no more."""

_HELD_S: Final = 3_600.0
"""How long one look at whether an event is allowed may take. Later the broker is not told that it is held."""

_WORDS: Final = 3
"""How often the broker is told that an event is being worked on, in the time after which it would ask."""

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0
_PASSING: Final = frozenset({Step.AUDIT, Step.ROOM})
_MOST_LOOKS: Final = 10
"""How often an event is given back whose sender's authority, or for which a handler, is not known here."""

_MOST_SEEN: Final = 100_000


class Subscriber(Protocol):
    """What handles events of some names."""

    @property
    def bound(self) -> Capability:
        """Its handler."""

    @property
    def source(self) -> str:
        """The handler's name in the code, by which it is told from others."""

    @property
    def retry(self) -> Retry:
        """How often an event is tried again."""


class EventRun(NamedTuple):
    """One attempt at an event, for who runs it."""

    admitted: Admitted
    opened: OpenedTask
    attempt: int
    """Which one it is, counted from 1."""
    last: bool
    """Whether there is no other one after it."""


class RunEvent(Protocol):
    """Runs an admitted event's handler. It raises nothing but cancellation."""

    async def __call__(self, run: EventRun) -> Attempted:
        """Run one attempt."""


class SeenEvents:
    """What is being or was handled here lately, by publisher, name, id and data, and as which message.

    A message of the same content under another number of the stream is a second copy: published again by its
    publisher, who had no clear word of the first, or by somebody who copied it. It may be let go as long as
    the first is in hand or done with. What is given back is to be forgotten: each of two replicas may have
    had one of the copies, and let go of the other's.
    """

    def __init__(self, most: int = _MOST_SEEN) -> None:
        self._most = most
        self._seen: OrderedDict[str, tuple[int, bytes]] = OrderedDict()

    def first(self, opened: OpenedTask, number: int) -> tuple[int, bytes]:
        """Return under which number, and with which head, the event was first seen; this one if it is new."""
        found = self._seen.setdefault(_content_key(opened), (number, opened.request.digest))
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
        return found

    def forget(self, opened: OpenedTask) -> None:
        """Take back that an event was seen."""
        self._seen.pop(_content_key(opened), None)


def _content_key(opened: OpenedTask) -> str:
    head = opened.request.head
    return f"{claim_key(head.iss, head.aud, head.cap, head.id)}{head.pd.hex()}"


class EventWork(NamedTuple):
    """What an :class:`EventPerformer` stands on."""

    admission: EventAdmission
    find: Callable[[str], Subscriber | None]
    """Finds the durable handler for an event's name."""
    run: RunEvent
    seconds_of: Callable[[Subscriber], float]
    """How long an attempt may take."""
    acknowledgements: Acknowledgements
    dead_letters: DeadLetters
    audit: AuditLog
    metrics: Metrics


class EventPerformer:
    """Handles what one agent is given of others' events."""

    def __init__(self, work: EventWork) -> None:
        self._work = work
        self._seen = SeenEvents()

    async def perform(self, publisher: SpiffeID, delivery: Delivery) -> None:
        """Take one delivery as far as it goes. Raises nothing but what nobody foresaw."""
        acknowledgements = self._work.acknowledgements
        try:
            await self._perform(publisher, delivery)
        except (BusError, SvidUnavailableError, EnvelopeError) as error:
            _log.warning("an event is given back: %s", error)
            await self._back(delivery)
        except asyncio.CancelledError:
            with anyio.move_on_after(1.0, shield=True):
                await acknowledgements.back(delivery, 0)
            raise

    async def perform_live(
        self, publisher: SpiffeID, subject: str, frame: bytes, subscriber: Subscriber, now_ms: int
    ) -> None:
        """Handle what was heard when it was published: once, or not at all."""
        admission = self._work.admission
        try:
            opened = admission.open_event(
                frame,
                StoredArrival(subject, now_ms),
                publisher=publisher,
                handler=lambda _name: subscriber.bound,
                live=True,
            )
            admission.check_live(opened, subscriber.source)
            admitted = await admission.admit_task(opened)
        except AdmissionRefusedError:
            return  # counted, logged and audited already
        await self._run(EventRun(admitted, opened, attempt=1, last=True))

    # --- the steps ---------------------------------------------------------------------------------------

    async def _perform(self, publisher: SpiffeID, delivery: Delivery) -> None:
        work = self._work
        opened = await self._opened(publisher, delivery)  # 1
        if opened is None:
            return
        subscriber = work.find(opened.request.head.cap)
        assert subscriber is not None  # admission found it, too
        if self._is_copy(delivery, opened):  # 2
            await work.acknowledgements.done(delivery)
            return
        if delivery.delivered > 1:
            work.metrics.redelivered(subscriber.bound.name)
        before = delivery.delivered - 1
        if before >= subscriber.retry.attempts + _MOST_LOOKS - 1:
            reason = f"given up: given out {before} times, and never acknowledged"
            await self._give_up(delivery, opened, reason, attempts=before, cause=DeadCause.LOST)
            return
        over = False
        try:
            admitted = await self._admitted(publisher, delivery, opened)  # 3
            if admitted is not None:
                over = await self._attempt(delivery, admitted, opened, subscriber)  # 4 to 6
        finally:
            if not over:
                self._seen.forget(opened)

    async def _opened(self, publisher: SpiffeID, delivery: Delivery) -> OpenedTask | None:
        """Return it opened; ``None`` where it can't be, and is dealt with."""
        work = self._work
        try:
            return work.admission.open_event(
                delivery.data,
                StoredArrival(delivery.subject, delivery.stored_at_ms),
                publisher=publisher,
                handler=lambda name: None if (found := work.find(name)) is None else found.bound,
            )
        except AdmissionRefusedError as refusal:
            await self._not_opened(delivery, refusal)
            return None

    def _is_copy(self, delivery: Delivery, opened: OpenedTask) -> bool:
        number, digest = self._seen.first(opened, delivery.sequence)
        if number == delivery.sequence:
            return False
        if digest == opened.request.digest:
            self._work.admission.replayed(opened)
        return True

    async def _admitted(self, publisher: SpiffeID, delivery: Delivery, first: OpenedTask) -> Admitted | None:
        """Return it admitted, whatever time that takes; ``None`` where it is refused and dealt with."""
        opened: OpenedTask | None = first
        pause = _FIRST_PAUSE_S
        async with self._kept(delivery, _HELD_S) as kept:
            while opened is not None:
                try:
                    return await self._work.admission.admit_task(opened)
                except AdmissionRefusedError as refusal:
                    if not _is_passing(refusal):
                        await self._refused(delivery, opened, refusal)
                        return None
                await anyio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                kept.extend()
                opened = await self._opened(publisher, delivery)  # its deadline passes, authorities change
        return None

    async def _attempt(
        self, delivery: Delivery, admitted: Admitted, opened: OpenedTask, subscriber: Subscriber
    ) -> bool:
        """Run it once, and tell the broker what came of it; return whether that was the end of it."""
        work, rule = self._work, subscriber.retry
        run = EventRun(admitted, opened, delivery.delivered, delivery.delivered >= rule.attempts)
        async with self._kept(delivery, work.seconds_of(subscriber) + _LATE_S):
            outcome = await self._run(run)
        if outcome.retry and not run.last:
            work.metrics.tried_again(run.admitted.capability.name)
            delay_s = max(rule.delay(run.attempt), outcome.retry_after or 0.0)
            await work.acknowledgements.back(delivery, min(delay_s, LONGEST_DELAY))
            return False
        if _has_failed(outcome):
            reason = str(outcome.result.get("error") or "failed")
            await self._give_up(
                delivery, opened, reason, attempts=run.attempt, correlation_id=outcome.correlation_id
            )
        else:
            await work.acknowledgements.done(delivery)
        return True

    async def _run(self, run: EventRun) -> Attempted:
        work, name = self._work, run.admitted.capability.name
        began = time.perf_counter()
        in_flight = work.metrics.in_flight(Direction.INBOUND)
        in_flight.inc()
        try:
            outcome = await work.run(run)
        finally:
            in_flight.dec()
        seconds = time.perf_counter() - began
        status = RequestStatus.ERROR if _has_failed(outcome) else RequestStatus.SUCCESS
        work.metrics.request_ended(Direction.INBOUND, name, status, seconds)
        self._note_outcome(run, outcome, seconds)
        return outcome

    async def _give_up(
        self,
        delivery: Delivery,
        opened: OpenedTask | None,
        reason: str,
        *,
        attempts: int = 0,
        correlation_id: str | None = None,
        cause: DeadCause = DeadCause.FAILED,
    ) -> None:
        """Write a dead letter, and be done with the event. ``attempts`` is how often it ran at most."""
        digest, event = None, None
        if opened is not None:
            head, digest = opened.request.head, opened.request.digest
            event = DeadEvent(head.iss, head.cap, head.id, attempts)
        _log.error("an event on %s is given up: %s", delivery.subject, reason)
        await self._work.dead_letters.write(
            delivery, reason, digest=digest, correlation_id=correlation_id, event=event, cause=cause
        )
        await self._work.acknowledgements.done(delivery)

    # --- what is not run ---------------------------------------------------------------------------------

    async def _not_opened(self, delivery: Delivery, refusal: AdmissionRefusedError) -> None:
        """Deal with what did not get through steps 1 to 8."""
        if refusal.told == NO_HANDLER or refusal.step is Step.CHAIN:
            if delivery.delivered < _MOST_LOOKS:
                await self._back(delivery)  # another replica may be newer; the authority may become known
                return
            if refusal.step is Step.CHAIN:
                await self._give_up(delivery, None, str(refusal))
                return
        if refusal.step is Step.TIME and _is_ahead(delivery, refusal) and delivery.delivered < _MOST_LOOKS:
            await self._back(delivery)
            return
        await self._work.acknowledgements.done(delivery)

    async def _refused(self, delivery: Delivery, opened: OpenedTask, refusal: AdmissionRefusedError) -> None:
        """Deal with what did not get through steps 10 to 12."""
        if refusal.step is Step.PAYLOAD and refusal.told == refusal.reason:  # of somebody who may publish it
            before = delivery.delivered - 1
            await self._give_up(delivery, opened, str(refusal), attempts=before, cause=DeadCause.REFUSED)
        else:
            await self._work.acknowledgements.done(delivery)

    def _kept(self, delivery: Delivery, seconds: float) -> Kept:
        return Kept(self._work.acknowledgements, delivery, every_s=TASK_ACK_WAIT_S / _WORDS, seconds=seconds)

    async def _back(self, delivery: Delivery) -> None:
        delay_s = min(_LONGEST_PAUSE_S, 2.0 ** min(delivery.delivered - 1, 10))
        await self._work.acknowledgements.back(delivery, delay_s)

    def _note_outcome(self, run: EventRun, outcome: Attempted, seconds: float) -> None:
        """Audit how an attempt ended. It did: a record that fails is an alarm, not an undoing."""
        status = str(outcome.result.get("status"))
        result = sha256(encode_payload(outcome.result))
        facts = outcome_facts(run.opened.request.digest, status, seconds, result)
        try:
            self._work.audit.record_soon({**facts, "attempt": run.attempt}, self._outcome_lost)
        except AuditError as error:
            self._outcome_lost(error)

    def _outcome_lost(self, error: AuditError) -> None:
        self._work.metrics.audit_write_failures.inc()
        _log.error("an outcome could not be recorded: %s", error)


def _is_passing(refusal: AdmissionRefusedError) -> bool:
    """Say whether a refusal is about trouble of this process that may be over soon."""
    if refusal.step in _PASSING:
        return True
    if refusal.step is not Step.AUTHORIZATION:
        return False
    return refusal.decision is None or not refusal.decision.answered


def _has_failed(outcome: Attempted) -> bool:
    return outcome.result.get("status") == "failed"


def _is_ahead(delivery: Delivery, refusal: AdmissionRefusedError) -> bool:
    """Say whether an event is of a clock that goes ahead of the broker's: its time comes."""
    return refusal.request is not None and refusal.request.head.iat > delivery.stored_at_ms
