"""Agents as users type them. Checked by mypy, not run: each line is a promise about a signature."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from decimal import Decimal
from typing import Any, assert_type

from agentweave_bus import (
    Agent,
    BaseAgent,
    Retry,
    RetryableError,
    SecureAgent,
    capability,
    current_context,
    requires_federated_peer,
    requires_peer,
)
from agentweave_bus.agent import RequestContext
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import AgentCallError, FederationError, TaskFailedError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import Artifact, DataPart, Message, TaskResult, TextPart


class OrderAgent(SecureAgent):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.user_agent = "spiffe://agentweave.io/agent/user"

    @capability("create_order")
    @requires_peer("spiffe://agentweave.io/agent/*", "spiffe://agentweave.io/client/cli")
    async def create_order(
        self,
        user_id: str,
        items: list[dict[str, Any]],
        filters: dict[str, Any] | None = None,
    ) -> TaskResult:
        try:
            result = await self.call_agent(
                target=self.user_agent, task_type="get_user", payload={"user_id": user_id}, timeout=5.0
            )
        except FederationError as error:
            return TaskResult(status="failed", error=f"no trust: {error.trust_domain}")
        except AgentCallError as error:
            raise TaskFailedError(f"user unknown: {error}") from error
        if result.status != "completed":
            return TaskResult(status="failed", error=result.error)
        user = result.artifacts[0]["data"]
        assert_type(self.context, RequestContext)
        self.logger.info("created", extra={"caller": self.context.caller_spiffe_id})
        return TaskResult(
            status="completed",
            messages=[Message(role="assistant", parts=[DataPart(data={"user": user}), TextPart("done")])],
            artifacts=[{"type": "order", "data": {"user": user}}, Artifact(type="t", data=1)],
        )

    @capability("charge", concurrency=4, timeout=30, retry=Retry(attempts=5, first_delay=0.5, last_delay=30))
    async def charge(self, amount: Decimal) -> Any:
        if self.context.attempt > 1:
            raise RetryableError("later", retry_after=3.5)
        await self.context.progress(0.5, "half")
        await self.context.artifact("rows", [1, 2], name="first")
        return await self.context.step("pay", self.pay, amount, compensate=self.refund)

    async def refund(self, paid: str) -> None: ...

    @capability("pay", safe=True, description="Take money", timeout=5)
    @requires_federated_peer(trust_domains=["acme-corp.io"])
    def pay(self, amount: Decimal) -> Decimal:
        return amount

    async def on_start(self) -> None:
        self.logger.info("up")

    def on_stop(self) -> None:
        self.logger.info("down")

    async def on_svid_update(self, new_svid: Any) -> None:
        self.logger.info("until %s", new_svid.expiry.isoformat())


async def serve(config: AgentConfig) -> None:
    agent = OrderAgent.from_config("config/order.yaml")
    assert_type(agent, OrderAgent)
    assert_type(agent.spiffe_id, SpiffeID)
    assert_type(OrderAgent(config=config).config, AgentConfig)
    assert_type(await agent.run(), None)


def decorators_change_no_type(agent: OrderAgent) -> None:
    method: Callable[[Decimal], Decimal] = agent.pay
    assert_type(method(Decimal(1)), Decimal)
    order: Callable[[str, list[dict[str, Any]]], Coroutine[Any, Any, TaskResult]] = agent.create_order
    del order


async def call_options(agent: SecureAgent) -> None:
    principal: Mapping[str, str] = {"iss": "https://login.example", "sub": "ada"}
    scope: Sequence[str] = ["spiffe://a.io/agent/x#y"]
    result = await agent.call_agent("spiffe://a.io/agent/x", "y", {}, 5, principal=principal, scope=scope)
    assert_type(result, TaskResult)
    assert_type(result.error, str | None)
    assert_type(result.status, str)
    assert_type(result.to_json(), dict[str, Any])


door = Agent("pricing", trust_domain="acme-corp.io")


@door.capability("quote", safe=True)
async def quote(item: str, quantity: int = 1) -> dict[str, Any]:
    assert_type(current_context().caller_spiffe_id, str)
    return {"item": item, "quantity": quantity}


async def functions_keep_their_type() -> None:
    assert_type(await quote("x", quantity=2), dict[str, Any])
    assert_type(await door.call("spiffe://a.io/agent/x", "y", {"a": 1}), TaskResult)


class Plain(BaseAgent):
    @capability("double")
    def double(self, number: int) -> int:
        return 2 * number


async def plain_logic() -> None:
    async with Plain() as agent:
        assert_type(agent, Plain)
        assert_type(await agent.invoke("double", {"number": 2}), TaskResult)
