"""Strict msgpack, and payloads: JSON values encoded with it.

msgpack has several encodings of one value, and types that JSON lacks. Here a sequence of bytes is
accepted only if it holds exact JSON-like types and packs to the same bytes again; so two receivers
can't read it differently, and it can be hashed. What that leaves out: timestamps and other extension
types, keys that are not text, duplicate keys, 32-bit floats, lengths longer than needed.

A payload is a JSON value within bounds: no NaN, no infinity, no lone surrogate, integers of 64 bits,
numbers of at most 38 digits with exponents within ±38. Bounds are checked before anything is written
out, because a ``Decimal`` of eleven bytes can stand for 300 million digits.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, Final, TypeAlias
from uuid import UUID, uuid5

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel

from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, Limits
from agentweave_bus.exceptions import MalformedEnvelopeError, PayloadError

__all__ = [
    "JsonValue",
    "convert_payload",
    "decode_payload",
    "encode_payload",
    "new_id",
    "occurrence_id",
    "pack",
    "to_json_value",
    "unpack_exact",
]

JsonValue: TypeAlias = Any
"""``None``, ``bool``, ``int``, ``float``, ``str``, or a ``list`` or ``dict`` of these."""

_SMALLEST_INT: Final = -(2**63)
_LARGEST_INT: Final = 2**64 - 1
_SCALARS: Final = frozenset({str, bool, type(None)})

pack: Final[Callable[[object], bytes]] = msgpack.Packer(use_bin_type=True, strict_types=True).pack
"""Encode a value of exact types. A packer empties itself after each call, and calls don't overlap."""


def unpack_exact(data: bytes, what: str, *, max_items: int, max_bytes: int) -> Any:
    """Decode ``data`` if it is the one encoding of its value; ``what`` names it in errors.

    ``max_items`` bounds each array and map, ``max_bytes`` each text and byte string. The caller still
    checks the types: this sees only the encoding.

    Raises:
        MalformedEnvelopeError: no msgpack, more than one value, or not the canonical encoding.

    """
    try:
        value = msgpack.unpackb(
            data,
            max_array_len=max_items,
            max_map_len=max_items,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
        again = pack(value)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MalformedEnvelopeError(f"{what} is not readable: {_reason(error)}") from error
    if again != data:
        raise MalformedEnvelopeError(f"{what} is not in canonical form: it packs to other bytes again")
    return value


def _refuse_extension(code: int, _data: bytes) -> object:
    raise ValueError(f"an extension type ({code})")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__


# --- payloads -----------------------------------------------------------------------------------


def encode_payload(value: object, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Encode ``value`` as a payload, after :func:`to_json_value`.

    Raises:
        PayloadError: it has no JSON form, or exceeds a bound; the message says where.

    """
    return convert_payload(value, limits)[1]


def convert_payload(value: object, limits: Limits = DEFAULT_LIMITS) -> tuple[JsonValue, bytes]:
    """Return ``value`` in its JSON form, as a receiver will decode it, and as a payload. Errors as above."""
    form = to_json_value(value, limits)
    data = _pack_payload(form)
    if len(data) > limits.max_payload_bytes:
        raise PayloadError(f"the payload has {len(data)} bytes; at most {limits.max_payload_bytes} are sent")
    return form, data


def decode_payload(data: bytes, limits: Limits = DEFAULT_LIMITS) -> JsonValue:
    """Decode a payload: plain JSON values only.

    Raises:
        PayloadError: too large, not msgpack, not canonical, or not a bounded JSON value.

    """
    if len(data) > limits.max_payload_bytes:
        raise PayloadError(f"the payload has {len(data)} bytes; at most {limits.max_payload_bytes} are read")
    try:
        value = msgpack.unpackb(data, max_ext_len=0, ext_hook=_refuse_extension, **_counted(data, limits))
    except PayloadError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise PayloadError(f"the payload is not readable: {_reason(error)}") from error
    _check_json(value, _Budget(limits))
    if _pack_payload(value) != data:
        raise PayloadError("the payload is not in canonical form: it packs to other bytes again")
    return value


def _counted(data: bytes, limits: Limits) -> dict[str, Any]:
    """Count lists and maps while they are made, where a payload is large enough to hold too many.

    All items are counted afterwards, but at a byte each there could be 786,000 lists by then.
    """
    if len(data) <= limits.max_items:
        return {}
    budget = _Budget(limits)

    def one_more(container: Any) -> Any:
        budget.spend(1, 0)
        return container

    return {"list_hook": one_more, "object_hook": one_more}


def _pack_payload(value: JsonValue) -> bytes:
    try:
        return pack(value)
    except UnicodeEncodeError as error:
        raise PayloadError("a text of the payload has a lone surrogate, which is no character") from error


class _Budget:
    """Counts the items of one value and knows its bounds."""

    __slots__ = ("items_left", "limits")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.items_left = limits.max_items

    def spend(self, items: int, depth: int) -> None:
        self.items_left -= items
        if self.items_left < 0:
            raise PayloadError(f"the payload has more than {self.limits.max_items} items")
        if depth > self.limits.max_nesting:
            raise PayloadError(f"the payload is nested deeper than {self.limits.max_nesting} levels")


def _check_json(value: object, budget: _Budget, depth: int = 0) -> None:
    """Refuse whatever is no plain JSON value; the exact types that the decoder makes."""
    kind = type(value)
    if kind is dict or kind is list:
        _check_items(value, budget, depth + 1)  # type: ignore[arg-type]
    elif kind in _SCALARS:
        return
    elif kind is int:
        _check_int(value)  # type: ignore[arg-type]
    elif kind is float:
        _check_float(value, budget.limits)  # type: ignore[arg-type]
    else:
        raise PayloadError(f"the payload holds {_name(value)}, which JSON has not")


def _check_items(items: dict[object, object] | list[object], budget: _Budget, depth: int) -> None:
    budget.spend(len(items), depth)
    values: Iterable[object] = items
    if type(items) is dict:
        for key in items:
            if type(key) is not str:
                raise PayloadError(f"a key of the payload is {_name(key)}, not text")
        values = items.values()
    for item in values:
        kind = type(item)
        if kind in _SCALARS:  # this and the next spare most of the calls
            continue
        if kind is dict or kind is list:
            _check_items(item, budget, depth + 1)  # type: ignore[arg-type]
        else:
            _check_json(item, budget, depth)


def _check_int(value: int) -> int:
    if not _SMALLEST_INT <= value <= _LARGEST_INT:
        raise PayloadError("an integer of the payload needs more than 64 bits; send it as text")
    return value


def _check_float(value: float, limits: Limits) -> float:
    if not math.isfinite(value):
        raise PayloadError("a number of the payload is NaN or infinite")
    if value and abs(math.floor(math.log10(abs(value)))) > limits.max_number_exponent:
        raise PayloadError(f"the exponent of a number exceeds ±{limits.max_number_exponent}")
    return value


def _decimal_text(value: Decimal, limits: Limits) -> str:
    """Write a decimal as plain ASCII digits, its bounds checked first."""
    if not value.is_finite():
        raise PayloadError("a number of the payload is NaN or infinite")
    _, digits, exponent = value.as_tuple()
    if len(digits) > limits.max_number_digits:
        raise PayloadError(f"a number of the payload has more than {limits.max_number_digits} digits")
    assert isinstance(exponent, int)  # finite, see above
    if max(abs(exponent), abs(value.adjusted())) > limits.max_number_exponent:
        raise PayloadError(f"the exponent of a number exceeds ±{limits.max_number_exponent}")
    return format(value, "f")


def _name(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


# --- what Python programs hold, as JSON values ---------------------------------------------------


def to_json_value(value: object, limits: Limits = DEFAULT_LIMITS) -> JsonValue:
    """Return the JSON form of what a Python program holds, within bounds.

    ``Decimal`` becomes text of plain digits; ``datetime``, ``date`` and ``time`` ISO 8601; ``UUID``
    text; ``Enum`` its value; pydantic models (by alias) and dataclasses a dict; tuples and sets a list
    (sets in no order). An object with ``to_json()`` is asked for its form.

    Raises:
        PayloadError: there is none (bytes, functions, keys that are not text), or a bound is exceeded.

    """
    return _convert(value, _Budget(limits), 0)


def _convert(value: object, budget: _Budget, depth: int) -> JsonValue:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is dict:
        return _convert_map(value, budget, depth + 1)  # type: ignore[arg-type]
    if kind is list or kind is tuple:
        return _convert_items(value, budget, depth + 1)
    if kind is int:
        return _check_int(value)  # type: ignore[arg-type]
    if kind is float:
        return _check_float(value, budget.limits)  # type: ignore[arg-type]
    return _convert_object(value, budget, depth)


def _convert_map(value: Mapping[object, object], budget: _Budget, depth: int) -> dict[str, JsonValue]:
    budget.spend(len(value), depth)
    result = {}
    for key, item in value.items():
        kind = type(item)
        name = key if type(key) is str else _convert_key(key)
        if kind in _SCALARS:  # this and the next two spare most of the calls
            result[name] = item
        elif kind is dict:
            result[name] = _convert_map(item, budget, depth + 1)  # type: ignore[arg-type]
        elif kind is list:
            result[name] = _convert_items(item, budget, depth + 1)
        else:
            result[name] = _convert(item, budget, depth)
    if len(result) != len(value):
        raise PayloadError("two keys of the payload are the same text")
    return result


def _convert_key(key: object) -> str:
    text = key.value if isinstance(key, Enum) else key
    if isinstance(text, UUID):
        return str(text)
    if not isinstance(text, str):
        raise PayloadError(f"a key of the payload is {_name(key)}, not text")
    return str.__str__(text)


def _convert_items(value: Any, budget: _Budget, depth: int) -> list[JsonValue]:
    budget.spend(len(value), depth)
    result: list[JsonValue] = []
    for item in value:
        kind = type(item)
        if kind in _SCALARS:
            result.append(item)
        elif kind is dict:
            result.append(_convert_map(item, budget, depth + 1))
        else:
            result.append(_convert(item, budget, depth))
    return result


def _convert_object(value: object, budget: _Budget, depth: int) -> JsonValue:  # noqa: PLR0911 - one line a type
    if isinstance(value, Enum):
        return _convert(value.value, budget, depth)
    if isinstance(value, Decimal):
        return _decimal_text(value, budget.limits)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return _check_int(int(value))
    if isinstance(value, float):
        return _check_float(float(value), budget.limits)
    return _convert_structure(value, budget, depth)


def _convert_structure(value: object, budget: _Budget, depth: int) -> JsonValue:
    to_json = _to_json_of(value)
    if to_json is not None:
        form = to_json()
        # An object that stands for an object counts as a level, so that a cycle of them ends.
        depth += _to_json_of(form) is not None
        budget.spend(1, depth)
        return _convert(form, budget, depth)
    if isinstance(value, BaseModel):
        return _convert(value.model_dump(by_alias=True), budget, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _convert_map(fields, budget, depth + 1)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return _convert_map(value, budget, depth + 1)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _convert_items(value, budget, depth + 1)
    raise PayloadError(f"the payload holds {_name(value)}, which has no JSON form")


def _to_json_of(value: object) -> Callable[[], object] | None:
    method = getattr(value, "to_json", None)
    return method if callable(method) and not isinstance(value, type) else None


# --- ids ----------------------------------------------------------------------------------------


def new_id(now_ms: int) -> str:
    """Return a fresh UUIDv7 (RFC 9562 section 5.7) made at ``now_ms``: random, sorted by time."""
    time = f"{now_ms & 0xFFFFFFFFFFFF:012x}"
    drawn = os.urandom(10)
    random = drawn.hex()
    variant = "89ab"[drawn[9] & 3]  # of the last byte six bits stay unused, and none is used twice
    return f"{time[:8]}-{time[8:]}-7{random[:3]}-{variant}{random[3:6]}-{random[6:18]}"


def occurrence_id(recurring_id: str, at_ms: int) -> str:
    """Return the id of the occurrence at ``at_ms`` of a recurring task: the same wherever computed.

    It is the UUIDv5 (RFC 9562 section 5.5) of the decimal digits of ``at_ms`` in the task's namespace.
    """
    return str(uuid5(UUID(recurring_id), str(at_ms)))
