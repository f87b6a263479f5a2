"""The time of an event loop, which can be made to stand still and to go on later.

What is due and what is ready is read off the loop's own queues. What a thread does for the loop is seen on
neither, so it is counted: what is handed to ``asyncio.to_thread``, ``run_in_executor`` and anyio's worker
threads, from when the loop is first known here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from functools import cache, partial
from typing import Any, Final

from anyio.lowlevel import checkpoint

from agentweave_bus.authz.policy_watch import PolicyWatch
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["LoopTime"]

_logger = logging.getLogger(__name__)

_LOOK_AGAIN: Final = 0.05
"""Seconds that a thread is waited for before patience is counted anew."""
_LONGEST_TURN: Final = 0.1
"""What one turn takes off the patience, at most: when the whole process was held up, so were its threads."""
_FRAMES_SHOWN: Final = 3
_LOOKS: Final = (PolicyWatch._refresh,)  # noqa: SLF001
"""What is so quick, and done so often (every second, by each agent), that a thread for it would take most of
the time. While time stands still the loop can do it just as well."""


class LoopTime:
    """An event loop whose ``time()`` is ahead. It stays so: timers are set by it, and time can't go back."""

    def __init__(self, loop: asyncio.SelectorEventLoop) -> None:
        self.standing: float | None = None
        self._ahead = 0.0
        self._loop: Any = loop  # without its private queues nobody can tell what is due
        self._real = loop.time
        self._executed = loop.run_in_executor
        self._resolution = 0.0
        self._jobs: set[_Job] = set()
        loop.time = self.time  # type: ignore[method-assign]
        loop.run_in_executor = self._run_in_executor  # type: ignore[method-assign, assignment]
        _count_worker_threads()

    @classmethod
    def known(cls, loop: asyncio.AbstractEventLoop) -> LoopTime | None:
        """Return the time of a loop if it is known already."""
        owner = getattr(loop.time, "__self__", None)
        return owner if isinstance(owner, cls) else None

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> LoopTime:
        """Return the time of a loop, and count from now on what it hands to threads.

        Raises:
            AgentWeaveError: it is not asyncio's own event loop.

        """
        known = cls.known(loop)
        if known is not None:
            return known
        if not isinstance(loop, asyncio.SelectorEventLoop):
            raise AgentWeaveError(
                f"{type(loop).__module__}.{type(loop).__qualname__} can't be put forward;"
                " run tests that use the clock on asyncio's own event loop"
            )
        return cls(loop)

    def time(self) -> float:
        """Return what the loop takes for the time."""
        return self._real() + self._ahead if self.standing is None else self.standing

    def stand(self) -> float:
        """Let time stand still, and return at what."""
        self.standing = self.time()
        # A loop runs what is due before its time plus this. Who then finds that it is not quite time yet
        # waits again, and would do so endlessly while time stands.
        self._resolution = self._loop._clock_resolution  # noqa: SLF001
        self._loop._clock_resolution = 0.0  # noqa: SLF001
        for job in self._jobs:
            job.may_be_left = True
        return self.standing

    def move_to(self, when: float) -> None:
        """Let time stand still at ``when``."""
        self.standing = math.nextafter(when, math.inf)  # the loop runs what is due before its time

    def go_on(self) -> None:
        """Run on from where it stands."""
        if self.standing is not None:
            self._ahead = self.standing - self._real()
            self.standing = None
            self._loop._clock_resolution = self._resolution  # noqa: SLF001

    def next_due(self) -> float:
        """When the next timer is due, by this clock; endless where there is none."""
        # Asked of the loop each time: it makes a new list when many timers have been cancelled.
        timers = self._loop._scheduled  # noqa: SLF001
        if timers and not timers[0].cancelled():  # it is a heap
            return float(timers[0].when())
        return min((timer.when() for timer in timers if not timer.cancelled()), default=math.inf)

    async def at_rest(self, patience: float) -> None:
        """Return when nothing on the loop is ready to run, and nothing that it has handed to a thread runs.

        Work that was under way in a thread before time stood still is left alone after ``patience``
        (seconds of real time).

        Raises:
            AgentWeaveError: other work did not end in that time, or the loop did not come to rest.

        """
        left, then = patience, time.monotonic()
        while True:
            await asyncio.sleep(0)
            ready, jobs = self._loop._ready, self._awaited()  # noqa: SLF001
            # To look at the selector takes nothing from it: the loop is told the same in its next turn.
            if not ready and not self._selected(_LOOK_AGAIN if jobs else 0) and not jobs:
                return
            now = time.monotonic()
            left, then = left - min(now - then, _LONGEST_TURN), now
            if left <= 0:
                self._give_up(list(ready), jobs, patience)
                left = patience

    def _selected(self, longest: float) -> bool:
        """Wait until a socket has something or a thread wakes the loop; tell whether there is more to do."""
        selected = bool(self._loop._selector.select(longest))  # noqa: SLF001
        return selected or self.next_due() < self.time()

    def _awaited(self) -> list[_Job]:
        """Return what runs in threads and is waited for."""
        return [job for job in self._jobs if not job.is_left]

    def _give_up(self, ready: list[asyncio.Handle], jobs: list[_Job], patience: float) -> None:
        began = f"the clock can't be put forward: after {patience:g} s"
        late = [str(job) for job in jobs if not job.may_be_left]
        if late:
            raise AgentWeaveError(
                f"{began} threads are still at work, and their time can't be moved: {'; '.join(sorted(late))}"
            )
        if ready or not jobs:
            busy = "; ".join(sorted(_described(ready))) or "sockets"
            raise AgentWeaveError(f"{began} the event loop has not come to rest; it is kept busy by {busy}")
        for job in jobs:
            job.is_left = True
            _logger.warning("the clock is put forward though a thread is still at work: %s", job)

    # --- threads -----------------------------------------------------------------------------------------

    @contextmanager
    def job(self, call: Callable[..., Any], args: Iterable[Any]) -> Iterator[_Job]:
        """Count what a thread does for as long as somebody on the loop waits for it."""
        job = _Job(_name(call, tuple(args)))
        self._jobs.add(job)
        try:
            yield job
        finally:
            self._jobs.discard(job)

    def _run_in_executor(
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        job = _Job(_name(func, args))
        in_thread = executor is None or isinstance(executor, ThreadPoolExecutor)
        call = partial(job.run, func) if in_thread else func  # another process is sent the function itself
        future: asyncio.Future[Any] = self._executed(executor, call, *args)
        self._jobs.add(job)
        future.add_done_callback(lambda _: self._jobs.discard(job))
        return future


class _Job:
    """A thread's work for a loop."""

    def __init__(self, name: str) -> None:
        self.may_be_left = False  # it was under way before time stood still
        self.is_left = False
        self._name = name
        self._thread: int | None = None

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Do it, in the thread."""
        self._thread = threading.get_ident()
        try:
            return call(*args)
        finally:
            self._thread = None

    def __str__(self) -> str:
        """Return what it is and where it is now, from the outside in."""
        frame = None if self._thread is None else sys._current_frames().get(self._thread)  # noqa: SLF001
        if frame is None:
            return self._name
        stack = traceback.extract_stack(frame)[-_FRAMES_SHOWN:]
        return f"{self._name}, in " + ", ".join(f"{one.name} ({one.filename}:{one.lineno})" for one in stack)


@cache
def _count_worker_threads() -> None:
    """Count anyio's worker threads, too, once for the process. They are of no executor."""
    from anyio._backends._asyncio import AsyncIOBackend  # noqa: PLC0415 - nothing public sees all of them

    run: Callable[..., Awaitable[Any]] = AsyncIOBackend.run_sync_in_worker_thread

    async def run_counted(func: Callable[..., Any], args: tuple[Any, ...], *more: Any, **named: Any) -> Any:
        loop = LoopTime.known(asyncio.get_running_loop())
        if loop is None:
            return await run(func, args, *more, **named)
        if loop.standing is not None and getattr(func, "__func__", None) in _LOOKS:
            await checkpoint()
            return func(*args)
        with loop.job(func, args) as job:
            return await run(partial(job.run, func), args, *more, **named)

    AsyncIOBackend.run_sync_in_worker_thread = staticmethod(run_counted)  # type: ignore[method-assign]


def _name(call: Any, args: tuple[Any, ...]) -> str:
    """Return what a call is called where it was written."""
    while True:
        if isinstance(call, partial):
            call, args = call.func, (*call.args, *args)
        elif isinstance(getattr(call, "__self__", None), Context) and args:  # asyncio.to_thread
            call, args = args[0], args[1:]
        else:
            return str(getattr(call, "__qualname__", None) or repr(call))


def _described(handles: Iterable[asyncio.Handle]) -> set[str]:
    owners = (getattr(handle._callback, "__self__", None) or handle for handle in handles)  # type: ignore[attr-defined]  # noqa: SLF001
    return {repr(owner) for owner in owners}
