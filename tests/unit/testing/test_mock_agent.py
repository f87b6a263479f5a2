"""An agent's handlers alone: nothing succeeds that was not written or declared."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from agentweave_bus import Agent, SecureAgent, TaskFailedError, capability
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuthorizationError,
    NoResponderError,
    PayloadError,
)
from agentweave_bus.testing import MockSecureAgent
from agentweave_bus.types import TaskResult
from tests.unit.testing.agents import STOCK, OrderAgent, StockAgent

pytestmark = pytest.mark.anyio

ID = "spiffe://test.local/agent/stock"
CLI = "spiffe://test.local/client/cli"


class EchoAgent(SecureAgent):
    @capability("say-it")
    async def say(self, value: Any) -> Any:
        return {"value": value, "caller": self.context.caller_spiffe_id, "for": self.context.principal}

    @capability("price")
    def price(self, amount: Decimal) -> dict[str, Any]:
        return {"price": amount * 2}

    @capability("boom")
    async def boom(self) -> None:
        raise RuntimeError("a secret")


async def test_a_mock_of_nothing_does_nothing() -> None:
    agent = MockSecureAgent(spiffe_id="spiffe://test.local/agent/test")
    assert agent.spiffe_id == "spiffe://test.local/agent/test"
    with pytest.raises(AttributeError, match="declares no capability 'process_data'"):
        await agent.process_data({"test": "data"})
    with pytest.raises(AttributeError, match="process_data"):
        await agent.invoke("process_data", {})
    assert not hasattr(agent, "process_data")


async def test_capabilities_can_be_declared_on_the_mock() -> None:
    agent = MockSecureAgent()

    @agent.capability("process_data")
    async def process_data(test: str) -> dict[str, str]:
        return {"status": "success", "test": test}

    result = await agent.process_data({"test": "data"})
    assert result == {"status": "success", "test": "data"}
    with pytest.raises(AgentWeaveError, match="its methods"):
        MockSecureAgent(EchoAgent).capability("x")


async def test_payloads_and_results_are_those_of_the_wire() -> None:
    agent = MockSecureAgent(EchoAgent, caller=CLI)
    assert await agent.say_it(value=(1, 2)) == {"value": [1, 2], "caller": CLI, "for": None}
    assert await agent.price({"amount": "1.10"}) == {"price": "2.20"}
    with pytest.raises(PayloadError, match="amount"):
        await agent.price({"amount": "much"})
    with pytest.raises(PayloadError):
        await agent.say_it(value=float("nan"))
    result = await agent.invoke("say-it", {"value": 1}, principal={"iss": "https://login", "sub": "ada"})
    assert result.data["for"] == {"iss": "https://login", "sub": "ada"}


async def test_what_a_caller_learns_of_a_failure() -> None:
    agent = MockSecureAgent(EchoAgent)
    result = await agent.invoke("boom")
    assert (result.status, "secret" in (result.error or "")) == ("failed", False)
    with pytest.raises(TaskFailedError, match="correlation id"):
        await agent.boom()
    with pytest.raises(TaskFailedError, match="no gizmo"):
        await MockSecureAgent(StockAgent).reserve({"sku": "gizmo"})


async def test_restrictions_of_callers_hold() -> None:
    agent = MockSecureAgent(StockAgent, caller=CLI)
    with pytest.raises(AuthorizationError, match="not open to"):
        await agent.recount()
    assert (await agent.invoke("recount", caller="spiffe://test.local/agent/x")).data == {}


async def test_the_policy_decides_by_the_payload_in_both_directions() -> None:
    grants = {
        "grants": [
            {"caller": CLI, "callee": "spiffe://test.local/agent/order", "capabilities": ["create_order"]},
            {
                "caller": "spiffe://test.local/agent/order",
                "callee": STOCK,
                "capabilities": ["reserve"],
                "limits": {"max_quantity": 5},
            },
        ]
    }
    agent = MockSecureAgent(
        OrderAgent, spiffe_id="spiffe://test.local/agent/order", caller=CLI, policy=grants
    )
    agent.answers(STOCK, "reserve", lambda payload: {"reserved": payload["quantity"]})
    assert await agent.create_order(sku="widget", quantity=5) == {"ordered": 5}
    with pytest.raises(TaskFailedError):  # what it raises for the handler is for the agent's own log
        await agent.create_order(sku="widget", quantity=6)
    assert len(agent.calls) == 1
    with pytest.raises(AuthorizationError) as denied:
        await agent.invoke("create_order", {"sku": "widget"}, caller="spiffe://test.local/client/eve")
    assert denied.value.direction == "inbound"


async def test_calls_are_answered_as_declared_and_not_otherwise() -> None:
    agent = MockSecureAgent(OrderAgent)
    seen: list[type[BaseException]] = []

    class Watching(OrderAgent):
        @capability("create_order")
        async def create_order(self, sku: str, quantity: int = 1) -> dict[str, Any]:
            try:
                return await super().create_order(sku, quantity)
            except AgentCallError as error:
                seen.append(type(error))
                return {"ordered": 0}

    agent = MockSecureAgent(Watching)
    assert await agent.create_order(sku="widget") == {"ordered": 0}
    agent.answers(STOCK, "reserve", NoResponderError("nobody"))
    assert await agent.create_order(sku="widget") == {"ordered": 0}
    assert seen == [AgentCallError, NoResponderError]
    agent.answers(
        STOCK,
        "reserve",
        TaskResult(status="completed", artifacts=[{"type": "data", "data": {"reserved": 7}}]),
    )
    assert await agent.create_order(sku="widget") == {"ordered": 7}


async def test_hooks_run_and_a_deadline_holds() -> None:
    async with MockSecureAgent(StockAgent, spiffe_id=ID) as mock:
        assert mock.agent.spiffe_id == ID
        assert 0 < (await mock.invoke("remaining", timeout=5)).data["seconds"] <= 5
        result = await mock.invoke("wait", timeout=0.05)
        assert (result.error or "").startswith("deadline exceeded")
    assert mock.agent.stopped  # type: ignore[attr-defined]


async def test_an_agent_that_is_there_already() -> None:
    agent = Agent("pricing", trust_domain="acme.test")

    @agent.capability("quote")
    async def quote() -> dict[str, int]:
        return {"price": 3}

    assert await MockSecureAgent(agent).quote() == {"price": 3}
    with pytest.raises(AgentWeaveError, match="already"):
        MockSecureAgent(agent, spiffe_id=ID)
