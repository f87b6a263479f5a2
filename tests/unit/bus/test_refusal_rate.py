"""Refusals of unknown senders: a burst is written, then a few a second, and none goes uncounted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.refusal_rate import RefusalRate

NOW = 1_700_000_000_000


def written(rate, times):
    return [said for at in times if (said := rate.take(at)) is not None]


def test_a_burst_is_written_and_no_more():
    assert written(RefusalRate(), [NOW] * 5_000) == [0] * 2_000


def test_later_a_few_a_second_are_and_the_first_says_how_many_were_not():
    rate = RefusalRate()
    written(rate, [NOW] * 5_000)
    assert written(rate, [NOW + 1_000] * 100) == [3_000] + [0] * 19
    assert written(rate, [NOW + 1_050]) == [80]


def test_a_clock_that_goes_back_gives_nothing():
    rate = RefusalRate()
    written(rate, [NOW] * 5_000)
    assert written(rate, [NOW - 3_600_000] * 100 + [NOW] * 100) == []


@given(st.lists(st.integers(NOW, NOW + 10_000), max_size=50))
def test_every_one_is_written_or_counted(times):
    rate = RefusalRate()
    written(rate, [NOW] * 2_000)
    said = written(rate, [*times, NOW + 3_600_000])
    assert len(said) + sum(said) == len(times) + 1
