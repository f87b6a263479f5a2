"""Attack: other certificates under a signature that is right.

Neither proof nor head covers the certificates beside the leaf, so whoever carries a frame can change
them, and a verifier that remembers leaves could be made to take them along. Its memory is of whole
chains, and what does not lie on the verified path is refused.
"""

from __future__ import annotations

import os
import time

import anyio
import pytest
from cryptography import x509

from agentweave_bus.bus.admission import Step
from agentweave_bus.identity import Authority
from tests.integration.connections import heard_within
from tests.integration.probes import CLI
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import Papers, Signer, issuer, leaf, named, p256
from tests.security.forging import forged_call, reply_of, with_part

pytestmark = pytest.mark.anyio


def chain_of(attack):
    """A client's SVID below an intermediate: leaf first, then who signed it."""
    between = issuer(named("intermediate"), Signer.of(attack.world.stack.api.authority))
    return leaf(between, [CLI])


async def cached(attack, papers):
    """An honest call with these certificates is admitted, so that the callee remembers them."""
    forged = forged_call(papers)
    inbox = await attack.mallory.listen(reply_of(forged))
    await attack.send(forged.frame, reply=reply_of(forged))
    await heard_within(inbox)
    await attack.admitted()
    attack.echo.ran.remove("work")
    while not attack.reflected.empty():
        attack.reflected.get_nowait()


async def send(attack, papers, chain):
    forged = forged_call(papers, chain=tuple(chain))
    await attack.send(forged.frame, reply=reply_of(forged))


@refused_by(Step.PROOF, "another leaf of the sender under a valid signature", by=Adversary.BROKER)
async def test_another_leaf_of_the_same_sender(attack):
    other = attack.world.issue(CLI)
    await attack.send(with_part(attack.message.data, "chain", lambda _: list(other.cert_chain)))
    await attack.refused(reason="the signature is not")


@refused_by(Step.CHAIN, "another authority's copy of the leaf under a valid signature", by=Adversary.BROKER)
async def test_a_leaf_for_the_same_key_by_another_authority(attack):
    """The signature fits: it is the sender's own key. Nobody has vouched for it."""
    mine = attack.world.issue(CLI)
    copy = leaf(Signer.of(Authority("demo.test")), [CLI], key=mine.private_key)
    await send(attack, copy, copy.cert_chain)
    await attack.refused(reason="no authority of that bundle signed it")


@refused_by(
    Step.PROOF, "a second certificate for the sender's key than the one it signed with", by=Adversary.INTRUDER
)
async def test_another_certificate_for_the_same_key(attack):
    """Also one of the right authority: the head names the very certificate."""
    one = chain_of(attack)
    twin = leaf(Signer.of(attack.world.stack.api.authority), [CLI], key=one.private_key)
    await send(attack, one, twin.cert_chain)
    await attack.refused(reason="names another certificate")


def beside(what, change):
    mark = refused_by(Step.CHAIN, f"{what} behind a leaf that is remembered", by=Adversary.BROKER)
    return pytest.param(change, id=what, marks=mark)


@pytest.mark.parametrize(
    "change",
    [
        beside("garbage", lambda chain: [*chain, os.urandom(500)]),
        beside("an empty certificate", lambda chain: [*chain, b""]),
        beside("garbage in the intermediate's place", lambda chain: [chain[0], os.urandom(500)]),
        beside("the leaf once more", lambda chain: [*chain, chain[0]]),
        beside("the intermediate twice", lambda chain: [*chain, chain[1]]),
        beside("no intermediate", lambda chain: chain[:1]),
        beside("a stranger's certificate", lambda chain: [*chain, *Authority("demo.test").bundle.to_der()]),
        beside("a stranger's in front of the path", lambda chain: [chain[0], *issuer(named("x")).sent, chain[1]]),
        beside("the path in another order", lambda chain: [chain[1], chain[0]]),
        beside("one byte after the intermediate", lambda chain: [chain[0], chain[1] + b"\0"]),
        beside("one byte after the leaf", lambda chain: [chain[0] + b"\0", chain[1]]),
        beside("a byte moved from one to the next", lambda chain: [chain[0][:-1], chain[0][-1:] + chain[1]]),
    ],
)  # fmt: skip
async def test_other_certificates_behind_a_remembered_leaf(attack, change):
    papers = chain_of(attack)
    await cached(attack, papers)
    await send(attack, papers, change(list(papers.cert_chain)))
    await attack.refused()


def recoded(certificate):
    """The certificate with its signature's last bit declared unused, which readers overlook."""
    signature = x509.load_der_x509_certificate(certificate).signature
    place = len(certificate) - len(signature) - 1
    assert certificate[place] == 0
    return certificate[:place] + b"\1" + certificate[place + 1 :]


@refused_by(Step.CHAIN, "a second encoding of a certificate that still verifies", by=Adversary.BROKER)
async def test_a_second_encoding_of_a_certificate(attack):
    """It is the one place of a certificate that its own signature does not cover."""
    papers = chain_of(attack)
    while any(one[-1] & 1 for one in papers.cert_chain):  # the bit that is left out must be none
        papers = chain_of(attack)
    await cached(attack, papers)
    first, second = papers.cert_chain
    for chain in ((first, recoded(second)), (recoded(first), second)):
        await send(attack, papers, chain)
    await attack.refused_all(2, reason="no whole bytes")


@refused_by(Step.CHAIN, "an expired leaf or intermediate behind a remembered chain", by=Adversary.THIEF)
async def test_a_remembered_chain_ends_with_the_first_of_its_certificates_that_does(attack):
    end = int(time.time() + 2)  # certificates count whole seconds
    minutes = (-60, (end - time.time()) / 60 + 0.001)
    root = Signer.of(attack.world.stack.api.authority)
    short_leaf = leaf(root, [CLI], minutes=minutes)
    short_path = leaf(issuer(named("short"), root, minutes=minutes), [CLI])
    for papers in (short_leaf, short_path):
        await cached(attack, papers)
    await anyio.sleep(max(0.0, end - time.time()) + 0.02)
    for papers in (short_leaf, short_path):
        await send(attack, papers, papers.cert_chain)
    await attack.refused_all(2, reason=f"the chain of {CLI}")


@refused_by(
    Step.CHAIN, "certificates that could be joined to a path in countless ways", by=Adversary.STRANGER
)
async def test_certificates_that_sign_one_another(attack):
    """All of one name and key. Trying every path takes half a minute with these, and hours with seven."""
    key, name = p256(), named("loop")
    loop = [issuer(name, key=key) for _ in range(4)]
    papers = leaf(loop[0], [CLI])
    chain = (papers.cert_chain[0], *(one for signer in loop for one in signer.sent))
    began = time.process_time()
    await send(attack, Papers(chain, papers.private_key), chain)
    await attack.refused()
    assert time.process_time() - began < 10
