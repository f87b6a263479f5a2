"""What durable tasks are to reach, as ratios within one run, and whether a run has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.durable.results import TaskRounds, TaskSample
from benchmarks.results import Figure, ratio
from benchmarks.targets import Verdict

__all__ = ["TASK_TARGETS", "TaskTarget", "cancels_of", "judge_tasks"]

_Measure = Callable[[TaskSample], float]
_OURS: Final = "tasks"
_CANCEL_MS: Final = 200.0


def submitted(one: TaskSample) -> float:
    """Return how many are stored in a second."""
    return one.submitted


def through(one: TaskSample) -> float:
    """Return how many get from submission to acknowledgement in a second."""
    return one.through


def worked(one: TaskSample) -> float:
    """Return how many one worker gets done in a second."""
    return one.worked


def worked_by_two(one: TaskSample) -> float:
    """Return how many two workers get done in a second."""
    return one.worked_by_two


@dataclass(frozen=True, slots=True)
class TaskTarget:
    """Durable tasks' ``measure`` is to be at least ``bound`` times the ``of_base`` of the row ``base``."""

    words: str
    base: str
    measure: _Measure
    of_base: _Measure
    bound: float


TASK_TARGETS: Final = (
    TaskTarget("submitting at least 0.2 x publish_async", "jetstream", submitted, submitted, 0.2),
    TaskTarget("end to end at least 0.1 x pulling and acknowledging", "jetstream", through, worked, 0.1),
    TaskTarget("end to end more than Taskiq", "taskiq", through, through, 1.0),
    TaskTarget("end to end more than Taskiq, results kept", "taskiq-results", through, through, 1.0),
    TaskTarget("two workers at least 1.6 x one", _OURS, worked_by_two, worked, 1.6),
)
"""Two workers and their broker on two processors can't reach twice as much as one; 1.6 counts as close."""


def judge_tasks(found: Mapping[str, TaskRounds]) -> Iterator[Verdict]:
    """Compare a run with the targets whose rows it has. What counts is the median of the rounds."""
    if _OURS not in found:
        return
    mine = found[_OURS]
    for target in TASK_TARGETS:
        if target.base in found:
            figure = ratio(mine, found[target.base], target.measure, target.of_base)
            yield Verdict(f"tasks: {target.words}", figure, figure.median >= target.bound)
    if (cancels := cancels_of(mine)) is not None:
        wanted = f"tasks: a handler feels a cancellation within {_CANCEL_MS:g} ms"
        yield Verdict(wanted, cancels, cancels.median < _CANCEL_MS)


def cancels_of(rounds: TaskRounds) -> Figure | None:
    """Return after how many milliseconds handlers felt a cancellation, over all rounds together."""
    every = [one for sample in rounds for one in sample.cancels_ms]
    return Figure.of(every) if every else None
