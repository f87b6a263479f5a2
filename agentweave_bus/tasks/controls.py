"""Controls: a word to an agent about one of its tasks. So far one: ``cancel``.

It is an envelope of kind ``control``: it names the task's head by its digest (``re``), and its payload the
task's id and capability and the reason. Every replica hears it. It is true of *now*: nobody keeps it, so who
sends it says it again until a record shows that it was heard.

Who may: the task's own sender, who is known by the key that follows from ``iss``; or whom the policy allows
``control:cancel``. A task that runs here is cancelled here. One of which no attempt is open gets the record
``canceled`` from whoever is first to write it; its worker then finds that it has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Literal

from anyio.abc import TaskGroup
from nats.aio.msg import Msg
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext, AuthzDecision
from agentweave_bus.bus.claim_rates import ClaimRates
from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.records import WitnessNotes, decision_facts, envelope_facts, sealed_facts
from agentweave_bus.bus.refusal_rate import RefusalRate
from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.envelope import (
    Draft,
    Kind,
    OpenedEnvelope,
    ReplayFilter,
    Sealed,
    check_time_now,
    decode_payload,
    encode_payload,
    new_id,
)
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuditError,
    AuthorizationError,
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
    PayloadError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.types import TaskState

__all__ = ["CANCEL", "CancelBody", "CancelSender", "Controls", "OnCancel"]

_log = logging.getLogger(__name__)

CANCEL: Final = "cancel"

_CONNECT_S: Final = 1.0
_ANSWER_S: Final = 2.0
_LIFETIME_MS: Final = 30_000
_QUEUED_BYTES: Final = 8 * 1024 * 1024
_MOST_AT_ONCE: Final = 16
_MOST_REMEMBERED: Final = 4_096
_SAID_NOTHING: Final = "cancelled"

_ID: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[57][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"

OnCancel = Callable[[str, bytes, str], bool]
"""Cancels the task with this key and digest of its head for this reason, if it runs here; says whether."""


class CancelBody(BaseModel):
    """The payload of ``cancel``: which task (its sender only where that is not who cancels), and why.

    ``pd`` is the SHA-256 of the task's payload in hexadecimal, which the record of a task that never began
    has to name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    id: Annotated[str, Field(strict=True, pattern=_ID)]
    cap: Annotated[str, Field(strict=True, max_length=64)]
    pd: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
    reason: Annotated[str, Field(strict=True, max_length=1_000)] = ""
    sender: Annotated[str, Field(strict=True, max_length=2_048)] | None = None

    def encoded(self) -> bytes:
        """Return it as an envelope's payload. Raises PayloadError."""
        return encode_payload(self.model_dump(exclude_none=True))


class CancelSender:
    """Says ``cancel`` for one identity. Make it before the keeper opens."""

    def __init__(self, *, desk: Desk, keeper: Keeper, me: SpiffeID, audit: AuditLog) -> None:
        self._desk = desk
        self._keeper = keeper
        self._me = me
        self._audit = audit
        self._saying: Counter[str] = Counter()
        self._forbidden: set[str] = set()
        keeper.on_permission_error(self._on_permission_error)

    async def send(self, ref: TaskRef, *, task: bytes, pd: str, reason: str) -> None:
        """Tell every replica of a task's agent, once, to cancel it. ``task`` is the digest of its head.

        It returns when the broker has it; nobody answers.

        Raises:
            AuthorizationError: the broker does not let this identity say that.
            BusError, UnreachableError: there is no connection to the broker.
            AuditError: it could not be recorded, so it was not sent.
            PayloadError: the reason is longer than 1,000 characters.
            SvidUnavailableError, EnvelopeError: it can't be sealed.

        """
        subject = control_subject(ref.agent, CANCEL)
        sealed = await self._sealed(ref, subject, task, pd, reason)
        session = await self._keeper.session(_CONNECT_S)
        why = {"task": ref.id, "reason": reason or _SAID_NOTHING}
        await self._audit.record({"event": "control", **sealed_facts(sealed), **why})
        folded = subject.lower()  # as the client library gives the broker's words
        self._saying[folded] += 1
        try:
            await session.publish(subject, sealed.frame)
            await session.flush(_ANSWER_S)
            if folded in self._forbidden:
                raise AuthorizationError(
                    f"the broker does not let this identity cancel tasks of {ref.agent}: no grant covers it,"
                    " or the broker has not been told of the grant yet",
                    reason="the broker's permissions",
                    direction="broker",
                )
        finally:
            self._saying[folded] -= 1
            if not self._saying[folded]:
                del self._saying[folded]
                self._forbidden.discard(folded)

    async def _sealed(self, ref: TaskRef, subject: str, task: bytes, pd: str, reason: str) -> Sealed:
        now_ms, sender = self._desk.clock_ms(), None if ref.sender == self._me else str(ref.sender)
        try:
            body = CancelBody(id=ref.id, cap=ref.capability, pd=pd, reason=reason, sender=sender)
        except ValidationError as error:
            told = error.errors()[0]["msg"]
            raise PayloadError(f"this can't be said in a cancellation: {told}") from error
        draft = Draft(
            kind=Kind.CONTROL,
            id=new_id(now_ms),
            aud=ref.agent,
            cap=CANCEL,
            sub=subject,
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            re=task,
            log=self._desk.witness(),
        )
        return await self._desk.sealer.seal(draft, body.encoded())

    def _on_permission_error(self, verb: str, subject: str) -> None:
        if verb == "publish" and subject.lower() in self._saying:
            self._forbidden.add(subject.lower())


class Controls:
    """Hears what one agent is told about its tasks, on every session.

    ``capabilities`` are those that it serves. Use it as ``async with controls.running():`` while it serves;
    make it before the keeper opens.
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
        on_cancel: OnCancel,
    ) -> None:
        self._desk = desk
        self._me = me
        self._subject = control_subject(me, CANCEL)
        self._capabilities = capabilities
        self._authorizer = authorizer
        self._audit = audit
        self._on_cancel = on_cancel
        self._replays = ReplayFilter(max_entries=100_000)
        self._notes = WitnessNotes()
        self._refusals = RefusalRate()
        self._heard: OrderedDict[tuple[SpiffeID, str, bytes], None] = OrderedDict()
        self._rates = ClaimRates()
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

    async def _on_session(self, session: Session) -> None:
        await session.serve(self._subject, "", self._on_message, _QUEUED_BYTES)

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
            body = _body(opened)
            sender = opened.head.iss if body.sender is None else SpiffeID(body.sender)
            if body.cap not in self._capabilities:
                raise MalformedEnvelopeError(f"no capability {body.cap!r} here")
        except (EnvelopeError, PayloadError, IdentityError, FederationError, ValueError) as error:
            self._refuse(opened, str(error))
            return
        ref = TaskRef(self._me, sender, body.cap, body.id)
        if not await self._allowed(opened, ref, body):
            return
        try:
            await self._cancel(opened, ref, body)
        except AgentWeaveError as error:
            _log.warning("%r is not cancelled yet: %s", ref, error)

    def _open(self, subject: str, frame: bytes) -> OpenedEnvelope:
        now_ms = self._desk.clock_ms()
        opened = self._desk.verifier.open(frame, now_ms=now_ms)
        head = opened.head
        fits = (
            head.kind is Kind.CONTROL
            and head.aud == self._me
            and head.cap == CANCEL
            and head.sub == subject == self._subject
            and head.re is not None
            and not opened.via
        )
        if not fits:
            raise MalformedEnvelopeError("an envelope that is no cancellation of a task of this agent")
        check_time_now(head, now_ms)
        if not self._replays.admit(opened.digest, now_ms, head.iss):
            raise MalformedEnvelopeError("this control was heard before")
        return opened

    async def _allowed(self, opened: OpenedEnvelope, ref: TaskRef, body: CancelBody) -> bool:
        """Ask who may cancel this task; record it the first time, before anything is done."""
        head = opened.head
        assert head.re is not None
        own = head.iss == ref.sender
        known = (head.iss, ref.key, head.re)
        if own and known in self._heard:
            return True
        facts = AuthzContext(
            caller=head.iss,
            callee=self._me,
            action="control:cancel",
            direction="inbound",
            payload=body.model_dump(exclude_none=True),
            task_id=ref.id,
            kind="control",
        )
        if own:
            decision = AuthzDecision(allowed=True, reason="it is the task's own sender")
        else:
            decision = await self._authorizer.authorize(facts)
        record: dict[str, Any] = {
            "event": "control" if decision.allowed else "refusal",
            **envelope_facts(opened, self._notes),
            **decision_facts(facts, decision),
            "task": ref.id,
        }
        if not decision.allowed:
            self._write_refusal(record, decision.reason)
            return False
        if known in self._heard:
            return True
        try:
            await self._audit.record(record)
        except AuditError as error:
            self._notes.forget(head)
            _log.error("a control is not heeded, because it can't be recorded: %s", error)
            return False
        self._heard[known] = None
        if len(self._heard) > _MOST_REMEMBERED:
            self._heard.popitem(last=False)
        return True

    async def _cancel(self, opened: OpenedEnvelope, ref: TaskRef, body: CancelBody) -> None:
        task, reason = opened.head.re, body.reason or _SAID_NOTHING
        assert task is not None
        if self._on_cancel(ref.key, task, reason):
            return
        log = TaskLog(self._desk, ref)
        await log.refresh()
        last = log.last
        if last is not None and (last.state is TaskState.WORKING or last.state.terminal or last.task != task):
            return
        if last is None and not self._rates.take(opened.head.iss, self._desk.clock_ms()):
            return  # of tasks that never were anybody could make records that stand for a month
        pd = body.pd if last is None else last.body.pd
        await log.append(RecordBody(state=TaskState.CANCELED, pd=pd, message=reason), task)

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


def _body(opened: OpenedEnvelope) -> CancelBody:
    try:
        return CancelBody.model_validate(decode_payload(opened.payload))
    except ValidationError as error:
        raise MalformedEnvelopeError("a cancellation whose payload is none") from error
