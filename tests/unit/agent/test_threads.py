"""Plain handlers in threads: bounded, and honest about the ones that do not end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import anyio
import pytest

from agentweave_bus.agent.threads import HandlerThreads, _Work

pytestmark = pytest.mark.anyio

GREEDY, OTHER = "spiffe://a.test/agent/greedy", "spiffe://a.test/agent/other"


async def run_for(threads: HandlerThreads, caller: str, call: Callable[[], object]) -> object:
    """Run ``call`` as one of ``caller``'s requests; ``None`` when it had no thread or time for it."""
    with anyio.move_on_after(0.1):
        return await threads.run(call, caller)
    return None


async def test_it_returns_what_the_call_returns_from_another_thread() -> None:
    assert await HandlerThreads().run(threading.get_ident) != threading.get_ident()


async def test_it_raises_what_the_call_raises_and_goes_on() -> None:
    threads = HandlerThreads(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
    assert await threads.run(lambda: 1) == 1


async def test_no_more_run_than_there_are_places() -> None:
    threads, lock = HandlerThreads(2), threading.Lock()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(threads.run, work)
    assert most == 2


async def test_a_stuck_call_keeps_its_place_until_it_ends() -> None:
    threads, release, began = HandlerThreads(1), threading.Event(), threading.Event()

    def stuck() -> None:
        began.set()
        release.wait(10)

    with anyio.move_on_after(0.2) as first:
        await threads.run(stuck)
    assert first.cancelled_caught
    assert began.is_set()
    with anyio.move_on_after(0.1) as second:
        await threads.run(lambda: None)
    assert second.cancelled_caught, "a second thread ran while the first had not ended"
    release.set()
    with anyio.fail_after(5):
        assert await threads.run(lambda: "free again") == "free again"


async def test_work_whose_caller_left_before_it_began_does_not_begin() -> None:
    threads, release, ran = HandlerThreads(1), threading.Event(), []
    async with anyio.create_task_group() as group:
        group.start_soon(threads.run, lambda: release.wait(10))
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.05):
            await threads.run(lambda: ran.append(1))
        release.set()
    with anyio.fail_after(5):
        await threads.run(lambda: None)
    assert ran == []


async def test_a_thread_that_comes_too_late_finds_nothing_to_do() -> None:
    ran, given_back = [], []
    work = _Work(lambda: ran.append(1))
    work.when_over = lambda: given_back.append(1)
    work.leave()
    work.run(asyncio.get_running_loop())
    assert (ran, given_back) == ([], [1])


@pytest.mark.parametrize(("size", "part"), [(4, 2), (5, 2), (2, 1)])
async def test_a_caller_s_threads_that_do_not_end_are_half_of_them_at_most(size: int, part: int) -> None:
    threads, release, began = HandlerThreads(size), threading.Event(), []

    def stuck() -> None:
        began.append(1)
        release.wait(10)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(size + 2):
                group.start_soon(run_for, threads, GREEDY, stuck)
        assert len(began) == part
        assert await run_for(threads, GREEDY, lambda: "one more") is None
        assert await run_for(threads, OTHER, lambda: "another's") == "another's"
    finally:
        release.set()
    with anyio.fail_after(5):
        while await run_for(threads, GREEDY, lambda: "its own ended") is None:
            pass
    assert len(began) == part, "what was given up before it began did begin"


async def test_who_waits_for_a_thread_of_its_own_gets_it_when_one_ends() -> None:
    threads, release, entered = HandlerThreads(4), threading.Event(), threading.Semaphore(0)
    done: list[str] = []

    def hold() -> None:
        entered.release()
        release.wait(10)

    async def greedy(call: Callable[[], object]) -> None:
        await threads.run(call, GREEDY)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(greedy, hold)
            group.start_soon(greedy, hold)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(greedy, lambda: done.append("third"))
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(lambda: [entered.acquire(timeout=5) for _ in range(2)])
            assert not done
            release.set()
    assert done == ["third"]


async def test_nothing_is_kept_of_callers_that_have_no_calls() -> None:
    threads, release = HandlerThreads(1), threading.Event()
    try:
        async with anyio.create_task_group() as group:
            for caller in (GREEDY, GREEDY, OTHER):  # one has the thread, one awaits its part, one the thread
                group.start_soon(run_for, threads, caller, lambda: release.wait(10))
        assert set(threads._shares) == {GREEDY}
    finally:
        release.set()
    with anyio.fail_after(5):
        assert await threads.run(lambda: "free again") == "free again"
    assert not threads._shares
