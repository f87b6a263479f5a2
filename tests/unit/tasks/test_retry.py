"""How often a task is tried again: a submitter can only ask for less and later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.exceptions import ConfigurationError, PayloadError
from agentweave_bus.tasks.retry import LONGEST_DELAY, Retry

seconds = st.floats(0, LONGEST_DELAY) | st.integers(0, int(LONGEST_DELAY))
rules = st.tuples(st.integers(1, 400), seconds, seconds).map(
    lambda parts: Retry(parts[0], min(parts[1:]), max(parts[1:]))
)
asked = st.fixed_dictionaries(
    {},
    optional={
        "attempts": st.integers(1, 2**53),
        "first_ms": st.integers(0, 2**53),
        "last_ms": st.integers(0, 2**53),
    },
)


@given(rules, st.integers(-5, 10**6))
def test_a_delay_lies_in_the_upper_half_of_a_doubling_that_is_bounded(rule: Retry, attempt: int) -> None:
    longest = min(rule.first_delay * 2 ** min(max(attempt, 1) - 1, 64), rule.last_delay)
    assert longest / 2 <= rule.delay(attempt) <= longest <= rule.last_delay


def test_delays_double_and_are_spread() -> None:
    rule = Retry(attempts=9, first_delay=1, last_delay=10)
    assert [max(rule.delay(n) for _ in range(200)) for n in (1, 2, 3, 4, 5)] == pytest.approx(
        [1, 2, 4, 8, 10], rel=0.1
    )
    assert len({rule.delay(1) for _ in range(20)}) > 10


@given(rules, asked)
def test_a_submitter_only_lowers_attempts_and_lengthens_delays(rule: Retry, wish: dict[str, int]) -> None:
    merged = rule.narrowed(wish)
    assert merged.attempts == min(rule.attempts, wish.get("attempts", rule.attempts))
    assert merged.first_delay >= rule.first_delay
    assert merged.last_delay >= max(rule.last_delay, merged.first_delay)
    for delay, key in ((merged.first_delay, "first_ms"), (merged.last_delay, "last_ms")):
        assert delay >= min(wish.get(key, 0) / 1000, LONGEST_DELAY)


@given(rules, rules)
def test_what_a_rule_writes_another_can_take(rule: Retry, wish: Retry) -> None:
    merged = rule.narrowed(wish.to_map())
    assert merged.attempts == min(rule.attempts, wish.attempts)
    assert merged.first_delay >= max(rule.first_delay, wish.first_delay)
    assert merged.first_delay < max(rule.first_delay, wish.first_delay) + 0.0011


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_asked_changes_nothing(nothing: dict[str, int] | None) -> None:
    assert Retry().narrowed(nothing) == Retry(3, 1.0, 60.0)


@pytest.mark.parametrize(
    "wish",
    [{"attempts": 0}, {"attempts": -1}, {"attempts": True}, {"first_ms": -1}, {"last_ms": 1.5}, {"tries": 2}],
)
def test_what_is_no_wish_is_refused(wish: dict[str, int]) -> None:
    with pytest.raises(PayloadError, match="retry: "):
        Retry().narrowed(wish)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": 1001},
        {"attempts": True},
        {"attempts": 2.0},
        {"first_delay": -1},
        {"last_delay": float("inf")},
        {"last_delay": float("nan")},
        {"first_delay": "1"},
        {"first_delay": 61},
        {"last_delay": 86_401},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Retry(**wrong)  # type: ignore[arg-type]
