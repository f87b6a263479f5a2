"""Draining: what is in flight may go on over a lost connection, nothing new comes in, and it ends in time."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, call_subject
from agentweave_bus.testing import MemoryBus
from agentweave_bus.testing.memory_client import MemoryClient

pytestmark = pytest.mark.anyio


class EchoAgent(SecureAgent):
    @capability("say")
    async def say(self, text: str) -> str:
        return text


class Yard:
    """An agent's keeper, and its connections as the broker sees them."""

    def __init__(self, bus: MemoryBus, keeper: Keeper) -> None:
        self.bus = bus
        self.keeper = keeper

    @property
    def connections(self) -> list[MemoryClient]:
        return [one for one in self.bus.broker.clients if one.user == self.bus.id("agent/echo")]

    @property
    def subjects(self) -> list[str]:
        return [one.subject for client in self.connections for one in client.subscriptions]

    async def lose(self) -> None:
        session = await self.keeper.session(1)
        for client in self.connections:
            client.cut()
        await session.closed.wait()


@pytest.fixture
async def yard(bus: MemoryBus) -> Yard:
    await bus.start(EchoAgent)
    (held,) = bus._held
    assert held.parts is not None
    return Yard(bus, held.parts.keeper)


async def test_a_connection_that_is_lost_is_replaced_by_one_that_serves_nothing(yard: Yard) -> None:
    me = yard.bus.id("agent/echo")
    asked = f"$JS.API.STREAM.INFO.{claim_stream_name(me)}"
    assert call_subject(me, "say") in yard.subjects
    kinds: list[set[str]] = []

    async def other() -> None:
        for _ in range(2):
            await yard.lose()
            session = await yard.keeper.session(5)
            await session.ask(asked, b"", timeout_s=5)
            inbox = f"{agent_prefix(Family.INBOX, me)}.{session.instance}."
            kinds.append({one.removeprefix(inbox).split(".")[0] for one in yard.subjects})

    await asyncio.wait_for(yard.keeper.drain(10, other), 30)
    # Answers of the broker, of peers, and what a puller may ask for that was not told to stop.
    assert [one - {"pull"} for one in kinds] == [{"api", "rpc"}] * 2
    assert not yard.keeper.connected
    assert not yard.connections


async def test_a_connection_that_was_being_made_is_given_up_and_the_old_one_stays(yard: Yard) -> None:
    entered, old = asyncio.Event(), await yard.keeper.session(1)

    async def slow(_session: Session) -> None:
        entered.set()
        await anyio.sleep_forever()

    async def other() -> None:
        await asyncio.sleep(0.05)
        assert len(yard.connections) == 1
        assert await yard.keeper.session(1) is old

    yard.keeper.on_session(slow)
    yard.keeper._rotated.set()
    await asyncio.wait_for(entered.wait(), 30)
    await asyncio.wait_for(yard.keeper.drain(10, other), 30)
    assert not yard.connections


async def test_it_ends_in_time_although_there_is_no_broker(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_client: MemoryClient) -> None:
        raise OSError

    monkeypatch.setattr(yard.bus.broker, "attach", refused)
    draining = asyncio.ensure_future(yard.keeper.drain(10, anyio.sleep_forever))
    await asyncio.sleep(0.01)
    await yard.lose()
    await yard.bus.clock.advance(9)
    assert not draining.done()
    await yard.bus.clock.advance(1.1)
    await asyncio.wait_for(draining, 30)
    assert not yard.keeper.connected
