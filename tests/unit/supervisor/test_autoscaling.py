"""How many workers an agent should have: pure functions, and what they come to over time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.supervisor.autoscaling import Load, Scaler, ScaleRule, next_size, wanted

RULE = ScaleRule(least=1, most=8, backlog=20, cool_down_s=60)


@st.composite
def rules(draw: st.DrawFn) -> ScaleRule:
    least = draw(st.integers(1, 20))
    return ScaleRule(least, draw(st.integers(least, 40)), draw(st.integers(1, 50)), draw(st.floats(1, 600)))


SIZES, COUNTS = st.integers(1, 60), st.integers(0, 5_000)
LOADS = st.builds(Load, COUNTS, COUNTS)


def test_there_are_more_at_once_and_twice_as_many_at_most():
    assert wanted(RULE, 1, Load(20, 32)) == 1
    assert wanted(RULE, 1, Load(21, 32)) == 2
    assert wanted(RULE, 1, Load(100, 32)) == 5
    assert next_size(RULE, 1, Load(100, 32), 0) == 2
    assert next_size(RULE, 2, Load(100, 32), 0) == 4
    assert next_size(RULE, 4, Load(100, 32), 0) == 5
    assert next_size(RULE, 4, Load(1000, 32), 0) == 8


def test_there_is_one_less_after_a_while_when_the_others_would_be_half_full_at_most():
    assert wanted(RULE, 4, Load(0, 30)) == 3
    assert wanted(RULE, 4, Load(0, 31)) == 4
    assert wanted(RULE, 4, Load(10, 20)) == 3
    assert wanted(RULE, 4, Load(0, 0)) == 1
    assert next_size(RULE, 4, Load(0, 0), 59.9) == 4
    assert next_size(RULE, 4, Load(0, 0), 60) == 3


@given(rules(), SIZES, LOADS, st.floats(0, 1e6))
def test_there_are_never_more_or_fewer_than_there_may_be(rule, size, load, calm_s):
    for chosen in (wanted(rule, size, load), next_size(rule, size, load, calm_s)):
        assert rule.least <= chosen <= rule.most


@given(rules(), SIZES, LOADS, COUNTS, st.floats(0, 1e6))
def test_more_to_do_never_means_fewer_workers(rule, size, load, more, calm_s):
    busier = Load(load.waiting + more, load.running)
    assert wanted(rule, size, busier) >= wanted(rule, size, load)
    assert next_size(rule, size, busier, calm_s) >= next_size(rule, size, load, calm_s)


def sizes(scaler: Scaler, size: int, load: Load | None, seconds: int, since: int = 0) -> list[int]:
    """The number of workers at each second under a load that stays as it is."""
    seen = [size]
    for now in range(since, since + seconds):
        seen.append(scaler.next_size(float(now), seen[-1], load, settled=True))
    return seen


@given(rules(), SIZES, LOADS)
def test_a_load_that_stays_as_it_is_never_brings_the_number_up_and_down(rule, size, load):
    size = rule.bounded(size)
    rule = ScaleRule(rule.least, rule.most, rule.backlog, 2.0)
    seen = sizes(Scaler(rule), size, load, 200)
    assert seen in (sorted(seen), sorted(seen, reverse=True))
    assert seen[-1] == wanted(rule, seen[-1], load)


@given(rules(), SIZES, COUNTS)
def test_what_waits_is_the_only_thing_to_have_more_for(rule, size, running):
    assert next_size(rule, rule.bounded(size), Load(0, running), 0) == rule.bounded(size)


def test_they_go_one_after_the_other_and_each_after_a_while():
    seen = sizes(Scaler(RULE), 4, Load(0, 0), 200)
    assert [seen.index(size) - 1 for size in (3, 2, 1)] == [60, 121, 182]


def test_a_moment_with_much_to_do_begins_the_while_anew():
    scaler = Scaler(RULE)
    assert sizes(scaler, 2, Load(0, 0), 59)[-1] == 2
    assert scaler.next_size(59.0, 2, Load(0, 15), settled=True) == 2
    assert sizes(scaler, 2, Load(0, 0), 60, since=60)[-1] == 2


def test_nothing_changes_while_the_load_is_not_known_or_somebody_has_chosen():
    scaler = Scaler(RULE)
    assert scaler.next_size(0.0, 3, None, settled=True) == 3
    assert scaler.wanted is None
    assert scaler.next_size(0.0, 3, Load(500, 0), settled=False) == 3
    scaler.held = True
    assert scaler.next_size(0.0, 3, Load(500, 0), settled=True) == 3
    assert scaler.wanted == 8
    scaler.held = False
    assert scaler.next_size(0.0, 3, Load(500, 0), settled=True) == 6
