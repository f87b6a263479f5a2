"""Attack: requests to JetStream that would read, empty, change or redirect a stream of claims."""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import api_inbox, call_subject, claim_subject, reply_inbox
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

STREAM = claim_stream_name(ECHO)
TOKEN = "A" * 22
INBOX = f"{api_inbox(ECHO, TOKEN)}.x"
WIDENED = {**claim_stream(ECHO).config, "deny_delete": False, "deny_purge": False}


def consumer(deliver):
    return {"stream_name": STREAM, "config": {"deliver_subject": deliver, "ack_policy": "none"}}


REQUESTS = {
    "account": ("INFO", {}),
    "names": ("STREAM.NAMES", {}),
    "list": ("STREAM.LIST", {}),
    "another's stream": (f"STREAM.INFO.{claim_stream_name(FRONT)}", {}),
    "create": ("STREAM.CREATE.tap", {"name": "tap", "subjects": ["aw.call.>"]}),
    "create over it": (f"STREAM.CREATE.{STREAM}", WIDENED),
    "update": (f"STREAM.UPDATE.{STREAM}", WIDENED),
    "delete": (f"STREAM.DELETE.{STREAM}", {}),
    "purge": (f"STREAM.PURGE.{STREAM}", {}),
    "purge one": (f"STREAM.PURGE.{STREAM}", {"filter": claim_subject(ECHO, "a" * 64)}),
    "delete one": (f"STREAM.MSG.DELETE.{STREAM}", {"seq": 1}),
    "read": (f"STREAM.MSG.GET.{STREAM}", {"seq": 1}),
    "read directly": (f"DIRECT.GET.{STREAM}", {"seq": 1}),
    "snapshot": (f"STREAM.SNAPSHOT.{STREAM}", {"deliver_subject": INBOX}),
    "restore": (f"STREAM.RESTORE.{STREAM}", {"config": WIDENED, "state": {}}),
    "step down": (f"STREAM.LEADER.STEPDOWN.{STREAM}", {}),
    "consumer to a colleague": (f"CONSUMER.CREATE.{STREAM}", consumer(f"{reply_inbox(FRONT, TOKEN)}.x")),
    "consumer to a call": (f"CONSUMER.CREATE.{STREAM}.c", consumer(call_subject(ECHO, "work"))),
    "durable consumer": (f"CONSUMER.DURABLE.CREATE.{STREAM}.c", consumer(INBOX)),
    "delete a consumer": (f"CONSUMER.DELETE.{STREAM}.c", {}),
    "pull": (f"CONSUMER.MSG.NEXT.{STREAM}.c", {"batch": 1}),
}


async def configuration(mallory):
    """The stream as it stands, but for the moment at which it was asked about."""
    heard = await mallory.listen("probe.info")
    await mallory.send(f"$JS.API.STREAM.INFO.{STREAM}", b"", "probe.info")
    info = json.loads((await heard_within(heard)).data)
    return info["config"], info["state"], info["created"]


@pytest.fixture(scope="module")
async def agents(session_world):
    """Connections of identities with nothing but their own permissions."""
    raws = {one: await session_world.raw(one) for one in (ECHO, CLI, OTHER)}
    yield raws, await session_world.raw()
    await session_world.clear()


@refused_by(
    Layer.PERMISSIONS,
    "a request to JetStream that reads, empties, changes or taps a stream",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("name", list(REQUESTS))
async def test_by_an_agent(agents, name):
    """Neither by a stranger to the stream, nor by its caller, nor by the agent whose claims it holds."""
    raws, mallory = agents
    verb, body = REQUESTS[name]
    before = await configuration(mallory)
    for who, raw in raws.items():
        reply = f"{api_inbox(who, TOKEN)}.x"
        said = await raw.denied(raw.client.publish(f"$JS.API.{verb}", json.dumps(body).encode(), reply))
        assert f"$js.api.{verb.lower()}" in said
    assert await configuration(mallory) == before


@refused_by(Layer.STREAM, "emptying a stream of claims by JetStream's own requests", by=Adversary.BROKER)
@pytest.mark.parametrize("name", ["purge", "purge one", "delete one", "update", "create over it", "restore"])
async def test_by_who_owns_the_broker(agents, name):
    """He can remove the whole stream, which shows (test_replay_new_claims.py), but not what is in it."""
    _, mallory = agents
    stored = await mallory.listen("probe.stored")
    await mallory.send(claim_subject(ECHO, "a" * 64), b"x" * 32, "probe.stored")
    await heard_within(stored)  # stored now, or before
    before = await configuration(mallory)
    assert before[1]["messages"] > 0
    verb, body = REQUESTS[name]
    answers = await mallory.listen("probe.answer")
    await mallory.send(f"$JS.API.{verb}", json.dumps(body).encode(), "probe.answer")
    assert "error" in json.loads((await heard_within(answers)).data)
    assert await configuration(mallory) == before


@refused_by(
    Layer.PERMISSIONS, "reaching JetStream by a reply subject that a colleague answers to", by=Adversary.AGENT
)
@pytest.mark.parametrize(
    "subject",
    [
        f"$JS.API.STREAM.DELETE.{STREAM}",
        "$JS.API.STREAM.CREATE.tap",
        call_subject(ECHO, "block"),
        claim_subject(ECHO, "7" * 64),
        f"{api_inbox(CLI, TOKEN)}.x",
    ],
    ids=["delete", "create", "call", "claim", "inbox"],
)
async def test_by_two_that_work_together(agents, session_world, subject):
    """One calls the other, as granted, and names as reply subject what neither may publish to."""
    raws, mallory = agents
    asks, answers = raws[CLI], await session_world.raw(FRONT)
    before = await configuration(mallory)
    heard = await answers.listen(call_subject(FRONT, "relay"))
    await asks.send(call_subject(FRONT, "relay"), b"x", subject)
    message = await heard_within(heard)
    assert message.reply == subject
    said = await answers.denied(answers.client.publish(message.reply, b""))
    assert subject.lower() in said
    assert await configuration(mallory) == before
