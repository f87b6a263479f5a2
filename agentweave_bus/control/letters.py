"""Reading dead letters: what of them is believed, and what stands behind it.

A dead letter is a frame and a record beside it. The record counts when the agent that it belongs to has
signed it, or the control role of its domain, for just this place and these bytes. The frame counts as what
its sender signed, as of when that was: a dead letter may be weeks old.

Of a task its log says more. Of an event there is none: that its publisher signed it is all that anybody can
check, and when that was is the word of the publisher's date and of the agent that gave it up. So nothing is
done by it but to show it.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.slots import StoredFrame, nanoseconds_of
from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, event_subject, parse_subject
from agentweave_bus.envelope import (
    Head,
    Kind,
    Link,
    OpenedEnvelope,
    check_time_stored,
    control_role,
    decode_payload,
    verify_delegation,
)
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import (
    AgentWeaveError,
    BusError,
    ConfigurationError,
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
    PayloadError,
    SignatureRefusedError,
)
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.dead_letters import DEAD_TYPE, DeadLetterBody, LetterReference
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.redrive import origin_of, redriven_attempt

_log = logging.getLogger(__name__)

__all__ = ["DROPPED_TYPE", "DeadEventError", "DeadTask", "Letter", "Letters", "UnusableLetterError"]

DROPPED_TYPE: Final = "task.dropped"
"""The ``cap`` of the record that a dead letter is dealt with."""

_ANSWER_S: Final = 5.0
_NO_MESSAGE: Final = 10037
_NO_STREAM: Final = 10059
_TASKS: Final = frozenset({Kind.TASK, Kind.REISSUE})


class UnusableLetterError(AgentWeaveError):
    """Nothing can be done with a dead letter. The message says why, for an operator."""


class DeadEventError(UnusableLetterError):
    """It is about an event, which nobody can redrive. ``name`` is the event's."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class Letter(NamedTuple):
    """A dead letter. ``body`` is what its record says; without one ``doubt`` says why it is not believed."""

    ref: LetterReference
    stored: StoredFrame
    body: DeadLetterBody | None
    doubt: str = ""

    @property
    def task(self) -> TaskRef | None:
        """Which task it was, where that was verified."""
        if self.body is None or self.body.task is None:
            return None
        task, ref = self.body.task, self.ref
        try:
            named = TaskRef(ref.agent, SpiffeID(task["sender"]), task["capability"], task["id"])
        except (KeyError, ValueError):
            return None
        return named if (named.key, named.capability) == (ref.key, ref.capability) else None


class DeadTask(NamedTuple):
    """The task in a dead letter, verified: as it came, and what its sender signed."""

    opened: OpenedEnvelope
    origin: Link


class Letters:
    """Reads the dead letters of all agents at a broker, as the control role ``me``."""

    def __init__(self, me: SpiffeID, keeper: Keeper, desk: Desk) -> None:
        self._me = me
        self._keeper = keeper
        self._desk = desk

    async def next_of(self, agent: SpiffeID, start: int) -> tuple[int, Letter | None] | None:
        """Return the first dead letter of ``agent`` from a number on, with its number; ``None`` if none is.

        What stands there and can't be one has a number and is ``None``.

        Raises:
            BusError: the broker does not answer.

        """
        pattern = f"{agent_prefix(Family.DEAD, agent)}.*.*.*.record"
        body = json.dumps({"seq": start, "next_by_subj": pattern}).encode()
        subject = f"$JS.API.STREAM.MSG.GET.{dead_stream_name(agent)}"
        try:
            session = await self._keeper.session(_ANSWER_S)
            answer = json.loads((await session.ask(subject, body, timeout_s=_ANSWER_S)).data)
            if answer.get("error", {}).get("err_code") in (_NO_MESSAGE, _NO_STREAM):
                return None
            stored = answer["message"]
            frame = base64.b64decode(stored.get("data", ""), validate=True)
            stands = StoredFrame(frame, nanoseconds_of(stored["time"]) // 1_000_000)
            number, place = int(stored["seq"]), str(stored["subject"])
        except (TimeoutError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BusError(f"the dead letters of {agent} can't be read: {error!r}") from error
        ref = _reference(place)
        if ref is None or ref.agent != agent or ref.subject("record") != place:
            return number, None
        return number, self._read(ref, stands)

    async def find(self, ref: LetterReference) -> Letter:
        """Return a dead letter. Raises UnusableLetterError when there is none, and BusError."""
        stands = await self._slot(ref, "record")
        if stands is None:
            raise UnusableLetterError("there is no such dead letter; they are kept for 90 days")
        return self._read(ref, stands)

    async def frame(self, letter: Letter) -> bytes:
        """Return the frame beside the record. Raises UnusableLetterError when it is another, and BusError."""
        return (await self._frame(letter)).data

    async def _frame(self, letter: Letter) -> StoredFrame:
        stands = await self._slot(letter.ref, "frame")
        if stands is None or letter.body is None or sha256(stands.data).hex() != letter.body.frame:
            raise UnusableLetterError("the frame beside its record is not the one that was given up")
        return stands

    async def dropped(self, ref: LetterReference) -> dict[str, Any] | None:
        """Return what is on record about that a dead letter is dealt with, or ``None``. Raises BusError."""
        stands = await self._slot(ref, "dropped")
        if stands is None:
            return None
        try:
            opened = self._opened(stands, ref, "dropped", DROPPED_TYPE)
            if opened.head.iss != self._me:
                raise SignatureRefusedError(f"{opened.head.iss} may not drop dead letters")
            said = decode_payload(opened.payload)
        except (EnvelopeError, PayloadError, IdentityError, FederationError) as error:
            _log.error("what stands for that %s is dropped is not believed: %s", ref, error)
            return None
        return {**said, "at": opened.head.iat} if isinstance(said, dict) else None

    async def log_of(self, letter: Letter) -> TaskLog | None:
        """Return what is recorded of the task, where it is known which that was. Raises BusError."""
        if letter.task is None:
            return None
        log = TaskLog(self._desk, letter.task)
        await log.refresh()
        return log

    async def task_in(self, letter: Letter, log: TaskLog | None) -> DeadTask:
        """Verify the task itself, as a link is verified: as of when it was signed.

        ``log`` is its own: the broker says when that began, and so when the task was there at the latest.

        Raises:
            UnusableLetterError: it is none, or its sender can't be told any more.
            BusError: the broker does not answer.

        """
        if letter.body is None:
            raise UnusableLetterError(f"its record is not believed: {letter.doubt}")
        if letter.task is None:
            raise UnusableLetterError("it was never verified, so nobody is known to have asked for it")
        frame = await self.frame(letter)
        try:
            opened = self._verified(frame, log)
            origin = origin_of(opened)
            _check_is(letter.task, opened, origin)
        except (EnvelopeError, IdentityError, FederationError) as error:
            raise UnusableLetterError(f"the task does not verify now: {error}") from error
        return DeadTask(opened, origin)

    async def event_in(self, letter: Letter) -> OpenedEnvelope:
        """Verify the event that a record speaks of: its publisher signed it, and the record tells it right.

        Raises:
            UnusableLetterError: it is none, or its publisher can't be told any more.
            BusError: the broker does not answer.

        """
        if letter.body is None or letter.body.event is None:
            raise UnusableLetterError("it is no event")
        stands = await self._frame(letter)
        try:
            opened = self._opened_link(stands.data, lambda _head: stands.stored_at_ms)
            _check_is_event(letter, letter.body, opened)
            if opened.head.iat - self._desk.verifier.limits.max_age_ms > stands.stored_at_ms:
                raise MalformedEnvelopeError("it was given up before its date")
        except (EnvelopeError, IdentityError, FederationError) as error:
            raise UnusableLetterError(f"the event does not verify now: {error}") from error
        return opened

    async def _slot(self, ref: LetterReference, part: str) -> StoredFrame | None:
        return await self._desk.slots.read(dead_stream_name(ref.agent), ref.subject(part))

    def _read(self, ref: LetterReference, stands: StoredFrame) -> Letter:
        try:
            opened = self._opened(stands, ref, "record", DEAD_TYPE)
            if opened.head.iss not in (ref.agent, control_role(ref.agent.trust_domain)):
                raise SignatureRefusedError(f"{opened.head.iss} writes of what {ref.agent} gave up")
            body = DeadLetterBody.model_validate(decode_payload(opened.payload))
        except ValidationError:
            return Letter(ref, stands, None, "its payload is none of a dead letter")
        except (EnvelopeError, PayloadError, IdentityError, FederationError) as error:
            return Letter(ref, stands, None, str(error))
        return Letter(ref, stands, body)

    def _opened(self, stands: StoredFrame, ref: LetterReference, part: str, kind: str) -> OpenedEnvelope:
        """Verify a record of a dead letter, whoever signed it."""
        now_ms = self._desk.clock_ms()
        opened = self._desk.verifier.open_stored(stands.data, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
        check_time_stored(opened, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
        head = opened.head
        fits = (
            head.kind is Kind.RECORD
            and head.cap == kind
            and head.aud == f"spiffe://{ref.agent.trust_domain}"
            and head.sub == ref.subject(part)
            and head.att == ref.epoch
            and not opened.via
        )
        if not fits:
            raise MalformedEnvelopeError("an envelope that is no record of this dead letter")
        return opened

    def check_in_time(self, task: DeadTask, began_ms: int) -> None:
        """Make sure that a task was good when the broker stored what is first on record of it.

        Its own date and its agent's words prove nothing: who has an old key dates back, and the agent may be
        in league with him. What led to it must have been good then, too, and its sender expired by the grace
        of links at most.

        Raises:
            UnusableLetterError: it was not.

        """
        opened, verifier = task.opened, self._desk.verifier
        head, limits = opened.head, verifier.limits
        if not head.iat - limits.max_age_ms <= began_ms < head.exp:
            raise UnusableLetterError("it was begun at a time for which it was not signed")
        if head.kind is Kind.REISSUE:
            return  # the control role judged then what lies before it
        late_ms = began_ms - opened.sender.not_after_ms
        if late_ms > limits.default_link_grace_ms:
            raise UnusableLetterError(
                f"{head.iss} had expired {late_ms // 60_000} min before it was begun, so it may be dated back"
            )
        try:
            verify_delegation(
                opened,
                verifier,
                now_ms=self._desk.clock_ms(),
                stored_at_ms=began_ms,
                judged_at_ms=began_ms,
            )
        except EnvelopeError as error:
            raise UnusableLetterError(f"what led to it was not good when it was begun: {error}") from error

    def _verified(self, frame: bytes, log: TaskLog | None) -> OpenedEnvelope:
        """Verify the task as a link that was there when its log, or the redrive that it is, began."""
        return self._opened_link(
            frame, lambda head: None if log is None else log.begun_ms(redriven_attempt(head))
        )

    def _opened_link(self, frame: bytes, there_ms: Callable[[Head], int | None]) -> OpenedEnvelope:
        """Verify a frame as of its own date. ``there_ms`` is when it was there, by the broker's word."""
        verifier = self._desk.verifier
        parts = verifier.decode_frame(frame)
        link = Link(parts.head, parts.proof, parts.chain)
        sender = verifier.verify_link(link, now_ms=self._desk.clock_ms(), stored_at_ms=there_ms(link.head))
        return verifier.parse_head(parts, sender)


def _check_is(task: TaskRef, opened: OpenedEnvelope, origin: Link) -> None:
    """Make sure that a frame is what its record says that it is. Raises MalformedEnvelopeError."""
    head = opened.head
    if head.kind not in _TASKS:
        raise MalformedEnvelopeError(f"it holds a {head.kind.value}, no task")
    if (origin.head.iss, head.aud, head.cap, head.id) != (task.sender, task.agent, task.capability, task.id):
        raise MalformedEnvelopeError("it holds another task than its record says")


def _check_is_event(letter: Letter, body: DeadLetterBody, opened: OpenedEnvelope) -> None:
    """Make sure that a frame is the event that its record says. Raises MalformedEnvelopeError."""
    head, ref = opened.head, letter.ref
    if head.kind is not Kind.EVENT:
        raise MalformedEnvelopeError(f"it holds a {head.kind.value}, no event")
    try:
        subject = event_subject(head.iss, head.cap)
    except ConfigurationError as error:
        raise MalformedEnvelopeError("an event without an event's name") from error
    if (head.aud, head.sub) != (domain_id(head.iss.trust_domain), subject):
        raise MalformedEnvelopeError("an event that is not where its publisher's are")
    said = {"id": head.id, "publisher": str(head.iss), "name": head.cap}
    place = (head.cap.rpartition(".")[2], body.frame, 0)
    if body.event != said or (ref.capability, ref.key, ref.epoch) != place:
        raise MalformedEnvelopeError("it holds another event than its record says")


def _reference(subject: str) -> LetterReference | None:
    try:
        parsed = parse_subject(subject)
        capability, key, epoch, _part = parsed.rest
        return LetterReference.parse(f"{parsed.agent}#{capability}/{key}.{epoch}")
    except (MalformedEnvelopeError, ConfigurationError, ValueError):
        return None
