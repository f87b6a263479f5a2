"""The built-in functions that a compiled policy may ask its host for.

OPA's WebAssembly brings most of Rego's functions with it; what is left to the host is kept to a short
list, each compared with OPA's own in a test. A module that needs another is refused when it is loaded.

A function returns :data:`UNDEFINED` where OPA has no result, and raises :class:`BuiltinRefusedError`
for what OPA can do and this list can't: the decision then fails, it is not guessed. Pure but for the
clock that :class:`HostBuiltins` is made with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

__all__ = ["CLOCK_BUILTINS", "SUPPORTED_BUILTINS", "UNDEFINED", "BuiltinRefusedError", "HostBuiltins"]

SUPPORTED_BUILTINS: Final = frozenset({"sprintf", "time.clock", "time.now_ns", "time.weekday"})
CLOCK_BUILTINS: Final = frozenset({"time.now_ns"})
"""Those whose value changes by itself; a ``standing`` rule may not reach them."""

UNDEFINED: Final = object()
"""No result, as Rego's undefined."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_VERB: Final = re.compile(r"%(.?)", re.DOTALL)
_MAX_EXACT_FLOAT_DIGITS: Final = 15
_PLAIN_EXPONENTS: Final = (-4, 15)
_INT64_MAX: Final = 2**63

Clock: TypeAlias = Callable[[], int]


class BuiltinRefusedError(Exception):
    """A use of a built-in that the embedded engine does not offer; the message names it."""


class HostBuiltins:
    """Calls built-ins by name, with arguments as JSON values.

    ``now_ns`` is the clock (nanoseconds since the epoch). It is read at most once between two calls of
    :meth:`begin`, so that all rules of one decision see the same time, as in OPA.
    """

    def __init__(self, now_ns: Clock) -> None:
        self._clock = now_ns
        self._now: int | None = None
        self._clock_allowed = True

    def begin(self, *, clock_allowed: bool) -> None:
        """Start a decision."""
        self._now = None
        self._clock_allowed = clock_allowed

    def call(self, name: str, arguments: list[Any]) -> Any:
        """Return the value of ``name(*arguments)``, or UNDEFINED.

        Raises:
            BuiltinRefusedError: not offered, or not here.

        """
        if name == "time.now_ns":
            return self._now_ns()
        if name == "time.clock":
            return _clock(arguments[0])
        if name == "time.weekday":
            return _weekday(arguments[0])
        if name == "sprintf":
            return _sprintf(arguments[0], arguments[1])
        raise BuiltinRefusedError(f"the built-in {name} is not offered")

    def _now_ns(self) -> int:
        if not self._clock_allowed:
            raise BuiltinRefusedError("a standing rule may not read the clock")
        if self._now is None:
            self._now = self._clock()
        return self._now


def _clock(operand: Any) -> Any:
    moment = _moment(operand)
    return UNDEFINED if moment is None else [moment.hour, moment.minute, moment.second]


def _weekday(operand: Any) -> Any:
    moment = _moment(operand)
    return UNDEFINED if moment is None else moment.strftime("%A")


def _moment(operand: Any) -> datetime | None:
    """Read ``ns`` or ``[ns, time zone]``; None where OPA has no result."""
    instant, zone = (operand, "UTC") if not isinstance(operand, list) else [*operand, None, None][:2]
    if type(instant) is not int or not isinstance(zone, str):
        return None
    if not -_INT64_MAX <= instant < _INT64_MAX:
        return None
    known = _zone(zone)
    return None if known is None else (_EPOCH + timedelta(microseconds=instant // 1000)).astimezone(known)


def _zone(name: str) -> tzinfo | None:
    if name in {"", "UTC"}:
        return UTC
    if name == "Local":
        raise BuiltinRefusedError("the time zone Local is not offered; name one such as Europe/Berlin")
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _sprintf(template: Any, values: Any) -> Any:
    """Format with ``%s``, ``%d``, ``%v`` and ``%%``, each with a value of its own kind."""
    if not isinstance(template, str) or not isinstance(values, list):
        return UNDEFINED
    rest = iter(values)
    text = _VERB.sub(lambda found: _formatted(found[1], rest), template)
    if next(rest, UNDEFINED) is not UNDEFINED:
        raise BuiltinRefusedError("sprintf has more values than verbs")
    return text


def _formatted(verb: str, rest: Any) -> str:
    if verb == "%":
        return "%"
    value = next(rest, UNDEFINED)
    if verb in {"s", "v"} and isinstance(value, str):
        return value
    if verb in {"d", "v"} and type(value) is int:
        return str(value)
    if verb == "v" and (value is None or isinstance(value, bool)):
        return "null" if value is None else str(value).lower()
    if verb == "v" and isinstance(value, Decimal):
        return _short_fraction(value)
    raise BuiltinRefusedError(
        f"sprintf with %{verb} for this value is not offered; %s takes text, %d an integer, "
        "%v text, an integer, a short fraction, true, false or null"
    )


def _short_fraction(value: Decimal) -> str:
    """Write a fraction that a float holds exactly enough to be written without an exponent."""
    digits = value.normalize()
    small, large = _PLAIN_EXPONENTS
    if len(digits.as_tuple().digits) > _MAX_EXACT_FLOAT_DIGITS or not small <= digits.adjusted() < large:
        raise BuiltinRefusedError("sprintf with %v for so long a fraction is not offered")
    return format(digits, "f")
