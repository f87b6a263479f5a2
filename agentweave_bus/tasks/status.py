"""Where a task stands, as its submitter is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentweave_bus.types import TaskResult, TaskState

__all__ = ["Occurrence", "TaskStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Occurrence:
    """An occurrence of a recurring task that has begun: a task of its own, with an id and a reference.

    ``at_ms`` is the time for which it was due, in milliseconds since the epoch; ``state`` is as its agent
    recorded it.
    """

    id: str
    reference: str
    at_ms: int
    state: TaskState

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"id": self.id, "reference": self.reference, "at": self.at_ms, "state": self.state.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """Where a task stands, as its agent recorded it.

    A task of which nothing is recorded yet is ``submitted``. ``attempt`` counts from 1, and is 0 before the
    first. Times are milliseconds since the epoch: ``since_ms`` is when the agent recorded the state,
    ``retry_at`` when a task that failed is tried again. ``message`` says why, where there is something to
    say. ``result`` is that of a task which has ended by itself, completed or failed. ``approval`` says who
    may approve of one that waits for it, until when (``until``), and of what. ``undoing`` says that the
    handler is not run any more: ``attempt`` counts a pass, too, that only undoes what the task's steps did.

    ``due_at`` is when a delayed task is due, or a recurring one comes next, by what was submitted;
    ``every`` is when that comes again, and ``last_occurrence`` which of it began last. A recurring task
    without ``due_at`` comes no more. A handle that was made of a reference has these three where the
    submitter's own audit log has the submission.
    """

    state: TaskState
    attempt: int = 0
    message: str | None = None
    since_ms: int | None = None
    retry_at: int | None = None
    result: TaskResult | None = None
    approval: dict[str, Any] | None = None
    due_at: int | None = None
    every: str | None = None
    last_occurrence: Occurrence | None = None
    undoing: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, without what is not set."""
        values: dict[str, Any] = {
            "state": self.state.value,
            "attempt": self.attempt,
            "message": self.message,
            "since": self.since_ms,
            "retry_at": self.retry_at,
            "result": None if self.result is None else self.result.to_json(full=True),
            "approval": self.approval,
            "undoing": self.undoing or None,
            "due_at": self.due_at,
            "every": self.every,
            "last_occurrence": None if self.last_occurrence is None else self.last_occurrence.to_json(),
        }
        return {key: value for key, value in values.items() if value is not None}
