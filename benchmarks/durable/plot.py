"""The picture of a run of the comparison of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.durable.results import TaskRounds, TaskSample
from benchmarks.durable.rows import TASK_ROWS
from benchmarks.plot import OTHERS, OURS, bars, captioned, picture
from benchmarks.results import Figure

__all__ = ["draw_tasks"]


def draw_tasks(found: Mapping[str, TaskRounds], path: Path) -> None:
    """Draw rates, latency and processor time of each row into ``path``. Needs matplotlib."""
    rows = [row for row in TASK_ROWS if row.name in found]
    colours = [OURS if row.peer == "bus" else OTHERS for row in rows]
    places = range(len(rows))
    rounds = [found[row.name] for row in rows]
    panels: tuple[tuple[str, str, Callable[[TaskSample], float]], ...] = (
        ("Submitted", "tasks a second, more is better", lambda one: one.submitted),
        ("End to end through one worker", "tasks a second, more is better", lambda one: one.through),
        ("From submission to start, p50", "µs, less is better", lambda one: one.start_p50_us),
        ("The worker's processor time", "µs a task, less is better", lambda one: one.cpu_us["worker"]),
    )
    with picture(
        path,
        [row.title for row in rows],
        "Durable tasks of 1 KiB; median of the rounds, whiskers from the least to the greatest round.\n"
        "Blue: this project. Grey: bare JetStream, and a task queue without TLS, signatures or policy.",
    ) as axes:
        for one, (title, unit, value) in zip(axes, panels, strict=True):
            figures = [Figure.of([value(sample) for sample in each]) for each in rounds]
            bars(one, places, figures, colours, height=0.65)
            captioned(one, title, unit)
