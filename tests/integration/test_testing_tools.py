"""The testing tools that need a real broker, and the in-memory broker compared with the real one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client

from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.testing.memory_broker import MemoryBroker
from agentweave_bus.testing.memory_client import MemoryClient
from tests.integration.broker_script import RIGHTS, SCENES, Side

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def real(folder: Path) -> AsyncIterator[Side]:
    users = [
        {"user": "admin", "password": "a"},
        {"user": "worker", "password": "w", "permissions": RIGHTS},
    ]
    config = {"jetstream": {"store_dir": str(folder / "js")}, "authorization": {"users": users}}
    async with NatsServer(json.dumps(config), folder) as server:
        refused: asyncio.Queue[str] = asyncio.Queue()

        async def error(problem: Exception) -> None:
            refused.put_nowait(str(problem))

        admin, worker = Client(), Client()
        await admin.connect(server.url, user="admin", password="a")
        await worker.connect(server.url, user="worker", password="w", error_cb=error)
        try:
            yield Side(admin, worker, refused)
        finally:
            await admin.close()
            await worker.close()


@asynccontextmanager
async def in_memory() -> AsyncIterator[Side]:
    broker = MemoryBroker(time.time_ns)
    broker.set_users([{"user": "worker", "permissions": RIGHTS}])
    refused: asyncio.Queue[str] = asyncio.Queue()

    async def error(problem: Exception) -> None:
        refused.put_nowait(str(problem))

    admin, worker = MemoryClient(broker), MemoryClient(broker, "worker")
    await admin.connect()
    await worker.connect(error_cb=error)
    try:
        yield Side(admin, worker, refused)
    finally:
        await broker.close()


@pytest.mark.parametrize("scene", SCENES)
async def test_the_in_memory_broker_does_what_the_real_one_does(scene: str, tmp_path: Path) -> None:
    async with real(tmp_path) as theirs, in_memory() as ours:
        expected, found = await asyncio.gather(SCENES[scene](theirs), SCENES[scene](ours))
    assert len(expected) >= 3
    assert found == expected
