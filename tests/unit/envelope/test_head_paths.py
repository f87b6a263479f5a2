"""What the parser of heads takes without asking a check is what the check would have taken, and made of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.envelope import Kind, head
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS
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
KEYS = st.sampled_from([*head._CHECKS, "alg", "", 1, b"kind", None])


def outcome(read: Any) -> tuple[Any, type]:
    try:
        value = read()
    except MalformedEnvelopeError:
        return REFUSED, type(None)
    return value, type(value)


def see_that_both_agree(key: Any, item: Any) -> None:
    def by_its_check() -> Any:
        if key not in head._CHECKS:
            raise MalformedEnvelopeError("unknown")
        return head._CHECKS[key](key, item, DEFAULT_LIMITS)

    wanted = outcome(by_its_check)
    for _ in ("new", "known"):  # the second time it may be remembered
        assert outcome(lambda: head._checked_fields({key: item}, DEFAULT_LIMITS)[key]) == wanted


@given(KEYS, ITEMS)
def test_a_value_is_what_its_check_says(key: Any, item: Any) -> None:
    see_that_both_agree(key, item)


@pytest.mark.parametrize("key", head._CHECKS)
def test_an_edge_is_on_the_side_where_its_check_has_it(key: str) -> None:
    for item in EDGES:
        see_that_both_agree(key, item)


@pytest.mark.parametrize("key", sorted(head._COUNTS))
@pytest.mark.parametrize("count", [-1, 2**53])
def test_a_count_has_two_ends(key: str, count: int) -> None:
    with pytest.raises(MalformedEnvelopeError, match=f"'{key}' is no integer from 0"):
        head._checked_fields({key: count}, DEFAULT_LIMITS)


def test_what_senders_write_is_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: dict[str, Any] = {}
    monkeypatch.setitem(head._REMEMBERED, "iss", remembered)
    most = head._MOST_REMEMBERED
    sizes = []
    for number in range(2 * most):
        text = f"{CLIENT}{number}"
        assert head._checked_fields({"iss": text}, DEFAULT_LIMITS)["iss"] == text
        sizes.append(len(remembered))
    assert max(sizes) == most <= 4096
    assert text in remembered
