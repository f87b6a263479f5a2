"""The encodings that msgpack has for one value besides the shortest, and what resembles it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from agentweave_bus.envelope.codec import pack

Alternatives = Callable[[Any], Iterator[bytes]]
"""Other ways to write one value, without looking into it."""

_HEADERS = msgpack.Packer()
_INTS = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
_LENGTHS = {
    str: {0xD9: "B", 0xDA: "H", 0xDB: "I"},
    bytes: {0xC4: "B", 0xC5: "H", 0xC6: "I"},
    list: {0xDC: "H", 0xDD: "I"},
    dict: {0xDE: "H", 0xDF: "I"},
}


def encodings(value: Any, alternatives: Alternatives) -> Iterator[bytes]:
    """Each encoding of ``value`` in which one part is written in another way, however deep it lies."""
    yield from alternatives(value)
    if isinstance(value, (list, dict)):
        inner = _inner(value)
        pieces = [pack(one) for one in inner]
        for number, one in enumerate(inner):
            for other in encodings(one, alternatives):
                yield _header(value) + b"".join([*pieces[:number], other, *pieces[number + 1 :]])


def longer_integers(value: Any) -> Iterator[bytes]:
    """An integer with more bytes than it needs, or in a signed form."""
    if type(value) is int:
        for code, form in _INTS.items():
            try:
                other = bytes([code]) + struct.pack(">" + form, value)
            except struct.error:
                continue
            if other != pack(value):
                yield other


def longer_lengths(value: Any) -> Iterator[bytes]:
    """A text, bytes, array or map whose length has more bytes than it needs."""
    shortest = pack(value)
    content = _content(value)
    for code, form in _LENGTHS.get(type(value), {}).items():
        try:
            other = bytes([code]) + struct.pack(">" + form, len(value)) + content
        except struct.error:
            continue
        if other != shortest:
            yield other


def extensions(value: Any) -> Iterator[bytes]:
    """Extension types in a value's place: timestamps of three lengths, and others."""
    if not isinstance(value, (list, dict)):
        yield b"\xd6\xff" + bytes(4)  # a timestamp of 32 bits
        yield b"\xd7\xff" + bytes(8)
        yield b"\xc7\x0c\xff" + bytes(12)
        yield b"\xd4\x01\x00"  # type 1, one byte
        yield b"\xc7\x00\x05"  # type 5, no byte
    yield b"\xc1"  # what msgpack never uses


def other_types(value: Any) -> Iterator[bytes]:
    """What a lenient reader takes for the same: text for bytes, a float or a boolean for a number, nil."""
    yield b"\xc0"
    if type(value) is int:
        yield msgpack.packb(float(value))
        yield msgpack.packb(float(value), use_single_float=True)
        yield pack(str(value))
        yield pack(bool(value))
    elif isinstance(value, str):
        yield pack(value.encode())
        yield pack([value])
    elif isinstance(value, bytes):
        yield _HEADERS.pack_array_header(0)
        yield b"\xdb" + struct.pack(">I", len(value)) + value
    elif isinstance(value, list):
        yield pack({str(number): one for number, one in enumerate(value)})
    elif isinstance(value, dict):
        yield pack([[key, one] for key, one in value.items()])


def doubled_keys(value: Any) -> Iterator[bytes]:
    """A map with one key twice: a reader keeps the first, another the last."""
    if isinstance(value, dict):
        pairs = [pack(key) + pack(one) for key, one in value.items()]
        for key in value:
            for first, last in (([pack(key) + b"\xc0"], []), ([], [pack(key) + b"\xc0"])):
                yield _HEADERS.pack_map_header(len(value) + 1) + b"".join([*first, *pairs, *last])
            yield _HEADERS.pack_map_header(len(value) + 1) + b"".join([*pairs, pack(key) + pack(value[key])])


def foreign_keys(value: Any) -> Iterator[bytes]:
    """A map in which a key is no text, or there is one more."""
    if isinstance(value, dict):
        pairs = b"".join(pack(key) + pack(one) for key, one in value.items())
        for key in (b"\x01", b"\xc0", b"\xc3", pack(b"kind"), b"\x90", b"\xd4\x01\x00", pack("\0"), pack("")):
            yield _HEADERS.pack_map_header(len(value) + 1) + pairs + key + b"\x01"


def trailing(value: Any) -> Iterator[bytes]:
    """More after the end, or less."""
    whole = pack(value)
    yield from (whole + b"\xc0", whole + whole, whole + b"\0", whole[:-1], b"")


def _inner(value: Any) -> list[Any]:
    return [one for pair in value.items() for one in pair] if isinstance(value, dict) else value


def _header(value: Any) -> bytes:
    if isinstance(value, dict):
        return _HEADERS.pack_map_header(len(value))
    return _HEADERS.pack_array_header(len(value))


def _content(value: Any) -> bytes:
    if isinstance(value, (list, dict)):
        return b"".join(map(pack, _inner(value)))
    return value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else b""
