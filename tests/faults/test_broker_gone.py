"""The broker is killed or paused, and comes back. Nothing stays deaf, and no failure is unclear."""

from __future__ import annotations

import os
import signal
import time

import anyio
import pytest

from agentweave_bus.bus import connection
from agentweave_bus.exceptions import CallTimeoutError, ConnectionLostError, UnreachableError
from agentweave_bus.types import TaskState
from tests.faults.stage import answered, everyone_connected, load, rotated
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.processes import worker_process
from tests.integration.world import metric

pytestmark = pytest.mark.anyio


async def test_a_call_in_flight_fails_clearly_and_later_ones_work(world, echo, cli):
    async with anyio.create_task_group() as group:

        async def ask():
            with pytest.raises(ConnectionLostError, match="the work may have been done"):
                await cli.call(str(ECHO), "wait", timeout=PATIENCE)

        group.start_soon(ask)
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        await world.stack.nats.kill()
    echo.gate.set()
    await world.stack.nats.start()
    await everyone_connected(echo.parts, cli.parts)
    assert await cli.ask(ECHO, "work", {"text": "again"}) == {"worked": "again"}


async def test_an_agent_that_is_told_to_stop_while_its_broker_is_away_ends_at_once(world, echo):
    """Nobody waits for a connection by then; else it would take its whole time for draining, 30 s."""
    await world.stack.nats.kill()
    await until(lambda: not echo.parts.keeper.connected, "the loss of the connection")
    began = time.monotonic()
    await world.running(echo).stop()
    assert time.monotonic() - began < 15
    await world.stack.nats.start()


async def test_a_safe_call_in_flight_is_made_again_with_the_same_id(world, echo, cli):
    answers, before = [], len(world.audit("cli", event="call", cap="wait_safe"))
    async with anyio.create_task_group() as group:

        async def ask():
            answers.append(await cli.ask(ECHO, "wait_safe", safe=True))

        group.start_soon(ask)
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        await world.stack.nats.kill()
        await world.stack.nats.start()
        await until(lambda: len(echo.ran) >= 2, "the second attempt")
        echo.gate.set()
    assert answers == [{"waited": True}]
    sent = world.audit("cli", event="call", cap="wait_safe")[before:]
    assert len({one["id"] for one in sent}) == 1
    # At least: an attempt may come before the agent is connected again, and then reaches nobody.
    assert len({one["digest"] for one in sent}) == len(sent) >= 2


async def test_calls_made_while_the_broker_is_away_wait_for_it(world, echo, cli):
    await world.stack.nats.kill()
    answers = []
    async with anyio.create_task_group() as group:

        async def ask():
            answers.append(await cli.ask(ECHO, "work", {"text": "patient"}))

        await until(lambda: not cli.parts.keeper.connected, "noticing")
        group.start_soon(ask)
        await world.stack.nats.start()
    assert answers == [{"worked": "patient"}]
    assert echo.ran == ["work"]


async def test_without_a_broker_a_call_says_so_and_the_callees_breaker_stays_closed(world, echo, cli):
    await world.stack.nats.kill()
    await until(lambda: not cli.parts.keeper.connected, "noticing")
    for _ in range(6):  # one more than opens a breaker
        with pytest.raises(UnreachableError, match=r"not connected to the broker at tls://127\.0\.0\.1"):
            await cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.05)
    await world.stack.nats.start()
    assert await cli.ask(ECHO, "work", {"text": "at once"}) == {"worked": "at once"}


async def test_a_call_made_while_its_callee_restarts_is_taken_by_the_next_one(world, echo, cli):
    await cli.ask(ECHO, "say", {"text": "before"})
    await world.running(echo).crash()
    answers = []
    async with anyio.create_task_group() as group:

        async def ask():
            answers.append(await cli.ask(ECHO, "work", {"text": "patient"}))

        before = len(world.audit("cli", event="call", cap="work"))
        group.start_soon(ask)
        await until(
            lambda: len(world.audit("cli", event="call", cap="work")) > before + 3, "attempts at nobody"
        )
        again = await world.agent(ECHO)
    assert answers == [{"worked": "patient"}]
    assert again.ran == ["work"]


async def test_killed_several_times_under_load_nothing_stays_deaf(world, echo, cli):
    both = [echo.parts, cli.parts]
    before = [metric(one, "agentweave_bus_reconnects_total") for one in both]
    async with load(cli, at_once=32) as busy:
        for _ in range(4):
            await busy.more(50)
            await world.stack.nats.kill()
            await world.stack.nats.start()
        await busy.more(200)
    assert {type(one) for one in busy.failures} <= {ConnectionLostError}
    assert [
        metric(one, "agentweave_bus_reconnects_total") - old for one, old in zip(both, before, strict=True)
    ] == [4, 4]
    assert len(echo.ran) <= len(busy.good) + len(busy.failures)  # nothing ran twice


async def test_what_a_worker_ends_that_stops_is_on_record_although_the_broker_was_away(world, echo, cli):
    handle = await cli.client.submit(str(ECHO), "wait", {})
    with anyio.fail_after(PATIENCE):
        await echo.entered.wait()
    running, lost = world.running(echo), await echo.parts.keeper.session(1)
    async with anyio.create_task_group() as group:
        group.start_soon(running.stop)
        await until(lambda: not lost._serving, "the end of serving")
        await world.stack.nats.kill()
        await world.stack.nats.start()
        await until(lambda: lost.closed.is_set() and echo.parts.keeper.connected, "another connection")
        echo.gate.set()
    assert (await handle.status()).state is TaskState.COMPLETED


async def test_a_broker_that_pauses_costs_the_calls_meanwhile_and_nothing_else(world, echo, cli):
    """Shorter than pings take to notice: calls end at their deadlines, and what comes late does not run."""
    connections = [await one.parts.keeper.session(1) for one in (echo, cli)]
    os.kill(world.stack.nats.pid, signal.SIGSTOP)
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(CallTimeoutError, match=r"no answer from .*; the work may have been done"):
            await cli.call(str(ECHO), "work", {"text": "into silence"}, timeout=0.1)
        assert time.monotonic() - began < 20
    before = len(world.refusals("echo", step_name="time"))
    os.kill(world.stack.nats.pid, signal.SIGCONT)
    assert await cli.ask(ECHO, "work", {"text": "later"}) == {"worked": "later"}
    assert echo.ran == ["work"]
    await until(lambda: len(world.refusals("echo", step_name="time")) == before + 3, "three refusals")
    late = world.refusals("echo", step_name="time")[before:]
    assert all("expired" in one["reason"] for one in late)
    assert [await one.parts.keeper.session(1) for one in (echo, cli)] == connections


async def test_a_broker_that_falls_silent_is_left_and_found_again(world, echo, cli):
    """Its process is stopped, so connections stay open and nothing answers on them."""
    with (
        replaced(connection, "_PING_SECONDS", 0.2),
        replaced(connection, "_CLOSE_SECONDS", 0.3),
    ):
        # A rotation makes new connections, with the short ping interval.
        await rotated(echo.parts, world, ECHO)
        await rotated(cli.parts, world, CLI)
        for _ in range(2):
            os.kill(world.stack.nats.pid, signal.SIGSTOP)
            try:
                # Much to write, so that bytes are stuck in the connection when it is closed.
                async with anyio.create_task_group() as group:
                    for _ in range(12):
                        group.start_soon(fails_clearly, cli, "x" * 700_000)
                    group.start_soon(fails_clearly, cli, "into silence")
                await until(
                    lambda: not cli.parts.keeper.connected and not echo.parts.keeper.connected, "leaving"
                )
            finally:
                os.kill(world.stack.nats.pid, signal.SIGCONT)
            await everyone_connected(echo.parts, cli.parts)
            assert await cli.ask(ECHO, "say", {"text": "back"}) == {"said": "back"}


async def fails_clearly(cli, text):
    with pytest.raises(ConnectionLostError):
        await cli.call(str(ECHO), "work", {"text": text}, timeout=PATIENCE)


@pytest.mark.slow
async def test_a_worker_process_survives_the_broker(world, cli):
    async with worker_process(world, ECHO) as worker:
        assert await cli.ask(ECHO, "work", {"text": "1"})
        for _ in range(2):
            await world.stack.nats.kill()
            await world.stack.nats.start()
            # The client may be back before the worker: its calls find nobody for a moment.
            await answered(cli, safe=True)
        worker.process.terminate()
        assert await worker.wait() == 0


async def test_what_was_claimed_before_a_broker_restart_is_claimed_after_it(world, echo, cli, mallory):
    before = len(world.refusals("echo", step_name="replay"))
    heard = await mallory.listen("aw.call.>")
    await cli.ask(ECHO, "work", {"text": "once"})
    frame = heard.get_nowait()
    await world.stack.nats.kill()
    await world.stack.nats.start()
    # Another process than the one that admitted it, so that only the claim can know.
    await world.running(echo).crash()
    again = await world.agent(ECHO)
    other = await world.raw()
    await other.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("echo", after=before, step_name="replay")
    assert refusal["reason"] == "this id is claimed already"
    assert again.ran == []
