"""The supervisor: a place for every replica of every worker, filled for as long as it runs.

It decides nothing about tasks: what a worker was doing when it died comes again to another one, by the
broker. So several supervisors on several machines share the work without knowing of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.exceptions import AgentWeaveError, WorkerError
from agentweave_bus.supervisor.place import Place, PlaceState, WorkerPlan
from agentweave_bus.supervisor.worker_process import WorkerProcess

__all__ = ["Supervisor", "supervised"]


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
        """Return how things stand at every place, as plain values."""
        return [one.status() for one in self._places.values()]

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
            self._plans[plan.name] = plan
            places += [self._add(name, plan) for name in plan.places]
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

    async def restart(self, agent: str) -> None:
        """Replace the workers of one agent, one after the other.

        Raises:
            AgentWeaveError: there is no such agent.
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
            AgentWeaveError: there is no such agent.

        """
        if agent is None:
            self._turn += 1
        for place in list(self._places.values()) if agent is None else self._of(agent):
            place.drain()

    def scale(self, agent: str, replicas: int) -> None:
        """Have so many workers of one agent: new places are filled, the last ones given up in order.

        Raises:
            AgentWeaveError: there is no such agent, or less than one was asked for.

        """
        places = self._of(agent)
        if replicas < 1:
            raise AgentWeaveError("an agent has at least one worker; drain it to have none")
        for place in places[replicas:]:
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
        for name, plan in wanted.items():
            known = name in self._plans
            self._plans[name] = plan
            if known:
                self.scale(name, plan.replicas)
            else:
                for each in plan.places:
                    self._add(each, plan)

    def _add(self, name: str, plan: WorkerPlan) -> Place:
        place = self._places[name] = Place(
            name,
            plan,
            on_line=self._on_line,
            on_event=self._on_event,
            on_change=self._changed,
            is_alone=self._is_alone,
            strict=self._strict,
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

    def _of(self, agent: str) -> list[Place]:
        if agent not in self._plans:
            known = ", ".join(self._plans) or "none"
            raise AgentWeaveError(f"there is no agent {agent!r} here, but: {known}")
        return [one for one in self._places.values() if one.plan.name == agent]

    def _changed(self) -> None:
        self._settled.set()
        self._on_change()


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
        try:
            yield supervisor
        finally:
            group.cancel_scope.cancel()
