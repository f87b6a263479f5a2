"""Attack: an older version, a weaker algorithm, a proof that proves less."""

from __future__ import annotations

from hashlib import sha256

import msgpack
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Proof
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import HEAD_TYPE, ROOT_TYPE, pae, protected_head
from agentweave_bus.envelope.merkle import Tree, leaf_hash
from agentweave_bus.envelope.verification import protected_root
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import signature
from tests.security.forging import HONEST, forged_call, forged_head, reply_of, sealed_by, with_part

pytestmark = pytest.mark.anyio

ORDER = int("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
"""Of the group of P-256: (r, s) and (r, ORDER - s) are signatures of the same."""


@refused_by(Step.FRAME, "another version of the frame", by=Adversary.BROKER)
async def test_another_version(attack):
    versions = [0, 2, 255, -1, None, "1", [1], {"v": 1}]
    for version in versions:
        await attack.send(with_part(attack.message.data, "version", lambda _, value=version: value))
    await attack.refused_all(len(versions), reason="the frame's version is not 1")


@refused_by(Step.HEAD, "a head that says how it is to be verified", by=Adversary.CALLER)
async def test_a_head_that_names_an_algorithm(attack):
    names = {"alg": "none", "v": 0, "crit": [], "jwk": {"kty": "EC"}, "x5u": "https://evil.test/chain.pem"}
    svid = attack.world.issue(CLI)
    for key, value in names.items():
        await attack.send(forged_call(svid, raw={key: value}).frame)
    await attack.refused_all(len(names), reason="the head has an unknown key")


def with_key(algorithm):
    """Sign with the sender's own key, in another way than its curve implies."""

    def sign(key, data):
        return key.sign(data, ec.ECDSA(algorithm))

    return sign


def raw_pair(key, data):
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def longer_der(key, data):
    der = key.sign(data, ec.ECDSA(hashes.SHA256()))
    return der[:1] + b"\x81" + der[1:]


def padded_der(key, data):
    return key.sign(data, ec.ECDSA(hashes.SHA256())) + b"\0"


def negative(key, data):
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    numbers = [one.to_bytes(one.bit_length() // 8 + 1, "big", signed=True) for one in (r, s - ORDER)]
    inside = b"".join(b"\x02" + bytes([len(one)]) + one for one in numbers)
    return b"\x30" + bytes([len(inside)]) + inside


def beyond_the_order(key, data):
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return encode_dss_signature(r, s + ORDER)


def by_rsa(_key, data):
    return rsa.generate_private_key(65537, 1024).sign(data, padding.PKCS1v15(), hashes.SHA256())


def wrong(what, sign, curve="p256"):
    mark = refused_by(Step.PROOF, f"a signature {what}", by=Adversary.CALLER)
    return pytest.param(sign, curve, id=what, marks=mark)


@pytest.mark.parametrize(
    ("sign", "curve"),
    [
        wrong("with SHA-1", with_key(hashes.SHA1())),
        wrong("with SHA-224", with_key(hashes.SHA224())),
        wrong("with SHA-384 of a P-256 key", with_key(hashes.SHA384())),
        wrong("with SHA-256 of a P-384 key", with_key(hashes.SHA256()), "p384"),
        wrong("with RSA, as if the key were one", by_rsa),
        wrong("as two bare numbers", raw_pair),
        wrong("in a longer DER form", longer_der),
        wrong("with a byte after it", padded_der),
        wrong("with a negative number", negative),
        wrong("with a number beyond the group's order", beyond_the_order),
        wrong("of two zeros", lambda _key, _data: encode_dss_signature(0, 0)),
        wrong("of zero and one", lambda _key, _data: encode_dss_signature(0, 1)),
        wrong("of the order twice", lambda _key, _data: encode_dss_signature(ORDER, ORDER)),
        wrong("that is one zero byte", lambda _key, _data: b"\0"),
    ],
)
async def test_another_signature_than_the_key_implies(attack, sign, curve):
    svid = attack.world.issue(CLI, curve=curve)
    forged = forged_call(svid, sign=lambda data: sign(svid.private_key, data))
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason=f"the signature is not {CLI}'s")


@refused_by(Step.FRAME, "no signature, or one of more bytes than any", by=Adversary.STRANGER)
async def test_no_signature_at_all(attack):
    proofs = [[b"", 1, 0, []], [None, 1, 0, []], [b"x" * 256, 1, 0, []], [], None, b"", [b"x"], [b"x", 1, 0]]
    for proof in proofs:
        await attack.send(with_part(attack.message.data, "proof", lambda _, value=proof: value))
    await attack.refused_all(len(proofs))


def covering(what, body):
    mark = refused_by(Step.PROOF, f"a signature over {what}", by=Adversary.CALLER)
    return pytest.param(body, id=what, marks=mark)


@pytest.mark.parametrize(
    "body",
    [
        covering("the bare head", lambda head: head),
        covering("the head by itself", protected_head),
        covering("the bare root", lambda head: leaf_hash(protected_head(head))),
        covering("the root without its size", lambda head: pae(ROOT_TYPE, leaf_hash(protected_head(head)))),
        covering("the root as another type", lambda head: pae(HEAD_TYPE, protected_root(1, _leaf(head))[-40:])),
        covering("a tree of another size", lambda head: protected_root(2, _leaf(head))),
        covering("a head that is no leaf", lambda head: protected_root(1, head_hash_as_node(head))),
    ],
)  # fmt: skip
async def test_a_signature_that_covers_something_else(attack, body):
    """Right in itself, by the sender's own key, and not over the tree in which the head is."""
    svid = attack.world.issue(CLI)
    payload = pack(HONEST)
    head = pack(forged_head(svid, payload))
    frame = sealed_by(svid, head, payload, sign=lambda _: signature(svid.private_key, body(head))).frame
    await attack.send(frame)
    await attack.refused(reason=f"the signature is not {CLI}'s")


def _leaf(head):
    return leaf_hash(protected_head(head))


def head_hash_as_node(head):
    return sha256(b"\x01" + protected_head(head)).digest()


@pytest.fixture
async def batch(attack):
    """Five calls under one signature, as a busy caller sends them; the first one is admitted."""
    svid, payload = attack.world.issue(CLI), pack(HONEST)
    heads = [pack(forged_head(svid, payload)) for _ in range(5)]
    tree = Tree([_leaf(head) for head in heads])
    signed = signature(svid.private_key, protected_root(tree.size, tree.root))
    calls = []
    for index, head in enumerate(heads):
        sealed = sealed_by(svid, head, payload)
        proof = Proof(signed, tree.size, index, tree.path(index))
        wire = [proof.signature, proof.size, proof.index, list(proof.path)]
        frame = with_part(sealed.frame, "proof", lambda _, value=wire: value)
        calls.append((frame, reply_of(sealed)))
    first, inbox = calls[0], await attack.mallory.listen(calls[0][1])
    await attack.send(first[0], reply=first[1])
    await heard_within(inbox)
    await attack.admitted()
    attack.echo.ran.remove("work")
    while not attack.reflected.empty():
        attack.reflected.get_nowait()
    return calls


GAMES = {
    "the index before": lambda p: p.__setitem__(2, 1),
    "the index after": lambda p: p.__setitem__(2, 3),
    "a smaller tree": lambda p: p.__setitem__(1, 4),
    "a larger tree": lambda p: p.__setitem__(1, 6),
    "the largest tree": lambda p: p.__setitem__(1, 256),
    "a path reversed": lambda p: p[3].reverse(),
    "a path one shorter": lambda p: p[3].pop(),
    "a path one longer": lambda p: p[3].append(b"x" * 32),
    "no path": lambda p: p[3].clear(),
    "a tree of one": lambda p: p.__setitem__(slice(1, 4), [1, 0, []]),
}


@refused_by(Step.PROOF, "another place in a tree whose signature is remembered", by=Adversary.BROKER)
async def test_another_place_in_the_tree(attack, batch):
    frame, reply = batch[2]
    for change in GAMES.values():
        parts = msgpack.unpackb(frame)
        change(parts[2])
        await attack.send(msgpack.packb(parts), reply=reply)
    await attack.refused_all(len(GAMES))


@refused_by(Step.FRAME, "a place that no tree has", by=Adversary.BROKER)
async def test_a_place_that_no_tree_has(attack, batch):
    wrong = [(5, 5), (5, -1), (0, 0), (257, 2), (2**63, 2), (-5, 2)]
    frame, reply = batch[2]
    for size, index in wrong:
        parts = msgpack.unpackb(frame)
        parts[2][1:3] = size, index
        await attack.send(msgpack.packb(parts), reply=reply)
    await attack.refused_all(len(wrong))


@refused_by(Step.PROOF, "a head under a signature that is remembered for other heads", by=Adversary.CALLER)
async def test_a_head_outside_of_the_tree(attack, batch):
    """A signature that verified before is not looked at again: for its own tree only."""
    stray = msgpack.unpackb(forged_call(attack.world.issue(CLI)).frame)
    known = msgpack.unpackb(batch[1][0])
    for parts in ([*stray[:2], known[2], *known[3:]], [*stray[:2], known[2], *stray[3:]]):
        await attack.send(msgpack.packb(parts), reply=batch[1][1])
    await attack.refused_all(2)


@refused_by(
    Step.REPLAY, "the same call under the other signature that every signature implies", by=Adversary.BROKER
)
async def test_the_other_signature_of_the_same(attack):
    """Who has one can compute the other without the key, and both verify. What is remembered is the head."""
    parts = msgpack.unpackb(attack.message.data)
    r, s = decode_dss_signature(parts[2][0])
    parts[2][0] = encode_dss_signature(r, ORDER - s)
    twin = msgpack.packb(parts)
    assert twin != attack.message.data
    await attack.send(twin)
    record = await attack.refused(reason="admitted before")
    assert record["digest"] == attack.world.audit("echo", event="admission", cap="work")[-1]["digest"]


@refused_by(Step.REPLAY, "the same call with the authority's certificate sent along", by=Adversary.BROKER)
async def test_the_same_with_its_root_sent_along(attack):
    """A chain may go on to the root, so this verifies, too."""
    root = attack.world.stack.api.authority.bundle.to_der()[0]
    await attack.send(with_part(attack.message.data, "chain", lambda chain: [*chain, root]))
    await attack.refused(reason="admitted before")


@refused_by(Step.REPLAY, "the original after its twin with the other signature", by=Adversary.BROKER)
async def test_the_twin_first(attack):
    """Whichever comes first runs; the two are one call."""

    def other(key, data):
        r, s = decode_dss_signature(signature(key, data))
        twins.append(encode_dss_signature(r, s))
        return encode_dss_signature(r, ORDER - s)

    twins: list[bytes] = []
    svid = attack.world.issue(CLI)
    forged = forged_call(svid, sign=lambda data: other(svid.private_key, data))
    inbox = await attack.mallory.listen(reply_of(forged))
    await attack.send(forged.frame, reply=reply_of(forged))
    await heard_within(inbox)
    await attack.admitted()
    attack.echo.ran.remove("work")
    original = with_part(forged.frame, "proof", lambda proof: [twins[0], *proof[1:]])
    await attack.send(original, subject=call_subject(ECHO, "work"), reply=reply_of(forged))
    await attack.refused(reason="admitted before")
