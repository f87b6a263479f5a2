"""A task whose deadline passes between two attempts has failed, and what its steps did is undone."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskHandle, capability
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio


class Reserving(SecureAgent):
    def on_start(self) -> None:
        self.done: list[str] = []

    @capability("order")
    async def order(self) -> Any:
        await self.context.step("reserve", self.reserve, compensate=self.release)
        raise RetryableError("later", retry_after=30)

    async def reserve(self) -> str:
        self.done.append("reserve")
        return "r"

    async def release(self, _held: Any) -> None:
        self.done.append("release")


async def between_attempts(bus: MemoryBus) -> tuple[Reserving, TaskHandle]:
    """Submit a task that reserves, fails, and waits to be tried again."""
    await bus.grant("client/cli", "agent/reserving", "order")
    agent = await bus.start(Reserving)
    client = await bus.client("client/cli")
    handle = await client.submit(bus.id("agent/reserving"), "order", {}, deadline=10)
    while (await handle.status()).retry_at is None:
        await bus.clock.advance(timedelta(seconds=0.1))
    return agent, handle


async def test_steps_of_a_task_that_is_cancelled_and_expires_before_it_comes_again_are_undone(
    bus: MemoryBus,
) -> None:
    agent, handle = await between_attempts(bus)
    assert (await handle.cancel()).state == "canceled"
    await bus.clock.advance(timedelta(seconds=60))
    assert (await handle.status()).state == "canceled"
    assert agent.done == ["reserve", "release"]


async def test_steps_of_a_task_that_expires_and_is_not_allowed_any_more_are_undone(bus: MemoryBus) -> None:
    agent, _ = await between_attempts(bus)
    await bus.set_grants({})
    await bus.clock.advance(timedelta(seconds=60))
    assert agent.done == ["reserve", "release"]
    assert [one["step_name"] for one in bus.audit(agent, event="refusal")][-1] == "authorization"


async def test_steps_of_a_task_that_expires_between_attempts_are_undone(bus: MemoryBus) -> None:
    agent, handle = await between_attempts(bus)
    await bus.clock.advance(timedelta(seconds=60))
    result = await asyncio.wait_for(handle.result(), 30)
    assert result.status == "failed"
    assert agent.done == ["reserve", "release"]
