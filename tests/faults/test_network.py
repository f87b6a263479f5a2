"""The network is cut, both ways or one, is slow, or breaks off in the middle of a frame.

Callers and callees reach the broker through a proxy that plays the network.
"""

from __future__ import annotations

import time

import anyio
import pytest

from agentweave_bus.bus import connection
from agentweave_bus.exceptions import CallTimeoutError, ConnectionLostError, UnreachableError
from tests.faults.proxy import Proxy, proxied
from tests.faults.stage import answered, load
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import ABSENT, CLI, ECHO, PATIENCE
from tests.integration.world import metric

pytestmark = pytest.mark.anyio

QUICK = {"bus__connect_timeout": 0.5, "bus__reconnect_wait": 0.1}


@pytest.fixture
async def network(world):
    async with proxied(world.stack.nats.port) as proxy:
        yield proxy
        proxy.let_go()


@pytest.fixture
async def far(world, network):
    """A caller behind the proxy that notices within half a second that nobody answers its pings."""
    with replaced(connection, "_PING_SECONDS", 0.1), replaced(connection, "_CLOSE_SECONDS", 0.2):
        yield await world.client(CLI, bus__servers=[network.url], **QUICK)


async def lost(caller, name, payload=None, **options):
    with pytest.raises(ConnectionLostError, match="the work may have been done"):
        await caller.call(str(ECHO), name, payload, timeout=PATIENCE, **options)


WAYS = {
    "both": lambda network: network.ways,
    "to the broker": lambda network: (network.up,),
    "from the broker": lambda network: (network.down,),
}


@pytest.mark.parametrize(
    "which", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in list(WAYS)[1:])]
)
async def test_a_partitioned_caller_is_told_and_recovers_when_it_heals(which, echo, network, far):
    assert await answered(far) == {"said": "there?"}
    reconnects = metric(far.parts, "agentweave_bus_reconnects_total")
    async with anyio.create_task_group() as group:
        group.start_soon(lost, far, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        for way in WAYS[which](network):
            way.hold()
    assert not far.parts.keeper.connected
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="not connected to the broker"):
        await far.call(str(ECHO), "work", {"text": "x"}, timeout=0.3)
    assert time.monotonic() - began < 20
    echo.gate.set()
    network.let_go()
    assert await answered(far) == {"said": "there?"}
    assert metric(far.parts, "agentweave_bus_reconnects_total") == reconnects + 1
    assert echo.ran == ["say", "wait", "say"]


async def test_a_call_whose_answer_is_cut_off_has_run_once_and_is_not_made_again(echo, network, far):
    network.down.hold()
    await lost(far, "work", {"text": "x"})
    network.let_go()
    await answered(far)
    assert echo.ran == ["work", "say"]


async def test_a_call_that_a_partition_held_back_does_not_run_after_its_deadline(world, echo, network):
    """Its bytes arrive when the partition heals, on the connection that was never given up."""
    far = await world.client(CLI, bus__servers=[network.url])  # with pings that wait longer than this test
    await answered(far)
    network.up.hold()
    with pytest.raises(CallTimeoutError, match="no answer"):
        await far.call(str(ECHO), "work", {"text": "late"}, timeout=1.0)
    before = len(world.refusals("echo", step_name="time"))
    network.let_go()
    late = await world.refusal("echo", after=before, step_name="time")
    assert "expired" in late["reason"]
    assert await answered(far) == {"said": "there?"}
    assert echo.ran == ["say", "say"]


async def test_a_partitioned_callee_serves_again_when_it_heals(world, cli, network):
    """Nobody is told that it is gone, so its callers wait to their deadlines; then it is there as before."""
    with replaced(connection, "_PING_SECONDS", 0.1), replaced(connection, "_CLOSE_SECONDS", 0.2):
        agent = await world.agent(ABSENT, bus__servers=[network.url], **QUICK)
        await answered(cli, ABSENT)
        network.hold()
        with pytest.raises(CallTimeoutError):
            await cli.call(str(ABSENT), "work", {"text": "lost"}, timeout=0.3)
        await until(lambda: not agent.parts.keeper.connected, "noticing")
        network.let_go()
        await until(lambda: agent.parts.keeper.connected, "coming back")
        await answered(cli, ABSENT, timeout=1)
        for number in range(20):
            assert await cli.ask(ABSENT, "work", {"text": str(number)}) == {"worked": str(number)}
    assert agent.ran.count("work") == 20  # what was lost did not run later


@pytest.mark.slow
async def test_a_slow_link_is_slow_and_nothing_else(world, echo, network):
    far = await world.client(CLI, bus__servers=[network.url])
    reconnects = metric(far.parts, "agentweave_bus_reconnects_total")
    for way in network.ways:
        way.delay_s, way.bytes_per_s = 0.02, 1_000_000
    began = time.monotonic()
    assert await far.ask(ECHO, "work", {"text": "x" * 100_000}) == {"worked": "x" * 100_000}
    assert time.monotonic() - began > 0.2  # the bytes took their time
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(far.ask, ECHO, "say", {"text": str(number)})
    assert metric(far.parts, "agentweave_bus_reconnects_total") == reconnects
    for reason in ("late", "duplicate", "forged"):
        assert far.dropped(reason) == 0


async def test_a_request_that_breaks_off_in_the_middle_never_runs(echo, network, far):
    network.up.cut_after = 50_000
    await lost(far, "work", {"text": "x" * 300_000})
    assert await answered(far) == {"said": "there?"}
    assert echo.ran == ["say"]


async def test_an_answer_that_breaks_off_in_the_middle_is_no_answer(echo, network, far):
    network.down.cut_after = 50_000
    await lost(far, "huge", {"size": 300_000})
    assert await answered(far) == {"said": "there?"}


async def test_a_safe_call_is_made_again_when_its_answer_breaks_off(echo, network, far):
    text = "x" * 300_000
    network.down.cut_after = 50_000
    assert await far.ask(ECHO, "say", {"text": text}, safe=True) == {"said": text}
    assert echo.ran == ["say", "say"]


@pytest.mark.slow
async def test_a_link_that_breaks_again_and_again_under_load_loses_nothing_for_good(
    echo, network: Proxy, far
):
    async with load(far, at_once=8) as busy:
        for _ in range(5):
            await busy.more(10)
            network.down.cut_after = 5_000
            await until(lambda: network.down.cut_after is None, "the next cut")
        await busy.more(20)
    assert {type(one) for one in busy.failures} <= {ConnectionLostError}
    assert len(echo.ran) <= len(busy.good) + len(busy.failures)
