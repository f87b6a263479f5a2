"""How many claims one sender may cause in a second."""

from __future__ import annotations

import pytest

from agentweave_bus.bus import claim_rates
from agentweave_bus.bus.claim_rates import ClaimRates

SENDER, OTHER = "spiffe://a.test/agent/x", "spiffe://a.test/agent/y"
NOW = 1_767_323_045_000
RATE = 2_000
"""Claims a second, as the page on security promises."""


def taken(rates, sender, now_ms, *, tries=3 * RATE):
    """Return how many of ``tries`` at one moment are allowed; a sender that was refused stays so."""
    allowed = [rates.take(sender, now_ms) for _ in range(tries)]
    assert allowed == sorted(allowed, reverse=True)
    return sum(allowed)


def test_one_sender_gets_two_thousand_claims_at_once_and_no_more():
    assert taken(ClaimRates(), SENDER, NOW) == RATE


def test_another_sender_has_an_allowance_of_its_own():
    rates = ClaimRates()
    taken(rates, SENDER, NOW)
    assert taken(rates, OTHER, NOW) == RATE


@pytest.mark.parametrize(("later_ms", "again"), [(1, 2), (250, 500), (999, 1998), (1_000, RATE)])
def test_the_allowance_comes_back_with_time(later_ms, again):
    rates = ClaimRates()
    taken(rates, SENDER, NOW)
    assert taken(rates, SENDER, NOW + later_ms) == again


def test_who_was_silent_for_long_has_saved_nothing_up():
    rates = ClaimRates()
    assert rates.take(SENDER, NOW)
    assert taken(rates, SENDER, NOW + 3_600_000) == RATE


def test_who_tries_all_the_time_gets_as_many_as_the_rate_allows():
    """A refused try costs nothing, and what comes back in parts adds up."""
    rates = ClaimRates()
    taken(rates, SENDER, NOW)
    assert sum(taken(rates, SENDER, NOW + ms, tries=5) for ms in range(1, 1_001)) == RATE


def test_a_clock_that_is_set_back_gives_nothing_away():
    rates = ClaimRates()
    taken(rates, SENDER, NOW)
    assert taken(rates, SENDER, NOW - 60_000) == 0
    assert taken(rates, SENDER, NOW) == 0
    assert taken(rates, SENDER, NOW + 1) == 2


def test_as_many_senders_are_remembered_as_fit_and_the_longest_silent_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(claim_rates, "_MAX_RATED_SENDERS", 3)
    rates = ClaimRates()
    for sender in ("a", "b", "c"):
        assert taken(rates, sender, NOW) == RATE
    assert not rates.take("a", NOW)  # heard of last now
    assert rates.take("d", NOW)
    assert not rates.take("a", NOW)
    assert not rates.take("c", NOW)
    assert len(rates._buckets) == 3
    assert rates.take("b", NOW)


def test_no_more_than_4096_senders_are_remembered():
    rates = ClaimRates()
    for number in range(5_000):
        assert rates.take(f"{SENDER}{number}", NOW)
    assert len(rates._buckets) == 4_096
