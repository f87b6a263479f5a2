"""Plain handlers in threads: bounded, and honest about the ones that do not end."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from agentweave_bus.agent.threads import HandlerThreads, _Work

pytestmark = pytest.mark.anyio


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
