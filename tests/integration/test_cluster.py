"""Three nats-servers of one's own as a cluster: what was accepted is done once, whichever server dies."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

import anyio
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.streams import state_stream_name, tasks_stream_name
from agentweave_bus.control.broker import broker_id
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.envelope import EnvelopeVerifier, Kind, control_role, decode_payload
from agentweave_bus.exceptions import AgentCallError
from agentweave_bus.identity import ChainVerifier, IdentitySource
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Fixed, until
from tests.integration.own_brokers import deployment, free_ports

pytestmark = pytest.mark.anyio

DOMAIN = "own.test"
STOCK = SpiffeID(f"spiffe://{DOMAIN}/agent/stock")
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")
OTHER = SpiffeID(f"spiffe://{DOMAIN}/client/other")
NAMES = ("nats-1", "nats-2", "nats-3")
TASKS = 300
AT_ONCE = 16
PATIENCE = 60.0


@asynccontextmanager
async def cluster(place):
    """The three servers of ``nats/cluster.conf``, by their names, with their users."""
    routes = dict(zip(NAMES, free_ports(3), strict=True))
    texts = {name: place.server("cluster", name, routes=routes) for name in NAMES}
    place.make_users(*NAMES)
    async with AsyncExitStack() as stack:
        servers = {name: NatsServer(text, place.folder / name) for name, text in texts.items()}
        for one in servers.values():
            await stack.enter_async_context(one)
        place.servers = [f"tls://127.0.0.1:{one.port}" for one in servers.values()]
        yield servers


class Reader:
    """Asks the cluster about its streams, as the control role."""

    def __init__(self, keeper, verifier):
        self.keeper = keeper
        self.verifier = verifier

    async def ask(self, subject, body=None):
        """Ask until there is an answer: whoever leads may have gone just now."""
        with anyio.fail_after(PATIENCE):
            while True:
                try:
                    session = await self.keeper.session(PATIENCE)
                    data = b"" if body is None else json.dumps(body).encode()
                    answer = json.loads((await session.ask(subject, data, timeout_s=5)).data)
                except (AgentCallError, TimeoutError, ValueError):
                    continue
                if "error" not in answer:
                    return answer
                await asyncio.sleep(0.1)  # there is no event of an election

    async def leader(self, stream):
        while True:
            if name := (await self.info(stream))["cluster"].get("leader"):
                return name
            await asyncio.sleep(0.1)

    async def info(self, stream):
        return await self.ask(f"$JS.API.STREAM.INFO.{stream}")

    async def all_current(self, stream):
        """Wait until every server has all of a stream."""
        with anyio.fail_after(PATIENCE):
            while True:
                others = (await self.info(stream))["cluster"]["replicas"]
                if len(others) == 2 and all(one["current"] for one in others):
                    return
                await asyncio.sleep(0.1)

    async def ended(self, agent):
        """How often each task has a genuine record that it is completed, by what its subject names it."""
        stream, found = state_stream_name(agent), Counter()
        state = (await self.info(stream))["state"]
        for sequence in range(state["first_seq"], state["last_seq"] + 1):
            stored = (await self.ask(f"$JS.API.STREAM.MSG.GET.{stream}", {"seq": sequence}))["message"]
            now_ms = time.time_ns() // 1_000_000
            opened = self.verifier.open_stored(
                b64decode(stored["data"]), now_ms=now_ms, stored_at_ms=_ms(stored["time"])
            )
            assert (opened.head.kind, opened.head.iss) == (Kind.RECORD, agent)
            if decode_payload(opened.payload).get("state") == "completed":
                found[stored["subject"].split(".")[-2]] += 1
        return found


def _ms(text):
    """Read a time of the broker, rounded up to the second's end."""
    return int(datetime.fromisoformat(text[:19] + "+00:00").timestamp() * 1000) + 999


@asynccontextmanager
async def reader(place):
    svid = place.authority.issue(control_role(DOMAIN))
    source = IdentitySource(Fixed(svid, place.authority.bundle))
    await source.start(5)
    chains = ChainVerifier(source)
    keeper = Keeper(source, chains, BusAddress(place.servers, broker_id(DOMAIN)), name="reader")
    async with keeper.open(deadline_s=PATIENCE):
        yield Reader(keeper, EnvelopeVerifier(chains))
    await source.aclose()


class Load:
    """Tasks that are submitted until each is accepted, some at once."""

    def __init__(self, client):
        self.client = client
        self.accepted = []
        self.reached = {count: anyio.Event() for count in (TASKS // 3, 2 * TASKS // 3)}

    async def run(self):
        numbers = iter(range(TASKS))
        async with anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(self._submit, numbers)

    async def _submit(self, numbers):
        for number in numbers:
            while True:
                try:
                    task = await self.client.submit(
                        str(STOCK),
                        "reserve",
                        {"sku": "chair", "quantity": number},
                        idempotency_key=f"task-{number}",
                    )
                    break
                except AgentCallError:
                    await asyncio.sleep(0.2)
            self.accepted.append((number, task))
            if (event := self.reached.get(len(self.accepted))) is not None:
                event.set()


@pytest.mark.slow
async def test_every_accepted_task_is_completed_once_though_its_leader_is_killed(tmp_path):
    async with deployment(tmp_path, DOMAIN, STOCK, CLI, OTHER) as place:
        place.grant({"caller": str(CLI), "callee": str(STOCK), "capabilities": ["reserve"]})
        async with cluster(place) as servers:
            control = await place.start("control", place.control_file(streams={"replicas": 3}))
            assert control.said.startswith("ready"), control.log.read_text()
            agent = {"class": "tests.integration.stock_worker:StockAgent"}
            file = place.participant(STOCK, agent=agent)
            workers = [await place.start("serve", file) for _ in range(2)]
            assert all(one.said.startswith("ready") for one in workers), workers[0].log.read_text()
            async with AgentWeaveClient(place.participant(CLI)) as client, reader(place) as looks:
                load = Load(client)
                with anyio.fail_after(2 * PATIENCE):
                    async with anyio.create_task_group() as group:
                        group.start_soon(load.run)
                        await load.reached[TASKS // 3].wait()
                        killed = servers[await looks.leader(tasks_stream_name(STOCK))]
                        await killed.kill()
                        await load.reached[2 * TASKS // 3].wait()
                        await killed.start()
                assert len(load.accepted) == TASKS
                for number, task in load.accepted:
                    assert (await task.result(timeout=PATIENCE)).data == {"reserved": number}
                for stream in (tasks_stream_name(STOCK), state_stream_name(STOCK)):
                    await looks.all_current(stream)
                    assert (await looks.info(stream))["config"]["num_replicas"] == 3
                counts = await looks.ended(STOCK)
            assert len(counts) == TASKS
            assert set(counts.values()) == {1}
            # Users made anew are taken while everything runs.
            place.grant({"caller": str(OTHER), "callee": str(STOCK), "capabilities": ["reserve"]})
            place.make_users(*NAMES)
            for one in servers.values():
                await one.reload()
            async with AgentWeaveClient(place.participant(OTHER)) as client:
                await client.submit(str(STOCK), "reserve", {"sku": "table"})
            assert [await one.stop() for one in (*workers, control)] == [0, 0, 0]


async def test_no_server_is_let_into_a_cluster_with_the_certificate_of_an_agent(tmp_path):
    async with deployment(tmp_path, DOMAIN, STOCK) as place:
        place.grant()
        routes = dict(zip(NAMES, free_ports(3), strict=True))
        one = place.server("cluster", "nats-1", routes=routes)
        stranger = place.server("cluster", "nats-2", routes=routes, shows=STOCK)
        place.make_users("nats-1", "nats-2")
        server, other = NatsServer(one, tmp_path / "nats-1"), NatsServer(stranger, tmp_path / "nats-2")
        async with server, other:
            await until(
                lambda: any("Authentication Failure" in line for line in server.log_tail), "a refusal"
            )
