"""What the console knows: a bounded fold of all that its sources told, and the snapshot made of it.

Nothing here waits or does I/O; the clock is passed in. ``docs/console.md`` says what the sections mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from agentweave_bus.console.agents import agent_rows
from agentweave_bus.console.decisions import Decisions
from agentweave_bus.console.flow import Flow
from agentweave_bus.console.health import NOT_ASKED, SourceHealth
from agentweave_bus.console.observed import FalseRecord, ObservedRecord, Queues
from agentweave_bus.console.task_book import MOST_TASKS, TaskBook, TaskRow
from agentweave_bus.types import TaskState

__all__ = ["MOST_ROWS", "SOURCES", "ConsoleModel", "TaskFilter"]

MOST_ROWS: Final = 200
SOURCES: Final = ("broker", "workers", "decisions")

_MOST_FALSE: Final = 20
_MOST_LETTERS: Final = 50


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks are wanted; an empty member wants all. ``text`` is looked for in what identifies a task."""

    state: str = ""
    agent: str = ""
    capability: str = ""
    text: str = ""

    def wants(self, row: TaskRow) -> bool:
        """Say whether a row is among them."""
        return (
            (not self.state or row.state.value == self.state)
            and (not self.agent or row.agent == self.agent)
            and (not self.capability or row.capability == self.capability)
            and (not self.text or self._in(row))
        )

    def _in(self, row: TaskRow) -> bool:
        places = (row.key, row.id, row.capability, row.agent, row.sender, row.message)
        return any(self.text.casefold() in place.casefold() for place in places if place)


class ConsoleModel:
    """Everything that the page shows. ``clock_ms`` returns the time in milliseconds since the epoch."""

    def __init__(
        self, *, trust_domain: str, clock_ms: Callable[[], int], most_tasks: int = MOST_TASKS
    ) -> None:
        self._trust_domain = trust_domain
        self._clock_ms = clock_ms
        self._sources = dict.fromkeys(SOURCES, NOT_ASKED)
        self._queues = Queues()
        self._workers: tuple[Mapping[str, Any], ...] = ()
        self._decisions = Decisions()
        self._flow = Flow()
        self._false: deque[FalseRecord] = deque(maxlen=_MOST_FALSE)
        self._false_count = 0
        self._letters: tuple[Mapping[str, Any], ...] = ()
        self._letters_more = False
        self._letters_why = ""
        self._letters_listed = False
        self._about_tasks: dict[str, Any] | None = None
        self.tasks = TaskBook(most_tasks)

    # --- what sources tell -------------------------------------------------------------------------------

    def source_well(self, name: str) -> None:
        """Note that a source told something just now."""
        self._sources[name] = SourceHealth(ok=True, at_ms=self._clock_ms())

    def source_failed(self, name: str, why: str) -> None:
        """Note why a source tells nothing."""
        self._sources[name] = self._sources[name].failed(why)

    def health(self, name: str) -> SourceHealth:
        """Return how a source is."""
        return self._sources[name]

    def add_records(self, records: Iterable[ObservedRecord | FalseRecord]) -> None:
        """Take in what stands in the agents' streams. A record that is not genuine changes no task."""
        now_ms = self._clock_ms()
        for record in records:
            if isinstance(record, FalseRecord):
                self._false.append(record)
                self._false_count += 1
            elif self.tasks.fold(record):
                self._flow.count(record.state, record.stored_at, now_ms)
                self._about_tasks = None

    def set_queues(self, queues: Queues) -> None:
        """Take in what waits."""
        self._queues = queues

    def set_workers(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Take in the supervisor's status."""
        self._workers = tuple(workers)

    def set_letters(self, letters: Sequence[Mapping[str, Any]], *, more: bool, why: str = "") -> None:
        """Take in the dead letters, the oldest first; ``more`` says that there are others.

        ``why`` says why they are not known.
        """
        self._letters_why = why
        self._letters_listed = not why
        self._letters = tuple(letters[:_MOST_LETTERS])
        self._letters_more = more or len(letters) > _MOST_LETTERS

    def add_decisions(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in audit records; those that are no decisions are left out."""
        for record in records:
            self._decisions.add(record)

    # --- what the page is told ---------------------------------------------------------------------------

    def sections(self) -> dict[str, Any]:
        """Return the parts of the snapshot that change, as JSON values."""
        return {
            "sources": {name: health.to_json() for name, health in self._sources.items()},
            "agents": agent_rows(self._trust_domain, self._queues, self._workers, self._all_letters()),
            **self._tasks_sections(),
            "flow": self._flow.to_json(self._clock_ms()),
            "letters": list(self._letters),
            "letters_more": self._letters_more,
            "letters_why": self._letters_why,
            "decisions": self._decisions.newest(),
            "decision_counts": dict(self._decisions.counts),
            "not_genuine": {
                "count": self._false_count,
                "newest": [{"agent": one.agent, "at": one.at, "why": one.why} for one in self._false],
            },
        }

    def found(self, wanted: TaskFilter) -> dict[str, Any]:
        """Return the rows of the tasks that are wanted, the newest first, and how many there are."""
        rows, matched = self.tasks.newest(MOST_ROWS, wanted.wants)
        return {"tasks": [row.to_json() for row in rows], "matched": matched}

    def _all_letters(self) -> Sequence[Mapping[str, Any]] | None:
        """Return all dead letters, ``None`` where not all of them are known."""
        return self._letters if self._letters_listed and not self._letters_more else None

    def _tasks_sections(self) -> dict[str, Any]:
        if self._about_tasks is None:
            rows, held = self.tasks.newest(MOST_ROWS)
            self._about_tasks = {
                "counts": {state.value: self.tasks.counts[state] for state in TaskState},
                "held": held,
                "dropped": self.tasks.dropped,
                "tasks": [row.to_json() for row in rows],
                "approvals": [row.approval_json() for row in islice(self.tasks.waiting(), MOST_ROWS)],
            }
        return self._about_tasks
