"""Attack: announcements that the control role must not believe, and that would have it make something.

Each of them asks for a capability that nobody else asks for. An honest announcement follows on the same
connection; when its consumer is there, all before it has been decided on.
"""

from __future__ import annotations

import pytest

from agentweave_bus.bus.streams import MAX_CONSUMERS, task_consumer, tasks_stream_name
from agentweave_bus.bus.subjects import announce_subject, control_subject
from agentweave_bus.envelope import Kind, Sealer, control_role, encode_payload
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing import TrustDomain
from tests.integration.announcing import CONTROL, announce, announcement, asked, consumer_info, served
from tests.integration.probes import DOMAIN, ECHO, FRONT, MALLORY, MIDDLE
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, with_part

pytestmark = pytest.mark.anyio

UNWANTED = "unwanted"


def forged(svid, agent=ECHO, *, names=(UNWANTED,), payload=None, **changes):
    """An announcement of ``agent`` that is honest but for ``changes``, signed with ``svid``."""
    values = {"kind": Kind.CONTROL, "aud": CONTROL, "cap": "announce", "sub": announce_subject(agent)}
    body = encode_payload({"capabilities": list(names)}) if payload is None else payload
    return forged_call(svid, iss=agent, payload=body, **{"reply": None, **values, **changes}).frame


def others(world):
    """Frames by name, each on echo's subject, and what they are signed with."""
    mine, theirs = world.issue(ECHO), world.issue(FRONT)
    now = clock_ms()
    return {
        "by another agent": forged(theirs, FRONT, sub=announce_subject(ECHO)),
        "by another agent, on its own subject by its head": forged(theirs, FRONT),
        "in the name of another": forged(theirs),
        "by another authority": forged(TrustDomain(DOMAIN).issue(ECHO)),
        "by another domain": forged(
            TrustDomain("evil.test").issue("agent/echo"), SpiffeID("spiffe://evil.test/agent/echo")
        ),
        "altered": with_part(
            forged(mine, names=("honest",)), "payload", lambda _: encode_payload({"capabilities": [UNWANTED]})
        ),
        "a call": forged(mine, kind=Kind.CALL),
        "another verb": forged(mine, cap="cancel"),
        "for another": forged(mine, aud=FRONT),
        "for another domain's control role": forged(mine, aud=control_role("evil.test")),
        "sent elsewhere": forged(mine, sub=control_subject(ECHO, "cancel")),
        "an answer": forged(mine, re=b"d" * 32),
        "that wants an answer": forged(mine, reply="A" * 22),
        "old": forged(mine, iat=now - 31_000, exp=now + 60_000),
        "of the future": forged(mine, iat=now + 10_000, exp=now + 60_000),
        "expired": forged(mine, iat=now - 10_000, exp=now - 1),
        "of another content": forged(mine, ct="application/json"),
        "of wildcards": forged(mine, names=("*", UNWANTED)),
        "of too many": forged(mine, names=[f"c{n:03}" for n in range(MAX_CONSUMERS)] + [UNWANTED]),
        "of something else beside": forged(
            mine, payload=encode_payload({"capabilities": [UNWANTED], "streams": ["x"]})
        ),
        "of a time out of bounds": forged(
            mine, payload=encode_payload({"capabilities": [UNWANTED], "ack_wait": 0})
        ),
        "of a time in another form": forged(
            mine, payload=encode_payload({"capabilities": [UNWANTED], "ack_wait": 30.0})
        ),
        "of no list": forged(mine, payload=encode_payload({"capabilities": UNWANTED})),
        "no envelope": b"announce",
        "nothing": b"",
        "huge": forged(mine) + bytes(200_000),
    }


NAMES = [
    "by another agent", "by another agent, on its own subject by its head", "in the name of another",
    "by another authority", "by another domain", "altered", "a call", "another verb", "for another",
    "for another domain's control role", "sent elsewhere", "an answer", "that wants an answer", "old",
    "of the future", "expired", "of another content", "of wildcards", "of too many", "of something else beside",
    "of a time out of bounds", "of a time in another form", "of no list", "no envelope", "nothing", "huge",
]  # fmt: skip


@pytest.fixture(scope="module")
async def stage(session_world):
    yield await session_world.raw(), await session_world.raw(MIDDLE)
    await session_world.clear()


async def decided(mallory, middle, mark):
    """Wait until all that was announced so far is decided on."""
    await announce(middle, MIDDLE, mark)
    await served(mallory, MIDDLE, mark)


def test_all_are_tried(session_world):
    """Honest: the list of names, which a test run needs beforehand, is that of the frames."""
    assert list(others(session_world)) == NAMES


@refused_by(
    Layer.CONTROL,
    "an announcement that is another's, altered, old, for somebody else or of another kind",
    by=Adversary.BROKER,
)
@pytest.mark.parametrize("name", NAMES)
async def test_what_is_not_believed(session_world, stage, name):
    """Published by who owns the broker, which lets others not even publish there."""
    mallory, middle = stage
    await mallory.send(announce_subject(ECHO), others(session_world)[name])
    await decided(mallory, middle, f"after{NAMES.index(name)}")
    for agent in (ECHO, FRONT):
        assert await consumer_info(mallory, task_consumer(agent, UNWANTED)) is None


async def test_the_same_but_honest_is_believed(session_world, stage):
    """Honest: nothing but what is forged keeps the others out."""
    mallory, _ = stage
    await mallory.send(announce_subject(ECHO), forged(session_world.issue(ECHO), names=("wanted",)))
    await served(mallory, ECHO, "wanted")


@refused_by(
    Layer.CONTROL, "an announcement by an identity that has no user at the broker", by=Adversary.BROKER
)
async def test_an_identity_that_is_not_known(session_world, stage):
    mallory, middle = stage
    stranger = SpiffeID(f"spiffe://{DOMAIN}/agent/nobody-knows")
    for agent in (MALLORY, stranger):
        sealer = Sealer(lambda agent=agent: session_world.issue(agent))
        await mallory.send(announce_subject(agent), announcement(sealer, agent, [UNWANTED]))
    await decided(mallory, middle, "after-strangers")
    for agent in (MALLORY, stranger):
        answer = await asked(mallory, f"$JS.API.STREAM.INFO.{tasks_stream_name(agent)}")
        assert answer["error"]["err_code"] == 10059


@refused_by(Layer.CONTROL, "an announcement that is sent again and again", by=Adversary.BROKER)
async def test_a_replayed_announcement(session_world, stage):
    """What it asks for is there; and its sender's allowance ends, nobody else's."""
    mallory, middle = stage
    frame = forged(session_world.issue(FRONT), FRONT, names=("replayed",))
    await mallory.send(announce_subject(FRONT), frame)
    await served(mallory, FRONT, "replayed")
    before = await consumer_info(mallory, task_consumer(FRONT, "replayed"))
    for _ in range(200):
        await mallory.client.publish(announce_subject(FRONT), frame)
    await mallory.send(
        announce_subject(FRONT), forged(session_world.issue(FRONT), FRONT, names=("over-the-limit",))
    )
    await decided(mallory, middle, "after-replays")
    assert (await consumer_info(mallory, task_consumer(FRONT, "replayed")))["created"] == before["created"]
    assert await consumer_info(mallory, task_consumer(FRONT, "over-the-limit")) is None
