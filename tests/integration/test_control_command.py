"""``agentweave control`` at a plain nats-server: durable tasks without the embedded stack."""

from __future__ import annotations

import signal

import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.own_brokers import deployment

pytestmark = pytest.mark.anyio

DOMAIN = "own.test"
STOCK = SpiffeID(f"spiffe://{DOMAIN}/agent/stock")
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")


async def test_a_task_is_done_at_a_broker_of_ones_own_with_two_control_roles(tmp_path):
    async with deployment(tmp_path, DOMAIN, STOCK, CLI) as place:
        place.grant({"caller": str(CLI), "callee": str(STOCK), "capabilities": ["reserve"]})
        configuration = place.server("single", "broker")
        place.make_users("broker")
        async with NatsServer(configuration, tmp_path / "broker") as nats:
            place.servers = [f"tls://127.0.0.1:{nats.port}"]
            one, other = [
                await place.start("control", place.control_file(name)) for name in ("control", "other")
            ]
            assert one.said.startswith("ready"), one.log.read_text()
            assert other.said.startswith("ready"), other.log.read_text()
            # The one that made the claims goes: the other is enough.
            assert await one.stop() == 0, one.log.read_text()
            agent = {"class": "tests.integration.stock_worker:StockAgent"}
            worker = await place.start("serve", place.participant(STOCK, agent=agent))
            assert worker.said.startswith("ready"), worker.log.read_text()
            async with AgentWeaveClient(place.participant(CLI)) as client:
                task = await client.submit(str(STOCK), "reserve", {"sku": "chair"})
                result = await task.result(timeout=20)
            assert result.data == {"reserved": 1}
            assert await worker.stop() == 0, worker.log.read_text()
            assert await other.stop() == 0, other.log.read_text()
            changed = await place.start("control", place.control_file("changed", streams={"queue_tasks": 7}))
            assert changed.said.startswith("ready"), changed.log.read_text()
            assert await changed.stop(signal.SIGINT) == 0
            too_many = await place.start("control", place.control_file("many", streams={"replicas": 3}))
            assert (await too_many.process.wait(), too_many.said) == (2, "")
        said = other.log.read_text()
        assert f"{STOCK} serves durable tasks (process, reserve): made what it needs" in said
        assert "Traceback" not in said
        # What was there is brought in line when it starts, or it says why that can't be.
        assert f"(tasks for {STOCK}): update" in changed.log.read_text()
        refused = too_many.log.read_text()
        assert (
            "can't be brought to its declared form: replicas > 1 not supported in non-clustered mode"
            in refused
        )
        assert "Traceback" not in refused
