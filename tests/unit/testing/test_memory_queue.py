"""Work queues and set-once slots in memory, by the virtual clock."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.testing import VirtualClock
from agentweave_bus.testing.memory_broker import MemoryBroker
from agentweave_bus.testing.memory_client import MemoryClient
from agentweave_bus.testing.memory_messages import ApiError, rfc3339
from agentweave_bus.testing.memory_subjects import overlap

pytestmark = pytest.mark.anyio

SECOND = 1_000_000_000
DAY = 86_400
NEXT = "$JS.API.CONSUMER.MSG.NEXT.queue.c"


class Worker:
    """A connection that pulls, and what it was given, and told after how many seconds."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.client = MemoryClient(broker)
        self.given: list[Msg] = []
        self.told: list[tuple[str, int]] = []

    async def begin(self, name: str) -> None:
        self.inbox = name
        self._began = asyncio.get_running_loop().time()
        await self.client.connect()
        await self.client.subscribe(name, cb=self._received)

    async def pull(self, batch: int = 1, **more: Any) -> None:
        await self.client.publish(NEXT, json.dumps({"batch": batch, **more}).encode(), self.inbox)

    async def _received(self, message: Msg) -> None:
        if message.reply:
            self.given.append(message)
        else:
            seconds = round(asyncio.get_running_loop().time() - self._began)
            self.told.append(((message.headers or {}).get("Status", ""), seconds))

    @property
    def data(self) -> list[bytes]:
        return [one.data for one in self.given]


class Queue:
    """A broker with a queue, a consumer of it, and slots."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.broker = MemoryBroker(self.clock.time_ns)
        self.jetstream = self.broker.jetstream
        queue = {"name": "queue", "subjects": ["q.*"], "retention": "workqueue", "max_age": 31 * DAY * SECOND}
        self.stream = self.jetstream.add_stream(queue)
        once = {"discard": "new", "discard_new_per_subject": True, "max_msgs_per_subject": 1}
        slots = {"name": "slots", "subjects": ["s.>"], "max_age": 32 * DAY * SECOND, "allow_direct": True}
        self.slots = self.jetstream.add_stream({**slots, **once})
        self.jetstream.add_consumer("queue", "c", {"ack_policy": "explicit", "filter_subject": "q.a"})
        self.admin = Worker(self.broker)

    async def worker(self, name: str) -> Worker:
        worker = Worker(self.broker)
        await worker.begin(name)
        return worker

    def info(self) -> dict[str, Any]:
        return self.stream.consumers["c"].info()


@asynccontextmanager
async def opened() -> AsyncIterator[Queue]:
    queue = Queue()
    await queue.admin.begin("admin")
    try:
        yield queue
    finally:
        await queue.broker.close()


async def test_who_disconnects_leaves_nothing_waiting_and_another_gets_its_message() -> None:
    async with opened() as queue:
        first, second = await queue.worker("one"), await queue.worker("two")
        await first.pull(9)
        await second.pull(9)
        for name in (b"a", b"b"):
            await queue.admin.client.publish("q.a", name)
        await queue.clock.advance(0)
        assert (first.data, second.data) == ([b"a"], [b"b"])
        await first.client.close()
        assert queue.info()["num_waiting"] == 1
        await second.client.publish(second.given[0].reply, b"+ACK")
        await queue.clock.advance(29)
        await queue.admin.client.publish("q.a", b"c")
        await queue.clock.advance(0)
        assert second.data == [b"b", b"c"]
        await queue.clock.advance(1)
        assert second.data == [b"b", b"c", b"a"]
        assert second.given[-1].reply.split(".")[4] == "2"


async def test_who_unsubscribes_is_given_nothing() -> None:
    async with opened() as queue:
        worker = await queue.worker("one")
        await worker.pull(9)
        await worker.client.subscriptions[0].unsubscribe()
        await queue.admin.client.publish("q.a", b"a")
        assert (queue.info()["num_pending"], queue.info()["num_ack_pending"]) == (1, 0)


async def test_requests_end_and_hearts_beat_in_time() -> None:
    async with opened() as queue:
        worker = await queue.worker("one")
        await worker.pull(1, expires=1000 * SECOND, idle_heartbeat=400 * SECOND)
        await queue.clock.advance(5000)
        assert worker.told == [("100", 400), ("100", 800), ("408", 1000)]


async def test_given_back_for_days_and_kept_while_there_is_progress() -> None:
    async with opened() as queue:
        worker = await queue.worker("one")
        await worker.pull(9)
        for name in (b"a", b"b"):
            await queue.admin.client.publish("q.a", name)
        await queue.clock.advance(0)
        later = json.dumps({"delay": 2 * DAY * SECOND})
        await worker.client.publish(worker.given[0].reply, f"-NAK {later}".encode())
        for _ in range(4):
            await queue.clock.advance(25)
            await worker.client.publish(worker.given[1].reply, b"+WPI")
        assert (worker.data, queue.info()["num_ack_pending"]) == ([b"a", b"b"], 2)
        await worker.client.publish(worker.given[1].reply, b"+ACK")
        await queue.clock.advance(2 * DAY - 101)
        assert worker.data == [b"a", b"b"]
        await queue.clock.advance(2)
        assert worker.data == [b"a", b"b", b"a"]


async def test_what_is_too_old_comes_no_more_also_when_it_was_given_out() -> None:
    async with opened() as queue:
        worker = await queue.worker("one")
        for _ in range(2):
            await queue.admin.client.publish("q.a", b"a")
        await worker.pull(1)
        await queue.clock.advance(31 * DAY)
        info = queue.info()
        assert (info["num_ack_pending"], info["num_pending"], info["num_redelivered"]) == (0, 0, 0)
        assert queue.stream.info()["state"]["messages"] == 0
        await worker.pull(1, no_wait=True)
        await queue.clock.advance(0)
        assert (worker.told[0][0], len(worker.given)) == ("404", 1)


async def test_a_slot_is_free_again_when_its_message_is_too_old() -> None:
    async with opened() as queue:
        answers: list[dict[str, Any]] = []

        async def heard(message: Msg) -> None:
            answers.append(json.loads(message.data))

        await queue.admin.client.subscribe("answers", cb=heard)
        await queue.admin.client.publish("s.a.0", b"1", "answers")
        await queue.clock.advance(32 * DAY - 1)
        await queue.admin.client.publish("s.a.0", b"2", "answers")
        await queue.clock.advance(2)
        assert queue.slots.last_of("s.a.0") is None
        await queue.admin.client.publish("s.a.0", b"3", "answers")
        await queue.clock.advance(0)
        assert [one["seq"] for one in answers] == [1, 0, 2]
        assert answers[1]["error"]["err_code"] == 10077
        kept = queue.slots.last_of("s.*.0")
        assert kept is not None
        assert kept.data == b"3"


async def test_a_full_queue_takes_messages_again_when_some_are_done() -> None:
    async with opened() as queue:
        queue.stream.update({**queue.stream.config, "discard": "new", "max_msgs": 2})
        worker = await queue.worker("one")
        for _ in range(2):
            await queue.admin.client.publish("q.a", b"a")
        with pytest.raises(ApiError, match="maximum messages exceeded"):
            queue.stream.store("q.a", b"a", None)
        await worker.pull(1)
        await queue.clock.advance(0)
        await worker.client.publish(worker.given[0].reply, b"+TERM")
        queue.stream.store("q.a", b"a", None)


async def _through(count: int) -> int:
    """Store, pull and acknowledge so many messages; return how many lines of the bus were run for it."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if "agentweave_bus" in frame.f_code.co_filename else None

    async with opened() as queue:
        worker = await queue.worker("one")
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for number in range(count):
                queue.stream.store("q.a", b"a", None)
                queue.slots.store(f"s.{number}", b"a", None)
            config = {**queue.stream.consumers["c"].config, "max_ack_pending": count}
            queue.jetstream.add_consumer("queue", "c", config)
            await worker.pull(count)
            await queue.clock.advance(0)
            for number, one in enumerate(worker.given):
                await worker.client.publish(one.reply, b"+ACK")
                assert queue.slots.last_of(f"s.{number}") is not None
        finally:
            sys.settrace(before)
        assert (len(queue.stream.messages), queue.info()["ack_floor"]["stream_seq"]) == (0, count)
    return lines


async def test_a_message_takes_as_much_when_there_are_many() -> None:
    few, many = await _through(100), await _through(1000)
    assert 100 * 10 < many < few * 10 * 1.5


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("*.b", "a.*", True),
        (">", "a", True),
        ("a.*.c", "a.>", True),
    ],
)
def test_overlapping_subjects(one: str, other: str, both: bool) -> None:
    assert overlap(one, other) == overlap(other, one) == both


def test_times_have_no_zeros_at_the_end() -> None:
    assert rfc3339(1_700_000_000_120_000_000) == "2023-11-14T22:13:20.12Z"
    assert rfc3339(1_700_000_000_000_000_000) == "2023-11-14T22:13:20Z"
