"""A small world for envelope tests: an authority, agents with SVIDs, and ways to seal what is wrong.

``NOW`` is a fixed moment; certificates are issued around it, so no test reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agentweave_bus.envelope import (
    Draft,
    EnvelopeVerifier,
    Kind,
    Link,
    OpenedEnvelope,
    Proof,
    Sealed,
    Sealer,
    decode_payload,
    encode_payload,
    extend_via,
    head_digest,
    new_id,
)
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import protected_head, sha256
from agentweave_bus.envelope.frame import encode_frame
from agentweave_bus.envelope.head import map_from_draft, parse_head
from agentweave_bus.envelope.merkle import leaf_hash
from agentweave_bus.envelope.verification import protected_root, signature_algorithm
from agentweave_bus.exceptions import FederationError
from agentweave_bus.identity.authority import Authority
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.chain import ChainVerifier
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.spiffe_id import SpiffeID

START = datetime(2025, 1, 1, tzinfo=UTC)
NOW = int(START.timestamp() * 1000) + 3_600_000
"""One hour after the certificates of the world begin, in milliseconds."""

HOUR = 3_600_000
DOMAIN = "acme.example"


def agent(name: str, domain: str = DOMAIN) -> SpiffeID:
    return SpiffeID(f"spiffe://{domain}/agent/{name}")


CLIENT, GATEWAY, ORDER, PAYMENT = (agent(name) for name in ("client", "gateway", "order", "payment"))
CONTROL = SpiffeID(f"spiffe://{DOMAIN}/agentweave/control")


class Bundles:
    """A trust source of fixed bundles."""

    def __init__(self, *bundles: X509Bundle) -> None:
        self._bundles = {bundle.trust_domain: bundle for bundle in bundles}

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        if trust_domain not in self._bundles:
            raise FederationError("not allowed", trust_domain=trust_domain)
        return self._bundles[trust_domain]


@dataclass
class World:
    authority: Authority = field(
        default_factory=lambda: Authority(DOMAIN, not_before=START, lifetime=timedelta(days=30))
    )
    svids: dict[SpiffeID, X509Svid] = field(default_factory=dict)

    def svid(self, who: SpiffeID) -> X509Svid:
        if who not in self.svids:
            self.svids[who] = self.issue(who)
        return self.svids[who]

    def issue(self, who: SpiffeID, *, lifetime_ms: int = 24 * HOUR, **options: Any) -> X509Svid:
        options.setdefault("not_before", START)
        return self.authority.issue(who, lifetime=timedelta(milliseconds=lifetime_ms), **options)

    def verifier(self) -> EnvelopeVerifier:
        return EnvelopeVerifier(ChainVerifier(Bundles(self.authority.bundle)))

    def sealer(self, who: SpiffeID) -> Sealer:
        svid = self.svid(who)
        return Sealer(lambda: svid)

    def call(self, iss: SpiffeID, aud: SpiffeID, cap: str = "do", **changes: Any) -> Sealed:
        """Seal honestly: through the sealer, which refuses what it must."""
        via, svid, payload = (
            changes.pop("via", ()),
            changes.pop("svid", None),
            changes.pop("payload", {"n": 1}),
        )
        one = svid or self.svid(iss)
        return Sealer(lambda: one).seal_now(draft(aud, cap, **changes), encode_payload(payload), via)

    def open(self, sealed: Sealed, *, now_ms: int = NOW) -> OpenedEnvelope:
        return self.verifier().open(sealed.frame, now_ms=now_ms)

    def forge(self, iss: SpiffeID, aud: SpiffeID, cap: str = "do", **changes: Any) -> Sealed:
        """Seal as a dishonest agent can: a valid signature over any head, also a wrong one.

        Keys given as ``None`` are left out; ``par`` and ``via`` are taken as they are given.
        """
        via = changes.pop("via", ())
        svid = changes.pop("svid", None) or self.svid(iss)
        payload = changes.pop("payload_bytes", encode_payload({"n": 1}))
        par = changes.pop("par", via[-1].digest if via else None)
        raw = changes.pop("raw", {})
        value = map_from_draft(draft(aud, cap, **changes), iss=iss, x5t=svid.x5t, pd=sha256(payload), par=par)
        value.update(raw)
        return sign_head(pack({k: v for k, v in value.items() if v is not None}), svid, payload, via)


def draft(aud: SpiffeID, cap: str = "do", **changes: Any) -> Draft:
    kind = changes.pop("kind", Kind.CALL)
    iat = changes.pop("iat", NOW)
    values: dict[str, Any] = {
        "kind": kind,
        "id": new_id(iat),
        "aud": aud,
        "cap": cap,
        "sub": "aw.call.acme=example.agent/x.do",
        "iat": iat,
        "exp": iat + 30_000,
    }
    return Draft(**(values | changes))


def sign_head(head_bytes: bytes, svid: X509Svid, payload: bytes, via: tuple[Link, ...] = ()) -> Sealed:
    """Sign any bytes as a head, in a tree of one."""
    root = leaf_hash(protected_head(head_bytes))
    signature = svid.private_key.sign(protected_root(1, root), signature_algorithm(svid.private_key.curve))
    link = Link(head_bytes, Proof(signature, 1, 0, ()), svid.cert_chain)
    frame = encode_frame(link, payload, via)
    try:
        head = parse_head(head_bytes)
    except Exception:
        head = None  # type: ignore[assignment]  # the test is about a head that does not parse
    return Sealed(frame, head, head_digest(head_bytes), link)


__all__ = [
    "CLIENT",
    "CONTROL",
    "DOMAIN",
    "GATEWAY",
    "HOUR",
    "NOW",
    "ORDER",
    "PAYMENT",
    "START",
    "Bundles",
    "World",
    "agent",
    "decode_payload",
    "draft",
    "extend_via",
    "sign_head",
]
