"""What a run of the comparison of tasks found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.durable.results import TaskRounds, TaskSample
from benchmarks.durable.rows import TASK_ROWS
from benchmarks.durable.targets import cancels_of, judge_tasks
from benchmarks.report import spread, table, verdicts_table
from benchmarks.results import Figure, ratio

__all__ = ["TITLES", "cancels_line", "task_figures_table", "task_ratios_tables", "task_targets_table"]

TITLES = {row.name: row.title for row in TASK_ROWS}

_RATES: Mapping[str, Callable[[TaskSample], float]] = {
    "submitted, /s": lambda one: one.submitted,
    "end to end, /s": lambda one: one.through,
    "one worker, /s": lambda one: one.worked,
    "two workers, /s": lambda one: one.worked_by_two,
    "to start p50 µs": lambda one: one.start_p50_us,
    "to start p99 µs": lambda one: one.start_p99_us,
}
_USE: Mapping[str, Callable[[TaskSample], float]] = {
    "client CPU µs": lambda one: one.cpu_us["client"],
    "worker CPU µs": lambda one: one.cpu_us["worker"],
    "broker CPU µs": lambda one: one.cpu_us["broker"],
}
_MEMORY: Mapping[str, Callable[[TaskSample], float]] = {"worker MB": lambda one: one.resident / 1e6}


def task_figures_table(found: Mapping[str, TaskRounds]) -> str:
    """Return the figures of each row: the median of the rounds, and the least and the greatest."""
    measures = {**_RATES, **_USE, **_MEMORY}
    lines = [
        [TITLES[name], *(spread(Figure.of([of(one) for one in rounds])) for of in measures.values())]
        for name, rounds in found.items()
    ]
    return table(["median (least to greatest round)", *measures], lines)


def task_ratios_tables(found: Mapping[str, TaskRounds]) -> Iterator[str]:
    """Return a table for each row that is compared with: the median of the rounds' own ratios."""
    measures = {name.removesuffix(", /s").removesuffix(" µs"): of for name, of in {**_RATES, **_USE}.items()}
    for base in ("jetstream", "taskiq", "taskiq-results"):
        if base in found and len(found) > 1:
            lines = [
                [TITLES[name], *(spread(ratio(rounds, found[base], of), ".2f") for of in measures.values())]
                for name, rounds in found.items()
                if name != base
            ]
            yield table([f"times {TITLES[base]}", *measures], lines)


def cancels_line(found: Mapping[str, TaskRounds]) -> str:
    """Say how long a cancellation takes to reach a handler; empty without the row."""
    cancels = cancels_of(found.get("tasks", ()))
    if cancels is None:
        return ""
    count = sum(len(one.cancels_ms) for one in found["tasks"])
    return (
        f"A cancellation reached the running handler after {cancels.median:.1f} ms (median of {count};"
        f" {cancels.low:.1f} to {cancels.high:.1f} ms)."
    )


def task_targets_table(found: Mapping[str, TaskRounds]) -> str:
    """Return the targets and whether they are met; empty without the rows for any."""
    return verdicts_table(judge_tasks(found))
