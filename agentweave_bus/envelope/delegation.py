"""Delegation: who asked whom before, proved link by link.

``via`` holds the requests that led to this one, origin first, each as its sender signed it. Six rules
make it a chain; :func:`check_rules` holds 1 to 4 and 6, which need only heads, and the sealer applies it
to what it is about to sign. :func:`verify_delegation` adds rule 5, the signatures:

1. ``via``, ``par``, ``scope`` and ``prn`` stand only on requests, and every link is a request
2. each head names its parent's digest in ``par``, the origin has none; ``prn`` is the origin's alone
3. each link's recipient is the next head's sender
4. each link was unexpired when the next head was issued; time does not go back; a call does not outlive
   its parent
5. each link was signed by who it says, with a certificate good at that time and not long expired; the
   authority is in its bundle, or left it after a stream, or a control role, says that the link was there
6. a scope once set is kept and never widens, and each head stays inside its own

A *reissue* is the control role's new head for a stored task; its last link is that task. In a chain it
stands in the task's place: it is addressed to the same agent, for the same capability and payload, and
the task's sender remains who asked. What comes out has one :class:`VerifiedLink` for the two.

What a link proves is that its sender asked its recipient for exactly that. That this request serves it
can't be proved; ``scope`` is the limit on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from agentweave_bus.envelope.codec import occurrence_id
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, Head, Kind, Limits
from agentweave_bus.exceptions import (
    ChainRefusedError,
    DelegationRefusedError,
    FederationError,
    MalformedEnvelopeError,
    SignatureRefusedError,
)
from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentweave_bus.envelope.frame import Link
    from agentweave_bus.envelope.verification import EnvelopeVerifier, OpenedEnvelope
    from agentweave_bus.identity.chain import VerifiedChain

__all__ = [
    "REQUESTS",
    "Requester",
    "VerifiedLink",
    "check_rules",
    "control_role",
    "covers",
    "extend_via",
    "permits",
    "requester",
    "verify_delegation",
]

REQUESTS: Final = frozenset({Kind.CALL, Kind.TASK, Kind.EVENT, Kind.REISSUE})
"""The kinds that ask for something: only they can be a link, or have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedLink:
    """One request of a verified chain.

    For a task that was reissued, ``iss``, ``kind`` and ``digest`` are the task's, the rest the
    reissue's, and ``reissued_by`` is the control role. ``sender_expired`` says that the sender's
    certificates are no longer valid. ``principal`` stands on the origin only.
    """

    iss: SpiffeID
    aud: SpiffeID
    cap: str
    kind: Kind
    id: str
    iat: int
    exp: int
    digest: bytes
    scope: tuple[str, ...] | None
    principal: Mapping[str, str] | None
    sender_expired: bool
    reissued_by: SpiffeID | None = None

    def to_context(self) -> dict[str, Any]:
        """Return the link as a policy sees it in ``context.via``: JSON values, the digest in hex."""
        return {
            "iss": str(self.iss),
            "aud": str(self.aud),
            "cap": self.cap,
            "kind": self.kind.value,
            "id": self.id,
            "iat": self.iat,
            "exp": self.exp,
            "digest": self.digest.hex(),
            "scope": list(self.scope) if self.scope is not None else None,
            "sender_expired": self.sender_expired,
            "reissued_by": str(self.reissued_by) if self.reissued_by is not None else None,
        }


class Requester(NamedTuple):
    """Who asks with the envelope in hand, when reissues are seen through.

    ``iss`` is the caller for authorization and keys, ``digest`` that of the head which ``re`` of every
    answer names, ``via`` what led to it, and ``principal`` for whom the origin says that it acts.
    """

    iss: SpiffeID
    digest: bytes
    via: tuple[VerifiedLink, ...]
    principal: Mapping[str, str] | None
    sender_expired: bool
    reissued_by: SpiffeID | None


def verify_delegation(
    opened: OpenedEnvelope,
    verifier: EnvelopeVerifier,
    *,
    now_ms: int,
    stored_at_ms: int | None = None,
    judged_at_ms: int | None = None,
    link_grace_ms: int = DEFAULT_LIMITS.default_link_grace_ms,
) -> tuple[VerifiedLink, ...]:
    """Verify the chain of ``opened`` by all six rules; origin first, empty without ``via``.

    ``stored_at_ms`` is for what lay in a stream, which says that it was there then: the authority of a link
    may have left its bundle since. What comes live has none, and is checked by the bundles of now alone.
    ``judged_at_ms`` is the time at which senders may have expired by the grace; now, unless it is given.

    When the envelope itself is a reissue, the last link is the task for which it stands; use
    :func:`requester` to see through that.

    Raises:
        DelegationRefusedError: ``rule`` says which one is broken. Where a link's own verification
            failed, that error is the cause.

    """
    head, via = opened.head, opened.via
    check_rules(head, via, verifier.limits)
    if not via:
        return ()
    heads = [link.head for link in via] + [head]
    times = _times(heads, now_ms if judged_at_ms is None else judged_at_ms, stored_at_ms)
    senders = [
        _check_rule_5(link, verifier, at, now_ms, link_grace_ms) for link, at in zip(via, times, strict=True)
    ]
    return _logical_links(heads, via, senders, now_ms)


def extend_via(opened: OpenedEnvelope) -> tuple[Link, ...]:
    """Return the ``via`` of whatever is asked of others while ``opened`` is handled.

    Raises:
        DelegationRefusedError: rule 1, it is no request.

    """
    if opened.head.kind not in REQUESTS:
        raise DelegationRefusedError(f"a {opened.head.kind} is no request to act on", rule=1)
    return (*opened.via, opened.link)


def requester(
    opened: OpenedEnvelope, links: tuple[VerifiedLink, ...], *, sender_expired: bool = False
) -> Requester:
    """Say who asks: the sender of ``opened``, or of the task for which a reissue stands.

    ``links`` is what :func:`verify_delegation` returned, ``sender_expired`` what
    :func:`.verification.check_time_stored` did.
    """
    head = opened.head
    principal = links[0].principal if links else head.prn
    if head.kind is not Kind.REISSUE:
        return Requester(
            iss=head.iss,
            digest=opened.digest,
            via=links,
            principal=principal,
            sender_expired=sender_expired,
            reissued_by=None,
        )
    task = links[-1]
    return Requester(
        iss=task.iss,
        digest=task.digest,
        via=links[:-1],
        principal=principal,
        sender_expired=task.sender_expired,
        reissued_by=head.iss,
    )


def control_role(trust_domain: str) -> SpiffeID:
    """Return the identity of a trust domain's control role, which alone may reissue its tasks."""
    return SpiffeID.of(trust_domain, "agentweave", "control")


# --- scope ----------------------------------------------------------------------------------------


def covers(parent_entry: str, child_entry: str) -> bool:
    """Whether one scope entry allows all that another does: ``id#*`` covers ``id#cap`` and ``id#*``."""
    if parent_entry == child_entry:
        return True
    agent, _, name = parent_entry.partition("#")
    return name == "*" and child_entry.partition("#")[0] == agent


def permits(scope: Sequence[str], aud: SpiffeID | str, cap: str) -> bool:
    """Whether ``scope`` allows to ask ``aud`` for ``cap``."""
    return f"{aud}#{cap}" in scope or f"{aud}#*" in scope


# --- rules 1 to 4 and 6: heads only ------------------------------------------------------------------


def check_rules(head: Head, via: Sequence[Link], limits: Limits = DEFAULT_LIMITS) -> None:
    """Check all that heads alone can show: rules 1 to 4 and 6.

    Raises:
        DelegationRefusedError: ``rule`` says which one is broken.

    """
    delegated = bool(via) or head.par is not None
    if not delegated and head.scope is None and head.prn is None and head.kind is not Kind.REISSUE:
        return
    _check_rule_1(head, via, limits)
    heads = _check_rule_2(head, via)
    for number, (parent, child) in enumerate(pairwise(heads)):
        standing_for = heads[number - 1] if number else None
        _check_rule_3(parent, child, standing_for)
        _check_rule_4(parent, child, limits)
    if head.kind is Kind.REISSUE and not via:
        raise DelegationRefusedError("a reissue without the task that it reissues", rule=3)
    _check_rule_6(heads)


def _check_rule_1(head: Head, via: Sequence[Link], limits: Limits) -> None:
    if head.kind not in REQUESTS:
        raise DelegationRefusedError(f"a {head.kind} has no via, par, scope or prn", rule=1)
    if len(via) > limits.max_via_links:
        raise DelegationRefusedError(f"a request is delegated at most {limits.max_via_links} times", rule=1)


def _check_rule_2(head: Head, via: Sequence[Link]) -> list[Head]:
    """Follow the digests from the verified head back to the origin; only then is a link parsed."""
    heads = [head]
    for link in reversed(via):
        if heads[-1].par != link.digest:
            raise DelegationRefusedError(f"{heads[-1].iss}'s head does not follow on its link", rule=2)
        heads.append(_parsed(link))
    if heads[-1].par is not None:
        raise DelegationRefusedError("the first head has a parent: the origin was cut off", rule=2)
    if any(one.prn is not None for one in heads[:-1]):
        raise DelegationRefusedError("only the origin of a chain names a principal", rule=2)
    heads.reverse()
    return heads


def _parsed(link: Link) -> Head:
    try:
        head = link.head
    except MalformedEnvelopeError as error:
        raise DelegationRefusedError(f"a link is malformed: {error}", rule=1) from error
    if head.kind not in REQUESTS:
        raise DelegationRefusedError(f"a {head.kind} is no request, so nothing follows from it", rule=1)
    return head


def _check_rule_3(parent: Head, child: Head, before_parent: Head | None) -> None:
    if child.kind is Kind.REISSUE:
        _check_reissue(parent, child)
    elif parent.kind is Kind.EVENT:
        _check_event_link(parent)
    elif parent.aud != child.iss:
        raise DelegationRefusedError(f"{child.iss} acts on a request to {parent.aud}", rule=3)
    if parent.kind is Kind.REISSUE and before_parent is None:
        raise DelegationRefusedError("a reissue without the task that it reissues", rule=3)


def _check_event_link(event: Head) -> None:
    domain = event.iss.trust_domain.replace(".", "=")
    agent = event.iss.path[1:].replace(".", "=")
    if (
        event.sub != f"aw.event.{domain}.{agent}.{event.cap}"
        or event.aud.trust_domain != event.iss.trust_domain
    ):
        raise DelegationRefusedError(f"an event of {event.iss} on a subject that is not its own", rule=3)


def _check_reissue(task: Head, reissue: Head) -> None:
    if task.kind is not Kind.TASK:
        raise DelegationRefusedError(f"a {task.kind} can't be reissued", rule=3)
    if reissue.iss != control_role(reissue.aud.trust_domain):
        raise DelegationRefusedError(f"{reissue.iss} is not the control role that may reissue", rule=3)
    for name in ("aud", "cap", "pd", "ct", "scope"):
        if getattr(task, name) != getattr(reissue, name):
            raise DelegationRefusedError(f"the reissue changes {name!r} of the task", rule=3)
    if reissue.id != task.id and not _is_occurrence(task, reissue):
        raise DelegationRefusedError("the reissue has an id that is not the task's", rule=3)


def _is_occurrence(task: Head, reissue: Head) -> bool:
    if task.every is None or reissue.nbf is None:
        return False
    return reissue.id == occurrence_id(task.id, reissue.nbf)


def _check_rule_4(parent: Head, child: Head, limits: Limits) -> None:
    if child.iat < parent.iat - limits.clock_slack_ms:
        raise DelegationRefusedError("a head was issued before the one on which it follows", rule=4)
    if child.kind is Kind.REISSUE:
        return  # bringing an expired task back is what it is for
    if child.iat >= parent.exp:
        raise DelegationRefusedError(f"{child.iss} acted on a request that had expired", rule=4)
    if child.kind is Kind.CALL and child.exp > parent.exp:
        raise DelegationRefusedError("a call has a later end than the request it serves", rule=4)


def _check_rule_6(heads: Sequence[Head]) -> None:
    if heads[0].prn is not None and heads[0].scope is None:
        raise DelegationRefusedError("a head that names a principal limits its scope", rule=6)
    for head in heads:
        if head.scope is not None and not permits(head.scope, head.aud, head.cap):
            raise DelegationRefusedError(f"{head.aud}#{head.cap} is outside the scope", rule=6)
    for parent, child in pairwise(heads):
        if parent.scope is not None:
            _check_narrower(parent.scope, child)


def _check_narrower(scope: tuple[str, ...], child: Head) -> None:
    if child.scope is None:
        raise DelegationRefusedError(f"{child.iss} dropped the scope of the request before it", rule=6)
    for entry in child.scope:
        if not any(covers(one, entry) for one in scope):
            raise DelegationRefusedError(f"{child.iss} widened the scope by {entry}", rule=6)


# --- rule 5: signatures -----------------------------------------------------------------------------


class _Times(NamedTuple):
    """By which times a link is judged.

    At ``reference_ms`` its sender may have expired by the grace only. ``there_ms`` is when it was there by
    another's word than its own, ``None`` if nobody says so.
    """

    reference_ms: int
    there_ms: int | None


def _times(heads: Sequence[Head], judged_at_ms: int, stored_at_ms: int | None) -> list[_Times]:
    """Return the times for each link.

    For what lies before a reissue both are the ``iat`` of the task reissued, because the control role
    judged it then.
    """
    times = []
    current = _Times(judged_at_ms, stored_at_ms)
    for number in range(len(heads) - 1, 0, -1):
        if heads[number].kind is Kind.REISSUE:
            current = _Times(heads[number - 1].iat, heads[number - 1].iat)
        times.append(current)
    times.reverse()
    return times


def _check_rule_5(
    link: Link, verifier: EnvelopeVerifier, at: _Times, now_ms: int, link_grace_ms: int
) -> VerifiedChain:
    if not 0 <= link_grace_ms <= verifier.limits.max_link_grace_ms:
        raise ValueError(f"link_grace_ms must be 0 to {verifier.limits.max_link_grace_ms}")
    try:
        sender = verifier.verify_link(link, now_ms=now_ms, stored_at_ms=at.there_ms)
    except (ChainRefusedError, FederationError, SignatureRefusedError) as error:
        raise DelegationRefusedError(f"{link.head.iss}'s link does not verify: {error}", rule=5) from error
    if sender.not_after_ms + link_grace_ms < at.reference_ms:
        expired_ms = at.reference_ms - sender.not_after_ms
        raise DelegationRefusedError(f"{sender.spiffe_id} expired {expired_ms} ms ago", rule=5)
    return sender


def _logical_links(
    heads: Sequence[Head], via: Sequence[Link], senders: Sequence[VerifiedChain], now_ms: int
) -> tuple[VerifiedLink, ...]:
    """One value for each request; a reissue is merged into the task before it."""
    links: list[VerifiedLink] = []
    for number, (link, sender) in enumerate(zip(via, senders, strict=True)):
        head = heads[number]
        if head.kind is Kind.REISSUE:
            links.pop()
            origin, origin_link, origin_sender = heads[number - 1], via[number - 1], senders[number - 1]
        else:
            origin, origin_link, origin_sender = head, link, sender
        by = heads[number + 1].iss if heads[number + 1].kind is Kind.REISSUE else None
        links.append(
            VerifiedLink(
                iss=origin.iss,
                aud=head.aud,
                cap=head.cap,
                kind=origin.kind,
                id=head.id,
                iat=head.iat,
                exp=head.exp,
                digest=origin_link.digest,
                scope=head.scope,
                principal=origin.prn,
                sender_expired=not origin_sender.valid_at(now_ms),
                reissued_by=head.iss if head.kind is Kind.REISSUE else by,
            )
        )
    return tuple(links)
