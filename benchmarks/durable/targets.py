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
_OF_LINEAR: Final = 0.9


def submitted(one: TaskSample) -> float:
    """Return how many are stored in a second."""
    return one.submitted


def through(one: TaskSample) -> float:
    """Return how many get from submission to acknowledgement in a second."""
    return one.through


def worked(one: TaskSample) -> float:
    """Return how many one worker gets done in a second."""
    return one.worked


def second_worker(one: TaskSample) -> float:
    """Return how many times as much as one worker two get done."""
    return one.worked_by_two / one.worked


def room_for_second(one: TaskSample) -> float:
    """Return how many times as much as one worker two can get done at best: twice, while processors last.

    A worker takes at least its processor time for a task, and workers and broker together can't take more
    of it than there is. Where that is too little for one worker and the broker, a second brings nothing.
    """
    worker, broker = one.cpu_us["worker"], one.cpu_us["broker"]
    return max(1.0, min(2.0, one.processors * worker / (worker + broker)))


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
)


def judge_tasks(found: Mapping[str, TaskRounds]) -> Iterator[Verdict]:
    """Compare a run with the targets whose rows it has. What counts is the median of the rounds."""
    if _OURS not in found:
        return
    mine = found[_OURS]
    for target in TASK_TARGETS:
        if target.base in found:
            figure = ratio(mine, found[target.base], target.measure, target.of_base)
            yield Verdict(f"tasks: {target.words}", figure, figure.median >= target.bound)
    yield _second_worker(mine)
    if (cancels := cancels_of(mine)) is not None:
        wanted = f"tasks: a handler feels a cancellation within {_CANCEL_MS:g} ms"
        yield Verdict(wanted, cancels, cancels.median < _CANCEL_MS)


def _second_worker(rounds: TaskRounds) -> Verdict:
    """Hold what a second worker brings against what the processors leave for it, round by round."""
    figure = Figure.of([second_worker(one) / room_for_second(one) for one in rounds])
    found, room = (Figure.of([of(one) for one in rounds]).median for of in (second_worker, room_for_second))
    wanted = (
        f"tasks: two workers ({found:.2f} x one) at least {_OF_LINEAR:g} x what"
        f" {rounds[0].processors} processors leave beside the broker ({room:.2f} x one)"
    )
    return Verdict(wanted, figure, figure.median >= _OF_LINEAR)


def cancels_of(rounds: TaskRounds) -> Figure | None:
    """Return after how many milliseconds handlers felt a cancellation, over all rounds together."""
    every = [one for sample in rounds for one in sample.cancels_ms]
    return Figure.of(every) if every else None
