"""The second line: what the broker itself lets an identity do, from the same grants, also while it runs."""

from __future__ import annotations

import json

import anyio
import pytest

from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import (
    Family,
    agent_prefix,
    api_inbox,
    call_subject,
    claim_subject,
    reply_inbox,
)
from agentweave_bus.exceptions import AuthorizationError, CallTimeoutError, NoResponderError
from tests.integration.connections import heard_within, until
from tests.integration.probes import ABSENT, CLI, ECHO, FRONT, GRANTS, MIDDLE, OTHER, PATIENCE

pytestmark = pytest.mark.anyio

TOKEN = "A" * 22
KEY = "0" * 64


@pytest.mark.parametrize("who", [CLI, ECHO, OTHER], ids=["cli", "echo", "other"])
async def test_what_nobody_may_publish(world, who):
    raw = await world.raw(who)
    for subject in (
        "$JS.API.INFO",
        "$JS.API.STREAM.CREATE.x",
        f"$JS.API.STREAM.DELETE.{claim_stream_name(ECHO)}",
        f"$JS.API.STREAM.PURGE.{claim_stream_name(ECHO)}",
        f"$JS.API.STREAM.MSG.GET.{claim_stream_name(ECHO)}",
        f"$JS.API.CONSUMER.CREATE.{claim_stream_name(ECHO)}",
        f"$JS.API.STREAM.INFO.{claim_stream_name(FRONT)}",
        "$KV.x.y",
        "_INBOX.x",
        "$SYS.REQ.SERVER.PING",
        call_subject(MIDDLE, "say"),
        claim_subject(FRONT, KEY),
        f"{api_inbox(CLI, TOKEN)}.x",
        f"{reply_inbox(OTHER, TOKEN)}.x",
        f"{api_inbox(ECHO, TOKEN)}.x",
        "aw.dead.demo=test.agent/echo.x",
    ):
        said = await raw.denied(raw.client.publish(subject, b"x"))
        assert subject.lower() in said


@pytest.mark.parametrize("who", [CLI, ECHO], ids=["cli", "echo"])
async def test_what_nobody_may_hear(world, who):
    raw = await world.raw(who)
    for subject in (
        ">",
        "aw.>",
        "aw.call.>",
        "aw.inbox.>",
        f"{reply_inbox(OTHER, TOKEN)}.*",
        f"{api_inbox(OTHER, TOKEN)}.*",
        "_INBOX.>",
        "$JS.>",
        call_subject(FRONT, "relay"),
    ):
        said = await raw.denied(raw.client.subscribe(subject))
        assert subject.lower() in said


async def test_what_the_grants_give_may_be_published_and_nothing_beside(world, mallory):
    raw = await world.raw(FRONT)
    heard = await mallory.listen("aw.call.>")
    await raw.send(call_subject(ECHO, "say"), b"x")
    await heard_within(heard)
    assert raw.refused == []
    said = await raw.denied(raw.client.publish(call_subject(ECHO, "block"), b"x"))
    assert call_subject(ECHO, "block") in said
    # Answers go to inboxes of those who may ask, and to no subject that a sender happens to name.
    asked = await raw.listen(call_subject(FRONT, "relay"))
    answers = await mallory.listen("aw.inbox.>")
    await mallory.send(call_subject(FRONT, "relay"), b"?", "probe.reply")
    message = await heard_within(asked)
    await raw.denied(raw.client.publish(message.reply, b"!"))
    await raw.send(f"{reply_inbox(CLI, TOKEN)}.id", b"!")
    assert (await heard_within(answers)).data == b"!"
    await raw.denied(raw.client.publish(f"{reply_inbox(OTHER, TOKEN)}.id", b"!"))


@pytest.mark.parametrize(
    "subject",
    [
        f"$JS.API.STREAM.DELETE.{claim_stream_name(ECHO)}",
        "$JS.API.STREAM.CREATE.tap",
        call_subject(ECHO, "block"),
        f"{api_inbox(CLI, TOKEN)}.x",
    ],
)
async def test_two_that_work_together_reach_nothing_by_a_chosen_reply_subject(world, subject):
    """One calls the other, as granted, and names as reply subject what neither may publish to."""
    asks, answers = await world.raw(CLI), await world.raw(FRONT)
    heard = await answers.listen(call_subject(FRONT, "relay"))
    await asks.send(call_subject(FRONT, "relay"), b"x", subject)
    message = await heard_within(heard)
    assert message.reply == subject
    await answers.denied(answers.client.publish(message.reply, b""))


async def test_no_acknowledgement_of_the_broker_fills_the_claims_of_another(world, mallory):
    """JetStream acknowledges to any subject that a publisher names, also into somebody's claim stream."""
    other = await world.raw(OTHER)
    landed = await mallory.listen(f"{agent_prefix(Family.CLAIM, ECHO)}.*")
    before = await stored(mallory, ECHO)
    await other.send(claim_subject(OTHER, "4" * 64), b"x" * 32, claim_subject(ECHO, "5" * 64))
    await heard_within(landed)
    assert await stored(mallory, ECHO) == before
    await mallory.send(claim_subject(ECHO, "6" * 64), b"x" * 32)
    assert await stored(mallory, ECHO) == before + 1


async def stored(mallory, agent):
    heard = await mallory.listen("probe.info")
    await mallory.send(f"$JS.API.STREAM.INFO.{claim_stream_name(agent)}", b"", "probe.info")
    return json.loads((await heard_within(heard)).data)["state"]["messages"]


async def test_a_claim_can_not_be_undone_by_any_header_or_request(world, mallory):
    """Not even by somebody whom the broker lets do everything."""
    heard = await mallory.listen("probe.claims")

    async def ask(subject, data=b"x", headers=None):
        await mallory.send(subject, data, "probe.claims", headers)
        return json.loads((await heard_within(heard)).data)

    stream, subject = claim_stream_name(ECHO), claim_subject(ECHO, "1" * 64)
    first = await ask(subject)
    assert first["seq"] > 0
    assert (await ask(subject))["error"]["err_code"] in {10071, 10077}
    for headers in (
        {"Nats-Rollup": "all"},
        {"Nats-Rollup": "sub"},
        {"Nats-TTL": "1s"},
        {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": "x"},
        {"Nats-Expected-Last-Subject-Sequence": str(first["seq"])},
    ):
        assert "error" in await ask(subject, headers=headers), headers
        assert "error" in await ask(claim_subject(ECHO, "1" * 64), headers=headers)
    duplicate = {"Nats-Msg-Id": "m"}
    await ask(claim_subject(ECHO, "2" * 64), headers=duplicate)
    assert "error" in await ask(f"$JS.API.STREAM.PURGE.{stream}", b"{}")
    delete = json.dumps({"seq": first["seq"]}).encode()
    assert "error" in await ask(f"$JS.API.STREAM.MSG.DELETE.{stream}", delete)
    widened = {**claim_stream(ECHO).config, "deny_delete": False, "deny_purge": False}
    assert "error" in await ask(f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(widened).encode())
    assert (await ask(subject))["error"]["err_code"] in {10071, 10077}


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
