"""Attack: seeing everybody's tasks, as somebody who is no operator, past the policy of one's own."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import control_role, encode_payload
from tests.integration.connections import until
from tests.integration.dead_letter_cast import *  # noqa: F403
from tests.integration.probes import DOMAIN, FRONT, OPERATOR
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call

pytestmark = pytest.mark.anyio

CONTROL = control_role(DOMAIN)
ASKED = {
    "observe_queues": {},
    "observe_records": {},
    "observe_task": {"agent": str(FRONT), "sender": str(FRONT), "key": "0" * 64},
}
every = pytest.mark.parametrize("name", ASKED)


def asks(svid, iss, name):
    values = {"aud": CONTROL, "cap": name, "sub": call_subject(CONTROL, name), "reply": "A" * 22}
    return forged_call(svid, iss=iss, payload=encode_payload(ASKED[name]), **values)


async def ask(cast, sealed, iss):
    """Say it as who owns the broker, and hear what would be the answer."""
    reply = reply_subject(iss, sealed.head.reply, sealed.head.id)
    heard = await cast.mallory.listen(reply)
    await cast.mallory.send(sealed.head.sub, sealed.frame, reply)
    return heard


@every
@refused_by(Layer.PERMISSIONS, "asking to see everybody's tasks", by=Adversary.AGENT)
async def test_asking(sickbed, name):
    raw = await sickbed.world.raw(FRONT)
    sealed = asks(sickbed.world.issue(FRONT), FRONT, name)
    said = await raw.denied(raw.send(sealed.head.sub, sealed.frame))
    assert "permissions violation" in said.lower()


@every
@refused_by(Step.AUTHORIZATION, "asking to see everybody's tasks, past the broker", by=Adversary.BROKER)
async def test_asking_past_the_broker(sickbed, name):
    sealed = asks(sickbed.world.issue(FRONT), FRONT, name)
    heard = await ask(sickbed, sealed, FRONT)
    refused = await sickbed.refusal(digest=sealed.digest.hex())
    assert (refused["step"], refused["action"]) == (Step.AUTHORIZATION.number, "control:observe")
    assert heard.empty()  # the broker lets the control role answer operators only


@every
@refused_by(Step.PROOF, "asking to see everybody's tasks in an operator's name", by=Adversary.BROKER)
async def test_asking_in_an_operators_name(sickbed, name):
    refused = {"event": "refusal", "step": Step.PROOF.number}
    before = len(sickbed.control_audit(**refused))
    heard = await ask(sickbed, asks(sickbed.mallory.source.svid, OPERATOR, name), OPERATOR)
    await until(lambda: len(sickbed.control_audit(**refused)) > before, "the refusal")
    assert heard.empty()
