"""SVIDs rotate while calls are in flight, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import anyio
import pytest

from agentweave_bus.exceptions import UnreachableError
from agentweave_bus.runtime.serving import _has_svid
from tests.integration.connections import Fixed, until
from tests.integration.probes import CLI, ECHO, FRONT, PATIENCE
from tests.integration.world import metric

pytestmark = pytest.mark.anyio


async def rotated(parts, world, identity):
    """Rotate an identity and wait until its connection stands on the new SVID."""
    before = metric(parts, "agentweave_bus_reconnects_total")
    world.stack.api.rotate(identity)
    await until(
        lambda: metric(parts, "agentweave_bus_reconnects_total") > before, f"a new connection of {identity}"
    )
    return parts.source.svid


async def test_a_handler_that_runs_longer_than_the_rotation_still_answers(world, echo, cli):
    old = echo.parts.source.svid
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        new = await rotated(echo.parts, world, ECHO)
        assert new != old
        assert await cli.ask(ECHO, "say", {"text": "on the new one"})
        newer = await rotated(echo.parts, world, ECHO)
        echo.gate.set()
    assert echo.ran == ["wait", "say"]
    assert echo.svids == [new, newer]
    assert metric(echo.parts, "agentweave_svid_rotation_total") == 2
    assert metric(echo.parts, "agentweave_bus_reconnects_total") == 2  # one each, and then it rests


async def test_the_caller_rotates_while_it_waits(world, echo, cli):
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        await rotated(cli.parts, world, CLI)
        echo.gate.set()
    assert cli.dropped("late") == 0


async def test_no_answer_is_lost_while_both_sides_rotate_under_load(world, echo, cli):
    done = 0
    stop = anyio.Event()

    async def load():
        nonlocal done
        while not stop.is_set():
            assert await cli.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}
            done += 1

    async with anyio.create_task_group() as group:
        for _ in range(16):
            group.start_soon(load)
        for _ in range(3):
            await rotated(echo.parts, world, ECHO)
            await rotated(cli.parts, world, CLI)
        stop.set()
    assert len(echo.ran) == done > 0
    for reason in ("late", "duplicate", "forged"):
        assert cli.dropped(reason) == 0


async def test_a_retired_connection_is_closed_when_its_last_call_has_answered(world, echo, cli):
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        old = await echo.parts.keeper.session(1)
        await rotated(echo.parts, world, ECHO)
        assert not old.closed.is_set()
        assert not old.usable
        echo.gate.set()
    with anyio.fail_after(PATIENCE):
        await old.closed.wait()


async def test_draining_waits_for_a_call_that_a_retired_connection_brought(world, echo, cli):
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        await rotated(echo.parts, world, ECHO)
        running = world.running(echo)
        stopping = asyncio.create_task(running.stop())
        current = await echo.parts.keeper.session(1)
        await until(lambda: not current._serving, "the end of serving")
        assert not echo.stopped
        echo.gate.set()
        with anyio.fail_after(PATIENCE):
            await stopping
    assert echo.stopped


async def test_a_call_in_flight_may_call_on_while_its_agent_drains(world, echo, cli):
    front = await world.agent(FRONT)
    async with anyio.create_task_group() as group:
        answers = []

        held = anyio.Event()
        relay = front.call_agent

        async def slow_relay(*args, **kwargs):
            held.set()
            await front.gate.wait()
            return await relay(*args, **kwargs)

        front.call_agent = slow_relay

        async def ask_held():
            call = {"path": [ECHO], "name": "say", "payload": {"text": "drained"}}
            answers.append(await cli.ask(FRONT, "relay", call))

        group.start_soon(ask_held)
        with anyio.fail_after(PATIENCE):
            await held.wait()
        current = await front.parts.keeper.session(1)
        stopping = asyncio.create_task(world.running(front).stop())
        await until(lambda: not current._serving, "the end of serving")
        front.gate.set()
        with anyio.fail_after(PATIENCE):
            await stopping
    assert answers[0]["value"] == {"said": "drained"}


async def test_an_svid_that_expires_unrenewed_is_named_and_a_new_one_heals(world, echo):
    """The provider falls silent: nothing is sent with an expired SVID, and nothing has to be restarted."""
    provider = Fixed(world.issue(CLI, lifetime=timedelta(seconds=3)), world.stack.api.authority.bundle)
    cli = await world.client(CLI, provider=provider)
    await cli.ask(ECHO, "say", {"text": "still valid"})
    expires = provider.svid.expiry.timestamp()
    await until(lambda: time.time() > expires, "the SVID's end")
    with pytest.raises(UnreachableError, match=rf"the SVID of {CLI} expired at"):
        await cli.call(str(ECHO), "say", {"text": "x"}, timeout=2)
    assert echo.ran == ["say"]
    provider.replace(world.issue(CLI))
    await until(lambda: cli.parts.source._snapshot.svid == provider.svid, "the new SVID")
    await cli.ask(ECHO, "say", {"text": "healed"})


async def test_an_expired_svid_makes_the_worker_not_ready(world):
    provider = Fixed(world.issue(ECHO, lifetime=timedelta(seconds=2)), world.stack.api.authority.bundle)
    echo = await world.agent(ECHO, provider=provider)
    assert _has_svid(echo.parts.source)
    await until(lambda: not _has_svid(echo.parts.source), "the SVID's end")
