"""Passes that only undo what a task's steps did: told apart from attempts, wherever a task is told of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskHandle, capability
from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.cli.dlq import _drawn
from agentweave_bus.cli.task_drawing import _words
from agentweave_bus.envelope import decode_frame, decode_payload
from agentweave_bus.exceptions import TaskFailedError
from agentweave_bus.tasks import performer
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio


class Booking(SecureAgent):
    """Reserves, and then does what its test says; its releases fail as often as that says."""

    def on_start(self) -> None:
        self.ran: list[str] = []
        self.releases_fail = 0
        self.release_hangs = False
        self.hangs = asyncio.Event()
        self.then = "fail"

    @capability("book", retry=Retry(attempts=1))
    async def book(self) -> Any:
        await self.context.step("reserve", self.reserve, compensate=self.release)
        await self.context.step("sell", self.sell)

    @capability("refuse", retry=Retry(attempts=3))
    async def refuse(self) -> Any:
        await self.book()

    async def sell(self) -> None:
        self.ran.append("book")
        if self.then == "hang":
            self.hangs.set()
            await asyncio.sleep(1e6)
        if self.then == "later":
            raise RetryableError("it is full")
        raise TaskFailedError("no")

    async def reserve(self) -> str:
        return "r"

    async def release(self, _held: Any) -> None:
        self.ran.append("release")
        if self.release_hangs:
            self.hangs.set()
            await asyncio.sleep(1e6)
        if self.releases_fail:
            self.releases_fail -= 1
            raise RetryableError("nobody is there", retry_after=1)


async def submitted(bus: MemoryBus, name: str = "book") -> TaskHandle:
    await bus.grant("client/cli", "agent/booking", name)
    return await (await bus.client("client/cli")).submit(bus.id("agent/booking"), name, {})


async def told(handle: TaskHandle) -> list[tuple[str, bool]]:
    return [(str(one.state), one.undoing) async for one in handle.events()]


def letters(bus: MemoryBus) -> list[dict[str, Any]]:
    """What the records of the dead letters say."""
    stream = bus.broker.jetstream.streams[dead_stream_name(bus.id("agent/booking"))]
    frames = [one.data for one in stream.messages.values() if one.subject.endswith(".record")]
    return [decode_payload(decode_frame(frame).payload) for frame in frames]


def letter(bus: MemoryBus) -> dict[str, Any]:
    """What the record of the one dead letter says."""
    (body,) = letters(bus)
    return body


def dead_letters_counted(bus: MemoryBus, agent: SecureAgent) -> dict[str, float]:
    """How many dead letters the agent's metrics count, by their reason."""
    (held,) = [one for one in bus._held if getattr(one, "agent", None) is agent]
    assert held.parts is not None
    family = held.parts.metrics.registry.collect()
    samples = [one for metric in family for one in metric.samples if "dead_letters_total" in one.name]
    return {one.labels["reason"]: one.value for one in samples if one.value}


async def until_status(bus: MemoryBus, handle: TaskHandle, state: str) -> None:
    async with asyncio.timeout(600):  # by the clock that is put forward
        while (await handle.status()).state != state:
            await bus.clock.advance(0.5)


async def test_a_compensation_that_is_tried_again(bus: MemoryBus) -> None:
    agent = await bus.start(Booking)
    agent.releases_fail, agent.then = 1, "later"
    handle = await submitted(bus)
    async with asyncio.timeout(30):
        while (await handle.status()).retry_at is None:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.002)
    status = await handle.status()
    assert (status.state, status.undoing, status.to_json()["undoing"]) == ("submitted", True, True)
    await until_status(bus, handle, "failed")
    assert agent.ran == ["book", "release", "release"]
    assert await told(handle) == [
        ("working", False),
        ("submitted", True),
        ("working", True),
        ("failed", True),
    ]
    assert (await handle.status()).undoing
    words = [_words(one) async for one in handle.events()]
    assert words[0] == "working"
    assert words[2] == "working (undoing what was done)"
    body = letter(bus)
    assert body["attempts"] == 1
    assert [one.get("undoing") for one in body["history"]] == [None, True, True]
    drawn = _drawn({"letter": "l", "state": "waiting", **body})
    assert "working (attempt 1)" in drawn
    assert "working (undoing what was done)" in drawn


async def test_what_is_undone_while_there_are_attempts_left_is_no_attempt_either(bus: MemoryBus) -> None:
    agent = await bus.start(Booking)
    agent.releases_fail = 1
    handle = await submitted(bus, "refuse")
    await until_status(bus, handle, "failed")
    assert agent.ran == ["book", "release", "release"]
    undone = [("submitted", True), ("working", True), ("failed", True)]
    assert await told(handle) == [("working", False), *undone]


async def test_a_no_is_no_dead_letter_however_often_undoing_is_tried(bus: MemoryBus) -> None:
    agent = await bus.start(Booking)
    agent.releases_fail = 2
    handle = await submitted(bus)
    await until_status(bus, handle, "failed")
    assert agent.ran == ["book", "release", "release", "release"]
    assert letters(bus) == []


async def test_a_no_whose_worker_is_lost_while_it_is_undone_is_no_dead_letter_either(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performer, "_LAST_WORDS_S", 0.0)  # as who is killed has none
    first = await bus.start(Booking)
    first.release_hangs = True
    handle = await submitted(bus)
    await first.hangs.wait()
    second = await lost(bus, first)
    await until_status(bus, handle, "failed")
    assert (first.ran, second.ran) == (["book", "release"], ["release"])
    assert (await handle.result()).error == "no"
    assert letters(bus) == []


async def test_used_up_and_undone_in_two_passes_it_has_failed_and_is_not_lost(bus: MemoryBus) -> None:
    agent = await bus.start(Booking)
    agent.releases_fail, agent.then = 1, "later"
    handle = await submitted(bus)
    await until_status(bus, handle, "failed")
    assert letter(bus)["reason"] == "it is full"
    assert dead_letters_counted(bus, agent) == {"failed": 1.0}


async def test_an_attempt_whose_compensations_run_in_it_is_one(bus: MemoryBus) -> None:
    agent = await bus.start(Booking)
    handle = await submitted(bus)
    await asyncio.wait_for(handle.result(), 30)
    assert agent.ran == ["book", "release"]
    assert await told(handle) == [("working", False), ("failed", False)]
    assert "undoing" not in (await handle.status()).to_json()


async def test_workers_that_are_lost_in_the_attempt_and_while_it_is_undone(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is undone goes on being undone in the next worker, and the attempts are those that ran."""
    monkeypatch.setattr(performer, "_LAST_WORDS_S", 0.0)  # as who is killed has none
    first = await bus.start(Booking)
    first.then = "hang"
    handle = await submitted(bus)
    await first.hangs.wait()
    second = await lost(bus, first, release_hangs=True)
    third = await lost(bus, second)
    await until_status(bus, handle, "failed")
    assert (first.ran, second.ran, third.ran) == (["book"], ["release"], ["release"])
    assert await told(handle) == [("working", False), ("working", True), ("working", True), ("failed", True)]
    body = letter(bus)
    assert body["attempts"] == 1
    assert "given up after 1 attempt," in body["reason"]
    assert dead_letters_counted(bus, third) == {"lost": 1.0}


async def lost(bus: MemoryBus, worker: Booking, *, release_hangs: bool = False) -> Booking:
    """Have a worker be lost, and another one take over when the broker misses it."""
    await bus.kill_worker(worker)
    again = await bus.start(Booking)
    again.release_hangs = release_hangs
    async with asyncio.timeout(600):  # by the clock that is put forward
        while not again.ran:  # the broker has to miss it, and it has to be nobody's for sure
            await bus.clock.advance(5)
    return again
