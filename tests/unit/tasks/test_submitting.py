"""Submitting tasks, as a client and as an agent inside of a capability, one by one and many at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuthorizationError,
    CallRefusedError,
    QueueFullError,
    RetryableError,
)
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus, MockSecureAgent

pytestmark = pytest.mark.anyio


class StoreAgent(SecureAgent):
    """Counts what it stores; fails the first time where it is told to."""

    def on_start(self) -> None:
        self.stored: list[int] = []
        self.callers: list[tuple[str, str]] = []

    @capability("store", retry=Retry(attempts=3, first_delay=0.5, last_delay=2))
    async def store(self, number: int, fails: int = 0) -> dict[str, int]:
        await self.context.progress(0.1, "looking")
        await self.context.artifact("number", number)
        if self.context.attempt <= fails:
            raise RetryableError("not yet")
        await self.context.progress(0.9, "stored")
        self.stored.append(number)
        self.callers.append((self.context.caller_spiffe_id, self.context.origin))
        return {"stored": number, "attempt": self.context.attempt}


class OrderAgent(SecureAgent):
    """Has another agent store things, later."""

    @capability("order")
    async def order(self, number: int) -> dict[str, Any]:
        target = f"spiffe://{self.spiffe_id.trust_domain}/agent/store"
        handle = await self.submit_agent(target, "store", {"number": number}, idempotency_key=f"n{number}")
        return {"reference": str(handle.reference)}


@pytest.fixture
async def store(bus: MemoryBus) -> StoreAgent:
    await bus.grant("client/cli", "agent/store", "*")
    await bus.grant("client/cli", "agent/order", "*")
    await bus.grant("agent/order", "agent/store", "store", on_behalf_of=bus.id("client/cli"))
    return await bus.start(StoreAgent)


async def test_a_handle_brings_the_result(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    handle = await client.submit(bus.id(store), "store", {"number": 7})
    result = await handle.result(timeout=30)
    assert result.data == {"stored": 7, "attempt": 1}


async def test_what_is_said_of_a_task_says_no_call(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    with pytest.raises(CallRefusedError, match=r"^the task can't be sealed: ") as refused:
        await client.submit(bus.id(store), "store", {"number": 7}, priority=11)
    assert refused.value.step == "local"
    other = bus.id("agent/other")
    with pytest.raises(
        AuthorizationError, match=f"^submitting 'store' to {other} is not allowed: "
    ) as denied:
        await client.submit(other, "store", {"number": 7})
    assert denied.value.audit_id
    with pytest.raises(AuthorizationError, match=f"^calling 'store' of {other} is not allowed: "):
        await client.call(other, "store", {"number": 7})
    with pytest.raises(AuthorizationError, match=r"^publishing 'stored' is not allowed: "):
        await client.publish("stored", {})


@pytest.mark.parametrize(
    ("payload", "kind"), [([7], "an array"), (7, "a number"), ("7", "a string"), (True, "a boolean")]
)
async def test_what_names_no_arguments_is_refused_before_it_is_sent(
    bus: MemoryBus, store: StoreAgent, payload: Any, kind: str
) -> None:
    client = await bus.client()
    for send in (
        client.submit(bus.id(store), "store", payload),
        client.call(bus.id(store), "store", payload),
        client.publish("stored", payload),
    ):
        with pytest.raises(CallRefusedError, match=f"must be an object that names.* not {kind}$") as refused:
            await send
        assert refused.value.step == "local"
    assert bus.audit("client/cli", event="submit") == []


async def test_a_retry_waits_and_counts(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    handle = await client.submit(bus.id(store), "store", {"number": 7, "fails": 2})
    waiting = asyncio.ensure_future(handle.result())
    for _ in range(4):
        await bus.clock.advance(2)
    assert (await asyncio.wait_for(waiting, 30)).data == {"stored": 7, "attempt": 3}
    told = [one.fraction or one.artifact or one.state async for one in handle.events()]
    assert told == [
        *("working", 0.1, {"type": "number", "data": 7}, "submitted"),
        *("working", "submitted", "working", 0.9, "completed"),
    ]


async def test_retries_end(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    handle = await client.submit(bus.id(store), "store", {"number": 7, "fails": 9}, retry=Retry(2, 0, 0))
    waiting = asyncio.ensure_future(handle.result())
    for _ in range(4):
        await bus.clock.advance(3)
    result = await asyncio.wait_for(waiting, 30)
    assert (result.status, result.error, store.stored) == ("failed", "not yet", [])


async def test_a_full_queue_says_so_and_stores_nothing(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    await bus.stop(store)
    streams = bus.broker.jetstream.streams
    queue = next(stream for name, stream in streams.items() if name.startswith("tasks-"))
    queue.config["max_msgs"] = 2
    for number in range(2):
        await client.submit(bus.id(store), "store", {"number": number})
    with pytest.raises(QueueFullError):
        await client.submit(bus.id(store), "store", {"number": 2})
    assert len(queue.messages) == 2


async def test_an_agent_submits_on_behalf_of_who_asks(bus: MemoryBus, store: StoreAgent) -> None:
    await bus.start(OrderAgent)
    client = await bus.client()
    for _ in range(2):
        await client.call(bus.id("agent/order"), "order", {"number": 5})
    async with asyncio.timeout(30):
        while not store.stored:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
    assert store.stored == [5]
    assert store.callers == [(bus.id("agent/order"), bus.id("client/cli"))]


async def test_a_deadline_has_bounds(bus: MemoryBus, store: StoreAgent) -> None:
    client = await bus.client()
    for deadline in (0, -1, 32 * 86_400, float("nan"), float("inf")):
        with pytest.raises(CallRefusedError, match="a deadline lies above 0 and at most"):
            await client.submit(bus.id(store), "store", {"number": 1}, deadline=deadline)


async def test_who_does_not_run_submits_nothing(bus: MemoryBus, store: StoreAgent) -> None:
    await bus.stop(store)
    with pytest.raises(AgentWeaveError, match="not running"):
        await store.submit_agent(bus.id(store), "store", {"number": 1})


async def test_a_mock_has_no_queues() -> None:
    async with MockSecureAgent(OrderAgent) as mock:
        result = await mock.invoke("order", {"number": 1})
    assert result.status == "failed"
