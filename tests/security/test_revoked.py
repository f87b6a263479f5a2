"""Attack: who was revoked goes on, on a chain that the callee has verified and remembers.

All of these were honest until a moment ago: the same certificate was admitted, or would have been. The
broker of these attacks lets everything pass, so that the callee alone can refuse.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from agentweave_bus.bus.admission import Step
from agentweave_bus.identity import Authority, revocation_file
from agentweave_bus.identity.revocation_file import RevokedEntry, add_revocation, remove_revocations
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, DOMAIN, ECHO, FRONT
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import Signer, issuer, leaf, named
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

PARTNER = "partner.test"
BUYER = SpiffeID(f"spiffe://{PARTNER}/agent/buyer")


@pytest.fixture(scope="module")
def partner():
    return Authority(PARTNER)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("revoked") / "revoked.yaml"
    path.write_text("revoked: []\n")
    return path


@pytest.fixture(scope="module")
async def callee(session_world, partner, file):
    """It follows a file of its own, and takes another domain's word for who is who there."""
    session_world.stack.api.federate([partner.bundle])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revocation_file, "_POLL_SECONDS", 0.02)  # half a second, in service
        yield await session_world.agent(
            ECHO, identity__revocations=str(file), identity__allowed_trust_domains=[DOMAIN, PARTNER]
        )
    session_world.stack.api.federate([])


@pytest.fixture
async def revoke(attack, file):
    """Revoke something for the length of a test; returns when the callee knows."""
    entries = []

    def known():
        return attack.echo.parts.verifier._chains.revocations.revoked

    nothing = known()

    async def revoking(**what):
        entry = RevokedEntry.model_validate({"reason": "a test", "time": datetime.now(UTC), **what})
        entries.append(entry)
        assert add_revocation(file, entry)
        await until(lambda: known() != nothing, "the revocation")

    yield revoking
    for entry in entries:
        remove_revocations(file, entry.subject)
    await until(lambda: known() == nothing, "the end of the revocation")


async def admitted_once(attack, svid, iss=CLI):
    """An honest call, after which the callee remembers the chain."""
    forged = forged_call(svid, iss=iss)
    inbox = await attack.mallory.listen(reply_of(forged, iss))
    await attack.mallory.send(forged.head.sub, forged.frame, reply_of(forged, iss))
    await heard_within(inbox)
    await attack.admitted()
    attack.echo.ran.remove("work")


async def refused_now(attack, svid, iss=CLI, *, reason):
    forged = forged_call(svid, iss=iss)
    await attack.send(forged.frame, reply=reply_of(forged, iss))
    await attack.refused(reason=reason)


@refused_by(Step.CHAIN, "an agent whose identity was revoked after its last call", by=Adversary.AGENT)
async def test_a_revoked_identity(attack, revoke):
    svid = attack.world.issue(FRONT)
    await admitted_once(attack, svid, FRONT)
    await revoke(spiffe_id=FRONT)
    await refused_now(attack, svid, FRONT, reason="its identity is revoked")


@refused_by(
    Step.CHAIN, "a certificate from before the moment at which its owner was revoked", by=Adversary.THIEF
)
async def test_a_certificate_of_before(attack, revoke):
    svid = attack.world.issue(FRONT, not_before=datetime.now(UTC) - timedelta(minutes=10))
    await admitted_once(attack, svid, FRONT)
    await revoke(
        spiffe_id=FRONT, issued_before=datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=5)
    )
    await refused_now(attack, svid, FRONT, reason="issued to it as early")


@refused_by(Step.CHAIN, "a stolen certificate that was revoked by its fingerprint", by=Adversary.THIEF)
async def test_a_revoked_certificate(attack, revoke):
    """Its owner has another by now, and is served."""
    svid = attack.world.issue(CLI)
    await admitted_once(attack, svid)
    await revoke(fingerprint=svid.x5t.hex())
    await refused_now(attack, svid, reason=svid.x5t.hex()[:16])


@refused_by(
    Step.CHAIN,
    "a certificate by a revoked intermediate authority, whose root is trusted",
    by=Adversary.INTRUDER,
)
async def test_a_revoked_authority(attack, revoke):
    between = issuer(named("between"), Signer.of(attack.world.stack.api.authority))
    svid = leaf(between, [CLI])
    await admitted_once(attack, svid)
    await revoke(authority=x509.load_der_x509_certificate(svid.cert_chain[1]).fingerprint(SHA256()).hex())
    await refused_now(attack, svid, reason="the authority")


@refused_by(
    Step.CHAIN, "a remembered certificate whose authority has left its domain's bundle", by=Adversary.DOMAIN
)
async def test_an_authority_that_is_gone(attack, partner):
    svid = partner.issue(BUYER)
    forged = forged_call(svid, iss=BUYER)
    await attack.send(forged.frame, reply=reply_of(forged, BUYER))
    known = await attack.world.refusal("echo", after=attack.refused_before)
    assert known["step_name"] == Step.AUTHORIZATION.label  # verified, and has no grant
    partner.rotate()
    partner.retire()
    attack.world.stack.api.federate([partner.bundle])
    await until(
        lambda: attack.echo.parts.source.bundle_for(PARTNER) == partner.bundle,
        "the other domain's new bundle",
    )
    attack.refused_before += 1
    await refused_now(attack, svid, BUYER, reason=f"does not verify against the bundle of {PARTNER}")
