"""When a recurring task comes again: what ``every`` may say, and the times that follow from it.

Either a period: a whole number and one of ``s``, ``m``, ``h``, ``d``, from ``10s`` on (``30s``, ``1h``): one
control role brings back the tasks of a whole domain. The occurrences are then the first one and what lies
whole periods after it.

Or the five fields of cron, in UTC: minute, hour, day of the month, month, day of the week (0 to 7, of which
both 0 and 7 are Sunday). Each is ``*``, numbers, ranges and lists of those, with ``/n`` for steps:
``*/15 8-17 * * 1-5``. Names, ``@daily`` and seconds are not understood. When both days are given, either
suffices, as cron has it.

A task lives for 31 days at most, and so does its recurrence; what has no time in that span is refused.
Everything here is of numbers: milliseconds since the epoch in, milliseconds since the epoch out.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from agentweave_bus.exceptions import ConfigurationError

__all__ = ["Recurrence", "recurrence"]

_PERIOD: Final = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_SHORTEST_S: Final = 10
_LONGEST_DAYS: Final = 31
_LONGEST_S: Final = _LONGEST_DAYS * 86_400
_MINUTE_MS: Final = 60_000
_DAY_MS: Final = 86_400_000

_FIELD: Final = re.compile(r"(\*|[0-9]{1,2}(?:-[0-9]{1,2})?)(?:/([1-9][0-9]?))?")
_BOUNDS: Final = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
_SUNDAY: Final = 7
_LONGEST_TEXT: Final = 128


class Recurrence(Protocol):
    """The times of one recurring task."""

    def next_after(self, at_ms: int) -> int | None:
        """Return the first time that is later than ``at_ms``; ``None`` if there is none in 31 days."""

    def latest(self, at_ms: int) -> int | None:
        """Return the last time that is not later than ``at_ms``; ``None`` if there was none yet."""


def recurrence(every: str, first_ms: int) -> Recurrence:
    """Read what ``every`` says; there is no time before ``first_ms``.

    Raises:
        ConfigurationError: it is neither a period nor cron's five fields, or comes up at no time.

    """
    if (period := _PERIOD.fullmatch(every)) is not None:
        seconds = int(period[1]) * _SECONDS[period[2]]
        if _SHORTEST_S <= seconds <= _LONGEST_S:
            return _Periodic(first_ms, seconds * 1000)
    elif len(fields := every[:_LONGEST_TEXT].split(" ")) == len(_BOUNDS) and len(every) < _LONGEST_TEXT:
        made = _Cron(
            first_ms, *(_values(field, *bounds) for field, bounds in zip(fields, _BOUNDS, strict=True))
        )
        if made.next_after(first_ms - 1) is not None:
            return made
    raise _not_understood(every)


def _not_understood(every: str) -> ConfigurationError:
    return ConfigurationError(
        f"{every[:80]!r} says not when a task comes again.",
        hint="Write a period from 10s to 31d, as 1h, or the five fields of cron (UTC): */15 8-17 * * 1-5",
    )


@dataclass(frozen=True, slots=True)
class _Periodic:
    first_ms: int
    period_ms: int

    def next_after(self, at_ms: int) -> int | None:
        if at_ms < self.first_ms:
            return self.first_ms
        return self.first_ms + ((at_ms - self.first_ms) // self.period_ms + 1) * self.period_ms

    def latest(self, at_ms: int) -> int | None:
        if at_ms < self.first_ms:
            return None
        return at_ms - (at_ms - self.first_ms) % self.period_ms


@dataclass(frozen=True, slots=True)
class _Cron:
    first_ms: int
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]

    def next_after(self, at_ms: int) -> int | None:
        start = max(at_ms + 1, self.first_ms)
        day = start // _DAY_MS
        for number in range(day, day + _LONGEST_DAYS + 1):
            times = self._times(number)
            place = bisect_left(times, start - number * _DAY_MS)
            if place < len(times):
                return number * _DAY_MS + times[place]
        return None

    def latest(self, at_ms: int) -> int | None:
        day = at_ms // _DAY_MS
        for number in range(day, max(self.first_ms // _DAY_MS, day - _LONGEST_DAYS) - 1, -1):
            times = self._times(number)
            place = bisect_right(times, at_ms - number * _DAY_MS)
            if place:
                found = number * _DAY_MS + times[place - 1]
                return found if found >= self.first_ms else None
        return None

    def _times(self, day: int) -> list[int]:
        """Return when in a day, counted from the epoch, in milliseconds from its beginning."""
        if not self._has(day):
            return []
        minutes = sorted(self.minutes)
        return [(hour * 60 + minute) * _MINUTE_MS for hour in sorted(self.hours) for minute in minutes]

    def _has(self, day: int) -> bool:
        date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
        if date.month not in self.months:
            return False
        of_month, of_week = date.day in self.days, date.isoweekday() % _SUNDAY in self.weekdays
        if len(self.days) < _BOUNDS[2][1] and len(self.weekdays) < _SUNDAY:
            return of_month or of_week
        return of_month and of_week


def _values(field: str, low: int, high: int) -> frozenset[int]:
    values: set[int] = set()
    for part in field.split(","):
        match = _FIELD.fullmatch(part)
        if match is None:
            raise _not_understood(field)
        first, last = low, high
        if match[1] != "*":
            start, _, end = match[1].partition("-")
            first, last = int(start), int(end or start)
            if not low <= first <= last <= high or (match[2] and not end):
                raise _not_understood(field)
        values.update(range(first, last + 1, int(match[2] or 1)))
    return frozenset(value % _SUNDAY for value in values) if high == _SUNDAY else frozenset(values)
