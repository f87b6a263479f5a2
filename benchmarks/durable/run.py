"""A run of the comparison of tasks: rounds, in each of which every row has its turn."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.durable.results import TaskRounds, TaskSample
from benchmarks.durable.rows import IDLE, ONE, TWO, TaskRow
from benchmarks.durable.stamps import StampReader
from benchmarks.durable.world import Contender, Queue, TaskWorld
from benchmarks.gauges import cpu_seconds, processors, resident_bytes
from benchmarks.load import percentile
from benchmarks.run import say

__all__ = ["Counts", "Turn", "compare_tasks"]

_LIMIT_S: Final = 120.0
_SETTLE_S: Final = 0.1
_LEAST: Final = 200
_MOST: Final = 100_000
_FIRST: Final = 300
_PACE_S: Final = 0.008
_CANCELS: Final = 8


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tasks each measurement of a row takes, so that it lasts about as long for every row."""

    submitted: int = _FIRST
    through: int = _FIRST
    worked: int = _FIRST
    worked_by_two: int = _FIRST

    @staticmethod
    def after(sample: TaskSample, seconds: float) -> Counts:
        """Return those that should last ``seconds`` seconds, by what the last round found."""

        def lasting(rate: float) -> int:
            return int(min(_MOST, max(_LEAST, rate * seconds)))

        return Counts(
            lasting(sample.submitted),
            lasting(sample.through),
            lasting(sample.worked),
            lasting(sample.worked_by_two),
        )


async def compare_tasks(
    rows: Sequence[TaskRow], *, rounds: int, seconds: float, profiles: Path | None = None
) -> dict[str, TaskRounds]:
    """Measure ``rows``, about ``seconds`` seconds for each of a row's measurements.

    Every second round goes through the rows from the end, so that no row always follows the same one.
    """
    found: dict[str, list[TaskSample]] = {row.name: [] for row in rows}
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with TaskWorld(Path(folder), rows, profiles=profiles).contenders() as contenders:
            turns = [Turn(contender) for contender in contenders]
            last = [await turn.run(Counts(), seconds) for turn in turns]  # warms up, and says how fast it is
            if profiles is not None:
                for contender in contenders:
                    begin_profiles(contender)
            for number in range(rounds):
                order = range(len(turns))
                for which in order if number % 2 == 0 else reversed(order):
                    say(f"round {number + 1} of {rounds}: {rows[which].title}")
                    last[which] = await turns[which].run(Counts.after(last[which], seconds), seconds)
                    found[rows[which].name].append(last[which])
            say("")
    return dict(found)


def begin_profiles(contender: Contender) -> None:
    """Have a row's processes sample where their time goes, from now on."""
    workers = [worker.pid for queue in contender.queues.values() for worker in queue.workers]
    for pid in (*workers, *(client.pid for client in contender.clients)):
        os.kill(pid, signal.SIGUSR2)


class Turn:
    """Measures one row, part by part."""

    def __init__(self, contender: Contender) -> None:
        self._one = contender
        self._starts = StampReader(contender.stamps)

    async def run(self, counts: Counts, seconds: float) -> TaskSample:
        """Take one sample."""
        one = self._one
        queue = one.queues[ONE]
        worker, client = queue.workers[0].pid, one.client.pid
        cpu = cpu_seconds(client)
        submitted = await self.submitted(IDLE, counts.submitted)
        cpu_us = {"client": (cpu_seconds(client) - cpu) * 1e6 / counts.submitted}
        through = await self.through(ONE, counts.through)
        await self.filled(queue, counts.worked)
        used = cpu_seconds(worker), cpu_seconds(one.broker_pid)
        worked, done = await self.worked(queue)
        cpu_us["worker"] = (cpu_seconds(worker) - used[0]) * 1e6 / done
        cpu_us["broker"] = (cpu_seconds(one.broker_pid) - used[1]) * 1e6 / done
        await self.filled(one.queues[TWO], counts.worked_by_two)
        worked_by_two, _ = await self.worked(one.queues[TWO])
        starts = await self._started(int(seconds / _PACE_S))
        cancels = await self._cancelled() if one.row.peer == "bus" else []
        return TaskSample(
            submitted=submitted,
            through=through,
            worked=worked,
            worked_by_two=worked_by_two,
            start_p50_us=percentile(starts, 0.5) / 1000,
            start_p99_us=percentile(starts, 0.99) / 1000,
            cpu_us=cpu_us,
            resident=resident_bytes(worker),
            processors=processors(),
            cancels_ms=cancels,
        )

    async def submitted(self, queue: str, count: int) -> float:
        """Submit so many and return how many that is a second, by the client's clock."""
        asked = {"what": "submit", "queue": queue, "count": count}
        return count / float(await self._one.client.ask(asked, _LIMIT_S))

    async def through(self, queue: str, count: int) -> float:
        """Submit so many to workers that work, and return how many are done and acknowledged a second."""
        began = time.perf_counter()
        await self.submitted(queue, count)
        return count / (await self._one.queues[queue].down_to(0, _LIMIT_S) - began)

    async def filled(self, queue: Queue, count: int) -> None:
        """Fill a queue while its workers wait."""
        queue.tell("close")
        await self.settled()
        await self.submitted(queue.name, count)
        await self.settled()

    async def settled(self) -> None:
        """Wait until gates have heard what they were told."""
        await asyncio.sleep(_SETTLE_S)

    async def worked(self, queue: Queue, leave: int = 0) -> tuple[float, int]:
        """Let the workers work until at most ``leave`` tasks are left; return the rate and how many.

        What they had taken before they were told to wait counts as waiting until then.
        """
        waiting, began = await queue.waiting(), time.perf_counter()
        queue.tell("open")
        ended = await queue.down_to(leave, _LIMIT_S)
        done = waiting - leave
        return done / (ended - began), done

    async def _started(self, count: int) -> list[int]:
        """Submit tasks one by one and return after how many nanoseconds their handlers began, ascending."""
        asked = {"what": "paced", "queue": ONE, "count": count, "every_s": _PACE_S}
        await self._one.client.ask(asked, _LIMIT_S)
        return sorted(await self._starts.next(count, _LIMIT_S))

    async def _cancelled(self) -> list[float]:
        asked = {"what": "cancel", "queue": ONE, "count": _CANCELS}
        return [seconds * 1000 for seconds in await self._one.client.ask(asked, _LIMIT_S)]
