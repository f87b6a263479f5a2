"""All agents of a stack in this process, each served by the code that serves it in a process of its own.

Each has its own identity, connection, admission and policy. One whose files change is imported anew, then
ended in order, then served again; one that can't be imported stays as it is until the next change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from functools import partial
from typing import Final

from agentweave_bus.agent import SecureAgent
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.dev.modules import anew, made, what_went_wrong
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.runtime import Connected, Runner
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.supervisor.worker_process import WorkerSpec

__all__ = ["ServedAgents", "agent_name", "served_agents"]

_READY_S: Final = 30.0

agent_name: ContextVar[str] = ContextVar("agentweave_dev_agent", default="")
"""Which of the agents is at work: what it logs, and all that it starts, goes by it."""


class _Served:
    """One agent while it is served, in a task of its own."""

    def __init__(
        self,
        agent: SecureAgent,
        group: asyncio.TaskGroup,
        surroundings: Surroundings,
        ended: Callable[[BaseException], None],
    ) -> None:
        self._ended = ended
        self.parts: Connected | None = None
        self.failure: BaseException | None = None
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._surroundings = replace(
            surroundings, stop_signals=self._signals, on_wired=self._wired(surroundings.on_wired)
        )
        context = copy_context()
        context.run(agent_name.set, agent.name)
        self.task = group.create_task(self._live(agent), context=context, name=agent.name)

    async def until_ready(self) -> bool:
        """Wait until calls are taken, or it has failed; return whether they are."""
        waiter = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait({self.task, waiter}, timeout=_READY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if not self._ready.is_set() and not self.task.done():
            self.failure = AgentWeaveError(f"it was not ready within {_READY_S:g} s")
            self.task.cancel()
        return self._ready.is_set()

    async def end(self) -> None:
        """Let what is in flight finish, for ``bus.drain_timeout`` at most, and take it down."""
        self._leave.set()
        await asyncio.wait({self.task})

    def kill(self) -> None:
        """Take it down without waiting for what is in flight."""
        self.task.cancel()

    async def _live(self, agent: SecureAgent) -> None:
        try:
            await Runner(self._surroundings).run(agent)
        except Exception as error:  # noqa: BLE001 - told by who looks after it; the others go on
            self.failure = error
            if self._ready.is_set():
                self._ended(error)

    def _wired(self, before: Callable[[object], None]) -> Callable[[object], None]:
        def wired(parts: object) -> None:
            assert isinstance(parts, Connected)
            self.parts = parts
            before(parts)

        return wired

    @contextmanager
    def _signals(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Stand for SIGINT and SIGTERM; whoever waits for them has got ready."""

        async def wait() -> None:
            self._ready.set()
            await self._leave.wait()

        yield wait


class ServedAgents:
    """The agents of a stack in this process. Made by :func:`served_agents`."""

    def __init__(
        self,
        specs: Iterable[WorkerSpec],
        watched: WatchedStack,
        *,
        environment: str,
        surroundings: Surroundings,
        group: asyncio.TaskGroup,
        say: Callable[[str], None],
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._watched = watched
        self._environment = environment
        self._surroundings = surroundings
        self._group = group
        self._say = say
        self._served: dict[str, _Served] = {}
        self._begun: list[_Served] = []
        """All whose tasks may run, those that are ending included."""

    @property
    def serving(self) -> tuple[str, ...]:
        """The names of those that are served."""
        return tuple(self._served)

    async def start(self) -> None:
        """Serve all of them; those that can't be are told, and tried again after the next change."""
        await self._serve(self._import(list(self._specs)))

    async def take_up(self, names: Iterable[str]) -> None:
        """Serve these agents, and those that are made of the same files, as their files are now.

        So are those that are not served at the moment: what kept them from it may be mended.
        """
        concerned = {one for name in names for one in self._watched.sharing(name)}
        concerned.update(self._specs.keys() - self._served.keys())
        fresh = self._import([name for name in self._specs if name in concerned])
        ending = [one for name in fresh if (one := self._served.pop(name, None)) is not None]
        await asyncio.gather(*(one.end() for one in ending))
        await self._serve(fresh)

    async def end(self) -> None:
        """End all of them in order."""
        ending = list(self._served.values())
        self._served.clear()
        await asyncio.gather(*(one.end() for one in ending))

    def kill(self) -> None:
        """End all of them without waiting for what is in flight."""
        for one in self._begun:
            one.kill()

    def _import(self, names: list[str]) -> dict[str, SecureAgent]:
        """Import agents anew, each with those that it shares files with; leave out those that fail."""
        fresh: dict[str, SecureAgent] = {}
        left = list(names)
        while left:
            together = [name for name in self._watched.sharing(left[0]) if name in left]
            left = [name for name in left if name not in together]
            files = {file for name in together for file in self._watched.files_of(name)}
            name = together[0]
            try:
                with anew(files):
                    made_now = {}
                    for name in together:
                        made_now[name] = made(self._specs[name], self._environment)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code
                self._tell(name, together, error)
            else:
                fresh.update(made_now)
        return fresh

    def _tell(self, name: str, together: list[str], error: BaseException) -> None:
        running = [one for one in together if one in self._served]
        goes_on = f"{', '.join(running)} as before the change" if running else "not served"
        self._say(f"{name} can't be imported ({goes_on}):\n{_indented(what_went_wrong(error))}")

    async def _serve(self, fresh: dict[str, SecureAgent]) -> None:
        begun = {
            name: _Served(agent, self._group, self._surroundings, partial(self._not_served, name))
            for name, agent in fresh.items()
        }
        self._served.update(begun)
        self._begun = [one for one in self._begun if not one.task.done()] + list(begun.values())
        ready = await asyncio.gather(*(one.until_ready() for one in begun.values()))
        for (name, one), is_ready in zip(begun.items(), ready, strict=True):
            if not is_ready and one.failure is not None:
                self._not_served(name, one.failure)

    def _not_served(self, name: str, error: BaseException) -> None:
        self._served.pop(name, None)
        self._say(f"{name} is not served until something changes:\n{_indented(what_went_wrong(error))}")


@asynccontextmanager
async def served_agents(
    specs: Iterable[WorkerSpec],
    watched: WatchedStack,
    *,
    environment: str,
    surroundings: Surroundings,
    say: Callable[[str], None],
) -> AsyncIterator[ServedAgents]:
    """Have agents served for the length of the block; at its end they are ended in order.

    ``specs`` says what each would be given in a process of its own. Errors of single agents are told to
    ``say``, with lines of the user's code alone.
    """
    async with asyncio.TaskGroup() as group:
        served = ServedAgents(
            specs, watched, environment=environment, surroundings=surroundings, group=group, say=say
        )
        try:
            yield served
        finally:
            await served.end()


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
