"""What the parser of heads remembers is what its checks would say again."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.envelope import Kind, head
from agentweave_bus.exceptions import MalformedEnvelopeError
from tests.unit.envelope.world import CLIENT, DOMAIN, ORDER

REFUSED = object()
TEXTS = (
    *(kind.value for kind in Kind),
    "019b0000-0000-7000-8000-000000000001",
    str(CLIENT),
    str(ORDER),
    f"spiffe://{DOMAIN}",
    "create_order",
    "order.created",
    "aw.call.acme=example.agent/order.create_order",
    "application/json",
    "A" * 22,
)
# Near each bound, and on either side of each type that looks like another one.
EDGES: tuple[Any, ...] = (
    *TEXTS,
    *(text + "\n" for text in TEXTS),
    *(text.upper() for text in TEXTS),
    *(text.encode() for text in TEXTS),
    *(bytes(size) for size in (0, 31, 32, 33)),
    *(-1, 0, 1, 9, 10, 2**53 - 1, 2**53, 2**64 - 1),
    *(False, True, 0.0, 1.0, None, (), [], {}),
    {"iss": "x", "sub": "y"},
    {"attempts": 3},
    ["id", 1, bytes(32)],
    [f"{ORDER}#*"],
)
ITEMS = (
    st.text(max_size=30)
    | st.binary(max_size=40)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.lists(st.integers(0, 3), max_size=3)
    | st.dictionaries(st.sampled_from(["iss", "sub", "a"]), st.text(max_size=3) | st.integers(0, 3))
)

WHOLE = {
    "kind": "record",
    "id": "019b0000-0000-7000-8000-000000000001",
    "iss": str(CLIENT),
    "x5t": bytes(32),
    "aud": f"spiffe://{DOMAIN}",
    "cap": "task.state",
    "sub": "aw.state.acme=example.agent/order.0",
    "iat": 1_000,
    "exp": 2_000,
    "pd": bytes(32),
    "ct": "application/json",
    "re": bytes(32),
    "seq": 1,
    "prev": bytes(32),
    "att": 1,
    "log": ["a", 1, bytes(32)],
}
KEYS = st.sampled_from([*WHOLE, "scope", "nbf", "alg", "", 1, b"kind", None])


def outcome(read: Any) -> tuple[Any, type]:
    try:
        value = read()
    except MalformedEnvelopeError:
        return REFUSED, type(None)
    return value, type(value)


def forget() -> None:
    head._SHAPES.clear()
    head._PASSED.clear()


def see_that_it_stays(key: Any, item: Any) -> None:
    """Read a head with one value changed, or one more: new, when it is known, and when the whole one is."""
    value = {**WHOLE, key: item}
    forget()
    wanted = outcome(lambda: head.head_from_map(value))
    assert outcome(lambda: head.head_from_map(value)) == wanted
    forget()
    head.head_from_map(WHOLE)
    assert outcome(lambda: head.head_from_map(value)) == wanted
    if wanted[0] is not REFUSED:
        assert [type(one) for one in head.head_from_map(value)] == [type(one) for one in wanted[0]]


@given(KEYS, ITEMS)
def test_a_value_is_taken_or_refused_whatever_came_before(key: Any, item: Any) -> None:
    see_that_it_stays(key, item)


@pytest.mark.parametrize("key", WHOLE)
def test_an_edge_is_on_the_same_side_whatever_came_before(key: str) -> None:
    for item in EDGES:
        see_that_it_stays(key, item)


@pytest.mark.parametrize("key", ["iat", "exp", "seq", "att"])
@pytest.mark.parametrize("count", [-1, 2**53])
def test_a_count_has_two_ends(key: str, count: int) -> None:
    with pytest.raises(MalformedEnvelopeError, match=f"'{key}' is no integer from 0"):
        head.head_from_map({**WHOLE, key: count})


@pytest.mark.parametrize("key", WHOLE)
def test_a_kind_that_is_known_with_some_keys_lacks_none_of_them_later(key: str) -> None:
    head.head_from_map(WHOLE)
    rest = {name: item for name, item in WHOLE.items() if name != key}
    if key in head._REQUIRED:
        with pytest.raises(MalformedEnvelopeError, match=f"the head lacks: {key}"):
            head.head_from_map(rest)
    elif key in {"seq", "prev"}:
        with pytest.raises(MalformedEnvelopeError, match="'prev' stands exactly where"):
            head.head_from_map(rest)
    else:
        assert getattr(head.head_from_map(rest), key) is None


def test_the_keys_of_one_kind_are_not_those_of_another_one() -> None:
    head.head_from_map(WHOLE)
    with pytest.raises(MalformedEnvelopeError, match="a event has no key att, prev, re, seq"):
        head.head_from_map({**WHOLE, "kind": "event"})


@pytest.mark.parametrize("text", ["", "a b", "a.*", "a.>", "a\n", "a.é", "a\x7f", "x" * 1_025])
def test_what_is_no_subject(text: str) -> None:
    with pytest.raises(MalformedEnvelopeError, match="is not a subject"):
        head.head_from_map({**WHOLE, "sub": text})


@given(st.text(max_size=40) | st.text(st.characters(codec="ascii"), max_size=20))
def test_a_subject_is_printable_and_has_no_wildcard(text: str) -> None:
    wanted = re.fullmatch(r"[!-)+-=?-~]{1,1024}", text) is not None
    assert (outcome(lambda: head.head_from_map({**WHOLE, "sub": text}))[0] is not REFUSED) == wanted


def test_what_is_remembered_has_a_bound() -> None:
    most = head._MOST_REMEMBERED
    sizes = []
    for number in range(2 * most):
        text = f"{CLIENT}{number}"
        assert head.head_from_map({**WHOLE, "iss": text}).iss == text
        extra = {f"x{number}": 1}
        with pytest.raises(MalformedEnvelopeError):
            head.head_from_map({**WHOLE, **extra})
        sizes.append(max(len(head._PASSED), len(head._SHAPES)))
    assert max(sizes) == most <= 4096
