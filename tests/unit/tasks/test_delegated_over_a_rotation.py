"""Tasks that somebody hands on while he works for another, and that wait while their authority is replaced."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
DELAY = 120


class Front(SecureAgent):
    """Hands on what it is asked for."""

    @capability("hand_on")
    async def hand_on(self, name: str, delay: int) -> str:
        handle = await self.submit_agent(
            str(self.spiffe_id).replace("front", "back"), "work", {"name": name}, delay=delay or None
        )
        return handle.reference


class Back(SecureAgent):
    """Does one thing after the other, each when it is let."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.turns: asyncio.Queue[None] = asyncio.Queue()
        self.ran: asyncio.Queue[str] = asyncio.Queue()

    @capability("work", concurrency=1)
    async def work(self, name: str) -> str:
        await self.turns.get()
        self.ran.put_nowait(name)
        return name


@pytest.fixture
async def back(bus: MemoryBus) -> Back:
    await bus.grant("client/cli", "agent/front", "hand_on")
    await bus.grant("client/cli", "agent/back", "work")
    await bus.grant("agent/front", "agent/back", "work")
    await bus.start(Front)
    return await bus.start(Back)


async def ran(back: Back) -> str:
    back.turns.put_nowait(None)
    return await asyncio.wait_for(back.ran.get(), PATIENCE)


async def replace_authority(bus: MemoryBus) -> None:
    """Replace everybody's authority; returns when no agent trusts the one before any more."""
    await bus.rotate_ca()
    bundles = [one.source.bundle_for for one in bus._connected()]
    async with asyncio.timeout(PATIENCE):
        while any(len(one(bus.trust_domain).authority_fingerprints) > 1 for one in bundles):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


def link_seen(bus: MemoryBus) -> dict[str, Any]:
    """What the policy of who did the work saw of who had asked for it."""
    admission = bus.audit("agent/back", event="admission", action="work")[-1]
    assert admission["caller"] == str(bus.id("agent/front"))
    (link,) = admission["input"]["context"]["via"]
    return dict(link)


async def test_it_runs_and_the_policy_is_told_that_who_asked_has_expired(bus: MemoryBus, back: Back) -> None:
    cli = await bus.client("client/cli")
    await cli.submit(str(back.spiffe_id), "work", {"name": "first"})
    async with asyncio.timeout(PATIENCE):
        while not bus.audit("agent/back", event="admission", action="work"):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
    await cli.call(str(bus.id("agent/front")), "hand_on", {"name": "handed on", "delay": 0})
    await replace_authority(bus)
    assert await ran(back) == "first"
    assert await ran(back) == "handed on"
    link = link_seen(bus)
    assert (link["iss"], link["sender_expired"]) == (str(bus.id("client/cli")), True)
    assert bus.audit("agent/back", event="refusal") == []


async def test_also_when_it_was_delayed(bus: MemoryBus, back: Back) -> None:
    """The control role vouches for the two of them, whose authority is gone when it signs."""
    cli = await bus.client("client/cli")
    await cli.call(str(bus.id("agent/front")), "hand_on", {"name": "later", "delay": DELAY})
    await replace_authority(bus)
    await bus.clock.advance(DELAY + 1)
    assert await ran(back) == "later"
    assert link_seen(bus)["sender_expired"]
