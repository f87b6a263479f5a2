"""SVIDs rotate while calls are in flight, the authority does, too, and nothing is lost."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from cryptography import x509

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from tests.faults.stage import load, rotated
from tests.integration.connections import until
from tests.integration.probes import CLI, DOMAIN, ECHO, FRONT, PATIENCE
from tests.integration.world import metric
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

DROPPED = ("late", "duplicate", "forged")


def drops(cli):
    return {reason: cli.dropped(reason) for reason in DROPPED}


async def test_a_handler_that_runs_longer_than_rotations_of_both_sides_still_answers(world, echo, cli):
    old = echo.parts.source.svid
    rotations = metric(echo.parts, "agentweave_svid_rotation_total")
    reconnects = metric(echo.parts, "agentweave_bus_reconnects_total")
    dropped = drops(cli)
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        new = await rotated(echo.parts, world, ECHO)
        assert new != old
        await rotated(cli.parts, world, CLI)
        assert await cli.ask(ECHO, "say", {"text": "on the new one"})
        newer = await rotated(echo.parts, world, ECHO)
        await rotated(cli.parts, world, CLI)
        echo.gate.set()
    assert echo.ran == ["wait", "say"]
    assert echo.svids == [new, newer]
    assert metric(echo.parts, "agentweave_svid_rotation_total") == rotations + 2
    assert metric(echo.parts, "agentweave_bus_reconnects_total") == reconnects + 2  # and then it rests
    assert drops(cli) == dropped


async def test_the_caller_rotates_while_it_waits(world, echo, cli):
    dropped = drops(cli)
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "wait")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        await rotated(cli.parts, world, CLI)
        echo.gate.set()
    assert drops(cli) == dropped


async def test_no_answer_is_lost_while_both_sides_rotate_under_load(world, echo, cli):
    dropped = drops(cli)
    async with load(cli) as busy:
        for _ in range(3):
            await busy.more(20)
            await rotated(echo.parts, world, ECHO)
            await rotated(cli.parts, world, CLI)
        for _ in range(3):  # at the same moment
            async with anyio.create_task_group() as group:
                group.start_soon(rotated, echo.parts, world, ECHO)
                group.start_soon(rotated, cli.parts, world, CLI)
        await busy.more(20)
    assert busy.failures == []
    assert len(echo.ran) == len(busy.good)
    assert drops(cli) == dropped


async def test_many_calls_are_held_through_rotations_and_every_one_is_answered(world, echo, cli):
    """They end on a connection that is two generations old."""
    answers = []

    async def ask():
        answers.append(await cli.ask(ECHO, "wait"))

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(ask)
        await until(lambda: len(echo.ran) == 100, "a hundred in flight")
        for _ in range(2):
            await rotated(cli.parts, world, CLI)
            await rotated(echo.parts, world, ECHO)
        assert answers == []
        echo.gate.set()
    assert len(answers) == len(echo.ran) == 100
    await until(lambda: not echo.parts.keeper._retiring, "the end of the retired connections")


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


async def test_the_authority_rotates_under_load_and_its_predecessor_is_dropped(world, echo, cli):
    """New root beside the old one, then new SVIDs, then no old root. No call is lost on the way."""
    api = world.stack.api
    mallory = await world.raw()
    old = world.issue(CLI)  # valid for an hour, by its own dates
    async with load(cli) as busy:
        api.authority.rotate()
        api.announce()
        await until(lambda: {roots(echo), roots(cli)} == {2}, "the new root beside the old one")
        await busy.more(20)
        api.rotate()
        await until(lambda: on_newest_root(echo, api) and on_newest_root(cli, api), "SVIDs of the new root")
        await busy.more(20)
        says = echo.ran.count("say")
        await send_call(mallory, old)
        await until(lambda: echo.ran.count("say") == says + 1, "a call of the old root, which is trusted yet")
        api.authority.retire()
        api.announce()
        await until(lambda: {roots(echo), roots(cli)} == {1}, "the end of the old root")
        await busy.more(20)
        refused = len(world.refusals("echo", step_name=Step.CHAIN.label))
        await send_call(mallory, old)
        await world.refusal("echo", after=refused, step_name=Step.CHAIN.label)
    assert busy.failures == []
    assert echo.ran.count("say") == says + 1


def roots(one):
    return len(one.parts.source.bundle_for(DOMAIN).authorities)


def on_newest_root(one, api):
    issuer = x509.load_der_x509_certificate(one.parts.source.svid.cert_chain[0]).issuer
    return issuer == api.authority.bundle.authorities[0].subject


async def send_call(raw, svid):
    call = forged_call(svid, cap="say", sub=call_subject(ECHO, "say"))
    await raw.send(call.head.sub, call.frame, reply_of(call))


async def test_an_authority_that_is_replaced_all_at_once_loses_no_call(world, echo, cli):
    """New SVIDs come before the broker knows their root: old connections serve until it does."""
    api = world.stack.api
    async with load(cli) as busy:
        api.authority.rotate()
        api.rotate()
        await until(lambda: on_newest_root(echo, api) and on_newest_root(cli, api), "SVIDs of the new root")
        await until(lambda: not (behind(echo) or behind(cli)), "connections on them")
        await busy.more(20)
        api.authority.retire()
        api.announce()
        await until(lambda: {roots(echo), roots(cli)} == {1}, "the end of the old root")
        await busy.more(20)
    assert busy.failures == []


def behind(one):
    return one.parts.keeper._rotated.is_set() or one.parts.keeper._retiring
