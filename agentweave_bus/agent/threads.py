"""Plain ``def`` handlers run in threads, a bounded number of them.

A thread can't be stopped. When a deadline passes its caller stops waiting, but the thread keeps its
place in the limit until it really ends, so that stuck handlers can't pile up. Work whose caller left
before it began does not begin.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from anyio import CapacityLimiter, to_thread

__all__ = ["DEFAULT_HANDLER_THREADS", "HandlerThreads"]

DEFAULT_HANDLER_THREADS: Final = 32


class HandlerThreads:
    """At most ``size`` handlers in threads at a time; others wait, within their own deadline."""

    def __init__(self, size: int = DEFAULT_HANDLER_THREADS) -> None:
        self._size = size

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        return CapacityLimiter(self._size)  # made inside the event loop that it belongs to

    async def run(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` in a thread, with this task's context variables, and return what it returns."""
        work = _Work(call)
        await self._limiter.acquire_on_behalf_of(work)
        loop = asyncio.get_running_loop()
        work.when_over = lambda: self._limiter.release_on_behalf_of(work)
        try:
            # The place is ours already; a limiter of its own keeps anyio from counting it a second time.
            return await to_thread.run_sync(
                work.run, loop, limiter=CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            work.leave()


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
