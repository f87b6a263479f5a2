"""What happens to a task, as one sequence: its states, and the progress and artifacts in between.

They stand in two logs, each of which has its order. An attempt's progress comes after the record that began
it, and before the one that ended it. Each event says where in both logs its reader is then (``cursor``), so
that reading goes on from there, in this process or another one, without a gap or a repeat.

The record of an outcome says how much progress there was. What of it can't be had any more is told as a gap.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Self

from agentweave_bus.envelope.blob import BlobReference
from agentweave_bus.exceptions import BlobError, ConfigurationError, PayloadError
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.progress import Progress, ProgressChain
from agentweave_bus.tasks.record import ProgressMark, StateRecord, TaskRef
from agentweave_bus.types import Artifact, TaskResult, TaskState

__all__ = ["EventFeed", "Position", "TaskEvent", "approval_of", "result_of", "whole_result"]

_logger: Final = logging.getLogger(__name__)

_CURSOR: Final = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,16})\.([0-9a-f]{64}|-)")

_LATE_S: Final = (0.1, 0.3, 0.6)
"""After which pauses to look again for progress that was written before a record that stands."""


class Position(NamedTuple):
    """Where a reader of events is: how many records it has seen, and the progress that it reads next.

    ``digest`` is that of the message of progress before; ``None`` where there is none, or it is missing.
    """

    records: int = 0
    slot: int = 0
    number: int = 0
    digest: bytes | None = None

    @classmethod
    def parse(cls, cursor: str | None) -> Self:
        """Read an event's cursor; ``None`` is the beginning.

        Raises:
            ConfigurationError: it is none.

        """
        if cursor is None:
            return cls()
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            raise ConfigurationError(f"{cursor[:80]!r} is no cursor of an event")
        records, slot, number, digest = match.groups()
        known = None if digest == "-" else bytes.fromhex(digest)
        return cls(int(records), int(slot), int(number), known)

    def __str__(self) -> str:
        return f"{self.records}.{self.slot}.{self.number}.{self.digest.hex() if self.digest else '-'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """Something that happened to a task.

    ``kind`` says what, and which of the others are set: ``state`` (``state``, ``message``, ``result`` where
    the task has ended by itself, ``retry_at`` in milliseconds since the epoch where it is tried again),
    ``progress`` (``fraction`` from 0 to 1, ``message``), ``artifact`` (``artifact``) or ``gap`` (``missing``:
    how many messages of progress there were that can't be read; 0 if they differ from what the agent says).
    ``approval`` says who may approve of a task that waits for that (``approvers``), until when (``until``,
    milliseconds since the epoch), and of what (``payload``, where it is small).
    ``undoing`` says that the handler is not run any more: what the task's steps did is undone.
    ``attempt`` counts from 1, and is 0 before the first; ``at_ms`` is when the agent signed it, in
    milliseconds since the epoch. ``cursor`` is for ``events(after=…)``.
    """

    kind: Literal["state", "progress", "artifact", "gap"]
    cursor: str
    at_ms: int
    attempt: int
    state: TaskState | None = None
    message: str | None = None
    fraction: float | None = None
    artifact: Artifact | None = None
    result: TaskResult | None = None
    retry_at: int | None = None
    missing: int | None = None
    approval: dict[str, Any] | None = None
    undoing: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, without what is not set."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "at": self.at_ms,
            "attempt": self.attempt,
            "state": None if self.state is None else self.state.value,
            "message": self.message,
            "fraction": self.fraction,
            "artifact": self.artifact,
            "result": None if self.result is None else self.result.to_json(full=True),
            "retry_at": self.retry_at,
            "missing": self.missing,
            "approval": self.approval,
            "undoing": self.undoing or None,
            "cursor": self.cursor,
        }
        return {key: value for key, value in values.items() if value is not None}


class EventFeed:
    """Makes one sequence of a task's log, which somebody else refreshes, and its progress."""

    def __init__(self, desk: Desk, log: TaskLog, position: Position) -> None:
        self._desk = desk
        self._log = log
        self._position = position
        self._chain: ProgressChain | None = None
        self._held: Progress | None = None  # read, and of an attempt of which no record has been told yet

    @property
    def ended(self) -> bool:
        """Whether everything has been told: the task has ended."""
        return self._log.ended and self._position.records >= len(self._log.records)

    async def new(self) -> AsyncIterator[TaskEvent]:
        """Yield what can be told now. Broken off at any point, it goes on there when it is called again.

        Raises:
            BusError: the broker does not answer.

        """
        records = self._log.records
        while self._position.records < len(records):
            record = records[self._position.records]
            async for event in self._told_before(record):
                yield event
            yield self._state(record, await self._result(record))
        if records and records[-1].epoch and not self._log.ended:
            async for event in self._progress(records[-1].epoch):
                yield event

    async def _told_before(self, record: StateRecord) -> AsyncIterator[TaskEvent]:
        """Yield the progress that comes before a record, and a gap where some of it is missing."""
        if record.number == 0:
            return
        mark, epoch = record.body.progress, self._log.records[record.number - 1].epoch
        for pause in (*_LATE_S, None):
            async for event in self._progress(epoch, mark):
                yield event
            if mark is None or self._position.number >= mark.count or pause is None:
                break
            await asyncio.sleep(pause)
        if mark is not None and (gap := self._gap(record, mark)) is not None:
            yield gap

    async def _progress(self, epoch: int, mark: ProgressMark | None = None) -> AsyncIterator[TaskEvent]:
        """Yield the progress of attempts up to ``epoch`` that can be read now, as far as ``mark`` says."""
        chain = self._chain
        if chain is None:
            at, task = self._position, self._log.records[0].task
            chain = self._chain = ProgressChain(
                self._desk, self._log.ref, task, slot=at.slot, number=at.number, digest=at.digest
            )
        while mark is None or self._position.number < mark.count:
            entry = self._held = self._held or await chain.next()
            if entry is None or entry.body.attempt > epoch:
                return
            before = self._position.number
            self._held = None
            if entry.number > before:
                self._position = self._position._replace(number=entry.number, digest=None)
                yield self._missing(entry.number - before, entry.at_ms, entry.body.attempt)
            self._position = self._position._replace(
                slot=entry.slot + 1, number=entry.number + 1, digest=entry.digest
            )
            yield self._of_progress(entry)

    def _gap(self, record: StateRecord, mark: ProgressMark) -> TaskEvent | None:
        at = self._position
        if at.number < mark.count:
            missing = mark.count - at.number
        elif at.number == mark.count and at.digest not in (None, bytes.fromhex(mark.digest)):
            missing = 0
        else:
            return None
        self._position = at._replace(number=mark.count, digest=bytes.fromhex(mark.digest))
        return self._missing(missing, record.at_ms, record.epoch)

    def _missing(self, missing: int, at_ms: int, attempt: int) -> TaskEvent:
        return TaskEvent(
            kind="gap", cursor=str(self._position), at_ms=at_ms, attempt=attempt, missing=missing
        )

    async def _result(self, record: StateRecord) -> TaskResult | None:
        try:
            return await whole_result(self._desk, self._log.ref, record)
        except BlobError as error:
            _logger.warning("the result of task %s can't be told: %s", self._log.ref.id, error)
            return None

    def _state(self, record: StateRecord, result: TaskResult | None) -> TaskEvent:
        self._position = self._position._replace(records=record.number + 1)
        return TaskEvent(
            kind="state",
            cursor=str(self._position),
            at_ms=record.at_ms,
            attempt=record.epoch,
            state=record.state,
            message=record.body.message,
            result=result,
            retry_at=record.body.retry_at,
            approval=approval_of(record),
            undoing=record.body.undoes is True,
        )

    def _of_progress(self, entry: Progress) -> TaskEvent:
        body, artifact = entry.body, entry.body.artifact
        return TaskEvent(
            kind="progress" if artifact is None else "artifact",
            cursor=str(self._position),
            at_ms=entry.at_ms,
            attempt=body.attempt,
            message=body.message,
            fraction=body.fraction,
            artifact=None if artifact is None else artifact.to_artifact(),
        )


def approval_of(record: StateRecord) -> dict[str, Any] | None:
    """Return what a record says of the approval that its task waits for, or ``None``."""
    asked = record.body.asked
    return None if asked is None else asked.told(record.body.pd)


def result_of(record: StateRecord) -> TaskResult | None:
    """Return the result that a record holds, or ``None``; one that it refers to, :func:`whole_result` has."""
    if record.state not in (TaskState.COMPLETED, TaskState.FAILED) or record.body.blob is not None:
        return None
    if record.body.result is not None:
        return _read(record.body.result)
    return TaskResult(status="failed", error=record.body.message or "failed")


async def whole_result(desk: Desk, ref: TaskRef, record: StateRecord) -> TaskResult | None:
    """Do as :func:`result_of`, also where the record refers to a result that lies apart.

    That is for the task's submitter alone: for others it is ``None``.

    Raises:
        BlobError: it is not there (any more), or is not what the agent signed.
        BusError: the broker does not answer.

    """
    blobs = desk.blobs
    if record.body.blob is None or record.state not in (TaskState.COMPLETED, TaskState.FAILED):
        return result_of(record)
    if blobs is None or blobs.me != ref.sender:
        return None
    reference = BlobReference.read(record.body.blob, max_bytes=blobs.max_bytes)
    data = await blobs.fetch(ref.agent, reference)
    try:
        return _read(await blobs.decode(data))
    except PayloadError as error:
        raise BlobError(f"the agent's result is none: {error}") from error


def _read(value: Any) -> TaskResult:
    try:
        return TaskResult.from_json(value)
    except PayloadError as error:
        return TaskResult(status="failed", error=f"the agent's result is none: {error}")
