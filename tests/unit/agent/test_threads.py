"""Plain handlers in threads: bounded, and honest about the ones that do not end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import anyio
import pytest

from agentweave_bus.agent.threads import HandlerThreads, _Work

pytestmark = pytest.mark.anyio

GREEDY, OTHER = "spiffe://a.test/agent/greedy", "spiffe://a.test/agent/other"


async def kept_waiting(threads: HandlerThreads, caller: str) -> bool:
    """Whether a call of ``caller``'s has no thread within a tenth of a second."""
    with anyio.move_on_after(0.1) as waiting:
        await threads.run(lambda: None, caller)
    return waiting.cancelled_caught


class Stuck:
    """A call that ends when it is released, and that tells how often it began."""

    def __init__(self) -> None:
        self.began = 0
        self._entered, self._released = threading.Semaphore(0), threading.Event()

    def __call__(self) -> None:
        self.began += 1
        self._entered.release()
        self._released.wait(60)

    async def entered(self, times: int) -> None:
        """Wait until that many more have begun."""
        for _ in range(times):
            assert await anyio.to_thread.run_sync(lambda: self._entered.acquire(timeout=30))

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    """A call that ends with the test at the latest."""
    call = Stuck()
    yield call
    call.release()


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


async def test_a_stuck_call_keeps_its_place_until_it_ends(stuck: Stuck) -> None:
    threads = HandlerThreads(1)
    async with anyio.create_task_group() as group:
        group.start_soon(threads.run, stuck)
        await stuck.entered(1)
        group.cancel_scope.cancel()
    assert await kept_waiting(threads, OTHER), "a second thread ran while the first had not ended"
    stuck.release()
    with anyio.fail_after(30):
        assert await threads.run(lambda: "free again") == "free again"


async def test_work_whose_caller_left_before_it_began_does_not_begin(stuck: Stuck) -> None:
    threads, ran = HandlerThreads(1), []
    async with anyio.create_task_group() as group:
        group.start_soon(threads.run, stuck)
        await stuck.entered(1)
        with anyio.move_on_after(0.05):
            await threads.run(lambda: ran.append(1))
        stuck.release()
    with anyio.fail_after(30):
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
async def test_a_caller_s_threads_that_do_not_end_are_half_of_them_at_most(
    stuck: Stuck, size: int, part: int
) -> None:
    threads = HandlerThreads(size)
    async with anyio.create_task_group() as group:
        for _ in range(size + 2):
            group.start_soon(threads.run, stuck, GREEDY)
        await stuck.entered(part)
        assert await kept_waiting(threads, GREEDY)
        group.cancel_scope.cancel()
    assert stuck.began == part
    assert await kept_waiting(threads, GREEDY), "its own are given up and have not ended"
    with anyio.fail_after(30):
        assert await threads.run(lambda: "another's", OTHER) == "another's"
        stuck.release()
        assert await threads.run(lambda: "its own ended", GREEDY) == "its own ended"
    assert stuck.began == part, "what was given up before it began did begin"


async def test_who_waits_for_a_thread_of_its_own_gets_it_when_one_ends(stuck: Stuck) -> None:
    threads = HandlerThreads(4)
    done: list[str] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(threads.run, stuck, GREEDY)
            group.start_soon(threads.run, stuck, GREEDY)
            await stuck.entered(2)
            group.start_soon(threads.run, lambda: done.append("third"), GREEDY)
            await anyio.wait_all_tasks_blocked()
            assert not done
            stuck.release()
    assert done == ["third"]


async def test_nothing_is_kept_of_callers_that_have_no_calls(stuck: Stuck) -> None:
    threads = HandlerThreads(1)
    async with anyio.create_task_group() as group:
        group.start_soon(threads.run, stuck, GREEDY)
        await stuck.entered(1)
        for caller in (GREEDY, OTHER):  # one awaits its part, one the thread
            group.start_soon(threads.run, lambda: None, caller)
        await anyio.wait_all_tasks_blocked()
        assert set(threads._shares) == {GREEDY, OTHER}
        group.cancel_scope.cancel()
    assert set(threads._shares) == {GREEDY}
    stuck.release()
    with anyio.fail_after(30):
        assert await threads.run(lambda: "free again") == "free again"
    assert not threads._shares
