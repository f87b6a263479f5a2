"""Whether a worker's resident memory stays where it is over many durable tasks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.durable.rows import ONE, TaskRow
from benchmarks.durable.run import Turn
from benchmarks.durable.world import TaskWorld
from benchmarks.gauges import resident_bytes
from benchmarks.memory import MemorySample
from benchmarks.run import say

__all__ = ["sample_task_memory"]

_FIRST: Final = 500


async def sample_task_memory(row: TaskRow, tasks: int, every_s: float, limit_s: float) -> list[MemorySample]:
    """Put ``tasks`` tasks through one worker, and look at the memory about every ``every_s`` seconds.

    It ends after ``limit_s`` seconds, however few tasks that were.
    """
    samples: list[MemorySample] = []
    give_up = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with TaskWorld(Path(folder), [row], queues={ONE: 1}, closed=()).contenders() as (contender,):
            turn, done, count = Turn(contender), 0, _FIRST
            worker = contender.queues[ONE].workers[0].pid
            while done < tasks and time.monotonic() < give_up:
                rate = await turn.through(ONE, count)
                done, count = done + count, max(_FIRST, int(rate * every_s))
                mb = [resident_bytes(pid) / 1e6 for pid in (worker, contender.client.pid)]
                samples.append(MemorySample(done, *mb))
                say(f"{done:,} tasks, worker {mb[0]:.1f} MB")
            say("")
    return samples
