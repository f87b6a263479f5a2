"""The virtual clock waits for what was woken: for threads, and for a loop that has much to do."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.authz import Grants
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import IdentitySource
from agentweave_bus.testing import Bus, MemoryBus, MockIdentityProvider, TrustDomain, VirtualClock
from agentweave_bus.testing.loop_time import LoopTime

pytestmark = pytest.mark.anyio

REAL = 0.05
"""Seconds that a thread takes: far more than the loop needs to come to rest."""
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


async def by_anyio(call: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(call)


async def by_asyncio(call: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(call)


async def by_a_pool(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, call)


def rest() -> None:
    time.sleep(REAL)


@pytest.fixture
async def gate() -> AsyncIterator[threading.Event]:
    """What threads hang at, at most until the test is over: a loop does not end before they do."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("in_thread", [by_anyio, by_asyncio, by_a_pool])
async def test_no_time_goes_by_while_a_thread_works(in_thread: InThread) -> None:
    clock = VirtualClock()
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def work() -> None:
        for _ in range(3):
            await asyncio.sleep(10)
            await in_thread(rest)
            times.append(round(loop.time() - begun, 1))

    begun = loop.time()
    working = asyncio.create_task(work())
    await clock.advance(31)
    assert times == [10, 20, 30]
    await working


async def test_work_that_a_thread_is_at_already_ends_first() -> None:
    clock = VirtualClock()
    clock.follow()
    events: list[str] = []

    async def work() -> None:
        await asyncio.to_thread(rest)
        events.append("work")

    async def deadline() -> None:
        await asyncio.sleep(REAL * 1.5)
        events.append("deadline")

    tasks = [asyncio.create_task(work()), asyncio.create_task(deadline())]
    await asyncio.sleep(0)
    await clock.advance(1)
    assert events == ["work", "deadline"]
    await asyncio.gather(*tasks)


class SlowProvider(MockIdentityProvider):
    """Asks for its SVIDs in a thread, as one that reads files or asks a server does."""

    async def get_svid(self) -> Any:
        await anyio.to_thread.run_sync(rest)
        return await super().get_svid()


async def test_an_svid_is_renewed_in_time_by_a_slow_provider() -> None:
    clock = VirtualClock()
    provider = SlowProvider(trust_domain=TrustDomain(clock=clock))
    source = IdentitySource(provider, clock=lambda: clock.time_ns() / 1e9)
    await source.start()
    first = source.svid
    running = asyncio.create_task(source.run())
    await clock.advance(timedelta(minutes=65))
    assert source.svid.expiry - first.expiry > timedelta(minutes=59)
    running.cancel()


class CountingAgent(SecureAgent):
    """Counts in a thread."""

    @capability("count")
    def count(self) -> dict[str, Any]:
        rest()
        return {"counted": 3}


async def test_a_plain_handler_is_in_time(bus: Bus) -> None:
    await bus.grant("client/cli", "agent/counting", "count")
    agent = await bus.start(CountingAgent)
    client = await bus.client("client/cli")
    call = asyncio.create_task(client.call(agent.spiffe_id, "count", timeout=5))
    await bus.clock.advance(6)
    assert (await call).data == {"counted": 3}


async def test_a_bus_knows_what_was_handed_to_threads_before(bus: Bus) -> None:
    await bus.client("client/cli")
    begun = asyncio.get_running_loop().time()
    work = asyncio.create_task(asyncio.to_thread(rest))
    await asyncio.sleep(0)
    await bus.clock.advance(1)
    assert work.done()
    assert asyncio.get_running_loop().time() - begun < 60


async def test_looking_for_a_new_policy_takes_no_thread_but_is_done(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each agent looks every second: by threads, an hour would take seconds."""
    client = await bus.client("client/cli")
    started: list[Any] = []
    monkeypatch.setattr(LoopTime, "job", lambda _, call, args: started.append(call) or nullcontext())
    await bus.clock.advance(60)
    assert started == []
    monkeypatch.undo()
    agent = await bus.start(CountingAgent)
    grant = {"caller": client.spiffe_id, "callee": agent.spiffe_id, "capabilities": ["count"]}
    bus._write(Grants.model_validate({"grants": [grant]}))  # not by set_grants, which tells everybody
    await bus._follow_grants()
    await bus.clock.advance(2)
    assert (await client.call(agent.spiffe_id, "count")).data == {"counted": 3}


@pytest.mark.parametrize("in_thread", [by_anyio, by_asyncio, by_a_pool])
async def test_a_thread_that_hangs_is_named(in_thread: InThread, gate: threading.Event) -> None:
    clock = VirtualClock(patience=0.2)
    loop = asyncio.get_running_loop()

    def hang() -> None:
        gate.wait()

    async def work() -> None:
        await asyncio.sleep(10)
        await in_thread(hang)

    begun = loop.time()
    working = asyncio.create_task(work())
    with pytest.raises(AgentWeaveError, match=rf"0\.2 s threads.*hang, in hang \({__file__}:\d+\), wait "):
        await clock.advance(3600)
    assert 10 <= loop.time() - begun < 100  # no further than to what could not end
    gate.set()
    await working
    await clock.advance(1)


async def test_what_hung_before_is_left_alone(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock(patience=2)
    clock.follow()
    hanging = asyncio.create_task(by_anyio(gate.wait))
    await asyncio.sleep(0.01)
    with caplog.at_level(logging.WARNING):
        await clock.advance(10)
    assert "Event.wait" in caplog.text
    real = time.monotonic()
    await clock.advance(10)  # not waited for a second time
    assert time.monotonic() - real < 1.9
    gate.set()
    await hanging


@pytest.mark.parametrize("to_thread", ["anyio", "asyncio"])
async def test_nobody_waits_for_work_that_was_abandoned(to_thread: str, gate: threading.Event) -> None:
    clock = VirtualClock()

    async def work() -> None:
        with anyio.move_on_after(0):
            if to_thread == "anyio":
                await anyio.to_thread.run_sync(gate.wait, abandon_on_cancel=True)
            else:
                await asyncio.to_thread(gate.wait)

    clock.follow()
    await work()
    real = time.monotonic()
    await clock.advance(10)
    assert time.monotonic() - real < 9


async def test_a_task_that_never_sleeps_is_named() -> None:
    clock = VirtualClock(patience=0.1)

    async def restless() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    task = asyncio.create_task(restless())
    with pytest.raises(AgentWeaveError, match=r"not come to rest.*restless"):
        await clock.advance(1)
    task.cancel()
    await clock.advance(1)


async def test_a_task_may_need_many_turns() -> None:
    clock = VirtualClock()
    events: list[str] = []

    async def work() -> None:
        await asyncio.sleep(1)
        for _ in range(5_000):
            await asyncio.sleep(0)
        events.append("work")

    async def deadline() -> None:
        await asyncio.sleep(2)
        events.append("deadline")

    tasks = [asyncio.create_task(work()), asyncio.create_task(deadline())]
    await clock.advance(3)
    assert events == ["work", "deadline"]
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_timers_are_found_after_many_were_cancelled(when: str) -> None:
    """The loop throws out cancelled timers when there are many: calls that were answered leave theirs."""
    clock = VirtualClock()
    loop = asyncio.get_running_loop()

    def answer_many() -> None:
        for timer in [loop.call_later(1000, lambda: None) for _ in range(500)]:
            timer.cancel()

    await clock.advance(0)
    if when == "before":
        answer_many()
        await asyncio.sleep(0)
    else:
        loop.call_later(5, answer_many)
    begun, woken = loop.time(), []

    async def sleeper() -> None:
        for _ in range(4):
            await asyncio.sleep(10)
            woken.append(round(loop.time() - begun))

    sleeping = asyncio.create_task(sleeper())
    await clock.advance(60)
    assert woken == [10, 20, 30, 40]
    await sleeping


def test_years_can_go_by() -> None:
    """So far ahead that the loop's clock can't tell a nanosecond."""

    async def main() -> None:
        clock = VirtualClock()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        woken = asyncio.create_task(asyncio.sleep(300 * 86400))
        async with asyncio.timeout(400 * 86400):
            await clock.advance(timedelta(days=399))
        assert woken.done()
        then = loop.time()
        assert then - begun >= 399 * 86400
        again = asyncio.create_task(asyncio.sleep(10))
        await clock.advance(10)
        assert again.done()

    asyncio.run(main())
