"""The virtual clock: everything that waits on the loop is woken at its time, in its order."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import anyio
import pytest
import uvloop

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.testing import RealClock, VirtualClock

pytestmark = pytest.mark.anyio


async def test_sleepers_wake_in_order_and_at_their_times() -> None:
    clock = VirtualClock()
    loop = asyncio.get_running_loop()
    begun, woken = loop.time(), []

    async def sleeper(seconds: float, again: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((seconds, round(loop.time() - begun, 1)))
        await anyio.sleep(again)
        woken.append((again, round(loop.time() - begun, 1)))

    tasks = [asyncio.create_task(sleeper(600, 500)), asyncio.create_task(sleeper(1000, 5000))]
    real = time.monotonic()
    await clock.advance(timedelta(seconds=2000))
    assert woken == [(600, 600.0), (1000, 1000.0), (500, 1100.0)]
    assert time.monotonic() - real < 60
    tasks[1].cancel()


def all_times(clock: VirtualClock) -> tuple[float, ...]:
    return clock.time_ns() / 1e9, clock.monotonic_ns() / 1e9, asyncio.get_running_loop().time()


async def test_all_its_times_agree() -> None:
    clock = VirtualClock()
    loop = asyncio.get_running_loop()
    before = all_times(clock)
    first = clock.now()
    await clock.advance(3600)
    for read, earlier in zip(all_times(clock), before, strict=True):
        assert 3600 <= read - earlier < 3700
    assert timedelta(seconds=3600) <= clock.now() - first < timedelta(seconds=3700)
    await asyncio.sleep(0.01)  # it runs by itself, too
    assert loop.time() - before[2] >= 3600.01


async def test_deadlines_of_anyio_and_of_asyncio_run_out() -> None:
    clock = VirtualClock()

    async def wait(scope: object) -> str:
        try:
            async with scope:  # type: ignore[attr-defined]
                await asyncio.Event().wait()
        except TimeoutError:
            return "late"
        return "in time"

    async def with_anyio() -> str:
        with anyio.move_on_after(60) as scope:
            await asyncio.Event().wait()
        return "late" if scope.cancelled_caught else "in time"

    waiting = [asyncio.create_task(wait(asyncio.timeout(60))), asyncio.create_task(with_anyio())]
    await clock.advance(59)
    assert [one.done() for one in waiting] == [False, False]
    await clock.advance(1)
    assert [one.result() for one in waiting] == ["late", "late"]


async def test_work_takes_no_time_while_it_is_put_forward() -> None:
    clock = VirtualClock()
    events: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(10)
        time.sleep(0.02)  # noqa: ASYNC251 - the processor is busy
        await asyncio.sleep(0)
        events.append("work")

    async def deadline() -> None:
        await asyncio.sleep(10.01)
        events.append("deadline")

    tasks = [asyncio.create_task(deadline()), asyncio.create_task(slow())]
    await clock.advance(11)
    assert events == ["work", "deadline"]
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("clock", [VirtualClock(), RealClock()])
async def test_time_does_not_go_back(clock: VirtualClock | RealClock) -> None:
    for wrong in (-1, float("nan")):
        with pytest.raises(AgentWeaveError, match="put forward"):
            await clock.advance(wrong)


async def test_only_one_puts_it_forward() -> None:
    clock = VirtualClock()

    async def meddle() -> None:
        await asyncio.sleep(1)
        with pytest.raises(AgentWeaveError, match="already"):
            await clock.advance(1)

    meddler = asyncio.create_task(meddle())
    await clock.advance(2)
    await meddler


async def test_a_real_clock_waits_and_refuses_to_wait_for_long() -> None:
    clock = RealClock()
    begun = time.monotonic()
    await clock.advance(0.05)
    assert time.monotonic() - begun >= 0.05
    with pytest.raises(AgentWeaveError, match="in-memory"):
        await clock.advance(3600)


def test_uvloop_is_refused_in_words() -> None:
    async def main() -> None:
        with pytest.raises(AgentWeaveError, match="asyncio's own event loop"):
            await VirtualClock().advance(1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
