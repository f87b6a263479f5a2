"""The breaker against its own table, and against what it is for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.authz.circuit_breaker import (
    TRANSITIONS,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    CircuitBreaker,
)

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SETTINGS = BreakerSettings(failure_threshold=3, success_threshold=2, timeout=30)


def fail(breaker: CircuitBreaker, times: int, now: int = 0) -> None:
    for _ in range(times):
        permit = breaker.acquire(now)
        assert permit is not None
        breaker.failed(permit, now)


def opened(now: int = 0) -> CircuitBreaker:
    breaker = CircuitBreaker(SETTINGS)
    fail(breaker, 3, now)
    assert breaker.state(now) is OPEN
    return breaker


def test_the_table() -> None:
    assert {
        (state.value, event.value): (to.to.value, to.after) for (state, event), to in TRANSITIONS.items()
    } == {
        ("closed", "success"): ("closed", None),
        ("closed", "failure"): ("open", "failure_threshold"),
        ("open", "cooled"): ("half_open", None),
        ("half_open", "success"): ("closed", "success_threshold"),
        ("half_open", "failure"): ("open", None),
    }


def test_defaults_are_those_of_the_reference() -> None:
    assert BreakerSettings() == BreakerSettings(failure_threshold=5, success_threshold=2, timeout=30)


@pytest.mark.parametrize(
    "wrong", [{"failure_threshold": 0}, {"success_threshold": 0}, {"timeout": 0}, {"timeout": float("nan")}]
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        BreakerSettings(**wrong)  # type: ignore[arg-type]


def test_failures_in_a_row_open_it_and_a_success_between_starts_again() -> None:
    breaker = CircuitBreaker(SETTINGS)
    fail(breaker, 2)
    permit = breaker.acquire(0)
    assert permit is not None
    breaker.succeeded(permit, 0)
    fail(breaker, 2)
    assert breaker.state(0) is CLOSED
    fail(breaker, 1)
    assert breaker.state(0) is OPEN


def test_open_it_lets_nothing_through_until_the_timeout() -> None:
    breaker = opened(now=1000)
    assert breaker.acquire(30_999) is None
    assert breaker.retry_after(11_000) == 20.0
    assert breaker.acquire(31_000) is not None
    assert breaker.state(31_000) is HALF_OPEN
    assert breaker.retry_after(31_000) == 0


def test_half_open_it_probes_one_at_a_time_and_closes_after_enough() -> None:
    breaker = opened()
    for _ in range(2):
        permit = breaker.acquire(30_000)
        assert permit is not None
        assert breaker.acquire(30_000) is None
        breaker.succeeded(permit, 30_000)
    assert breaker.state(30_000) is CLOSED


def test_a_failed_probe_opens_it_for_another_timeout() -> None:
    breaker = opened()
    fail(breaker, 1, now=30_000)
    assert breaker.acquire(59_999) is None
    assert breaker.acquire(60_000) is not None


def test_a_late_result_of_an_earlier_state_counts_for_nothing() -> None:
    breaker = CircuitBreaker(SETTINGS)
    late = breaker.acquire(0)
    assert late is not None
    fail(breaker, 3)
    assert breaker.state(30_000) is HALF_OPEN
    breaker.failed(late, 30_000)
    assert breaker.state(30_000) is HALF_OPEN
    probe = breaker.acquire(30_000)
    breaker.succeeded(late, 30_000)
    assert breaker.acquire(30_000) is None
    assert probe is not None


def test_an_abandoned_or_lost_probe_does_not_block_for_ever() -> None:
    breaker = opened()
    permit = breaker.acquire(30_000)
    assert permit is not None
    breaker.abandoned(permit)
    assert breaker.acquire(30_000) is not None
    assert breaker.acquire(59_999) is None
    assert breaker.acquire(60_000) is not None


def test_changes_are_told() -> None:
    changes: list[tuple[BreakerState, BreakerState]] = []
    breaker = CircuitBreaker(SETTINGS, on_change=lambda old, new: changes.append((old, new)))
    fail(breaker, 3)
    for _ in range(2):
        permit = breaker.acquire(30_000)
        assert permit is not None
        breaker.succeeded(permit, 30_000)
    assert changes == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]


class Model:
    """The breaker said in another way: a list of recent outcomes."""

    def __init__(self) -> None:
        self.state, self.row, self.since = CLOSED, 0, 0

    def step(self, event: str, now: int) -> bool:
        if self.state is OPEN and now - self.since >= 30_000:
            self.state, self.row = HALF_OPEN, 0
        if self.state is OPEN:
            return False
        good = event == "success"
        counts_up = good if self.state is HALF_OPEN else not good
        self.row = self.row + 1 if counts_up else 0
        if (self.state is CLOSED and self.row == 3) or (self.state is HALF_OPEN and not good):
            self.state, self.row, self.since = OPEN, 0, now
        elif self.state is HALF_OPEN and self.row == 2:
            self.state, self.row = CLOSED, 0
        return True


@given(
    st.lists(
        st.tuples(st.sampled_from(["success", "failure", "failure"]), st.integers(0, 20_000)), max_size=60
    )
)
def test_it_behaves_as_the_model_does(steps: list[tuple[str, int]]) -> None:
    breaker, model, now = CircuitBreaker(SETTINGS), Model(), 0
    for event, passed in steps:
        now += passed
        permit = breaker.acquire(now)
        assert (permit is not None) == model.step(event, now)
        if permit is not None:
            report = breaker.succeeded if event == "success" else breaker.failed
            report(permit, now)
        assert breaker._state is model.state


def test_every_event_has_a_meaning_somewhere() -> None:
    assert {event for _, event in TRANSITIONS} == set(BreakerEvent)
