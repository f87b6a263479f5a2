"""When a parked task is due and comes again, as its submitter knows it: by the head that it signed.

The control role goes by the same head, so that the times are the same. Which occurrence of a recurring task
began is not believed of anybody: its id follows from its time, and its log is read and verified like any.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Self

from agentweave_bus.envelope import occurrence_id
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.recurrence import Recurrence, recurrence
from agentweave_bus.types import TaskState

__all__ = ["LastOccurrence", "Schedule"]

_LOOKED_BACK: Final = 8
"""How many occurrences are looked at for one that has begun, from the latest back."""


class Schedule(NamedTuple):
    """What a head says of its task's times, in milliseconds since the epoch."""

    first_ms: int
    until_ms: int
    every: str | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self | None:
        """Read what :meth:`facts` wrote; ``None`` if there is no such thing among ``values``."""
        first_ms, until_ms, every = (values.get(key) for key in ("nbf", "exp", "every"))
        if type(first_ms) is not int or type(until_ms) is not int or not isinstance(every, str | None):
            return None
        made = cls(first_ms, until_ms, every)
        try:
            made.times  # noqa: B018 - whether it can be understood
        except ConfigurationError:
            return None
        return made

    def facts(self) -> dict[str, Any]:
        """Return it under the names that a head has for it."""
        facts: dict[str, Any] = {"nbf": self.first_ms, "exp": self.until_ms}
        return facts if self.every is None else facts | {"every": self.every}

    @property
    def times(self) -> Recurrence | None:
        """The times of a recurring task. Raises ConfigurationError."""
        return None if self.every is None else recurrence(self.every, self.first_ms)

    def due_at(self, now_ms: int) -> int | None:
        """Return when it is due, or due next; ``None`` of a recurring one that comes no more."""
        times = self.times
        if times is None:
            return self.first_ms
        following = times.next_after(now_ms)
        return following if following is not None and following < self.until_ms else None


class LastOccurrence:
    """Finds which occurrence of one recurring task began last. One instance belongs to one handle."""

    def __init__(self, desk: Desk, ref: TaskRef) -> None:
        self._desk = desk
        self._ref = ref
        self._at_ms = -1  # of the one that was found last
        self._log: TaskLog | None = None

    async def look(self, schedule: Schedule, now_ms: int) -> tuple[TaskRef, int, TaskState] | None:
        """Return which one, for when it was due, and its state; ``None`` if none of the latest 8 has begun.

        Raises:
            BusError: it can't be read.

        """
        times = schedule.times
        if times is None:
            return None
        at_ms = times.latest(min(now_ms, schedule.until_ms - 1))
        for _ in range(_LOOKED_BACK):
            if at_ms is None or at_ms <= self._at_ms:
                break
            ref = self._ref
            log = TaskLog(
                self._desk, TaskRef(ref.agent, ref.sender, ref.capability, occurrence_id(ref.id, at_ms))
            )
            await log.refresh()
            if log.last is not None:
                self._at_ms, self._log = at_ms, log
                break
            at_ms = times.latest(at_ms - 1)
        if (found := self._log) is None:
            return None
        await found.refresh()
        assert found.last is not None  # only such are kept
        return found.ref, self._at_ms, found.last.state
