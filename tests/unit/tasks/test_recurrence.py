"""When a recurring task comes again, compared with a search minute by minute."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.tasks.recurrence import recurrence

MINUTE = 60_000
START = int(datetime(2026, 2, 27, 23, 58, 30, tzinfo=UTC).timestamp() * 1000)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text + "+00:00").timestamp() * 1000)


@pytest.mark.parametrize(
    ("every", "after", "expected"),
    [
        ("*/15 8-17 * * 1-5", "2026-02-27T17:45", "2026-03-02T08:00"),  # over a weekend, and a month's end
        ("0 0 29 * *", "2026-02-28T00:00", "2026-03-29T00:00"),
        ("30 6 1,15 * *", "2026-02-27T00:00", "2026-03-01T06:30"),
        ("0 12 13 * 5", "2026-02-27T12:00", "2026-03-06T12:00"),  # either day suffices
        ("5 4 * * 7", "2026-02-27T12:00", "2026-03-01T04:05"),
        ("5 4 * * 0", "2026-02-27T12:00", "2026-03-01T04:05"),
        ("0-10/5 23 * 2 *", "2026-02-27T23:06", "2026-02-27T23:10"),
        ("1h", "2026-02-28T00:58:30", "2026-02-28T01:58:30"),
        ("90s", "2026-02-27T23:58:30", "2026-02-28T00:00"),
        ("10s", "2026-02-27T23:58:30", "2026-02-27T23:58:40"),
        ("2d", "2026-02-27T23:58:31", "2026-03-01T23:58:30"),
    ],
)
def test_the_next_time(every: str, after: str, expected: str) -> None:
    one = recurrence(every, START)
    if at(after) >= START:
        assert one.next_after(at(after)) == at(expected)
        assert one.latest(at(expected)) == at(expected)
    else:
        assert recurrence(every, at(after)).next_after(at(after)) == at(expected)


@pytest.mark.parametrize(
    "every",
    [
        *(
            "",
            "0s",
            "1s",
            "9s",
            "1",
            "h",
            "1.5h",
            "1w",
            "32d",
            "-1h",
            " 1h",
            "1h ",
            "@daily",
            "@every 1s",
            "* * * *",
        ),
        *("* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "5-1 * * * *"),
        *("5/2 * * * *", "*/0 * * * *", "a * * * *", "* * * jan *", "0 0 31 2 *", "*,  * * * *"),
        *("\u0661 * * * *", "*/1" * 99),
    ],
)
def test_what_is_not_understood(every: str) -> None:
    with pytest.raises(ConfigurationError, match="comes again"):
        recurrence(every, START)


def test_nothing_before_the_first_time() -> None:
    for every in ("1h", "0 * * * *"):
        one = recurrence(every, START)
        assert one.latest(START - 1) is None
        first = one.next_after(0)
        assert first is not None
        assert first >= START
        assert one.next_after(first - 1) == first


FIELDS = st.tuples(
    st.sampled_from(["*", "*/7", "0", "3,30-40/4", "59"]),
    st.sampled_from(["*", "*/6", "0", "5-9", "23"]),
    st.sampled_from(["*", "1", "*/9", "28-31"]),
    st.sampled_from(["*", "2,3", "3-12"]),
    st.sampled_from(["*", "0", "1-5", "6,7"]),
)


@given(FIELDS, st.integers(0, 3 * 1440))
def test_it_has_the_same_times_as_a_search(fields: tuple[str, ...], ahead: int) -> None:
    try:
        one = recurrence(" ".join(fields), START)
    except ConfigurationError:
        return  # of what comes up in no month
    now = START + ahead * MINUTE
    following = one.next_after(now)
    minutes = [minute * MINUTE for minute in range(now // MINUTE + 1, (following or now) // MINUTE)]
    assert all(one.latest(minute) != minute for minute in minutes[:2_000])
    if following is not None:
        assert one.latest(following) == following
        before = one.latest(following - 1)
        assert before is None or before <= now


@given(st.integers(10, 10**6), st.integers(0, 10**10))
def test_periods_leave_nothing_out(seconds: int, ahead: int) -> None:
    one = recurrence(f"{seconds}s", START)
    latest, following = one.latest(START + ahead), one.next_after(START + ahead)
    assert latest is not None
    assert following is not None
    assert latest <= START + ahead < following == latest + seconds * 1000
