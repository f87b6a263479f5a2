"""What the audit log says of an envelope, a decision and an outcome.

One shape for both sides of a call, so that their logs can be laid beside each other: the digest of the
head is the same in both. ``witness`` carries the sender's signed statement about its own log, with the
head, proof and chain without which it would prove nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, Final

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Link,
    OpenedEnvelope,
    Sealed,
    decode_link,
    encode_link,
)
from agentweave_bus.exceptions import TimeRefusedError

__all__ = ["decision_facts", "envelope_facts", "evidence_check", "outcome_facts", "sealed_facts"]

_MAX_NOTE_DELAY_MS: Final = 60_000
"""A call is admitted within 30 s of its signing, on clocks that differ by little."""


def envelope_facts(request: OpenedEnvelope) -> dict[str, Any]:
    """Describe an envelope that was received and verified."""
    return _head_facts(request.head, request.digest, request.link)


def sealed_facts(sealed: Sealed) -> dict[str, Any]:
    """Describe an envelope that this process sends."""
    return _head_facts(sealed.head, sealed.digest, None)


def decision_facts(context: AuthzContext, decision: AuthzDecision) -> dict[str, Any]:
    """Describe what the policy was asked and what it answered."""
    facts: dict[str, Any] = {
        "caller": str(context.caller),
        "callee": str(context.callee),
        "action": context.action,
        "direction": context.direction,
        "allowed": decision.allowed,
        "reason": decision.reason,
        "revision": decision.revision,
        "decision_id": decision.decision_id,
        "input": context.to_input(),
    }
    if decision.standing:
        facts["reused"] = True
    return facts


def outcome_facts(digest: bytes, status: str, seconds: float, result: bytes) -> dict[str, Any]:
    """Describe how an admitted request ended; ``result`` is the digest of the head of its answer."""
    return {
        "event": "outcome",
        "digest": digest.hex(),
        "status": status,
        "ms": round(seconds * 1000, 3),
        "result": result.hex(),
    }


def _head_facts(head: Head, digest: bytes, link: Link | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "digest": digest.hex(),
        "id": head.id,
        "kind": head.kind.value,
        "iss": str(head.iss),
        "aud": str(head.aud),
        "cap": head.cap,
    }
    if head.log is not None and link is not None:
        chain_id, sequence, last_hash = head.log
        facts["witness"] = {
            "chain": chain_id,
            "seq": sequence,
            "hash": last_hash.hex(),
            "evidence": base64.b64encode(encode_link(link)).decode(),
        }
    return facts


def evidence_check(verifier: EnvelopeVerifier) -> Callable[[bytes, int], tuple[str, int, bytes] | None]:
    """Return what ``authz.verify_audit`` needs to check signatures: evidence in, signed statement out.

    Evidence is verified with the bundles that ``verifier`` has, as of the moment at which it was signed.
    The returned function raises ``AgentWeaveError`` for what does not verify.
    """

    def check(evidence: bytes, noted_ms: int) -> tuple[str, int, bytes] | None:
        link = decode_link(evidence)
        verifier.verify_link(link)
        if abs(noted_ms - link.head.iat) > _MAX_NOTE_DELAY_MS:
            raise TimeRefusedError(f"noted {noted_ms - link.head.iat} ms after it was signed")
        return link.head.log

    return check
