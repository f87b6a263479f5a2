"""Attack: taking the id of somebody's call before he uses it, so that his call looks like a replay.

A claim is filed under issuer, recipient, capability and id, on a subject of the recipient. So who guesses
an id, or sees one that was held back, claims at most his own.
"""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, call_subject, claim_subject
from agentweave_bus.envelope import claim_key, encode_payload, new_id
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def call_id():
    return new_id(clock_ms())


async def claims(attack):
    return await attack.world.stored(attack.mallory, claim_stream_name(ECHO))


async def its_owner_may_use(attack, call_id):
    """The id was not burned: a call of its owner under it is admitted and answered."""
    ran = attack.echo.ran.count("work")
    honest = forged_call(attack.world.issue(CLI), id=call_id)
    inbox = await attack.mallory.listen(reply_of(honest))
    await attack.mallory.send(honest.head.sub, honest.frame, reply_of(honest))
    await heard_within(inbox, "answer")
    assert attack.echo.ran.count("work") == ran + 1
    assert attack.world.audit("echo", event="admission")[-1]["id"] == call_id


@refused_by(Step.AUTHORIZATION, "burning somebody's id without a grant", by=Adversary.AGENT)
async def test_by_who_may_not_call(attack, call_id):
    before = await claims(attack)
    stranger = forged_call(attack.world.issue(OTHER), iss=OTHER, id=call_id)
    await attack.send(stranger.frame, reply=reply_of(stranger, OTHER))
    record = await attack.refused(reason="no grant")
    assert (record["caller"], record["id"]) == (str(OTHER), call_id)
    assert await claims(attack) == before  # who is denied claims nothing, not even for himself
    await its_owner_may_use(attack, call_id)


@refused_by(Layer.NAMES, "burning somebody's id by a call of one's own under it", by=Adversary.CALLER)
async def test_by_who_may_call(attack, call_id):
    """Another caller's grant lets it claim, under its own name; both calls run, each once."""
    before = await claims(attack)
    mine = forged_call(attack.world.issue(FRONT), iss=FRONT, id=call_id)
    await attack.send(mine.frame, reply=reply_of(mine, FRONT))
    await attack.admitted()
    assert await claims(attack) == before + 1
    await its_owner_may_use(attack, call_id)
    assert await claims(attack) == before + 2


@refused_by(Layer.NAMES, "burning an id at one capability for another", by=Adversary.CALLER)
async def test_by_the_same_id_at_another_capability(attack, call_id):
    attack.echo.gate.set()
    other = forged_call(
        attack.world.issue(CLI),
        id=call_id,
        cap="wait",
        sub=call_subject(ECHO, "wait"),
        payload=encode_payload({}),
    )
    await attack.send(other.frame, subject=other.head.sub, reply=reply_of(other))
    await attack.admitted(ran="wait")
    await its_owner_may_use(attack, call_id)


@refused_by(Layer.PERMISSIONS, "filing a claim in the called agent's place", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [FRONT, MIDDLE, OTHER, CLI], ids=["front", "middle", "other", "its owner"])
async def test_by_publishing_the_claim(attack, call_id, who):
    before = await claims(attack)
    raw = await attack.world.raw(who)
    subject = claim_subject(ECHO, claim_key(CLI, ECHO, "work", call_id))
    said = await raw.denied(raw.client.publish(subject, b"x" * 32))
    assert subject.lower() in said
    assert await claims(attack) == before
    await its_owner_may_use(attack, call_id)


@refused_by(
    Layer.STREAM, "filing a claim by the broker's acknowledgement of another message", by=Adversary.AGENT
)
async def test_by_a_chosen_acknowledgement_subject(attack, call_id):
    """JetStream acknowledges to any subject that a publisher names, also into somebody's claims."""
    target = claim_subject(ECHO, claim_key(CLI, ECHO, "work", call_id))
    other = await attack.world.raw(OTHER)
    landed = await attack.mallory.listen(f"{agent_prefix(Family.CLAIM, ECHO)}.*")
    before = await claims(attack)
    await other.send(claim_subject(OTHER, "4" * 64), b"x" * 32, target)
    assert (await heard_within(landed)).subject == target
    assert await claims(attack) == before
    assert other.refused == []
    await its_owner_may_use(attack, call_id)


async def test_the_called_agent_itself_may(attack, call_id):
    """Not protected, and of no use: an agent can burn ids of calls that it is to serve; it could refuse them."""
    echo = await attack.world.raw(ECHO)
    await echo.send(claim_subject(ECHO, claim_key(CLI, ECHO, "work", call_id)), b"x" * 32)
    honest = forged_call(attack.world.issue(CLI), id=call_id)
    await attack.mallory.send(honest.head.sub, honest.frame, reply_of(honest))
    record = await attack.world.refusal("echo", id=call_id)
    assert record["reason"] == "this id is claimed already"
    assert attack.echo.ran == ["work"]
