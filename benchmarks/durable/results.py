"""What runs of the comparison of tasks found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["TaskRounds", "TaskSample", "rounds_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSample:
    """One row in one round. Rates are tasks a second, processor time is µs a task, latencies are µs.

    ``submitted`` is storing alone. ``through`` is from the first submission to the last acknowledgement,
    while one worker process works. ``worked`` and ``worked_by_two`` are what one and two worker processes
    get done of a queue that was filled before. ``cpu_us`` is the client's for storing, the worker's and the
    broker's for working by one worker; ``resident`` is the worker's memory in bytes, ``processors`` how many
    all processes together could use. ``cancels_ms`` is after how long handlers felt a cancellation, where
    there is such a thing.
    """

    submitted: float
    through: float
    worked: float
    worked_by_two: float
    start_p50_us: float
    start_p99_us: float
    cpu_us: Mapping[str, float]
    resident: int
    processors: int
    cancels_ms: Sequence[float] = field(default_factory=tuple)


TaskRounds: TypeAlias = Sequence[TaskSample]
"""The samples of one row, one a round."""


def rounds_of(rows: Mapping[str, Any]) -> dict[str, TaskRounds]:
    """Read the samples of each row as JSON has them."""
    return {row: [TaskSample(**one) for one in rounds] for row, rounds in rows.items()}
