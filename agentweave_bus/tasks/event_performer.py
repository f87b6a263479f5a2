"""From an event that was given out to one that is done with, in this order.

1. Admission opens it (steps 1 to 8). What can't be verified is acknowledged: it was audited, and the stream
   keeps it. What may be genuine, of an authority that is not known here yet, comes again.
2. An event that was handled here before, and is stored a second time, is acknowledged unrun (step 9).
3. Admission admits it (steps 10 to 12). What is refused is acknowledged and audited; data that its handler
   can't take are a dead letter as well. While the policy can't be asked or the audit log not be written, the
   event is held here.
4. The handler runs. The broker is told every few seconds that it does, until the attempt's time is up.
5. A failure that may pass is tried again later, as often as the handler's rule says; the broker counts. Any
   other, or the last one, is a dead letter.
6. The event is acknowledged.

A worker that dies before the last step has acknowledged nothing, so another replica gets the event: handlers
see an event at least once, and sometimes twice.
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
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.attempt import Attempted, Kept
from agentweave_bus.tasks.dead_letters import DeadEvent, DeadLetters
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.retry import Retry

__all__ = ["EventPerformer", "EventRun", "EventWork", "RunEvent", "SeenEvents", "Subscriber"]

_log = logging.getLogger(__name__)

_LATE_S: Final = 30.0
"""How long after the end of its time an attempt may still take to end. Then the broker is told no more."""

_HELD_S: Final = 3_600.0
"""How long an event is held here while nobody can say whether it is allowed."""

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
    """What was handled here lately, by publisher, name, id and data, and as which message of the stream.

    A message of the same content under another number is a second copy: published again by its publisher, who
    had no clear word of the first, or by somebody who copied it.
    """

    def __init__(self, most: int = _MOST_SEEN) -> None:
        self._most = most
        self._seen: OrderedDict[str, tuple[int, bytes]] = OrderedDict()

    def first(self, opened: OpenedTask, number: int) -> tuple[int, bytes]:
        """Return under which number, and with which head, the event was first seen; this one if it is new."""
        head, digest = opened.request.head, opened.request.digest
        key = f"{claim_key(head.iss, head.aud, head.cap, head.id)}{head.pd.hex()}"
        found = self._seen.setdefault(key, (number, digest))
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
        return found


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
            if not admission.is_new(opened):
                admission.replayed(opened)
                return
            admitted = await admission.admit_task(opened)
        except AdmissionRefusedError:
            return  # counted, logged and audited already
        await self._run(EventRun(admitted, opened, attempt=1, last=True))

    # --- the steps ---------------------------------------------------------------------------------------

    async def _perform(self, publisher: SpiffeID, delivery: Delivery) -> None:
        work = self._work
        try:
            opened = work.admission.open_event(  # 1
                delivery.data,
                StoredArrival(delivery.subject, delivery.stored_at_ms),
                publisher=publisher,
                handler=lambda name: None if (found := work.find(name)) is None else found.bound,
            )
        except AdmissionRefusedError as refusal:
            await self._not_opened(delivery, refusal)
            return
        subscriber = work.find(opened.request.head.cap)
        assert subscriber is not None  # admission found it, too
        if self._is_copy(delivery, opened):  # 2
            await work.acknowledgements.done(delivery)
            return
        if delivery.delivered > subscriber.retry.attempts:
            reason = f"given up: given out {delivery.delivered - 1} times, and never acknowledged"
            await self._give_up(delivery, opened, reason, attempts=delivery.delivered - 1)
            return
        admitted = await self._admitted(delivery, opened)  # 3
        if admitted is not None:
            await self._attempt(delivery, admitted, opened, subscriber)  # 4 to 6

    def _is_copy(self, delivery: Delivery, opened: OpenedTask) -> bool:
        number, digest = self._seen.first(opened, delivery.sequence)
        if number == delivery.sequence:
            return False
        if digest == opened.request.digest:
            self._work.admission.replayed(opened)
        return True

    async def _admitted(self, delivery: Delivery, opened: OpenedTask) -> Admitted | None:
        """Return it admitted, whatever time that takes; ``None`` where it is refused and dealt with."""
        pause = _FIRST_PAUSE_S
        until = anyio.current_time() + _HELD_S
        async with self._kept(delivery, _HELD_S):
            while anyio.current_time() < until:
                try:
                    return await self._work.admission.admit_task(opened)
                except AdmissionRefusedError as refusal:
                    if not _is_passing(refusal):
                        await self._refused(delivery, opened, refusal)
                        return None
                await anyio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        await self._back(delivery)
        return None

    async def _attempt(
        self, delivery: Delivery, admitted: Admitted, opened: OpenedTask, subscriber: Subscriber
    ) -> None:
        work, rule = self._work, subscriber.retry
        run = EventRun(admitted, opened, delivery.delivered, delivery.delivered >= rule.attempts)
        async with self._kept(delivery, work.seconds_of(subscriber) + _LATE_S):
            outcome = await self._run(run)
        if outcome.retry and not run.last:
            await work.acknowledgements.back(
                delivery, max(rule.delay(run.attempt), outcome.retry_after or 0.0)
            )
            return
        if _has_failed(outcome):
            reason = str(outcome.result.get("error") or "failed")
            await self._give_up(
                delivery, opened, reason, attempts=run.attempt, correlation_id=outcome.correlation_id
            )
        else:
            await work.acknowledgements.done(delivery)

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
    ) -> None:
        """Write a dead letter, and be done with the event."""
        digest, event = None, None
        if opened is not None:
            head, digest = opened.request.head, opened.request.digest
            event = DeadEvent(head.iss, head.cap, head.id, attempts)
        _log.error("an event on %s is given up: %s", delivery.subject, reason)
        await self._work.dead_letters.write(
            delivery, reason, digest=digest, correlation_id=correlation_id, event=event
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
            await self._give_up(delivery, opened, str(refusal))
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
