"""A redrive: what lets a task that has failed begin anew, and how everybody sees that it did so by right.

An operator has the control role reissue a task that was given up. The new head names in ``att`` the attempt
which it lets begin, and has the task as its parent. The worker that begins that attempt writes this head,
with proof and chain, into its record ``working``. So whoever reads the log sees who brought the task back,
and nobody has to believe it of the worker: a ``working`` behind ``failed`` without a genuine reissue for just
that task and attempt is no record.
"""

from __future__ import annotations

import base64
from binascii import Error as Base64Error

from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
    Link,
    OpenedEnvelope,
    control_role,
    decode_link,
    encode_link,
)
from agentweave_bus.exceptions import MalformedEnvelopeError, SignatureRefusedError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["check_redrive", "origin_of", "redrive_evidence", "redriven_attempt"]


def redriven_attempt(head: Head) -> int:
    """Return the attempt that a head lets begin anew; 0 for what is no redrive."""
    return head.att if head.att and head.kind is Kind.REISSUE else 0


def redrive_evidence(reissue: Link) -> str:
    """Write a reissue as a record keeps it, without its payload."""
    return base64.b64encode(encode_link(reissue)).decode()


def check_redrive(
    verifier: EnvelopeVerifier,
    evidence: str | None,
    *,
    agent: SpiffeID,
    task_id: str,
    task: bytes,
    attempt: int,
    now_ms: int,
    stored_at_ms: int,
) -> None:
    """Make sure that the control role of ``agent``'s domain let ``attempt`` of just this task begin.

    ``task`` is the digest of the task's head; ``stored_at_ms`` is when the record with this evidence was
    stored, which must be while the redrive was good, as far as clocks may differ.

    Raises:
        EnvelopeError, IdentityError, FederationError: it did not, or that can't be told.

    """
    if evidence is None:
        raise MalformedEnvelopeError("a task that has failed begins again without a redrive")
    try:
        link = decode_link(base64.b64decode(evidence, validate=True))
    except (Base64Error, ValueError) as error:
        raise MalformedEnvelopeError("the redrive of a record is no link") from error
    head = link.head
    fits = (
        redriven_attempt(head) == attempt > 0
        and head.aud == agent
        and head.id == task_id
        and head.par == task
    )
    if not fits:
        raise MalformedEnvelopeError("the redrive is of another task or attempt")
    if head.iss != control_role(agent.trust_domain):
        raise SignatureRefusedError(f"{head.iss} may not redrive tasks of {agent}")
    slack_ms = verifier.limits.max_age_ms
    if not head.iat - slack_ms <= stored_at_ms < head.exp + slack_ms:
        raise MalformedEnvelopeError("the redrive was not good when its record was stored")
    # It proves what was let begin when it was signed; the certificate may well have expired since.
    verifier.verify_link(link, now_ms=now_ms, stored_at_ms=stored_at_ms)


def origin_of(request: OpenedEnvelope) -> Link:
    """Return the task itself: the last link of a reissue's delegation, and anything else as it came.

    Raises:
        MalformedEnvelopeError: a reissue has no such link, or another one than it was signed with.

    """
    if request.head.kind is not Kind.REISSUE:
        return request.link
    if not request.via or request.via[-1].digest != request.head.par:
        raise MalformedEnvelopeError("a reissue without the task that it reissues")
    return request.via[-1]
