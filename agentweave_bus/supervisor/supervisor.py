"""The supervisor: a place for every replica of every worker, filled for as long as it runs.

It decides nothing about tasks: what a worker was doing when it died comes again to another one, by the
broker. So several supervisors on several machines share the work without knowing of each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config.stack import MOST_WORKERS
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, WorkerError
from agentweave_bus.supervisor.autoscaling import Load, Scaler, load_of
from agentweave_bus.supervisor.place import Place, PlaceState
from agentweave_bus.supervisor.worker_plan import WorkerPlan
from agentweave_bus.supervisor.worker_process import WorkerProcess

__all__ = ["Supervisor", "supervised"]

_COUNTED: Final = 64
_TO_COME: Final = frozenset({PlaceState.STARTING, PlaceState.WAITING})


class Supervisor:
    """Workers by their plans. Made by :func:`supervised`."""

    def __init__(
        self,
        group: TaskGroup,
        *,
        on_line: Callable[[str, str], None],
        on_event: Callable[[str], None],
        on_change: Callable[[], None],
        strict: bool,
    ) -> None:
        self._group = group
        self._on_line = on_line
        self._on_event = on_event
        self._on_change = on_change
        self._strict = strict
        self._plans: dict[str, WorkerPlan] = {}
        self._places: dict[str, Place] = {}
        self._scalers: dict[str, Scaler] = {}
        self._beaten = asyncio.Event()
        self.counted: deque[tuple[str, int, str]] = deque(maxlen=_COUNTED)
        """Agent, process and last page of metrics of workers that ended; for whoever adds them up."""
        self._parting: set[Place] = set()
        """Places that were given up, and whose workers are still ending."""
        self._settled = asyncio.Event()
        self._turn = 0
        """Changes when all are told to end, so that whoever replaces them stops."""
        self._rolling = anyio.Lock()

    # --- what there is -----------------------------------------------------------------------------------

    @property
    def all(self) -> tuple[WorkerProcess, ...]:
        """The process at every place where there is one, in order."""
        return tuple(one.process for one in self._places.values() if one.process is not None)

    def __getitem__(self, name: str) -> WorkerProcess:
        process = self._places[name].process
        if process is None:
            raise KeyError(name)
        return process

    @property
    def states(self) -> dict[str, PlaceState]:
        """What goes on at every place, by its name."""
        return {name: one.state for name, one in self._places.items()}

    def status(self) -> list[dict[str, Any]]:
        """Return how things stand at every place, as plain values: agent by agent, by the places' numbers."""
        return [one.status() for agent in self._plans for one in sorted(self._of(agent), key=_number)]

    def leaving(self) -> frozenset[tuple[str, int]]:
        """Return agent and process of those that still end, of which :meth:`status` says nothing any more."""
        ending = [(one.plan.name, process) for one in self._places.values() for process in one.leaving]
        for one in self._parting:
            ending += [
                (one.plan.name, process) for process in (one.process, *one.leaving) if process is not None
            ]
        return frozenset((agent, process.pid) for agent, process in ending if process.started)

    def agents(self) -> list[dict[str, Any]]:
        """Return how many workers each agent has, may have and should have, as plain values."""
        return [self._agent(name) for name in self._plans]

    def _agent(self, name: str) -> dict[str, Any]:
        places, scaler, load = self._of(name), self._scalers.get(name), self._load(name)
        return {
            "agent": name,
            "workers": len(places),
            "backlog": None if load is None else load.waiting,
            "min": None if scaler is None else scaler.rule.least,
            "max": None if scaler is None else scaler.rule.most,
            "wanted": None if scaler is None else scaler.wanted,
            "held": scaler is not None and scaler.held,
        }

    async def until_nobody_works(self) -> None:
        """Wait until every place has lost its worker for good; who was drained will be back."""
        over = {PlaceState.GIVEN_UP, PlaceState.ENDED}
        while not self._places or any(one.state not in over for one in self._places.values()):
            self._settled.clear()
            await self._settled.wait()

    async def until_all_have_ended(self) -> None:
        """Wait until no process lives, nor will without being asked: after :meth:`drain`."""
        over = {PlaceState.GIVEN_UP, PlaceState.ENDED, PlaceState.DRAINED}
        while any(one.state not in over or one.living for one in (*self._places.values(), *self._parting)):
            self._settled.clear()
            await self._settled.wait()

    # --- what is to be -----------------------------------------------------------------------------------

    async def start(self, plans: Sequence[WorkerPlan]) -> None:
        """Fill the places of new plans, all at the same time, and wait until each was ready.

        Raises:
            WorkerError: one is not, and will not be; the others go on until the block is left.
            AgentWeaveError: two plans have one name.

        """
        places: list[Place] = []
        for plan in plans:
            if plan.name in self._plans:
                raise AgentWeaveError(f"there is a worker called {plan.name} already")
            self._take(plan)
            places += [self._add(name, plan, strict=self._strict) for name in plan.places]
        for ready in asyncio.as_completed([place.first for place in places]):
            await ready

    async def roll(self, plans: Sequence[WorkerPlan] | None = None) -> None:
        """Replace every worker by a fresh one, one place after the other; with ``plans``, by these.

        Places that a plan no longer has are given up, new ones are filled. One call of this runs at a time.

        Raises:
            WorkerError: a fresh worker did not become ready. The old one goes on, and so do those after it.

        """
        turn = self._turn
        async with self._rolling:
            if plans is not None:
                self._follow(plans)
            await self._replace(list(self._places.values()), turn)

    async def reload(self, plans: Sequence[WorkerPlan] | None = None) -> None:
        """Do what :meth:`roll` does, and forget the numbers that :meth:`scale` was told: the load decides.

        Raises:
            WorkerError: as :meth:`roll`.

        """
        for scaler in self._scalers.values():
            scaler.held = False
        await self.roll(plans)

    async def restart(self, agent: str) -> None:
        """Replace the workers of one agent, one after the other.

        Raises:
            ConfigurationError: there is no such agent.
            WorkerError: as :meth:`roll`.

        """
        turn = self._turn
        async with self._rolling:
            await self._replace(self._of(agent), turn)

    async def _replace(self, places: Sequence[Place], turn: int) -> None:
        for place in places:
            if self._turn != turn:
                raise WorkerError("all were told to end", name=place.name)
            if self._places.get(place.name) is not place:
                continue  # it was given up meanwhile
            wish = place.replace(self._plans[place.plan.name])
            await wish.done.wait()
            if wish.failed:
                raise WorkerError(f"{place.name} was not replaced: {wish.failed}", name=place.name)

    def drain(self, agent: str | None = None) -> None:
        """Have the workers of one agent, or all, end in order; they stay down until they are restarted.

        Raises:
            ConfigurationError: there is no such agent.

        """
        if agent is None:
            self._turn += 1
        for place in list(self._places.values()) if agent is None else self._of(agent):
            place.drain()

    def scale(self, agent: str, replicas: int | None) -> None:
        """Have so many workers of one agent, whatever its load, until the next reload.

        With ``None`` its load decides again.

        Raises:
            ConfigurationError: there is no such agent, or it may not have so many.

        """
        places, scaler = self._of(agent), self._scalers.get(agent)
        if replicas is None and scaler is None:
            raise ConfigurationError(f"{agent} has no min and max in its file: give a number")
        least, most = (1, MOST_WORKERS) if scaler is None else (scaler.rule.least, scaler.rule.most)
        if replicas is not None and replicas < 1:
            raise ConfigurationError("an agent has at least one worker; drain it to have none")
        if replicas is not None and not least <= replicas <= most:
            raise ConfigurationError(f"{agent} may have {least} to {most} workers, not {replicas}")
        if scaler is not None:
            scaler.held = replicas is not None
        if replicas is not None and replicas != len(places):
            self._on_event(f"{agent}: {_workers(replicas)} instead of {len(places)}, as asked for")
            self._resize(agent, replicas)

    async def follow_load(self) -> None:
        """Have as many workers as the load calls for, where there may be more or fewer, until cancelled."""
        while True:
            await self._beaten.wait()
            self._beaten.clear()
            for agent, scaler in self._scalers.items():
                self._follow_load_of(agent, scaler)

    def _follow_load_of(self, agent: str, scaler: Scaler) -> None:
        places = self._of(agent)
        if self._rolling.statistics().locked or any(place.drained for place in places):
            return
        now, load = asyncio.get_running_loop().time(), self._load(agent)
        settled = not any(place.state in _TO_COME for place in places)
        size = scaler.next_size(now, len(places), load, settled=settled)
        if size != len(places):
            self._on_event(f"{agent}: {_workers(size)} instead of {len(places)}: {load}")
            self._resize(agent, size)

    def _load(self, agent: str) -> Load | None:
        working = (one.process for one in self._of(agent) if one.process is not None)
        return load_of((one for one in working if one.running), asyncio.get_running_loop().time())

    def _resize(self, agent: str, replicas: int) -> None:
        """Fill new places, or have the last ones given up in order: those first where nobody works anyway."""
        places = self._of(agent)
        for place in sorted(places, key=lambda one: one.empty)[replicas:]:
            self._give_up(place)
        plan = self._plans[agent]
        taken = self._places.keys() | {place.name for place in self._parting}
        names = (f"{agent}/{number}" for number in range(1, replicas + len(taken) + 1))
        free = [name for name in names if name not in taken]
        for name in free[: max(0, replicas - len(places))]:
            self._add(name, plan)

    def kill(self) -> None:
        """End all at once, as a crash would; whoever leaves the block reaps them."""
        for place in (*self._places.values(), *self._parting):
            place.kill()

    def _follow(self, plans: Sequence[WorkerPlan]) -> None:
        wanted = {plan.name: plan for plan in plans}
        for name in self._plans.keys() - wanted.keys():
            for place in self._of(name):
                self._give_up(place)
            del self._plans[name]
            self._scalers.pop(name, None)
        for name, plan in wanted.items():
            known = name in self._plans
            self._take(plan)
            if known:
                scale = plan.scale
                self._resize(name, plan.replicas if scale is None else scale.bounded(len(self._of(name))))
            else:
                for each in plan.places:
                    self._add(each, plan)

    def _take(self, plan: WorkerPlan) -> None:
        self._plans[plan.name] = plan
        self._scalers.pop(plan.name, None)
        if plan.scale is not None:
            self._scalers[plan.name] = Scaler(plan.scale)

    def _add(self, name: str, plan: WorkerPlan, *, strict: bool = False) -> Place:
        place = self._places[name] = Place(
            name,
            plan,
            on_line=self._on_line,
            on_event=self._on_event,
            on_change=self._changed,
            on_beat=self._beaten.set,
            on_counted=self._note_counted,
            is_alone=self._is_alone,
            may_recycle=self._may_recycle,
            strict=strict,
        )
        place.first.add_done_callback(_seen)
        self._group.start_soon(self._run, place)
        return place

    async def _run(self, place: Place) -> None:
        try:
            await place.run(self._group)
        finally:
            self._parting.discard(place)
            self._changed()

    def _give_up(self, place: Place) -> None:
        del self._places[place.name]
        self._parting.add(place)
        place.leave()

    def _is_alone(self, place: Place) -> bool:
        """Say whether no other process of a place's agent lives."""
        others = (one for one in (*self._places.values(), *self._parting) if one.plan.name == place.plan.name)
        return not any(one.living for one in others)

    def _note_counted(self, agent: str, pid: int, page: str) -> None:
        self.counted.append((agent, pid, page))

    def _may_recycle(self, place: Place) -> bool:
        """Say whether no other worker of a place's agent is being replaced."""
        return not any(one.replacing for one in self._of(place.plan.name) if one is not place)

    def _of(self, agent: str) -> list[Place]:
        if agent not in self._plans:
            known = ", ".join(self._plans) or "none"
            raise ConfigurationError(f"there is no agent {agent!r} here, but: {known}")
        return [one for one in self._places.values() if one.plan.name == agent]

    def _changed(self) -> None:
        self._settled.set()
        self._on_change()


def _number(place: Place) -> int:
    number = place.name.removeprefix(place.plan.name).removeprefix("/")
    return int(number) if number else 0


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _seen(first: asyncio.Future[None]) -> None:
    if not first.cancelled():
        first.exception()  # told as an event, too; nobody may have waited for it


@asynccontextmanager
async def supervised(
    *,
    on_line: Callable[[str, str], None],
    on_event: Callable[[str], None],
    on_change: Callable[[], None] = lambda: None,
    strict: bool = False,
) -> AsyncIterator[Supervisor]:
    """Run a supervisor for the length of the block; at its end every worker ends in order, or is killed.

    ``on_line(worker, line)`` gets what workers write, ``on_event(text)`` what happens to them, for people.
    ``on_change()`` is called whenever something has changed at a place. With ``strict`` a worker that does
    not become ready at first is not tried again.
    """
    async with owned_tasks() as group:
        supervisor = Supervisor(group, on_line=on_line, on_event=on_event, on_change=on_change, strict=strict)
        group.start_soon(supervisor.follow_load)
        try:
            yield supervisor
        finally:
            group.cancel_scope.cancel()
