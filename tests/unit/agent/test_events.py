"""``@on_event``: what may be declared, what contradicts itself, and what is inherited."""

from __future__ import annotations

from typing import Any

import pytest

from agentweave_bus import BaseAgent, capability, on_event, requires_peer
from agentweave_bus.agent.events import DEFAULT_EVENT_RETRY, EventHandler
from agentweave_bus.exceptions import ConfigurationError, PayloadError
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MockSecureAgent
from agentweave_bus.testing.mock_agent import MockEvent

CLI = "spiffe://a.test/client/cli"


class Shipping(BaseAgent):
    """Hears of orders."""

    @capability("ship")
    async def ship(self, order_id: str) -> str:
        return order_id

    @on_event("order.*")
    async def on_order(self, order_id: str, amount: int = 0) -> None:
        """Note an order."""

    @requires_peer("spiffe://a.test/client/*")
    @on_event("invoice.paid", ordered=True, timeout=3, retry=Retry(attempts=2))
    def on_paid(self, order_id: str) -> None: ...

    @on_event("*", durable=False, replicas="every")
    async def on_all(self, **data: Any) -> None: ...


def by_pattern(agent: BaseAgent) -> dict[str, EventHandler]:
    return {one.spec.pattern: one for one in agent.event_handlers}


def test_handlers_are_found_and_are_no_capabilities() -> None:
    agent = Shipping()
    assert set(agent.capability_table) == {"ship", "health"}
    assert set(by_pattern(agent)) == {"order.*", "invoice.paid", "*"}
    assert agent.event_handlers.patterns(ordered=False) == ("order.*",)
    assert agent.event_handlers.patterns(ordered=True) == ("invoice.paid",)


def test_the_handler_of_an_event_is_the_durable_one() -> None:
    handlers = Shipping().event_handlers
    found = handlers.durable("order.line.added")
    assert found is not None
    assert found.bound.name == "order.*"
    assert found.retry == DEFAULT_EVENT_RETRY
    assert handlers.durable("order") is None
    assert handlers.durable("stock.low") is None


def test_what_a_handler_says_is_kept() -> None:
    paid = by_pattern(Shipping())["invoice.paid"]
    assert (paid.retry, paid.bound.timeout) == (Retry(attempts=2), 3.0)
    assert paid.bound.admits_peer("spiffe://a.test/agent/order") is not None
    assert paid.bound.admits_peer(CLI) is None


def test_data_are_validated_as_a_capabilitys_are() -> None:
    bound = by_pattern(Shipping())["order.*"].bound
    assert bound.validate({"order_id": "o-1"}).policy_payload == {"order_id": "o-1", "amount": 0}
    with pytest.raises(PayloadError, match="amount"):
        bound.validate({"order_id": "o-1", "amount": "7"})
    assert by_pattern(Shipping())["*"].bound.validate({"anything": [1]}).arguments == {"anything": [1]}


@pytest.mark.parametrize("pattern", ["", "Order", "order.", "order.*.x", "**", ">", "order.>", 7, None])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="no pattern of events"):
        on_event(pattern)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": "every"}, "not kept for those"),
        ({"durable": False, "ordered": True}, "Only a durable"),
        ({"durable": False, "retry": Retry()}, "Only a durable"),
        ({"replicas": "all"}, "'one' or 'every'"),
        ({"timeout": 0}, "positive number"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        on_event("order.created", **options)


def test_an_event_has_one_durable_handler() -> None:
    class Twice(BaseAgent):
        @on_event("order.*")
        async def one(self) -> None: ...

        @on_event("order.created", ordered=True)
        async def other(self) -> None: ...

    with pytest.raises(
        ConfigurationError, match=r"'order.created' would be handled twice: .*one and by .*other"
    ):
        Twice()


def test_a_method_handles_one_pattern() -> None:
    with pytest.raises(ConfigurationError, match="handles 'a' already, not also 'b'"):

        @on_event("b")
        @on_event("a")
        async def handler() -> None: ...


def test_a_generator_handles_nothing() -> None:
    class Yields(BaseAgent):
        @on_event("a")
        async def handler(self) -> Any:
            yield 1

    with pytest.raises(ConfigurationError, match="is a generator"):
        Yields()


def test_an_override_keeps_what_its_base_said_and_can_be_taken_away() -> None:
    class Stricter(Shipping):
        async def on_order(self, order_id: str, amount: int = 0) -> None: ...

        @requires_peer(CLI)
        def on_paid(self, order_id: str) -> None: ...

        on_all = None  # type: ignore[assignment]

    handlers = by_pattern(Stricter())
    assert set(handlers) == {"order.*", "invoice.paid"}
    assert handlers["order.*"].bound.source.startswith("test_an_override")
    assert handlers["invoice.paid"].bound.admits_peer("spiffe://a.test/client/other") is not None


@pytest.mark.anyio
async def test_a_mock_agent_keeps_what_it_publishes() -> None:
    agent = MockSecureAgent()

    @agent.capability("create")
    async def create(order_id: str) -> None:
        await agent.agent.publish("order.created", {"order_id": order_id}, key=order_id)

    async with agent:
        await agent.create(order_id="o-1")
        assert agent.published == [MockEvent("order.created", {"order_id": "o-1"}, "o-1")]
        with pytest.raises(ConfigurationError, match="no event's name"):
            await agent.agent.publish("Order")
