"""A clock that rests while its event loop is held, as by a debugger at a breakpoint.

One turn of the loop (all that it runs between two looks at its sockets) counts with ``longest_turn_s`` at
most; a turn that takes longer is taken to be held, and what it takes beyond that never was. So is it when the
whole process was stopped while it waited. By this clock no deadline passes meanwhile, neither of a timer nor
of a request.

The time of day that goes into envelopes is compared with other processes', whose clocks don't rest. It is the
real one, but for as long as somebody in this process waits for an answer: until then it is behind by as much
as was held since, so that what was asked before is still in time when it is answered. That has a limit.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import anyio

__all__ = ["RestingClock", "RestingLoop"]

LONGEST_TURN_S: Final = 1.0
LONGEST_BEHIND_S: Final = 60.0


class _Mark(NamedTuple):
    """An instant, by the real clock and by this one, and by how much this one may go on from it."""

    real: float
    shown: float
    at_most: float | None


class RestingClock:
    """The clock of a process whose event loop is a :class:`RestingLoop`; times are seconds.

    ``longest_behind_s`` after the loop was last held the time of day is the real one in any case. ``real`` is
    a clock that does not rest and is never set.
    """

    def __init__(
        self,
        longest_turn_s: float = LONGEST_TURN_S,
        longest_behind_s: float = LONGEST_BEHIND_S,
        *,
        real: Callable[[], float] = time.monotonic,
    ) -> None:
        self._real = real
        self._longest_turn_s = longest_turn_s
        self._longest_behind_s = longest_behind_s
        now = real()
        self._mark = _Mark(now, now, None)
        self._made_up = 0.0
        self._held_at = now - longest_behind_s
        self._waiting = 0
        self._answered = anyio.Event()

    def monotonic(self) -> float:
        """Return the clock that is never set, without the time in which the loop was held."""
        return self._both()[1]

    def monotonic_ns(self) -> int:
        """Return the same in nanoseconds."""
        return int(self.monotonic() * 1e9)

    def time_ns(self) -> int:
        """Return the time of day, in nanoseconds since the epoch."""
        return time.time_ns() - int(self.behind_s() * 1e9)

    def behind_s(self) -> float:
        """Return by how much the time of day is behind now."""
        mark = self._mark
        real, shown = self._both()
        is_held = mark.at_most is not None and real - mark.real > mark.at_most
        if not self._waiting or (not is_held and shown - self._held_at > self._longest_behind_s):
            self._made_up = real - shown
        return real - shown - self._made_up

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say for the length of the block that somebody in this process waits for an answer."""
        self.behind_s()  # what was held before this one asks is none of its time
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._answered.set()
                self._answered = anyio.Event()

    async def until_right(self) -> None:
        """Wait until the time of day is the real one; for ``longest_behind_s`` at most."""
        with anyio.move_on_after(self._longest_behind_s):
            while self.behind_s() > 0:
                await self._answered.wait()

    def turn_begins(self) -> None:
        """Take note that the loop runs what is ready."""
        self._set(self._longest_turn_s)

    def turn_ends(self, timeout_s: float | None) -> None:
        """Take note that the loop waits, for ``timeout_s`` at most (``None``: without an end)."""
        self._set(None if timeout_s is None else max(0.0, timeout_s) + self._longest_turn_s)

    def _set(self, at_most: float | None) -> None:
        before = self._mark
        real, shown = self._both()
        if before.at_most is not None and real - before.real > before.at_most:
            self._held_at = shown
        elif self._made_up != real - shown:
            self.behind_s()  # it may be time to make it up, whoever asks
        self._mark = _Mark(real, shown, at_most)

    def _both(self) -> tuple[float, float]:
        """Return the real clock, and this one; any thread may ask."""
        mark, real = self._mark, self._real()
        passed = real - mark.real
        return real, mark.shown + (passed if mark.at_most is None else min(passed, mark.at_most))


class RestingLoop(asyncio.SelectorEventLoop):
    """asyncio's own event loop, by a clock that rests."""

    def __init__(self, clock: RestingClock) -> None:
        self._resting = clock
        super().__init__(_Turns(clock))

    def time(self) -> float:
        """Return what is the time for timers, in seconds."""
        return self._resting.monotonic()


class _Turns(selectors.DefaultSelector):
    """Tells a clock when turns begin and end."""

    def __init__(self, clock: RestingClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        self._clock.turn_ends(timeout)
        try:
            return super().select(timeout)
        finally:
            self._clock.turn_begins()
