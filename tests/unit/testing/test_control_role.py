"""The bus in memory has the control role at work: who announces itself there has what it needs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import task_consumer, task_streams, tasks_stream_name
from agentweave_bus.bus.subjects import Priority
from agentweave_bus.envelope import control_role
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.announcing import Announcer
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

SECOND = 1_000_000_000


async def connected(bus: MemoryBus, identity: str) -> Connected:
    parts = (await bus.client(identity))._parts
    assert isinstance(parts, Connected)
    return parts


async def announce(parts: Connected, *capabilities: str, ack_wait_s: float | None = None) -> None:
    """Announce what somebody serves, by its own connection."""
    announcer = Announcer(
        parts.me,
        control_role(parts.me.trust_domain),
        capabilities,
        sealer=parts.sealer,
        clock_ms=parts.surroundings.clock_ms,
        ack_wait_s=ack_wait_s,
    )
    await announcer.announce(await parts.keeper.session(5))


async def announced(bus: MemoryBus, identity: str, *capabilities: str) -> SpiffeID:
    parts = await connected(bus, identity)
    await announce(parts, *capabilities)
    return parts.me


def consumers(bus: MemoryBus, agent: SpiffeID) -> dict[str, Any]:
    stream = bus.broker.jetstream.streams.get(tasks_stream_name(agent))
    return {} if stream is None else dict(stream.consumers)


async def has_consumer(bus: MemoryBus, agent: SpiffeID, capability: str) -> None:
    async with asyncio.timeout(30):
        while task_consumer(agent, capability).name not in consumers(bus, agent):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("identity", ["agent/stock", "spiffe://partner.test/agent/prices"])
async def test_who_announces_itself_has_streams_and_consumers(bus: MemoryBus, identity: str) -> None:
    agent = await announced(bus, identity, "reserve", "look")
    await has_consumer(bus, agent, "look")
    await has_consumer(bus, agent, "reserve")
    assert {one.name for one in task_streams(agent)} <= bus.broker.jetstream.streams.keys()


class Patient(SecureAgent):
    """Has one task, and is given time for it."""

    @capability("look")
    async def look(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("seconds", [7.5, 3600.0, 30.0])
async def test_queues_wait_for_a_word_as_long_as_their_workers_say(
    bus: MemoryBus, tmp_path: Path, seconds: float
) -> None:
    """Also those that were made for workers who said otherwise, and had nobody who missed them since."""
    agent = bus.id("agent/patient")
    await announced(bus, str(agent), "look")
    await has_consumer(bus, agent, "look")
    assert waits(bus, agent) == {30 * SECOND}
    named = {"name": "patient", "trust_domain": bus.trust_domain}
    file, said = tmp_path / "patient.yaml", {"agent": named, "bus": {"task_ack_wait": seconds}}
    file.write_text(yaml.safe_dump(said))
    await announced_with(bus, agent, 5)
    await bus.start(Patient, config=file)
    async with asyncio.timeout(30):
        while waits(bus, agent) != {int(seconds * SECOND)}:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.005)


async def announced_with(bus: MemoryBus, agent: SpiffeID, ack_wait_s: float) -> None:
    """Have it announced by another version of the worker, and wait until that is done."""
    await announce(await connected(bus, str(agent)), "look", ack_wait_s=ack_wait_s)
    async with asyncio.timeout(30):
        while waits(bus, agent) != {ack_wait_s * SECOND}:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.005)


def waits(bus: MemoryBus, agent: SpiffeID) -> set[int]:
    """How long the broker waits for a word, by each of the agent's consumers, in nanoseconds."""
    return {one.config["ack_wait"] for one in consumers(bus, agent).values()}


async def test_it_is_at_work_through_rotations_and_hours(bus: MemoryBus) -> None:
    await announced(bus, "agent/stock", "look")
    await bus.rotate_ca()
    await bus.clock.advance(7_200)
    agent = await announced(bus, "agent/other", "look")
    await has_consumer(bus, agent, "look")


async def test_who_announces_too_often_is_not_heard_until_later(bus: MemoryBus) -> None:
    stock = await connected(bus, "agent/stock")
    for number in range(100):
        await announce(stock, f"c{number:02}")
    honest = await announced(bus, "agent/other", "look")
    await has_consumer(bus, honest, "look")
    assert 50 <= len(consumers(bus, stock.me)) / len(Priority) < 90
    await bus.clock.advance(10)
    await announce(stock, "last")
    await has_consumer(bus, stock.me, "last")
