"""Attack: subscribing to what is meant for others."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.responder import QUEUE_GROUP
from agentweave_bus.bus.subjects import Family, agent_prefix, api_inbox, call_subject, reply_inbox
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

TOKEN = "A" * 22
WILDCARDS = (
    ">",
    "*.>",
    "aw.>",
    "aw.*.>",
    "aw.call.>",
    "aw.call.*.*.*",
    "aw.*.demo=test.agent/echo.work",
    "aw.inbox.>",
    "aw.inbox.*.*.*.rpc.*",
    "aw.claim.>",
    "_INBOX.>",
    "$JS.>",
    "$JS.API.>",
    "$SYS.>",
    "$KV.>",
)


def others(who):
    """What belongs to somebody else than ``who``, spelled out."""
    for one in {ECHO, FRONT, CLI, OTHER} - {who}:
        yield call_subject(one, "work")
        yield f"{agent_prefix(Family.CALL, one)}.*"
        yield f"{agent_prefix(Family.CALL, one)}.>"
        yield f"{agent_prefix(Family.CLAIM, one)}.*"
        yield f"{agent_prefix(Family.INBOX, one)}.>"
        yield f"{api_inbox(one, TOKEN)}.*"
        yield f"{api_inbox(one, '*')}.*"
        yield f"{reply_inbox(one, TOKEN)}.*"
        yield f"{reply_inbox(one, '*')}.*"


@refused_by(
    Layer.PERMISSIONS, "subscribing to others' calls, inboxes or claims, or to wildcards", by=Adversary.AGENT
)
@pytest.mark.parametrize("who", [CLI, ECHO, FRONT, OTHER], ids=["cli", "echo", "front", "other"])
async def test_subscribing(world, who):
    raw = await world.raw(who)
    for subject in (*WILDCARDS, *others(who), f"{agent_prefix(Family.CLAIM, who)}.*"):
        said = await raw.denied(raw.client.subscribe(subject))
        assert f'"{subject.lower()}"' in said


@refused_by(
    Layer.PERMISSIONS, "joining the queue group of an agent's replicas to take its calls", by=Adversary.AGENT
)
@pytest.mark.parametrize("who", [FRONT, OTHER, CLI], ids=["front", "other", "its caller"])
async def test_taking_calls_in_a_queue_group(world, echo, cli, who):
    raw = await world.raw(who)
    taken = []

    async def take(message):
        taken.append(message)

    for queue in (QUEUE_GROUP, "another"):
        await raw.denied(raw.client.subscribe(call_subject(ECHO, "work"), queue=queue, cb=take))
    for number in range(10):
        assert await cli.ask(ECHO, "work", {"text": str(number)}) == {"worked": str(number)}
    await raw.flush()
    assert taken == []
    assert echo.ran == ["work"] * 10


@refused_by(
    Layer.PERMISSIONS,
    "listening at the inbox of one's own caller, whose token every call shows",
    by=Adversary.AGENT,
)
async def test_a_callee_at_its_callers_inbox(world, cli, mallory):
    """Who is called learns where the answer goes, and so where the caller's other answers do."""
    middle = await world.raw(MIDDLE)
    heard = await middle.listen(call_subject(MIDDLE, "relay"))
    await world.agent(ECHO)
    asked = await mallory.listen(call_subject(ECHO, "work"))
    await cli.ask(ECHO, "work", {"text": "secret"})
    token = (await heard_within(asked)).reply.split(".")[4]
    await mallory.send(call_subject(MIDDLE, "relay"), b"x", f"{reply_inbox(CLI, token)}.id")
    shown = (await heard_within(heard)).reply
    for subject in (shown, shown.rpartition(".")[0] + ".*", f"{api_inbox(CLI, token)}.*"):
        said = await middle.denied(middle.client.subscribe(subject))
        assert subject.lower() in said
