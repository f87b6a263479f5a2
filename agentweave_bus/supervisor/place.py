"""The place of one worker: whoever works there, somebody does.

A place starts a process, looks after it, and starts another one when it ends, hangs, is due for recycling, or
when somebody asks for it. A fresh process is ready before the old one is told to end, so that nobody finds
the place empty; only one that ended by itself or hangs leaves a gap.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from agentweave_bus.exceptions import WorkerError
from agentweave_bus.supervisor.rules import (
    Next,
    after_exit,
    due_for_recycling,
    hangs,
    is_deaf,
    share_of,
)
from agentweave_bus.supervisor.worker_plan import METRICS_PORT, WorkerPlan
from agentweave_bus.supervisor.worker_process import WorkerExit, WorkerProcess

__all__ = ["Place", "PlaceState", "Wish"]

_log = logging.getLogger(__name__)

_KILLED: Final = -9
_LATE_S: Final = 5.0
_AFTER_DRAINING_S: Final = 12.0
"""How long a worker has, after what it was doing, for its own stop hook and for disconnecting."""


class Wish:
    """That a fresh worker takes over somewhere: ``done`` says that it was tried, ``failed`` why in vain."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.failed = ""


class PlaceState(StrEnum):
    """What goes on at a place."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    """It ended, and is started again after a pause."""
    DRAINED = "drained"
    """Its worker was told to end, and it stays so until somebody asks for one."""
    ENDED = "ended"
    """Its worker ended, and is not to be started again."""
    GIVEN_UP = "given up"


_EMPTY: Final = frozenset({PlaceState.DRAINED, PlaceState.ENDED, PlaceState.GIVEN_UP})


class Place:
    """One worker's place.

    ``on_event`` gets what happens, for people; ``on_change`` is called with it, ``on_beat`` when its worker
    has said how it is, ``on_counted(agent, process id, page)`` with the last page of its metrics.
    ``is_alone`` says whether no other process of its agent lives, ``may_recycle`` whether no other worker of
    its agent is being replaced.
    """

    def __init__(
        self,
        name: str,
        plan: WorkerPlan,
        *,
        on_line: Callable[[str, str], None],
        on_event: Callable[[str], None],
        on_change: Callable[[], None],
        on_beat: Callable[[], None],
        on_counted: Callable[[str, int, str], None],
        is_alone: Callable[[Place], bool],
        may_recycle: Callable[[Place], bool],
        strict: bool,
    ) -> None:
        self.name = name
        self.plan = plan
        self.state = PlaceState.STARTING
        self.why = ""
        """Why it is in its state, where that needs saying."""
        self.restarts = 0
        self.process: WorkerProcess | None = None
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it was ready for the first time; fails with WorkerError when it never will be."""
        self._strict = strict
        self._on_line = on_line
        self._on_event = on_event
        self._on_change = on_change
        self._on_beat = on_beat
        self._on_counted = on_counted
        self._is_alone = is_alone
        self._may_recycle = may_recycle
        self._exits = 0
        """How often it ended since one has run for long enough."""
        self._over = False
        self._news = asyncio.Event()
        self._asked: list[Wish] = []
        self._not_before = 0.0
        self._killed_for = ""
        self._down = False
        self._scope = anyio.CancelScope()
        self._leaving: set[WorkerProcess] = set()
        self._fresh: WorkerProcess | None = None
        """Who is about to take over."""

    async def run(self, group: TaskGroup) -> None:
        """Keep the place filled until :meth:`leave` or cancellation; what runs is ended in order then.

        Old processes that end while fresh ones work do so in ``group``.
        """
        try:
            with self._scope:
                while True:
                    await self._until_wanted()
                    try:
                        ended = await self._fill(group)
                    except Exception as error:  # noqa: BLE001 - one place must not empty the others
                        _log.exception("the place of %s is given up", self.name)
                        await self._give_up(f"something unforeseen: {type(error).__name__}")
                    else:
                        await self._after(ended)
        finally:
            self._over = True
            with anyio.CancelScope(shield=True):
                if self.process is not None:
                    await self._end(self.process)
            self._set(PlaceState.ENDED)
            _tell(self._take_asked())
            if not self.first.done():
                self.first.set_exception(WorkerError(f"{self.name} was told to end", name=self.name))

    @property
    def living(self) -> bool:
        """Whether any process of this place lives: that which works here, one to come, one that leaves."""
        return any(one.running for one in (self.process, *self._leaving) if one is not None)

    @property
    def leaving(self) -> tuple[WorkerProcess, ...]:
        """Those that are ending while others work here, and who is about to take over."""
        return tuple(one for one in self._leaving if one.started)

    @property
    def replacing(self) -> bool:
        """Whether a fresh worker is about to take over."""
        return self._fresh is not None

    @property
    def drained(self) -> bool:
        """Whether it was told to have no worker until somebody asks for one."""
        return self._down

    @property
    def empty(self) -> bool:
        """Whether nobody works here, nor will without being asked."""
        return self.state in _EMPTY

    def leave(self) -> None:
        """Have the place given up for good, its worker ended in order."""
        self._scope.cancel()

    def kill(self) -> None:
        """End whoever is here at once."""
        for process in (self.process, *self._leaving):
            if process is not None:
                process.kill()

    def drain(self) -> None:
        """Have its worker end in order, and start none until :meth:`replace`."""
        self._down = True
        self._news.set()
        _tell(self._take_asked(), "it was told to end")
        starting = self.process if self.state is PlaceState.STARTING else self._fresh
        if starting is not None:  # whoever looks after it waits until it is ready
            starting.terminate()

    def replace(self, plan: WorkerPlan | None = None) -> Wish:
        """Have a fresh worker take over, by a new plan if there is one.

        When it does not become ready the old one goes on, if there is one.
        """
        wish = Wish()
        self._asked.append(wish)
        if self._over:
            _tell(self._take_asked(), "it was told to end")
            return wish
        self.plan = plan or self.plan
        self._down = False
        self._news.set()
        return wish

    def status(self) -> dict[str, Any]:
        """Return how things stand here, as plain values; times are seconds."""
        process, now = self.process, asyncio.get_running_loop().time()
        living = process is not None and process.running
        beat = process.beat if process is not None and living else None
        return {
            "name": self.name,
            "agent": self.plan.name,
            "state": str(self.state),
            "why": self.why,
            "pid": process.pid if process is not None and living else None,
            "restarts": self.restarts,
            "up_s": round(now - process.started_at, 1) if process is not None and living else None,
            "metrics": process.metrics_url if process is not None and living else None,
            "beat": None if beat is None else beat._asdict(),
        }

    # --- one worker after the other ----------------------------------------------------------------------

    async def _until_wanted(self) -> None:
        if self._down and self.state not in _EMPTY:  # it was about to be started again
            self._set(PlaceState.DRAINED)
        while self._down or self.state in _EMPTY:
            if self._asked and not self._down:
                self._exits = 0
                return
            self._news.clear()
            await self._news.wait()

    async def _fill(self, group: TaskGroup) -> WorkerExit:
        """Start a worker and look after it and those that replace it; return how the last one ended."""
        self._set(PlaceState.STARTING)
        plan, asked = self.plan, self._take_asked()
        process = self.process = self._make()
        failed = "it was told to end"
        try:
            await process.start(plan.ready_s)
            failed = ""
        except WorkerError as error:
            failed = str(error)
            await process.end(0)
            if self._strict and not self.first.done():
                self.first.set_exception(error)
                self._down = True
            self._on_event(str(error))
            return WorkerExit(self.name, _KILLED if error.exit_code is None else error.exit_code, ())
        finally:
            _tell(asked, failed)
        self._set(PlaceState.READY)
        if not self.first.done():
            self.first.set_result(None)
        return await self._look_after(group)

    async def _look_after(self, group: TaskGroup) -> WorkerExit:
        while True:
            process = self.process
            assert process is not None  # one is ready
            gone = asyncio.ensure_future(process.wait())
            try:
                ended = await self._until_it_ends(process, gone, group)
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
            if ended is not None:
                await process.end(0)  # it has: its pipes are closed
                if asyncio.get_running_loop().time() - process.started_at >= self.plan.restart.within_s:
                    self._exits = 0
                return ended

    async def _until_it_ends(
        self, process: WorkerProcess, gone: asyncio.Future[WorkerExit], group: TaskGroup
    ) -> WorkerExit | None:
        """Return how a worker ended, by itself or told to; ``None`` when another has taken its place."""
        rule, loop = self.plan.health, asyncio.get_running_loop()
        while True:
            waits_since = loop.time()
            await _either(gone, self._news, rule.beat_s)
            self._news.clear()
            if loop.time() - waits_since > rule.beat_s + _LATE_S:
                process.heard_at = loop.time()  # this process was held up: who knows who else was
            if gone.done():
                return gone.result()
            if self._down:
                self._on_event(f"{self.name} is told to end")
                await self._end(process)
                return await gone
            if why := hangs(rule, loop.time() - process.heard_at):
                self._on_event(f"{self.name} is killed: {why}")
                self._killed_for = why
                process.kill()
                return await gone
            if await self._is_replaced(process, group):
                return None

    async def _is_replaced(self, old: WorkerProcess, group: TaskGroup) -> bool:
        """Have a fresh worker take over if there is a reason and it becomes ready."""
        now = asyncio.get_running_loop().time()
        if self._asked:
            why = "that was asked for"
        elif now < self._not_before or not (why := self._due(old, now)):
            return False
        self._on_event(f"{self.name} is replaced by a fresh worker: {why}")
        asked, fresh = self._take_asked(), self._make(fresh=True)
        self._leaving.add(fresh)  # until it has taken over
        self._fresh = fresh
        try:
            await fresh.start(self.plan.ready_s)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await fresh.end(0)
            _tell(asked, "it was told to end" if self._down else str(error) or "it was told to end")
            if not isinstance(error, WorkerError):
                raise
            if self._down:
                return False
            self._on_event(f"{self.name} goes on as it is, its replacement failed: {error}")
            self._not_before = now + self.plan.restart.longest_s
            return False
        finally:
            self._leaving.discard(fresh)
            self._fresh = None
        self.process = fresh
        self._not_before = asyncio.get_running_loop().time() + self.plan.restart.longest_s
        self.restarts += 1
        self._set(PlaceState.READY)
        self._leaving.add(old)
        group.start_soon(self._end_old, old, asked)
        return True

    def _due(self, old: WorkerProcess, now: float) -> str:
        """Say why a worker is to be replaced now without anybody asking for it."""
        if why := is_deaf(self.plan.health, old.beat):
            return why
        age_s = now - old.started_at
        why = due_for_recycling(self.plan.recycle, old.beat, age_s, early=share_of(self.name))
        return why if why is not None and self._may_recycle(self) else ""

    async def _end_old(self, old: WorkerProcess, asked: list[Wish]) -> None:
        try:
            await self._end(old)
        finally:
            self._leaving.discard(old)
            _tell(asked)
            self._on_change()

    async def _end(self, process: WorkerProcess) -> None:
        with anyio.CancelScope(shield=True):
            await process.end(process.drain_s + _AFTER_DRAINING_S)

    async def _after(self, ended: WorkerExit) -> None:
        """Do what the rules say about a worker that has ended."""
        killed_for, self._killed_for = self._killed_for, ""
        said = f"{self.name} was killed: {killed_for}" if killed_for else str(ended)
        if self._down:
            self._set(PlaceState.DRAINED)
            return
        self._exits += 1
        verdict = after_exit(self.plan.restart, self._exits, ended.code, chance=random.random())  # noqa: S311
        if verdict.next is not Next.RESTART:
            self._on_event(f"{said}; it is not started again: {verdict.why}")
            state = PlaceState.GIVEN_UP if verdict.next is Next.GIVE_UP else PlaceState.ENDED
            self._empty(state, f"{said}: {verdict.why}")
            return
        self._on_event(f"{said}; it is started again in {verdict.after_s:.1f} s")
        self._set(PlaceState.WAITING, said)
        self.restarts += 1
        self._news.clear()
        with anyio.move_on_after(verdict.after_s):
            while not self._is_asked():  # whoever asks for it now does not wait
                await self._news.wait()
                self._news.clear()

    async def _give_up(self, why: str) -> None:
        if self.process is not None:
            await self.process.end(0)
        self._on_event(f"{self.name} is given up: {why}")
        self._empty(PlaceState.GIVEN_UP, why)

    def _empty(self, state: PlaceState, why: str) -> None:
        self._set(state, why)
        if not self.first.done():
            self.first.set_exception(WorkerError(why, name=self.name))

    def _make(self, *, fresh: bool = False) -> WorkerProcess:
        # Two processes can't listen on the port that the agent's file names.
        more = {} if not fresh and self._is_alone(self) else {METRICS_PORT: "0"}
        spec = replace(
            self.plan.spec,
            name=self.name,
            environment={**self.plan.spec.environment, **more},
            beat_s=self.plan.health.beat_s,
        )
        made = WorkerProcess(spec, self._on_line, self._heard, partial(self._on_counted, self.plan.name))
        made.drain_s = self.plan.drain_s  # as promised to this one, whatever later plans say
        return made

    def _heard(self) -> None:
        self._news.set()
        self._on_beat()

    def _is_asked(self) -> bool:
        return self._down or bool(self._asked)

    def _take_asked(self) -> list[Wish]:
        asked, self._asked = self._asked, []
        return asked

    def _set(self, state: PlaceState, why: str = "") -> None:
        self.state, self.why = state, why
        self._on_change()


async def _either(gone: asyncio.Future[Any], news: asyncio.Event, timeout_s: float) -> None:
    heard = asyncio.ensure_future(news.wait())
    try:
        await asyncio.wait({gone, heard}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        heard.cancel()


def _tell(asked: list[Wish], failed: str = "") -> None:
    for one in asked:
        one.failed = failed
        one.done.set()
