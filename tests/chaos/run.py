"""One run: tasks are submitted and done while everything is killed, and then both sides are compared."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.effects import EffectsReader, json_lines
from tests.chaos.faults import Chaos, Schedule, lines_with
from tests.chaos.history import auditor
from tests.chaos.plan import KINDS
from tests.chaos.reconcile import Accepted, Event, Finding, reconcile
from tests.chaos.site import Site, site

_log = logging.getLogger(__name__)

_MOST_PER_SECOND = 100.0
_WITHOUT_FAULTS = 0.85
"""So much of the schedule's time is spent on submitting: the last faults hit what is left."""

_FAULTS = 0.6
"""So much of all the time that there is may be used for faults; then what was begun has to come to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to run. Within ``duration_s`` seconds all must have ended, or what has not is reported."""

    tasks: int
    duration_s: float
    schedule: Schedule
    ack_wait_s: int = 5
    seed: int = 1
    broken: str = ""
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    findings: list[Finding]
    counts: dict[str, int]
    seconds: float

    def table(self) -> str:
        rows = [
            *((name, f"{count:,}") for name, count in self.counts.items()),
            ("seconds", f"{self.seconds:.0f}"),
            ("tasks per second, faults included", f"{self.counts['accepted'] / self.seconds:.0f}"),
            ("findings", str(len(self.findings))),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value:>8}" for name, value in rows)


async def run(wanted: Wanted, folder: Path) -> Report:
    """Run it in ``folder``, which is empty; everybody's logs stay there."""
    spread_s = max(
        wanted.tasks / _MOST_PER_SECOND, _WITHOUT_FAULTS * wanted.schedule.seconds(wanted.ack_wait_s)
    )
    async with site(
        folder,
        tasks=wanted.tasks,
        spread_s=min(spread_s, wanted.duration_s / 2),
        ack_wait_s=wanted.ack_wait_s,
        broken=wanted.broken,
        kinds=wanted.kinds,
    ) as place:
        chaos = Chaos(place, wanted.schedule, wanted.seed)
        began = time.monotonic()
        await _live(place, chaos, wanted.duration_s)
        seconds = time.monotonic() - began
        return await _compared(place, chaos, seconds)


async def _live(place: Site, chaos: Chaos, duration_s: float) -> None:
    # The control role last: nobody has a queue yet, and everybody has to wait for it.
    await asyncio.gather(*(worker.start(ready=True) for worker in place.workers))
    await place.submitter.start()
    await place.watcher.start()
    await place.control.start()
    ever = [asyncio.ensure_future(chaos.supervise(child)) for child in (*place.workers, place.control)]
    ending = [
        asyncio.ensure_future(chaos.supervise(place.submitter, until_done=True)),
        asyncio.ensure_future(chaos.supervise(place.watcher, until_done=True)),
        asyncio.ensure_future(chaos.run(_FAULTS * duration_s)),
    ]
    try:
        over = await _within(duration_s, asyncio.gather(*ending))
        if not over:
            chaos.findings.append(f"not over within {duration_s:g} s")
        await place.nats.start()
        await _emptied(place, 4.0 * place.settings.ack_wait_s)
    finally:
        for task in (*ever, *ending):
            task.cancel()
        await asyncio.gather(*ever, *ending, return_exceptions=True)


async def _within(seconds: float, work: Awaitable[object]) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True


async def _emptied(place: Site, seconds: float) -> None:
    """Wait until the queue has forgotten every task: a lost acknowledgement costs one more delivery."""
    until = time.monotonic() + seconds
    async with auditor(place.settings, place.authority) as reader:
        while await reader.queued() and time.monotonic() < until:  # noqa: ASYNC110 - the broker's, it tells nobody
            await asyncio.sleep(0.2)


async def _compared(place: Site, chaos: Chaos, seconds: float) -> Report:
    settings = place.settings
    async with auditor(settings, place.authority) as reader:
        history = await reader.history()
    for worker in place.workers:
        await worker.kill()
    made = reconcile(
        settings.tasks,
        (Accepted(*values) for _, values in json_lines(settings.accepted)),
        (Event(*values) for _, values in json_lines(settings.events)),
        EffectsReader(settings.effects).more(),
        history,
    )
    counts = {
        "tasks": settings.tasks,
        **made.counts,
        "late outcomes dropped": lines_with(place, "came too late and is dropped"),
        "attempts that saw in time that they were late": lines_with(
            place, "an attempt ends without an outcome"
        ),
        **dict(sorted(chaos.counts.items())),
    }
    return Report([*(Finding("?", what) for what in chaos.findings), *made.findings], counts, seconds)
