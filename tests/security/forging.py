"""Making calls that no honest library would make, signed by whoever holds the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import Draft, Kind, Sealed, encode_payload, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.identity import X509Svid
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.probes import CLI, ECHO
from tests.unit.envelope.world import sign_head

PARTS = {"version": 0, "head": 1, "proof": 2, "chain": 3, "payload": 4, "via": 5}


def with_part(frame: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """Return a frame with one of its parts changed, still in canonical form."""
    parts = msgpack.unpackb(frame)
    parts[PARTS[name]] = change(parts[PARTS[name]])
    return bytes(msgpack.packb(parts))


def forged_call(svid: X509Svid, *, iss: SpiffeID = CLI, via: Any = (), **changes: Any) -> Sealed:
    """A call to echo's ``work``, signed with ``svid`` whatever the head says; ``changes`` are to the head."""
    now = clock_ms()
    payload = encode_payload({"text": "forged"})
    call_id = changes.pop("id", new_id(now))
    raw = changes.pop("raw", {})
    values: dict[str, Any] = {
        "kind": Kind.CALL,
        "id": call_id,
        "aud": ECHO,
        "cap": "work",
        "sub": call_subject(ECHO, "work"),
        "iat": now,
        "exp": now + 20_000,
        "reply": "A" * 22,
    } | changes
    par = via[-1].digest if via else None
    head = map_from_draft(Draft(**values), iss=iss, x5t=svid.x5t, pd=sha256(payload), par=par)
    head |= raw
    return sign_head(
        pack({key: value for key, value in head.items() if value is not None}), svid, payload, via
    )


def reply_of(sealed: Sealed, iss: SpiffeID = CLI) -> str:
    """The reply subject that the broker must name for a call."""
    assert sealed.head.reply is not None
    return reply_subject(iss, sealed.head.reply, sealed.head.id)
