"""A callee and a caller that live through every fault of a module, as agents in production must.

Tests share them, so that what one fault leaves behind shows in the tests after it, and because two
connections take longer to make than most faults to happen.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from agentweave_bus.exceptions import CallTimeoutError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe, data_of
from tests.integration.world import Caller, World, metric

CLEAR = (CallTimeoutError, UnreachableError)
"""What a call may end with that a fault hit. Anything else is a fault of its own."""


class Stage:
    """The world of one module, with its standing callee and caller."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._echo: Probe | None = None
        self._cli: Caller | None = None
        self._standing_agents: list[Any] = []
        self._standing_held: list[Any] = []

    async def echo(self) -> Probe:
        """The standing callee with nothing remembered; a new one if a test has ended it."""
        if self._echo is None or self.world.running(self._echo)._task.done():
            self._echo = await self.world.agent(ECHO)
            self._standing_agents = [self.world.running(self._echo)]
        probe = self._echo
        probe.ran.clear()
        probe.svids.clear()
        probe.most_at_once = 0
        probe.entered, probe.gate, probe.on_rotation = asyncio.Event(), asyncio.Event(), asyncio.Event()
        probe.thread_gate.clear()
        return probe

    async def cli(self) -> Caller:
        """The standing caller, to whom nobody has failed lately."""
        if self._cli is None:
            self._cli = await self.world.client(CLI)
            self._standing_held = [self.world._held[-1]]
        self._cli.parts.client.breakers._breakers.clear()
        return self._cli

    async def without_echo(self) -> None:
        """End the standing callee, so that a test can start one of its own: they would share the calls."""
        if self._echo is not None:
            await self.world.running(self._echo).crash()

    async def tidy(self) -> None:
        """Undo the fault, end what the test began, and wait until those who stay have recovered."""
        world, nats = self.world, self.world.stack.nats
        if nats.pid is not None:
            os.kill(nats.pid, signal.SIGCONT)
        await nats.start()
        if self._echo is not None:
            self._echo.gate.set()
            self._echo.thread_gate.set()
        for held in reversed([one for one in world._held if one not in self._standing_held]):
            await held.close()
            world._held.remove(held)
        for one in [one for one in world._agents if one not in self._standing_agents]:
            if not one._task.done():
                await one.crash()
            world._agents.remove(one)
        await self._recovered()

    async def _recovered(self) -> None:
        echo, cli = self._echo, self._cli
        if cli is not None:
            await until(lambda: cli.parts.keeper.connected, "the caller's connection")
        if echo is not None and not self.world.running(echo)._task.done():
            await until(lambda: echo.parts.keeper.connected, "the callee's connection")
            await until(lambda: echo._at_once == 0, "the end of every handler")


async def rotated(parts: Any, world: World, identity: SpiffeID) -> Any:
    """Rotate an identity and wait until its connection stands on the new SVID."""
    before = metric(parts, "agentweave_bus_reconnects_total")
    world.stack.api.rotate(identity)
    await until(
        lambda: metric(parts, "agentweave_bus_reconnects_total") > before, f"a new connection of {identity}"
    )
    return parts.source.svid


async def everyone_connected(*parts: Any) -> None:
    await until(lambda: all(one.keeper.connected for one in parts), "reconnecting")


async def answered(caller: Caller, target: SpiffeID = ECHO, **options: Any) -> Any:
    """Ask until there is an answer: what a fault may do to a call meanwhile is a clear error."""
    options.setdefault("timeout", PATIENCE)
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return data_of(await caller.call(str(target), "say", {"text": "there?"}, **options))
            except CLEAR as error:
                await anyio.sleep(getattr(error, "retry_after", 0) or 0.02)


class Load:
    """Callers that ask one after the other, each, until they are told to stop."""

    def __init__(self, caller: Caller, target: SpiffeID, name: str, options: dict[str, Any]) -> None:
        self._caller, self._target, self._name = caller, target, name
        self._options = {"timeout": PATIENCE, **options}
        self._stop = False
        self.good: list[str] = []
        self.failures: list[Exception] = []

    async def more(self, count: int) -> None:
        """Wait for ``count`` more good answers."""
        before = len(self.good)
        await until(lambda: len(self.good) >= before + count, f"{count} more good answers")

    async def run(self, number: int) -> None:
        serial = 0
        while not self._stop:
            text, serial = f"{number}-{serial}", serial + 1
            try:
                result = await self._caller.call(
                    str(self._target), self._name, {"text": text}, **self._options
                )
            except CLEAR as error:
                self.failures.append(error)
                await anyio.sleep(getattr(error, "retry_after", 0) or 0)
            else:
                assert result.status == "completed"
                assert text in data_of(result).values()
                self.good.append(text)

    def stop(self) -> None:
        self._stop = True


@asynccontextmanager
async def load(
    caller: Caller, *, target: SpiffeID = ECHO, name: str = "work", at_once: int = 16, **options: Any
) -> AsyncIterator[Load]:
    """Keep ``at_once`` callers busy for the block; at its end each finishes what it has asked for."""
    busy = Load(caller, target, name, options)
    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(busy.run(number))
        try:
            yield busy
        finally:
            busy.stop()
