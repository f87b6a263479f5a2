"""Hearing what an agent is told about its tasks: every replica hears it, on every session.

What is heard is verified here: it is a control for this agent, sealed for the subject on which it came, of
now, and not heard before. What is no such thing is logged and audited, and not answered. What a control says,
and who may say it, is up to who hears it (:class:`.controls.Controls`, :class:`.approving.Approvals`).
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, TypeVar

from anyio.abc import TaskGroup
from nats.aio.msg import Msg
from pydantic import ValidationError

from agentweave_bus.authz import AuditLog, AuthzContext
from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.records import WitnessNotes, envelope_facts
from agentweave_bus.bus.refusal_rate import RefusalRate
from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.envelope import Kind, OpenedEnvelope, ReplayFilter, check_time_now, decode_payload
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuditError,
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
    PayloadError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.control_sender import ControlBody
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.record import TaskRef

__all__ = ["Hearing"]

_log = logging.getLogger(__name__)

_QUEUED_BYTES: Final = 8 * 1024 * 1024
_MOST_AT_ONCE: Final = 16

BodyT = TypeVar("BodyT", bound=ControlBody)


class Hearing(ABC, Generic[BodyT]):
    """Hears some verbs, for one agent. ``capabilities`` are those that it serves; ``noun`` is for messages.

    Use it as ``async with hearing.running():`` while it serves; make it before the keeper opens.
    """

    def __init__(
        self,
        body: type[BodyT],
        noun: str,
        verbs: Collection[str],
        *,
        desk: Desk,
        keeper: Keeper,
        me: SpiffeID,
        capabilities: Collection[str],
        audit: AuditLog,
    ) -> None:
        self._desk = desk
        self._me = me
        self._audit = audit
        self._notes = WitnessNotes()
        self._body = body
        self._noun = noun
        self._verbs = {control_subject(me, verb): verb for verb in verbs}
        self._capabilities = capabilities
        self._replays = ReplayFilter(max_entries=100_000)
        self._refusals = RefusalRate()
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._group: TaskGroup | None = None
        keeper.on_session(self._on_session)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own what is done about controls, for the length of the block. Before it nothing is heeded."""
        async with owned_tasks() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None
                group.cancel_scope.cancel()

    @abstractmethod
    async def _heed(self, verb: str, opened: OpenedEnvelope, ref: TaskRef, body: BodyT) -> None:
        """Do what a verified control says, if its sender may. What it raises is logged."""

    async def _on_session(self, session: Session) -> None:
        for subject in self._verbs:
            await session.serve(subject, "", self._on_message, _QUEUED_BYTES)

    async def _on_message(self, message: Msg) -> None:
        await self._places.acquire()
        if self._group is None:
            self._places.release()  # who sent it says it again
            return
        self._group.start_soon(self._guarded, message)

    async def _guarded(self, message: Msg) -> None:
        try:
            await self.hear(message.subject, message.data)
        except Exception:  # noqa: BLE001 - the last boundary: one control must not stop the others
            _log.exception("a control ended in an error of the bus itself")
        finally:
            self._places.release()

    async def hear(self, subject: str, frame: bytes) -> None:
        """Verify a control and do what it says. What is refused is logged and audited, and not answered."""
        opened: OpenedEnvelope | None = None
        try:
            opened = self._open(subject, frame)
            body = self._read(opened)
            sender = opened.head.iss if body.sender is None else SpiffeID(body.sender)
            if body.cap not in self._capabilities:
                raise MalformedEnvelopeError(f"no capability {body.cap!r} here")
        except (EnvelopeError, PayloadError, IdentityError, FederationError, ValueError) as error:
            self._refuse(opened, str(error))
            return
        ref = TaskRef(self._me, sender, body.cap, body.id)
        try:
            await self._heed(self._verbs[subject], opened, ref, body)
        except AgentWeaveError as error:
            _log.warning("a control about %r has no effect yet: %s", ref, error)

    def _open(self, subject: str, frame: bytes) -> OpenedEnvelope:
        now_ms = self._desk.clock_ms()
        opened = self._desk.verifier.open(frame, now_ms=now_ms)
        head = opened.head
        fits = (
            head.kind is Kind.CONTROL
            and head.aud == self._me
            and head.sub == subject
            and head.cap == self._verbs.get(subject)
            and head.re is not None
            and not opened.via
        )
        if not fits:
            raise MalformedEnvelopeError(f"an envelope that is no {self._noun} of a task of this agent")
        check_time_now(head, now_ms)
        if not self._replays.admit(opened.digest, now_ms, head.iss):
            raise MalformedEnvelopeError("this control was heard before")
        return opened

    def _read(self, opened: OpenedEnvelope) -> BodyT:
        try:
            return self._body.model_validate(decode_payload(opened.payload))
        except ValidationError as error:
            raise MalformedEnvelopeError(f"an envelope whose payload is no {self._noun}") from error

    def _facts(self, verb: str, opened: OpenedEnvelope, ref: TaskRef, body: BodyT) -> AuthzContext:
        """Return what a policy is asked about a control."""
        return AuthzContext(
            caller=opened.head.iss,
            callee=self._me,
            action=f"control:{verb}",
            direction="inbound",
            payload=body.model_dump(exclude_none=True),
            task_id=ref.id,
            kind="control",
        )

    def _refuse(self, opened: OpenedEnvelope | None, reason: str) -> None:
        record: dict[str, Any] = {"event": "refusal"}
        if opened is not None:
            record |= envelope_facts(opened, self._notes)
        self._write_refusal(record, reason)

    def _write_refusal(self, record: dict[str, Any], reason: str) -> None:
        unwritten = self._refusals.take(self._desk.clock_ms())
        if unwritten is None:
            return
        record |= {"step_name": "control", "reason": reason}
        if unwritten:
            record["unwritten"] = unwritten
        _log.warning("a control is refused: %s", reason)
        try:
            self._audit.append(record)
        except AuditError as error:
            _log.error("a refusal could not be recorded: %s", error)
