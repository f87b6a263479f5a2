"""What can't be read now is given back for a while, and then no more."""

from __future__ import annotations

from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.unreadable import PATIENCE_DELIVERIES, PATIENCE_S, Unreadable

PATIENCE_MS = int(PATIENCE_S * 1000)
PLACES = 10_000


def given_out(frame: bytes, delivered: int = 1, stored_at_ms: int = 0) -> Delivery:
    return Delivery(frame, "aw.task.x", delivered, stored_at_ms, "")


def test_each_frame_has_its_own_time_and_begins_anew_after_it() -> None:
    now_ms = 1_000
    frames = Unreadable(lambda: now_ms)
    assert not frames.too_long(given_out(b"one"))
    now_ms += PATIENCE_MS - 1
    assert not frames.too_long(given_out(b"one"))
    assert not frames.too_long(given_out(b"other"))
    now_ms += 1
    assert frames.too_long(given_out(b"one"))
    assert not frames.too_long(given_out(b"other"))
    assert not frames.too_long(given_out(b"one"))


def test_an_old_queue_is_not_given_up_for_a_short_trouble_of_this_worker() -> None:
    frames = Unreadable(lambda: 10 * PATIENCE_MS)
    assert not frames.too_long(given_out(b"old", delivered=1_000))


def test_what_finds_no_place_goes_by_the_brokers_word() -> None:
    now_ms = PATIENCE_MS
    frames = Unreadable(lambda: now_ms)
    for number in range(PLACES):
        assert not frames.too_long(given_out(b"%d" % number))
    assert frames.too_long(given_out(b"more", PATIENCE_DELIVERIES))
    assert not frames.too_long(given_out(b"more", PATIENCE_DELIVERIES - 1))
    assert not frames.too_long(given_out(b"more", PATIENCE_DELIVERIES, stored_at_ms=1))
    # The others keep their places, however many come.
    now_ms += PATIENCE_MS
    assert all(frames.too_long(given_out(b"%d" % number)) for number in range(PLACES))


def test_a_place_is_free_again_when_its_frame_has_not_come_for_long() -> None:
    now_ms = 0
    frames = Unreadable(lambda: now_ms)
    for number in range(PLACES):
        frames.too_long(given_out(b"%d" % number))
    now_ms += 2 * PATIENCE_MS
    assert not frames.too_long(given_out(b"more", PATIENCE_DELIVERIES))  # it has a place, and begins there
    now_ms += PATIENCE_MS
    assert frames.too_long(given_out(b"more"))
