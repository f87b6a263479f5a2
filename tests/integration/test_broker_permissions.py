"""The second line: what the broker lets an identity do, from the same grants, also while it runs.

What it keeps from agents that try more: tests/security/broker.
"""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.bus.streams import state_stream_name
from agentweave_bus.bus.subjects import (
    call_subject,
    control_subject,
    record_subject,
    reply_inbox,
    task_subject,
)
from agentweave_bus.exceptions import AuthorizationError, CallTimeoutError, NoResponderError
from tests.integration.connections import heard_within, until
from tests.integration.probes import ABSENT, CLI, ECHO, FRONT, GRANTS, OTHER, PATIENCE

pytestmark = pytest.mark.anyio


async def test_what_the_grants_give_may_be_published_and_nothing_beside(world, mallory):
    raw = await world.raw(FRONT)
    heard = await mallory.listen(call_subject(ECHO, "say"))
    await raw.send(call_subject(ECHO, "say"), b"x")
    await heard_within(heard)
    assert raw.refused == []
    said = await raw.denied(raw.client.publish(call_subject(ECHO, "block"), b"x"))
    assert call_subject(ECHO, "block") in said
    asked = f"{reply_inbox(CLI, 'A' * 22)}.id"
    answers = await mallory.listen(asked)
    await raw.send(asked, b"!")
    assert (await heard_within(answers)).data == b"!"
    assert len(raw.refused) == 1


async def test_the_broker_alone_stops_what_only_the_caller_would_let_pass(world, echo, tmp_path):
    """A caller with generous grants of its own: the broker has others."""
    generous = tmp_path / "grants.yaml"
    generous.write_text(
        f'grants: [{{caller: "{OTHER}", callee: ["{ECHO}", "{ABSENT}"], capabilities: ["*"]}}]\n'
    )
    other = await world.client(OTHER, authorization__bundle=str(generous))
    for callee in (ECHO, ABSENT):
        with pytest.raises(
            AuthorizationError, match="broker does not let this identity call 'say'"
        ) as denial:
            await other.call(str(callee), "say", {"text": "x"}, timeout=PATIENCE)
        assert denial.value.direction == "broker"


async def test_a_grant_is_given_and_taken_at_policy_and_broker_without_a_restart(world, echo):
    other, raw = await world.client(OTHER), await world.raw(OTHER)
    await raw.denied(raw.client.publish(call_subject(ECHO, "say"), b"x"))
    with pytest.raises(AuthorizationError):
        await other.call(str(ECHO), "say", {"text": "x"})
    given = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"]}
    try:
        world.grant({"grants": [*GRANTS["grants"], given]})
        with anyio.fail_after(PATIENCE):
            while True:
                try:
                    assert await other.ask(ECHO, "say", {"text": "granted"}) == {"said": "granted"}
                    break
                except (AuthorizationError, NoResponderError):
                    await anyio.sleep(0.05)
    finally:
        world.grant(GRANTS)
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                await other.call(str(ECHO), "say", {"text": "x"}, timeout=1)
            except AuthorizationError as error:
                if "no grant" in error.reason:
                    break
            except CallTimeoutError:
                pass  # sent before the broker took the right to answer, answered after
            await anyio.sleep(0.05)
    await broker_lets(world, OTHER, False)


async def test_a_grant_of_tasks_is_one_to_submit_cancel_and_read_and_none_to_call(world):
    given = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"], "kinds": ["task"]}
    record = record_subject(ECHO, OTHER, "0d" * 32, 0)
    submitting = [
        control_subject(ECHO, "cancel"),
        f"$JS.API.DIRECT.GET.{state_stream_name(ECHO)}.{record}",
        task_subject(ECHO, "say"),
    ]
    beside = [
        call_subject(ECHO, "say"),
        control_subject(ECHO, "approve"),
        record,
        task_subject(ECHO, "block"),
    ]
    assert await refused(world, [*submitting, *beside]) == {*submitting, *beside}
    try:
        world.grant({"grants": [*GRANTS["grants"], given]})
        await world.stack.in_line()
        assert await refused(world, [*submitting, *beside]) == {*beside}
    finally:
        world.grant(GRANTS)
        await world.stack.in_line()
    assert await refused(world, submitting) == {*submitting}


async def refused(world, subjects):
    """Those of ``subjects`` to which the broker does not let OTHER publish."""
    raw = await world.raw(OTHER)
    for subject in subjects:
        await raw.send(subject, b"x")
    said = "\n".join(raw.refused)
    return {one for one in subjects if f'"{one.lower()}"' in said}


@pytest.mark.slow  # a broker is stopped and started
async def test_a_grant_that_is_taken_while_the_broker_is_down_is_taken_when_it_is_back(world):
    given = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"]}
    try:
        world.grant({"grants": [*GRANTS["grants"], given]})
        await broker_lets(world, OTHER, True)
        await world.stack.nats.kill()
    finally:
        world.grant(GRANTS)
    await anyio.sleep(1.5)  # longer than the stack's poll: it has seen the change and could tell nobody
    await world.stack.nats.start()
    await broker_lets(world, OTHER, False)


async def broker_lets(world, who, wanted):
    with anyio.fail_after(PATIENCE):
        while True:
            raw = await world.raw(who)
            await raw.send(call_subject(ECHO, "say"), b"x")
            if (raw.refused == []) is wanted:
                return
            await anyio.sleep(0.1)


async def test_a_reload_of_the_broker_costs_no_answer(world, echo, cli):
    """Grants change, and certificates are renewed, while handlers run."""
    more = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"]}
    answers = []

    async def ask():
        answers.append(await cli.ask(ECHO, "wait"))

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: echo.ran == ["wait"], "the handler")
            world.grant({"grants": [*GRANTS["grants"], more]})
            await broker_lets(world, OTHER, True)
            echo.gate.set()
    finally:
        world.grant(GRANTS)
    assert len(answers) == 1
