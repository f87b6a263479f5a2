"""The broker dies, comes back, or falls silent. Nothing stays deaf, and no failure is unclear."""

from __future__ import annotations

import os
import signal

import anyio
import pytest

from agentweave_bus.bus import connection
from agentweave_bus.exceptions import CallTimeoutError, ConnectionLostError, UnreachableError
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import ECHO, PATIENCE, data_of
from tests.integration.processes import worker_process
from tests.integration.world import metric

pytestmark = pytest.mark.anyio

CLEAR = (CallTimeoutError, UnreachableError)


async def everyone_connected(*parts):
    await until(lambda: all(one.keeper.connected for one in parts), "reconnecting")


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


async def test_a_safe_call_in_flight_is_made_again_with_the_same_id(world, echo, cli):
    answers = []
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
    sent = world.audit("cli", event="call", cap="wait_safe")
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

        group.start_soon(ask)
        await until(lambda: len(world.audit("cli", event="call", cap="work")) > 3, "attempts at nobody")
        again = await world.agent(ECHO)
    assert answers == [{"worked": "patient"}]
    assert again.ran == ["work"]


async def test_killed_several_times_under_load_nothing_stays_deaf(world, echo, cli):
    stop = anyio.Event()
    good, failures = [], []

    async def load(number):
        while not stop.is_set():
            text = f"{number}-{len(good)}-{len(failures)}"
            try:
                result = await cli.call(str(ECHO), "work", {"text": text}, timeout=PATIENCE)
            except CLEAR as error:
                failures.append(error)
            else:
                assert data_of(result) == {"worked": text}
                good.append(text)

    async with anyio.create_task_group() as group:
        for number in range(32):
            group.start_soon(load, number)
        for _ in range(4):
            before = len(good)
            await until(lambda before=before: len(good) > before + 50, "calls that work")
            await world.stack.nats.kill()
            await world.stack.nats.start()
        before = len(good)
        await until(lambda: len(good) > before + 200, "calls that work after the last time")
        stop.set()
    assert {type(one) for one in failures} <= {ConnectionLostError}
    assert metric(echo.parts, "agentweave_bus_reconnects_total") == 4
    assert metric(cli.parts, "agentweave_bus_reconnects_total") == 4
    assert len(echo.ran) <= len(good) + len(failures)  # nothing ran twice


async def test_a_broker_that_falls_silent_is_left_and_found_again(world, echo, cli):
    """Its process is stopped, so connections stay open and nothing answers on them."""
    with (
        replaced(connection, "_PING_SECONDS", 0.2),
        replaced(connection, "_CLOSE_SECONDS", 0.3),
    ):
        # A rotation makes new connections, with the short ping interval.
        from tests.integration.probes import CLI
        from tests.integration.test_rotation import rotated

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


async def test_a_worker_process_survives_the_broker(world, cli):
    async with worker_process(world, ECHO) as worker:
        assert await cli.ask(ECHO, "work", {"text": "1"})
        for _ in range(2):
            await world.stack.nats.kill()
            await world.stack.nats.start()
            # The client may be back before the worker: its calls find nobody for a moment.
            await until_answered(cli)
        worker.process.terminate()
        assert await worker.wait() == 0


async def until_answered(cli):
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return await cli.ask(ECHO, "say", {"text": "there?"}, safe=True)
            except CLEAR:
                await anyio.sleep(0.05)


async def test_what_was_claimed_before_a_broker_restart_is_claimed_after_it(world, echo, cli, mallory):
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
    refusal = await world.refusal("echo", step_name="replay")
    assert refusal["reason"] == "this id is claimed already"
    assert again.ran == []
