"""The load: a closed loop of tasks, each of which makes its next call when the last one is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.gauges import cpu_seconds, resident_bytes
from benchmarks.peers import Call, WrongAnswerError

__all__ = ["Load", "Sample", "closed_loop", "percentile"]

_AFTER_FAILURE_S: Final = 0.01  # one that fails at once must not keep the loop to itself


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked: ``tasks`` at a time, ``warm_s`` seconds before and ``seconds`` while measuring."""

    tasks: int
    warm_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement found.

    Latencies are microseconds, as the client sees them. ``cpu_us`` is processor time per call in
    microseconds, ``resident`` memory in bytes, each by process.
    """

    calls: int
    seconds: float
    p50_us: float
    p99_us: float
    cpu_us: Mapping[str, float]
    resident: Mapping[str, int]
    failed: int = 0
    """Calls that failed, refused or timed out; they are in no other figure."""
    failure: str = ""
    """What the first of them said."""

    @property
    def per_second(self) -> float:
        """Calls answered in a second."""
        return self.calls / self.seconds


def percentile(ordered: Sequence[int], share: float) -> int:
    """Return the value below which ``share`` of ``ordered`` (ascending) lies, by nearest rank."""
    if not ordered:
        raise ValueError("there are no values")
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered)) - 1))]


async def closed_loop(call: Call, load: Load, processes: Mapping[str, int]) -> Sample:
    """Run ``load``; count what is answered between the end of the warm-up and the end of the time.

    The tasks run on through both ends, so that what is counted is the steady state; calls in flight at
    the end are awaited and not counted. ``processes`` are the ids of those whose use is read. A call that
    fails is counted as such, and its task goes on.

    Raises:
        WrongAnswerError: (in a group) a call came back with something else than was sent.
        RuntimeError: no call was answered in the time.

    """
    latencies: list[int] = []
    failures = _Failures()
    over = False
    clock = time.perf_counter_ns

    async def caller() -> None:
        while not over:
            began = clock()
            try:
                await call()
            except WrongAnswerError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the table says it
                failures.note(error)
                await asyncio.sleep(_AFTER_FAILURE_S)
            else:
                latencies.append(clock() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.tasks):
            group.create_task(caller())
        await asyncio.sleep(load.warm_s)
        latencies.clear()
        failures.clear()
        began, used = clock(), _cpu(processes)
        await asyncio.sleep(load.seconds)
        counted, failed, took = len(latencies), failures.count, (clock() - began) / 1e9
        ended = _cpu(processes)
        over = True
    if not counted:
        raise RuntimeError(f"no call was answered; {failures.count} failed: {failures.first or 'too slow'}")
    ordered = sorted(latencies[:counted])
    return Sample(
        calls=counted,
        seconds=took,
        p50_us=percentile(ordered, 0.5) / 1000,
        p99_us=percentile(ordered, 0.99) / 1000,
        cpu_us={name: (ended[name] - used[name]) * 1e6 / counted for name in processes},
        resident={name: resident_bytes(pid) for name, pid in processes.items()},
        failed=failed,
        failure=failures.first if failed else "",
    )


@dataclass(slots=True)
class _Failures:
    """How many calls failed, and why the first one did."""

    count: int = 0
    first: str = ""

    def note(self, error: Exception) -> None:
        self.count += 1
        self.first = self.first or f"{type(error).__name__}: {error}"

    def clear(self) -> None:
        self.count, self.first = 0, ""


def _cpu(processes: Mapping[str, int]) -> dict[str, float]:
    return {name: cpu_seconds(pid) for name, pid in processes.items()}
