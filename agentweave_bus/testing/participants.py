"""Agents and clients while a test's bus holds them: started, stopped, killed, and never left behind.

Each lives in a task of its own, because what it enters must be left by the task that entered it, and
fixtures and tests are different tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from agentweave_bus.agent import SecureAgent
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.runtime import AgentWeaveClient, Connected, Runner
from agentweave_bus.runtime.surroundings import Surroundings

__all__ = ["HeldAgent", "HeldClient", "Participant"]

_READY_SECONDS: Final = 30.0
_END_SECONDS: Final = 15.0


class Participant:
    """What agents and clients have in common. ``ready`` is set once calls can be made, or taken."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.leave = asyncio.Event()
        self.parts: Connected | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether its task is over."""
        return self._task is None or self._task.done()

    def wired(self, parts: object) -> None:
        """Take note of what it is made of (``Surroundings.on_wired``)."""
        assert isinstance(parts, Connected)
        self.parts = parts

    async def begin(self, live: Callable[[], Awaitable[None]]) -> None:
        """Have it live in a task of its own, and return when it is ready. Raises what kept it from that."""
        self._task = asyncio.ensure_future(_coroutine(live))
        waiter = asyncio.ensure_future(self.ready.wait())
        await asyncio.wait({self._task, waiter}, timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self.ready.is_set():
            return
        if self._task.done():
            self._task.result()
        await self.kill()
        raise AgentWeaveError(f"not ready within {_READY_SECONDS:g} s")

    async def stop(self) -> None:
        """Ask it to end and wait until it has. Raises what went wrong with it."""
        self.leave.set()
        if self._task is not None:
            await self._task

    async def kill(self) -> None:
        """End it without a word to anybody. Raises what had gone wrong with it before."""
        task = self._task
        if task is None:
            return
        failed = task.done()
        task.cancel()
        _, open_ = await asyncio.wait({task}, timeout=_END_SECONDS)
        if open_:
            raise AgentWeaveError(f"{self!r} has not ended within {_END_SECONDS:g} s")
        if failed and not task.cancelled() and (error := task.exception()) is not None:
            raise error

    @contextmanager
    def _signals(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Stand for SIGINT and SIGTERM; whoever waits for them has got ready."""

        async def wait() -> None:
            self.ready.set()
            await self.leave.wait()

        yield wait

    @property
    def signals(self) -> Callable[[], AbstractContextManager[Callable[[], Awaitable[None]]]]:
        """What a runner takes for the signals of its process (``Surroundings.stop_signals``)."""
        return self._signals


class HeldAgent(Participant):
    """An agent in this process, served by the runner that serves it in its own."""

    def __init__(self, agent: SecureAgent) -> None:
        super().__init__()
        self.agent = agent

    def __repr__(self) -> str:
        return f"the agent {self.agent.name}"

    async def start(self, surroundings: Surroundings) -> None:
        """Serve it; returns when it takes calls."""
        await self.begin(lambda: Runner(surroundings).run(self.agent))


class HeldClient(Participant):
    """A client in this process."""

    def __init__(self, make: Callable[[], AgentWeaveClient]) -> None:
        super().__init__()
        self._make = make
        self.client: AgentWeaveClient | None = None

    def __repr__(self) -> str:
        return "a client"

    async def start(self) -> AgentWeaveClient:
        """Connect it."""
        await self.begin(self._live)
        assert self.client is not None
        return self.client

    async def _live(self) -> None:
        async with self._make() as client:
            self.client = client
            self.ready.set()
            await self.leave.wait()


async def _coroutine(live: Callable[[], Awaitable[Any]]) -> None:
    await live()
