"""Payloads and canonical msgpack: one value has one encoding, and JSON's types are all there are."""

from __future__ import annotations

import re
import tracemalloc
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from agentweave_bus.envelope import (
    Limits,
    decode_payload,
    encode_payload,
    new_id,
    occurrence_id,
    to_json_value,
)
from agentweave_bus.envelope.codec import pack, unpack_exact
from agentweave_bus.exceptions import MalformedEnvelopeError, PayloadError
from agentweave_bus.spiffe_id import SpiffeID

NOT_CANONICAL = {
    "timestamp": msgpack.packb(msgpack.Timestamp(1, 2)),
    "timestamp of 32 bits": bytes.fromhex("d6ff00000001"),
    "extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "extension without bytes": bytes.fromhex("c70005"),
    "integer in a wider form": bytes.fromhex("cc01"),
    "negative integer in a wider form": bytes.fromhex("d0ff"),
    "signed form of a positive integer": bytes.fromhex("d100ff"),
    "text in a wider form": bytes.fromhex("d90161"),
    "list in a wider form": bytes.fromhex("dc000101"),
    "map in a wider form": bytes.fromhex("de0001a16101"),
    "32-bit float": bytes.fromhex("ca3fc00000"),
    "duplicate keys": bytes.fromhex("82a16101a16102"),
    "two values": bytes.fromhex("0101"),
    "nothing": b"",
    "cut short": bytes.fromhex("9201"),
    "reserved byte": bytes.fromhex("c1"),
    "text that is no UTF-8": bytes.fromhex("a1ff"),
    "lone surrogate": bytes.fromhex("a3eda080"),
    "overlong UTF-8": bytes.fromhex("a2c080"),
    "list that claims four billion items": bytes.fromhex("ddffffffff"),
    "nested too deep to read": b"\x91" * 5000 + b"\xc0",
}

NOT_JSON = {
    "bytes": bytes.fromhex("c40161"),
    "NaN": bytes.fromhex("cb7ff8000000000000"),
    "infinity": bytes.fromhex("cb7ff0000000000000"),
    "minus infinity": bytes.fromhex("cbfff0000000000000"),
    "number key": bytes.fromhex("810101"),
    "bytes key": bytes.fromhex("81c4016101"),
    "mixed keys": bytes.fromhex("82a16101c4016101"),
    "exponent 39": msgpack.packb(1e39),
    "exponent -39": msgpack.packb(1e-39),
    "33 levels": b"\x91" * 33 + b"\xc0",
    "33 levels of maps": b"\x81\xa1a" * 33 + b"\xc0",
    "too many items": pack([None] * 100_001),
}


@pytest.mark.parametrize("data", NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_what_is_not_canonical_is_refused_everywhere(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_payload(data)
    with pytest.raises(MalformedEnvelopeError):
        unpack_exact(data, "it", max_items=10_000, max_bytes=1000)


@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_bounded_json_value_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_payload(data)
    with pytest.raises(PayloadError):
        decode_payload(b"\x91" + data)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=24))
@example(b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01")
@example(b"\xcb\x80\x00\x00\x00\x00\x00\x00\x00")
def test_what_the_decoder_accepts_packs_to_the_same_bytes(data: bytes) -> None:
    try:
        value = decode_payload(data)
    except PayloadError:
        return
    assert encode_payload(value) == data


def test_the_widest_values_pass() -> None:
    value: Any = "x"
    for _ in range(32):
        value = [value]
    for one in (value, -(2**63), 2**64 - 1, 1e38, 1e-38, -0.0, "", [], {}, None, False, 1, True, 1.0, "\0"):
        data = encode_payload(one)
        decoded = decode_payload(data)
        assert decoded == one
        assert type(decoded) is type(one)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (float("nan"), "NaN"),
        (float("inf"), "NaN or infinite"),
        (5e-324, "exponent"),
        (1e39, "exponent"),
        (b"x", "a bytes"),
        ({1: 2}, "not text"),
        ({None: 2}, "not text"),
        ("\ud800", "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        (Decimal("NaN"), "NaN"),
        (Decimal("sNaN"), "NaN"),
        (Decimal("-Infinity"), "infinite"),
        (Decimal("1e300000000"), "exponent"),
        (Decimal("1e-300000000"), "exponent"),
        (Decimal("1e39"), "exponent"),
        (Decimal("1e-39"), "exponent"),
        (Decimal("0e99"), "exponent"),
        (Decimal("100e37"), "exponent"),
        (Decimal("1" * 39), "38 digits"),
        ({"a": 1, type("S", (str,), {})("a"): 2} | {}, None),
        (print, "no JSON form"),
        (Decimal, "no JSON form"),
        (Fraction(1, 2), "no JSON form"),
        (1j, "no JSON form"),
        ("x" * 800_000, "at most"),
        ([0] * 100_001, "items"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_has_no_json_form_is_refused(value: Any, match: str | None) -> None:
    if match is None:
        assert decode_payload(encode_payload(value)) == {"a": 2}
        return
    with pytest.raises(PayloadError, match=match):
        encode_payload(value)


def test_a_cycle_ends() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(PayloadError, match="deeper than 32"):
        encode_payload(cycle)

    class Self:
        def to_json(self) -> Any:
            return self

    with pytest.raises(PayloadError, match="deeper than 32"):
        encode_payload(Self())


def test_keys_that_become_the_same_are_refused() -> None:
    class Colour(Enum):
        RED = "red"

    with pytest.raises(PayloadError, match="same text"):
        to_json_value({"red": 1, Colour.RED: 2})


class Size(StrEnum):
    SMALL = "small"


class Level(IntEnum):
    HIGH = 3


class Item(BaseModel):
    price: Decimal
    made_on: date = Field(serialization_alias="madeOn")


@dataclass
class Order:
    id: uuid.UUID
    size: Size
    items: tuple[Item, ...]


class Money:
    def to_json(self) -> dict[str, Any]:
        return {"amount": Decimal("1.50"), "currency": "EUR"}


UUID = uuid.UUID("019b0000-0000-7000-8000-000000000001")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Decimal("10.00"), "10.00"),
        (Decimal("1E+3"), "1000"),
        (Decimal("1E-38"), "0.00000000000000000000000000000000000001"),
        (Decimal("-0"), "-0"),
        (Decimal("١٢٣"), "123"),
        (datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC), "2025-01-02T03:04:05+00:00"),
        (date(2025, 1, 2), "2025-01-02"),
        (time(3, 4), "03:04:00"),
        (UUID, str(UUID)),
        ({UUID: 1}, {str(UUID): 1}),
        (Size.SMALL, "small"),
        (Level.HIGH, 3),
        ({Size.SMALL: Level.HIGH}, {"small": 3}),
        (SpiffeID("spiffe://a.io/x"), "spiffe://a.io/x"),
        ((1, (2, 3)), [1, [2, 3]]),
        ({7}, [7]),
        (frozenset({7}), [7]),
        (MappingProxyType({"a": Decimal(1)}), {"a": "1"}),
        (Money(), {"amount": "1.50", "currency": "EUR"}),
        (
            Order(UUID, Size.SMALL, (Item(price=Decimal("1.10"), made_on=date(2025, 1, 2)),)),
            {"id": str(UUID), "size": "small", "items": [{"price": "1.10", "madeOn": "2025-01-02"}]},
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "-", repr(value))[:30],
)
def test_what_programs_hold_becomes_json(value: Any, wanted: Any) -> None:
    found = to_json_value(value)
    assert found == wanted
    assert type(found) is type(wanted)
    assert decode_payload(encode_payload(value)) == wanted


def test_limits_can_be_narrowed() -> None:
    limits = Limits(max_payload_bytes=10, max_items=2, max_nesting=1)
    with pytest.raises(PayloadError, match="at most 10"):
        encode_payload("x" * 10, limits)
    with pytest.raises(PayloadError, match="at most 10"):
        decode_payload(b"\xaa" + b"x" * 10, limits)
    with pytest.raises(PayloadError, match="items"):
        decode_payload(pack([1, 2, 3]), limits)
    with pytest.raises(PayloadError, match="deeper"):
        decode_payload(pack([[1]]), limits)


@pytest.mark.parametrize("empty", [[], {}], ids=["lists", "maps"])
def test_containers_are_counted_while_they_are_made(empty: object) -> None:
    """Hundreds of thousands of them fit into a payload; none of those beyond the bound is made."""
    data = pack({"x": [[empty] * 90_000] * 8})
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="more than 100000 items"):
            decode_payload(data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20_000_000


def test_ids_are_uuids_of_version_7() -> None:
    now_ms = 1_736_000_000_123
    made = [uuid.UUID(new_id(now_ms)) for _ in range(500)]
    assert len(set(made)) == 500
    for one in made:
        assert one.version == 7
        assert one.variant == uuid.RFC_4122
        assert one.int >> 80 == now_ms
    ones = {bit for one in made for bit in range(74) if spread(one) >> bit & 1}
    assert len(ones) == 74  # every random bit varies


def spread(one: uuid.UUID) -> int:
    return (one.int & (2**62 - 1)) | ((one.int >> 64 & 0xFFF) << 62)


def test_an_occurrence_id_is_the_same_wherever_it_is_computed() -> None:
    recurring = "019b0000-0000-7000-8000-000000000001"
    assert occurrence_id(recurring, 5) == str(uuid.uuid5(uuid.UUID(recurring), "5"))
    assert occurrence_id(recurring, 5) != occurrence_id(recurring, 6)
