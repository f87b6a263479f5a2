"""The place of one worker: whoever works there, somebody does.

A place starts a process, looks after it, and starts another one when it ends, hangs, is due for recycling, or
when somebody asks for it. A fresh process is ready before the old one is told to end, so that nobody finds
the place empty; only one that ended by itself or hangs leaves a gap.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from agentweave_bus.exceptions import WorkerError
from agentweave_bus.supervisor.rules import (
    HealthRule,
    Next,
    RecycleRule,
    RestartRule,
    after_exit,
    due_for_recycling,
    hangs,
    is_deaf,
    within,
)
from agentweave_bus.supervisor.worker_process import READY_SECONDS, WorkerExit, WorkerProcess, WorkerSpec

__all__ = ["METRICS_PORT", "Place", "PlaceState", "WorkerPlan"]

METRICS_PORT: Final = "AGENTWEAVE_OBSERVABILITY__METRICS__PORT"
"""Environment variable: the port of a worker's own listener."""

_KILLED: Final = -9
_AFTER_DRAINING_S: Final = 12.0
"""How long a worker has, after what it was doing, for its own stop hook and for disconnecting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What is to run: ``replicas`` processes of ``spec``, whose name is the agent's.

    A worker that is told to end has ``drain_s`` seconds for what it is doing, and ``ready_s`` seconds to
    become ready.
    """

    spec: WorkerSpec
    replicas: int = 1
    restart: RestartRule = field(default_factory=RestartRule)
    health: HealthRule = field(default_factory=HealthRule)
    recycle: RecycleRule = field(default_factory=RecycleRule)
    drain_s: float = 30.0
    ready_s: float = READY_SECONDS

    @property
    def name(self) -> str:
        """The agent's name."""
        return self.spec.name

    def name_of(self, number: int) -> str:
        """Return the name of one of its places, counted from 1."""
        return self.name if self.replicas == 1 else f"{self.name}/{number}"


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
    """One worker's place. ``on_event`` gets what happens, for people; ``on_change`` is called with it."""

    def __init__(
        self,
        name: str,
        plan: WorkerPlan,
        *,
        on_line: Callable[[str, str], None],
        on_event: Callable[[str], None],
        on_change: Callable[[], None],
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
        self._exits: list[float] = []
        self._news = asyncio.Event()
        self._asked: list[anyio.Event] = []
        self._not_before = 0.0
        self._down = False
        self._scope = anyio.CancelScope()
        self._leaving: set[WorkerProcess] = set()

    async def run(self, group: TaskGroup) -> None:
        """Keep the place filled until :meth:`leave` or cancellation; what runs is ended in order then.

        Old processes that end while fresh ones work do so in ``group``.
        """
        try:
            with self._scope:
                while True:
                    await self._until_wanted()
                    await self._after(await self._fill(group))
        finally:
            with anyio.CancelScope(shield=True):
                if self.process is not None:
                    await self._end(self.process)
            self._set(PlaceState.ENDED)
            _tell(self._take_asked())
            if not self.first.done():
                self.first.set_exception(WorkerError(f"{self.name} was told to end", name=self.name))

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
        if self.state is PlaceState.STARTING and self.process is not None:
            self.process.terminate()

    def replace(self, plan: WorkerPlan | None = None) -> anyio.Event:
        """Have a fresh worker take over, by a new plan if there is one; the event says when it is done.

        It is set, too, when the fresh one did not become ready, and the old one goes on.
        """
        done = anyio.Event()
        self._asked.append(done)
        self.plan = plan or self.plan
        self._down = False
        self._news.set()
        return done

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
                self._exits.clear()
                return
            self._news.clear()
            await self._news.wait()

    async def _fill(self, group: TaskGroup) -> WorkerExit:
        """Start a worker and look after it and those that replace it; return how the last one ended."""
        self._set(PlaceState.STARTING)
        plan, asked = self.plan, self._take_asked()
        process = self.process = self._make()
        try:
            await process.start(plan.ready_s)
        except WorkerError as error:
            await process.end(0)
            if self._strict and not self.first.done():
                self.first.set_exception(error)
                self._down = True
            self._on_event(str(error))
            return WorkerExit(self.name, _KILLED if error.exit_code is None else error.exit_code, ())
        finally:
            _tell(asked)
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
                return ended

    async def _until_it_ends(
        self, process: WorkerProcess, gone: asyncio.Future[WorkerExit], group: TaskGroup
    ) -> WorkerExit | None:
        """Return how a worker ended, by itself or told to; ``None`` when another has taken its place."""
        rule, loop = self.plan.health, asyncio.get_running_loop()
        while True:
            await _either(gone, self._news, rule.beat_s)
            self._news.clear()
            if gone.done():
                return gone.result()
            if self._down:
                self._on_event(f"{self.name} is told to end")
                await self._end(process)
                return await gone
            if why := hangs(rule, loop.time() - process.heard_at):
                self._on_event(f"{self.name} is killed: {why}")
                process.kill()
                return await gone
            if await self._is_replaced(process, group):
                return None

    async def _is_replaced(self, old: WorkerProcess, group: TaskGroup) -> bool:
        """Have a fresh worker take over if there is a reason and it becomes ready."""
        now = asyncio.get_running_loop().time()
        if self._asked:
            why = "that was asked for"
        elif now < self._not_before or not (
            why := is_deaf(self.plan.health, old.beat)
            or due_for_recycling(self.plan.recycle, old.beat, now - old.started_at)
            or ""
        ):
            return False
        self._on_event(f"{self.name} is replaced by a fresh worker: {why}")
        asked, fresh = self._take_asked(), self._make(fresh=True)
        self._leaving.add(fresh)  # until it has taken over
        try:
            await fresh.start(self.plan.ready_s)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await fresh.end(0)
            _tell(asked)
            if not isinstance(error, WorkerError):
                raise
            self._on_event(f"{self.name} goes on as it is, its replacement failed: {error}")
            self._not_before = now + self.plan.restart.longest_s
            return False
        finally:
            self._leaving.discard(fresh)
        self.process = fresh
        self.restarts += 1
        self._set(PlaceState.READY)
        self._leaving.add(old)
        group.start_soon(self._end_old, old, asked)
        return True

    async def _end_old(self, old: WorkerProcess, asked: list[anyio.Event]) -> None:
        try:
            await self._end(old)
        finally:
            self._leaving.discard(old)
            _tell(asked)

    async def _end(self, process: WorkerProcess) -> None:
        with anyio.CancelScope(shield=True):
            await process.end(self.plan.drain_s + _AFTER_DRAINING_S)

    async def _after(self, ended: WorkerExit) -> None:
        """Do what the rules say about a worker that has ended."""
        if self._down:
            self._set(PlaceState.DRAINED)
            return
        loop = asyncio.get_running_loop()
        self._exits = within(self.plan.restart, [*self._exits, loop.time()], loop.time())
        verdict = after_exit(self.plan.restart, self._exits, ended.code, chance=random.random())  # noqa: S311
        if verdict.next is not Next.RESTART:
            given_up = verdict.next is Next.GIVE_UP
            self._on_event(f"{ended}; it is not started again: {verdict.why}")
            self._set(PlaceState.GIVEN_UP if given_up else PlaceState.ENDED, f"{ended}; {verdict.why}")
            if not self.first.done():
                self.first.set_exception(WorkerError(f"{ended}: {verdict.why}", name=self.name))
            return
        self._on_event(f"{ended}; it is started again in {verdict.after_s:.1f} s")
        self._set(PlaceState.WAITING, str(ended))
        self.restarts += 1
        self._news.clear()
        with anyio.move_on_after(verdict.after_s):
            while not self._is_asked():  # whoever asks for it now does not wait
                await self._news.wait()
                self._news.clear()

    def _make(self, *, fresh: bool = False) -> WorkerProcess:
        # Two processes of one place can't listen on one port.
        more = {METRICS_PORT: "0"} if fresh else {}
        spec = replace(
            self.plan.spec,
            name=self.name,
            environment={**self.plan.spec.environment, **more},
            beat_s=self.plan.health.beat_s,
        )
        return WorkerProcess(spec, self._on_line, self._news.set)

    def _is_asked(self) -> bool:
        return self._down or bool(self._asked)

    def _take_asked(self) -> list[anyio.Event]:
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


def _tell(asked: list[anyio.Event]) -> None:
    for one in asked:
        one.set()
