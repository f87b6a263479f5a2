"""From a delivery to a recorded outcome: what a worker does with one task, in this order.

1. Admission opens it (steps 1 to 8). What can't be verified becomes a dead letter.
2. The task's log says whether it is done, being done by somebody else, or not this task at all (step 9).
   A first delivery is not looked up: if there is a record already, the write of the next step shows it.
3. Admission admits it (steps 10 to 12). What is refused is recorded as ``rejected``, and what its steps did
   in earlier attempts is undone, in the agent's own name; when the policy can't be asked or the audit log not
   be written, the task goes back to the queue.
4. ``working`` is written into the next slot of the log. Whoever loses that write looks again.
5. The handler runs. The broker is told every few seconds that it does, until the attempt's time is up. When
   the attempts are used up, or the task was cancelled after an attempt, what its steps did is undone instead.
6. The outcome is written into the next slot. Whoever loses *that* write drops its result: another attempt has
   begun meanwhile, or somebody ended the task.
7. The task is acknowledged. Not before its outcome stands.

A worker that dies in between has acknowledged nothing, so the task comes again; its log says where it was.

A task that was given up may come once more, as a redrive (:mod:`.redrive`). It begins anew with the attempt
that the redrive names, if the last record is ``failed`` of the attempt before, and has all its attempts
again. What comes of an earlier run of the same task is let go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import anyio

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.admission import Admission, AdmissionRefusedError, Step
from agentweave_bus.bus.admitted import Admitted, OpenedTask, StoredArrival
from agentweave_bus.bus.cancel_scopes import cancel_scope
from agentweave_bus.bus.connection import DEFAULT_MAX_MESSAGE_BYTES
from agentweave_bus.bus.records import WitnessNotes, envelope_facts, outcome_facts
from agentweave_bus.envelope import Head, encode_payload
from agentweave_bus.envelope.blob import BLOB_CONTENT_TYPE
from agentweave_bus.exceptions import (
    AttemptLostError,
    AuditError,
    BlobError,
    BusError,
    EnvelopeError,
    PayloadError,
    QueueFullError,
    SvidUnavailableError,
    UnreachableError,
)
from agentweave_bus.observability.metrics import DeadCause, Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.attempt import Attempted, Kept, RunTask, TaskRun
from agentweave_bus.tasks.case import Case
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.parking import Parking
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.record import RecordBody, StateRecord, TaskRef
from agentweave_bus.tasks.redrive import origin_of, redriven_attempt
from agentweave_bus.tasks.retry import LONGEST_DELAY, Retry
from agentweave_bus.tasks.step_log import StepLog
from agentweave_bus.tasks.unreadable import Unreadable
from agentweave_bus.types import TaskState

__all__ = ["Performer"]

_log = logging.getLogger(__name__)

_WORDS: Final = 3
"""How often the broker is told that a task is worked on within the time after which it gives it to others."""

_LATE_S: Final = 30.0
"""How long after the end of its time an attempt may still take to end. Then the broker is told no more."""

_LAST_WORDS_S: Final = 1.0
_CLOCKS_DIFFER_MS: Final = 30_000
"""A task queued by the control role when it was due, by its clock, comes so much too early here at most."""

_UNDOER: Final = "saga:undoer"
"""Where it stands, beside a task's steps, which message of the queue undoes it after it has ended."""

_MOST_LOOKS: Final = 5
_LONGEST_PAUSE_S: Final = 60.0
_LONGEST_RETRY_MS: Final = int(LONGEST_DELAY * 1000)
_MAX_MESSAGE: Final = 2_000

_PASSING: Final = frozenset({Step.AUDIT, Step.REPLAY, Step.ROOM})


class _Running:
    """An attempt that is under way here, and why it is being cancelled, if it is."""

    def __init__(self, digest: bytes, epoch: int) -> None:
        self.digest = digest
        self.epoch = epoch
        self.scope = cancel_scope()
        self.canceled: str | None = None


class Performer:
    """Does what one agent's queues give out.

    ``rule_of`` says how a task is tried again, ``seconds_of`` how long an attempt of it may take,
    ``ack_wait_s`` after how many seconds without a word the broker gives a task to somebody else.
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
        ack_wait_s: float,
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
        self._ack_wait_s = ack_wait_s
        self._running: dict[str, _Running] = {}
        self._unreadable = Unreadable(desk.clock_ms)
        # Apart: what nobody has signed must not take the places of what somebody has.
        self._incomplete = Unreadable(desk.clock_ms)
        self._parking = Parking(acknowledgements, desk.clock_ms)
        self.wake = self._parking.wake

    async def perform(self, delivery: Delivery) -> None:
        """Take one delivery as far as it goes. Raises nothing but what nobody foresaw."""
        try:
            await self._perform(delivery)
        except AttemptLostError as error:
            _log.warning("an attempt ends without an outcome: %s", error)
        except (BusError, SvidUnavailableError, EnvelopeError) as error:
            # Nothing is acknowledged whose outcome does not stand for sure.
            _log.warning("a task goes back to the queue: %s", error)
            await self._back(delivery)
        except asyncio.CancelledError:
            with anyio.move_on_after(_LAST_WORDS_S, shield=True):
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
        head = opened.request.head
        log = TaskLog(self._desk, TaskRef(self._me, opened.asks.iss, head.cap, head.id))
        case = Case(delivery, opened, log)
        if delivery.delivered > 1:
            self._metrics.redelivered(head.cap)
        if delivery.delivered > 1 or case.redrive:
            await log.refresh()
        for _ in range(_MOST_LOOKS):
            if await self._settled(case):  # 2
                return
            try:
                approval = log.approval
                said = None if approval is None else approval.decided.facts()
                admitted = await self._admitted(case, said)  # 3
            except AdmissionRefusedError as refusal:
                if await self._refused(case, refusal):
                    return
                continue
            try:
                if await self._begun(case, admitted):
                    return
            finally:
                self._admission.leave_task(admitted)
        await self._back(delivery)

    async def _admitted(self, case: Case, approval: Mapping[str, Any] | None) -> Admitted:
        """Take step 3. A large payload takes its time to be fetched, and the broker is told so."""
        if case.opened.request.head.ct != BLOB_CONTENT_TYPE:
            admitted = await self._admission.admit_task(case.opened, approval=approval)
        else:
            async with self._kept(case):
                admitted = await self._admission.admit_task(case.opened, approval=approval)
        try:
            self._rule_of(case.opened)
        except PayloadError as error:  # it asks for what is no rule of retries
            self._admission.leave_task(admitted)
            raise self._no_rule(case, error) from error
        return admitted

    def _no_rule(self, case: Case, error: PayloadError) -> AdmissionRefusedError:
        told, request = str(error), case.opened.request
        _log.warning("a task is not run: %s (%r)", told, case.log.ref)
        refusal = AdmissionRefusedError(Step.PAYLOAD, told, told=told, request=request)
        refusal.audit_id = self._note_refusal(case, told, Step.PAYLOAD)
        return refusal

    async def _begun(self, case: Case, admitted: Admitted, give_up: str | None = None) -> bool:
        """Run an admitted task, or undo it (``give_up`` says why); false: the log must be looked at again."""
        log = case.log
        if log.closed and log.last is not None:
            await self._undo(case, admitted, log.last)
            return True
        if give_up is None and log.epoch > 0 and case.tries(log.epoch) >= self._rule_of(case.opened).attempts:
            give_up = _exhausted(case)
        if give_up is None and log.crowded:
            give_up = f"given up after {len(log.records)} records, since its log has room for few more"
        working = await log.append(case.working(undoes=give_up is not None), case.digest)  # 4
        if working is None:
            await log.refresh()  # what was there may not be the last
            return False
        await self._attempt(case, admitted, working, give_up)
        return True

    async def _settled(self, case: Case) -> bool:
        """Step 2: say whether nothing is left to be done with this delivery, and do what is."""
        last = case.log.last
        if last is None and not case.redrive:
            return False
        if last is not None and last.task != case.digest:
            await self._another(case, last)
            return True
        if last is None or case.redrive != case.log.redriven:
            return await self._of_another_run(case, last)
        if last.state.terminal and not _ended_between(case.log):
            await self._acknowledgements.done(case.delivery)
            return True
        if case.log.ended:
            return False  # its steps are to be undone
        return await self._waits(case, last)

    async def _waits(self, case: Case, last: StateRecord) -> bool:
        """Say whether a task is to wait, for its time or for somebody, and give it back until then."""
        if (wait_s := self._not_before(last)) > 0:
            await self._acknowledgements.back(case.delivery, wait_s)
            return True
        return await self._parking.stays(case.parked)

    async def _of_another_run(self, case: Case, last: StateRecord | None) -> bool:
        """Say whether a delivery is no part of the task's present run, and let it go if it isn't one.

        A redrive begins a new one only behind the failure that it names. Any other is one that has had its
        run, or is to bring back what has not failed: nothing runs by it.
        """
        attempt = case.redrive
        failed = last is not None and last.state is TaskState.FAILED and last.epoch == attempt - 1
        if failed and not case.log.crowded:
            return False
        if attempt > case.log.redriven:
            told = "has no record" if last is None else f"is {last.state.value} in attempt {last.epoch}"
            told = f"has {len(case.log.records)} records, and room for few more" if failed else told
            reason = f"a redrive to attempt {attempt} of a task that {told}"
            _log.warning("a task is not run: %s (%r)", reason, case.log.ref)
            self._note_refusal(case, reason)
            if last is None:  # nothing else would tell of it any more
                await self._dead_letters.write(
                    case.delivery, reason, log=case.log, digest=case.digest, cause=DeadCause.REFUSED
                )
        await self._acknowledgements.done(case.delivery)
        return True

    def _not_before(self, last: StateRecord) -> float:
        """Return for how many seconds a task is to be left alone.

        A broker that crashed has forgotten what it gave out and what was to wait: it may give a task to a
        second worker while the first one runs it, and before a retry is due. So may any broker when a worker
        stood still; it is that worker then who gets it a second time.
        """
        now_ms = self._desk.clock_ms()
        if last.state is TaskState.SUBMITTED and last.body.retry_at is not None:
            return min(last.body.retry_at - now_ms, _LONGEST_RETRY_MS) / 1000
        if last.state is TaskState.WORKING:
            if self._runs_here(last):
                return self._ack_wait_s
            # So long, after the broker came back, the other one may take to say that it works on it.
            quiet_s = min((now_ms - last.at_ms) / 1000, self._acknowledgements.connected_s)
            return self._ack_wait_s - quiet_s
        return 0.0

    def _runs_here(self, record: StateRecord) -> bool:
        running = self._running.values()
        return any(one.digest == record.task and one.epoch == record.epoch for one in running)

    async def _another(self, case: Case, last: StateRecord) -> None:
        """Deal with another head under the same key: the same task sealed again, or another payload.

        Who submitted it is told by the record that stands. It is no dead letter: under that key nothing could
        be made of it, by no operator either.
        """
        if last.body.pd != case.pd:
            reason = "its id or idempotency key was used before, with another payload"
            _log.warning("a task is not run: %s (%r)", reason, case.log.ref)
            self._note_refusal(case, reason)
        await self._acknowledgements.done(case.delivery)

    async def _attempt(
        self, case: Case, admitted: Admitted, working: StateRecord, give_up: str | None
    ) -> None:
        """Run it once: steps 5 to 7."""
        rule, tries, key = self._rule_of(case.opened), case.tries(working.epoch), case.log.ref.key
        began = time.perf_counter()
        running = self._running[key] = _Running(case.digest, working.epoch)
        in_flight = self._metrics.in_flight(Direction.INBOUND)
        in_flight.inc()
        try:
            async with self._kept(case) as kept:
                last = tries >= rule.attempts
                run = TaskRun(admitted, case.opened, case.log, working, kept, last, give_up)
                outcome: Attempted | None = None
                with running.scope:
                    outcome = await self._unless_stopped(run)  # 5
                canceled = running.canceled
                if canceled is not None and (outcome is None or outcome.retry):
                    outcome = await self._run(run._replace(give_up=canceled))
                else:
                    canceled = None
        finally:
            in_flight.dec()
            if self._running.get(key) is running:
                del self._running[key]
        assert outcome is not None  # nothing else cancels that scope
        seconds = time.perf_counter() - began
        self._count(case.opened, outcome, seconds)
        if outcome.retry:
            await self._later(case, outcome, rule.delay(tries))
        elif canceled is not None:
            undoes = working.body.undoes
            await self._record(case, case.body(TaskState.CANCELED, message=canceled, undoes=undoes))
        else:
            dead = _cause(case.log) if outcome.exhausted else None
            await self._end(case, outcome, seconds, dead=dead)

    async def _unless_stopped(self, run: TaskRun) -> Attempted:
        """Run an attempt; if this worker is stopped meanwhile, put on record that another one may begin."""
        try:
            return await self._run(run)
        except asyncio.CancelledError:
            if not self._running[run.log.ref.key].scope.cancel_called:
                body = RecordBody(
                    state=TaskState.SUBMITTED,
                    pd=run.opened.request.head.pd.hex(),
                    message="its worker was stopped",
                    retry_at=self._desk.clock_ms(),
                    given_back=True,
                    undoes=run.record.body.undoes,
                )
                with anyio.move_on_after(_LAST_WORDS_S, shield=True), suppress(BusError):
                    await run.log.append(body, run.opened.asks.digest, deadline_s=_LAST_WORDS_S)
            raise

    async def _undo(self, case: Case, admitted: Admitted, last: StateRecord) -> None:
        """Undo what the steps of a task did that was ended between two attempts, and let it go.

        No record of an attempt can follow to say that this one has it, and its sender may publish its frame
        as often as he likes. So one message of the queue undoes it, the first that begins; others are let go.
        """
        if not await self._undoes(case, last):
            await self._acknowledgements.done(case.delivery)
            return
        why = last.body.message or "canceled"
        async with self._kept(case) as kept:
            run = TaskRun(admitted, case.opened, case.log, last, kept, last=True, give_up=why)
            outcome = await self._run(run)
        if outcome.retry:
            await self._back(case.delivery)
            return
        if outcome.not_undone:
            await self._not_undone(case.delivery, case.log, case.digest, outcome.result.get("error"))
        await self._acknowledgements.done(case.delivery)

    async def _undoes(self, case: Case, last: StateRecord) -> bool:
        """Say whether it is by this message that a task which has ended is undone; if none is, it is now."""
        steps = StepLog(self._desk, case.log, last, largest=lambda: DEFAULT_MAX_MESSAGE_BYTES)
        while (undoer := await steps.load(_UNDOER)) is None:
            with suppress(AttemptLostError):  # somebody else has written it meanwhile
                await steps.save(_UNDOER, case.delivery.sequence)
                return True
        return bool(undoer == case.delivery.sequence)

    def _kept(self, case: Case) -> Kept:
        return Kept(
            self._acknowledgements,
            case.delivery,
            every_s=self._ack_wait_s / _WORDS,
            seconds=self._seconds_of(case.opened) + _LATE_S,
        )

    async def _end(self, case: Case, outcome: Attempted, seconds: float, *, dead: DeadCause | None) -> None:
        """Record how a task ended, as a dead letter first where it is one, and acknowledge it."""
        if dead is not None:
            await self._dead_letters.write(
                case.delivery,
                str(outcome.result.get("error") or "failed"),
                log=case.log,
                digest=case.digest,
                correlation_id=outcome.correlation_id,
                cause=dead,
            )
        state = TaskState.FAILED if outcome.failed else TaskState.COMPLETED
        undoes = True if case.log.undoing else None
        body = case.body(state, result=outcome.result, progress=outcome.progress, undoes=undoes)
        record = await self._record(case, body)
        if record is not None:
            self._note_outcome(case.opened, record, seconds)
            if dead is not None:
                _log.error("%s is given up at attempt %d: %s", _named(case), case.log.epoch, _why(outcome))
            elif outcome.failed:
                _log.info("%s failed at attempt %d: %s", _named(case), case.log.epoch, _why(outcome))

    async def _later(self, case: Case, outcome: Attempted, delay_s: float) -> None:
        """Record that a task is tried again, and have it delivered then."""
        if outcome.retry_after is not None:
            delay_s = min(max(delay_s, outcome.retry_after), LONGEST_DELAY)
        body = case.body(
            TaskState.SUBMITTED,
            message=str(outcome.result.get("error") or "")[:_MAX_MESSAGE] or None,
            retry_at=self._desk.clock_ms() + int(delay_s * 1000),
            undoes=True if outcome.undoing else None,
        )
        if await case.log.append(body, case.digest) is not None:
            next_is = "undone" if outcome.undoing else "tried again"
            said = "%s failed at attempt %d and is %s in %.1f s: %s"
            _log.warning(said, _named(case), case.log.epoch, next_is, delay_s, _why(outcome))
            self._metrics.tried_again(case.log.ref.capability)
            await self._acknowledgements.back(case.delivery, delay_s)

    async def _record(self, case: Case, body: RecordBody) -> StateRecord | None:
        """Write the outcome, and acknowledge the task once one stands: steps 6 and 7."""
        try:
            record = await case.log.append(body, case.digest)
        except (PayloadError, EnvelopeError) as error:
            record = await case.log.append(await self._stored_apart(case, body, error), case.digest)
        if record is None:
            _log.warning("the outcome of an attempt at %r came too late and is dropped", case.log.ref)
        if case.log.ended:
            await self._acknowledgements.done(case.delivery)
        return record

    async def _stored_apart(self, case: Case, body: RecordBody, error: Exception) -> RecordBody:
        """Store a result for its submitter that is too large for a record; return the record instead."""
        blobs, ref = self._desk.blobs, case.log.ref
        if blobs is not None and body.result is not None:
            try:
                data = encode_payload(body.result, blobs.limits)
                async with self._kept(case):
                    blob = await blobs.put(ref.sender, data, f"result {ref.key}")
                return body._replace(result=None, blob=blob.to_json())
            except (PayloadError, QueueFullError) as reason:
                error = reason
            except UnreachableError as reason:
                raise BusError(str(reason)) from reason
        _log.error("the result of %r can't be recorded: %s", ref, error)
        told = _failed(f"the result can't be recorded: {error}")
        return case.body(TaskState.FAILED, result=told)

    # --- what is not run ---------------------------------------------------------------------------------

    async def _not_opened(self, delivery: Delivery, refusal: AdmissionRefusedError) -> None:
        """Deal with what did not get through steps 1 to 8."""
        request = refusal.request
        trusted_later = refusal.step is Step.CHAIN or _is_passing(refusal)
        if trusted_later and not self._unreadable.too_long(delivery):
            await self._back(delivery)  # its authority may become known here
            return
        if request is not None and refusal.step is Step.TIME and (early_s := self._early(request.head)):
            await self._acknowledgements.back(delivery, early_s)
            return
        if request is None or refusal.step is Step.DELEGATION or refusal.told is None:
            digest = None if request is None else request.digest
            await self._dead_letters.write(delivery, str(refusal), digest=digest, cause=DeadCause.REFUSED)
            await self._acknowledgements.done(delivery)
            return
        # It is genuine and meant for this agent, but too late or for nothing that this agent can do.
        head, origin = request.head, origin_of(request)
        log = TaskLog(self._desk, TaskRef(self._me, origin.head.iss, head.cap, head.id))
        await log.refresh()
        if log.last is not None and log.last.task != origin.digest:
            await self._acknowledgements.done(delivery)  # it would be written into another task's log
            return
        mine = redriven_attempt(head) == log.redriven
        if refusal.step is Step.TIME and mine and await self._undone_late(delivery, log, refusal.told):
            return
        if not log.ended and mine:
            if log.epoch > 0 and refusal.step is not Step.TIME:
                await self._not_undone(delivery, log, origin.digest, refusal)
            state = TaskState.FAILED if refusal.step is Step.TIME else TaskState.REJECTED
            told, step = refusal.told[:_MAX_MESSAGE], refusal.step.label
            body = RecordBody(state=state, pd=head.pd.hex(), message=told, step=step)
            await log.append(body, origin.digest)
        if log.ended or not mine:
            await self._acknowledgements.done(delivery)

    async def _undone_late(self, delivery: Delivery, log: TaskLog, why: str) -> bool:
        """Undo what the attempts at a task did whose time is over; say whether that is taken care of."""
        if log.last is None or log.epoch == 0 or (log.ended and not _ended_between(log)):
            return False
        if (wait_s := self._not_before(log.last)) > 0 and log.last.state is TaskState.WORKING:
            await self._acknowledgements.back(delivery, wait_s)
            return True
        try:
            arrival = StoredArrival(delivery.subject, delivery.stored_at_ms)
            opened = await self._admission.open_task(delivery.data, arrival, late=True)
        except AdmissionRefusedError as refusal:
            await self._not_undone(delivery, log, log.last.task, refusal)
            return False
        case = Case(delivery, opened, log)
        try:
            try:
                admitted = await self._admitted(case, None)
            except AdmissionRefusedError as refusal:
                admitted = await self._let_undo(case, refusal)
        except AdmissionRefusedError as refusal:
            if self._comes_again(case, refusal):
                await self._back(delivery)
                return True
            await self._not_undone(delivery, log, case.digest, refusal)
            return False
        try:
            if not await self._begun(case, admitted, why):
                await self._back(delivery)
        finally:
            self._admission.leave_task(admitted)
        return True

    def _early(self, head: Head) -> float:
        """Return how many seconds a task comes too early, as far as the clocks of two machines may differ."""
        early_ms = 0 if head.nbf is None else head.nbf - self._desk.clock_ms()
        return early_ms / 1000 if 0 < early_ms <= _CLOCKS_DIFFER_MS else 0.0

    async def _refused(self, case: Case, refusal: AdmissionRefusedError) -> bool:
        """Deal with what did not get through steps 10 to 12; false if the log must be looked at again."""
        if self._comes_again(case, refusal):
            await self._back(case.delivery)
            return True
        if isinstance(refusal.__cause__, BlobError) or _is_poison(refusal):
            await self._dead_letters.write(
                case.delivery, str(refusal), log=case.log, digest=case.digest, cause=DeadCause.REFUSED
            )
        if case.log.undoing:  # what it asks for is over: there is nothing left to refuse or to approve of
            return await self._refused_undone(case, refusal)
        terms = None if refusal.decision is None else refusal.decision.approval
        if terms is not None and not case.log.ended:
            stays = await self._parking.ask(case.parked, terms, case.opened, refusal.reason)
            if stays is not None:
                return stays
        if not case.log.ended and not await self._rejected(case, refusal):
            return False
        if _ended_between(case.log):
            return await self._refused_undone(case, refusal)
        await self._acknowledgements.done(case.delivery)
        return True

    async def _rejected(self, case: Case, refusal: AdmissionRefusedError) -> bool:
        """Record that a task is refused; return whether it has ended, by this or otherwise."""
        body = case.body(TaskState.REJECTED, message=_refusal_told(refusal), step=refusal.step.label)
        return await case.log.append(body, case.digest) is not None or case.log.ended

    async def _refused_undone(self, case: Case, refusal: AdmissionRefusedError) -> bool:
        """Undo what a task did that was begun and is refused since; false as with :meth:`_refused`."""
        try:
            admitted = await self._let_undo(case, refusal)
        except AdmissionRefusedError as fault:
            if fault is not refusal and self._comes_again(case, fault):
                await self._back(case.delivery)
                return True
            await self._not_undone(case.delivery, case.log, case.digest, fault)
            if not case.log.ended and not await self._rejected(case, refusal):
                return False
            await self._acknowledgements.done(case.delivery)
            return True
        try:
            return await self._begun(case, admitted, _refusal_told(refusal))
        finally:
            self._admission.leave_task(admitted)

    async def _let_undo(self, case: Case, refusal: AdmissionRefusedError) -> Admitted:
        """Have a refused task undone in the agent's own name: it answers for what it has begun itself.

        Raises:
            AdmissionRefusedError: it can't be, because the handler could not be given its payload.

        """
        if refusal.decision is None or _is_passing(refusal):
            raise refusal
        async with self._kept(case):
            return await self._admission.undo_task(case.opened, refusal.decision)

    async def _not_undone(self, delivery: Delivery, log: TaskLog, digest: bytes, why: object) -> None:
        """Raise an alarm: attempts at a task may have done something, and nobody can undo it any more."""
        _log.error("what attempts at %r did is not undone: %s", log.ref, why)
        reason = f"what its attempts did is not undone: {why}"
        await self._dead_letters.write(delivery, reason, log=log, digest=digest, cause=DeadCause.REFUSED)

    def _comes_again(self, case: Case, refusal: AdmissionRefusedError) -> bool:
        """Say whether a refused task is to be tried again, because it may fare better."""
        if not _is_passing(refusal):
            return False
        return not (_is_poison(refusal) and self._incomplete.too_long(case.delivery))

    async def _back(self, delivery: Delivery) -> None:
        delay_s = min(_LONGEST_PAUSE_S, 2.0 ** min(delivery.delivered - 1, 10))
        await self._acknowledgements.back(delivery, delay_s)

    # --- what is written down ----------------------------------------------------------------------------

    def _count(self, opened: OpenedTask, outcome: Attempted, seconds: float) -> None:
        status = RequestStatus.ERROR if outcome.failed else RequestStatus.SUCCESS
        self._metrics.request_ended(Direction.INBOUND, opened.capability.name, status, seconds)

    def _note_refusal(self, case: Case, reason: str, step: Step = Step.REPLAY) -> str:
        """Count and audit a refusal; return the record's id, if there is one."""
        request = case.opened.request
        self._metrics.admission_refused(step.label, "refused")
        record = {"event": "refusal", "step": step.number, "step_name": step.label}
        try:
            said = {**record, "reason": reason, **envelope_facts(request, WitnessNotes())}
            return self._audit.append(said).audit_id
        except AuditError as error:
            self._outcome_lost(error)
            return ""

    def _note_outcome(self, opened: OpenedTask, record: StateRecord, seconds: float) -> None:
        """Audit an outcome. It stands: a record that fails is an alarm, not an undoing."""
        facts = outcome_facts(opened.request.digest, record.state.value, seconds, record.digest)
        try:
            self._audit.record_soon(facts, self._outcome_lost)
        except AuditError as error:
            self._outcome_lost(error)

    def _outcome_lost(self, error: AuditError) -> None:
        self._metrics.audit_write_failures.inc()
        _log.error("an outcome could not be recorded: %s", error)


def _named(case: Case) -> str:
    """Name a task for the log as its submitter names it."""
    ref = case.log.ref
    return f"task {ref.capability}/{ref.id} from {ref.sender}"


def _why(outcome: Attempted) -> str:
    return str(outcome.result.get("error") or "failed")[:_MAX_MESSAGE]


def _is_passing(refusal: AdmissionRefusedError) -> bool:
    """Say whether a refusal is about trouble of this process that may be over soon."""
    if refusal.step in _PASSING or (refusal.step is Step.PAYLOAD and refusal.retry_after is not None):
        return True
    if refusal.step is not Step.AUTHORIZATION:
        return False
    return refusal.decision is None or not refusal.decision.answered


def _is_poison(refusal: AdmissionRefusedError) -> bool:
    """Say whether a refusal is about trouble that may be the task's own, and then is not over soon."""
    cause = refusal.__cause__
    missing = isinstance(cause, BlobError) and cause.missing
    return missing or (refusal.step is Step.AUTHORIZATION and refusal.decision is None)


def _ended_between(log: TaskLog) -> bool:
    """Say whether a task was cancelled or rejected after an attempt, so that its steps are to be undone."""
    ended = log.last is not None and log.last.state in (TaskState.CANCELED, TaskState.REJECTED)
    return ended and log.epoch > 0


def _refusal_told(refusal: AdmissionRefusedError) -> str:
    told = refusal.told or "not admitted"
    return f"{told} (audit id {refusal.audit_id})"[:_MAX_MESSAGE]


def _exhausted(case: Case) -> str:
    tries = max(1, case.log.runs(case.redrive) - case.log.given_back)
    count = "1 attempt" if tries == 1 else f"{tries} attempts"
    return f"given up after {count}, the last of which was lost with its worker"


def _cause(log: TaskLog) -> DeadCause:
    """Say whether the last attempt of a task that was given up had failed, or was lost.

    After a failure the record that is first to tell of undoing is ``submitted``. One that begins with undoing
    found an attempt that had left no word.
    """
    undoes = (one for one in log.records if one.epoch >= log.redriven and one.body.undoes)
    first = next(undoes, None)
    return DeadCause.FAILED if first is None or first.state is not TaskState.WORKING else DeadCause.LOST


def _failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "messages": [], "error": error}
