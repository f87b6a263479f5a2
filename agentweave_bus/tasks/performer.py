"""From a delivery to a recorded outcome: what a worker does with one task, in this order.

1. Admission opens it (steps 1 to 8). What can't be verified becomes a dead letter, untouched.
2. The task's log says whether it is done, being done by somebody else, or not this task at all (step 9).
   A first delivery is not looked up: if there is a record already, the write of the next step shows it.
3. Admission admits it (steps 10 to 12). What is refused is recorded as ``rejected``; when the policy can't
   be asked or the audit log not be written, the task goes back to the queue.
4. ``working`` is written into the next slot of the log. Whoever loses that write looks again.
5. The handler runs. The broker is told every few seconds that it does, until the attempt's time is up.
6. The outcome is written into the next slot. Whoever loses *that* write drops its result: another attempt has
   begun meanwhile, or somebody ended the task.
7. The task is acknowledged. Not before its outcome stands.

A worker that dies in between has acknowledged nothing, so the task comes again; its log says where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

import anyio

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.admission import Admission, AdmissionRefusedError, Step
from agentweave_bus.bus.admitted import Admitted, OpenedTask, StoredArrival
from agentweave_bus.bus.records import outcome_facts
from agentweave_bus.exceptions import (
    AuditError,
    BusError,
    EnvelopeError,
    PayloadError,
    SvidUnavailableError,
)
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.record import RecordBody, StateRecord, TaskRef
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import TaskState

__all__ = ["Attempted", "Performer", "RunTask", "TaskRun"]

_log = logging.getLogger(__name__)

_KEEP_S: Final = 10.0
"""How often the broker is told that a task is being worked on; a third of the time after which it asks."""

_LATE_S: Final = 30.0
"""How long after the end of its time an attempt may still take to end. Then the broker is told no more."""

_MOST_LOOKS: Final = 5
_UNREADABLE_DELIVERIES: Final = 10
_LONGEST_PAUSE_S: Final = 60.0
_MAX_MESSAGE: Final = 2_000

_PASSING: Final = frozenset({Step.AUDIT, Step.REPLAY, Step.ROOM})
_UNVERIFIABLE: Final = frozenset({Step.SIZE, Step.FRAME, Step.PROOF, Step.HEAD})


class TaskRun(NamedTuple):
    """One attempt at a task, for who runs it."""

    admitted: Admitted
    opened: OpenedTask
    ref: TaskRef
    attempt: int
    """Which one it is, counted from 1."""
    last: bool
    """Whether there is no other one after it."""
    log: TaskLog
    scope: anyio.CancelScope
    """What is cancelled when the task is."""


class Attempted(NamedTuple):
    """What came of an attempt: a result in its JSON form, and whether another one may fare better.

    ``retry_after`` is in seconds, where the handler said so; ``correlation_id`` names a traceback in the log.
    """

    result: dict[str, Any]
    retry: bool = False
    retry_after: float | None = None
    correlation_id: str | None = None


class RunTask(Protocol):
    """Runs an admitted task's handler. It raises nothing but cancellation."""

    async def __call__(self, run: TaskRun) -> Attempted:
        """Run one attempt."""


class _Running:
    """An attempt that is under way here, and why it is being cancelled, if it is."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.scope = anyio.CancelScope()
        self.canceled: str | None = None
        self.ended = asyncio.Event()


class Performer:
    """Does what one agent's queues give out.

    ``rule_of`` says how a task is tried again, ``seconds_of`` how long an attempt of it may take.
    """

    def __init__(
        self,
        *,
        me: SpiffeID,
        admission: Admission,
        desk: Desk,
        dead_letters: DeadLetters,
        acknowledgements: Acknowledgements,
        audit: AuditLog,
        metrics: Metrics,
        run: RunTask,
        rule_of: Callable[[OpenedTask], Retry],
        seconds_of: Callable[[OpenedTask], float],
    ) -> None:
        self._me = me
        self._admission = admission
        self._desk = desk
        self._dead_letters = dead_letters
        self._acknowledgements = acknowledgements
        self._audit = audit
        self._metrics = metrics
        self._run = run
        self._rule_of = rule_of
        self._seconds_of = seconds_of
        self._running: dict[str, _Running] = {}

    async def perform(self, delivery: Delivery) -> None:
        """Take one delivery as far as it goes. Raises nothing but what nobody foresaw."""
        try:
            await self._perform(delivery)
        except (BusError, SvidUnavailableError, EnvelopeError) as error:
            # Nothing is acknowledged whose outcome does not stand for sure.
            _log.warning("a task goes back to the queue: %s", error)
            await self._back(delivery)
        except asyncio.CancelledError:
            with anyio.move_on_after(1.0, shield=True):
                await self._acknowledgements.back(delivery, 0)
            raise

    def cancel(self, key: str, digest: bytes, reason: str) -> bool:
        """Cancel the task ``key`` if it runs here and its head has this digest; return whether it does."""
        running = self._running.get(key)
        if running is None or running.digest != digest:
            return False
        if running.canceled is None:
            running.canceled = reason
            running.scope.cancel()
        return True

    # --- the steps ---------------------------------------------------------------------------------------

    async def _perform(self, delivery: Delivery) -> None:
        try:
            opened = await self._admission.open_task(  # 1
                delivery.data, StoredArrival(delivery.subject, delivery.stored_at_ms)
            )
        except AdmissionRefusedError as refusal:
            await self._not_opened(delivery, refusal)
            return
        log = TaskLog(self._desk, self._ref(opened))
        if delivery.delivered > 1:
            await log.refresh()
        for _ in range(_MOST_LOOKS):
            if await self._settled(delivery, opened, log):  # 2
                return
            try:
                admitted = await self._admission.admit_task(opened)  # 3
            except AdmissionRefusedError as refusal:
                if not await self._refused(delivery, refusal, opened, log):
                    continue
                return
            working = await log.append(self._body(opened, TaskState.WORKING), opened.asks.digest)  # 4
            if working is not None:
                await self._attempt(delivery, admitted, opened, log, working)
                return
        await self._back(delivery)

    def _ref(self, opened: OpenedTask) -> TaskRef:
        head = opened.request.head
        return TaskRef(self._me, opened.asks.iss, head.cap, head.id)

    async def _settled(self, delivery: Delivery, opened: OpenedTask, log: TaskLog) -> bool:
        """Step 2: say whether nothing is left to be done with this delivery, and do what is."""
        last = log.last
        if last is None:
            return False
        if last.task != opened.asks.digest:
            await self._another(delivery, opened, log, last)
            return True
        if last.state.terminal:
            await self._acknowledgements.done(delivery)
            return True
        if last.state is TaskState.WORKING and log.epoch >= self._rule_of(opened).attempts:
            result = _failed(f"given up: {log.epoch} attempts, the last of which was lost with its worker")
            await self._end(delivery, opened, log, Attempted(result), dead=True)
            return True
        return False

    async def _another(self, delivery: Delivery, opened: OpenedTask, log: TaskLog, last: StateRecord) -> None:
        """Deal with another head under the same key: the same task sealed again, or another payload."""
        if last.body.pd != opened.request.head.pd.hex():
            reason = "its id or idempotency key was used before, with another payload"
            _log.error("a task is not run: %s (%r)", reason, log.ref)
            await self._dead_letters.write(delivery, reason, log=log, digest=opened.asks.digest)
        await self._acknowledgements.done(delivery)

    async def _attempt(
        self, delivery: Delivery, admitted: Admitted, opened: OpenedTask, log: TaskLog, working: StateRecord
    ) -> None:
        """Run it once: steps 5 to 7."""
        rule = self._rule_of(opened)
        began = time.perf_counter()
        running = self._running[log.ref.key] = _Running(opened.asks.digest)
        run = TaskRun(
            admitted, opened, log.ref, working.epoch, working.epoch >= rule.attempts, log, running.scope
        )
        outcome: Attempted | None = None
        in_flight = self._metrics.in_flight(Direction.INBOUND)
        in_flight.inc()
        try:
            async with self._kept(delivery, self._seconds_of(opened) + _LATE_S):
                with running.scope:
                    outcome = await self._run(run)  # 5
        finally:
            in_flight.dec()
            if self._running.get(log.ref.key) is running:
                del self._running[log.ref.key]
        seconds = time.perf_counter() - began
        if running.canceled is not None and (outcome is None or outcome.retry):
            await self._record(delivery, opened, log, TaskState.CANCELED, message=running.canceled)
            self._count(opened, RequestStatus.ERROR, seconds)
            return
        assert outcome is not None  # nothing else cancels that scope
        failed = outcome.result.get("status") == "failed"
        self._count(opened, RequestStatus.ERROR if failed else RequestStatus.SUCCESS, seconds)
        if outcome.retry and not run.last:
            await self._later(delivery, opened, log, outcome, rule.delay(run.attempt))
        else:
            await self._end(delivery, opened, log, outcome, dead=outcome.retry, seconds=seconds)

    def _kept(self, delivery: Delivery, seconds: float) -> _Kept:
        return _Kept(self._acknowledgements, delivery, seconds)

    async def _end(
        self,
        delivery: Delivery,
        opened: OpenedTask,
        log: TaskLog,
        outcome: Attempted,
        *,
        dead: bool,
        seconds: float = 0.0,
    ) -> None:
        """Record how a task ended, as a dead letter first where it is one, and acknowledge it."""
        failed = outcome.result.get("status") == "failed"
        if dead:
            await self._dead_letters.write(
                delivery,
                str(outcome.result.get("error") or "failed"),
                log=log,
                digest=opened.asks.digest,
                correlation_id=outcome.correlation_id,
            )
        state = TaskState.FAILED if failed else TaskState.COMPLETED
        record = await self._record(delivery, opened, log, state, result=outcome.result)
        if record is not None:
            self._note_outcome(opened, str(outcome.result.get("status")), seconds, record.digest)

    async def _later(
        self, delivery: Delivery, opened: OpenedTask, log: TaskLog, outcome: Attempted, delay_s: float
    ) -> None:
        """Record that a task is tried again, and have it delivered then."""
        if outcome.retry_after is not None:
            delay_s = max(delay_s, outcome.retry_after)
        body = self._body(
            opened,
            TaskState.SUBMITTED,
            message=str(outcome.result.get("error") or "")[:_MAX_MESSAGE] or None,
            retry_at=self._desk.clock_ms() + int(delay_s * 1000),
        )
        if await log.append(body, opened.asks.digest) is not None:
            await self._acknowledgements.back(delivery, delay_s)

    async def _record(
        self,
        delivery: Delivery,
        opened: OpenedTask,
        log: TaskLog,
        state: TaskState,
        *,
        message: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> StateRecord | None:
        """Write the outcome, and acknowledge the task once one stands: steps 6 and 7."""
        body = self._body(opened, state, message=message, result=result)
        try:
            record = await log.append(body, opened.asks.digest)
        except (PayloadError, EnvelopeError) as error:
            _log.error("the result of %r can't be recorded: %s", log.ref, error)
            told = _failed(f"the result can't be recorded: {error}")
            body = self._body(opened, TaskState.FAILED, result=told)
            record = await log.append(body, opened.asks.digest)
        if record is None:
            _log.warning("the outcome of an attempt at %r came too late and is dropped", log.ref)
        if log.ended:
            await self._acknowledgements.done(delivery)
        return record

    def _body(self, opened: OpenedTask, state: TaskState, **more: Any) -> RecordBody:
        return RecordBody(state=state, pd=opened.request.head.pd.hex(), **more)

    # --- what is not run ---------------------------------------------------------------------------------

    async def _not_opened(self, delivery: Delivery, refusal: AdmissionRefusedError) -> None:
        """Deal with what did not get through steps 1 to 8."""
        request = refusal.request
        trusted_later = refusal.step is Step.CHAIN or _is_passing(refusal)
        if trusted_later and delivery.delivered < _UNREADABLE_DELIVERIES:
            await self._back(delivery)  # its authority may become known here
            return
        if request is None or refusal.step is Step.DELEGATION or refusal.told is None:
            await self._dead_letters.write(delivery, str(refusal))
            await self._acknowledgements.done(delivery)
            return
        # It is genuine and meant for this agent, but too late or for nothing that this agent can do.
        head = request.head
        log = TaskLog(self._desk, TaskRef(self._me, head.iss, head.cap, head.id))
        await log.refresh()
        if not log.ended:
            state = TaskState.FAILED if refusal.step is Step.TIME else TaskState.REJECTED
            told, step = refusal.told[:_MAX_MESSAGE], refusal.step.label
            body = RecordBody(state=state, pd=head.pd.hex(), message=told, step=step)
            await log.append(body, request.digest)
        if log.ended:
            await self._acknowledgements.done(delivery)

    async def _refused(
        self, delivery: Delivery, refusal: AdmissionRefusedError, opened: OpenedTask, log: TaskLog
    ) -> bool:
        """Deal with what did not get through steps 10 to 12; false if the log must be looked at again."""
        if _is_passing(refusal):
            await self._back(delivery)
            return True
        told = _refusal_told(refusal)
        body = self._body(opened, TaskState.REJECTED, message=told, step=refusal.step.label)
        record = await log.append(body, opened.asks.digest)
        if record is None:
            return False
        await self._acknowledgements.done(delivery)
        return True

    async def _back(self, delivery: Delivery) -> None:
        delay_s = min(_LONGEST_PAUSE_S, 2.0 ** min(delivery.delivered - 1, 10))
        await self._acknowledgements.back(delivery, delay_s)

    # --- what is written down ----------------------------------------------------------------------------

    def _count(self, opened: OpenedTask, status: RequestStatus, seconds: float) -> None:
        self._metrics.request_ended(Direction.INBOUND, opened.capability.name, status, seconds)

    def _note_outcome(self, opened: OpenedTask, status: str, seconds: float, result: bytes) -> None:
        """Audit an outcome. It stands: a record that fails is an alarm, not an undoing."""
        facts = outcome_facts(opened.request.digest, status, seconds, result)
        try:
            self._audit.record_soon(facts, self._outcome_lost)
        except AuditError as error:
            self._outcome_lost(error)

    def _outcome_lost(self, error: AuditError) -> None:
        self._metrics.audit_write_failures.inc()
        _log.error("an outcome could not be recorded: %s", error)


class _Kept:
    """Tells the broker that a delivery is being worked on, for at most so many seconds."""

    def __init__(self, acknowledgements: Acknowledgements, delivery: Delivery, seconds: float) -> None:
        self._acknowledgements = acknowledgements
        self._delivery = delivery
        self._left = int(seconds / _KEEP_S) + 1
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._again()

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._telling is not None:
            self._telling.cancel()
            with suppress(asyncio.CancelledError):
                await self._telling

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_KEEP_S, self._tell)

    def _tell(self) -> None:
        # A timer and not a task, because most attempts are over long before it goes off.
        self._telling = asyncio.ensure_future(self._acknowledgements.keep(self._delivery))
        self._left -= 1
        if self._left > 0:
            self._again()
        else:
            _log.error("a task has not ended in its time; another worker will get it")


def _is_passing(refusal: AdmissionRefusedError) -> bool:
    """Say whether a refusal is about trouble of this process that may be over soon."""
    if refusal.step in _PASSING:
        return True
    if refusal.step is not Step.AUTHORIZATION:
        return False
    return refusal.decision is None or not refusal.decision.answered


def _refusal_told(refusal: AdmissionRefusedError) -> str:
    told = refusal.told or "not admitted"
    return f"{told} (audit id {refusal.audit_id})"[:_MAX_MESSAGE]


def _failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "messages": [], "error": error}
