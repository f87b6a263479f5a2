"""A real stack, and an adversary who owns the broker, for every attack here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.bus.admission import Step
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
    expected: Step | None
    """The step that the test's ``refused_by`` mark names."""
    reflected: asyncio.Queue[Msg] = field(default_factory=asyncio.Queue)
    """Whatever goes to the reply subjects that :meth:`send` was given."""
    counted_before: float = 0.0

    def __post_init__(self) -> None:
        self.counted_before = self._counted()

    async def send(
        self, frame: bytes, *, subject: str | None = None, reply: str | None = None, **more: Any
    ) -> None:
        """Publish as who owns the broker: to the honest call's subjects, unless others are given."""
        if reply:
            await self.mallory.client.subscribe(reply, cb=self._reflect)
        await self.mallory.send(
            self.message.subject if subject is None else subject,
            frame,
            self.message.reply if reply is None else reply,
            **more,
        )

    async def _reflect(self, message: Msg) -> None:
        self.reflected.put_nowait(message)

    def refusals(self) -> list[dict[str, Any]]:
        """What the callee has refused since the attack began."""
        return self.world.refusals("echo")[self.refused_before :]

    async def refused(self, *, reason: str = "") -> dict[str, Any]:
        """The attack is refused at the marked step, in the audit log and the metrics; nothing ran."""
        return (await self.refused_all(1, reason=reason))[0]

    async def refused_all(self, count: int, *, reason: str = "") -> list[dict[str, Any]]:
        """``count`` frames are refused at the marked step, in the audit log and the metrics; nothing ran.

        What is refused before its sender is verified is not answered at all, and never is the caller of
        the honest call.
        """
        expected = self.expected
        assert expected is not None, "the test has no refused_by mark that names a step"
        await until(lambda: len(self.refusals()) >= count, f"{count} refusals")
        records = self.refusals()
        for record in records:
            assert (record["step"], record["step_name"]) == (expected.number, expected.label), record
            assert reason in record["reason"], record
            assert record["audit_id"]
        assert self._counted() - self.counted_before == count
        assert self.echo.ran == ["work"]
        # A later honest call is answered, so whatever would follow from the attack has followed by now.
        await self.cli.ask(ECHO, "say", {"text": "later"})
        await self.mallory.flush()
        assert self.echo.ran == ["work", "say"]
        assert self.answers.empty()
        assert expected.number > Step.HEAD.number or self.reflected.empty()
        assert len(self.refusals()) == count
        return records

    async def admitted(self, *, ran: str = "work") -> dict[str, Any]:
        """What was sent is admitted and ran, once; the record of it."""
        await until(lambda: self.echo.ran == ["work", ran], "the handler")
        await self.mallory.flush()
        assert self.refusals() == []
        return self.world.audit("echo", event="admission")[-1]

    def _counted(self) -> float:
        return 0.0 if self.expected is None else counted(self.echo, self.expected)


def counted(agent: Probe, step: Step) -> float:
    """How many refusals at ``step`` the metrics of an agent count."""
    reason = "denied" if step is Step.AUTHORIZATION else "refused"
    return metric(agent.parts, "agentweave_admission_refusals_total", step=step.label, reason=reason)


Cast = tuple[World, Probe, Caller, Raw, "asyncio.Queue[Msg]"]


@pytest.fixture(scope="module")
async def callee(session_world: World) -> Probe:
    """Who is attacked. A module that needs another callee, or another configuration, has its own."""
    return await session_world.agent(ECHO)


@pytest.fixture(scope="module")
async def cast(session_world: World, callee: Probe) -> AsyncIterator[Cast]:
    """Callee, caller and adversary, who overhears every call, for all attacks of a module."""
    world = session_world
    cli, mallory = await world.client(CLI), await world.raw()
    yield world, callee, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


@pytest.fixture
async def attack(cast: Cast, request: pytest.FixtureRequest) -> Attack:
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
    mark = request.node.get_closest_marker("refused_by")
    where = None if mark is None else mark.args[0]
    expected = where if isinstance(where, Step) else None
    answers = await mallory.listen(message.reply)
    return Attack(world, echo, cli, mallory, message, answers, before, expected)
