"""The JSON encoder says what the standard library's strict one says, or refuses with it."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.strict_json import StrictEncoder

encode = StrictEncoder()

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_it_reads_back_as_what_it_was_and_is_printable_ascii(value):
    data = encode(value)
    assert json.loads(data) == value
    assert data.isascii()
    assert data.decode().isprintable()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("around", [lambda it: it, lambda it: {"a": [it]}, lambda it: [None, it]])
def test_what_is_no_number_is_refused_and_not_written_as_null(number, around):
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(around(number))


@pytest.mark.parametrize("value", [{1}, b"bytes", object(), Decimal(1)])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError):
        encode({"a": value})


def test_a_cycle_is_refused():
    value = []
    value.append(value)
    with pytest.raises((ValueError, RecursionError)):
        encode(value)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x7f", "\x9b2J", "\u202e", "\ud800", "\N{LINE SEPARATOR}", "é"])
def test_nothing_that_a_terminal_acts_on_is_written_as_it_is(text):
    assert encode({"a": text}) == json.dumps({"a": text}, separators=(",", ":")).encode()


def test_integers_of_any_size():
    assert encode([2**64, -(2**70)]) == b"[18446744073709551616,-1180591620717411303424]"


def test_the_default_is_asked_for_other_types_whichever_encoder_writes():
    marked = StrictEncoder(default=lambda it: f"<{it}>")
    assert marked({"a": Decimal("1.50")}) == b'{"a":"<1.50>"}'
    assert marked({"a": Decimal("1.50"), "b": None}) == b'{"a":"<1.50>","b":null}'
