"""The records of a task's steps: what each returned, written once, for all attempts of the task.

A step's record is an envelope of kind ``record`` in a slot of its own, under the agent's own prefix on both
sides, so that nobody else reads it. It says of which task it is (``re``) and by which attempt it was made
(``att``). Whoever finds the slot taken by another attempt has lost the task.

A slot that holds what is no such record is passed over, as in :mod:`.log`: each step has a few of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from agentweave_bus.bus.slots import StoredFrame
from agentweave_bus.bus.subjects import step_subject
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    Draft,
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
    check_time_stored,
    decode_payload,
    encode_payload,
    new_id,
)
from agentweave_bus.envelope.blob import BLOB_CONTENT_TYPE, BlobReference
from agentweave_bus.exceptions import (
    AttemptLostError,
    BusError,
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
    PayloadError,
    QueueFullError,
    SignatureRefusedError,
    UnreachableError,
)
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.log import Desk, TaskLog, may_be_genuine
from agentweave_bus.tasks.record import StateRecord

__all__ = ["STEP_TYPE", "StepLog", "read_step"]

_log = logging.getLogger(__name__)

STEP_TYPE: Final = "task.step"
"""The ``cap`` of a step's record."""

_LIFETIME_MS: Final = 31 * 86_400_000
_WRITE_S: Final = 20.0
_SLOTS: Final = 16
_AT_ONCE_S: Final = 1.0
"""Within so many seconds of looking at the log a step has to begin, or it is looked at again."""


class StepLog:
    """The steps of one task, for the attempt whose ``working`` record is ``mine``.

    ``log`` is that attempt's view of the task's log. ``largest`` (bytes) is what the broker takes.
    """

    def __init__(
        self,
        desk: Desk,
        log: TaskLog,
        mine: StateRecord,
        *,
        largest: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._log = log
        self._mine = mine
        self._largest = largest
        self._monotonic = monotonic

    async def load(self, name: str) -> Any | None:
        """Return what was saved under ``name``, or ``None``.

        Raises:
            BusError: the broker does not answer, or what stands there can't be verified now.

        """
        for number in range(_SLOTS):
            stands = await self._desk.slots.read(self._log.ref.stream, self._subject(name, number))
            if stands is None:
                return None
            opened = self._opened(stands, name, number)
            if opened is not None:
                return await self._value(opened, name)
        raise BusError(f"the slots of step {name!r} are full of what is no record of it")

    async def confirm(self) -> None:
        """Make sure that this attempt still has the task.

        Raises:
            AttemptLostError: another one has begun, or the task has ended.
            BusError: the broker does not answer.

        """
        while True:
            began = self._monotonic()
            await self._log.refresh()
            if self._log.last is None or self._log.last.digest != self._mine.digest:
                raise AttemptLostError(
                    f"another attempt at task {self._log.ref.id} has begun, or it has ended"
                )
            if self._monotonic() - began < _AT_ONCE_S:
                return

    async def save(self, name: str, value: Any) -> None:
        """Save a step's outcome, any JSON value.

        Raises:
            AttemptLostError: another attempt has saved one.
            PayloadError: it is larger than ``bus.max_blob_bytes``, or there is no room for it.
            BusError: it could not be written.

        """
        payload, content_type = await self._payload(name, value)
        for number in range(_SLOTS):
            sealed = await self._desk.sealer.seal(self._draft(name, number, content_type), payload)
            if len(sealed.frame) > self._largest():
                raise PayloadError(
                    f"what step {name!r} returned takes {len(payload)} bytes, too many to record"
                )
            stands = await self._desk.slots.put(
                self._log.ref.stream, sealed.head.sub, sealed.frame, deadline_s=_WRITE_S
            )
            if stands is None:
                return
            if self._opened(stands, name, number) is not None:
                raise AttemptLostError(f"step {name!r} is on record by another attempt")
        raise BusError(f"the slots of step {name!r} are full of what is no record of it")

    def _subject(self, name: str, number: int) -> str:
        ref = self._log.ref
        return step_subject(ref.agent, ref.key, f"{name} {number}")

    async def _payload(self, name: str, value: Any) -> tuple[bytes, str]:
        """Return a step's outcome as a record has it: itself, or a reference where it is too large."""
        blobs, ref = self._desk.blobs, self._log.ref
        try:
            return encode_payload(value), JSON_CONTENT_TYPE
        except PayloadError:
            if blobs is None:
                raise
        data = encode_payload(value, blobs.limits)
        try:
            blob = await blobs.put(ref.agent, data, f"step {ref.key} {name}")
        except QueueFullError as error:
            raise PayloadError(f"what step {name!r} returned can't be recorded: {error}") from error
        except UnreachableError as error:
            raise BusError(f"step {name!r} can't be recorded: {error}") from error
        return blob.encoded(), BLOB_CONTENT_TYPE

    async def _value(self, opened: OpenedEnvelope, name: str) -> Any:
        if opened.head.ct != BLOB_CONTENT_TYPE:
            return decode_payload(opened.payload)
        blobs = self._desk.blobs
        if blobs is None:
            raise BusError(f"step {name!r} is on record by reference, and there are no references here")
        try:
            reference = BlobReference.decode(opened.payload, max_bytes=blobs.max_bytes)
            data = await blobs.fetch(self._log.ref.agent, reference)
            return await blobs.decode(data)
        except PayloadError as error:
            raise BusError(f"what step {name!r} returned can't be had: {error}") from error

    def _draft(self, name: str, number: int, content_type: str) -> Draft:
        desk, agent = self._desk, self._log.ref.agent
        now_ms = desk.clock_ms()
        return Draft(
            kind=Kind.RECORD,
            id=new_id(now_ms),
            aud=domain_id(agent.trust_domain),
            cap=STEP_TYPE,
            sub=self._subject(name, number),
            ct=content_type,
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            re=self._mine.task,
            att=self._mine.epoch,
            log=desk.witness(),
        )

    def _opened(self, stands: StoredFrame, name: str, number: int) -> OpenedEnvelope | None:
        """Verify what stands in a slot; ``None`` for what is no record of this step, and nobody's word."""
        try:
            return self._verified(stands, name, number)
        except (EnvelopeError, IdentityError, FederationError) as error:
            if may_be_genuine(self._desk, self._log.ref, stands, error):
                raise BusError(f"the record of step {name!r} can't be verified now: {error}") from error
            self._desk.on_foreign()
            _log.error("what stands for step %r of %r is not believed: %s", name, self._log.ref, error)
            return None

    def _verified(self, stands: StoredFrame, name: str, number: int) -> OpenedEnvelope:
        place = self._subject(name, number)
        opened = read_step(
            self._desk.verifier, stands, self._log.ref.agent, place, now_ms=self._desk.clock_ms()
        )
        if opened.head.re != self._mine.task:
            raise MalformedEnvelopeError("an envelope that is no record of this step and task")
        return opened


def read_step(
    verifier: EnvelopeVerifier, stands: StoredFrame, agent: SpiffeID, subject: str, *, now_ms: int
) -> OpenedEnvelope:
    """Verify that what stands in a slot is a step's record by ``agent``; of which task says its ``re``.

    Raises:
        EnvelopeError, IdentityError, FederationError: it is none.

    """
    opened = verifier.open_stored(stands.data, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
    check_time_stored(opened, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
    head = opened.head
    if head.iss != agent:
        raise SignatureRefusedError(f"{head.iss} writes of steps of {agent}")
    fits = (
        head.kind is Kind.RECORD
        and head.cap == STEP_TYPE
        and head.sub == subject
        and head.re is not None
        and not opened.via
    )
    if not fits:
        raise MalformedEnvelopeError("an envelope that is no record of this step and task")
    return opened
