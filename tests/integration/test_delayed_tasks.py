"""Delayed, recurring and urgent tasks on a real broker, through its death and the control role's absence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentweave_bus import capability
from agentweave_bus.exceptions import TaskCanceledError
from agentweave_bus.tasks import recurrence
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe
from tests.integration.world import Caller, World

pytestmark = pytest.mark.anyio

TARGET = str(ECHO)
Times = list[tuple[str, float]]


class Clockwork(Probe):
    """Notes what it was asked for and when."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.times: list[tuple[str, float]] = []

    @capability("pieces", concurrency=1)
    async def pieces(self, name: str, seconds: float = 0.0) -> str:
        self.times.append((name, time.time()))
        await asyncio.sleep(seconds)
        return name


Cast = tuple[World, Clockwork, Caller]


@pytest.fixture(scope="module")
async def cast(session_world: World) -> AsyncIterator[Cast]:
    """One worker and one client for all tests here."""
    worker = await session_world.agent(ECHO, Clockwork)
    assert isinstance(worker, Clockwork)
    yield session_world, worker, await session_world.client(CLI)
    await session_world.clear()


@pytest.fixture
def ran(cast: Cast) -> Times:
    cast[1].times.clear()
    return cast[1].times


async def test_it_runs_when_it_is_due(cast: Cast, ran: Times) -> None:
    client = cast[2].client
    due = datetime.now(UTC) + timedelta(seconds=0.8)
    later = await client.submit(TARGET, "pieces", {"name": "later"}, at=due)
    assert (await later.status()).state.value == "submitted"
    assert (await later.result(PATIENCE)).data == "later"
    assert due.timestamp() <= ran[0][1] + 0.01
    assert ran[0][1] < due.timestamp() + 2


@pytest.mark.slow
async def test_it_comes_again_until_it_is_cancelled(
    cast: Cast, ran: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "_SHORTEST_S", 1)  # or the test would take half a minute
    client = cast[2].client
    handle = await client.submit(TARGET, "pieces", {"name": "again"}, every="1s")
    await until(lambda: len(ran) >= 2, "it came twice")
    assert (await handle.cancel()).state.value == "canceled"
    with pytest.raises(TaskCanceledError):
        await handle.result(PATIENCE)
    count = len(ran)
    await asyncio.sleep(1.3)
    assert len(ran) <= count + 1  # one may have been on its way


@pytest.mark.slow
async def test_a_broker_that_dies_in_between_forgets_nothing(cast: Cast, ran: Times) -> None:
    world, client = cast[0], cast[2].client
    early = await client.submit(TARGET, "pieces", {"name": "early"}, delay=0.5)
    late = await client.submit(TARGET, "pieces", {"name": "late"}, delay=2.5)
    await world.stack.nats.kill()
    await asyncio.sleep(0.7)
    await world.stack.nats.start()
    assert (await early.result(PATIENCE)).data == "early"
    assert (await late.result(PATIENCE)).data == "late"
    assert [name for name, _ in ran] == ["early", "late"]


async def test_the_urgent_one_is_next(cast: Cast, ran: Times) -> None:
    client = cast[2].client
    first = await client.submit(TARGET, "pieces", {"name": "first", "seconds": 0.5}, priority=0)
    await until(lambda: bool(ran), "the first has begun")
    low = [await client.submit(TARGET, "pieces", {"name": "low"}, priority=0) for _ in range(20)]
    high = await client.submit(TARGET, "pieces", {"name": "high"}, priority=9)
    await asyncio.gather(*(one.result(PATIENCE) for one in [first, *low, high]))
    assert [name for name, _ in ran][:2] == ["first", "high"]
    assert len(ran) == 22
