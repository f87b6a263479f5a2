"""Submitting many tasks: in batches, each of which is signed and recorded as one, and each task by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.config import TracingConfig
from agentweave_bus.envelope import EnvelopeVerifier
from agentweave_bus.exceptions import (
    AuditError,
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    NoResponderError,
    PayloadError,
    QueueFullError,
)
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks.pipelining import AT_ONCE, BATCH, pipelined
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

LARGE = "x" * 1_500_000


class StoreAgent(SecureAgent):
    """Remembers what it stores."""

    def on_start(self) -> None:
        self.stored: list[int] = []

    @capability("store")
    async def store(self, number: int, amount: int = 0, text: str = "") -> dict[str, int]:
        self.stored.append(number)
        return {"stored": number, "size": len(text)}


@pytest.fixture
async def store(bus: MemoryBus) -> StoreAgent:
    await bus.grant("client/cli", "agent/store", "*")
    return await bus.start(StoreAgent)


@pytest.fixture
async def client(bus: MemoryBus, store: StoreAgent) -> AgentWeaveClient:
    return await bus.client("client/cli")


def parts_of(client: AgentWeaveClient) -> Connected:
    assert client._parts is not None
    return client._parts


def numbers(count: int) -> list[dict[str, int]]:
    return [{"number": number} for number in range(count)]


def frames(bus: MemoryBus, store: StoreAgent) -> list[bytes]:
    stream = bus.broker.jetstream.streams[tasks_stream_name(store.spiffe_id)]
    return [message.data for message in stream.messages.values()]


async def outcomes(
    bus: MemoryBus, client: AgentWeaveClient, payloads: Sequence[Any], **options: Any
) -> list[Any]:
    """What comes of one batch, each outcome in its place."""
    said = client._said(**options)
    keyed = [(payload, None) for payload in payloads]
    return await parts_of(client).client.submit_all(str(bus.id("agent/store")), "store", keyed, said)


def recorded(client: AgentWeaveClient, event: str) -> list[dict[str, Any]]:
    lines = parts_of(client).audit.file.read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


async def test_many_come_back_in_order_and_all_are_done(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    handles = [one async for one in client.submit_many(bus.id(store), "store", numbers(300))]
    results = await asyncio.gather(*(handle.result(timeout=30) for handle in handles))
    assert [one.data["stored"] for one in results] == list(range(300))
    assert sorted(store.stored) == list(range(300))
    assert len({handle.id for handle in handles}) == 300


async def test_many_with_keys_can_be_submitted_again(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    for _ in range(2):
        options = {"idempotency_key": lambda payload: f"key-{payload['number']}"}
        handles = [one async for one in client.submit_many(bus.id(store), "store", numbers(20), **options)]
        for handle in handles:
            await handle.result(timeout=30)
    assert sorted(store.stored) == list(range(20))


async def test_a_batch_has_one_signature_and_each_task_an_envelope_and_a_record_of_its_own(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    await bus.stop(store)
    submitted = await outcomes(bus, client, numbers(BATCH))
    proofs = [
        EnvelopeVerifier.decode_frame(parts_of(client).verifier, one).proof for one in frames(bus, store)
    ]
    assert len({proof.signature for proof in proofs}) == 1
    assert [(proof.index, proof.size) for proof in proofs] == [(n, BATCH) for n in range(BATCH)]
    records = recorded(client, "submit")
    assert [one["digest"] for one in records] == [one.digest.hex() for one in submitted]
    assert [one["input"]["context"]["payload"] for one in records] == numbers(BATCH)


async def test_what_is_wrong_with_one_is_said_in_its_place_and_the_others_are_stored(
    bus: MemoryBus, store: StoreAgent
) -> None:
    await bus.grant("client/limited", "agent/store", "store", limits={"max_amount": 10})
    client = await bus.client("client/limited")
    payloads = [
        {"number": 0, "amount": 10},
        {"number": 1, "amount": 11},
        {"number": object()},
        ["no", "object"],
        {"number": 4, "amount": 4, "text": LARGE},
        {"number": 5, "amount": 5},
    ]
    found = await outcomes(bus, client, payloads)
    kinds = {1: AuthorizationError, 2: CallRefusedError, 3: CallRefusedError}
    assert {n: type(one) for n, one in enumerate(found) if isinstance(one, Exception)} == kinds
    assert isinstance(found[2].__cause__, PayloadError)
    handles = [parts_of(client).handles.of(*found[number]) for number in (0, 4, 5)]
    results = [await handle.result(timeout=30) for handle in handles]
    assert [one.data["size"] for one in results] == [0, len(LARGE), 0]
    assert sorted(store.stored) == [0, 4, 5]
    assert len(recorded(client, "refusal")) == 1


async def test_the_first_that_fails_ends_the_submission_where_it_stands(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    payloads = [*numbers(3), ["no", "object"], *numbers(3)]
    submitted = client.submit_many(bus.id(store), "store", payloads)
    for _ in range(3):
        await anext(submitted)
    with pytest.raises(CallRefusedError, match="must be an object"):
        await anext(submitted)


async def test_a_queue_that_fills_takes_what_it_can(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    await bus.stop(store)
    bus.broker.jetstream.streams[tasks_stream_name(store.spiffe_id)].config["max_msgs"] = 2
    found = await outcomes(bus, client, numbers(4))
    assert [isinstance(one, QueueFullError) for one in found] == [False, False, True, True]
    assert len(frames(bus, store)) == 2


async def test_what_got_no_clear_word_is_sent_again_and_nothing_else(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.stop(store)
    jetstream, heard = bus.broker.jetstream, 0
    answer = jetstream._answer

    def lossy(reply: str, told: dict[str, Any]) -> None:
        nonlocal heard
        heard += 1
        answer(reply, {"nonsense": True} if heard == 2 else told)

    monkeypatch.setattr(jetstream, "_answer", lossy)
    found = await outcomes(bus, client, numbers(3))
    assert not [one for one in found if isinstance(one, Exception)]
    assert len(frames(bus, store)) == 4
    assert [one["input"]["context"]["payload"]["number"] for one in recorded(client, "submit")] == [
        0,
        1,
        2,
        1,
    ]


async def test_what_nobody_answers_in_time_may_have_been_stored(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.broker.jetstream, "_answer", lambda _reply, _told: None)
    found = await outcomes(bus, client, numbers(2), timeout=0.2)
    assert [type(one) for one in found] == [CallTimeoutError] * 2


async def test_an_agent_without_a_queue_is_told_for_each(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/nobody", "*")
    client = await bus.client("client/cli")
    with pytest.raises(NoResponderError):
        await anext(client.submit_many(bus.id("agent/nobody"), "store", numbers(2), timeout=0.2))


async def test_what_cannot_be_recorded_is_not_sent(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.stop(store)

    def full(_line: bytes) -> None:
        raise AuditError("the disk is full")

    monkeypatch.setattr(parts_of(client).audit, "_write", full)
    found = await outcomes(bus, client, numbers(3))
    assert [type(one) for one in found] == [CallRefusedError] * 3
    assert frames(bus, store) == []
    monkeypatch.undo()


async def test_what_is_stored_stays_so_when_the_next_attempt_at_another_can_not_be_recorded(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.stop(store)
    jetstream, audit, heard = bus.broker.jetstream, parts_of(client).audit, 0
    answer = jetstream._answer

    def full(_line: bytes) -> None:
        raise AuditError("the disk is full")

    def lossy(reply: str, told: dict[str, Any]) -> None:
        nonlocal heard
        heard += 1
        if heard == 3:
            monkeypatch.setattr(audit, "_write", full)
        answer(reply, {"nonsense": True} if heard == 3 else told)

    monkeypatch.setattr(jetstream, "_answer", lossy)
    found = await outcomes(bus, client, numbers(3))
    monkeypatch.undo()
    assert [isinstance(one, Exception) for one in found] == [False, False, True]
    assert isinstance(found[2], CallTimeoutError)
    assert "the disk is full; the task" in str(found[2])
    assert "may have been stored" in str(found[2])


async def test_what_may_have_been_stored_is_not_said_to_be_refused_when_the_queue_has_filled(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.stop(store)
    jetstream, heard = bus.broker.jetstream, 0
    jetstream.streams[tasks_stream_name(store.spiffe_id)].config["max_msgs"] = 1
    answer = jetstream._answer

    def lossy(reply: str, told: dict[str, Any]) -> None:
        nonlocal heard
        heard += 1
        answer(reply, {"nonsense": True} if heard == 1 else told)

    monkeypatch.setattr(jetstream, "_answer", lossy)
    (found,) = await outcomes(bus, client, numbers(1))
    assert isinstance(found, CallTimeoutError)
    assert "is full; the task" in str(found)
    assert len(frames(bus, store)) == 1


async def test_large_payloads_of_a_batch_are_stored_at_the_same_time(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, under_way, all_there = parts_of(client).client.blobs, 0, asyncio.Event()
    assert blobs is not None
    put = blobs.put

    async def together(*args: Any, **more: Any) -> Any:
        nonlocal under_way
        under_way += 1
        if under_way == 3:
            all_there.set()
        await all_there.wait()
        return await put(*args, **more)

    monkeypatch.setattr(blobs, "put", together)
    async with asyncio.timeout(30):
        found = await outcomes(bus, client, [{"number": n, "text": LARGE} for n in range(3)])
    handles = [parts_of(client).handles.of(*one) for one in found]
    assert [(await one.result(timeout=30)).data["stored"] for one in handles] == [0, 1, 2]


async def test_a_submission_that_fails_is_marked_in_its_trace(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing.create(TracingConfig(enabled=True), service="cli", spiffe_id="x", exporter=exporter)
    parts_of(client).client.tracing = tracing
    await bus.stop(store)
    bus.broker.jetstream.streams[tasks_stream_name(store.spiffe_id)].config["max_msgs"] = 1
    await client.submit(bus.id(store), "store", {"number": 0})
    with pytest.raises(QueueFullError):
        await client.submit(bus.id(store), "store", {"number": 1})
    tracing.shutdown()
    _, span = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.status.is_ok, span.attributes["error.type"]) == (False, "QueueFullError")


async def test_where_tracing_is_on_each_has_a_span(
    bus: MemoryBus, client: AgentWeaveClient, store: StoreAgent
) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing.create(TracingConfig(enabled=True), service="cli", spiffe_id="x", exporter=exporter)
    parts_of(client).client.tracing = tracing
    found = await outcomes(bus, client, [*numbers(3), ["no", "object"]])
    tracing.shutdown()
    assert [isinstance(one, Exception) for one in found] == [False, False, False, True]
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == len(spans) == 4
    assert [span.parent for span in spans] == [None] * 4


# --- the pipeline ------------------------------------------------------------------------------------------


async def test_a_pipeline_keeps_order_and_its_window() -> None:
    under_way, most, taken = 0, 0, 0

    async def work(batch: Sequence[int]) -> list[int | Exception]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        assert len(batch) <= BATCH
        await asyncio.sleep(0.001 * (batch[0] % 3))
        under_way -= 1
        return [*batch]

    count = 6 * BATCH + 5

    def endless() -> Any:
        nonlocal taken
        for number in range(count):
            taken = number
            yield number

    results = pipelined(work, endless())
    assert await anext(results) == 0
    assert taken == AT_ONCE * BATCH - 1
    assert [one async for one in results] == list(range(1, count))
    assert most == AT_ONCE


@pytest.mark.parametrize("returned", [True, False])
async def test_a_pipeline_raises_in_place_and_leaves_nothing_running(*, returned: bool) -> None:
    async def work(batch: Sequence[int]) -> list[int | Exception]:
        if batch[0] >= BATCH:
            await asyncio.sleep(60)
        if not returned:
            raise ValueError(2)
        return [0, 1, ValueError(2), 3]

    before = asyncio.all_tasks()
    results = pipelined(work, range(3 * BATCH))
    if returned:
        assert [await anext(results), await anext(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        await anext(results)
    assert asyncio.all_tasks() == before
