"""What the audit log says of an envelope, a decision and an outcome.

One shape for both sides of a call, so that their logs can be laid beside each other: the digest of the
head is the same in both. ``witness`` carries the sender's signed statement about its own log, with the
head, proof and chain without which it would prove nothing.
"""

from __future__ import annotations

import base64
from typing import Any, Final

from agentweave_bus.authz import AuthzContext, AuthzDecision, EvidenceCheck, SignedNote
from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
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
_STORED: Final = frozenset({Kind.TASK, Kind.EVENT, Kind.REISSUE})


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


def evidence_check(verifier: EnvelopeVerifier) -> EvidenceCheck:
    """Return what ``authz.verify_audit`` needs to check signatures: evidence in, signed statement out.

    Evidence is verified with the bundles that ``verifier`` has, as of the moment at which it was signed.
    It must have been noted soon after that: what waits in a stream (a task) before it expired, all else
    within a minute. The returned function raises ``AgentWeaveError`` for what does not verify.
    """

    def check(evidence: bytes, noted_ms: int) -> SignedNote:
        link = decode_link(evidence)
        sender = verifier.verify_link(link)
        head = link.head
        latest = head.exp if head.kind in _STORED else head.iat
        if not head.iat - _MAX_NOTE_DELAY_MS <= noted_ms <= latest + _MAX_NOTE_DELAY_MS:
            raise TimeRefusedError(f"noted {noted_ms - head.iat} ms after it was signed")
        return SignedNote(str(sender.spiffe_id), head.log)

    return check
