"""JSON as bytes: the standard library's encoder in its strict form, and a faster one where both agree.

orjson is several times as fast. Four things that it does otherwise matter here, and what could be one of
them is written by the standard library: it turns NaN and infinities into ``null``, which is refused; it
writes characters beyond ASCII, and DEL, as they are, where a terminal may act on some of them; it goes
neither beyond 64 bits of an integer nor as deep; and keys must be text.

Two things that it does otherwise stay. It spells some floats in other ways (``1e-7`` for ``1e-07``), which
are read back as the same numbers. And it takes UUIDs and enums, which no option of it prevents.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StrictEncoder"]

_DEL: Final = 0x7F
_ONLY_JSON: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def _no_default(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no JSON form")


class StrictEncoder:
    """Encodes JSON values as ASCII, without spaces; ``default`` turns other objects into JSON values.

    Call it with a value. It raises ``TypeError``, ``ValueError`` or ``RecursionError`` for what JSON hasn't:
    other types, NaN, cycles. Give it no UUIDs and no enums: whether they are taken depends on what they are
    written beside.
    """

    __slots__ = ("_default", "_strict")

    def __init__(self, default: Callable[[object], object] = _no_default) -> None:
        self._default = default
        self._strict = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=default).encode

    def __call__(self, value: object) -> bytes:
        """Return ``value`` as bytes."""
        try:
            data = orjson.dumps(value, self._default, _ONLY_JSON)
        except TypeError:  # no JSON, or larger or deeper than orjson goes: decided below
            return self._strict(value).encode()
        # The null may stand for NaN. Looked for so, and not with "in", which tries bytes as a number first.
        if data.find(b"null") >= 0 or _DEL in data or not data.isascii():
            return self._strict(value).encode()
        return data
