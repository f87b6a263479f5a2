"""Attack: a leaf that the right authority signed, and that is no X.509-SVID.

Whoever can make an authority sign what it should not, with another profile or by a mistake, gets a
certificate that ordinary path validation accepts. Each of these is used to seal a call in the client's
name, with a signature that is right for its key.
"""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from agentweave_bus.bus.admission import Step
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, DOMAIN, OTHER
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import Papers, Signer, issuer, leaf, named, p256, usage
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


def broken(what, reason, change):
    mark = refused_by(Step.CHAIN, f"a leaf {what}", by=Adversary.THIEF)
    return pytest.param(reason, change, id=what, marks=mark)


async def send(attack, papers):
    forged = forged_call(papers)
    await attack.send(forged.frame, reply=reply_of(forged))
    return forged


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"extended": None},
        {"names": [x509.DNSName("x.demo.test")]},
        {"key": ec.generate_private_key(ec.SECP384R1())},
    ],
    ids=["plain", "any use", "a DNS name beside", "P-384"],
)
async def test_the_leaf_that_is_broken_below_is_admitted(attack, change):
    """Honest; what the attacks below break is what makes them fail."""
    signer = Signer.of(attack.world.stack.api.authority)
    forged = forged_call(leaf(signer, [CLI], **change))
    inbox = await attack.mallory.listen(reply_of(forged))
    await attack.send(forged.frame, reply=reply_of(forged))
    await heard_within(inbox)
    await attack.admitted()


SIGNING = "digital_signature"
ONLY_SERVER, ONLY_CLIENT = [ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]
ANY_USE = [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        broken("with two URI names", "has 2", {"uris": [CLI, OTHER]}),
        broken("with its URI name twice", "has 2", {"uris": [CLI, CLI]}),
        broken("with a URI name of the web beside its own", "has 2", {"uris": [CLI, "https://demo.test/cli"]}),
        broken("without a name", "has 0", {"uris": []}),
        broken("with its ID as a DNS name", "has 0", {"uris": [], "names": [x509.DNSName("demo.test")]}),
        broken("with a URI name that is no SPIFFE ID", "no SPIFFE ID", {"uris": ["https://demo.test/client/cli"]}),
        broken("with an upper-case trust domain", "no SPIFFE ID", {"uris": ["spiffe://DEMO.test/client/cli"]}),
        broken("with an escaped path", "no SPIFFE ID", {"uris": ["spiffe://demo.test/client/%63li"]}),
        broken("with an ID that ends in a newline", "no SPIFFE ID", {"uris": [f"{CLI}\n"]}),
        broken("with an ID that holds a NUL", "no SPIFFE ID", {"uris": [f"{CLI}\0.evil"]}),
        broken("that names the trust domain itself", "needs a path", {"uris": [f"spiffe://{DOMAIN}"]}),
        broken("that is a CA", "CA certificate", {"ca": True}),
        broken("without key usage", "no key usage", {"key_usage": None}),
        broken("whose key usage is not critical", "not critical", {"critical": False}),
        broken("that may not sign", "may not sign", {"key_usage": usage("key_agreement")}),
        broken("that may sign certificates", "CA's key usage", {"key_usage": usage(SIGNING, "key_cert_sign")}),
        broken("that may sign revocations", "CA's key usage", {"key_usage": usage(SIGNING, "crl_sign")}),
        broken("for servers only", "lacks serverAuth or clientAuth", {"extended": ONLY_SERVER}),
        broken("for clients only", "lacks serverAuth or clientAuth", {"extended": ONLY_CLIENT}),
        broken("for any use", "lacks serverAuth or clientAuth", {"extended": ANY_USE}),
        broken("with an RSA key", "neither P-256 nor P-384", {"key": rsa.generate_private_key(65537, 1024)}),
        broken("with a P-521 key", "neither P-256 nor P-384", {"key": ec.generate_private_key(ec.SECP521R1())}),
        broken("with a secp256k1 key", "neither P-256 nor P-384", {"key": ec.generate_private_key(ec.SECP256K1())}),
        broken("with an Ed25519 key", "neither P-256 nor P-384", {"key": ed25519.Ed25519PrivateKey.generate()}),
        broken("that is not valid yet", "is valid from", {"minutes": (10, 60)}),
        broken("that has expired", "expired at", {"minutes": (-60, -1)}),
    ],
)  # fmt: skip
async def test_a_leaf_that_is_no_svid(attack, reason, change):
    signer = Signer.of(attack.world.stack.api.authority)
    await send(attack, leaf(signer, **{"uris": [CLI], **change}))
    await attack.refused(reason=reason)


@refused_by(Step.CHAIN, "a leaf that signed itself", by=Adversary.STRANGER)
async def test_a_leaf_that_signed_itself(attack):
    key = p256()
    await send(attack, leaf(Signer(named("leaf"), key), [CLI], key=key))
    await attack.refused(reason="no authority of that bundle signed it")


@refused_by(
    Step.CHAIN, "a leaf signed by a self-made authority of the right one's name", by=Adversary.STRANGER
)
async def test_an_authority_of_the_same_name_with_another_key(attack):
    real = Signer.of(attack.world.stack.api.authority)
    for made in (Signer(real.name, p256()), issuer(real.name)):  # without its certificate, and with it
        await send(attack, leaf(made, [CLI]))
    await attack.refused_all(2)


@refused_by(Step.CHAIN, "a leaf signed with the key of another agent's SVID", by=Adversary.AGENT)
async def test_a_leaf_that_another_leaf_signed(attack):
    """An agent's own certificate as an intermediate: it chains, but a leaf signs nobody."""
    mine = attack.world.issue(OTHER)
    minted = leaf(Signer(mine.leaf.subject, mine.private_key, mine.leaf), [CLI])
    await send(attack, minted)
    await attack.refused()


@refused_by(Step.CHAIN, "an authority of the bundle in the leaf's place", by=Adversary.INTRUDER)
async def test_the_authority_itself_as_a_leaf(attack):
    """Whoever has its key could issue himself anything; its own certificate still is no identity."""
    authority = attack.world.stack.api.authority
    papers = Papers(tuple(authority.bundle.to_der()), authority._root.key)
    await send(attack, papers)
    await attack.refused(reason="needs a path")
