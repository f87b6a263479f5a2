"""Agents as authors write them: configuration, hooks, calls, and the door to plain logic."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.agent import (
    BaseAgent,
    RequestContext,
    SecureAgent,
    bind_context,
    capability,
    install_runner,
    requires_peer,
)
from agentweave_bus.agent import agent as agent_module
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import (
    AgentWeaveError,
    CallTimeoutError,
    ConfigurationError,
    PayloadError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import DataPart, Message, TaskResult

CALLER = "spiffe://agentweave.io/agent/gateway"
OTHER = "spiffe://agentweave.io/agent/user"


def config(**agent: Any) -> AgentConfig:
    return AgentConfig.model_validate({"agent": {"name": "order", "trust_domain": "agentweave.io", **agent}})


class OrderAgent(SecureAgent):
    """An agent that keeps everything that it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Any] = []

    @capability("create_order")
    @requires_peer("spiffe://agentweave.io/*")
    async def create_order(self, user_id: str) -> TaskResult:
        found = await self.call_agent(target=OTHER, task_type="get_user", payload={"user_id": user_id})
        data = {"user": found.artifacts[0]["data"], "for": self.context.caller_spiffe_id}
        return TaskResult(
            status="completed", messages=[Message(role="assistant", parts=[DataPart(data=data)])]
        )

    async def on_start(self) -> None:
        self.events.append("start")

    def on_stop(self) -> None:
        self.events.append("stop")

    async def on_svid_update(self, new_svid: Any) -> None:
        self.events.append(new_svid)


class Recording:
    """A runtime that notes what it is asked and answers with a user."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any, dict[str, Any]]] = []

    @property
    def spiffe_id(self) -> SpiffeID:
        return SpiffeID("spiffe://agentweave.io/agent/order/eu")

    async def call(self, target: str, capability: str, payload: Any, **options: Any) -> TaskResult:
        self.calls.append((target, capability, payload, options))
        return TaskResult(status="completed", messages=[Message("assistant", [DataPart({"name": "Ada"})])])


def request(seconds: float | None = None) -> RequestContext:
    ends = None if seconds is None else int((time.time() + seconds) * 1000)
    return RequestContext(caller_spiffe_id=CALLER, deadline_ms=ends)


# --- construction ------------------------------------------------------------------------------------


def test_it_is_made_from_a_configuration_positionally_or_by_name() -> None:
    given = config()
    assert OrderAgent(given).config is OrderAgent(config=given).config is given
    providers = {"authz_provider": object(), "identity_provider": object()}
    agent = OrderAgent(config=given, **providers)
    assert agent.authz_provider is providers["authz_provider"]
    assert agent.identity_provider is providers["identity_provider"]


def test_without_a_configuration_the_way_out_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"Use OrderAgent\.from_config\(path\)"):
        OrderAgent()
    with pytest.raises(ConfigurationError, match="not str"):
        OrderAgent("config.yaml")


def test_from_config_calls_the_class_with_one_positional_argument(tmp_path: Path) -> None:
    file = tmp_path / "order.yaml"
    file.write_text("agent: {name: order, trust_domain: agentweave.io}\n")

    class Strict(OrderAgent):
        def __init__(self, config: AgentConfig, /) -> None:
            super().__init__(config)

    agent = Strict.from_config(file)
    assert type(agent) is Strict
    assert agent.name == "order"
    assert Strict.from_config(str(file)).spiffe_id == "spiffe://agentweave.io/agent/order"


def test_a_wrong_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "order.yaml"
    file.write_text("agent: {name: order, trust_domain: agentweave.io, colour: red}\n")
    with pytest.raises(ConfigurationError, match="colour"):
        OrderAgent.from_config(file)


def test_name_logger_and_identity() -> None:
    agent = OrderAgent(config())
    assert agent.logger.name == "agentweave_bus.agents.order"
    assert isinstance(agent.logger, logging.Logger)
    assert agent.spiffe_id == "spiffe://agentweave.io/agent/order"
    assert agent.spiffe_id.trust_domain == "agentweave.io"


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ([], "declared but not listed: create_order"),
        (["create_order", "cancel"], "listed but not declared: cancel"),
        (["create_orders"], "listed but not declared: create_orders; declared but not listed: create_order"),
    ],
)
def test_listed_capabilities_must_be_the_declared_ones(listed: list[str], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        OrderAgent(config(capabilities=[{"name": name} for name in listed]))
    assert caught.value.key == "agent.capabilities"


@pytest.mark.parametrize("listed", [["create_order"], ["create_order", "health"]])
def test_listing_health_is_free(listed: list[str]) -> None:
    OrderAgent(config(capabilities=[{"name": name} for name in listed]))


def test_a_declared_health_must_be_listed_as_free_as_the_built_in() -> None:
    class Gateway(SecureAgent):
        @capability("health")
        async def health(self) -> dict[str, str]:
            return {"gateway": "healthy"}

    Gateway(config(capabilities=[]))


def test_an_author_may_use_the_names_that_the_base_class_might() -> None:
    class Careless(OrderAgent):
        def __init__(self, config: AgentConfig) -> None:
            super().__init__(config)
            self.config, self._config, self._table, self._runtime = config, {}, "orders", "python"
            self._name = self._logger = self._functions = self._running = None

        async def health(self) -> str:
            return "a method of that name is no capability"

    agent = Careless(config())
    assert set(agent.capability_table) == {"create_order", "health"}
    assert agent.logger.name.endswith(".order")
    assert "_health" in agent.capability_table["health"].source


# --- health ------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_agent_answers_health() -> None:
    health = OrderAgent(config()).capability_table["health"]
    assert health.safe
    result = await health.invoke(health.validate({}))
    assert result.status == "completed"
    assert result.data["agent"] == "order"
    assert result.data["status"] == "healthy"
    assert 0 <= result.data["uptime_seconds"] < 60


@pytest.mark.anyio
async def test_an_agents_own_health_replaces_it() -> None:
    class Own(BaseAgent):
        @capability("health")
        async def check(self) -> dict[str, str]:
            return {"gateway": "healthy"}

    assert (await Own().invoke("health")).data == {"gateway": "healthy"}


# --- calls -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_call_needs_a_running_agent() -> None:
    agent = OrderAgent(config())
    with pytest.raises(AgentWeaveError, match="agent 'order' is not running"):
        await agent.call_agent(OTHER, "get_user", {})
    runtime = Recording()
    await agent.begin_serving(runtime)
    assert agent.spiffe_id == runtime.spiffe_id
    assert (await agent.call_agent(OTHER, "get_user", {})).data == {"name": "Ada"}
    await agent.end_serving()
    with pytest.raises(AgentWeaveError, match="not running"):
        await agent.call_agent(OTHER, "get_user", {})


@pytest.mark.anyio
async def test_a_nested_call_carries_its_request_with_no_word_from_the_author() -> None:
    agent, runtime = OrderAgent(config()), Recording()
    await agent.begin_serving(runtime)
    create_order, context = agent.capability_table["create_order"], request(5)
    with bind_context(context):
        result = await create_order.invoke(create_order.validate({"user_id": "u-1"}))
    assert result.data == {"user": {"name": "Ada"}, "for": CALLER}
    ((target, name, payload, options),) = runtime.calls
    assert (target, name, payload) == (OTHER, "get_user", {"user_id": "u-1"})
    assert options["context"] is context
    assert 4 < options["timeout"] <= 5.01, "the default of 30 s was not cut to what the caller still waits"
    assert (options["principal"], options["scope"]) == (None, None)


@pytest.mark.anyio
async def test_an_origin_names_principal_scope_and_timeout() -> None:
    agent, runtime = OrderAgent(config()), Recording()
    await agent.begin_serving(runtime)
    principal, scope = {"iss": "https://login.example", "sub": "ada"}, [f"{OTHER}#get_user"]
    await agent.call_agent(OTHER, "get_user", {}, 7, principal=principal, scope=scope)
    options = runtime.calls[0][3]
    assert options == {"timeout": 7.0, "context": None, "principal": principal, "scope": scope}


@pytest.mark.anyio
async def test_inside_a_request_no_principal_can_be_named() -> None:
    agent, runtime = OrderAgent(config()), Recording()
    await agent.begin_serving(runtime)
    with bind_context(request()), pytest.raises(AgentWeaveError, match="only the origin"):
        await agent.call_agent(OTHER, "get_user", {}, principal={"sub": "mallory"})
    assert runtime.calls == []


@pytest.mark.anyio
async def test_no_call_leaves_after_the_deadline() -> None:
    agent, runtime = OrderAgent(config()), Recording()
    await agent.begin_serving(runtime)
    with bind_context(request(-1)), pytest.raises(CallTimeoutError, match="no time left"):
        await agent.call_agent(OTHER, "get_user", {})
    assert runtime.calls == []


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, True, "30"])
async def test_a_timeout_is_a_positive_number_of_seconds(seconds: Any) -> None:
    agent, runtime = OrderAgent(config()), Recording()
    await agent.begin_serving(runtime)
    with pytest.raises(ConfigurationError, match="positive number of seconds"):
        await agent.call_agent(OTHER, "get_user", {}, timeout=seconds)
    assert runtime.calls == []


# --- running -----------------------------------------------------------------------------------------


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(agent_module._Hook, "runner", None)
    return


@pytest.mark.anyio
@pytest.mark.usefixtures("no_runner")
async def test_run_hands_the_agent_to_the_installed_runner() -> None:
    ran = []

    class Runner:
        async def run(self, agent: SecureAgent) -> None:
            ran.append(agent)

    agent = OrderAgent(config())
    with pytest.raises(ConfigurationError, match="Import agentweave_bus first"):
        await agent.run()
    install_runner(Runner())
    await agent.run()
    assert ran == [agent]


@pytest.mark.anyio
async def test_hooks_run_in_order_plain_or_async() -> None:
    agent = OrderAgent(config())
    await agent.begin_serving(Recording())
    await agent.announce_svid("the new one")
    await agent.end_serving()
    assert agent.events == ["start", "the new one", "stop"]


@pytest.mark.anyio
async def test_on_start_may_call_and_its_failure_keeps_the_agent_from_serving() -> None:
    class Eager(OrderAgent):
        async def on_start(self) -> None:
            await self.call_agent(OTHER, "get_user", {})
            raise RuntimeError("no database")

    agent, runtime = Eager(config()), Recording()
    with pytest.raises(RuntimeError, match="no database"):
        await agent.begin_serving(runtime)
    assert len(runtime.calls) == 1
    with pytest.raises(AgentWeaveError, match="not running"):
        await agent.call_agent(OTHER, "get_user", {})


@pytest.mark.anyio
async def test_failures_of_the_other_hooks_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(SecureAgent):
        def on_svid_update(self, new_svid: Any) -> None:
            raise RuntimeError("first")

        async def on_stop(self) -> None:
            raise RuntimeError("second")

    agent = Clumsy(config())
    await agent.begin_serving(Recording())
    await agent.announce_svid(None)
    await agent.end_serving()
    assert [record.message for record in caplog.records] == ["on_svid_update failed", "on_stop failed"]
    assert "first" in caplog.text
    assert "second" in caplog.text


def test_the_context_exists_in_a_request_only() -> None:
    agent = OrderAgent(config())
    with pytest.raises(AgentWeaveError, match="no request is being handled"):
        _ = agent.context
    with bind_context(request()):
        assert agent.context.caller_spiffe_id == CALLER


# --- plain logic -------------------------------------------------------------------------------------


class Pricing(BaseAgent):
    opened = closed = False

    async def on_start(self) -> None:
        self.opened = True

    def on_stop(self) -> None:
        self.closed = True

    @capability("quote")
    def quote(self, item: str, quantity: int = 1) -> dict[str, Any]:
        return {"item": item, "quantity": quantity}

    @capability("who")
    async def who(self) -> str:
        return self.context.caller_spiffe_id


@pytest.mark.anyio
async def test_plain_logic_is_tested_without_security() -> None:
    async with Pricing() as agent:
        assert agent.opened
        assert agent.logger.name == "agentweave_bus.agents.Pricing"
        assert (await agent.invoke("quote", {"item": "w"})).data == {"item": "w", "quantity": 1}
        assert (await agent.invoke("who", context=request())).data == CALLER
        assert (await agent.invoke("who")).status == "failed"
        with pytest.raises(PayloadError, match="did you mean 'quote'"):
            await agent.invoke("quot", {})
        with pytest.raises(PayloadError, match="'item' is missing"):
            await agent.invoke("quote")
    assert agent.closed


def test_a_secure_agent_offers_no_way_around() -> None:
    assert not hasattr(SecureAgent, "invoke")
    assert not issubclass(SecureAgent, BaseAgent)
    assert not hasattr(BaseAgent, "call_agent")
