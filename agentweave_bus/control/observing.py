"""What operators may see of tasks while they run: what agents record, and one task's whole story.

The control role reads it for them: it alone may read everybody's streams. What holds here:

- Records are verified one by one, as genuine and by who may write them. What is not genuine is told as that,
  with no word of what it claims. Of one task alone (:meth:`Observatory.task`) they have to follow on each
  other, too; of records as they come (:meth:`Observatory.records`) that is for who keeps them to see.
- Nothing is kept here for those who look: where to go on is said in the answer, and asked with.
- What a task asks for and what comes of it is never told. What went wrong is, in the first few words.
- Everything is bounded: pages, bytes of an answer, how far back it begins. Looking each second is cheap: one
  question to the broker, and one more for each agent that has recorded something since.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import anyio

from agentweave_bus.bus.streams import progress_stream_name, state_stream_name
from agentweave_bus.bus.subjects import (
    Family,
    agent_prefix,
    parse_state_subject,
    progress_subject,
    record_subject,
)
from agentweave_bus.control.stream_reader import StoredMessage, StreamFigures, StreamReader
from agentweave_bus.exceptions import (
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.progress import Progress, ProgressChain
from agentweave_bus.tasks.record import StateRecord, TaskRef, read_record, read_record_alone
from agentweave_bus.tasks.step_log import read_step
from agentweave_bus.types import TaskState

__all__ = ["Observatory"]

_BACK: Final = 2_000
"""How many slots before its end an agent's records are begun with."""

_MOST_BYTES: Final = 400_000
"""Of the rows of one answer: well below what a payload may have."""

_MOST_OF_TASK: Final = 1_000
_MOST_PROGRESS: Final = 50
_MOST_WORDS: Final = 1_000
_MOST_ERROR: Final = 300
_AT_ONCE: Final = 16
"""So many records are verified before others get a turn."""

_NOT_GENUINE: Final = (EnvelopeError, IdentityError, FederationError)

Row = dict[str, Any]


class Observatory:
    """Looks at the tasks of ``everyone`` at a broker. ``desk`` is the control role's own."""

    def __init__(
        self,
        reader: StreamReader,
        desk: Desk,
        everyone: Callable[[], Iterable[SpiffeID]],
    ) -> None:
        self._reader = reader
        self._desk = desk
        self._everyone = everyone

    # --- records as they come ----------------------------------------------------------------------------

    async def records(self, after: Mapping[SpiffeID, int] | None, *, limit: int) -> dict[str, Any]:
        """Return at most ``limit`` records of all agents, those of each in order, and where to go on.

        ``after`` says behind which number of each agent's stream; where it says nothing, and where a stream
        has begun anew, near its end. Records of steps only count as read.

        Raises:
            BusError: the broker does not answer.

        """
        streams = await self._reader.streams_of(self._everyone(), Family.STATE, state_stream_name)
        cursor = {one: _start(figures, (after or {}).get(one)) for one, figures in streams.items()}
        news = [one for one, figures in streams.items() if figures.last > cursor[one]]
        more = len(news) > limit
        if more:
            news = random.sample(news, limit)  # so that none of very many has to wait for ever
        page = _Page()
        for agent in news:
            pattern = f"{agent_prefix(Family.STATE, agent)}.>"
            batch = await self._reader.batch(
                streams[agent].name, pattern, after=cursor[agent], most=max(1, limit // len(news))
            )
            left = False
            for count, message in enumerate(batch.messages, 1):
                left = not page.take(self._row(agent, message))
                if left:
                    break
                cursor[agent] = message.number
                if count % _AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()
            if not left and not batch.pending:
                cursor[agent] = max(cursor[agent], min(streams[agent].last, batch.last))
            more |= left or batch.pending > 0
        rows = sorted(page.rows, key=_stored_at)
        return {"records": rows, "after": {str(one): at for one, at in cursor.items()}, "more": more}

    def _row(self, agent: SpiffeID, message: StoredMessage) -> Row | None:
        """Return what is told of what stands in a slot; ``None`` for that of a step."""
        try:
            place = parse_state_subject(message.subject)
            if place.slot is None:
                return None
            if record_subject(agent, place.sender, place.key, place.slot) != message.subject:
                raise MalformedEnvelopeError("a place that is none of this agent's")
            record = read_record_alone(
                self._desk.verifier,
                message.frame,
                agent=agent,
                sender=place.sender,
                key=place.key,
                slot=place.slot,
                now_ms=self._desk.clock_ms(),
            )
        except _NOT_GENUINE as error:
            return _not_genuine(agent, message, error)
        return _told(agent, place.sender, place.key, record)

    # --- one task ----------------------------------------------------------------------------------------

    async def task(self, agent: SpiffeID, sender: SpiffeID, key: str) -> dict[str, Any]:
        """Return all that is recorded of one task, in order, its steps and the last of its progress.

        Of more than an answer holds those in the middle are left out (``left_out`` says how many).

        Raises:
            BusError: the broker does not answer.

        """
        stream = state_stream_name(agent)
        rows: list[Row] = []
        story = _Story(self._desk, agent, sender, key)
        for message in await self._all(stream, _pattern(agent, sender, key)):
            row = story.take(message)
            if row is not None:
                rows.append(row)
        steps = [] if story.task is None else await self._steps(agent, key, story.task)
        progress = [] if story.ref is None else await self._progress(story.ref, story.task)
        told, left_out = _shortened(rows)
        answer: dict[str, Any] = {"records": told, "steps": steps, "progress": progress}
        return answer | ({"left_out": left_out} if left_out else {})

    async def _all(self, stream: str, pattern: str) -> list[StoredMessage]:
        """Return what stands on subjects of a pattern, in the order of their slots."""
        found: list[StoredMessage] = []
        while len(found) < _MOST_OF_TASK:
            after = found[-1].number if found else 0
            batch = await self._reader.batch(stream, pattern, after=after, most=_MOST_OF_TASK - len(found))
            found += batch.messages
            if not batch.messages or not batch.pending:
                break
        return sorted(found, key=lambda one: (len(one.subject), one.subject))

    async def _steps(self, agent: SpiffeID, key: str, task: bytes) -> list[Row]:
        """Return when each step was recorded, in that order. Their names are in their hashes only."""
        found = await self._all(state_stream_name(agent), _pattern(agent, agent, key))
        rows = (self._step(agent, one, task) for one in sorted(found, key=lambda one: one.number))
        return [row for row in rows if row is not None]

    def _step(self, agent: SpiffeID, message: StoredMessage, task: bytes) -> Row | None:
        try:
            if parse_state_subject(message.subject).slot is not None:
                return None
            opened = read_step(
                self._desk.verifier, message.frame, agent, message.subject, now_ms=self._desk.clock_ms()
            )
            if opened.head.re != task:
                raise MalformedEnvelopeError("a step of another task")
        except _NOT_GENUINE as error:
            return _not_genuine(agent, message, error)
        head = opened.head
        return {"genuine": True, "at": head.iat, "epoch": head.att, "digest": opened.digest.hex()}

    async def _progress(self, ref: TaskRef, task: bytes | None) -> list[Row]:
        """Return the last of what was told of how far a task is; what is not genuine is passed over."""
        if task is None:
            return []
        stream = progress_stream_name(ref.agent)
        place = progress_subject(ref.agent, ref.sender, ref.key, 0).removesuffix(".0")
        until = await self._reader.count(stream, f"{place}.*")
        first = max(0, until - _MOST_PROGRESS)
        found = await self._reader.these(stream, [f"{place}.{number}" for number in range(first, until)])
        chain = ProgressChain(self._desk, ref, task)
        told: list[Row] = []
        for message in sorted(found, key=lambda one: one.number):
            chain.slot, chain.digest = int(message.subject.rpartition(".")[2]), None
            if (entry := chain.take(message.frame)) is not None:
                told.append(_told_progress(entry))
        return told


class _Page:
    """The rows of one answer, as many as fit."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._bytes = 0

    def take(self, row: Row | None) -> bool:
        """Add a row, and return whether it fits; the first one does."""
        if row is None:
            return True
        size = _size(row)
        if self.rows and self._bytes + size > _MOST_BYTES:
            return False
        self.rows.append(row)
        self._bytes += size
        return True


class _Story:
    """Reads the records of one task in order. Where the first names it, each has to follow on the others."""

    def __init__(self, desk: Desk, agent: SpiffeID, sender: SpiffeID, key: str) -> None:
        self.ref: TaskRef | None = None
        self.task: bytes | None = None
        self._desk = desk
        self._agent, self._sender, self._key = agent, sender, key
        self._last: StateRecord | None = None

    def take(self, message: StoredMessage) -> Row | None:
        """Return what is told of a slot; ``None`` for that of a step."""
        try:
            slot = parse_state_subject(message.subject).slot
            if slot is None:
                return None
            record = self._read(message, slot)
        except _NOT_GENUINE as error:
            return _not_genuine(self._agent, message, error)
        self.task = record.task if self.task is None else self.task
        self._last = record
        return _told(self._agent, self._sender, self._key, record)

    def _read(self, message: StoredMessage, slot: int) -> StateRecord:
        desk = self._desk
        if self.ref is not None:
            return read_record(
                desk.verifier,
                message.frame,
                self.ref,
                slot=slot,
                before=self._last,
                now_ms=desk.clock_ms(),
            )
        record = read_record_alone(
            desk.verifier,
            message.frame,
            agent=self._agent,
            sender=self._sender,
            key=self._key,
            slot=slot,
            now_ms=desk.clock_ms(),
        )
        if self._last is None and (named := record.body.task) is not None:
            self.ref = TaskRef(self._agent, self._sender, named.capability, named.id)
        return record


def _stored_at(row: Row) -> int:
    return int(row["stored_at"] if row["genuine"] else row["at"])


def _start(figures: StreamFigures, seen: int | None) -> int:
    before_the_first = max(0, figures.first - 1)
    if seen is None or seen > figures.last:
        return max(before_the_first, figures.last - _BACK)
    return max(before_the_first, seen)


def _pattern(agent: SpiffeID, sender: SpiffeID, key: str) -> str:
    return record_subject(agent, sender, key, 0).removesuffix("0") + "*"


def _told(agent: SpiffeID, sender: SpiffeID, key: str, record: StateRecord) -> Row:
    body = record.body
    row: Row = {
        "genuine": True,
        "agent": str(agent),
        "sender": str(sender),
        "key": key,
        "capability": None if body.task is None else body.task.capability,
        "id": None if body.task is None else body.task.id,
        "number": record.number,
        "epoch": record.epoch,
        "state": record.state.value,
        "message": None if body.message is None else body.message[:_MOST_WORDS],
        "retry_at": body.retry_at,
        "at": record.at_ms,
        "stored_at": record.stored_at_ms,
        "writer": str(record.writer),
        "digest": record.digest.hex(),
        "task": record.task.hex(),
    }
    return row | dict(_told_sometimes(record))


def _told_sometimes(record: StateRecord) -> Iterator[tuple[str, Any]]:
    body = record.body
    for name in ("undoes", "step"):
        if (value := getattr(body, name)) is not None:
            yield name, value
    if body.redrive is not None:
        yield "redrive", True
    if body.asked is not None:
        yield "asked", {"approvers": list(body.asked.approvers), "until": body.asked.until}
    if body.decided is not None:
        yield "decided", body.decided.model_dump()
    said = None if body.result is None else body.result.get("error")
    if record.state is TaskState.FAILED and isinstance(said, str):
        yield "error", said[:_MOST_ERROR]


def _told_progress(entry: Progress) -> Row:
    body = entry.body
    row: Row = {"at": entry.at_ms}
    if body.fraction is not None:
        row["fraction"] = body.fraction
    said = body.message if body.artifact is None else f"artifact {body.artifact.name or body.artifact.type}"
    return row if said is None else row | {"text": said}


def _not_genuine(agent: SpiffeID, message: StoredMessage, error: Exception) -> Row:
    return {
        "genuine": False,
        "agent": str(agent),
        "at": message.frame.stored_at_ms,
        "why": str(error)[:_MOST_ERROR],
    }


def _shortened(rows: list[Row]) -> tuple[list[Row], int]:
    """Leave out rows in the middle until the others fit into an answer; return how many."""
    sizes = [_size(row) for row in rows]
    first, last, used = 0, len(rows), 0
    while first < last:
        place = first if first <= len(rows) - last else last - 1
        if used + sizes[place] > _MOST_BYTES:
            break
        used += sizes[place]
        first, last = (first + 1, last) if place == first else (first, last - 1)
    return rows[:first] + rows[last:], last - first


def _size(row: Row) -> int:
    return len(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
