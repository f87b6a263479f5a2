"""The known answers in ``tests/vectors/``: reproduced, accepted, and checked without this package.

The second half reads frames as an implementation in another language would, from
``docs/wire-format.md`` with msgpack, hashes, ECDSA and X.509 only.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from agentweave_bus.envelope import (
    claim_key,
    decode_payload,
    encode_payload,
    occurrence_id,
    verify_delegation,
)
from agentweave_bus.exceptions import (
    ChainRefusedError,
    DelegationRefusedError,
    MalformedEnvelopeError,
    PayloadError,
    SignatureRefusedError,
)
from tests.vectors import generate

FOLDER = Path(generate.__file__).parent
FILES = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
FRAMES = FILES["frames.json"]

STEPS = {
    "frame": MalformedEnvelopeError,
    "chain": ChainRefusedError,
    "proof": SignatureRefusedError,
    "head": SignatureRefusedError,
    "delegation": DelegationRefusedError,
}


def test_the_generator_writes_exactly_these_files() -> None:
    made = generate.vectors()
    assert made.keys() == FILES.keys()
    for name, content in made.items():
        assert (FOLDER / name).read_text() == generate.rendered(content), name


@pytest.mark.parametrize("vector", FRAMES["accepted"], ids=lambda one: one["name"])
def test_frames_open(vector: dict[str, Any]) -> None:
    verifier, now_ms = generate.verifier(), vector["head_map"]["iat"]
    opened = verifier.open(bytes.fromhex(vector["frame"]), now_ms=now_ms)
    links = verify_delegation(opened, verifier, now_ms=now_ms)
    assert opened.digest.hex() == vector["digest"]
    assert opened.head.iss == opened.sender.spiffe_id == vector["sender"]
    assert decode_payload(opened.payload) == vector["payload_value"]
    assert [one.digest.hex() for one in links] == vector["via_digests"]


@pytest.mark.parametrize("vector", FRAMES["refused"], ids=lambda one: one["why"])
def test_frames_are_refused_at_their_step(vector: dict[str, Any]) -> None:
    verifier = generate.verifier()
    with pytest.raises(STEPS[vector["step"]]):
        verify_delegation(
            verifier.open(bytes.fromhex(vector["frame"]), now_ms=FRAMES["now_ms"]),
            verifier,
            now_ms=FRAMES["now_ms"],
        )


def test_payloads() -> None:
    for one in FILES["payloads.json"]["accepted"]:
        assert encode_payload(one["value"]).hex() == one["msgpack"]
        assert decode_payload(bytes.fromhex(one["msgpack"])) == one["value"]
    for one in FILES["payloads.json"]["refused"]:
        with pytest.raises(PayloadError):
            decode_payload(bytes.fromhex(one["msgpack"]))


def test_keys() -> None:
    claim, occurrence = FILES["keys.json"]["claim"], FILES["keys.json"]["occurrence"]
    assert claim_key(claim["iss"], claim["aud"], claim["cap"], claim["id"]) == claim["key"]
    assert occurrence_id(occurrence["id"], occurrence["at_ms"]) == occurrence["occurrence_id"]


# --- by the book: no code of the package below this line ---------------------------------------------------


def pae(payload_type: str, body: bytes) -> bytes:
    return b" ".join(
        [b"DSSEv1", str(len(payload_type)).encode(), payload_type.encode(), str(len(body)).encode(), body]
    )


HEAD = "application/vnd.agentweave.envelope.v1+msgpack"
ROOT = "application/vnd.agentweave.root.v1"


def hash_of(data: bytes) -> bytes:
    return sha256(data).digest()


def mth(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, over leaf hashes."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hash_of(b"\x01" + mth(leaves[:k]) + mth(leaves[k:]))


def root_by_path(leaf: bytes, size: int, index: int, path: list[bytes]) -> bytes:
    """Recursive, unlike the package: which half of the tree is the leaf in?"""
    if size == 1:
        assert not path
        return leaf
    k = 1
    while k * 2 < size:
        k *= 2
    if index < k:
        return hash_of(b"\x01" + root_by_path(leaf, k, index, path[:-1]) + path[-1])
    return hash_of(b"\x01" + path[-1] + root_by_path(leaf, size - k, index - k, path[:-1]))


def test_the_example_of_dsse() -> None:
    example = FILES["dsse.json"]["dsse_example"]
    encoded = pae(example["payload_type"], bytes.fromhex(example["body"]))
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert encoded.hex() == example["pae"]
    numbers = ec.EllipticCurvePublicNumbers(
        int(example["public_key_x"]), int(example["public_key_y"]), ec.SECP256R1()
    )
    both = bytes.fromhex(example["signature_r_s"])
    signature = utils.encode_dss_signature(int.from_bytes(both[:32], "big"), int.from_bytes(both[32:], "big"))
    numbers.public_key().verify(signature, encoded, ec.ECDSA(SHA256()))


def test_the_two_encodings_of_envelopes() -> None:
    head, root = FILES["dsse.json"]["head"], FILES["dsse.json"]["root"]
    assert pae(HEAD, bytes.fromhex(head["head"])).hex() == head["pae"]
    body = root["size"].to_bytes(8, "big") + bytes.fromhex(root["root"])
    assert pae(ROOT, body).hex() == root["pae"]


def test_the_trees_of_the_rfc() -> None:
    leaves = [hash_of(b"\x00" + bytes.fromhex(one)) for one in FILES["merkle.json"]["entries"]]
    for tree in FILES["merkle.json"]["trees"]:
        root = mth(leaves[: tree["size"]])
        assert root.hex() == tree["root"]
        for index, path in enumerate(tree["paths"]):
            assert root_by_path(leaves[index], tree["size"], index, [bytes.fromhex(p) for p in path]) == root
    # The roots of one, three and eight entries, as certificate transparency logs publish them.
    published = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    for size, known in published.items():
        assert FILES["merkle.json"]["trees"][size - 1]["root"] == known
    wide = FILES["merkle.json"]["wide"]
    all_leaves = [hash_of(b"\x00" + n.to_bytes(2, "big")) for n in range(256)]
    assert mth(all_leaves).hex() == wide["root"]
    path = [bytes.fromhex(one) for one in wide["path"]]
    assert root_by_path(all_leaves[wide["index"]], 256, wide["index"], path).hex() == wide["root"]


def test_the_paths_of_the_rfcs_example_tree() -> None:
    """RFC 9162 section 2.1.5: seven entries; a to f and j are leaves, the other letters nodes."""
    a, b, c, d, e, f, j = (
        hash_of(b"\x00" + bytes.fromhex(one)) for one in FILES["merkle.json"]["entries"][:7]
    )
    g, h, i = hash_of(b"\x01" + a + b), hash_of(b"\x01" + c + d), hash_of(b"\x01" + e + f)
    k, m = hash_of(b"\x01" + g + h), hash_of(b"\x01" + i + j)
    paths = FILES["merkle.json"]["trees"][6]["paths"]
    wanted = {0: [b, h, m], 3: [c, g, m], 4: [f, j, k], 6: [i, k]}
    assert {n: paths[n] for n in wanted} == {n: [one.hex() for one in path] for n, path in wanted.items()}


def by_the_book(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["frame"])
    version, head, proof, chain, payload, via = msgpack.unpackb(frame)
    assert msgpack.packb([version, head, proof, chain, payload, via]) == frame
    fields = check_signed(head, proof, chain)
    assert fields["pd"] == hash_of(payload)
    parent = None
    for link_head, link_proof, link_chain in via:
        link = check_signed(link_head, link_proof, link_chain)
        assert link.get("par") == parent
        parent = hash_of(pae(HEAD, link_head))
    assert fields.get("par") == parent


def check_signed(head: bytes, proof: list[Any], chain: list[bytes]) -> dict[str, Any]:
    signature, size, index, path = proof
    root = root_by_path(hash_of(b"\x00" + pae(HEAD, head)), size, index, path)
    leaf = x509.load_der_x509_certificate(chain[0])
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    algorithm = {"secp256r1": SHA256(), "secp384r1": SHA384()}[key.curve.name]
    key.verify(signature, pae(ROOT, size.to_bytes(8, "big") + root), ec.ECDSA(algorithm))
    fields: dict[str, Any] = msgpack.unpackb(head)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [fields["iss"]]
    assert fields["x5t"] == hash_of(chain[0])
    issuers = [*chain[1:], bytes.fromhex(FRAMES["authority"])]
    for one, issuer in zip(chain, issuers, strict=True):
        x509.load_der_x509_certificate(one).verify_directly_issued_by(x509.load_der_x509_certificate(issuer))
    return fields


@pytest.mark.parametrize("vector", FRAMES["accepted"], ids=lambda one: one["name"])
def test_frames_verify_by_the_book(vector: dict[str, Any]) -> None:
    by_the_book(vector)


@pytest.mark.parametrize(
    "vector", [one for one in FRAMES["refused"] if one["step"] != "frame"], ids=lambda one: one["why"]
)
def test_wrong_frames_do_not_verify_by_the_book(vector: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, InvalidSignature, IndexError, ValueError, TypeError)):
        by_the_book(vector)
