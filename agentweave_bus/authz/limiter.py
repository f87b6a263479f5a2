"""Limits on use that one process can count by itself.

A policy says *how many* (``limits`` of its decision); this module counts. Known limits:

==========================  ====================================================================
``max_per_minute``          uses of one action by one caller at one callee
``rate_limit_per_minute``   uses by the caller's whole trust domain
``daily_limit``             sum of the payload's ``amount`` by the caller's trust domain, a UTC day
==========================  ====================================================================

Counts live in this process and start at zero with it: two replicas allow twice as much. Any other
name in ``limits`` is the policy's own business and is not looked at here.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentweave_bus.authz.decision import AuthzContext

__all__ = ["DAY_SECONDS", "MAX_LIMITER_KEYS", "LocalLimiter"]

MAX_LIMITER_KEYS: Final = 65_536
"""How many (limit, caller, ...) are counted at once; when all are in use, further ones are refused."""

_WINDOW_SECONDS: Final = 60
DAY_SECONDS: Final = 86_400
_MAX_POWER: Final = 400
"""Powers of ten: beyond this an amount is no number, for sums of such numbers overflow."""

_PLAIN: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
_MAX_TEXT: Final = 64
_RATE_LIMITS: Final = ("max_per_minute", "rate_limit_per_minute")

_Key: TypeAlias = tuple[str, ...]
_Take: TypeAlias = "Callable[[], None]"


@dataclass(slots=True)
class _Minute:
    """Uses in the last minute, by second: never more than 61 numbers, and never lets more through."""

    seconds: deque[list[int]] = field(default_factory=deque)
    total: int = 0

    def count(self, now_s: int) -> int:
        while self.seconds and self.seconds[0][0] < now_s - _WINDOW_SECONDS:
            self.total -= self.seconds.popleft()[1]
        return self.total

    def take(self, now_s: int) -> None:
        self.total += 1
        if self.seconds and self.seconds[-1][0] == now_s:
            self.seconds[-1][1] += 1
        else:
            self.seconds.append([now_s, 1])


@dataclass(slots=True)
class _Day:
    day: int
    total: Decimal = Decimal(0)


class LocalLimiter:
    """Counts uses against the limits of decisions."""

    def __init__(self, *, max_keys: int = MAX_LIMITER_KEYS) -> None:
        self._max_keys = max_keys
        self._minutes: dict[_Key, _Minute] = {}
        self._days: dict[_Key, _Day] = {}

    def take(self, context: AuthzContext, limits: Mapping[str, Any], *, now_s: int, today: int) -> str | None:
        """Count one use, or return the sentence that says which limit is used up.

        A use counts against all of its limits or against none. ``now_s`` is a clock that never goes
        back (seconds), ``today`` the number of the UTC day.
        """
        takes: list[_Take] = []
        for name in _RATE_LIMITS:
            if name in limits:
                refusal = self._rate(name, context, limits[name], now_s, takes)
                if refusal:
                    return refusal
        if "daily_limit" in limits:
            refusal = self._amount(context, limits["daily_limit"], today, takes)
            if refusal:
                return refusal
        for take in takes:
            take()
        return None

    def _rate(
        self, name: str, context: AuthzContext, bound: object, now_s: int, takes: list[_Take]
    ) -> str | None:
        if type(bound) is not int:
            return f"the policy's {name} is no whole number"
        minute = self._minute(_key(name, context), now_s)
        if minute is None:
            return f"too many callers are being counted for {name}; try again in a minute"
        if minute.count(now_s) >= bound:
            return f"{name} is {bound} and used up; try again in a minute"
        takes.append(lambda: minute.take(now_s))
        return None

    def _minute(self, key: _Key, now_s: int) -> _Minute | None:
        found = self._minutes.get(key)
        if found is None:
            if len(self._minutes) >= self._max_keys:
                idle = [item for item, minute in self._minutes.items() if minute.count(now_s) == 0]
                for item in idle:
                    del self._minutes[item]
            if len(self._minutes) >= self._max_keys:
                return None
            found = self._minutes[key] = _Minute()
        return found

    def _amount(self, context: AuthzContext, bound: object, day: int, takes: list[_Take]) -> str | None:
        limit, amount = _number(bound), _amount_of(context.payload)
        if limit is None:
            return "the policy's daily_limit is no number"
        if amount is None:
            return "daily_limit applies and the payload's amount is no number"
        total = self._day(_key("daily_limit", context), day)
        if total is None:
            return "too many trust domains are being counted for daily_limit"
        if total.total + amount > limit:
            return f"daily_limit is {bound} and this would exceed it"

        def take() -> None:
            total.total += amount

        takes.append(take)
        return None

    def _day(self, key: _Key, day: int) -> _Day | None:
        found = self._days.get(key)
        if found is None or found.day != day:
            if found is None and len(self._days) >= self._max_keys:
                self._days = {item: kept for item, kept in self._days.items() if kept.day == day}
            if found is None and len(self._days) >= self._max_keys:
                return None
            found = self._days[key] = _Day(day)
        return found


def _key(name: str, context: AuthzContext) -> _Key:
    if name == "max_per_minute":
        return (name, context.direction, context.caller, context.callee, context.action)
    return (name, context.direction, context.callee, context.caller_trust_domain)


def _amount_of(payload: object) -> Decimal | None:
    """Return what one use adds to the day: nothing where there is no ``amount``, never less than 0."""
    if not isinstance(payload, dict) or "amount" not in payload:
        return Decimal(0)
    amount = _number(payload["amount"])
    return None if amount is None else max(amount, Decimal(0))


def _number(value: object) -> Decimal | None:
    """Return ``value`` as what can be summed up. Text has to be what the shipped policies take for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    if isinstance(value, str) and (len(value) > _MAX_TEXT or _PLAIN.fullmatch(value) is None):
        return None
    number = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
    return number if number.is_finite() and abs(number.adjusted()) <= _MAX_POWER else None
