"""How much of what is parked may be one sender's: so that nobody's flood makes the tasks of others late.

A control role counts what it admitted or brought back itself. It starts with nothing, and counts what was
parked before when its time comes; where several control roles share the work, each has its own count. What it
does not hear of any more, because another control role dealt with it, leaves the count some minutes after its
time.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from typing import Final, NamedTuple

__all__ = ["MOST_BYTES", "MOST_PARKED", "MOST_RECURRING", "Holding", "Place", "Shares"]

MOST_RECURRING: Final = 100
"""Recurring tasks of one sender, at all agents together."""

MOST_PARKED: Final = 100_000
"""Parked tasks of one sender at one agent: a tenth of those for which an agent's stream has room."""

MOST_BYTES: Final = 1024**3 // 10
"""What they take in bytes: a tenth, too."""

_MOST_REMEMBERED: Final = 500_000
_LAPSES_MS: Final = 600_000
"""So long after its time a task is still counted of which nothing more was heard."""


class Place(NamedTuple):
    """Where a parked task stands."""

    stream: str
    number: int


class Holding(NamedTuple):
    """A parked task as it is counted; ``due_ms`` is its next time, ``size`` is in bytes.

    ``key`` says which task it is. The same may be parked twice, by who submits it again.
    """

    sender: str
    key: str
    size: int
    due_ms: int
    until_ms: int
    recurring: bool

    def covers(self, other: Holding) -> bool:
        """Say whether ``other`` adds nothing: it is the same task, due no sooner, and lives no longer."""
        return self.key == other.key and self.due_ms <= other.due_ms and self.until_ms >= other.until_ms


class Shares:
    """Counts what senders have parked; of more than ``remembered`` tasks the oldest are not counted."""

    def __init__(
        self,
        *,
        tasks: int = MOST_PARKED,
        size: int = MOST_BYTES,
        recurring: int = MOST_RECURRING,
        remembered: int = _MOST_REMEMBERED,
    ) -> None:
        self._most_tasks = tasks
        self._most_bytes = size
        self._most_recurring = recurring
        self._remembered = remembered
        self._held: OrderedDict[Place, Holding] = OrderedDict()
        self._places: dict[str, Place] = {}
        self._lapsing: list[tuple[int, Place]] = []
        self._tasks: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._recurring: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many tasks are counted."""
        return len(self._held)

    def elsewhere(self, place: Place, task: Holding) -> tuple[Place, Holding] | None:
        """Return where the same task was parked before, and as what it is counted there."""
        found = self._places.get(task.key, place)
        return None if found == place else (found, self._held[found])

    def refusal(self, place: Place, task: Holding, now_ms: int) -> str | None:
        """Return why a task that was parked just now is too much; ``None`` if it is not, and count it."""
        self._lapse(now_ms)
        if place not in self._held:
            mine = (place.stream, task.sender)
            if task.recurring and self._recurring[task.sender] >= self._most_recurring:
                return f"too many of yours are parked: {self._most_recurring} recurring tasks"
            if self._tasks[mine] >= self._most_tasks:
                return f"too many of yours are parked: {self._most_tasks} tasks for this agent"
            if self._bytes[mine] + task.size > self._most_bytes:
                return f"too many of yours are parked: {self._most_bytes} bytes for this agent"
        self.hold(place, task)
        return None

    def hold(self, place: Place, task: Holding) -> None:
        """Count a task, whatever else its sender has parked."""
        self.release(place)
        mine = (place.stream, task.sender)
        self._held[place] = task
        self._places.setdefault(task.key, place)
        self._tasks[mine] += 1
        self._bytes[mine] += task.size
        self._recurring[task.sender] += task.recurring
        heapq.heappush(self._lapsing, (task.due_ms + _LAPSES_MS, place))
        while len(self._held) > self._remembered:
            self.release(next(iter(self._held)))
        if len(self._lapsing) > 2 * self._remembered:
            self._lapsing = [(one.due_ms + _LAPSES_MS, where) for where, one in self._held.items()]
            heapq.heapify(self._lapsing)

    def release(self, place: Place) -> None:
        """Count what stood at ``place`` no more; without effect if it isn't counted."""
        task = self._held.pop(place, None)
        if task is None:
            return
        if self._places.get(task.key) == place:
            del self._places[task.key]
        mine = (place.stream, task.sender)
        self._tasks[mine] -= 1
        self._bytes[mine] -= task.size
        if self._tasks[mine] <= 0:
            del self._tasks[mine], self._bytes[mine]
        self._recurring[task.sender] -= task.recurring
        if self._recurring[task.sender] <= 0:
            del self._recurring[task.sender]

    def _lapse(self, now_ms: int) -> None:
        while self._lapsing and self._lapsing[0][0] <= now_ms:
            due_ms, place = heapq.heappop(self._lapsing)
            held = self._held.get(place)
            if held is not None and held.due_ms + _LAPSES_MS <= due_ms:
                self.release(place)
