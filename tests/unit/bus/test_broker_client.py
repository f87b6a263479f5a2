"""The library's client as the bus uses it, beside a broker that only notes the order of what it is sent."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.connection import BrokerClient
from tests.listening import listening

pytestmark = pytest.mark.anyio

INFO = b'INFO {"server_id":"s","version":"2.15.1","max_payload":1048576,"proto":1}\r\n'


class Notes:
    """Greets, answers pings, and notes the verb of each line."""

    def __init__(self) -> None:
        self.verbs: list[str] = []

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while line := await reader.readline():
            self.verbs.append(line.split()[0].decode())
            if self.verbs[-1] == "PING":
                writer.write(b"PONG\r\n")
        writer.close()


async def received(_message):
    pass


async def test_draining_ends_with_a_round_trip_after_the_broker_was_told():
    """Else it goes on giving messages to a subscription that nobody reads any more."""
    notes = Notes()
    async with listening(notes.connected) as port:
        client = BrokerClient()
        await client.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
        subscription = await client.subscribe("served", cb=received)
        await client.flush()
        notes.verbs.clear()
        await subscription.drain()
        said = list(notes.verbs)
        await client.close()
    assert said[-1] == "PING"
    assert "UNSUB" in said
