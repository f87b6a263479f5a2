"""Policy servers that fail under calls: errors are the designed ones, and all recovers by itself."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import anyio
import pytest

from agentweave_bus.authz.circuit_breaker import BreakerState
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.connections import until
from tests.integration.opa_player import OpaPlayer, hanging_up, http, raw, result, silence
from tests.integration.probes import ECHO, PATIENCE
from tests.integration.world import metric

pytestmark = pytest.mark.anyio

UNASKED = "the policy could not be asked"
OPEN, CLOSED, HALF_OPEN = BreakerState.OPEN, BreakerState.CLOSED, BreakerState.HALF_OPEN
BROKEN = raw(http(b"no json"))


@pytest.fixture
async def players():
    folder = Path(tempfile.mkdtemp(prefix="awopa-"))
    both = [OpaPlayer(folder, "a.sock"), OpaPlayer(folder, "b.sock")]
    for one in both:
        await one.start()
    yield both
    for one in both:
        await one.stop()
    shutil.rmtree(folder)


def asks(*players, **breaker):
    return {
        "authorization__provider": "opa",
        "authorization__opa_endpoints": [one.url for one in players],
        "authorization__timeout_ms": 1500,
        "authorization__circuit_breaker": breaker,
    }


async def denial(caller, name="say"):
    with pytest.raises(AuthorizationError) as denied:
        await caller.call(str(ECHO), name, {"text": "x"}, timeout=PATIENCE)
    return denied.value


def clocked(agent):
    """Have the breakers measured by a clock that the test sets (milliseconds)."""
    clock = [0]
    engine = agent.parts.authorizer._engine
    engine._now_ms = lambda: clock[0]
    return engine, clock


async def test_five_failures_open_a_breaker_that_probes_after_half_a_minute(world, cli, players):
    first = players[0]
    echo = await world.agent(ECHO, **asks(first))  # with the breaker as it is by default
    engine, clock = clocked(echo)
    await cli.ask(ECHO, "say", {"text": "x"})
    asked = len(first.questions())

    def asked_more():
        return len(first.questions()) - asked

    first.play = BROKEN
    for _ in range(3):  # two attempts each
        assert (await denial(cli)).reason == UNASKED
    assert asked_more() == 5
    assert engine.breaker_states() == {first.url: OPEN}
    clock[0] = 29_999
    assert (await denial(cli)).reason == UNASKED
    assert asked_more() == 5  # it is left alone
    assert "the breakers of all OPA endpoints are open" in world.refusals("echo")[-1]["reason"]

    clock[0] = 30_000
    await denial(cli)
    assert asked_more() == 6  # one probe, which failed
    assert engine.breaker_states() == {first.url: OPEN}
    first.play = first.well
    await denial(cli)
    assert asked_more() == 6
    clock[0] = 60_000
    await cli.ask(ECHO, "say", {"text": "back"})
    assert engine.breaker_states() == {first.url: HALF_OPEN}
    await cli.ask(ECHO, "say", {"text": "back"})
    assert engine.breaker_states() == {first.url: CLOSED}
    assert metric(echo.parts, "agentweave_authz_circuit_breaker_state", state="closed") == 1
    assert metric(echo.parts, "agentweave_opa_errors_total") == 6


async def test_a_server_may_take_as_long_as_the_setting_says(world, cli, players):
    """More than a second, which is what engines without a setting have."""
    first = players[0]
    await world.agent(ECHO, **(asks(first) | {"authorization__timeout_ms": 20_000}))

    async def slow(question, writer):
        await asyncio.sleep(1.2)
        await first.well(question, writer)

    first.play = slow
    await cli.ask(ECHO, "say", {"text": "x"})
    assert [one.rule for one in first.questions()] == ["decision"]


async def test_the_second_endpoint_takes_over_and_the_first_comes_back(world, cli, players):
    first, second = players
    echo = await world.agent(ECHO, **asks(first, second))
    engine, clock = clocked(echo)
    await cli.ask(ECHO, "say", {"text": "x"})
    assert second.questions() == []
    first.play = BROKEN
    for _ in range(6):
        await cli.ask(ECHO, "say", {"text": "x"})  # nobody notices
    assert engine.breaker_states() == {first.url: OPEN, second.url: CLOSED}
    assert len(second.questions()) == 6
    second.play = hanging_up
    assert (await denial(cli)).reason == UNASKED
    first.play = first.well
    second.play = second.well
    clock[0] = 30_000
    asked = len(second.questions())
    for _ in range(2):
        await cli.ask(ECHO, "say", {"text": "x"})
    assert engine.breaker_states() == {first.url: CLOSED, second.url: CLOSED}
    assert len(second.questions()) == asked  # the first is preferred again


async def test_two_servers_that_disagree_about_the_revision_give_nothing_that_stands(world, cli, players):
    first, second = players
    for one in players:
        one.standing_packages = ("agentweave/grants",)
    echo = await world.agent(ECHO, **asks(first, second))
    authorizer = echo.parts.authorizer
    await authorizer.reload()
    for _ in range(2):
        await cli.ask(ECHO, "say", {"text": "x"})
    reused = "agentweave_authz_standing_reused_total"
    assert metric(echo.parts, reused) == 1
    second.revision = "r2"
    await authorizer.reload()
    for _ in range(2):
        await cli.ask(ECHO, "say", {"text": "x"})
    assert metric(echo.parts, reused) == 1
    first.revision = "r2"
    await authorizer.reload()
    for _ in range(2):
        await cli.ask(ECHO, "say", {"text": "x"})
    assert metric(echo.parts, reused) == 2


class Load:
    """Calls that go on and on from eight callers, and how each ended."""

    def __init__(self, caller):
        self._caller = caller
        self.ended = {"ok": 0, "denied": 0}
        self.wrong = []

    async def run(self):
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(self._ask())

    async def _ask(self):
        while True:
            try:
                await self._caller.ask(ECHO, "say", {"text": "x"})
            except AuthorizationError as denied:
                self.ended["denied"] += 1
                if (denied.direction, denied.reason, bool(denied.audit_id)) != ("inbound", UNASKED, True):
                    self.wrong.append(denied)
                await asyncio.sleep(0.01)
            except Exception as error:
                self.wrong.append(error)
            else:
                self.ended["ok"] += 1

    async def until_more(self, what, count=20):
        wanted = self.ended[what] + count
        await until(lambda: self.ended[what] >= wanted or self.wrong, f"{count} more {what}")
        assert self.wrong == []


async def test_under_calls_each_fault_denies_and_is_forgotten(world, cli, players):
    first = players[0]
    echo = await world.agent(ECHO, **asks(first, failure_threshold=5, success_threshold=2, timeout=0.05))
    load = Load(cli)
    calls = asyncio.create_task(load.run())
    try:
        await load.until_more("ok")
        for fault in (BROKEN, raw(http(b"{}", 500)), hanging_up, result({"allow": True}, "r0"), silence):
            with first.playing(fault):
                await load.until_more("denied")
            await load.until_more("ok")
        await first.stop()
        await load.until_more("denied")
        await first.start()
        await load.until_more("ok")
    finally:
        calls.cancel()
        await asyncio.wait({calls})
    assert load.wrong == []
    assert first.most_connections <= 2 * 16  # those that are being closed are counted, too
    # Only what ran was answered, and only what was allowed ran.
    for parts in (cli.parts, echo.parts):  # what was given up by its caller may still be on its way
        await (await parts.keeper.session(1)).flush(5)
    session = await echo.parts.keeper.session(1)
    await until(lambda: session.in_flight == 0, "the end of the last call")
    await until(lambda: len(world.audit("echo", event="outcome")) == len(echo.ran), "every outcome")
    assert len(echo.ran) == len(world.audit("echo", event="admission")) >= load.ended["ok"]
    reasons = {one["reason"].partition(":")[0] for one in world.refusals("echo")}
    assert reasons == {"the policy gave no answer"}


async def test_a_slow_server_holds_up_nobody_who_need_not_ask_it(world, cli, players):
    first = players[0]
    first.standing_packages = ("agentweave/grants",)
    echo = await world.agent(ECHO, **asks(first))
    await echo.parts.authorizer.reload()
    await cli.ask(ECHO, "say", {"text": "this answer stands"})
    with first.playing(silence):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(denial, cli, "work")
            await until(lambda: len(first.questions()) >= 5, "questions that hang")
            await cli.ask(ECHO, "say", {"text": "x"})
            assert world.refusals("echo") == []  # the others still wait, for twice the time
    assert echo.ran == ["say", "say"]
    assert len(world.refusals("echo")) == 3
