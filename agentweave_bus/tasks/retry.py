"""How often, and after what wait, a task is tried again.

The capability's author says it with a :class:`Retry`; who submits a task may ask for fewer attempts and
longer waits, never for more or shorter ones. What was asked travels in the head as a flat map of integers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from agentweave_bus.exceptions import ConfigurationError, PayloadError

__all__ = ["LONGEST_DELAY", "Retry"]

LONGEST_DELAY: Final = 86_400.0
"""Seconds. Nobody, author or submitter, can ask for a longer wait between two attempts."""

_MOST_ATTEMPTS: Final = 400  # with two records each there is room for them in a task's log
_MOST_DOUBLINGS: Final = 64
_MILLISECONDS: Final = 1000
_KEYS: Final = ("attempts", "first_ms", "last_ms")


@dataclass(frozen=True, slots=True)
class Retry:
    """A task is run at most ``attempts`` times (1: never again).

    After the first failed attempt ``first_delay`` seconds pass, then twice that and so on, but never more
    than ``last_delay``; each wait is drawn from its upper half, so that what failed together does not come
    back together.

    Raises:
        ConfigurationError: ``attempts`` is not from 1 to 400, or the delays are not
            ``0 <= first_delay <= last_delay <= 86400``.

    """

    attempts: int = 3
    first_delay: float = 1.0
    last_delay: float = 60.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or not 1 <= self.attempts <= _MOST_ATTEMPTS:
            raise ConfigurationError(
                f"A number of attempts is from 1 to {_MOST_ATTEMPTS}, not {self.attempts!r}."
            )
        for delay in (self.first_delay, self.last_delay):
            if not _is_delay(delay):
                raise ConfigurationError(
                    f"A delay is a number of seconds from 0 to {LONGEST_DELAY:.0f}, not {delay!r}."
                )
        if self.first_delay > self.last_delay:
            raise ConfigurationError(
                f"The first delay, {self.first_delay:g} s, is longer than the last, {self.last_delay:g} s."
            )

    def delay(self, attempt: int) -> float:
        """Return how many seconds to wait after ``attempt`` (counted from 1) failed; drawn anew each time."""
        longest = min(self.first_delay * 2.0 ** min(max(attempt, 1) - 1, _MOST_DOUBLINGS), self.last_delay)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter

    def to_map(self) -> dict[str, int]:
        """Return it as a head's ``retry``; delays are rounded up to milliseconds."""
        first, last = (math.ceil(delay * _MILLISECONDS) for delay in (self.first_delay, self.last_delay))
        return {"attempts": self.attempts, "first_ms": first, "last_ms": last}

    def narrowed(self, asked: Mapping[str, int] | None) -> Self:
        """Return this rule with what a submitter asked for, as far as it only lowers and lengthens.

        ``asked`` is a head's ``retry`` with any of ``attempts``, ``first_ms`` and ``last_ms``; whatever
        would give more attempts or shorter delays than this rule is ignored.

        Raises:
            PayloadError: it has another key, or a value that is no such number.

        """
        if not asked:
            return self
        for key, value in asked.items():
            _check(key, value)
        first = max(self.first_delay, _seconds(asked.get("first_ms", 0)))
        last = max(self.last_delay, _seconds(asked.get("last_ms", 0)), first)
        return type(self)(min(self.attempts, asked.get("attempts", self.attempts)), first, last)


def _is_delay(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_DELAY


def _seconds(milliseconds: int) -> float:
    return min(milliseconds / _MILLISECONDS, LONGEST_DELAY)


def _check(key: str, value: object) -> None:
    if key not in _KEYS:
        raise PayloadError(f"retry: {key!r:.80} is no known key; use {', '.join(_KEYS)}")
    if type(value) is not int or value < (1 if key == "attempts" else 0):
        raise PayloadError(f"retry: {key} can't be {value!r:.80}")
