"""Attack: a call in somebody else's name."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.envelope import encode_payload
from agentweave_bus.envelope.frame import encode_frame
from agentweave_bus.identity import Authority
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, MALLORY
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


async def test_the_same_call_by_who_it_says_is_admitted(attack):
    """Honest; what the attacks below change is what makes them fail."""
    honest = forged_call(attack.world.issue(CLI))
    inbox = await attack.mallory.listen(reply_of(honest))
    await attack.send(honest.frame, reply=reply_of(honest))
    await heard_within(inbox)
    assert attack.echo.ran == ["work", "work"]
    assert attack.refusals() == []


@refused_by(Step.PROOF, "a call in another agent's name, signed with one's own key", by=Adversary.AGENT)
async def test_signed_by_another_agent_with_its_own_certificate(attack):
    forged = forged_call(attack.world.issue(MALLORY))
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason=f"{MALLORY} signed a head in the name of {CLI}")


@refused_by(
    Step.PROOF, "a call under the victim's certificate, signed with one's own key", by=Adversary.AGENT
)
async def test_signed_by_another_agent_under_the_victims_certificate(attack):
    """The victim's chain is public: it is in every frame."""
    victim = attack.world.issue(CLI)
    forged = forged_call(attack.world.issue(MALLORY), raw={"x5t": victim.x5t})
    dressed = replace(forged.link, chain=victim.cert_chain)
    frame = encode_frame(dressed, encode_payload({"text": "forged"}), ())
    await attack.send(frame, reply=reply_of(forged))
    await attack.refused(reason="the signature is not")


@refused_by(Step.CHAIN, "our ID, made by an authority that calls itself ours", by=Adversary.DOMAIN)
async def test_an_identity_made_by_another_authority(attack):
    forged = forged_call(Authority("demo.test").issue(CLI, lifetime=timedelta(hours=1)))
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="no authority of that bundle signed it")


@refused_by(Step.PROOF, "another certificate of the sender than its head names", by=Adversary.THIEF)
async def test_another_certificate_of_the_victim_than_the_head_names(attack):
    forged = forged_call(attack.world.issue(CLI), raw={"x5t": attack.world.issue(CLI).x5t})
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="another certificate")
