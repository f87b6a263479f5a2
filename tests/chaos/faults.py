"""What is done to the site while it works: a schedule of faults, and the supervisors that undo them.

A supervisor starts each process again when it has ended, as an orchestrator would. The killer looks at the
effects file to find a worker that is inside a handler, and counts a kill as a hit if a handler had begun there,
and not ended, when the process was gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, fields

from tests.chaos.effects import EffectsReader
from tests.chaos.site import Child, Site

_log = logging.getLogger(__name__)

_AWAY_S = 10.0
_RESTART_S = 0.2
_TRIES = 3
_UNREACHABLE = 4
"""The exit code of a worker that found no broker or no identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How often each fault comes."""

    kills: int = 0
    overlaps: int = 0
    partitions: int = 0
    broker_kills: int = 0
    broker_freezes: int = 0
    broker_absences: int = 0
    control_kills: int = 0
    submitter_kills: int = 0
    watcher_kills: int = 0
    endings: int = 0
    rotations: int = 0

    def names(self) -> list[str]:
        return [field.name for field in fields(self) for _ in range(getattr(self, field.name))]

    def seconds(self, ack_wait_s: int) -> float:
        """Return about how long all of it takes, one after the other."""
        away = self.broker_freezes + self.broker_absences
        return (
            1.6 * len(self.names())
            + away * (_AWAY_S + 2)
            + (self.overlaps + self.partitions) * (ack_wait_s + 2)
        )


FULL = Schedule(
    kills=26,
    overlaps=3,
    partitions=2,
    broker_kills=2,
    broker_freezes=1,
    broker_absences=1,
    control_kills=3,
    submitter_kills=3,
    watcher_kills=3,
    endings=2,
    rotations=2,
)
SMALL = Schedule(
    kills=6,
    overlaps=1,
    partitions=1,
    broker_kills=1,
    control_kills=1,
    submitter_kills=1,
    watcher_kills=1,
    endings=1,
    rotations=1,
)
OVERLAP = Schedule(overlaps=2)
CRASHES = Schedule(kills=4)
AWAY = Schedule(kills=2, broker_freezes=1, broker_absences=1)


class Handlers:
    """Which handlers are running in which process, by the effects file."""

    def __init__(self, site: Site) -> None:
        self._reader = EffectsReader(site.settings.effects)
        self._open: defaultdict[int, dict[tuple[str, int], int]] = defaultdict(dict)
        self.begun: Counter[str] = Counter()
        self.ended: set[tuple[int, str]] = set()

    def look(self) -> None:
        for effect in self._reader.more():
            run = (effect.task, effect.attempt)
            if effect.what == "begin":
                self._open[effect.pid][run] = effect.line
                self.begun[effect.task] += 1
            elif effect.what in {"end", "raise"}:
                self._open[effect.pid].pop(run, None)
                self.ended.add((effect.pid, effect.task))

    def of(self, child: Child) -> list[str]:
        """Return the tasks whose handlers run in a process, the one begun last at the end."""
        self.look()
        runs = self._open[child.pid]
        return [task for task, _ in sorted(runs, key=runs.__getitem__)]


class Chaos:
    """Does the faults of a schedule. ``counts`` says how often each was done."""

    def __init__(self, site: Site, schedule: Schedule, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.handlers = Handlers(site)
        self._site = site
        self._random = random.Random(seed)
        self._names = schedule.names()
        self._random.shuffle(self._names)
        self._spread_s = schedule.seconds(site.settings.ack_wait_s)
        self._does: dict[str, Callable[[], Awaitable[None]]] = {
            "kills": self._kill_worker,
            "overlaps": self._overlap,
            "partitions": self._part,
            "broker_kills": self._kill_broker,
            "broker_freezes": self._freeze_broker,
            "broker_absences": self._take_broker_away,
            "control_kills": lambda: self._kill("control"),
            "submitter_kills": lambda: self._kill("submitter"),
            "watcher_kills": lambda: self._kill("watcher"),
            "endings": self._end_worker,
            "rotations": self._rotate,
        }

    async def run(self, seconds: float) -> None:
        """Do all of it, one fault after the other, with pauses between; begin none after so many seconds."""
        until = time.monotonic() + seconds
        for number, name in enumerate(self._names):
            if time.monotonic() > until:
                self.counts["faults left out, for want of time"] = len(self._names) - number
                return
            await asyncio.sleep(self._random.uniform(0.2, 1.0))
            _log.info("now: %s", name.replace("_", " "))
            await self._does[name]()

    async def supervise(self, child: Child, *, until_done: bool = False) -> None:
        """Keep a process running; with ``until_done`` until it ends by itself, and well."""
        while True:
            code = await child.wait()
            if until_done and code == 0:
                return
            if not child.expected:
                self.counts[f"{child.name} ended by itself"] += 1
                if code != _UNREACHABLE:
                    self.findings.append(f"{child.name} ended by itself with {code}; see its log")
            await asyncio.sleep(_RESTART_S)
            self.counts["restarts"] += 1
            await child.start()

    # --- the faults --------------------------------------------------------------------------------------

    async def _kill_worker(self) -> None:
        for _ in range(_TRIES):  # a handler may end between the look and the kill
            if await self._slay(await self._busy()):
                return

    async def _slay(self, victim: Child) -> bool:
        await victim.kill()
        hit = self.handlers.of(victim)
        self.counts["worker kills"] += 1
        self.counts["worker kills that hit running handlers"] += bool(hit)
        self.counts["handlers hit"] += len(hit)
        return bool(hit)

    async def _end_worker(self) -> None:
        """Tell a worker to end, as a deployment does: it has some seconds for what it is doing."""
        leaver = await self._busy()
        leaver.expected = True
        leaver.signal(signal.SIGTERM)
        starts = leaver.starts
        await self._until(lambda: leaver.starts > starts, 30.0)
        self.counts["workers told to end"] += 1

    async def _rotate(self) -> None:
        """Give everybody a new certificate, and so a new connection."""
        self._site.api.rotate()
        self.counts["rotations of all certificates"] += 1

    async def _overlap(self) -> None:
        """Stop a worker until somebody else has begun what it was doing, and let it go on then."""
        await self._busy()
        late = max(self._workers(), key=lambda one: len(self.handlers.of(one)), default=self._site.workers[0])
        late.signal(signal.SIGSTOP)
        try:
            if await self._begun_elsewhere(late):
                self.counts["workers stopped until others had their tasks"] += 1
        finally:
            late.signal(signal.SIGCONT)
        await self._slay_successor(late)

    async def _part(self) -> None:
        """Cut the worker behind the proxy off until others do what it does; it goes on doing it, too."""
        late = self._site.parted
        await self._until(lambda: bool(self.handlers.of(late)), 10.0)
        self._site.proxy.hold()
        try:
            if await self._begun_elsewhere(late):
                self.counts["workers cut off until others had their tasks"] += 1
        finally:
            self._site.proxy.let_go()
        await self._slay_successor(late)

    async def _begun_elsewhere(self, late: Child) -> bool:
        begun = {task: self.handlers.begun[task] for task in self.handlers.of(late)}

        def again() -> bool:
            self.handlers.look()
            return any(self.handlers.begun[task] > count for task, count in begun.items())

        return await self._until(again, 3.0 * self._site.settings.ack_wait_s)

    async def _slay_successor(self, late: Child) -> None:
        """Kill somebody who is doing what the late one has just ended: it must not be lost with the two."""

        def successors() -> list[Child]:
            return [
                one
                for one in self._workers()
                if one is not late
                and any((late.pid, task) in self.handlers.ended for task in self.handlers.of(one))
            ]

        if late.code is None and await self._until(lambda: bool(successors()), 2.0):
            await asyncio.sleep(0.15)  # what the late one has to say of it reaches the broker
            if found := successors():
                self.counts["workers killed that had a late one's task"] += 1
                await self._slay(found[0])

    async def _kill_broker(self) -> None:
        await self._site.nats.kill()
        await self._site.nats.start()
        self.counts["broker kills"] += 1

    async def _freeze_broker(self) -> None:
        assert self._site.nats.pid is not None
        os.kill(self._site.nats.pid, signal.SIGSTOP)
        await asyncio.sleep(_AWAY_S)
        os.kill(self._site.nats.pid, signal.SIGCONT)
        self.counts["broker silent for 10 s"] += 1

    async def _take_broker_away(self) -> None:
        await self._site.nats.kill()
        await asyncio.sleep(_AWAY_S)
        await self._site.nats.start()
        self.counts["broker away for 10 s"] += 1

    async def _kill(self, name: str) -> None:
        child: Child = getattr(self._site, name)
        if child.code is None:
            await child.kill()
            self.counts[f"{name} kills"] += 1

    # --- finding a victim --------------------------------------------------------------------------------

    def _workers(self) -> list[Child]:
        return [one for one in self._site.workers if one.code is None]

    async def _busy(self) -> Child:
        """Return a worker that is inside a handler; any that runs, if none is for a long while."""
        await self._until(lambda: any(map(self.handlers.of, self._workers())), 20.0)
        busy = [one for one in self._workers() if self.handlers.of(one)]
        return self._random.choice(busy or self._workers() or self._site.workers)

    async def _until(self, check: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not check():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.005)
        return True


def lines_with(site: Site, words: str) -> int:
    """Count the lines of the workers' logs in which ``words`` stand."""
    return sum(words in line for path in _logs(site) for line in path.open(errors="replace"))


def _logs(site: Site) -> Iterator:
    return (path for worker in site.workers if (path := worker.log).exists())
