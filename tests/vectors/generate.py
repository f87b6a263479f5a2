"""Write the known-answer vectors beside this file: ``python -m tests.vectors.generate``.

Keys, serial numbers, dates and ids are fixed and signatures deterministic (RFC 6979), so the files come
out the same every time; a test compares. Whoever implements the format in another language checks
against the files, which need nothing of this package.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgpack
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    Draft,
    EnvelopeVerifier,
    Head,
    Kind,
    Link,
    Sealed,
    Sealer,
    claim_key,
    encode_payload,
    extend_via,
    occurrence_id,
    pae,
)
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import protected_head
from agentweave_bus.envelope.merkle import Tree, leaf_hash, root_from_path
from agentweave_bus.envelope.verification import protected_root
from agentweave_bus.exceptions import FederationError
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.chain import ChainVerifier
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.spiffe_id import SpiffeID

HERE = Path(__file__).parent
DOMAIN = "acme.example"
START = datetime(2025, 1, 1, tzinfo=UTC)
NOW = int(START.timestamp() * 1000) + 3_600_000

CLIENT, GATEWAY, ORDER = (SpiffeID.of(DOMAIN, "agent", name) for name in ("client", "gateway", "order"))
CONTROL = SpiffeID.of(DOMAIN, "agentweave", "control")


# --- identities with fixed keys -----------------------------------------------------------------------


class FixedKey:
    """A private key whose signatures are deterministic."""

    def __init__(self, curve: ec.EllipticCurve, secret: int) -> None:
        self.key = ec.derive_private_key(secret, curve)
        self.curve = curve
        self.secret = secret

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self.key.public_key()

    def sign(self, data: bytes, algorithm: ec.ECDSA) -> bytes:
        hashing = algorithm.algorithm
        assert isinstance(hashing, HashAlgorithm)
        return self.key.sign(data, ec.ECDSA(hashing, deterministic_signing=True))


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def usage(*, leaf: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=leaf,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not leaf,
        crl_sign=not leaf,
        encipher_only=False,
        decipher_only=False,
    )


class FixedAuthority:
    """A root, and an intermediate that signs leaves with fixed keys."""

    def __init__(self) -> None:
        self.root_key = FixedKey(ec.SECP256R1(), 0xA1)
        self.middle_key = FixedKey(ec.SECP256R1(), 0xA2)
        self.root = self._ca("vectors root", 1, self.root_key, "vectors root", self.root_key)
        self.middle = self._ca("vectors intermediate", 2, self.middle_key, "vectors root", self.root_key)

    def _ca(
        self, subject: str, serial: int, key: FixedKey, issuer: str, signer: FixedKey
    ) -> x509.Certificate:
        domain = x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}")
        builder = (
            self._builder(subject, serial, key, issuer, signer)
            .add_extension(x509.SubjectAlternativeName([domain]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage(leaf=False), critical=True)
        )
        return builder.sign(signer.key, SHA256(), ecdsa_deterministic=True)

    def issue(self, who: SpiffeID, serial: int, key: FixedKey, *, through_middle: bool = False) -> X509Svid:
        issuer, signer = (
            ("vectors intermediate", self.middle_key) if through_middle else ("vectors root", self.root_key)
        )
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = (
            self._builder(str(who), serial, key, issuer, signer)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(who)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(leaf=True), critical=True)
            .add_extension(both, critical=False)
        )
        leaf = builder.sign(signer.key, SHA256(), ecdsa_deterministic=True)
        chain = [leaf, self.middle] if through_middle else [leaf]
        return X509Svid.from_der([one.public_bytes(Encoding.DER) for one in chain], key)  # type: ignore[arg-type]

    def _builder(
        self, subject: str, serial: int, key: FixedKey, issuer: str, signer: FixedKey
    ) -> x509.CertificateBuilder:
        signer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        return (
            x509.CertificateBuilder(name(issuer), name(subject), key.public_key(), serial)
            .not_valid_before(START)
            .not_valid_after(START + timedelta(days=3650))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(signer_id, critical=False)
        )


AUTHORITY = FixedAuthority()
SVIDS = {
    CLIENT: AUTHORITY.issue(CLIENT, 11, FixedKey(ec.SECP256R1(), 0xB1)),
    GATEWAY: AUTHORITY.issue(GATEWAY, 12, FixedKey(ec.SECP384R1(), 0xB2), through_middle=True),
    ORDER: AUTHORITY.issue(ORDER, 13, FixedKey(ec.SECP256R1(), 0xB3)),
    CONTROL: AUTHORITY.issue(CONTROL, 14, FixedKey(ec.SECP256R1(), 0xB4)),
}


class Trust:
    """The one bundle of the vectors."""

    bundle = X509Bundle(DOMAIN, (AUTHORITY.root,))

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        if trust_domain != DOMAIN:
            raise FederationError("not allowed", trust_domain=trust_domain)
        return self.bundle


def verifier() -> EnvelopeVerifier:
    return EnvelopeVerifier(ChainVerifier(Trust()))


# --- primitives -------------------------------------------------------------------------------------------


def dsse() -> dict[str, Any]:
    """DSSE's own example, signature included, and the two encodings that envelopes use."""
    body = b"hello world"
    return {
        "about": "Pre-authentication encoding. The first is the example of the DSSE protocol, with its key and its signature (r and s, 32 bytes each).",
        "dsse_example": {
            "payload_type": "http://example.com/HelloWorld",
            "body": body.hex(),
            "pae": pae(b"http://example.com/HelloWorld", body).hex(),
            "public_key_x": "46950820868899156662930047687818585632848591499744589407958293238635476079160",
            "public_key_y": "5640078356564379163099075877009565129882514886557779369047442380624545832820",
            "signature_r_s": "03726ab101ad56c2763b6c6aac8e487275e2a79193a09dc5f859d9f8ef3c4a3b51eab0c06a369b64a7222537d4887a893dc200ae21060074d57825235b624864",
        },
        "head": {"head": b"\x80".hex(), "pae": protected_head(b"\x80").hex()},
        "root": {"size": 3, "root": (b"\x11" * 32).hex(), "pae": protected_root(3, b"\x11" * 32).hex()},
    }


ENTRIES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]


def merkle() -> dict[str, Any]:
    """Tree heads and inclusion paths of RFC 9162, over the entries that its implementations test with."""
    leaves = [leaf_hash(bytes.fromhex(one)) for one in ENTRIES]
    trees = [Tree(leaves[:size]) for size in range(1, len(leaves) + 1)]
    wide = Tree([leaf_hash(n.to_bytes(2, "big")) for n in range(256)])
    return {
        "about": "RFC 9162 section 2.1. trees[n-1] is over the first n entries; paths[i] is that of entry i.",
        "entries": ENTRIES,
        "trees": [
            {
                "size": tree.size,
                "root": tree.root.hex(),
                "paths": [[one.hex() for one in tree.path(index)] for index in range(tree.size)],
            }
            for tree in trees
        ],
        "wide": {
            "about": "256 entries; entry n is n in two bytes, big-endian",
            "root": wide.root.hex(),
            "index": 200,
            "path": [one.hex() for one in wide.path(200)],
        },
    }


def payloads() -> dict[str, Any]:
    good: list[Any] = [
        None,
        True,
        False,
        0,
        127,
        128,
        -1,
        -33,
        2**64 - 1,
        -(2**63),
        0.5,
        "",
        "é",
        [],
        [1, [2]],
    ]
    good += [{}, {"amount": "12.50", "items": [{"sku": "a-1", "n": 2}], "note": None}]
    bad = {
        "duplicate keys": "82a16101a16102",
        "number as key": "810101",
        "bytes": "c40161",
        "timestamp": "d6ff00000001",
        "extension": "d40500",
        "32-bit float": "ca3fc00000",
        "NaN": "cb7ff8000000000000",
        "infinity": "cb7ff0000000000000",
        "integer wider than needed": "cc01",
        "text wider than needed": "d90161",
        "list wider than needed": "dc000101",
        "lone surrogate": "a3eda080",
        "two values": "0101",
        "33 levels": "91" * 33 + "c0",
    }
    return {
        "about": "Payloads: JSON values as canonical msgpack. A receiver refuses every one of 'refused'.",
        "accepted": [{"value": one, "msgpack": encode_payload(one).hex()} for one in good],
        "refused": [{"why": why, "msgpack": data} for why, data in bad.items()],
    }


def keys() -> dict[str, Any]:
    one = "019421c4-f800-7000-8000-000000000001"
    return {
        "about": "Keys of claims, states and idempotency; ids of occurrences of recurring tasks.",
        "claim": {
            "iss": CLIENT,
            "aud": ORDER,
            "cap": "create_order",
            "id": one,
            "key": claim_key(CLIENT, ORDER, "create_order", one),
        },
        "occurrence": {"id": one, "at_ms": NOW, "occurrence_id": occurrence_id(one, NOW)},
    }


# --- frames -----------------------------------------------------------------------------------------------


def draft(number: int, aud: SpiffeID, **changes: Any) -> Draft:
    path = aud.path[1:].replace(".", "=")
    values: dict[str, Any] = {
        "kind": Kind.CALL,
        "id": f"019421c4-f800-7000-8000-{number:012x}",
        "aud": aud,
        "cap": "create_order",
        "sub": f"aw.call.acme=example.{path}.create_order",
        "iat": NOW,
        "exp": NOW + 30_000,
        "reply": "A" * 22,
    }
    said = {"ct": JSON_CONTENT_TYPE, **values, **changes}
    return Draft(**{key: said[key] for key in Head._fields if said.get(key) is not None})


def seal(iss: SpiffeID, one: Draft, value: Any, via: tuple[Link, ...] = ()) -> Sealed:
    return Sealer(lambda: SVIDS[iss]).seal_now(one, encode_payload(value), via)


def batch() -> list[Sealed]:
    async def run() -> list[Sealed]:
        sealer = Sealer(lambda: SVIDS[CLIENT])
        return await asyncio.gather(
            *(sealer.seal(draft(0x10 + n, ORDER), encode_payload({"n": n})) for n in range(5))
        )

    return asyncio.run(run())


def delegated() -> Sealed:
    scope = (f"{GATEWAY}#*", f"{ORDER}#create_order")
    principal = {"iss": "https://login.example", "sub": "alice"}
    first = seal(CLIENT, draft(0x20, GATEWAY, scope=scope, prn=principal, cap="checkout"), {"cart": 7})
    opened = verifier().open(first.frame, now_ms=NOW)
    inner = draft(0x21, ORDER, exp=NOW + 20_000, scope=(f"{ORDER}#create_order",))
    return seal(GATEWAY, inner, {"cart": 7}, extend_via(opened))


def reissued() -> Sealed:
    task = seal(CLIENT, draft(0x30, ORDER, kind=Kind.TASK, nbf=NOW + 10_000), {"n": 1})
    opened = verifier().open(task.frame, now_ms=NOW)
    later = draft(0x30, ORDER, kind=Kind.REISSUE, iat=NOW + 10_000, exp=NOW + 60_000)
    return seal(CONTROL, later, {"n": 1}, extend_via(opened))


def answered(request: Sealed) -> Sealed:
    sub = f"aw.inbox.acme=example.agent/client.{'A' * 22}.rpc.{request.head.id}"
    one = draft(0x40, CLIENT, kind=Kind.REPLY, sub=sub, re=request.digest, reply=None)
    return seal(ORDER, one, {"status": "completed"})


def described(title: str, sealed: Sealed) -> dict[str, Any]:
    version, head, proof, chain, payload, via = msgpack.unpackb(sealed.frame)
    leaf = leaf_hash(protected_head(head))
    root = root_from_path(leaf, size=proof[1], index=proof[2], path=proof[3])
    return {
        "name": title,
        "frame": sealed.frame.hex(),
        "version": version,
        "head": head.hex(),
        "head_map": plain(msgpack.unpackb(head)),
        "digest": sealed.digest.hex(),
        "proof": plain(proof),
        "leaf_hash": leaf.hex(),
        "root": root.hex(),
        "signed": protected_root(proof[1], root).hex(),
        "chain_certificates": len(chain),
        "payload": payload.hex(),
        "payload_value": msgpack.unpackb(payload),
        "via_digests": [Link(one[0], sealed.link.proof, ()).digest.hex() for one in via],
        "sender": sealed.head.iss,
    }


def plain(value: Any) -> Any:
    """Bytes as hex, also inside; JSON has none."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value


def frames() -> dict[str, Any]:
    single, several, nested = seal(CLIENT, draft(1, ORDER), {"amount": "12.50"}), batch(), delegated()
    again = reissued()
    good = [
        described("a call alone, P-256", single),
        described(
            "a call alone, P-384, with an intermediate certificate", seal(GATEWAY, draft(2, ORDER), [1, "é"])
        ),
        *(described(f"number {n} of a batch of five", several[n]) for n in (0, 2, 4)),
        described("a nested call with a link, a scope and a principal", nested),
        described("a reissue of a delayed task", again),
        described("a reply to the first call", answered(single)),
    ]
    return {
        "about": "Whole frames. Verify them at now_ms (the reissue 10 s later) against the one authority.",
        "now_ms": NOW,
        "trust_domain": DOMAIN,
        "authority": AUTHORITY.root.public_bytes(Encoding.DER).hex(),
        "private_keys": [
            {"spiffe_id": who, "curve": svid.private_key.curve.name, "d": hex(svid.private_key.secret)}  # type: ignore[attr-defined]
            for who, svid in SVIDS.items()
        ],
        "accepted": good,
        "refused": list(refused(single, several[2], nested)),
    }


Step = Literal["frame", "chain", "proof", "head", "delegation"]


def refused(single: Sealed, member: Sealed, nested: Sealed) -> list[dict[str, Any]]:
    """Frames that break one thing each, with the step that finds it."""

    def change(sealed: Sealed, edit: Any) -> str:
        parts = msgpack.unpackb(sealed.frame)
        edit(parts)
        return pack(parts).hex()

    def head(parts: list[Any], **changes: Any) -> None:
        parts[1] = pack(msgpack.unpackb(parts[1]) | changes)

    other = list(SVIDS[ORDER].cert_chain)
    cases: list[tuple[str, Step, str]] = [
        ("version 2", "frame", change(single, lambda p: p.__setitem__(0, 2))),
        ("a byte after the frame", "frame", single.frame.hex() + "c0"),
        ("the outer list wider than needed", "frame", "dc0006" + single.frame.hex()[2:]),
        ("index = size", "frame", change(member, lambda p: p[2].__setitem__(2, 5))),
        ("a certificate that is not on the path", "chain", change(single, lambda p: p[3].extend(other))),
        ("an expiry one millisecond later", "proof", change(single, lambda p: head(p, exp=NOW + 30_001))),
        ("the chain of another agent", "proof", change(single, lambda p: p.__setitem__(3, other))),
        ("the index of a neighbour", "proof", change(member, lambda p: p[2].__setitem__(2, 3))),
        ("a tree of another size", "proof", change(member, lambda p: p[2].__setitem__(1, 6))),
        ("a path in another order", "proof", change(member, lambda p: p[2][3].reverse())),
        ("a path that is too short", "proof", change(member, lambda p: p[2][3].pop())),
        ("another payload", "head", change(single, lambda p: p.__setitem__(4, b"\xc0"))),
        ("the link cut off", "delegation", change(nested, lambda p: p[5].clear())),
        (
            "a link to another request",
            "delegation",
            change(nested, lambda p: p[5].__setitem__(0, msgpack.unpackb(single.frame)[1:4])),
        ),
    ]
    return [{"why": why, "step": step, "frame": frame} for why, step, frame in cases]


def vectors() -> dict[str, dict[str, Any]]:
    """Everything, by file name."""
    return {
        "dsse.json": dsse(),
        "merkle.json": merkle(),
        "payloads.json": payloads(),
        "keys.json": keys(),
        "frames.json": frames(),
    }


def rendered(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    for file, content in vectors().items():
        (HERE / file).write_text(rendered(content))
