"""Approving of a task and rejecting it: the controls ``approve`` and ``reject``, as they are said and heard.

A decision names the task's head and payload by their digests, and the very record that asks for it; so it is
about nothing else, and good for nothing later. Who may decide is said twice: the record names who (the policy
said it when it was asked), and the policy has to allow ``control:approve`` or ``control:reject`` now.

Each replica that hears a decision verifies it, asks the policy, and writes it into its audit log with the
frame; the first of them to write the task's record makes it true. The task itself is authorized once more
before it runs, and then its policy sees the approval.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, Final

from pydantic import Field

from agentweave_bus.authz import AuditLog, Authorizer
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.records import decision_facts, envelope_facts
from agentweave_bus.bus.refusal import Step
from agentweave_bus.envelope import OpenedEnvelope
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuditError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    UnreachableError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.approval import Decided
from agentweave_bus.tasks.control_sender import ControlBody, ControlSender
from agentweave_bus.tasks.hearing import Hearing
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import RecordBody, StateRecord, TaskRef
from agentweave_bus.types import TaskState

__all__ = ["APPROVE", "REJECT", "Approvals", "Approver", "DecisionBody"]

_log = logging.getLogger(__name__)

APPROVE: Final = "approve"
REJECT: Final = "reject"

_REPEAT_S: Final = 1.0
_LOOK_S: Final = (0.05, 0.1, 0.2, 0.3, 0.35)
_READ_S: Final = 5.0


class DecisionBody(ControlBody):
    """The payload of ``approve`` and ``reject``; ``record`` is the digest of the record that asks for it."""

    pd: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
    record: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]


class Approver(ControlSender):
    """Decides on tasks for one identity. Make it before the keeper opens."""

    async def decide(
        self,
        ref: TaskRef,
        verb: str,
        reason: str,
        *,
        timeout_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> StateRecord:
        """Approve of a task that waits for it, or reject it; return the record that says so.

        It is said again every second, for ``timeout_s`` seconds at most.

        Raises:
            AuthorizationError: this identity is none of those who may decide, or takes part in the task; or
                the broker does not let it.
            CallRefusedError: the task waits for nobody's approval; or the decision could not be said.
            CallTimeoutError: the agent has not heeded it in that time. What its policy refuses it does not
                answer; its audit log says why.

        """
        log, trouble, asks, said_at = TaskLog(self._desk, ref), "", None, float("-inf")
        try:
            async with asyncio.timeout(timeout_s):
                for look in _looks():
                    trouble = await _refresh(log)
                    if asks is not None and (found := _after(log, asks)) is not None:
                        return self._outcome(ref, verb, found)
                    asks = None if trouble else self._asking(ref, log)
                    if asks is not None and monotonic() >= said_at + _REPEAT_S:
                        trouble = await self._say(ref, verb, asks, reason)
                        said_at = monotonic()
                    await asyncio.sleep(look)
        except TimeoutError:
            pass
        why = f" ({trouble})" if trouble else "; it answers nobody whom its policy refuses"
        raise CallTimeoutError(f"{ref.agent} has not heeded it within {timeout_s:g} s{why}")

    def _asking(self, ref: TaskRef, log: TaskLog) -> StateRecord:
        """Return the record that asks for a decision, if this identity may make it."""
        last = log.last
        if last is None or last.body.asked is None:
            state = "has no record" if last is None else f"is {last.state.value}"
            told = f"task {ref.id} waits for nobody's approval: it {state}"
            raise CallRefusedError(told, step="local", reason=told)
        refusal = last.body.asked.refusal(self._me, self._desk.clock_ms())
        if refusal is not None:
            raise AuthorizationError(refusal, reason=refusal, direction="local")
        return last

    async def _say(self, ref: TaskRef, verb: str, asks: StateRecord, reason: str) -> str:
        """Say it once; return what went wrong that may pass."""
        try:
            body = self.body(DecisionBody, ref, pd=asks.body.pd, reason=reason, record=asks.digest.hex())
            await self.say(verb, ref, asks.task, body, reason)
        except (BusError, UnreachableError) as error:
            return str(error)
        except AgentCallError:
            raise
        except AgentWeaveError as error:
            raise CallRefusedError(f"the decision could not be said: {error}", step="local") from error
        return ""

    def _outcome(self, ref: TaskRef, verb: str, found: StateRecord) -> StateRecord:
        decided = found.body.decided
        wanted = TaskState.SUBMITTED if verb == APPROVE else TaskState.REJECTED
        if decided is not None and found.state is wanted:
            return found  # also where somebody else has decided the same meanwhile
        by = f" by {decided.by}" if decided is not None else ""
        told = f"task {ref.id} is {found.state.value}{by} already: {found.body.message or ''}".rstrip(": ")
        raise CallRefusedError(told, step="local", reason=told)


class Approvals(Hearing[DecisionBody]):
    """Hears what is decided on tasks of one agent that wait for it; see :class:`Hearing`.

    ``wake`` is awaited with a task's key when it has been decided on.
    """

    def __init__(
        self,
        *,
        desk: Desk,
        keeper: Keeper,
        me: SpiffeID,
        capabilities: Collection[str],
        authorizer: Authorizer,
        audit: AuditLog,
        wake: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(
            DecisionBody,
            "approval",
            [APPROVE, REJECT],
            desk=desk,
            keeper=keeper,
            me=me,
            capabilities=capabilities,
            audit=audit,
        )
        self._authorizer = authorizer
        self._wake = wake

    async def _heed(self, verb: str, opened: OpenedEnvelope, ref: TaskRef, body: DecisionBody) -> None:
        facts = self._facts(verb, opened, ref, body)
        decision = await self._authorizer.authorize(facts)
        record: dict[str, Any] = {
            **envelope_facts(opened, self._notes),
            **decision_facts(facts, decision),
            "task": ref.id,
        }
        if not decision.allowed:
            self._write_refusal({"event": "refusal", **record}, decision.reason)
            return
        log = TaskLog(self._desk, ref)
        await log.refresh()
        if (refusal := self._refusal(opened, log, body)) is not None:
            decided = any(one.digest.hex() == body.record for one in log.records[:-1])
            if not decided:  # else it is said again, or came too late: nothing is asked any more
                self._write_refusal({"event": "refusal", **record, "allowed": False}, refusal)
            await self._wake_if_decided(log)
            return
        try:
            self._audit.keep_frame(opened.digest, opened.frame)
            await self._audit.record({"event": "control", **record})
        except AuditError as error:
            self._notes.forget(opened.head)
            _log.error("a decision is not heeded, because it can't be recorded: %s", error)
            return
        await self._record(verb, opened, log, body)
        await self._wake_if_decided(log)

    def _refusal(self, opened: OpenedEnvelope, log: TaskLog, body: DecisionBody) -> str | None:
        """Say why a decision is none on this task as it stands, or return ``None``."""
        head, last = opened.head, log.last
        if last is None or last.body.asked is None:
            return "the task waits for nobody's approval"
        if head.re != last.task or body.pd != last.body.pd or body.record != last.digest.hex():
            return "the decision is about another task, or about what was asked before"
        by, now_ms = str(head.iss), self._desk.clock_ms()
        return last.body.asked.refusal(by, max(now_ms, head.iat))

    async def _record(self, verb: str, opened: OpenedEnvelope, log: TaskLog, body: DecisionBody) -> None:
        head = opened.head
        said = f": {body.reason}" if body.reason else ""
        approved = verb == APPROVE
        record = RecordBody(
            state=TaskState.SUBMITTED if approved else TaskState.REJECTED,
            pd=body.pd,
            message=f"{'approved' if approved else 'rejected'} by {head.iss}{said}",
            step=None if approved else Step.AUTHORIZATION.label,
            decided=Decided(by=str(head.iss), at=head.iat, control=opened.digest.hex(), reason=body.reason),
        )
        assert head.re is not None
        await log.append(record, head.re)

    async def _wake_if_decided(self, log: TaskLog) -> None:
        if log.last is not None and log.last.state is not TaskState.AUTH_REQUIRED:
            await self._wake(log.ref.key)


def _after(log: TaskLog, asks: StateRecord) -> StateRecord | None:
    following = asks.number + 1
    return log.records[following] if following < len(log.records) else None


async def _refresh(log: TaskLog) -> str:
    """Read what was recorded since; return what kept it from being read."""
    try:
        async with asyncio.timeout(_READ_S):
            await log.refresh()
    except TimeoutError:
        return "the broker does not answer"
    except BusError as error:
        return str(error)
    return ""


def _looks() -> Any:
    yield from _LOOK_S
    while True:
        yield _LOOK_S[-1]
