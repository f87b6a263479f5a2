"""Clocks that disagree: what they may differ by, and what is said when they differ by more.

One participant has a clock of its own, for all that it does, which is set while it runs, as NTP or a person
does it.
"""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.exceptions import CallRefusedError, CallTimeoutError
from agentweave_bus.runtime import Runner
from agentweave_bus.runtime.surroundings import Surroundings
from tests.integration import probes
from tests.integration.callee import replaced
from tests.integration.connections import Fixed, until
from tests.integration.probes import CLI, ECHO, PATIENCE, Held
from tests.integration.world import Caller

pytestmark = pytest.mark.anyio

TIMEOUT = 60.0
"""Longer than the skew, so that it is not the deadline that has passed."""


class Clock:
    """``ahead_s`` of the right time."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.surroundings = Surroundings(time_ns=lambda: time.time_ns() + int(self.ahead_s * 1e9))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def caller(world, clock):
    """A caller whose clock it is."""
    held = await Held.open(AgentWeaveClient(world.config(CLI), surroundings=clock.surroundings))
    world._held.append(held)
    return Caller(held.value)


class Refusals:
    """What echo refuses from here on. Its records can't be told by their times, which are off as well."""

    def __init__(self, world) -> None:
        self._world = world
        self._known = {one["audit_id"] for one in world.refusals("echo")}

    async def next(self) -> str:
        """The reason of the next refusal, which is for its time."""
        await until(self._unknown, "a refusal")
        (record,) = self._unknown()
        self._known.add(record["audit_id"])
        assert (record["step"], record["step_name"]) == (8, "time")
        return record["reason"]

    def _unknown(self):
        return [one for one in self._world.refusals("echo") if one["audit_id"] not in self._known]


async def refused_for_its_time(caller, refusals):
    with pytest.raises(CallRefusedError, match=r"issued \d+ ms in the future; compare the clocks") as refused:
        await caller.call(str(ECHO), "say", {"text": "when?"}, timeout=TIMEOUT)
    assert refused.value.step == "time"
    assert refused.value.reason == await refusals.next()
    return refused.value.reason


@pytest.fixture
async def echo(world):
    """A callee whose SVID is not of this minute: a new one is backdated by no more than 10 s."""
    ten_minutes_ago = datetime.now(UTC) - timedelta(minutes=10)
    svid = world.issue(ECHO, not_before=ten_minutes_ago)
    return await world.agent(ECHO, provider=Fixed(svid, world.stack.api.authority.bundle))


@pytest.mark.parametrize("seconds", [1.5, -25])
async def test_a_caller_whose_clock_is_off_by_less_than_allowed_is_served(caller, clock, echo, seconds):
    clock.ahead_s = seconds
    assert await caller.ask(ECHO, "say", {"text": "x"}, timeout=TIMEOUT) == {"said": "x"}
    for reason in ("late", "duplicate", "forged"):
        assert caller.dropped(reason) == 0


async def test_a_caller_ahead_is_told_by_how_much_and_served_once_its_clock_is_right(
    world, caller, clock, echo
):
    clock.ahead_s, refusals = 5, Refusals(world)
    for _ in range(6):  # more than opens a breaker
        reason = await refused_for_its_time(caller, refusals)
    assert 4_500 < int(reason.split()[1]) <= 5_000
    assert echo.ran == []
    clock.ahead_s = 0
    assert await caller.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}


async def test_a_caller_far_behind_is_refused_and_served_once_its_clock_is_right(
    world, caller, clock, echo, caplog
):
    """By how much is in the callee's log; to the caller its answer is as far off, so it is not believed."""
    clock.ahead_s = -35
    refusals = Refusals(world)
    for _ in range(2):
        with pytest.raises(CallTimeoutError, match=r"1: its time is too far .*compare the clocks"):
            await caller.call(str(ECHO), "work", {"text": "x"}, timeout=1.0)
        # Refused for its age: the clock is judged before the deadline, which has passed, too.
        said = re.fullmatch(r"issued (\d+) ms ago, more than 30000", await refusals.next())
        assert 35_000 <= int(said[1]) < 36_000
    logged = [record for record in caplog.records if record.name == "agentweave_bus.bus.dropped"]
    assert len(logged) == 1  # it is said once a minute
    assert str(ECHO) in logged[0].getMessage()
    assert "compare the clocks" in logged[0].getMessage()
    assert caller.dropped("forged") == 2
    assert echo.ran == []
    clock.ahead_s = 0
    assert await caller.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}


@pytest.mark.slow
async def test_a_caller_behind_by_more_than_an_svid_is_backdated_does_not_believe_a_new_one(
    world, caller, clock
):
    # A new one it has to be: that of the stack may have been issued long ago, for other tests.
    agent = await world.agent(ECHO, provider=Fixed(world.issue(ECHO), world.stack.api.authority.bundle))
    clock.ahead_s = -25
    asking = asyncio.create_task(caller.ask(ECHO, "say", {"text": "x"}, timeout=TIMEOUT))
    await until(lambda: caller.dropped("forged") == 1, "an answer that is not believed")
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()
    clock.ahead_s = 0
    assert await caller.ask(ECHO, "say", {"text": "x"}) == {"said": "x"}
    assert agent.ran == ["say", "say"]


@pytest.fixture
async def callee(world, clock):
    """A callee whose clock it is."""
    with replaced(probes, "Runner", lambda: Runner(clock.surroundings)):
        return await world.agent(ECHO)


async def test_a_callee_behind_says_so_too_and_serves_once_its_clock_is_right(world, cli, clock, callee):
    """In the same words: nobody can tell whose clock is wrong, so they say to compare them."""
    clock.ahead_s = -5
    await refused_for_its_time(cli, Refusals(world))
    assert callee.ran == []
    clock.ahead_s = 0
    assert await cli.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}


@pytest.mark.slow
async def test_a_callee_far_ahead_refuses_in_its_log_and_its_answer_is_not_believed(
    world, cli, clock, callee
):
    """An answer that is older or newer than 30 s may be an old one, sent again."""
    clock.ahead_s = 35
    refusals, forged = Refusals(world), cli.dropped("forged")
    with pytest.raises(CallTimeoutError):
        await cli.call(str(ECHO), "say", {"text": "x"}, timeout=1.0)
    assert "ms ago, more than 30000" in await refusals.next()
    assert cli.dropped("forged") == forged + 1
    clock.ahead_s = 0
    assert callee.ran == []
    assert await cli.ask(ECHO, "say", {"text": "x"}) == {"said": "x"}


@pytest.mark.parametrize("seconds", [20, pytest.param(-20, marks=pytest.mark.slow)])
async def test_a_clock_that_is_set_while_a_call_is_in_flight_neither_ends_nor_prolongs_it(
    caller, clock, echo, seconds
):
    async with anyio.create_task_group() as group:
        group.start_soon(caller.ask, ECHO, "wait")  # with a deadline nearer than the clock is set by
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        clock.ahead_s = seconds
        echo.gate.set()
    began = time.monotonic()
    clock.ahead_s = 0
    echo.gate.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(times_out, caller, 0.3)
        await anyio.sleep(0.1)
        clock.ahead_s = seconds
    assert 0.25 < time.monotonic() - began < 15
    echo.gate.set()


async def times_out(caller, seconds):
    with pytest.raises(CallTimeoutError):
        await caller.call(str(ECHO), "stubborn", timeout=seconds)
