"""Handlers that do what none should: their tasks end all the same, and take nobody else's with them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskFailedError, capability
from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.tasks import log
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

AT_ONCE = Retry(attempts=3, first_delay=0.0, last_delay=0.0)


class OddError(BaseException):
    """What ``except Exception`` does not catch."""


class MuteError(RetryableError):
    """One that can't be put into words."""

    def __str__(self) -> str:
        raise ValueError("no words")


class UnrulyAgent(SecureAgent):
    """Counts what it runs."""

    def on_start(self) -> None:
        self.ran = 0
        self.mended = False

    @capability("leave", retry=AT_ONCE)
    async def leave(self) -> None:
        self.ran += 1
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0.1)

    @capability("quit")
    async def quit(self) -> None:
        raise SystemExit(2)

    @capability("quit_thread")
    def quit_thread(self) -> None:
        raise SystemExit(2)

    @capability("odd")
    async def odd(self) -> None:
        raise OddError

    @capability("odd_undoing", retry=AT_ONCE)
    async def odd_undoing(self) -> None:
        await self.context.step("taken", int, compensate=self._odd)
        raise TaskFailedError("no")

    def _odd(self, _value: Any) -> None:
        raise OddError

    @capability("unsayable", retry=AT_ONCE)
    async def unsayable(self) -> None:
        self.ran += 1
        raise RetryableError("half a \ud800 pair", retry_after=1e300 if self.ran == 3 else None)

    @capability("mute", retry=AT_ONCE)
    async def mute(self) -> None:
        self.ran += 1
        raise MuteError

    @capability("forever", retry=Retry(attempts=400, first_delay=0.0, last_delay=0.0))
    async def forever(self) -> str:
        self.ran += 1
        if not self.mended:
            raise RetryableError("not yet")
        return "done"

    @capability("work")
    async def work(self) -> str:
        return "worked"


class Place:
    """The agent and a client."""

    def __init__(self, bus: MemoryBus, agent: UnrulyAgent, client: Any) -> None:
        self.bus, self.agent, self.client = bus, agent, client

    async def failure(self, name: str) -> str:
        """Have something done as a task that fails; return why, once the agent has shown that it goes on."""
        handle = await self.client.submit(self.agent.spiffe_id, name, {})
        result = await handle.result(60)
        assert result.status == "failed"
        assert (await self.client.call(self.agent.spiffe_id, "work", {}, timeout=30)).data == "worked"
        return str(result.error)

    def dead(self) -> int:
        stream = self.bus.broker.jetstream.streams[dead_stream_name(self.bus.id("agent/unruly"))]
        return sum(one.subject.endswith(".record") for one in stream.messages.values())


@pytest.fixture
async def place(bus: MemoryBus) -> Place:
    await bus.grant("client/cli", "agent/unruly", "*")
    return Place(bus, await bus.start(UnrulyAgent), await bus.client("client/cli"))


@pytest.mark.parametrize("name", ["quit", "quit_thread", "odd"])
async def test_what_except_exception_does_not_catch_ends_the_task_and_not_the_worker(
    place: Place, name: str
) -> None:
    assert (await place.failure(name)).startswith("internal error; correlation id ")
    answer = await place.client.call(place.agent.spiffe_id, name, {}, timeout=30)
    assert answer.error.startswith("internal error; correlation id ")


async def test_nor_does_it_where_something_is_undone(place: Place) -> None:
    assert "the compensation of step 'taken' failed" in await place.failure("odd_undoing")


async def test_one_that_cancels_itself_is_not_begun_for_ever(place: Place) -> None:
    """As it looks, its worker was stopped each time, which counts for nothing only so often."""
    assert "given up after" in await place.failure("leave")
    assert place.agent.ran <= log._MOST_GIVEN_BACK + AT_ONCE.attempts
    assert place.dead() == 1


async def test_an_error_of_no_words_is_tried_again_like_any_other(place: Place) -> None:
    assert await place.failure("mute") == "MuteError"
    assert place.agent.ran == AT_ONCE.attempts
    assert place.dead() == 1


async def test_nor_has_one_in_no_letters_another_end(place: Place) -> None:
    assert await place.failure("unsayable") == "half a ? pair"
    assert place.agent.ran == AT_ONCE.attempts


async def test_a_task_is_given_up_while_its_log_has_room_for_that(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_MOST_RECORDS", 60)
    monkeypatch.setattr(log, "_ROOM_TO_END", 20)
    assert "given up after 40 records" in await place.failure("forever")
    assert place.agent.ran == 20
    assert place.dead() == 1
