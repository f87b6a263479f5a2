"""Making calls that no honest library would make, signed by whoever holds the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import Draft, Kind, Link, Proof, Sealed, encode_payload, head_digest, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import protected_head, sha256
from agentweave_bus.envelope.head import map_from_draft, parse_head
from agentweave_bus.envelope.merkle import leaf_hash
from agentweave_bus.envelope.verification import protected_root
from agentweave_bus.exceptions import MalformedEnvelopeError
from agentweave_bus.identity import X509Svid
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.probes import CLI, ECHO
from tests.security.certificates import Papers, signature

PARTS = {"version": 0, "head": 1, "proof": 2, "chain": 3, "payload": 4, "via": 5}
HONEST = {"text": "forged"}


def with_part(frame: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """Return a frame with one of its parts changed, still in canonical form."""
    parts = msgpack.unpackb(frame)
    parts[PARTS[name]] = change(parts[PARTS[name]])
    return bytes(msgpack.packb(parts))


def forged_head(
    svid: X509Svid | Papers, payload: bytes, *, iss: SpiffeID = CLI, via: Any = (), **changes: Any
) -> dict[str, Any]:
    """The head of a call to echo's ``work`` that is honest but for ``changes``; ``raw`` are to its map."""
    now = clock_ms()
    raw = changes.pop("raw", {})
    values: dict[str, Any] = {
        "kind": Kind.CALL,
        "id": new_id(now),
        "aud": ECHO,
        "cap": "work",
        "sub": call_subject(ECHO, "work"),
        "iat": now,
        "exp": now + 20_000,
        "reply": "A" * 22,
    } | changes
    par = via[-1].digest if via else None
    head = map_from_draft(Draft(**values), iss=iss, x5t=svid.x5t, pd=sha256(payload), par=par)
    return {key: value for key, value in (head | raw).items() if value is not None}


def sealed_by(
    svid: X509Svid | Papers,
    head: bytes,
    payload: bytes,
    via: Any = (),
    *,
    chain: tuple[bytes, ...] | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> Sealed:
    """A frame around any bytes as head and payload, whose signature covers them. No bound is checked."""
    covered = protected_root(1, leaf_hash(protected_head(head)))
    made = signature(svid.private_key, covered) if sign is None else sign(covered)
    link = Link(head, Proof(made, 1, 0, ()), svid.cert_chain if chain is None else chain)
    frame = pack([1, *link.to_wire(), payload, [one.to_wire() for one in via]])
    try:
        parsed = parse_head(head)
    except MalformedEnvelopeError:
        parsed = None  # type: ignore[assignment]  # the attack is a head that does not parse
    return Sealed(frame, parsed, head_digest(head), link)


def forged_call(
    svid: X509Svid | Papers,
    *,
    iss: SpiffeID = CLI,
    via: Any = (),
    payload: bytes | None = None,
    chain: tuple[bytes, ...] | None = None,
    sign: Callable[[bytes], bytes] | None = None,
    **changes: Any,
) -> Sealed:
    """A call to echo's ``work``, signed with ``svid`` whatever the head says; ``changes`` are to the head."""
    body = encode_payload(HONEST) if payload is None else payload
    head = forged_head(svid, body, iss=iss, via=via, **changes)
    return sealed_by(svid, pack(head), body, via, chain=chain, sign=sign)


def reply_of(sealed: Sealed, iss: SpiffeID = CLI) -> str:
    """The reply subject that the broker must name for a call."""
    assert sealed.head.reply is not None
    return reply_subject(iss, sealed.head.reply, sealed.head.id)


def link_of(svid: X509Svid | Papers, iss: SpiffeID, aud: SpiffeID, cap: str = "relay", **more: Any) -> Link:
    """What stays of a call by ``iss`` to ``aud`` when it is carried on."""
    values = {"sub": call_subject(aud, cap), **more}
    return forged_call(svid, iss=iss, aud=aud, cap=cap, **values).link
