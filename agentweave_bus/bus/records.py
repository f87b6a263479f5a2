"""What the audit log says of an envelope, a decision and an outcome.

One shape for both sides of a call, so that their logs can be laid beside each other: the digest of the
head is the same in both. ``witness`` carries the sender's signed statement about its own log, with the
head, proof and chain without which it would prove nothing.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any, Final

from agentweave_bus.authz import AuthzContext, AuthzDecision, EvidenceCheck, SignedNote
from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
    Link,
    LogWitness,
    OpenedEnvelope,
    Sealed,
    decode_link,
    encode_link,
)
from agentweave_bus.exceptions import TimeRefusedError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "WitnessNotes",
    "decision_facts",
    "envelope_facts",
    "evidence_check",
    "outcome_facts",
    "sealed_facts",
]

_MAX_NOTED_LOGS: Final = 4096

_MAX_NOTE_DELAY_MS: Final = 60_000
"""A call is admitted within 30 s of its signing, on clocks that differ by little."""
_STORED: Final = frozenset({Kind.TASK, Kind.EVENT, Kind.REISSUE})


class WitnessNotes:
    """What peers said of their own logs and is noted already, so that it is noted once.

    A log's statement changes when its owner has made more of it safe on disk, some twenty times a second at
    most; the calls between say the same again. Of each of 4,096 logs the last statement is known.
    """

    def __init__(self) -> None:
        self._noted: OrderedDict[tuple[SpiffeID, str], LogWitness] = OrderedDict()

    def is_news(self, head: Head) -> bool:
        """Say whether what ``head`` says of its sender's log is not noted yet; from now on it is."""
        if head.log is None:
            return False
        key = (head.iss, head.log[0])
        if self._noted.get(key) == head.log:
            return False
        self._noted[key] = head.log
        self._noted.move_to_end(key)
        if len(self._noted) > _MAX_NOTED_LOGS:
            self._noted.popitem(last=False)
        return True

    def forget(self, head: Head) -> None:
        """Take back that it was noted: the record could not be written."""
        if head.log is not None:
            self._noted.pop((head.iss, head.log[0]), None)


def envelope_facts(request: OpenedEnvelope, notes: WitnessNotes) -> dict[str, Any]:
    """Describe an envelope that was received and verified, with its witness where that is news."""
    facts = _head_facts(request.head, request.digest)
    if notes.is_news(request.head):
        facts["witness"] = _witness(request.head, request.link)
    return facts


def sealed_facts(sealed: Sealed) -> dict[str, Any]:
    """Describe an envelope that this process sends."""
    return _head_facts(sealed.head, sealed.digest)


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
    if decision.approval is not None:
        facts["approvers"] = list(decision.approval.approvers)
    return facts


def outcome_facts(digest: bytes, status: str, seconds: float, result: bytes) -> dict[str, Any]:
    """Describe how an admitted request ended; ``result`` is the digest of the head of its answer."""
    return {
        "event": "outcome",
        "digest": digest.hex(),
        "status": status,
        "ms": round(seconds * 1_000_000) / 1000,
        "result": result.hex(),
    }


def _head_facts(head: Head, digest: bytes) -> dict[str, Any]:
    return {
        "digest": digest.hex(),
        "id": head.id,
        "kind": str(head.kind),
        "iss": str(head.iss),
        "aud": str(head.aud),
        "cap": head.cap,
    }


def _witness(head: Head, link: Link) -> dict[str, Any]:
    assert head.log is not None  # it is news
    chain_id, sequence, last_hash = head.log
    return {
        "chain": chain_id,
        "seq": sequence,
        "hash": last_hash.hex(),
        "evidence": base64.b64encode(encode_link(link)).decode(),
    }


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
