"""Attack: publishing where one has no business to: others' calls, answers, claims and the broker's own API."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.bus.subjects import (
    Family,
    agent_prefix,
    api_inbox,
    call_subject,
    claim_subject,
    reply_inbox,
)
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

TOKEN = "A" * 22
KEY = "0" * 64

NOBODY = [
    "$JS.API.INFO",
    "$JS.ACK.x.y.1.1.1.1.1",
    f"$JS.ACK.x.y.{tasks_stream_name(CLI)}.1.1.1.1",
    f"$JS.ACK.x.y.{tasks_stream_name(ECHO)}.1.1.1.1",
    "$KV.x.y",
    "$O.x.C.y",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.USER.INFO",
    "_INBOX.x",
    "aw.dead.demo=test.agent/front.x",
    "aw.control.demo=test.agent/echo.x",
    "aw.control.demo=test.agent/front.announce",
    "aw.event.demo=test.agent/echo.x",
    "aw.park.demo=test.agent/front.block",
    "aw.task.demo=test.agent/front.block",
    "elsewhere",
]

CALLS = {
    "a client without grants": (OTHER, ECHO, "say"),
    "an agent, its own caller": (ECHO, CLI, "work"),
    "an agent, a colleague": (ECHO, FRONT, "relay"),
    "another capability than granted": (FRONT, ECHO, "block"),
    "another agent than granted": (MIDDLE, FRONT, "relay"),
    "itself": (ECHO, ECHO, "work"),
}


@refused_by(
    Layer.PERMISSIONS, "publishing to the broker's API or to families that are not in use", by=Adversary.AGENT
)
@pytest.mark.parametrize("who", [CLI, ECHO, OTHER], ids=["cli", "echo", "other"])
async def test_what_nobody_may_publish(world, who):
    raw = await world.raw(who)
    for subject in NOBODY:
        said = await raw.denied(raw.client.publish(subject, b"x"))
        assert f'"{subject.lower()}"' in said


@refused_by(Layer.PERMISSIONS, "publishing a call that no grant covers", by=Adversary.AGENT)
@pytest.mark.parametrize("name", list(CALLS))
async def test_a_call_without_a_grant(world, mallory, name):
    """With a frame that is signed and honest in all else: it does not leave the broker."""
    who, callee, capability = CALLS[name]
    passed = await mallory.listen("aw.call.>")
    raw = await world.raw(who)
    subject = call_subject(callee, capability)
    call = forged_call(world.issue(who), iss=who, aud=callee, cap=capability, sub=subject)
    said = await raw.denied(raw.client.publish(subject, call.frame, reply_of(call, who)))
    assert f'"{subject.lower()}"' in said
    await mallory.flush()
    assert passed.empty()


@refused_by(
    Layer.PERMISSIONS, "publishing to the inbox of somebody whom one does not serve", by=Adversary.AGENT
)
async def test_an_inbox_of_who_never_calls(world, mallory):
    """Answers may go to callers by grant only, and to nobody's inbox for the broker's own answers."""
    heard = await mallory.listen("aw.inbox.>")
    echo, other = await world.raw(ECHO), await world.raw(OTHER)
    for raw, subject in (
        (other, f"{reply_inbox(CLI, TOKEN)}.id"),
        (other, f"{reply_inbox(ECHO, TOKEN)}.id"),
        (echo, f"{reply_inbox(OTHER, TOKEN)}.id"),
        (echo, f"{reply_inbox(CLI, TOKEN)}.id.more"),
        (echo, f"{api_inbox(CLI, TOKEN)}.x"),
        (echo, f"{api_inbox(ECHO, TOKEN)}.x"),
    ):
        said = await raw.denied(raw.client.publish(subject, b"x"))
        assert f'"{subject.lower()}"' in said
    await mallory.flush()
    assert heard.empty()
    await echo.send(f"{reply_inbox(CLI, TOKEN)}.id", b"an answer")
    assert (await heard_within(heard)).data == b"an answer"


@refused_by(Layer.PERMISSIONS, "answering on a reply subject that the sender made up", by=Adversary.CALLER)
async def test_answering_wherever_a_sender_wants(world, mallory):
    """Whoever receives a message may not thereby publish to the reply subject that it names."""
    front = await world.raw(FRONT)
    asked = await front.listen(call_subject(FRONT, "relay"))
    for reply in ("probe.reply", f"{reply_inbox(OTHER, TOKEN)}.x", call_subject(MIDDLE, "say")):
        await mallory.send(call_subject(FRONT, "relay"), b"?", reply)
        message = await heard_within(asked)
        said = await front.denied(front.client.publish(message.reply, b"!"))
        assert f'"{reply.lower()}"' in said


@refused_by(Layer.PERMISSIONS, "publishing to the claims of another agent", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [CLI, ECHO, OTHER], ids=["cli", "echo", "other"])
async def test_claims_of_others(world, who):
    raw = await world.raw(who)
    for owner in {ECHO, FRONT, CLI, OTHER} - {who}:
        for subject in (claim_subject(owner, KEY), f"{agent_prefix(Family.CLAIM, owner)}.x.y"):
            said = await raw.denied(raw.client.publish(subject, b"x"))
            assert f'"{subject.lower()}"' in said
