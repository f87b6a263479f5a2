"""Payloads, results and steps that are too large for a message, on the bus in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import AgentWeaveClient, SecureAgent, TaskHandle, capability
from agentweave_bus.bus.blob_room import BlobRoom
from agentweave_bus.bus.streams import blob_stream_name, dead_stream_name, state_stream_name
from agentweave_bus.envelope.blob import blob_limits
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    IdempotencyError,
    QueueFullError,
    RetryableError,
)
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from agentweave_bus.testing.memory_streams import Stream
from agentweave_bus.types import TaskState

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
LARGE = "x" * MIB
WAIT = 10


class Press(SecureAgent):
    """Takes long texts and gives longer ones."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ran: list[str] = []
        self.again = False

    @capability("measure")
    async def measure(self, text: str) -> dict[str, int]:
        self.ran.append("measure")
        return {"length": len(text)}

    @capability("count")
    async def count(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        return {"count": len(rows), "rows": rows}

    @capability("echo")
    async def echo(self, text: str, times: int = 1) -> str:
        self.ran.append("echo")
        return text * times

    @capability("steps", retry=Retry(attempts=3, first_delay=1, last_delay=1))
    async def steps(self) -> dict[str, Any]:
        text = await self.context.step("long", self.long)
        if not self.again:
            self.again = True
            raise RetryableError("once more")
        return {"length": len(text)}

    async def long(self) -> str:
        self.ran.append("long")
        return LARGE


def stream(bus: MemoryBus, name: str) -> Stream:
    return bus.broker.jetstream.streams[name]


def blobs(bus: MemoryBus, who: str) -> Stream:
    return stream(bus, blob_stream_name(bus.id(who)))


def limit(parts: Connected, max_bytes: int) -> None:
    """Do what ``bus.max_blob_bytes`` in its configuration would."""
    assert parts.desk.blobs is not None
    parts.desk.blobs.max_bytes, parts.desk.blobs.limits = max_bytes, blob_limits(max_bytes)


@pytest.fixture
async def press(bus: MemoryBus) -> Press:
    await bus.grant("client/cli", "agent/press", "*")
    return await bus.start(Press)


@pytest.fixture
async def client(bus: MemoryBus, press: Press) -> AgentWeaveClient:
    return await bus.client("client/cli")


async def submit(
    bus: MemoryBus, client: AgentWeaveClient, name: str, payload: Any, **more: Any
) -> TaskHandle:
    return await client.submit(bus.id("agent/press"), name, payload, **more)


async def test_a_large_payload_reaches_the_handler(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    handle = await submit(bus, client, "measure", {"text": LARGE})
    assert (await handle.result(WAIT)).data == {"length": len(LARGE)}
    kept = blobs(bus, "client/cli").messages.values()
    assert len(kept) == 3  # what the text is wrapped in takes it over a whole number of chunks
    assert all(one.size < 600_000 for one in kept)


async def test_a_small_one_is_stored_nowhere_else(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    handle = await submit(bus, client, "measure", {"text": "x" * 700_000})
    assert (await handle.result(WAIT)).data == {"length": 700_000}
    assert blob_stream_name(bus.id("client/cli")) not in bus.broker.jetstream.streams


async def test_many_items_travel_so_too(bus: MemoryBus, client: AgentWeaveClient, press: Press) -> None:
    rows = [{"n": number} for number in range(51_000)]
    handle = await submit(bus, client, "count", {"rows": rows})
    data = (await handle.result(WAIT)).data
    assert data["count"] == len(rows)
    assert data["rows"] == rows


async def test_a_large_result_is_fetched_and_told_everywhere(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    handle = await submit(bus, client, "echo", {"text": "y" * 1000, "times": 1000})
    assert (await handle.result(WAIT)).data == "y" * 1_000_000
    again = client.task(handle.reference)
    status = await again.status()
    assert status.result is not None
    assert status.result.data == "y" * 1_000_000
    events = [one async for one in again.events()]
    assert events[-1].result is not None
    assert events[-1].result.data == "y" * 1_000_000
    records = stream(bus, state_stream_name(bus.id("agent/press"))).messages.values()
    assert all(len(one.data) < 10_000 for one in records)


async def test_a_step_that_returned_much_is_not_taken_again(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    handle = await submit(bus, client, "steps", {})
    waiting = asyncio.ensure_future(handle.result())
    for _ in range(4):
        await bus.clock.advance(2)
    assert (await asyncio.wait_for(waiting, WAIT)).data == {"length": len(LARGE)}
    assert press.ran == ["long"]


async def test_with_an_idempotency_key_the_same_is_the_same(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    for _ in range(2):
        handle = await submit(bus, client, "measure", {"text": LARGE}, idempotency_key="k")
        assert (await handle.result(WAIT)).data == {"length": len(LARGE)}
    assert press.ran == ["measure"]
    assert len(blobs(bus, "client/cli").messages) == 3
    other = await submit(bus, client, "measure", {"text": LARGE + "z"}, idempotency_key="k")
    with pytest.raises(IdempotencyError):
        await other.result(WAIT)


async def test_a_delayed_one_keeps_it(bus: MemoryBus, client: AgentWeaveClient, press: Press) -> None:
    handle = await submit(bus, client, "measure", {"text": LARGE}, delay=5)
    waiting = asyncio.ensure_future(handle.result())
    for _ in range(10):
        await bus.clock.advance(1)
    assert (await asyncio.wait_for(waiting, WAIT)).data == {"length": len(LARGE)}


async def test_more_than_the_limit_is_refused_before_anything_is_sent(bus: MemoryBus, press: Press) -> None:
    client = await bus.client("client/cli")
    limit(client._connected(), 3 * MIB)
    with pytest.raises(CallRefusedError, match=r"4194\d\d\d bytes; at most 3145728"):
        await submit(bus, client, "measure", {"text": LARGE * 4})
    assert blob_stream_name(bus.id("client/cli")) not in bus.broker.jetstream.streams


async def test_an_agent_has_a_limit_of_its_own(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/press", "*")
    press = await bus.start(Press)
    limit(bus._held[0].parts, MIB)
    client = await bus.client("client/cli")
    handle = await submit(bus, client, "measure", {"text": LARGE})
    with pytest.raises(CallRefusedError, match="lets 1048576 pass") as caught:
        await handle.result(WAIT)
    assert caught.value.step == "payload"
    handle = await submit(bus, client, "echo", {"text": "y" * 1000, "times": 1100})
    result = await handle.result(WAIT)
    assert (result.status, "at most 1048576 are sent" in (result.error or "")) == ("failed", True)
    assert press.ran == ["echo"]


async def test_a_call_says_that_a_task_could(bus: MemoryBus, client: AgentWeaveClient) -> None:
    with pytest.raises(CallRefusedError, match=r"at most 786432 are sent; submit it as a task instead"):
        await client.call(bus.id("agent/press"), "measure", {"text": LARGE})
    with pytest.raises(CallRefusedError) as caught:
        await client.call(bus.id("agent/press"), "measure", {"text": float("nan")})
    assert "submit" not in str(caught.value)


async def test_who_may_not_submit_stores_nothing(bus: MemoryBus, press: Press) -> None:
    stranger = await bus.client("client/stranger")
    with pytest.raises(AuthorizationError):
        await submit(bus, stranger, "measure", {"text": LARGE})
    assert blob_stream_name(bus.id("client/stranger")) not in bus.broker.jetstream.streams


async def test_a_full_store_says_so(bus: MemoryBus, client: AgentWeaveClient, press: Press) -> None:
    await (await submit(bus, client, "measure", {"text": LARGE})).result(WAIT)
    blobs(bus, "client/cli").config["max_bytes"] = 2 * MIB
    with pytest.raises(QueueFullError, match="no room left for large payloads"):
        await submit(bus, client, "measure", {"text": LARGE + "more"})


async def test_a_flood_of_references_to_one_blob_takes_turns(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    """Each costs its sender a few kilobytes, and the agent megabytes: these are bounded, and given back."""
    held: list[int] = []
    left: list[int] = []
    enter, leave = BlobRoom.enter, BlobRoom.leave

    async def entering(room: BlobRoom, sender: Any, size: int, **more: Any) -> bool:
        room._max_bytes = 6 * MIB
        entered = await enter(room, sender, size, **more)
        held.append(room._bytes)
        return entered

    def leaving(room: BlobRoom, sender: Any, size: int) -> None:
        leave(room, sender, size)
        left.append(room._bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlobRoom, "enter", entering)
        patch.setattr(BlobRoom, "leave", leaving)
        handles = [await submit(bus, client, "measure", {"text": LARGE}) for _ in range(8)]
        for handle in handles:
            assert (await handle.result(WAIT)).data == {"length": len(LARGE)}
    assert 0 < max(held) <= 3 * MIB  # half of the room, for there is but one sender
    assert (len(left), left[-1]) == (8, 0)


@pytest.mark.slow  # it waits for time to pass
async def test_what_is_gone_is_waited_for_and_then_a_dead_letter(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    await bus.stop(press)
    handle = await submit(bus, client, "measure", {"text": LARGE})
    store = blobs(bus, "client/cli")
    store._drop(next(iter(store.messages)))
    press = await bus.start(Press)
    waiting = asyncio.ensure_future(handle.result())
    for _ in range(20):
        await bus.clock.advance(30)
    with pytest.raises(CallRefusedError, match="chunk 0 of a large payload is not there"):
        await asyncio.wait_for(waiting, WAIT)
    assert press.ran == []
    assert stream(bus, dead_stream_name(bus.id("agent/press"))).messages


async def test_a_result_that_is_gone_is_told_as_such(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    handle = await submit(bus, client, "echo", {"text": "y" * 1000, "times": 1000})
    await handle.result(WAIT)
    store = blobs(bus, "agent/press")
    store._drop(next(iter(store.messages)))
    again = client.task(handle.reference)
    with pytest.raises(CallRefusedError, match="which is completed, can't be had"):
        await again.result(WAIT)
    events = [one async for one in again.events()]
    assert (events[-1].state, events[-1].result) == (TaskState.COMPLETED, None)


async def test_the_audit_log_has_size_and_digest_in_its_place(
    bus: MemoryBus, client: AgentWeaveClient, press: Press
) -> None:
    await (await submit(bus, client, "measure", {"text": LARGE})).result(WAIT)
    for held in bus._held:
        assert held.parts is not None
        for file in held.parts.config.authorization.audit.path.parent.rglob("*.jsonl*"):
            assert file.stat().st_size < 100_000
