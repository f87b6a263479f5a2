"""The tasks that the console holds: one row each, the latest state of it, and no more than so many."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Final

from agentweave_bus.console.observed import AskedFor, ObservedRecord
from agentweave_bus.types import TaskState

__all__ = ["MOST_TASKS", "TaskBook", "TaskRow"]

MOST_TASKS: Final = 20_000

_SINCE: Final = attrgetter("since_ms")
_SHOWN_MESSAGE: Final = 500
_WAITING: Final = frozenset({TaskState.AUTH_REQUIRED, TaskState.INPUT_REQUIRED})


@dataclass(frozen=True, slots=True)
class TaskRow:
    """Where a task stands. Times are in milliseconds since the epoch.

    ``capability`` and ``id`` are ``None`` where its first record was not seen, and so is ``first_ms``.
    """

    key: str
    agent: str
    sender: str
    number: int
    state: TaskState
    attempt: int
    since_ms: int
    capability: str | None = None
    id: str | None = None
    first_ms: int | None = None
    message: str | None = None
    retry_at: int | None = None
    asked: AskedFor | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Which task it is: whose, and its key. A key alone is what any agent may write records under."""
        return self.agent, self.key

    @property
    def reference(self) -> str | None:
        """The text that names it for everybody, where it is known."""
        if self.capability is None or self.id is None:
            return None
        return f"{self.agent}#{self.capability}/{self.id}@{self.sender}"

    @property
    def waits_for_approval(self) -> bool:
        """Whether somebody has to say something before it goes on."""
        return self.state in _WAITING

    def to_json(self) -> dict[str, Any]:
        """Return it as the page reads it."""
        took_ms = None
        if self.state.terminal and self.first_ms is not None:
            took_ms = self.since_ms - self.first_ms
        return {
            "key": self.key,
            "reference": self.reference,
            "agent": self.agent,
            "capability": self.capability,
            "id": self.id,
            "sender": self.sender,
            "state": self.state.value,
            "attempt": self.attempt,
            "since": self.since_ms,
            "at_first": self.first_ms,
            "message": self.message,
            "retry_at": self.retry_at,
            "took_ms": took_ms,
        }

    def approval_json(self) -> dict[str, Any]:
        """Return it with whose approval it waits for."""
        asked = self.asked or AskedFor()
        return {**self.to_json(), "approvers": list(asked.approvers), "until": asked.until}


class TaskBook:
    """Rows by their tasks' places, in the order in which they changed.

    When there are too many the oldest that have ended go first.
    """

    def __init__(self, most: int = MOST_TASKS) -> None:
        self._most = most
        self._rows: dict[tuple[str, str], TaskRow] = {}
        self._waiting: dict[tuple[str, str], None] = {}
        # Who goes first. An entry is void when its task's row has changed since: that one has another.
        self._order: list[tuple[bool, int, int, tuple[str, str]]] = []
        self.counts: dict[TaskState, int] = dict.fromkeys(TaskState, 0)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> TaskRow | None:
        """Return a task's row, ``None`` of one that is not held.

        Of several it is that of the agent whose first record was seen: a key follows from what that says.
        """
        found = (row for row in self._rows.values() if row.key == key)
        return max(found, key=lambda row: row.id is not None, default=None)

    def fold(self, record: ObservedRecord) -> bool:
        """Take in a record; False if it says nothing new of its task."""
        before = self._rows.get((record.agent, record.key))
        if before is not None and record.number <= before.number:
            return False
        row = _row(record, before)
        if before is not None:
            self.counts[before.state] -= 1
            del self._rows[row.place]  # so that it stands behind those that have changed before
        self.counts[row.state] += 1
        self._rows[row.place] = row
        self._waiting.pop(row.place, None)
        if row.waits_for_approval:
            self._waiting[row.place] = None
        heapq.heappush(self._order, _turn(row))
        self._keep_bounds()
        return True

    def newest(self, most: int, wanted: Callable[[TaskRow], bool] | None = None) -> tuple[list[TaskRow], int]:
        """Return the rows that changed last, the newest first, and how many are wanted in all."""
        backwards = reversed(self._rows.values())  # the newest come first then, so little has to be sorted
        rows = list(backwards if wanted is None else filter(wanted, backwards))
        return heapq.nlargest(most, rows, key=_SINCE), len(rows)

    def waiting(self) -> Iterator[TaskRow]:
        """Return the rows of tasks that wait for somebody, longest first."""
        return (self._rows[place] for place in self._waiting)

    def _keep_bounds(self) -> None:
        while len(self._rows) > self._most:
            turn = heapq.heappop(self._order)
            row = self._rows.get(turn[-1])
            if row is None or _turn(row) != turn:
                continue
            del self._rows[row.place]
            self._waiting.pop(row.place, None)
            self.counts[row.state] -= 1
            self.dropped += 1
        if len(self._order) > 2 * self._most:
            self._order = [_turn(row) for row in self._rows.values()]
            heapq.heapify(self._order)


def _turn(row: TaskRow) -> tuple[bool, int, int, tuple[str, str]]:
    return (not row.state.terminal, row.since_ms, row.number, row.place)


def _row(record: ObservedRecord, before: TaskRow | None) -> TaskRow:
    told = record.error or record.message
    fresh = TaskRow(
        key=record.key,
        agent=record.agent,
        sender=record.sender,
        number=record.number,
        state=record.state,
        attempt=record.epoch,
        since_ms=record.stored_at,
        capability=record.capability,
        id=record.id,
        first_ms=record.stored_at if record.number == 0 else None,
        message=None if told is None else told[:_SHOWN_MESSAGE],
        retry_at=record.retry_at,
        asked=record.asked,
    )
    if before is None:
        return fresh
    return replace(
        fresh,
        capability=record.capability or before.capability,
        id=record.id or before.id,
        first_ms=before.first_ms,
    )
