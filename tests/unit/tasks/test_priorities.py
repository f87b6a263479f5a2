"""The urgent tasks first, never more at once than there are places, and none never."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.tasks import hints
from agentweave_bus.tasks.task_puller import MOST_PASSED
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio


@dataclass
class Desk:
    """What has begun, in that order, and what keeps the first from ending."""

    begun: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    most: int = 0


DESK: list[Desk] = []


class Worker(SecureAgent):
    """Does one thing at a time, or two."""

    @capability("one", concurrency=1)
    async def one(self, name: str) -> None:
        await self._work(name)

    @capability("two", concurrency=2)
    async def two(self, name: str) -> None:
        await self._work(name)

    async def _work(self, name: str) -> None:
        desk = DESK[0]
        desk.begun.append(name)
        desk.running += 1
        desk.most = max(desk.most, desk.running)
        desk.first.set()
        await desk.open.wait()
        await asyncio.sleep(0)
        desk.running -= 1


@pytest.fixture
async def desk() -> Iterator[Desk]:
    DESK[:] = [Desk()]
    return DESK[0]


@pytest.fixture
async def cli(bus: MemoryBus, desk: Desk) -> AgentWeaveClient:
    await bus.grant("client/cli", "agent/worker", "*")
    await bus.start(Worker)
    return await bus.client("client/cli")


async def submit(
    bus: MemoryBus, cli: AgentWeaveClient, capability: str, *tasks: tuple[str, int | None]
) -> list:
    target = str(bus.id("agent/worker"))
    return [await cli.submit(target, capability, {"name": name}, priority=level) for name, level in tasks]


async def all_of(handles: list) -> None:
    async with asyncio.timeout(30):
        await asyncio.gather(*(one.result() for one in handles))


async def test_of_a_hundred_slow_ones_and_an_urgent_one_that_came_last_the_urgent_one_is_next(
    bus: MemoryBus, cli: AgentWeaveClient, desk: Desk
) -> None:
    handles = await submit(bus, cli, "one", *((f"low {number}", 0) for number in range(100)))
    await asyncio.wait_for(desk.first.wait(), 30)
    handles += await submit(bus, cli, "one", ("normal", None), ("high", 9))
    desk.open.set()
    await all_of(handles)
    assert desk.begun[:3] == ["low 0", "high", "normal"]
    assert desk.begun[3:] == [f"low {number}" for number in range(1, 100)]
    assert desk.most == 1


async def test_who_waits_in_a_slower_queue_has_a_turn_after_so_many_others(
    bus: MemoryBus, cli: AgentWeaveClient, desk: Desk
) -> None:
    handles = await submit(bus, cli, "one", ("first", 5))
    await asyncio.wait_for(desk.first.wait(), 30)
    many = 3 * MOST_PASSED
    handles += await submit(bus, cli, "one", *((f"high {number}", 7) for number in range(many)))
    handles += await submit(bus, cli, "one", *((f"normal {number}", 5) for number in range(3)))
    handles += await submit(bus, cli, "one", *((f"low {number}", 3) for number in range(3)))
    desk.open.set()
    await all_of(handles)
    for slow in ("normal", "low"):
        places = [place for place, name in enumerate(desk.begun) if name.startswith(slow)]
        assert places[0] <= MOST_PASSED + 3
        assert places[1] - places[0] <= MOST_PASSED + 3
    high = [place for place, name in enumerate(desk.begun) if name.startswith("high")]
    assert high[-1] - high[0] <= many + many // MOST_PASSED * 2


@pytest.mark.parametrize("level", [None, 0, 9])
async def test_a_worker_with_nothing_to_do_takes_up_each_at_once_and_never_too_many(
    bus: MemoryBus,
    cli: AgentWeaveClient,
    desk: Desk,
    level: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hints, "_POLL_S", 60.0)
    await bus.clock.advance(100)  # its requests have ended, and were made anew
    for number in range(3):
        handles = await submit(bus, cli, "two", (f"early {number}", level))
        desk.open.set()
        await all_of(handles)  # sooner than a handle looks by itself, or a request ends
    desk.open.clear()
    mixed = [(f"{number}", (None, 0, 9, level)[number % 4]) for number in range(20)]
    handles = await submit(bus, cli, "two", *mixed)
    desk.open.set()
    await all_of(handles)
    assert desk.most == 2
    assert sorted(desk.begun[3:]) == sorted(name for name, _ in mixed)
