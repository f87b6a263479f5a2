"""Delayed tasks that the control role gives up are told to whoever counts them."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import parked_stream_name
from agentweave_bus.control.composition import composed_role
from agentweave_bus.observability.metrics import DeadCause
from agentweave_bus.testing import MemoryBus, memory_bus

pytestmark = pytest.mark.anyio


class Clockwork(SecureAgent):
    """Strikes when told to."""

    @capability("strike")
    async def strike(self) -> None:
        """Do nothing."""


async def test_what_is_parked_and_signed_by_nobody_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, DeadCause]] = []
    counted = partial(composed_role, on_given_up=lambda name, cause: told.append((name, cause)))
    monkeypatch.setattr(memory_bus, "composed_role", counted)
    async with MemoryBus() as bus:
        await bus.grant("client/cli", "agent/clockwork", "strike")
        await bus.start(Clockwork)
        cli = await bus.client("client/cli")
        await cli.submit(str(bus.id("agent/clockwork")), "strike", {}, delay=3600)
        stream = bus.broker.jetstream.streams[parked_stream_name(bus.id("agent/clockwork"))]
        (genuine,) = stream.messages.values()
        stream.store(genuine.subject, b"signed by nobody", None)
        await bus.clock.advance(31)  # it looks every half a minute
        async with asyncio.timeout(30):
            while not told:  # noqa: ASYNC110 - the control role tells nobody else
                await asyncio.sleep(0.01)
    assert told == [("strike", DeadCause.UNVERIFIED)]
