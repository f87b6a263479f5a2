"""When a worker is started again, and when it is not well: pure functions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.observability.heartbeat import Heartbeat
from agentweave_bus.supervisor.rules import (
    HealthRule,
    Next,
    RecycleRule,
    RestartRule,
    after_exit,
    due_for_recycling,
    hangs,
    is_deaf,
    share_of,
)

RULE = RestartRule(first_s=1, longest_s=8, limit=4, within_s=60)


def beat(**told: object) -> Heartbeat:
    known = {"lag_s": 0.0, "in_flight": 0, "handled": 0, "resident": 0, "connected": True}
    return Heartbeat(**{**known, **told})  # type: ignore[arg-type]


def test_the_pause_doubles_up_to_the_longest():
    pauses = [after_exit(RULE, count, 1, chance=0.5).after_s for count in range(1, 5)]
    assert pauses == [1, 2, 4, 8]


@given(st.integers(1, 4), st.floats(0, 1))
def test_it_is_spread_by_a_quarter_to_either_side(count, chance):
    middle = after_exit(RULE, count, 1, chance=0.5).after_s
    assert 0.75 * middle <= after_exit(RULE, count, 1, chance=chance).after_s <= 1.25 * middle


def test_too_many_exits_are_given_up():
    verdict = after_exit(RULE, 5, 1, chance=0)
    assert (verdict.next, verdict.why) == (Next.GIVE_UP, "it ended 5 times and never ran for 60 s")


def test_a_wrong_configuration_is_not_tried_again():
    assert after_exit(RULE, 1, 2, chance=0).next is Next.GIVE_UP


@pytest.mark.parametrize(
    ("policy", "code", "then"),
    [
        ("always", 0, Next.RESTART),
        ("always", -9, Next.RESTART),
        ("on-failure", 0, Next.LEAVE),
        ("on-failure", 1, Next.RESTART),
        ("never", 1, Next.LEAVE),
    ],
)
def test_the_policy(policy, code, then):
    assert after_exit(RestartRule(policy=policy), 1, code, chance=0).next is then


def test_silence_is_a_loop_that_hangs():
    rule = HealthRule(silent_s=5)
    assert hangs(rule, 5.0) is None
    assert "has said nothing for 6 s" in (hangs(rule, 6.0) or "")


def test_who_asks_for_nothing_although_there_is_room_is_deaf():
    rule = HealthRule(deaf_s=10)
    assert "for 11 s" in (is_deaf(rule, beat(idle_s=11.0)) or "")
    for well in (None, beat(idle_s=10.0), beat(idle_s=None), beat(idle_s=11.0, connected=False)):
        assert is_deaf(rule, well) is None


def test_recycling():
    rule = RecycleRule(tasks=100, memory_mb=50, after_s=3600)
    assert due_for_recycling(rule, beat(handled=99, resident=50 * 2**20 - 1), 3599) is None
    assert due_for_recycling(rule, beat(handled=100), 0) == "it has handled 100 requests"
    assert due_for_recycling(rule, beat(resident=50 * 2**20), 0) == "it uses 50 MB"
    assert due_for_recycling(rule, None, 3600) == "it has run for 3600 s"
    assert due_for_recycling(rule, None, 3240, early=1.0) == "it has run for 3240 s"
    assert due_for_recycling(rule, None, 3239, early=1.0) is None
    assert due_for_recycling(rule, None, 3599, early=0.0) is None
    assert due_for_recycling(RecycleRule(), beat(handled=10**9, resident=2**40), 10**9) is None


def test_replicas_are_not_due_at_the_same_time():
    shares = sorted(share_of(f"order/{number}") for number in range(1, 9))
    assert 0 <= shares[0] <= shares[-1] < 1
    assert min(later - sooner for sooner, later in pairwise(shares)) > 0.05
    assert share_of("order") == share_of("order") != share_of("user")
