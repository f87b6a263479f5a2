"""The JSON that policies are asked with: written strictly, and read strictly before anyone evaluates.

Two evaluators that read the same bytes differently are a hole, so the bytes leave no room for it: UTF-8,
no NaN and no infinity, numbers in plain ASCII digits (a ``Decimal`` keeps all of them), no duplicate
key, no lone surrogate, bounded in size, depth and length of numbers.

:class:`PolicyInput` can only hold bytes that have passed; an engine checks what it gets by making one,
and what :func:`write_input` returns is not checked again. No I/O.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Final, NoReturn, Self

from agentweave_bus.authz.decision import STANDING_CONTEXT_KEYS, STANDING_KEYS, STANDING_LINK_KEYS
from agentweave_bus.exceptions import PayloadError

__all__ = [
    "MAX_INPUT_BYTES",
    "MAX_NESTING",
    "MAX_NUMBER_DIGITS",
    "InputTooLargeError",
    "PolicyInput",
    "check_standing_input",
    "parse_strict",
    "write_input",
]

MAX_INPUT_BYTES: Final = 4 * 1024 * 1024
"""A payload of 1 MiB grows when it is written as JSON (bytes)."""
MAX_NESTING: Final = 48
"""Lists and maps within each other; a payload's own bound is 32, the input adds a few."""
MAX_NUMBER_DIGITS: Final = 400
"""Characters of one number; enough for any float in plain digits."""


class InputTooLargeError(PayloadError):
    """What a policy would be asked about is more than it may see."""


class PolicyInput(bytes):
    """JSON bytes that have passed :func:`parse_strict`.

    Raises:
        PayloadError: they have not.

    """

    __slots__ = ()

    def __new__(cls, raw: bytes) -> Self:
        """Check ``raw``; a ``PolicyInput`` is returned as it is."""
        if type(raw) is cls:
            return raw
        parse_strict(raw)
        return super().__new__(cls, raw)


def write_input(value: Any) -> PolicyInput:
    """Write a JSON value (``Decimal`` stands for a number) as the input of a policy.

    Raises:
        PayloadError: it holds something that is no JSON value, or breaks a bound.

    """
    raw = _write_fast(value)
    if raw is not None:
        return bytes.__new__(PolicyInput, raw)
    parts: list[str] = []
    _write(value, parts, 0)
    return PolicyInput(_encode("".join(parts)))


def parse_strict(raw: bytes) -> Any:
    """Parse JSON bytes, or say why they are none that a policy may see.

    Numbers with a fraction come back as ``Decimal``.

    Raises:
        PayloadError: as the module's description says; ``InputTooLargeError`` where it is too large.

    """
    if len(raw) > MAX_INPUT_BYTES:
        raise InputTooLargeError(f"the policy's input has {len(raw)} bytes, more than {MAX_INPUT_BYTES}")
    try:
        value = _DECODER.decode(str(raw, "utf-8"))
    except PayloadError:
        raise
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the policy's input is not strict JSON: {error}") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING:  # fewer brackets can't be deeper
        _check_depth(value)
    if b"\\u" in raw:
        _check_surrogates(value)
    return value


def check_standing_input(value: Any) -> None:
    """Refuse an input that holds more than a standing answer may depend on.

    Raises:
        PayloadError: it does.

    """
    if not isinstance(value, dict) or not isinstance(value.get("context"), dict):
        raise PayloadError("the input of a standing rule must be an object with a context")
    context = value["context"]
    surplus = set(value) - {*STANDING_KEYS, "context"} | set(context) - {*STANDING_CONTEXT_KEYS}
    for link in context.get("via", ()):
        surplus |= set(link) - {*STANDING_LINK_KEYS}
    if surplus:
        raise PayloadError(f"a standing answer may not depend on {', '.join(sorted(surplus))}")


# --- writing -------------------------------------------------------------------------------------------


def _write_fast(value: Any) -> bytes | None:
    """Write with the C encoder; None where the value needs the careful one.

    The encoder turns odd keys into text and writes large floats with an exponent, so only what reads
    back as the very same value counts.
    """
    try:
        raw = _ENCODER.encode(value).encode()
        return raw if parse_strict(raw) == value else None
    except (TypeError, ValueError, RecursionError, PayloadError):
        return None


def _write(value: Any, out: list[str], depth: int) -> None:
    if value is None or value is True or value is False:
        out.append("null" if value is None else str(value).lower())
    elif isinstance(value, str):
        out.append(_ENCODER.encode(str(value)))
    elif isinstance(value, int | float | Decimal):
        out.append(_plain_number(value))
    elif isinstance(value, dict):
        _write_object(value, out, _deeper(depth))
    elif isinstance(value, list | tuple):
        _write_array(value, out, _deeper(depth))
    else:
        raise PayloadError(f"a policy's input can't hold a {type(value).__name__}")


def _write_object(value: dict[Any, Any], out: list[str], depth: int) -> None:
    separator = "{"
    for key, item in value.items():
        if not isinstance(key, str):
            raise PayloadError(f"a key of a policy's input must be text, not {type(key).__name__}")
        out.append(f"{separator}{_ENCODER.encode(str(key))}:")
        _write(item, out, depth)
        separator = ","
    out.append("}" if value else "{}")


def _write_array(value: list[Any] | tuple[Any, ...], out: list[str], depth: int) -> None:
    separator = "["
    for item in value:
        out.append(separator)
        _write(item, out, depth)
        separator = ","
    out.append("]" if value else "[]")


def _plain_number(value: float | Decimal) -> str:
    if isinstance(value, int):
        if value.bit_length() > MAX_NUMBER_DIGITS * 4:
            raise PayloadError(_TOO_LONG)
        return int.__repr__(value)
    number = value if isinstance(value, Decimal) else Decimal(repr(float(value)))
    if not number.is_finite():
        raise PayloadError("a policy's input can't hold NaN or an infinity")
    if abs(number.adjusted()) > MAX_NUMBER_DIGITS or len(number.as_tuple().digits) > MAX_NUMBER_DIGITS:
        raise PayloadError(_TOO_LONG)
    return format(number, "f") if number else "0"


def _deeper(depth: int) -> int:
    if depth >= MAX_NESTING:
        raise PayloadError(f"the policy's input is nested more than {MAX_NESTING} deep")
    return depth + 1


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PayloadError("a policy's input can't hold half a surrogate pair") from error


# --- reading -------------------------------------------------------------------------------------------

_TOO_LONG: Final = f"a number of the policy's input has more than {MAX_NUMBER_DIGITS} characters"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise PayloadError("the policy's input has the same key twice")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_DIGITS:
        raise PayloadError(_TOO_LONG)
    if text == "-0":
        raise PayloadError("the policy's input has a negative zero")
    return int(text)


def _fraction(text: str) -> Decimal:
    if len(text) > MAX_NUMBER_DIGITS:
        raise PayloadError(_TOO_LONG)
    if "e" in text or "E" in text:
        raise PayloadError("the policy's input has a number with an exponent; write plain digits")
    number = Decimal(text)
    if not number and text.startswith("-"):
        raise PayloadError("the policy's input has a negative zero")
    return number


def _constant(text: str) -> NoReturn:
    raise PayloadError(f"a policy's input can't hold {text}")


def _check_depth(value: Any) -> None:
    """Count level by level; the parser's own recursion is bounded by the interpreter."""
    level, depth = _children([value]), 0
    while level:
        depth = _deeper(depth)
        level = [child for item in level for child in _children(item)]


def _children(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, dict | list)]


def _check_surrogates(value: Any) -> None:
    _encode(json.dumps(value, ensure_ascii=False, default=str))


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)
