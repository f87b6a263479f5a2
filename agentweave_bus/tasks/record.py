"""What is recorded of a task: who it is, and one signed record for each state that it comes to.

A record is an envelope of kind ``record``. Its head says of which task (``re``, the digest of the task's
head), which one it is (``seq``, and ``prev``, the digest of the one before), by which attempt (``att``) and
where it stands (``sub``); its payload says the state, and what belongs to it.

:func:`draft_record` makes one and :func:`read_record` checks one; :func:`read_record_alone` does so for who
does not know of the others. The first one names the task, so that who may see all of an agent's records
knows of which capability they are. Who may write what:

- the agent that the task is for: everything;
- the control role of that agent's trust domain: ``rejected``, ``canceled`` and ``failed``, of a task that no
  attempt has open.

Nobody else is believed, whatever stands in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentweave_bus.bus.slots import StoredFrame
from agentweave_bus.bus.streams import state_stream_name
from agentweave_bus.bus.subjects import record_subject, records_of_task, slot_of
from agentweave_bus.envelope import (
    Draft,
    EnvelopeVerifier,
    Head,
    Kind,
    LogWitness,
    check_time_stored,
    claim_key,
    control_role,
    decode_payload,
    encode_payload,
    new_id,
)
from agentweave_bus.envelope.codec import pack
from agentweave_bus.exceptions import MalformedEnvelopeError, PayloadError, SignatureRefusedError
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.approval import Asked, Decided, check_decision
from agentweave_bus.tasks.redrive import check_redrive
from agentweave_bus.tasks.state import may_follow
from agentweave_bus.types import TaskState

__all__ = [
    "RECORD_TYPE",
    "ProgressMark",
    "RecordBody",
    "RecordPayload",
    "StateRecord",
    "TaskNamed",
    "TaskRef",
    "draft_record",
    "read_record",
    "read_record_alone",
]

RECORD_TYPE: Final = "task.state"
"""The ``cap`` of a state's record."""

_RECORD: Final = Kind.RECORD  # Python 3.11 takes long to find a member in its enum
_LIFETIME_MS: Final = 31 * 86_400_000
_BY_CONTROL: Final = frozenset({TaskState.REJECTED, TaskState.CANCELED, TaskState.FAILED})
_OPEN: Final = frozenset({TaskState.WORKING})

_BARE: Final = frozenset({"v", "state", "pd", "task"})
"""What a record may say that has no text of anybody and no data, so that nothing in it can be too much."""
_USUAL: Final = _BARE | {"result", "progress", "given_back", "undoes"}
"""What is in bounds, or found to be too much when it is encoded. The rest is checked as its readers do."""

_Hex: Final = r"[0-9a-f]{64}"
_Digest = Annotated[str, Field(strict=True, pattern=f"^{_Hex}$")]
_Count = Annotated[int, Field(strict=True, ge=0, le=2**53 - 1)]


class TaskRef:
    """Which task: the agent that it is for, who submitted it, the capability, and its id."""

    def __init__(self, agent: SpiffeID, sender: SpiffeID, capability: str, task_id: str) -> None:
        self.agent = agent
        self.sender = sender
        self.capability = capability
        self.id = task_id
        self._key = self._records = ""  # made when first asked for; who submits a task asks for neither

    @property
    def key(self) -> str:
        """Under which all that is kept of the task stands: 64 hexadecimal digits."""
        if not self._key:  # no cached_property, which takes a lock
            self._key = claim_key(self.sender, self.agent, self.capability, self.id)
        return self._key

    @property
    def stream(self) -> str:
        """The name of the stream of its records."""
        return state_stream_name(self.agent)

    @property
    def named(self) -> TaskNamed:
        """How the first of its records names it."""
        return TaskNamed(capability=self.capability, id=self.id)

    def subject(self, slot: int) -> str:
        """Where the record in ``slot`` stands, counted from 0."""
        if not self._records:
            self._records = records_of_task(self.agent, self.sender, self.key)
        return slot_of(self._records, slot)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskRef) and (self.agent, self.key) == (other.agent, other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{self.capability} {self.id} of {self.agent}, submitted by {self.sender}"


class ProgressMark(BaseModel):
    """How much progress was reported up to a record: how many messages, and the digest of the last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: _Count
    digest: _Digest


@dataclass(frozen=True, slots=True, kw_only=True)  # no model: each task makes one, which needs no check
class TaskNamed:
    """What a task's first record says of it; the subject has the hash of that, and who takes part."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    capability: Annotated[str, Field(strict=True, max_length=64)]
    id: Annotated[str, Field(strict=True, max_length=64)]


class RecordPayload(BaseModel):
    """The payload of a record.

    ``pd`` is the SHA-256 of the task's payload, in hexadecimal: by it a submitter sees that an idempotency
    key was used with another payload. ``result`` is a result in its JSON form, of a task that has ended by
    itself; ``message`` says why it is in this state, where there is something to say; ``retry_at`` (since
    the epoch) is when a ``submitted`` one is tried again, in milliseconds. ``step`` is the admission step at
    which a ``rejected`` one was refused. ``redrive`` is the reissue by which a ``failed`` task works again,
    in base64 (:mod:`.redrive`). ``given_back`` says that a worker which was told to stop gave it back, which
    counts as no attempt. ``undoes`` says that the handler is not run any more: this pass, or the one that
    follows on a ``submitted``, only undoes what the task's steps did. ``asked`` and ``decided`` are about an
    approval (:mod:`.approval`).
    ``blob`` refers to a result that is too large to stand here. ``task`` names the task, in its first record.
    """

    model_config = ConfigDict(title="RecordBody", extra="forbid", frozen=True)

    v: Literal[1] = 1
    state: Annotated[TaskState, Field(strict=False)]
    pd: _Digest
    message: Annotated[str, Field(strict=True, max_length=4_000)] | None = None
    result: dict[str, Any] | None = None
    retry_at: _Count | None = None
    step: Annotated[str, Field(strict=True, max_length=32)] | None = None
    progress: ProgressMark | None = None
    redrive: Annotated[str, Field(strict=True, max_length=131_072)] | None = None
    given_back: Literal[True] | None = None
    undoes: Literal[True] | None = None
    blob: dict[str, Any] | None = None
    asked: Asked | None = None
    decided: Decided | None = None
    task: TaskNamed | None = None


class RecordBody(NamedTuple):
    """What a record says, in the fields of :class:`RecordPayload`, which tells what they mean.

    That one checks what is read. Each task makes several of these, and a tuple costs a fraction of a model.
    The order is that of the bytes.
    """

    state: TaskState
    pd: str
    message: str | None = None
    result: dict[str, Any] | None = None
    retry_at: int | None = None
    step: str | None = None
    redrive: str | None = None
    given_back: Literal[True] | None = None
    undoes: Literal[True] | None = None
    blob: dict[str, Any] | None = None
    progress: ProgressMark | None = None
    task: TaskNamed | None = None
    asked: Asked | None = None
    decided: Decided | None = None

    @classmethod
    def read(cls, payload: object) -> RecordBody:
        """Take what a record says out of its decoded payload. Raises pydantic's ``ValidationError``."""
        said = dict(RecordPayload.model_validate(payload))
        del said["v"]
        return cls(**said)

    def encoded(self) -> bytes:
        """Return it as an envelope's payload. Raises PayloadError, also for what nobody would read."""
        said: dict[str, Any] = {"v": 1}
        for name, value in zip(self._fields, self, strict=True):
            if value is not None:
                said[name] = value  # noqa: PERF403 - behind v: the order is part of the bytes
        said["state"] = str(self.state)
        if self.progress is not None:
            said["progress"] = {"count": self.progress.count, "digest": self.progress.digest}
        if self.task is not None:
            said["task"] = {"capability": self.task.capability, "id": self.task.id}
        if said.keys() <= _BARE:
            return pack(said)
        for name, part in (("asked", self.asked), ("decided", self.decided)):
            if part is not None:
                said[name] = part.model_dump(exclude_none=True)
        if not said.keys() <= _USUAL:
            try:
                RecordPayload.model_validate(said)
            except ValidationError as error:
                raise PayloadError("a record that nobody could read") from error
        return encode_payload(said)


class StateRecord(NamedTuple):
    """A record that was verified: it is genuine, and follows on the one before it."""

    number: int
    """The how many-th of its task, from 0."""
    epoch: int
    body: RecordBody
    task: bytes
    """The digest of the task's head."""
    digest: bytes
    """Its own."""
    at_ms: int
    """When its writer signed it, in milliseconds since the epoch."""
    writer: SpiffeID
    stored_at_ms: int | None = None
    """When it was stored, by the broker's word; ``None`` for what was just written here."""

    @property
    def state(self) -> TaskState:
        """The state that the task came to."""
        return self.body.state


def draft_record(
    ref: TaskRef,
    *,
    slot: int,
    task: bytes,
    before: StateRecord | None,
    epoch: int,
    now_ms: int,
    log: LogWitness | None,
) -> Draft:
    """Return what the head of the record in ``slot`` says, which follows on ``before``."""
    return {
        "kind": _RECORD,
        "id": new_id(now_ms),
        "aud": domain_id(ref.agent.trust_domain),
        "cap": RECORD_TYPE,
        "sub": ref.subject(slot),
        "iat": now_ms,
        "exp": now_ms + _LIFETIME_MS,
        "re": task,
        "seq": 0 if before is None else before.number + 1,
        "prev": None if before is None else before.digest,
        "att": epoch,
        "log": log,
    }


def read_record(
    verifier: EnvelopeVerifier,
    stored: StoredFrame,
    ref: TaskRef,
    *,
    slot: int,
    before: StateRecord | None,
    now_ms: int,
) -> StateRecord:
    """Verify what stands in a slot of a task's log, and that it follows on ``before``.

    Raises:
        EnvelopeError, IdentityError, FederationError: it is no record of this task by who may write it; the
            message says what is wrong. Nobody believes it.

    """
    record, head = _opened(verifier, stored, ref.agent, ref.subject(slot), now_ms)
    _check_continues(record, head.prev, before)
    _check_writer(record, ref.agent, before)
    named = record.body.task
    if named is not None and (named.capability, named.id) != (ref.capability, ref.id):
        raise MalformedEnvelopeError("a record that names another task")
    body = record.body
    redriven = before is not None and before.state is TaskState.FAILED
    _check_follows(record, before, redriven=redriven)
    before_asked = None if before is None else before.body.asked
    check_decision(body.state, body.asked, body.decided, before=before_asked)
    if redriven:
        check_redrive(
            verifier,
            body.redrive,
            agent=ref.agent,
            task_id=ref.id,
            task=record.task,
            attempt=record.epoch,
            now_ms=now_ms,
            stored_at_ms=stored.stored_at_ms,
        )
    elif body.redrive is not None:
        raise MalformedEnvelopeError("a redrive of a task that had not failed")
    return record


def read_record_alone(
    verifier: EnvelopeVerifier,
    stored: StoredFrame,
    *,
    agent: SpiffeID,
    sender: SpiffeID,
    key: str,
    slot: int,
    now_ms: int,
) -> StateRecord:
    """Verify that a record is by who may write it, for just this place, whatever stands before it.

    So it is genuine, and need not count: another one may stand in its way. Raises as :func:`read_record`.
    """
    place = record_subject(agent, sender, key, slot)
    record, _ = _opened(verifier, stored, agent, place, now_ms)
    _check_writer(record, agent, None)
    named = record.body.task
    if named is not None and claim_key(sender, agent, named.capability, named.id) != key:
        raise MalformedEnvelopeError("a record that names another task")
    return record


def _opened(
    verifier: EnvelopeVerifier, stored: StoredFrame, agent: SpiffeID, subject: str, now_ms: int
) -> tuple[StateRecord, Head]:
    """Verify what was signed, and that it is a record for this place, whoever signed it."""
    opened = verifier.open_stored(stored.data, now_ms=now_ms, stored_at_ms=stored.stored_at_ms)
    check_time_stored(opened, now_ms=now_ms, stored_at_ms=stored.stored_at_ms)
    head = opened.head
    fits = (
        head.kind is Kind.RECORD
        and head.cap == RECORD_TYPE
        and head.aud == f"spiffe://{agent.trust_domain}"
        and head.sub == subject
        and head.seq is not None
        and head.att is not None
        and head.re is not None
        and not opened.via
    )
    if not fits:
        raise MalformedEnvelopeError("an envelope that is no record of this place and task")
    try:
        body = RecordBody.read(decode_payload(opened.payload))
    except (PayloadError, ValidationError) as error:
        raise MalformedEnvelopeError("a record whose payload is none of a record") from error
    if body.task is not None and head.seq:
        raise MalformedEnvelopeError("a record names its task that is not the first")
    record = StateRecord(
        number=head.seq or 0,
        epoch=head.att or 0,
        body=body,
        task=head.re or b"",
        digest=opened.digest,
        at_ms=head.iat,
        writer=head.iss,
        stored_at_ms=stored.stored_at_ms,
    )
    return record, head


def _check_continues(record: StateRecord, prev: bytes | None, before: StateRecord | None) -> None:
    """Make sure that it is the next link of the chain, about the same task."""
    number, digest = (0, None) if before is None else (before.number + 1, before.digest)
    if (record.number, prev) != (number, digest) or (before is not None and record.task != before.task):
        raise MalformedEnvelopeError("an envelope that is no record of this place and task")


def _check_writer(record: StateRecord, agent: SpiffeID, before: StateRecord | None) -> None:
    if record.writer == agent:
        return
    if record.writer != control_role(agent.trust_domain):
        raise SignatureRefusedError(f"{record.writer} writes of a task of {agent}")
    if record.state not in _BY_CONTROL or (before is not None and before.state in _OPEN):
        raise SignatureRefusedError(f"the control role may not write {record.state} now")


def _check_follows(record: StateRecord, before: StateRecord | None, *, redriven: bool) -> None:
    state, epoch = (None, 0) if before is None else (before.state, before.epoch)
    if not may_follow(state, epoch, record.state, record.epoch, redriven=redriven):
        raise MalformedEnvelopeError(
            f"{record.state} of attempt {record.epoch} does not follow on {state} of attempt {epoch}"
        )
