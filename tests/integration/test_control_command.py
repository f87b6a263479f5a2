"""``agentweave control`` at a plain nats-server: durable tasks without the embedded stack."""

from __future__ import annotations

import json
import signal
from contextlib import asynccontextmanager

import anyio.to_thread
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import until
from tests.integration.own_brokers import deployment
from tests.integration.scraping import fetched, samples

pytestmark = pytest.mark.anyio

DOMAIN = "own.test"
STOCK = SpiffeID(f"spiffe://{DOMAIN}/agent/stock")
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")
MADE = f"{STOCK} serves durable tasks (process, reserve): made what it needs"


@asynccontextmanager
async def own_broker(folder):
    """A deployment with ``nats/single.conf`` and its users."""
    async with deployment(folder, DOMAIN, STOCK, CLI) as place:
        place.grant({"caller": str(CLI), "callee": str(STOCK), "capabilities": ["reserve"]})
        configuration = place.server("single", "broker")
        place.make_users("broker")
        async with NatsServer(configuration, folder / "broker") as nats:
            place.servers = [f"tls://127.0.0.1:{nats.port}"]
            yield place


async def ready(place, *words):
    process = await place.start(*words)
    assert process.said.startswith("ready"), process.log.read_text()
    return process


async def is_well(url):
    """The control role says so, and for how long its SVID is valid from the start."""
    status, text = await anyio.to_thread.run_sync(fetched, url.replace("/metrics", "/readyz"))
    assert (status, json.loads(text)) == (200, {"ok": True, "connected": True, "identity": True})
    _, text = await anyio.to_thread.run_sync(fetched, url)
    shown = {one.name: one.value for one in samples(text)}
    assert 0 < shown["agentweave_svid_valid_seconds"] < 86_400
    assert shown["agentweave_certificate_expiry_timestamp_seconds"] > 0


def worker_file(place):
    return place.participant(STOCK, agent={"class": "tests.integration.stock_worker:StockAgent"})


@pytest.mark.slow  # four processes of its own
async def test_a_task_is_done_at_a_broker_of_ones_own_with_two_control_roles(tmp_path):
    async with own_broker(tmp_path) as place:
        one, other = [
            await ready(place, "control", place.control_file(name, observability={"metrics": {"port": 0}}))
            for name in ("control", "other")
        ]
        await is_well(one.said.split()[1])
        # The one that made the claims goes: the other is enough.
        assert await one.stop() == 0, one.log.read_text()
        worker = await ready(place, "serve", worker_file(place))
        async with AgentWeaveClient(place.participant(CLI)) as client:
            task = await client.submit(str(STOCK), "reserve", {"sku": "chair"})
            result = await task.result(timeout=30)
        assert result.data == {"reserved": 1}
        assert await worker.stop() == 0, worker.log.read_text()
        assert await other.stop() == 0, other.log.read_text()
        said = other.log.read_text()
        assert MADE in said
        assert "Traceback" not in said


@pytest.mark.slow
async def test_streams_are_brought_in_line_when_it_starts_or_it_says_why_that_can_not_be(tmp_path):
    async with own_broker(tmp_path) as place:
        control = await ready(place, "control", place.control_file())
        await ready(place, "serve", worker_file(place))
        await until(lambda: MADE in control.log.read_text(), "the streams of the worker")
        assert await control.stop() == 0
        changed = await ready(place, "control", place.control_file(streams={"queue_tasks": 7}))
        assert f"(tasks for {STOCK}): update" in changed.log.read_text()
        assert await changed.stop(signal.SIGINT) == 0
        too_many = await place.start("control", place.control_file(streams={"replicas": 3}))
        assert (await too_many.process.wait(), too_many.said) == (2, "")
        said = too_many.log.read_text()
        assert (
            "can't be brought to its declared form: replicas > 1 not supported in non-clustered mode" in said
        )
        assert "Set streams.replicas to 1" in said
        assert "Traceback" not in said
