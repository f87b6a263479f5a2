"""The bus in memory: what goes through it is what goes through a real one, and faults are faults."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from agentweave_bus import Agent, SecureAgent, capability
from agentweave_bus.authz import verify_audit
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    FederationError,
    NoResponderError,
)
from agentweave_bus.testing import Bus, MemoryBus, MockIdentityProvider, TrustDomain
from agentweave_bus.testing.memory_client import MemoryClient
from tests.unit.testing.agents import STOCK, OrderAgent, StockAgent

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stock(bus: Bus) -> StockAgent:
    await bus.grant("client/cli", "agent/stock", "*")
    return await bus.start(StockAgent)


async def test_a_call_is_signed_decided_and_recorded_at_both_ends(bus: Bus, stock: StockAgent) -> None:
    client = await bus.client()
    result = await client.call(STOCK, "reserve", {"sku": "widget", "quantity": 2})
    assert result.data == {"reserved": 2}
    assert stock.reserved == [client.spiffe_id]
    (sent,) = bus.audit("client/cli", event="call")
    admitted, outcome = bus.audit(stock, digest=sent["digest"])
    assert (admitted["event"], admitted["allowed"], admitted["caller"]) == (
        "admission",
        True,
        client.spiffe_id,
    )
    assert outcome["status"] == "completed"
    assert admitted["input"]["context"]["payload"] == {"sku": "widget", "quantity": 2}
    report = verify_audit([bus.folder / "audit"])
    assert report.ok


async def test_delegation_is_proved_through_both_agents(bus: Bus, stock: StockAgent) -> None:
    await bus.grant("client/cli", "agent/order", "create_order")
    await bus.grant("agent/order", "agent/stock", "reserve", on_behalf_of="spiffe://test.local/client/cli")
    order = await bus.start(OrderAgent)
    client = await bus.client()
    await client.call(order.spiffe_id, "create_order", {"sku": "widget"})
    (admitted,) = bus.audit(stock, event="admission")
    (link,) = admitted["input"]["context"]["via"]
    assert link["iss"] == client.spiffe_id


@pytest.mark.parametrize("allowed_by_broker", [False, True])
async def test_what_is_not_granted_is_refused(
    bus: MemoryBus, stock: StockAgent, *, allowed_by_broker: bool
) -> None:
    stranger = await bus.client("client/stranger")
    with pytest.raises(AuthorizationError) as denied:
        await stranger.call(STOCK, "reserve", {"sku": "widget"})
    assert denied.value.direction == "outbound"
    # Past its own policy it meets the broker; past that, the agent's.
    stranger._connected().authorizer._default_action = "log-only"  # type: ignore[assignment]
    if allowed_by_broker:
        for connection in bus.broker.clients:
            connection.user = None
    with pytest.raises(AuthorizationError) as denied:
        await stranger.call(STOCK, "reserve", {"sku": "widget"})
    assert denied.value.direction == ("inbound" if allowed_by_broker else "broker")
    assert len(bus.audit(stock, event="refusal", step_name="authorization")) == allowed_by_broker
    assert stock.reserved == []


async def test_a_forged_frame_does_not_get_through(bus: MemoryBus, stock: StockAgent) -> None:
    raw = MemoryClient(bus.broker)
    await raw.connect()
    await raw.publish(call_subject(bus.id("agent/stock"), "reserve"), b"\x96\x01not a frame", "x")
    await bus.clock.advance(0)
    (refusal,) = bus.audit(stock, event="refusal")
    assert refusal["step_name"] == "frame"
    # Somebody else's certificate under the right name.
    forger = MockIdentityProvider("spiffe://test.local/client/cli", trust_domain=TrustDomain("test.local"))
    connecting = asyncio.create_task(bus.client(identity_provider=forger))
    await bus.clock.advance(60)  # it gives up at some time
    with pytest.raises(BusError, match=r"can't connect.*no authority of that bundle signed it"):
        await connecting
    await raw.close()


async def test_a_copied_frame_runs_once(bus: MemoryBus, stock: StockAgent) -> None:
    heard: list[Any] = []

    async def hear(message: Any) -> None:
        heard.append(message)

    raw = MemoryClient(bus.broker)
    await raw.connect()
    await raw.subscribe("aw.call.>", cb=hear)
    client = await bus.client()
    await client.call(STOCK, "reserve", {"sku": "widget"})
    await raw.publish(heard[0].subject, heard[0].data, heard[0].reply)
    await bus.clock.advance(0)
    assert [one["step_name"] for one in bus.audit(stock, event="refusal")] == ["replay"]
    # Also by a replica, which has never seen it: the claim says so.
    await bus.stop(stock)
    again = await bus.start(StockAgent)
    await raw.publish(heard[0].subject, heard[0].data, heard[0].reply)
    await bus.clock.advance(0.1)
    assert len(bus.audit(stock, event="refusal", step_name="replay")) == 2
    assert again.reserved == []
    await raw.close()


async def test_grants_hold_when_grant_returns(bus: Bus) -> None:
    await bus.start(StockAgent)
    client = await bus.client()
    for _ in range(2):
        with pytest.raises(AuthorizationError):
            await client.call(STOCK, "look")
        await bus.grant("client/*", "agent/stock", "look")
        assert (await client.call(STOCK, "look")).data == {"left": 3}
        await bus.set_grants({"grants": []})


async def test_no_policy_no_call(bus: Bus, stock: StockAgent) -> None:
    client = await bus.client()
    await client.call(STOCK, "look")  # has a standing answer from now on
    with bus.opa_down():
        with pytest.raises(AuthorizationError, match="taken it down"):
            await client.call(STOCK, "look")
        # The callee can't ask, either.
        client._connected().authorizer._engine._switch = type(bus._switch)()  # type: ignore[union-attr]
        with pytest.raises(AuthorizationError) as denied:
            await client.call(STOCK, "look")
        assert denied.value.direction == "inbound"
    assert (await client.call(STOCK, "look")).data == {"left": 3}


async def test_a_rotation_loses_no_call(bus: MemoryBus, stock: StockAgent) -> None:
    client = await bus.client()
    old = bus.domain().bundle
    under_way = asyncio.create_task(client.call(STOCK, "wait"))
    await stock.entered.wait()
    await bus.rotate_ca()
    assert bus.domain().bundle.authority_fingerprints.isdisjoint(old.authority_fingerprints)
    stock.gate.set()
    assert (await under_way).data == {"waited": True}
    assert (await client.call(STOCK, "reserve", {"sku": "widget"})).data == {"reserved": 1}
    assert len(stock.svids) == 1


async def test_who_misses_a_rotation_is_out(bus: MemoryBus, stock: StockAgent) -> None:
    client = await bus.client()
    (provider,) = (one for one in bus.domain()._providers if one.get_spiffe_id() == client.spiffe_id)
    svid = await provider.get_svid()
    bus.domain().rotate_ca()
    provider.replace(svid)  # as if the news had not reached it
    await bus.clock.advance(1)
    call = asyncio.create_task(client.call(STOCK, "look", timeout=5))
    await bus.clock.advance(6)
    with pytest.raises(CallTimeoutError):
        await call
    assert {one["step_name"] for one in bus.audit(stock, event="refusal")} <= {"chain"}


async def test_a_killed_agent_answers_nobody(bus: Bus, stock: StockAgent) -> None:
    client = await bus.client()
    call = asyncio.create_task(client.call(STOCK, "wait", timeout=10))
    await stock.entered.wait()
    await bus.kill_worker(stock)
    await bus.clock.advance(11)
    with pytest.raises(CallTimeoutError):
        await call
    assert bus.audit(stock, event="outcome") == []
    call = asyncio.create_task(client.call(STOCK, "look", timeout=10))
    await bus.clock.advance(3)
    with pytest.raises(NoResponderError):
        await call


async def test_stopping_lets_calls_end(bus: Bus, stock: StockAgent) -> None:
    client = await bus.client()
    call = asyncio.create_task(client.call(STOCK, "wait"))
    await stock.entered.wait()
    stopping = asyncio.create_task(bus.stop(stock))
    await bus.clock.advance(1)
    stock.gate.set()
    assert (await call).data == {"waited": True}
    await stopping
    assert stock.stopped


async def test_running_stops_at_the_end_of_its_block(bus: Bus) -> None:
    await bus.grant("client/cli", "agent/stock", "look")
    client = await bus.client()
    async with bus.running(StockAgent) as stock:
        assert (await client.call(stock.spiffe_id, "look")).data == {"left": 3}
    assert stock.stopped
    with pytest.raises(AgentWeaveError, match="not running"):
        await bus.stop(stock)


async def test_replicas_share_calls(bus: Bus, stock: StockAgent) -> None:
    second = await bus.start(StockAgent)
    client = await bus.client()
    for _ in range(6):
        await client.call(STOCK, "reserve", {"sku": "widget"})
    assert (len(stock.reserved), len(second.reserved)) == (3, 3)


async def test_an_agent_of_plain_functions_and_of_another_domain(bus: MemoryBus) -> None:
    agent = Agent("pricing", trust_domain="partner.io")

    @agent.capability("quote", safe=True)
    async def quote() -> dict[str, int]:
        return {"price": 3}

    assert agent.config.identity.allowed_trust_domains == ("partner.io",)
    await bus.grant("client/cli", "spiffe://partner.io/agent/pricing", "quote")
    await bus.start(agent)
    client = await bus.client()
    with pytest.raises(FederationError):
        await client.call(agent.spiffe_id, "quote")
    theirs = await bus.client("spiffe://partner.io/client/cli")
    await bus.grant(theirs, agent, "quote")
    assert (await theirs.call(agent.spiffe_id, "quote")).data == {"price": 3}


async def test_a_configuration_of_ones_own(bus: Bus, tmp_path: Path) -> None:
    file = tmp_path / "stock.yaml"
    file.write_text(
        "agent: {name: shelf, trust_domain: test.local}\n"
        "authorization: {provider: opa, opa_endpoint: 'unix:///run/opa.sock', audit: {redact: [sku]}}\n"
        "bus: {max_in_flight: 3}\n"
    )
    await bus.grant("client/cli", "agent/shelf", "reserve")
    shelf = await bus.start(StockAgent, config=file)
    assert (shelf.name, shelf.config.bus.max_in_flight) == ("shelf", 3)
    client = await bus.client()
    await client.call(shelf.spiffe_id, "reserve", {"sku": "widget"})
    (record,) = bus.audit("agent/shelf", event="admission")
    assert record["input"]["context"]["payload"]["sku"] != "widget"


async def test_a_policy_of_ones_own_is_copied(tmp_path: Path) -> None:
    grants = tmp_path / "grants.yaml"
    text = (
        f"grants: [{{caller: 'spiffe://test.local/client/cli', callee: '{STOCK}', capabilities: [look]}}]\n"
    )
    grants.write_text(text)
    async with MemoryBus(policy=grants) as bus:
        await bus.start(StockAgent)
        client = await bus.client()
        assert (await client.call(STOCK, "look")).data == {"left": 3}
        await bus.set_grants({"grants": []})
        folder = bus.folder
    assert grants.read_text() == text
    assert not folder.exists()
    with pytest.raises(AgentWeaveError, match="closed"):
        await bus.client()


async def test_what_keeps_an_agent_from_running_is_told(bus: Bus) -> None:
    class BrokenAgent(StockAgent):
        async def on_start(self) -> None:
            raise RuntimeError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        await bus.start(BrokenAgent)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            lambda bus: bus.start({"name": "stock"}),
            "takes a subclass of SecureAgent or an agent, not an object of dict",
        ),
        (lambda bus: bus.start(dict), "not the class dict"),
        (lambda bus: bus.grant("client/cli", "agent/stock"), 'or "\\*" for all capabilities'),
        (lambda bus: bus.grant("cli", "agent/stock", "look"), "did you mean 'agent/cli' or 'client/cli'"),
        (
            lambda bus: bus.client("cli"),
            "did you mean 'client/cli'\\? If it is spiffe://test.local/cli, write",
        ),
    ],
)
async def test_what_is_meant_otherwise_is_told(
    bus: Bus, wrong: Callable[[Bus], Awaitable[object]], told: str
) -> None:
    with pytest.raises(AgentWeaveError, match=told):
        await wrong(bus)


class CircleAgent(SecureAgent):
    """Asks itself, as two agents may that each think that the other knows."""

    @capability("ask")
    async def ask(self) -> dict[str, Any]:
        try:
            return (await self.call_agent(self.config.agent.spiffe_id, "ask", {})).data
        except CallRefusedError as error:
            return {"handed on": len(self.context.via), "error": str(error)}


async def test_a_circle_ends_after_eight_links(bus: Bus) -> None:
    await bus.grant("client/cli", CircleAgent, "ask")
    await bus.grant(CircleAgent, CircleAgent, "ask")
    circle = await bus.start(CircleAgent)
    result = await (await bus.client()).call(circle.spiffe_id, "ask")
    assert result.data["handed on"] == 8
    assert "the call can't be sealed: a request is delegated at most 8 times" in result.data["error"]


async def test_who_is_named_whole_or_by_a_prefix(bus: Bus) -> None:
    await bus.grant("client/*", "spiffe://test.local/stock", "look")
    (entry,) = bus.grants.grants
    assert entry.caller == ("spiffe://test.local/client/*",)
    assert entry.callee == ("spiffe://test.local/stock",)


async def test_wrong_arguments_are_told_to_who_may_call(bus: Bus, stock: StockAgent) -> None:
    client = await bus.client()
    with pytest.raises(CallRefusedError, match="quantity") as refused:
        await client.call(STOCK, "reserve", {"sku": "widget", "quantity": "two"})
    assert refused.value.step == "payload"


async def test_an_unknown_user_is_not_let_in(bus: MemoryBus) -> None:
    with pytest.raises(nats.errors.AuthorizationError):
        await MemoryClient(bus.broker, "spiffe://test.local/client/nobody").connect()


async def test_a_connection_that_is_lost_leaves_nothing_running(bus: MemoryBus) -> None:
    async def hear(_message: Any) -> None:
        """Nothing comes."""

    before = asyncio.all_tasks()
    raw = MemoryClient(bus.broker)
    await raw.connect()
    await raw.subscribe("aw.call.>", cb=hear)
    mine = asyncio.all_tasks() - before
    assert len(mine) == 3
    raw.cut()
    await asyncio.wait_for(asyncio.wait(mine), 30)
    await raw.close()
    assert raw.is_closed


@pytest.mark.slow  # hours of everybody's polling
async def test_svids_are_renewed_by_the_clock_and_expire_by_it(bus: MemoryBus, stock: StockAgent) -> None:
    client = await bus.client()
    await bus.clock.advance(timedelta(minutes=35))
    assert len(stock.svids) == 1
    assert (await client.call(STOCK, "look")).data == {"left": 3}
    for provider in bus.domain()._providers:
        provider.renew = lambda: None  # type: ignore[method-assign]  # the authority is gone
    await bus.clock.advance(timedelta(minutes=57))
    with pytest.raises(AgentWeaveError):
        await client.call(STOCK, "look")


async def test_everyone_goes_by_the_clock(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/stock", "reserve", limits={"max_per_minute": 1})
    await bus.grant("client/cli", "agent/stock", "remaining")
    stock = await bus.start(StockAgent)
    client = await bus.client()
    await bus.clock.advance(600)
    assert 19 < (await client.call(stock.spiffe_id, "remaining", timeout=20)).data["seconds"] <= 20
    await client.call(stock.spiffe_id, "reserve", {"sku": "widget"})
    with pytest.raises(AuthorizationError, match="max_per_minute"):
        await client.call(stock.spiffe_id, "reserve", {"sku": "widget"})
    await bus.clock.advance(61)
    await client.call(stock.spiffe_id, "reserve", {"sku": "widget"})
    assert bus.audit(stock, event="outcome")[-1]["ts"] >= (bus.clock.now().timestamp() - 60) * 1000


async def test_a_breaker_lets_calls_by_again_in_time(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/stock", "look")
    client = await bus.client()
    while True:
        call = asyncio.create_task(client.call(STOCK, "look", timeout=10))
        await bus.clock.advance(3)
        try:
            await call
        except CircuitOpenError:
            break
        except NoResponderError:
            continue
    stock = await bus.start(StockAgent)
    with pytest.raises(CircuitOpenError):
        await client.call(stock.spiffe_id, "look")
    await bus.clock.advance(31)
    assert (await client.call(stock.spiffe_id, "look")).data == {"left": 3}
