"""Saying something to an agent about a task of its own: signed, audited, to all of its replicas.

A control is true of *now*: nobody keeps it and nobody answers, so who sends it says it again until a record
shows that it was heard. It names the task's head by its digest; its payload says which task, in words.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.records import sealed_facts
from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.envelope import Draft, Kind, encode_payload, new_id
from agentweave_bus.exceptions import AuthorizationError, PayloadError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.record import TaskRef

__all__ = ["ControlBody", "ControlSender"]

_CONNECT_S: Final = 1.0
_ANSWER_S: Final = 2.0
_LIFETIME_MS: Final = 30_000

_ID: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[57][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"

BodyT = TypeVar("BodyT", bound="ControlBody")


class ControlBody(BaseModel):
    """The payload of a control: which task (its sender only where that is not who says it), and why.

    ``pd`` is the SHA-256 of the task's payload in hexadecimal, where it is known to who says it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    id: Annotated[str, Field(strict=True, pattern=_ID)]
    cap: Annotated[str, Field(strict=True, max_length=64)]
    pd: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")] | None = None
    reason: Annotated[str, Field(strict=True, max_length=1_000)] = ""
    sender: Annotated[str, Field(strict=True, max_length=2_048)] | None = None

    def encoded(self) -> bytes:
        """Return it as an envelope's payload. Raises PayloadError."""
        return encode_payload(self.model_dump(exclude_none=True))


class ControlSender:
    """Says controls for one identity. Make it before the keeper opens."""

    def __init__(self, *, desk: Desk, keeper: Keeper, me: SpiffeID, audit: AuditLog) -> None:
        self._desk = desk
        self._keeper = keeper
        self._me = me
        self._audit = audit
        self._saying: Counter[str] = Counter()
        self._forbidden: set[str] = set()
        keeper.on_permission_error(self._on_permission_error)

    @property
    def me(self) -> SpiffeID:
        """The identity that says them."""
        return self._me

    def body(self, kind: type[BodyT], ref: TaskRef, **said: Any) -> BodyT:
        """Return what a control about a task says. Raises PayloadError for what can't be said."""
        sender = None if ref.sender == self._me else str(ref.sender)
        try:
            return kind(id=ref.id, cap=ref.capability, sender=sender, **said)
        except ValidationError as error:
            told = error.errors()[0]["msg"]
            raise PayloadError(f"this can't be said about a task: {told}") from error

    async def say(self, verb: str, ref: TaskRef, task: bytes, body: ControlBody, why: str) -> None:
        """Say it once, of the task whose head's digest is ``task``; ``why`` is for the audit log.

        It returns when the broker has it; nobody answers.

        Raises:
            AuthorizationError: the broker does not let this identity say that.
            BusError, UnreachableError: there is no connection to the broker.
            AuditError: it could not be recorded, so it was not sent.
            SvidUnavailableError, EnvelopeError, PayloadError: it can't be sealed.

        """
        subject, now_ms = control_subject(ref.agent, verb), self._desk.clock_ms()
        draft = Draft(
            kind=Kind.CONTROL,
            id=new_id(now_ms),
            aud=ref.agent,
            cap=verb,
            sub=subject,
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            re=task,
            log=self._desk.witness(),
        )
        sealed = await self._desk.sealer.seal(draft, body.encoded())
        session = await self._keeper.session(_CONNECT_S)
        await self._audit.record({"event": "control", **sealed_facts(sealed), "task": ref.id, "reason": why})
        folded = subject.lower()  # as the client library gives the broker's words
        self._saying[folded] += 1
        try:
            await session.publish(subject, sealed.frame)
            await session.flush(_ANSWER_S)
            if folded in self._forbidden:
                raise AuthorizationError(
                    f"the broker does not let this identity {verb} tasks of {ref.agent}: no grant covers it,"
                    " or the broker has not been told of the grant yet",
                    reason="the broker's permissions",
                    direction="broker",
                )
        finally:
            self._saying[folded] -= 1
            if not self._saying[folded]:
                del self._saying[folded]
                self._forbidden.discard(folded)

    def _on_permission_error(self, verb: str, subject: str) -> None:
        if verb == "publish" and subject.lower() in self._saying:
            self._forbidden.add(subject.lower())
