"""Answering calls: from a subscription to a signed reply.

Each capability has a subscription of its own in a queue group, so that replicas share the work. A
message is taken in when fewer than ``taken_in`` are; until then it waits in the subscription's bounded
queue; the queues of all share ``queued_bytes``. What :class:`~agentweave_bus.bus.admission.Admission` lets
through is dispatched; its result, or the refusal that may be told, goes back signed and bound to the digest
of the request, on the connection on which the request came.

What a handler does, and what a result looks like, is not known here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from nats.aio.msg import Msg

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.admission import Admission, AdmissionRefusedError, Admitted, Arrival
from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.occupancy import DEFAULT_MAX_BYTES
from agentweave_bus.bus.records import outcome_facts
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.bus.turns import Turns
from agentweave_bus.envelope import (
    Draft,
    Kind,
    OpenedEnvelope,
    Sealed,
    Sealer,
    encode_payload,
    new_id,
)
from agentweave_bus.exceptions import AgentWeaveError, AuditError, EnvelopeError, PayloadError
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["QUEUE_GROUP", "Dispatch", "Responder"]

_log = logging.getLogger(__name__)

QUEUE_GROUP: Final = "replicas"  # of NATS; the replicas of an agent share the calls in it
_REPLY_LIFETIME_MS: Final = 30_000
_LEAST_QUEUED_BYTES: Final = 16 * 1024 * 1024  # of a subscription: uvloop reads up to 8 MiB in one turn

Dispatch = Callable[[Admitted], Awaitable[dict[str, Any]]]
"""Runs an admitted request and returns its result in JSON form, with its ``status``. Never raises."""


class Responder:
    """Serves the calls of one agent.

    Use it as ``async with responder.running():`` around the time in which calls are answered; at the
    end of the block what is in flight is cancelled, so drain first.
    """

    def __init__(
        self,
        *,
        me: SpiffeID,
        capabilities: Iterable[str],
        admission: Admission,
        dispatch: Dispatch,
        sealer: Sealer,
        audit: AuditLog,
        metrics: Metrics,
        clock_ms: Callable[[], int],
        taken_in: int,
        queued_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._me = me
        self.subjects: Final = tuple(call_subject(me, name) for name in capabilities)
        """Those on which the capabilities are called."""
        self._admission = admission
        self._dispatch = dispatch
        self._sealer = sealer
        self._audit = audit
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._places = asyncio.Semaphore(taken_in)
        self._queued = max(_LEAST_QUEUED_BYTES, queued_bytes // max(1, len(self.subjects)))
        self._group: asyncio.TaskGroup | None = None
        self._handling: set[asyncio.Task[None]] = set()
        self._turns = Turns()
        self._opened = anyio.Event()

    async def on_session(self, session: Session) -> None:
        """Subscribe to every capability on a new session."""

        async def received(message: Msg) -> None:
            await self._take_in(session, message)

        for subject in self.subjects:
            await session.serve(subject, QUEUE_GROUP, received, self._queued)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the tasks that handle calls, for the length of the block."""
        # asyncio's own group: one task for each call is what a call costs most in, and it is the cheaper one.
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._opened.set()
                try:
                    yield
                finally:
                    self._group = None
                    for task in self._handling:
                        task.cancel()
        except BaseExceptionGroup as failures:
            if len(failures.exceptions) != 1:
                raise
            failure = failures.exceptions[0]
        else:
            return
        raise failure  # what the block raised, not a group of it

    async def _take_in(self, session: Session, message: Msg) -> None:
        if not self._opened.is_set():  # asked first: waiting yields, and would part what came in one turn
            await self._opened.wait()  # subscribed before it runs: what comes early waits, it is not dropped
        await self._places.acquire()
        if self._group is None:
            self._places.release()
            return
        session.take_hold()  # here, so that a session that retires now can't close before the task begins
        task = self._group.create_task(self._handle(session, message))
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        await self._turns.taken()

    async def _handle(self, session: Session, message: Msg) -> None:
        in_flight = self._metrics.in_flight(Direction.INBOUND)
        in_flight.inc()
        try:
            await self._answer(session, message)
        except AgentWeaveError as error:
            # The answer could not be sent: the caller's deadline tells it, ours is to say so here.
            _log.warning("a call could not be answered: %s", error)
        except Exception:  # noqa: BLE001 - the last boundary: one message must not stop the others
            _log.exception("a call ended in an error of the bus itself")
        finally:
            in_flight.dec()
            session.release_hold()
            self._places.release()

    async def _answer(self, session: Session, message: Msg) -> None:
        began = time.perf_counter()
        self._sealer.require_svid()  # what can't be answered is not run
        try:
            admitted = await self._admission.admit(message.data, Arrival(message.subject, message.reply))
        except AdmissionRefusedError as refusal:
            status = RequestStatus.DENIED if refusal.decision is not None else RequestStatus.REFUSED
            capability = refusal.request.head.cap if refusal.request is not None else ""
            self._metrics.request_ended(Direction.INBOUND, capability, status, time.perf_counter() - began)
            await self._refuse(session, refusal)
            return
        try:
            result = await self._dispatch(admitted)
        finally:
            self._admission.leave(admitted)
        await self._reply(session, admitted, result, began)

    async def _reply(
        self, session: Session, admitted: Admitted, result: dict[str, Any], began: float
    ) -> None:
        sealed = await self._seal_result(admitted.request, result, session.max_message_bytes)
        seconds = time.perf_counter() - began
        self._record(admitted, result["status"], seconds, sealed)
        await session.publish(sealed.head.sub, sealed.frame)

    async def _seal_result(self, request: OpenedEnvelope, result: dict[str, Any], max_bytes: int) -> Sealed:
        """Seal a result; one that can't travel becomes a failure that says so."""
        try:
            sealed = await self._seal(request, Kind.REPLY, encode_payload(result))
            if len(sealed.frame) <= max_bytes:
                return sealed
            problem = f"it takes {len(sealed.frame)} bytes, and the broker lets {max_bytes} pass"
        except (PayloadError, EnvelopeError) as error:
            problem = str(error)
        _log.error("the result of %s can't be sent: %s", request.head.cap, problem)
        result["status"] = "failed"
        told = {"status": "failed", "messages": [], "error": f"the result can't be sent: {problem}"}
        return await self._seal(request, Kind.REPLY, encode_payload(told))

    async def _refuse(self, session: Session, refusal: AdmissionRefusedError) -> None:
        if refusal.told is None or refusal.request is None:
            return
        body: dict[str, Any] = {
            "step": refusal.step.label,
            "reason": refusal.told,
            "audit_id": refusal.audit_id,
        }
        if refusal.retry_after is not None:
            body["retry_after"] = refusal.retry_after
        sealed = await self._seal(refusal.request, Kind.REFUSAL, encode_payload(body))
        await session.publish(sealed.head.sub, sealed.frame)

    async def _seal(self, request: OpenedEnvelope, kind: Kind, payload: bytes) -> Sealed:
        head = request.head
        assert head.reply is not None  # admission checked it against the arrival
        now_ms = self._clock_ms()
        draft: Draft = {
            "kind": kind,
            "id": new_id(now_ms),
            "aud": head.iss,
            "cap": head.cap,
            "sub": reply_subject(head.iss, head.reply, head.id),
            "iat": now_ms,
            "exp": now_ms + _REPLY_LIFETIME_MS,
            "re": request.digest,
            "log": self._audit.witness(),
            "trace": head.trace,
        }
        return await self._sealer.seal(draft, payload)

    def _record(self, admitted: Admitted, status: str, seconds: float, sealed: Sealed) -> None:
        """Count and audit an outcome. The work is done: a record that fails is an alarm, not an undoing."""
        ended = RequestStatus.ERROR if status == "failed" else RequestStatus.SUCCESS
        self._metrics.request_ended(Direction.INBOUND, admitted.capability.name, ended, seconds)
        if not admitted.audit_id:
            return
        outcome = outcome_facts(admitted.request.digest, status, seconds, sealed.digest)
        try:
            self._audit.record_soon(outcome, self._outcome_lost)
        except AuditError as error:
            self._outcome_lost(error)

    def _outcome_lost(self, error: AuditError) -> None:
        self._metrics.audit_write_failures.inc()
        _log.error("an outcome could not be recorded: %s", error)
