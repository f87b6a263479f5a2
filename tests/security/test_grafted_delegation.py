"""Attack: a link of somebody else's delegation, under one's own call."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Link, decode_frame
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, OTHER
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def link(attack):
    """The proof that the client asked ``front`` for something, as everybody on the way saw it."""
    await attack.world.agent(FRONT)
    heard = await attack.mallory.listen(call_subject(FRONT, "relay"))
    await attack.cli.ask(FRONT, "relay", {"path": [ECHO], "name": "say", "payload": {"text": "x"}})
    attack.echo.ran.remove("say")
    frame = decode_frame((await heard_within(heard)).data)
    return Link(frame.head, frame.proof, frame.chain)


async def test_the_agent_that_was_asked_may_use_it(attack, link):
    """Honest; who uses the link is what the attack below changes."""
    honest = forged_call(attack.world.issue(FRONT), iss=FRONT, via=(link,), exp=link.head.exp)
    inbox = await attack.mallory.listen(reply_of(honest, FRONT))
    await attack.send(honest.frame, reply=reply_of(honest, FRONT))
    await heard_within(inbox)
    assert attack.echo.ran == ["work", "work"]


@refused_by(Step.DELEGATION, "a link of somebody else's delegation under one's own call", by=Adversary.AGENT)
@pytest.mark.parametrize("thief", [OTHER, CLI], ids=["stranger", "origin"])
async def test_nobody_else_may(attack, link, thief):
    forged = forged_call(attack.world.issue(thief), iss=thief, via=(link,), exp=link.head.exp)
    await attack.send(forged.frame, reply=reply_of(forged, thief))
    await attack.refused(reason="rule 3")
