"""What is counted of durable tasks and events: states, retries, redeliveries and dead letters, each once."""

from __future__ import annotations

import pytest

from agentweave_bus import Retry, RetryableError, SecureAgent, capability
from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.client import TaskOptions
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.runtime.wiring import Connected, _count_record
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState
from tests.unit.tasks.event_listeners import Shipping, dead, let, until

pytestmark = pytest.mark.anyio


class FickleAgent(SecureAgent):
    """Fails as often as it is told to, then works."""

    def on_start(self) -> None:
        self.failures = 0
        self.runs = 0

    @capability("work")
    async def work(self) -> None:
        self.runs += 1
        if self.failures:
            self.failures -= 1
            raise RetryableError("not yet", retry_after=1)


def counted(parts: Connected | None, name: str, **labels: str) -> float | None:
    assert parts is not None
    return parts.metrics.registry.get_sample_value(f"agentweave_{name}_total", labels)


async def test_tasks_from_their_first_attempt_to_the_dead_letter(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/fickle", "work")
    fickle = await bus.start(FickleAgent)
    await bus.client()
    worker, client = (one.parts for one in bus._held)
    assert client is not None
    target = bus.id("agent/fickle")
    await until(lambda: tasks_stream_name(target) in bus.broker.jetstream.streams)

    def states() -> dict[str, float | None]:
        names = ("working", "submitted", "completed", "failed", "rejected", "canceled")
        return {name: counted(worker, "task_states", capability="work", state=name) for name in names}

    none = {"working": 0, "completed": 0, "failed": 0, "rejected": 0, "canceled": 0, "submitted": None}
    assert states() == none  # from zero, so that a rate sees the first one

    fickle.failures = 1
    await client.client.submit(target, "work", {}, TaskOptions(retry={"attempts": 2}))
    await until(lambda: fickle.runs == 1)
    await until(lambda: counted(worker, "task_retries", capability="work") == 1)
    await bus.clock.advance(2)
    await until(lambda: states()["completed"] == 1)
    assert states() == {**none, "working": 2, "submitted": 1, "completed": 1}
    assert counted(worker, "redeliveries", capability="work") == 1
    assert counted(worker, "dead_letters", capability="work", reason="failed") == 0

    fickle.failures = 1
    await client.client.submit(target, "work", {}, TaskOptions(retry={"attempts": 1}))
    await until(lambda: states()["failed"] == 1)
    assert counted(worker, "dead_letters", capability="work", reason="failed") == 1
    assert counted(worker, "task_retries", capability="work") == 1

    stream = bus.broker.jetstream.streams[tasks_stream_name(target)]
    stream.store(task_subject(target, "work"), b"signed by nobody", None)
    await until(lambda: counted(worker, "dead_letters", capability="work", reason="unverified") == 1)
    assert counted(client, "task_states", capability="work", state="completed") is None


async def test_a_workers_log_tells_of_each_attempt_that_failed(
    bus: MemoryBus, caplog: pytest.LogCaptureFixture
) -> None:
    await bus.grant("client/cli", "agent/fickle", "work")
    fickle, cli = await bus.start(FickleAgent), await bus.client()

    def told() -> list[tuple[str, str]]:
        records = (one for one in caplog.records if one.name == "agentweave_bus.tasks.performer")
        return [(one.levelname, one.getMessage()) for one in records]

    fickle.failures = 2
    handle = await cli.submit(bus.id("agent/fickle"), "work", {}, retry=Retry(attempts=2))
    task = f"task work/{handle.id} from {bus.id('client/cli')}"
    await until(lambda: len(told()) == 1)
    await bus.clock.advance(2)
    await until(lambda: len(told()) == 2)
    assert told() == [
        ("WARNING", f"{task} failed at attempt 1 and is tried again in 1.0 s: not yet"),
        ("ERROR", f"{task} is given up at attempt 2: not yet"),
    ]


async def test_events_by_the_pattern_of_their_handler(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    worker = bus._held[0].parts

    async def fail() -> None:
        raise RetryableError("never")

    shipping.then = fail
    await cli.publish("order.created", {"order_id": "o-1"})
    for count in range(1, 4):
        await until(lambda count=count: len(shipping.heard) >= count)
        await bus.clock.advance(1.1)
    await until(lambda: len(dead(bus, shipping)) == 2)
    labels = {"capability": "order.*"}
    await until(lambda: counted(worker, "dead_letters", reason="failed", **labels) == 1)
    assert counted(worker, "task_retries", **labels) == 2
    assert counted(worker, "redeliveries", **labels) == 2


def test_a_pass_that_only_undoes_is_no_attempt() -> None:
    metrics = Metrics.create()
    for body in (
        RecordBody(state=TaskState.WORKING, pd="ab" * 32),
        RecordBody(state=TaskState.WORKING, pd="ab" * 32, undoes=True),
        RecordBody(state=TaskState.CANCELED, pd="ab" * 32, undoes=True),
    ):
        _count_record(metrics, "work", body)
    counts = {state: metrics.task_states.labels("other", state).value for state in ("working", "canceled")}
    assert counts == {"working": 1, "canceled": 1}
