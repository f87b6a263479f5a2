"""Events: patterns mean the same here and at the broker, and their streams let nobody undo anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.stream_limits import StreamLimits
from agentweave_bus.bus.streams import (
    event_consumer,
    event_consumer_name,
    events_stream,
    events_stream_name,
)
from agentweave_bus.bus.subjects import event_pattern_subject, event_subject, parse_subject
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.names import common_event, covers_event
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.memory_subjects import matches, overlap

P = SpiffeID("spiffe://x.test/agent/p")
S = SpiffeID("spiffe://x.test/agent/s")
parts = st.sampled_from(["a", "b", "order"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(names, names.map("{}.*".format), st.just("*"))


@given(patterns, names)
def test_a_pattern_is_for_the_same_names_here_and_at_the_broker(pattern: str, name: str) -> None:
    assert covers_event(pattern, name) is matches(event_pattern_subject(P, pattern), event_subject(P, name))


@given(patterns, patterns, names)
def test_what_two_patterns_have_in_common(one: str, other: str, name: str) -> None:
    both = common_event(one, other)
    covered = both is not None and covers_event(both, name)
    assert covered is (covers_event(one, name) and covers_event(other, name))
    assert (both is not None) is overlap(event_pattern_subject(P, one), event_pattern_subject(P, other))


def test_a_subject_names_its_publisher() -> None:
    parsed = parse_subject(event_subject(P, "order.created"))
    assert (parsed.agent, parsed.rest) == (P, ("order", "created"))


@pytest.mark.parametrize(
    "name", ["", "Order", "order.", ".order", "order..x", "order.*", "*", ">", "a b", "x" * 65]
)
def test_what_is_no_name_has_no_subject(name: str) -> None:
    with pytest.raises(ConfigurationError):
        event_subject(P, name)


@pytest.mark.parametrize("pattern", ["", "order.>", ">", "*.created", "order.*.x", "order*"])
def test_what_is_no_pattern_has_no_subject(pattern: str) -> None:
    with pytest.raises(ConfigurationError):
        event_pattern_subject(P, pattern)


def test_a_stream_of_events_is_bounded_and_no_header_can_do_anything() -> None:
    config = events_stream(P, limits=StreamLimits(replicas=3)).config
    for weapon in ("allow_rollup_hdrs", "allow_msg_ttl", "allow_msg_schedules", "allow_direct"):
        assert config[weapon] is False
    assert (config["deny_delete"], config["deny_purge"]) == (True, True)
    assert (config["retention"], config["discard"], config["storage"]) == ("limits", "old", "file")
    assert config["num_replicas"] == 3
    assert all(config[bound] > 0 for bound in ("max_msgs", "max_bytes", "max_age", "max_consumers"))
    assert config["subjects"] == ["aw.event.x=test.agent/p.>"]
    assert events_stream_name(P) != events_stream_name(S)


def test_a_subscriber_has_two_consumers_and_the_ordered_one_gives_out_one_at_a_time() -> None:
    plain = event_consumer(P, S, ["order.*", "alone"], ordered=False)
    ordered = event_consumer(P, S, ["order.*"], ordered=True)
    assert plain.name == event_consumer_name(S, ordered=False) != ordered.name
    assert plain.config["filter_subjects"] == [
        "aw.event.x=test.agent/p.alone",
        "aw.event.x=test.agent/p.order.>",
    ]
    assert ordered.config["max_ack_pending"] == 1
    assert plain.config["max_ack_pending"] > 1
    assert {one.config["deliver_policy"] for one in (plain, ordered)} == {"new"}
    assert event_consumer_name(P, ordered=False) != event_consumer_name(S, ordered=False)
