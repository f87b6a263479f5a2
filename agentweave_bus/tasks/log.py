"""The log of one task: its records in the order in which they stand, read and continued.

Whoever continues it writes into the slot after the last record that it knows. If that slot is taken, it
knew too little: it has lost the race, learns what stands there, and decides anew. So of all who think that
an attempt, or the task, is theirs to end, one is right.

A slot that holds something else than a genuine record which follows is passed over: it can only have been
written by who has rights at the broker that no agent has, or by the agent's own stolen key. It is counted
and logged, believed by nobody, and in nobody's way. But what may be genuine and can't be told now (its
sender's authority is not known here, its time is of a clock that goes ahead) is not passed over: the log is
unreadable then, and nobody continues it, because a task that has ended must not run again.

What ends a log is a terminal record. One that says ``failed`` may be followed by a redrive (:mod:`.redrive`),
so behind it is looked again; behind the others never.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agentweave_bus.bus.blobs import Blobs
from agentweave_bus.bus.slots import Slots, StoredFrame
from agentweave_bus.envelope import EnvelopeVerifier, LogWitness, Sealed, Sealer, control_role
from agentweave_bus.exceptions import (
    BusError,
    EnvelopeError,
    FederationError,
    IdentityError,
    InvalidSpiffeIdError,
    TimeRefusedError,
)
from agentweave_bus.identity.chain import claimed_spiffe_id
from agentweave_bus.tasks.approval import Approval
from agentweave_bus.tasks.record import RecordBody, StateRecord, TaskRef, draft_record, read_record
from agentweave_bus.tasks.state import next_epoch
from agentweave_bus.types import TaskState

__all__ = ["Desk", "TaskLog", "may_be_genuine"]

_log = logging.getLogger(__name__)

_MOST_FOREIGN: Final = 64
"""How many slots of a task are passed over. With more its log counts as unreadable."""

_MOST_RECORDS: Final = 1_000
_ROOM_TO_END: Final = 100
"""So many of them are for how a task ends: no attempt begins that could leave no room for it."""

_MOST_GIVEN_BACK: Final = 20
"""An attempt that ended with its worker counts for nothing so often, and like any other after that: a handler
that cancels itself looks the same."""

_WRITE_S: Final = 20.0
"""How long one record is tried to be written. It has to stand within 30 s of its signing, or nobody could
verify it once its writer's SVID has expired."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What it takes to read logs, and to continue those of one's own tasks.

    ``clock_ms`` is in milliseconds since the epoch; ``witness`` says what is safe of one's own audit log;
    ``on_foreign`` is called for each slot that is passed over, ``on_record`` with the capability and what the
    record says for each that was written.
    """

    slots: Slots
    sealer: Sealer
    verifier: EnvelopeVerifier
    clock_ms: Callable[[], int]
    witness: Callable[[], LogWitness | None]
    on_foreign: Callable[[], None] = lambda: None
    on_record: Callable[[str, RecordBody], None] = lambda _capability, _body: None
    blobs: Blobs | None = None
    """Where large payloads lie; without it there are none."""


class TaskLog:
    """What is known of one task's log. One instance belongs to one reader or writer."""

    def __init__(self, desk: Desk, ref: TaskRef) -> None:
        self.ref = ref
        self.records: list[StateRecord] = []
        self._desk = desk
        self.oldest_ms: int | None = None
        """When its first slot was stored, by the broker's word. Once that is gone, it reads as empty."""
        self._slot = 0  # the first that has not been looked at
        self._foreign = 0

    @property
    def last(self) -> StateRecord | None:
        """The newest record that is known."""
        return self.records[-1] if self.records else None

    @property
    def ended(self) -> bool:
        """Whether the task has come to a terminal state."""
        return bool(self.records) and self.records[-1].body.state.terminal

    @property
    def closed(self) -> bool:
        """Whether nothing can follow: it has ended, and not by failing, which a redrive can take back."""
        return self.ended and self.records[-1].body.state is not TaskState.FAILED

    @property
    def redriven(self) -> int:
        """The attempt with which the newest redrive began; 0 for a task that was never redriven."""
        return next((one.epoch for one in reversed(self.records) if one.body.redrive is not None), 0)

    @property
    def given_back(self) -> int:
        """How many attempts of the present run do not count, because their worker was told to stop."""
        given_back = [one.epoch for one in self.records if one.body.given_back is True]
        if not given_back:
            return 0
        since = self.redriven
        return min(sum(epoch >= since for epoch in given_back), _MOST_GIVEN_BACK)

    @property
    def crowded(self) -> bool:
        """Whether no attempt may begin any more: there is only room left for how the task ends."""
        return len(self.records) >= _MOST_RECORDS - _ROOM_TO_END

    @property
    def undoing(self) -> bool:
        """Whether whatever is left of the present run is to undo what was done."""
        return bool(self.records) and self.records[-1].body.undoes is True and not self.ended

    def runs(self, since: int = 0) -> int:
        """Return how often the handler was run, from an attempt on: passes that only undo do not count."""
        begun = (one for one in self.records if one.state is TaskState.WORKING and one.epoch >= since)
        return sum(one.body.undoes is None for one in begun)

    @property
    def approval(self) -> Approval | None:
        """The approval that the task has, if it does not wait for another one."""
        begun = False
        for number in range(len(self.records) - 1, 0, -1):
            record, asked = self.records[number], self.records[number - 1].body.asked
            if record.state is TaskState.AUTH_REQUIRED:
                return None
            if record.state is TaskState.SUBMITTED and record.body.decided is not None and asked is not None:
                return Approval(record.body.decided, asked, begun)
            begun |= record.state is TaskState.WORKING
        return None

    def begun_ms(self, attempt: int) -> int | None:
        """Return when the broker stored what is first on record of ``attempt``; of the task itself with 0."""
        return next((one.stored_at_ms for one in self.records if one.epoch == attempt or not attempt), None)

    @property
    def epoch(self) -> int:
        """How many attempts have begun."""
        return self.records[-1].epoch if self.records else 0

    async def refresh(self) -> bool:
        """Read what was recorded since; return whether there was anything.

        Raises:
            BusError: the broker does not answer, or the log is no log any more.

        """
        known = len(self.records)
        while not self.closed:
            subject = self.ref.subject(self._slot)
            stands = await self._desk.slots.read(self.ref.stream, subject)
            if stands is None:
                break
            self._take(stands)
        return len(self.records) > known

    async def append(
        self, body: RecordBody, task: bytes, *, deadline_s: float = _WRITE_S
    ) -> StateRecord | None:
        """Record that the task whose head's digest is ``task`` has come to a state.

        Returns ``None`` when somebody else's record stands there already; it is known then. A log that has
        ended is continued by a redrive only.

        Raises:
            BusError: it could not be written within ``deadline_s`` seconds. It may stand all the same.
            PayloadError, EnvelopeError: it can't be sealed.
            SvidUnavailableError: there is no valid SVID.

        """
        known = len(self.records)
        if not self.records and body.task is None:
            body = body._replace(task=self.ref.named)
        while self._is_open_to(body):
            sealed = await self._sealed(body, task)
            stands = await self._desk.slots.put(
                self.ref.stream, sealed.head.sub, sealed.frame, deadline_s=deadline_s
            )
            if stands is None:
                self._slot += 1
                record = StateRecord(
                    number=len(self.records),
                    epoch=sealed.head.att or 0,
                    body=body,
                    task=task,
                    digest=sealed.digest,
                    at_ms=sealed.head.iat,
                    writer=sealed.head.iss,
                )
                self.records.append(record)
                self._desk.on_record(self.ref.capability, body)
                return record
            self._take(stands)
            if len(self.records) > known:
                return None
        return None

    def _is_open_to(self, body: RecordBody) -> bool:
        return not self.ended if body.redrive is None else self.ended and not self.closed

    async def _sealed(self, body: RecordBody, task: bytes) -> Sealed:
        desk = self._desk
        draft = draft_record(
            self.ref,
            slot=self._slot,
            task=task,
            before=self.last,
            epoch=next_epoch(self.epoch, body.state),
            now_ms=desk.clock_ms(),
            log=desk.witness(),
        )
        return await desk.sealer.seal(draft, body.encoded())

    def _take(self, stands: StoredFrame) -> None:
        """Take what stands in the next slot for a record, or pass it over."""
        desk, slot = self._desk, self._slot
        if slot == 0:
            self.oldest_ms = stands.stored_at_ms
        try:
            record = read_record(
                desk.verifier, stands, self.ref, slot=slot, before=self.last, now_ms=desk.clock_ms()
            )
        except (EnvelopeError, IdentityError, FederationError) as error:
            if may_be_genuine(desk, self.ref, stands, error):
                raise BusError(
                    f"record {slot} of task {self.ref.id} can't be verified now: {error}"
                ) from error
            self._slot += 1
            self._pass_over(slot, error)
            return
        if len(self.records) >= _MOST_RECORDS:
            raise BusError(f"more than {_MOST_RECORDS} records of task {self.ref.id}")
        self._slot += 1
        self.records.append(record)

    def _pass_over(self, slot: int, error: Exception) -> None:
        self._foreign += 1
        self._desk.on_foreign()
        _log.error("what stands in slot %d of %r is not believed: %s", slot, self.ref, error)
        if self._foreign > _MOST_FOREIGN:
            raise BusError(f"the log of task {self.ref.id} is full of what is no record of it") from error


def may_be_genuine(desk: Desk, ref: TaskRef, stands: StoredFrame, error: Exception) -> bool:
    """Say whether what was refused with ``error`` may be by who may write it, and can't be told now."""
    if not isinstance(error, (TimeRefusedError, IdentityError, FederationError)):
        return False
    try:
        claimed = claimed_spiffe_id(desk.verifier.decode_frame(stands.data).chain[0])
    except (EnvelopeError, IdentityError, InvalidSpiffeIdError):
        return False
    return claimed in (ref.agent, control_role(ref.agent.trust_domain))
