"""Time in tests: a clock that runs by itself and can be put forward.

:class:`VirtualClock` is real time plus what :meth:`VirtualClock.advance` has added. Putting it forward wakes
whatever sleeps or waits on the event loop in the order in which it is due, each at its time: deadlines,
retries, renewals of SVIDs, redeliveries. Each has its turn, and what it hands to a thread ends, before the
next is woken. What can't be moved: threads that sleep, other processes, sockets, and code that reads
:mod:`time` or ``datetime.now()`` itself instead of asking this clock.

:class:`RealClock` has the same methods and waits instead, for a bus whose broker is another process.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.testing.loop_time import LoopTime

__all__ = ["Clock", "RealClock", "VirtualClock"]

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
    ``patience`` is how long each may take, in seconds of real time: so long a thread is waited for, and a
    loop that does not come to rest.
    """

    def __init__(self, *, patience: float = 10.0) -> None:
        self.patience = patience
        self._ahead_ns = 0
        self._standing: int | None = None  # the monotonic clock, while it stands still

    def follow(self) -> None:
        """Take note, from now on, of what the running loop hands to threads.

        :meth:`advance` begins with that by itself, and does not know of work that was handed over before.
        """
        with suppress(AgentWeaveError):  # a loop that can't be put forward; advance says so
            LoopTime.of(asyncio.get_running_loop())

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

        A thread's work that began before is waited for as long as ``patience`` says, and then left alone.

        Raises:
            AgentWeaveError: ``seconds`` is negative, the event loop can't be put forward (uvloop), this is
                done already by somebody else, or something that was woken is not done after ``patience``:
                the message says what, and the clock stays at the time when that was due.

        """
        wanted = _seconds(seconds)
        loop = LoopTime.of(asyncio.get_running_loop())
        if loop.standing is not None:
            raise AgentWeaveError("the clock is being put forward already")
        now = began = loop.stand()
        began_ns = self._standing = self.monotonic_ns()
        try:
            await loop.at_rest(self.patience)
            while now < began + wanted:
                now = min(max(loop.next_due(), now), began + wanted)
                loop.move_to(now)
                self._standing = began_ns + round((now - began) * 1e9)
                await loop.at_rest(self.patience)
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
