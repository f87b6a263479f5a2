"""A clock that rests while its loop is held, and a time of day that is behind no longer than it must be."""

from __future__ import annotations

import asyncio
import time

import pytest

from agentweave_bus.dev.rest import RestingClock, RestingLoop


class Real:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def real() -> Real:
    return Real()


@pytest.fixture
def clock(real: Real) -> RestingClock:
    return RestingClock(1.0, 60.0, real=real)


def test_a_turn_counts_with_so_much_at_most_and_waiting_in_full(real: Real, clock: RestingClock) -> None:
    began = clock.monotonic()
    clock.turn_begins()
    real.now += 0.5
    assert clock.monotonic() - began == 0.5
    real.now += 600
    assert clock.monotonic() - began == 1.0  # while it is held
    clock.turn_ends(30.0)
    real.now += 30
    clock.turn_begins()
    assert clock.monotonic() - began == 31.0


def test_a_process_that_was_stopped_while_it_waited_has_rested(real: Real, clock: RestingClock) -> None:
    began = clock.monotonic()
    clock.turn_ends(2.0)
    real.now += 3600
    clock.turn_begins()
    assert clock.monotonic() - began == 3.0


def hold(real: Real, clock: RestingClock, seconds: float) -> None:
    clock.turn_begins()
    real.now += seconds
    clock.turn_ends(0)


def test_the_time_of_day_is_behind_while_somebody_waits_for_an_answer(
    real: Real, clock: RestingClock
) -> None:
    hold(real, clock, 61)
    assert clock.behind_s() == 0
    with clock.waiting():
        assert clock.behind_s() == 0  # what was held before is none of its time
        hold(real, clock, 11)
        assert clock.behind_s() == pytest.approx(10)
        with clock.waiting():
            assert clock.behind_s() == pytest.approx(10)
        assert clock.behind_s() == pytest.approx(10)
        clock.turn_begins()
        real.now += 21
        assert clock.behind_s() == pytest.approx(30)  # in the middle of it
        clock.turn_ends(0)
    assert clock.behind_s() == 0
    with clock.waiting():
        assert clock.behind_s() == 0


def test_it_is_not_behind_for_ever(real: Real, clock: RestingClock) -> None:
    with clock.waiting():
        hold(real, clock, 11)
        clock.turn_ends(100.0)
        real.now += 59
        assert clock.behind_s() == pytest.approx(10)
        real.now += 2
        assert clock.behind_s() == 0
        hold(real, clock, 6)
        assert clock.behind_s() == pytest.approx(5)


def test_a_timer_does_not_go_off_by_a_hold() -> None:
    async def held(seconds: float) -> None:
        async with asyncio.timeout(0.4):
            time.sleep(seconds)  # noqa: ASYNC251 - as a debugger does
            await asyncio.sleep(0.05)

    clock = RestingClock(0.1)
    with asyncio.Runner(loop_factory=lambda: RestingLoop(clock)) as runner:
        runner.run(held(0.5))
        with pytest.raises(TimeoutError):
            runner.run(asyncio.wait_for(asyncio.sleep(10), 0.2))
