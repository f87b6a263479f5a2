"""A call that its callee is working on, and somebody who answers it first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import Raw, heard_within, until
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe, data_of
from tests.integration.world import Caller, World

REASONS = ("late", "duplicate", "forged")


@dataclass
class Question:
    """A call that was admitted, whose handler waits; somebody who sees all of it answers in its place."""

    world: World
    echo: Probe
    cli: Caller
    mallory: Raw
    overheard: asyncio.Queue[Msg]
    message: Msg = field(init=False)
    task: asyncio.Task[Any] = field(init=False)
    before: dict[str, float] = field(default_factory=dict)
    refused_before: int = 0

    async def ask(self) -> None:
        """Have the caller ask; return when the handler is at work."""
        await self.mallory.flush()
        while not self.overheard.empty():
            self.overheard.get_nowait()
        self.echo.gate.clear()
        self.echo.entered.clear()
        self.echo.ran.clear()
        self.before = {reason: self.cli.dropped(reason) for reason in REASONS}
        self.refused_before = len(self.world.refusals("echo"))
        self.task = asyncio.create_task(self.cli.call(str(ECHO), "wait", timeout=PATIENCE))
        self.message = await heard_within(self.overheard)
        async with asyncio.timeout(PATIENCE):
            await self.echo.entered.wait()
        record = self.world.audit("echo", event="admission")[-1]
        assert (record["caller"], record["cap"]) == (str(CLI), "wait")

    async def settle(self) -> None:
        """Have every handler end and answer."""
        self.echo.gate.set()
        self.task.cancel()
        await asyncio.wait({self.task})
        count = len(self.world.audit("echo", event="admission"))
        await until(lambda: len(self.world.audit("echo", event="outcome")) == count, "every outcome")

    async def answer(self, frame: bytes, headers: dict[str, str] | None = None) -> None:
        """Send ``frame`` to where the answer is waited for."""
        await self.mallory.send(self.message.reply, frame, headers=headers)

    def dropped(self, reason: str) -> float:
        """How many answers the caller has dropped for this reason since the question was asked."""
        return self.cli.dropped(reason) - self.before.get(reason, 0.0)

    async def all_dropped(self, count: int = 1, *, reason: str = "forged") -> None:
        """``count`` answers are dropped and counted, the call still waits, and the true answer counts."""
        await until(lambda: self.dropped(reason) >= count, f"{count} answers dropped as {reason}")
        assert not self.task.done()
        await self.honest()
        assert {one: self.dropped(one) for one in REASONS} == dict.fromkeys(REASONS, 0) | {reason: count}

    async def honest(self) -> None:
        """The callee's own answer arrives and is the one that counts; its handler has run once."""
        self.echo.gate.set()
        async with asyncio.timeout(PATIENCE):
            assert data_of(await self.task) == {"waited": True}
        assert self.echo.ran == ["wait"]

    def refusals(self) -> list[dict[str, Any]]:
        """What the callee has refused since the question was asked."""
        return self.world.refusals("echo")[self.refused_before :]


Parties = tuple[World, Probe, Caller, Raw, "asyncio.Queue[Msg]"]


@pytest.fixture(scope="module")
async def parties(session_world: World) -> AsyncIterator[Parties]:
    """Callee, caller, and somebody who owns the broker and hears every call."""
    world = session_world
    echo, cli, mallory = await world.agent(ECHO), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "wait"))
    await world.clear()


@pytest.fixture
async def question(parties: Parties) -> AsyncIterator[Question]:
    """First an honest call that is answered; then the one that is attacked."""
    world, echo, cli, mallory, overheard = parties
    echo.gate.set()
    assert await cli.ask(ECHO, "wait") == {"waited": True}
    question = Question(world, echo, cli, mallory, overheard)
    await question.ask()
    yield question
    await question.settle()
