"""Attack: the authority of another trust domain, allowed here with its bundle, makes an ID of ours.

Whoever pools the bundles of several domains falls for it. Here the other domain's own agent is heard, and
is refused by the policy only; what its authority makes in our name ends before the proof is looked at.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import until
from tests.integration.probes import CLI, DOMAIN, ECHO
from tests.integration.world import metric
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import Signer, issuer, leaf, named, p256
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

PARTNER = "partner.test"
BUYER = SpiffeID(f"spiffe://{PARTNER}/agent/buyer")
UNTRUSTED = "no authority of that bundle signed it"


@pytest.fixture(scope="module")
def partner():
    return Authority(PARTNER)


@pytest.fixture(scope="module")
async def callee(session_world, partner):
    """It accepts both domains, and has the bundles of both and of a third."""
    session_world.stack.api.federate([partner.bundle, Authority("third.test").bundle])
    yield await session_world.agent(ECHO, identity__allowed_trust_domains=[DOMAIN, PARTNER])
    session_world.stack.api.federate([])


async def send(attack, svid, iss=CLI):
    forged = forged_call(svid, iss=iss)
    await attack.send(forged.frame, reply=reply_of(forged, iss))


@refused_by(Step.AUTHORIZATION, "an agent of an allowed domain asks without a grant", by=Adversary.DOMAIN)
async def test_the_other_domains_agent_is_verified_and_has_no_grant(attack, partner):
    await send(attack, partner.issue(BUYER), BUYER)
    record = await attack.refused(reason=f"no grant lets {BUYER}")
    assert record["caller"] == str(BUYER)


@refused_by(
    Step.CHAIN, "our ID, made by another domain's authority whose bundle is here", by=Adversary.DOMAIN
)
async def test_our_id_made_by_the_allowed_domains_authority(attack, partner):
    await send(attack, partner.issue(CLI, allow_foreign=True))
    await attack.refused(reason=f"does not verify against the bundle of {DOMAIN}: {UNTRUSTED}")


@refused_by(
    Step.CHAIN, "our ID, made by another domain's intermediate with its root sent along", by=Adversary.DOMAIN
)
async def test_our_id_with_the_other_domains_path_sent_along(attack, partner):
    root = Signer(partner._root.certificate.subject, partner._root.key, partner._root.certificate)
    between = issuer(named("between"), Signer.of(partner))
    minted = leaf(between, [CLI])
    for chain in (minted.cert_chain, (*minted.cert_chain, *root.sent)):
        forged = forged_call(minted, chain=chain)
        await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused_all(2, reason=f"against the bundle of {DOMAIN}")


@refused_by(Step.PROOF, "our ID in the head, under a certificate of the allowed domain", by=Adversary.DOMAIN)
async def test_our_id_in_the_head_under_the_other_domains_certificate(attack, partner):
    await send(attack, partner.issue(BUYER))
    await attack.refused(reason=f"{BUYER} signed a head in the name of {CLI}")


@refused_by(Step.CHAIN, "one certificate that names both domains' agents", by=Adversary.DOMAIN)
async def test_a_certificate_that_names_both(attack, partner):
    for names in ([BUYER, CLI], [CLI, BUYER]):
        await send(attack, leaf(Signer.of(partner), names))
    await attack.refused_all(2, reason="exactly one URI name")


@refused_by(
    Step.CHAIN, "an agent of a domain whose bundle is here and that is not allowed", by=Adversary.DOMAIN
)
async def test_a_domain_that_is_not_allowed(attack):
    before = metric(attack.echo.parts, "agentweave_federation_errors_total")
    third = Authority("third.test")
    agent = SpiffeID("spiffe://third.test/agent/x")
    await send(attack, third.issue(agent, lifetime=timedelta(hours=1)), agent)
    await attack.refused(reason="third.test is not allowed here")
    await until(
        lambda: metric(attack.echo.parts, "agentweave_federation_errors_total") == before + 1, "the count"
    )


@refused_by(Step.CHAIN, "an authority that calls itself the allowed domain", by=Adversary.STRANGER)
async def test_the_right_name_and_another_key(attack):
    await send(attack, Authority(PARTNER).issue(BUYER), BUYER)
    await attack.refused(reason=f"does not verify against the bundle of {PARTNER}: {UNTRUSTED}")


@refused_by(Step.CHAIN, "the other domain's agent, made by our own authority", by=Adversary.INTRUDER)
async def test_our_authority_makes_no_id_of_the_other_domain(attack):
    await send(attack, leaf(Signer.of(attack.world.stack.api.authority), [BUYER], key=p256()), BUYER)
    await attack.refused(reason=f"does not verify against the bundle of {PARTNER}: {UNTRUSTED}")
