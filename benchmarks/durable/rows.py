"""The rows of the comparison of durable tasks, and the queues that each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["AT_ONCE", "IDLE", "ONE", "QUEUES", "TASK_ROWS", "TWO", "USUAL", "TaskRow", "chosen"]

IDLE: Final = "idle"
"""Its worker holds what it has got, and takes nothing more: here storing is measured alone."""
ONE: Final = "one"
TWO: Final = "two"

QUEUES: Final[Mapping[str, int]] = {IDLE: 1, ONE: 1, TWO: 2}
"""How many worker processes each queue has."""


AT_ONCE: Final = 100
"""How many tasks a worker process has under way: what Taskiq's own command has by default."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One thing measured. ``peer`` names a module of :mod:`benchmarks.durable.peers`.

    One that ``keeps`` results keeps what each task returned, where the peer can do without. One that stands
    ``aside`` is measured only when it is named.
    """

    name: str
    title: str
    peer: str
    keeps: bool = False
    aside: bool = False


TASK_ROWS: Final = (
    TaskRow("jetstream", "JetStream of nats-py over mTLS", "raw"),
    TaskRow("floor", "the least that signs and records", "floor", aside=True),
    TaskRow("tasks", "durable tasks", "bus"),
    TaskRow("taskiq", "Taskiq on plain NATS", "taskiq"),
    TaskRow("taskiq-results", "Taskiq, results kept", "taskiq", keeps=True),
)

USUAL: Final = ",".join(row.name for row in TASK_ROWS if not row.aside)
"""Those that are measured when none is named."""


def chosen(names: str) -> tuple[TaskRow, ...]:
    """Return the rows that ``names`` lists, separated by commas, in the table's order.

    Raises:
        ValueError: there is no row of such a name.

    """
    wanted = names.split(",")
    known = [row.name for row in TASK_ROWS]
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"no such row of tasks: {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(row for row in TASK_ROWS if row.name in wanted)
