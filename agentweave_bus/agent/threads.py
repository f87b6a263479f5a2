"""Plain ``def`` handlers run in threads, a bounded number of them.

A thread can't be stopped. When a deadline passes its caller stops waiting, but the thread keeps its
place in the limit until it really ends, so that stuck handlers can't pile up. Work whose caller left
before it began does not begin.

One caller has at most half of the threads, those included that are past their deadline, so that nobody's
slow calls keep everybody else's waiting.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

from anyio import CapacityLimiter, to_thread

__all__ = ["DEFAULT_HANDLER_THREADS", "HandlerThreads"]

DEFAULT_HANDLER_THREADS: Final = 32


class HandlerThreads:
    """At most ``size`` handlers in threads at a time; others wait, within their own deadline.

    Half of ``size`` (at least one) is the most that one caller has, and its further calls wait for one of
    its own to end. Where no caller is named, outside a request, ``size`` alone counts.
    """

    def __init__(self, size: int = DEFAULT_HANDLER_THREADS) -> None:
        self._size = size
        self._shares: Final[dict[str | None, _Share]] = {}  # of callers with calls here, and of no others

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        return CapacityLimiter(self._size)  # made inside the event loop that it belongs to

    async def run(self, call: Callable[[], Any], caller: str | None = None) -> Any:
        """Run ``call`` in a thread for ``caller``, with this task's context variables; return its result."""
        work = _Work(call)
        await self._take_place(work, caller)
        loop = asyncio.get_running_loop()
        work.when_over = partial(self._give_back, work, caller)
        try:
            # The place is ours already; a limiter of its own keeps anyio from counting it a second time.
            return await to_thread.run_sync(
                work.run, loop, limiter=CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            work.leave()

    async def _take_place(self, work: _Work, caller: str | None) -> None:
        share = self._shares.get(caller)
        if share is None:
            most = self._size if caller is None else max(1, self._size // 2)
            share = self._shares[caller] = _Share(CapacityLimiter(most))
        share.calls += 1
        try:
            # The caller's own part first: what waits for that must not stand in the way of others.
            await share.limiter.acquire_on_behalf_of(work)
            try:
                await self._limiter.acquire_on_behalf_of(work)
            except BaseException:
                share.limiter.release_on_behalf_of(work)
                raise
        except BaseException:
            self._leave(share, caller)
            raise

    def _give_back(self, work: _Work, caller: str | None) -> None:
        share = self._shares[caller]
        self._limiter.release_on_behalf_of(work)
        share.limiter.release_on_behalf_of(work)
        self._leave(share, caller)

    def _leave(self, share: _Share, caller: str | None) -> None:
        share.calls -= 1
        if not share.calls:
            del self._shares[caller]


@dataclass(slots=True)
class _Share:
    """One caller's part: its places, and how many of its calls have or await one."""

    limiter: CapacityLimiter
    calls: int = 0


class _Work:
    """One call, and who gives its place back: the caller who leaves, or the thread that ends last."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._running = False
        self._left = False
        self.when_over: Callable[[], None] = lambda: None

    def run(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Do the work, in the thread."""
        with self._lock:
            if self._left:
                return None
            self._running = True
        try:
            return self._call()
        finally:
            self._end(loop)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._running = False
            left = self._left
        if left and not loop.is_closed():
            loop.call_soon_threadsafe(self.when_over)

    def leave(self) -> None:
        """Stop waiting, in the event loop: the work is done, or its caller has no more time."""
        with self._lock:
            self._left = True
            running = self._running
        if not running:
            self.when_over()
