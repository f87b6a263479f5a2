"""How many processor instructions a durable task takes; calls' are in :mod:`benchmarks.instructions`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.durable.report import TITLES
from benchmarks.durable.rows import IDLE, ONE, TaskRow
from benchmarks.durable.run import Turn
from benchmarks.durable.world import Contender, TaskWorld
from benchmarks.instructions import Counted, check_perf, counting
from benchmarks.report import table
from benchmarks.run import say

__all__ = ["TaskInstructions", "count_task_instructions", "task_instructions_table"]

_WARM: Final = 1_000


@dataclass(frozen=True, slots=True)
class TaskInstructions:
    """Of one row: what a task takes in the client that submits it, and in worker and broker to be done.

    What a worker has taken before its gate opens, some hundred tasks, is counted as done from then on.
    ``client_cycles`` and ``worker_cycles`` are how many cycles of a processor that took.
    """

    client: float
    worker: float
    broker: float
    client_cycles: float
    worker_cycles: float


async def count_task_instructions(rows: Sequence[TaskRow], count: int) -> dict[str, TaskInstructions]:
    """Count for each row, while ``count`` tasks are submitted, and while one worker does as many.

    Raises:
        RuntimeError: ``perf`` is not there, or may not count.

    """
    check_perf()
    found = {}
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with TaskWorld(Path(folder), rows, queues={IDLE: 1, ONE: 1}).contenders() as contenders:
            for contender in contenders:
                say(contender.row.name)
                found[contender.row.name] = await _counted(contender, count)
    say("")
    return found


async def _counted(contender: Contender, count: int) -> TaskInstructions:
    turn, queue, counts = Turn(contender), contender.queues[ONE], dict[str, Counted]()
    await turn.through(ONE, _WARM)
    async with counting(contender.client.pid, "client", counts):
        await turn.submitted(IDLE, count)
    await turn.filled(queue, count)
    async with (
        counting(queue.workers[0].pid, "worker", counts),
        counting(contender.broker_pid, "broker", counts),
    ):
        _, done = await turn.worked(queue)
    client, worker, broker = (counts[part] for part in ("client", "worker", "broker"))
    return TaskInstructions(
        client=client.instructions / count,
        worker=worker.instructions / done,
        broker=broker.instructions / done,
        client_cycles=client.cycles / count,
        worker_cycles=worker.cycles / done,
    )


def task_instructions_table(found: Mapping[str, TaskInstructions]) -> str:
    """Return a line for each row, in thousands, and how many times the first row's they are."""
    head = ["thousand instructions a task", "client", "worker", "both", "times the first", "broker"]
    head += ["a cycle: client", "worker"]
    base = next(iter(found.values()))
    lines = [
        [
            TITLES[name],
            f"{one.client / 1000:,.0f}",
            f"{one.worker / 1000:,.0f}",
            f"{(one.client + one.worker) / 1000:,.0f}",
            f"{(one.client + one.worker) / (base.client + base.worker):.1f}",
            f"{one.broker / 1000:,.0f}",
            f"{one.client / one.client_cycles:.1f}",
            f"{one.worker / one.worker_cycles:.1f}",
        ]
        for name, one in found.items()
    ]
    return table(head, lines)
