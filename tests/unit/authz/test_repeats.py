"""What is asked again and again is on record at once, and then once a minute, with how many there were."""

from __future__ import annotations

from agentweave_bus.authz.repeats import Repeats


def recorded(repeats, key, now_ms):
    """What a record says, if there is one."""
    says = repeats.due(key, now_ms)
    if says is not None:
        repeats.recorded(key, now_ms)
    return says


def test_one_a_minute_says_how_many_there_were():
    repeats = Repeats()
    said = [recorded(repeats, "a", second * 1_000) for second in range(125)]
    assert [(at, one) for at, one in enumerate(said) if one is not None] == [
        (0, {}),
        (60, {"repeated": 59}),
        (120, {"repeated": 59}),
    ]


def test_others_have_records_of_their_own():
    repeats = Repeats()
    assert recorded(repeats, ("anna", "queues"), 0) == {}
    assert recorded(repeats, ("anna", "records"), 1) == {}
    assert recorded(repeats, ("ben", "queues"), 2) == {}
    assert recorded(repeats, ("anna", "queues"), 3) is None


def test_what_could_not_be_recorded_is_still_due_and_nothing_is_lost():
    repeats = Repeats()
    assert repeats.due("a", 0) == {}
    assert repeats.due("a", 1) == {}
    repeats.recorded("a", 1)
    assert repeats.due("a", 2) is None
    assert repeats.due("a", 70_000) == {"repeated": 1}
    assert repeats.due("a", 70_001) == {"repeated": 1}


def test_a_clock_that_goes_back_hides_nothing():
    repeats = Repeats()
    recorded(repeats, "a", 1_000_000)
    assert repeats.due("a", 999_999) == {}


def test_whom_there_is_no_room_to_remember_is_recorded_again():
    repeats = Repeats()
    for key in range(1_025):
        recorded(repeats, key, 0)
    assert repeats.due(0, 1) == {}
    assert repeats.due(1_024, 1) is None
