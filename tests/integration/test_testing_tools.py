"""The testing tools that need a real broker, and the in-memory broker compared with the real one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client

from agentweave_bus.embedded.durable_bus import DurableBus
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.exceptions import AuthorizationError, ChainRefusedError, NoResponderError
from agentweave_bus.identity.chain import verify_chain
from agentweave_bus.testing.memory_broker import MemoryBroker
from agentweave_bus.testing.memory_client import MemoryClient
from tests.integration.broker_script import RIGHTS, SCENES, Side
from tests.integration.broker_task_script import TASK_SCENES
from tests.integration.stock_worker import StockAgent
from tests.unit.testing.testing_page import files

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


ALL_SCENES = SCENES | TASK_SCENES


@pytest.mark.parametrize("scene", ALL_SCENES)
async def test_the_in_memory_broker_does_what_the_real_one_does(scene: str, tmp_path: Path) -> None:
    """Scenes turn on fractions of a second, in which a machine may be elsewhere: what differs does it always."""
    found, expected, plays = None, [], 0
    while found != expected and plays < 3:
        plays += 1
        async with real(tmp_path / str(plays)) as theirs, in_memory() as ours:
            expected, found = await asyncio.gather(ALL_SCENES[scene](theirs), ALL_SCENES[scene](ours))
    assert len(expected) >= 3
    assert found == expected


STOCK_CLASS = "tests.integration.stock_worker:StockAgent"


@pytest.mark.slow
def test_the_page_runs_as_its_reader_copies_it(tmp_path: Path) -> None:
    """Nothing of this repository's own tests is there to help: no fixture, no setting, no folder."""
    for name, text in files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON"))},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    tests = re.findall(r"^(?:async )?def test_", "".join(files().values()), re.MULTILINE)
    assert len(tests) >= 10
    assert f" {len(tests)} passed in " in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
async def test_a_durable_bus_is_a_bus(durable_bus: DurableBus) -> None:
    """One bus for all of this, because opening it takes seconds."""
    await durable_bus.grant("client/cli", "agent/stock", "*")
    stock = await durable_bus.start(StockAgent)
    client = await durable_bus.client()
    assert (await client.call(stock.spiffe_id, "reserve", {"sku": "w"})).data == {"reserved": 1}
    assert [one["event"] for one in durable_bus.audit(stock)] == ["start", "admission", "outcome"]

    # A worker of its own process is a replica: the queue group has both.
    worker = await durable_bus.start_worker(STOCK_CLASS)
    pids = set()
    async with asyncio.timeout(30):
        while len(pids) < 2:
            pids.add((await client.call(stock.spiffe_id, "process")).data["pid"])
    assert pids == {os.getpid(), worker.pid}

    # Who comes later is let in, and grants hold at once: for its policy and for the broker.
    late = await durable_bus.client("client/late")
    with pytest.raises(AuthorizationError):
        await late.call(stock.spiffe_id, "process")
    await durable_bus.grant("client/late", stock, "process")
    assert (await late.call(stock.spiffe_id, "process")).status == "completed"

    with durable_bus.opa_down(), pytest.raises(AuthorizationError, match="taken it down"):
        await client.call(stock.spiffe_id, "process")

    # A new authority: everybody goes on, and what the old one signed is trusted no more.
    old = durable_bus.stack.api.authority.bundle
    stale = durable_bus.stack.api.authority.issue(client.spiffe_id)
    await durable_bus.rotate_ca()
    bundle = durable_bus.stack.api.authority.bundle
    assert bundle.authority_fingerprints.isdisjoint(old.authority_fingerprints)
    with pytest.raises(ChainRefusedError):
        verify_chain(stale.cert_chain, bundle, at_ms=time.time_ns() // 1_000_000)
    assert (await client.call(stock.spiffe_id, "reserve", {"sku": "w"})).data == {"reserved": 1}

    await durable_bus.kill_worker(worker)
    assert not worker.running
    await durable_bus.kill_worker(stock)
    with pytest.raises(NoResponderError):
        await client.call(stock.spiffe_id, "process")
