"""Message schedules in memory: a stream that publishes to itself at a time that a message names.

Of what the real server understands there is ``@at`` alone, which is what this project uses. A message with a
schedule takes the place of the one before it on its subject; when it is due a copy without the schedule is
stored on its target, and it goes. As with the real one that takes at least a quarter of a second. Times run
by the event loop's clock, so that a virtual one drives them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Final

from agentweave_bus.bus.slots import nanoseconds_of
from agentweave_bus.testing.memory_messages import ApiError
from agentweave_bus.testing.memory_subjects import has_wildcard, matches_any

__all__ = ["Schedules", "due_of", "fired_headers", "is_scheduled"]

_PATTERN: Final = "Nats-Schedule"
_TARGET: Final = "Nats-Schedule-Target"
_ROLLUP: Final = "Nats-Rollup"
_NANOSECONDS: Final = 1_000_000_000
_SOONEST_S: Final = 0.25
_AT: Final = re.compile(r"@at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z)")


def is_scheduled(headers: dict[str, str]) -> bool:
    """Say whether a message carries a schedule."""
    return _PATTERN in headers


def due_of(subject: str, headers: dict[str, str], subjects: Iterable[str]) -> int:
    """Return when a message with a schedule is due, in nanoseconds since the epoch.

    ``subjects`` are those of its stream.

    Raises:
        ApiError: the schedule is refused, or not of the kind that is kept here.

    """
    for name in headers:
        if name.startswith(_PATTERN) and name not in {_PATTERN, _TARGET}:
            raise ApiError(501, 1, f"the in-memory broker does not know {name}")
    pattern, target = headers[_PATTERN], headers.get(_TARGET, "")
    match = _AT.fullmatch(pattern)
    if match is None:
        if pattern.startswith("@at "):
            raise ApiError(400, 10189, "message schedules pattern is invalid")
        raise ApiError(501, 1, "the in-memory broker has schedules of @at only")
    if not target or target == subject or has_wildcard(target) or not matches_any(list(subjects), target):
        raise ApiError(400, 10190, "message schedules target is invalid")
    return nanoseconds_of(match[1])


def fired_headers(subject: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return where a message that is due goes to, and the headers that it has there."""
    kept = {
        name: value
        for name, value in headers.items()
        if not name.startswith((_PATTERN, "Nats-Expected-")) and name not in {_ROLLUP, "Nats-Msg-Id"}
    }
    return headers[_TARGET], {**kept, "Nats-Scheduler": subject, "Nats-Schedule-Next": "purge"}


class Schedules:
    """What one stream has to publish, and when. ``fire`` is called with the subject of what is due."""

    def __init__(self, time_ns: Callable[[], int], fire: Callable[[str], None]) -> None:
        self._time_ns = time_ns
        self._fire = fire
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def add(self, subject: str, due_ns: int) -> None:
        """Fire what stands on ``subject`` at that time, and not when it was to be fired before."""
        self.remove(subject)
        seconds = max(_SOONEST_S, (due_ns - self._time_ns()) / _NANOSECONDS)
        self._timers[subject] = asyncio.get_running_loop().call_later(seconds, self._due, subject)

    def remove(self, subject: str) -> None:
        """Fire nothing for ``subject``."""
        if (timer := self._timers.pop(subject, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """End every timer."""
        for subject in list(self._timers):
            self.remove(subject)

    def _due(self, subject: str) -> None:
        self._timers.pop(subject, None)
        self._fire(subject)
