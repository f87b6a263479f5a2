"""Announcing events: what is said is what is read, and nothing else is; copies are remembered up to a bound."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.admitted import OpenedTask
from agentweave_bus.bus.streams import event_consumer
from agentweave_bus.envelope import decode_payload
from agentweave_bus.exceptions import ConfigurationError, PayloadError
from agentweave_bus.names import covers_event
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.event_announcing import (
    MAX_PATTERNS,
    MAX_PUBLISHERS,
    EventAnnouncement,
    Subscription,
    broadest,
    common_patterns,
    patterns_of,
)
from agentweave_bus.tasks.event_performer import SeenEvents

P, S = SpiffeID("spiffe://x.test/agent/p"), SpiffeID("spiffe://x.test/agent/s")
names = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(".".join)
patterns = st.lists(st.one_of(names, names.map("{}.*".format), st.just("*")), max_size=5)


@given(patterns, patterns, st.booleans())
def test_what_is_said_is_read(plain: list[str], ordered: list[str], publishes: bool) -> None:
    said = EventAnnouncement(publishes, (Subscription(P, broadest(plain), broadest(ordered)),))
    assert EventAnnouncement.read(decode_payload(said.encoded())) == said


@given(patterns, names)
def test_the_broadest_cover_the_same_and_do_not_overlap(every: list[str], name: str) -> None:
    kept = broadest(every)
    assert any(covers_event(one, name) for one in kept) is any(covers_event(one, name) for one in every)
    assert not any(covers_event(one, other) for one in kept for other in kept if one != other)


@given(patterns, patterns, names)
def test_what_is_common(one: list[str], other: list[str], name: str) -> None:
    both = any(covers_event(a, name) for a in one) and any(covers_event(b, name) for b in other)
    assert any(covers_event(c, name) for c in common_patterns(one, other)) is both


@given(patterns.filter(bool))
def test_a_consumer_tells_what_it_is_for(every: list[str]) -> None:
    config = event_consumer(P, S, broadest(every), ordered=False).config
    assert sorted(patterns_of(config, P)) == sorted(broadest(every))
    assert patterns_of(config, S) == ()


def honest() -> dict[str, Any]:
    return {"publishes": False, "subscriptions": [{"publisher": P, "plain": ["a"], "ordered": []}]}


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("publishes"),
        lambda said: said.update(more=1),
        lambda said: said.update(publishes=1),
        lambda said: said.update(subscriptions={}),
        lambda said: said.update(subscriptions=[1]),
        lambda said: said["subscriptions"].append(dict(said["subscriptions"][0])),
        lambda said: said["subscriptions"][0].update(publisher="spiffe://x.test"),
        lambda said: said["subscriptions"][0].update(publisher="x"),
        lambda said: said["subscriptions"][0].update(publisher=7),
        lambda said: said["subscriptions"][0].update(plain=["order.>"]),
        lambda said: said["subscriptions"][0].update(plain=[7]),
        lambda said: said["subscriptions"][0].update(plain="a"),
        lambda said: said["subscriptions"][0].update(ordered=["a"] * (MAX_PATTERNS + 1)),
        lambda said: said["subscriptions"][0].pop("ordered"),
    ],
)
def test_nothing_else_is_read(change: Any) -> None:
    said = honest()
    assert EventAnnouncement.read(said).subscriptions == (Subscription(P, ("a",)),)
    change(said)
    with pytest.raises(PayloadError):
        EventAnnouncement.read(said)


def test_too_many_are_refused_by_who_would_say_so() -> None:
    many = tuple(Subscription(SpiffeID(f"spiffe://x.test/p/{n}"), ("a",)) for n in range(MAX_PUBLISHERS + 1))
    with pytest.raises(ConfigurationError, match="256 publishers"):
        EventAnnouncement(subscriptions=many).encoded()


def opened(number: int, data: bytes = b"d" * 32) -> OpenedTask:
    """As much of an event as is compared."""

    class Head:
        iss, aud, cap, id, pd = P, SpiffeID("spiffe://x.test"), "order.created", str(number), data

    class Request:
        head, digest = Head, number.to_bytes(32, "big")

    class Opened:
        request = Request

    return cast("OpenedTask", Opened)


def test_a_copy_is_known_by_what_it_says_and_where_it_stands() -> None:
    seen = SeenEvents(most=3)
    assert seen.first(opened(1), 10)[0] == 10
    assert seen.first(opened(1), 10)[0] == 10  # given out again
    assert seen.first(opened(1), 11)[0] == 10  # a copy
    assert seen.first(opened(1, b"e" * 32), 12)[0] == 12  # other data under the same id
    for number in range(2, 5):
        seen.first(opened(number), number)
    assert seen.first(opened(1), 13)[0] == 13  # forgotten
