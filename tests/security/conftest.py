"""A real stack, and an adversary who owns the broker, for every attack here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import Raw, heard_within, until
from tests.integration.fixtures import *  # noqa: F403
from tests.integration.fixtures import _tests_own_logging_and_signals  # noqa: F401
from tests.integration.probes import CLI, ECHO, Probe
from tests.integration.world import Caller, World, metric


@dataclass
class Attack:
    """An honest call that ran, was answered, and was seen by somebody who now sends what he likes."""

    world: World
    echo: Probe
    cli: Caller
    mallory: Raw
    message: Msg
    answers: asyncio.Queue[Msg]
    refused_before: int

    async def send(
        self, frame: bytes, *, subject: str | None = None, reply: str | None = None, **more: Any
    ) -> None:
        await self.mallory.send(
            self.message.subject if subject is None else subject,
            frame,
            self.message.reply if reply is None else reply,
            **more,
        )

    def refusals(self) -> list[dict[str, Any]]:
        """What the callee has refused since the attack began."""
        return self.world.refusals("echo")[self.refused_before :]

    async def refused(self, step: str, *, reason: str = "") -> dict[str, Any]:
        """The attack is refused at ``step``, in the audit log and the metrics; nothing ran.

        What is refused before its sender is verified, or because of a doubt about where the answer goes,
        is not answered at all.
        """
        await until(lambda: len(self.refusals()) == 1, "the refusal")
        record = self.refusals()[0]
        assert record["step_name"] == step, record
        assert reason in record["reason"], record
        assert record["audit_id"]
        assert self._counted(step) >= 1
        assert self.echo.ran == ["work"]
        # A later honest call is answered, so whatever would follow from the attack has followed by now.
        await self.cli.ask(ECHO, "say", {"text": "later"})
        await self.mallory.flush()
        assert self.echo.ran == ["work", "say"]
        assert self.answers.empty()
        assert len(self.refusals()) == 1
        return record

    def _counted(self, step: str) -> float:
        labels = {"step": step, "reason": "denied" if step == "authorization" else "refused"}
        return metric(self.echo.parts, "agentweave_admission_refusals_total", **labels)


Cast = tuple[World, Probe, Caller, Raw, "asyncio.Queue[Msg]"]


@pytest.fixture(scope="module")
async def cast(session_world: World) -> AsyncIterator[Cast]:
    """Callee, caller and adversary, who overhears every call, for all attacks of a module."""
    world = session_world
    echo, cli, mallory = await world.agent(ECHO), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


@pytest.fixture
async def attack(cast: Cast) -> Attack:
    """First the honest call: it is admitted, runs and is answered."""
    world, echo, cli, mallory, overheard = cast
    await mallory.flush()
    while not overheard.empty():
        overheard.get_nowait()
    echo.ran.clear()
    before = len(world.refusals("echo"))
    assert await cli.ask(ECHO, "work", {"text": "honest"}) == {"worked": "honest"}
    message = await heard_within(overheard)
    assert world.audit("echo", event="admission")[-1]["caller"] == str(CLI)
    assert echo.ran == ["work"]
    assert len(world.refusals("echo")) == before
    return Attack(world, echo, cli, mallory, message, await mallory.listen(message.reply), before)
