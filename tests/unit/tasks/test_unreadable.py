"""What can't be read now is given back for a while, and then no more."""

from __future__ import annotations

from agentweave_bus.tasks.unreadable import PATIENCE_S, Unreadable


def test_each_frame_has_its_own_time_and_begins_anew_after_it() -> None:
    now_ms = 1_000
    frames = Unreadable(lambda: now_ms)
    assert not frames.too_long(b"one")
    now_ms += int(PATIENCE_S * 1000) - 1
    assert not frames.too_long(b"one")
    assert not frames.too_long(b"other")
    now_ms += 1
    assert frames.too_long(b"one")
    assert not frames.too_long(b"other")
    assert not frames.too_long(b"one")


def test_only_so_many_are_remembered() -> None:
    now_ms = 0
    frames = Unreadable(lambda: now_ms)
    for number in range(10_001):
        frames.too_long(b"%d" % number)
    now_ms = int(PATIENCE_S * 1000)
    assert not frames.too_long(b"0")
    assert frames.too_long(b"10000")
