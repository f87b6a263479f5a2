"""The second door: plain functions on an ``Agent`` object, on the same machinery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.agent import (
    Agent,
    RequestContext,
    bind_context,
    current_context,
    requires_federated_peer,
    requires_peer,
)
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import TaskResult

CALLER = "spiffe://a.io/agent/order"
CONFIG = AgentConfig.model_validate({"agent": {"name": "pricing", "trust_domain": "a.io"}})


class Connected:
    spiffe_id = SpiffeID("spiffe://a.io/agent/pricing")

    async def call(self, *args: Any, **options: Any) -> TaskResult:
        return TaskResult(status="failed", error=f"{args} {options['timeout']} {options['scope']}")


@pytest.mark.anyio
async def test_plain_functions_are_capabilities() -> None:
    agent = Agent(CONFIG)

    @agent.capability("quote", safe=True, timeout=3, concurrency=2, retry=Retry(attempts=2))
    async def quote(item: str, quantity: int = 1) -> dict[str, Any]:
        """Say a price."""
        return {"item": item, "quantity": quantity, "caller": current_context().caller_spiffe_id}

    bound = agent.capability_table["quote"]
    assert (bound.safe, bound.timeout, bound.description) == (True, 3.0, "Say a price.")
    assert (bound.concurrency, bound.retry) == (2, Retry(attempts=2))
    with bind_context(RequestContext(caller_spiffe_id=CALLER)):
        result = await bound.invoke(bound.validate({"item": "w"}))
        assert (await quote("w"))["item"] == "w", "the function was changed"
    assert result.data == {"item": "w", "quantity": 1, "caller": CALLER}
    assert set(agent.capability_table) == {"quote", "health"}


def test_restrictions_count_in_either_order() -> None:
    agent = Agent(CONFIG)

    @agent.capability("inner")
    @requires_peer("spiffe://a.io/agent/admin")
    def inner() -> None: ...

    @requires_federated_peer(trust_domains=["b.io"])
    @agent.capability("outer")
    def outer() -> None: ...

    assert agent.capability_table["inner"].admits_peer(CALLER)
    assert agent.capability_table["outer"].admits_peer(CALLER)


@pytest.mark.anyio
async def test_a_restriction_made_after_a_look_at_the_table_counts_when_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = Agent(CONFIG)

    @agent.capability("late")
    def late() -> None: ...

    assert agent.capability_table["late"].admits_peer(CALLER) is None
    requires_peer("spiffe://a.io/agent/admin")(late)
    seen = []

    class Runner:
        async def run(self, agent: Agent) -> None:
            seen.append(agent.capability_table["late"].admits_peer(CALLER))

    monkeypatch.setattr("agentweave_bus.agent.agent._Hook.runner", Runner())
    await agent.run()
    assert seen[0]


def test_two_functions_of_one_name_are_both_named() -> None:
    agent = Agent(CONFIG)

    @agent.capability("x")
    def first() -> None: ...

    with pytest.raises(ConfigurationError, match=r"first and by .*second"):

        @agent.capability("x")
        def second() -> None: ...


@pytest.mark.anyio
async def test_call_is_call_agent_and_registering_then_is_too_late() -> None:
    agent = Agent(CONFIG)
    await agent.begin_serving(Connected())
    result = await agent.call(CALLER, "get", {"a": 1}, 5, scope=["s"])
    assert result.error == f"{(CALLER, 'get', {'a': 1})} 5.0 ['s']"
    with pytest.raises(ConfigurationError, match="'x' comes too late"):
        agent.capability("x")(lambda: None)


@pytest.mark.anyio
async def test_listed_capabilities_are_compared_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentweave_bus.agent.agent._Hook.runner", None)
    listed = {"name": "pricing", "trust_domain": "a.io", "capabilities": [{"name": "quote"}]}
    agent = Agent(AgentConfig.model_validate({"agent": listed}))
    with pytest.raises(ConfigurationError, match="listed but not declared: quote"):
        await agent.run()
    agent.capability("quote")(lambda: None)
    with pytest.raises(ConfigurationError, match="Import agentweave_bus first"):
        await agent.run()


def test_a_name_takes_the_rest_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGENTWEAVE_CONFIG", raising=False)
    assert Agent("pricing", trust_domain="a.io").spiffe_id == "spiffe://a.io/agent/pricing"
    file = tmp_path / "agent.yaml"
    file.write_text("agent: {name: pricing, trust_domain: b.io, description: Prices}\n")
    assert Agent("pricing", config=file).config.agent.description == "Prices"
    assert Agent.from_config(file).spiffe_id == "spiffe://b.io/agent/pricing"
    monkeypatch.setenv("AGENTWEAVE_CONFIG", str(file))
    assert Agent("pricing").spiffe_id.trust_domain == "b.io"


def test_another_agents_configuration_is_refused() -> None:
    assert Agent("pricing", config=CONFIG).config is CONFIG
    with pytest.raises(ConfigurationError, match="that of 'pricing', not of 'order'"):
        Agent("order", config=CONFIG)
    with pytest.raises(ConfigurationError, match=r"that of 'a.io', not of 'b.io'"):
        Agent(CONFIG, trust_domain="b.io")


def test_no_configuration_at_all_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTWEAVE_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="AGENTWEAVE_CONFIG"):
        Agent()
