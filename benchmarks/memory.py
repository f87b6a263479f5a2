"""Whether a worker's resident memory stays where it is over many calls."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import Load
from benchmarks.report import table
from benchmarks.rows import Row
from benchmarks.targets import MEMORY_MB
from benchmarks.world import World

__all__ = ["Growth", "MemorySample", "growth_of", "memory_report", "sample_memory"]

_TASKS: Final = 64
_WARM_S: Final = 3.0
_FLAT_MB: Final = 1.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident memory in MB (of 10^6 bytes) of worker and client after so many ``calls``."""

    calls: int
    worker_mb: float
    client_mb: float


@dataclass(frozen=True, slots=True)
class Growth:
    """The worker's memory in the first and the last tenth of the time, and its slope over the second half."""

    first_mb: float
    last_mb: float
    mb_in_100k: float

    @property
    def flat(self) -> bool:
        """Whether it would grow by less than 1 MB in the next 100,000 calls."""
        return abs(self.mb_in_100k) < _FLAT_MB


async def sample_memory(row: Row, calls: int, every_s: float, limit_s: float) -> list[MemorySample]:
    """Make ``calls`` calls, 64 in flight, and look at the memory every ``every_s`` seconds.

    It ends after ``limit_s`` seconds, however few calls that were.
    """
    samples: list[MemorySample] = []
    give_up = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with World(Path(folder), [row]).contenders() as (contender,):
            done, warm_s = 0, _WARM_S
            while done < calls and time.monotonic() < give_up:
                found = await contender.client.run(Load(_TASKS, warm_s, every_s), contender.processes)
                done, warm_s = done + found.calls, 0.0
                samples.append(
                    MemorySample(done, found.resident["worker"] / 1e6, found.resident["client"] / 1e6)
                )
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{done:,} calls, worker {samples[-1].worker_mb:.1f} MB ")
    return samples


def growth_of(samples: Sequence[MemorySample]) -> Growth:
    """Work out whether memory grew. The second half alone counts for the slope: caches fill before."""
    tenth = max(1, len(samples) // 10)
    half = samples[len(samples) // 2 :]
    slope = 0.0
    if len(half) > 1:
        slope = statistics.linear_regression(
            [one.calls for one in half], [one.worker_mb for one in half]
        ).slope
    return Growth(
        statistics.median(one.worker_mb for one in samples[:tenth]),
        statistics.median(one.worker_mb for one in samples[-tenth:]),
        slope * 100_000,
    )


def memory_report(samples: Sequence[MemorySample], wanted: int = 0, what: str = "calls") -> str:
    """Return about ten of the samples and what they show; ``wanted`` is how many of ``what`` were wanted."""
    step = max(1, len(samples) // 10)
    chosen = [*samples[:-1:step], samples[-1]]
    lines = [[f"{one.calls:,}", f"{one.worker_mb:.1f}", f"{one.client_mb:.1f}"] for one in chosen]
    growth = growth_of(samples)
    verdict = "flat" if growth.flat else "NOT flat"
    bound = "under" if growth.last_mb < MEMORY_MB else "NOT under"
    made = samples[-1].calls
    short = f" The run's time was up after {made:,} of {wanted:,} {what}." if made < wanted else ""
    return (
        table([what, "worker MB", "client MB"], lines)
        + f"\n\nThe worker's memory is {verdict}: {growth.first_mb:.1f} MB in the first tenth of the time,"
        f" {growth.last_mb:.1f} MB in the last, {growth.mb_in_100k:+.2f} MB in 100,000 {what} over the second"
        f" half (flat: less than {_FLAT_MB:g} MB). It is {bound} {MEMORY_MB:g} MB.{short}"
    )
