"""Time in tests: a clock that runs by itself and can be put forward.

:class:`VirtualClock` is real time plus what :meth:`VirtualClock.advance` has added. Putting it forward wakes
whatever sleeps or waits on the event loop in the order in which it is due, each at its time: deadlines,
retries, renewals of SVIDs, redeliveries. What it can't move: threads that sleep, other processes, sockets,
and code that reads :mod:`time` or ``datetime.now()`` itself instead of asking this clock.

:class:`RealClock` has the same methods and waits instead, for a bus whose broker is another process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["Clock", "RealClock", "VirtualClock"]

_MAX_TURNS: Final = 1_000
"""Turns of the loop that are waited for at one instant, should something never come to rest."""
_LONGEST_REAL_WAIT: Final = 60.0


class Clock(Protocol):
    """What a bus of these tools has as ``clock``."""

    def time_ns(self) -> int:
        """Return the time, in nanoseconds since the epoch."""

    def monotonic_ns(self) -> int:
        """Return a time that only grows, in nanoseconds."""

    def now(self) -> datetime:
        """Return the time, aware, in UTC."""

    async def advance(self, seconds: float | timedelta) -> None:
        """Let that much time go by."""


class VirtualClock:
    """Real time, and what was added to it. Of one event loop, which must be asyncio's own.

    While :meth:`advance` runs, time stands still between two things that are due, however long they take.
    """

    def __init__(self) -> None:
        self._ahead_ns = 0
        self._standing: int | None = None  # the monotonic clock, while it stands still

    def time_ns(self) -> int:
        """Return the time, in nanoseconds since the epoch."""
        return time.time_ns() - time.monotonic_ns() + self.monotonic_ns()

    def monotonic_ns(self) -> int:
        """Return a time that only grows, in nanoseconds."""
        return time.monotonic_ns() + self._ahead_ns if self._standing is None else self._standing

    def now(self) -> datetime:
        """Return the time, aware, in UTC."""
        return datetime.fromtimestamp(self.time_ns() / 1e9, UTC)

    async def advance(self, seconds: float | timedelta) -> None:
        """Put the clock forward; returns when all that was due on this loop has had its turn.

        Raises:
            AgentWeaveError: ``seconds`` is negative, the event loop can't be put forward (uvloop), or this
                is done already by somebody else.

        """
        wanted = _seconds(seconds)
        loop = _LoopTime.of(asyncio.get_running_loop())
        if loop.standing is not None:
            raise AgentWeaveError("the clock is being put forward already")
        began = loop.standing = loop.time()
        began_ns = self._standing = self.monotonic_ns()
        try:
            await loop.at_rest()
            while loop.standing < began + wanted:
                loop.standing = min(max(loop.next_due(), loop.standing), began + wanted)
                self._standing = began_ns + round((loop.standing - began) * 1e9)
                await loop.at_rest()
        finally:
            self._ahead_ns = self._standing - time.monotonic_ns()
            self._standing = None
            loop.go_on()


class RealClock:
    """The clock of this machine."""

    time_ns: Final = staticmethod(time.time_ns)
    monotonic_ns: Final = staticmethod(time.monotonic_ns)

    def now(self) -> datetime:
        """Return the time, aware, in UTC."""
        return datetime.now(UTC)

    async def advance(self, seconds: float | timedelta) -> None:
        """Wait that long.

        Raises:
            AgentWeaveError: longer than a minute, which no test should wait.

        """
        wait = _seconds(seconds)
        if wait > _LONGEST_REAL_WAIT:
            raise AgentWeaveError(
                f"here time is real: {wait:g} s would have to be waited for; use the in-memory bus"
            )
        await asyncio.sleep(wait)


def _seconds(value: float | timedelta) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if not seconds >= 0:
        raise AgentWeaveError(f"a clock is put forward, not by {seconds:g} s")
    return seconds


class _LoopTime:
    """An event loop whose ``time()`` is ahead. It stays so: timers are set by it, and time can't go back."""

    _known: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopTime]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.BaseEventLoop, real: Callable[[], float]) -> None:
        self.standing: float | None = None
        self._ahead = 0.0
        # Neither queue has a public name; without them nobody can tell what is due.
        self._timers: list[Any] = loop._scheduled  # type: ignore[attr-defined]  # noqa: SLF001
        self._ready: Any = loop._ready  # type: ignore[attr-defined]  # noqa: SLF001
        self._real = real

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopTime:
        if loop in cls._known:
            return cls._known[loop]
        if not isinstance(loop, asyncio.BaseEventLoop):
            raise AgentWeaveError(
                f"{type(loop).__module__}.{type(loop).__qualname__} can't be put forward;"
                " run tests that use the clock on asyncio's own event loop"
            )
        made = cls._known[loop] = cls(loop, loop.time)
        loop.time = made.time  # type: ignore[method-assign]
        return made

    def time(self) -> float:
        return self._real() + self._ahead if self.standing is None else self.standing

    def go_on(self) -> None:
        """Run on from where it stands."""
        if self.standing is not None:
            self._ahead = self.standing - self._real()
            self.standing = None

    def next_due(self) -> float:
        """When the next timer is due, by this clock; endless where there is none."""
        return min((timer.when() for timer in self._timers if not timer.cancelled()), default=math.inf)

    async def at_rest(self) -> None:
        """Return when nothing on the loop is ready to run."""
        quiet = 0
        for _ in range(_MAX_TURNS):
            await asyncio.sleep(0)
            quiet = 0 if self._ready else quiet + 1
            if quiet > 1:  # twice: what a socket or a thread brings is queued between two turns
                return
