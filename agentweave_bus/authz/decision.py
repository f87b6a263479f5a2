"""What a policy is asked, and what it answers: two plain values.

:class:`AuthzContext` is everything that is known about an action when it is about to happen.
``to_input`` writes it in the shape that policies read, ``standing_input`` in the reduced shape over
which a *standing* answer may be given. :class:`AuthzDecision` is the answer.

This module knows no engine, no file and no network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "DEFAULT_WITHIN_S",
    "STANDING_CONTEXT_KEYS",
    "STANDING_KEYS",
    "STANDING_LINK_KEYS",
    "ApprovalTerms",
    "AuthzContext",
    "AuthzDecision",
    "Direction",
    "new_decision_id",
]

Direction: TypeAlias = Literal["inbound", "outbound"]

DEFAULT_WITHIN_S: Final = 86_400.0
"""How long an approval is waited for where the policy does not say (seconds)."""

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_OWN_KEYS: Final = frozenset(
    {
        "approval",
        "caller_trust_domain",
        "evidence",
        "kind",
        "payload",
        "principal",
        "reissued_by",
        "scope",
        "sender_expired",
        "stored_at",
        "task_id",
        "transport",
        "via",
    }
)

STANDING_KEYS: Final = ("caller_spiffe_id", "callee_spiffe_id", "action", "direction")
"""What a standing answer may depend on, beside the context: it holds for all requests that agree in it."""
STANDING_CONTEXT_KEYS: Final = ("kind", "transport", "caller_trust_domain", "scope", "principal", "via")
"""The same of ``context``."""
STANDING_LINK_KEYS: Final = ("iss", "aud", "cap", "kind")
"""The same of each link of ``context.via``."""


def new_decision_id() -> str:
    """Return a fresh random identifier of a decision (128 bits, hexadecimal)."""
    return os.urandom(16).hex()


@dataclass(frozen=True, slots=True)
class ApprovalTerms:
    """Whose approval a policy asks for, and until when.

    Attributes:
        approvers: exact SPIFFE IDs, or prefixes ending in ``/*``; one of them is enough.
        within: so many seconds from when it is asked for.
        until: milliseconds since the epoch; the earlier of the two holds.

    """

    approvers: tuple[str, ...]
    within: float = DEFAULT_WITHIN_S
    until: int | None = None

    def until_ms(self, now_ms: int) -> int:
        """Return until when, for what is asked for at ``now_ms`` (both in milliseconds since the epoch)."""
        latest = now_ms + int(self.within * 1000)
        return latest if self.until is None else min(latest, self.until)


@dataclass(frozen=True, slots=True, init=False)
class AuthzDecision:
    """Whether an action may happen, and why.

    ``AuthzDecision(allowed=True, reason="...")`` and ``AuthzDecision(allow=True, reason="...")`` mean
    the same, and both names can be read.

    Attributes:
        allowed: True only if the action may happen now.
        reason: one sentence for people.
        audit_id: names the audit record; empty until whoever writes that record has set it
            (``dataclasses.replace(decision, audit_id=...)``).
        limits: what the policy attached to its answer, such as ``{"max_per_minute": 60}``.
        revision: of the policy that answered; empty if none did.
        require_approval: the policy wants a person's approval first; ``allowed`` is then False.
        approval: whose, and until when; None where the policy does not say, and then nobody can give it.
        standing: an earlier answer was used again; ``decision_id`` is that of the earlier one.
        decision_id: names this answer of the policy.
        answered: the policy gave this answer. Where it is False, ``reason`` is about trouble of this
            process with its policy, which is no stranger's business.

    Raises:
        TypeError: the verdict is missing, is no ``bool``, or the two spellings contradict each other.

    """

    allowed: bool
    reason: str
    audit_id: str
    limits: Mapping[str, Any]
    revision: str
    require_approval: bool
    standing: bool
    decision_id: str
    answered: bool
    approval: ApprovalTerms | None

    def __init__(
        self,
        allowed: bool | None = None,
        reason: str = "",
        audit_id: str = "",
        *,
        limits: Mapping[str, Any] = _NOTHING,
        revision: str = "",
        require_approval: bool = False,
        standing: bool = False,
        decision_id: str = "",
        answered: bool = True,
        approval: ApprovalTerms | None = None,
        allow: bool | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "allowed", _verdict(allowed, allow))
        put(self, "reason", reason)
        put(self, "audit_id", audit_id)
        put(self, "limits", limits)
        put(self, "revision", revision)
        put(self, "require_approval", require_approval)
        put(self, "standing", standing)
        put(self, "decision_id", decision_id or new_decision_id())
        put(self, "answered", answered)
        put(self, "approval", approval)

    @property
    def allow(self) -> bool:
        """The same as ``allowed``."""
        return self.allowed

    def __bool__(self) -> bool:
        raise TypeError("a decision is not a truth value: read .allowed")


def _verdict(allowed: object, allow: object) -> bool:
    verdict = allow if allowed is None else allowed
    if type(verdict) is not bool:
        raise TypeError("a decision needs allowed=True or allowed=False (or allow=)")
    if allow is not None and allow is not verdict:
        raise TypeError("allowed= and allow= contradict each other")
    return verdict


@dataclass(frozen=True, kw_only=True, init=False)
class AuthzContext:
    """One action that somebody is about to take.

    Attributes:
        caller: verified SPIFFE ID of who asks.
        callee: SPIFFE ID of who is asked.
        action: a capability, an event's name, or an operator's act such as ``control:cancel``.
        direction: ``outbound`` at the caller, ``inbound`` at the callee.
        payload: the validated arguments as a JSON value; ``Decimal`` stands for a number.
        task_id: the envelope's ``id``.
        kind: of the envelope: ``call``, ``task``, ``event``, ``control``.
        transport: ``bus`` or ``a2a``.
        via: the verified delegation, origin first; each link a mapping with ``iss``, ``aud``, ``cap``,
            ``kind`` and whatever else was verified (``sender_expired``, ``reissued_by``, ...).
        principal: for whom the origin says that it acts.
        scope: the ``<SPIFFE ID>#<capability>`` pairs that the call is limited to.
        evidence: what proved the caller: ``envelope`` or ``tls``.
        stored_at: milliseconds since the epoch; when the broker stored a task or event.
        sender_expired: the sender's certificate has run out since it signed.
        reissued_by: the control role that brought the task back.
        approval: who has approved of exactly this task (``by``), when (``at``, milliseconds since the
            epoch) and why (``reason``), by the task's verified log.
        extra: further facts for the policy; they can't replace those above.

    """

    caller: str
    callee: str
    action: str
    direction: Direction
    payload: Any
    task_id: str
    kind: str
    transport: str
    via: Sequence[Mapping[str, Any]]
    principal: Mapping[str, Any] | None
    scope: Sequence[str] | None
    evidence: str
    stored_at: int | None
    sender_expired: bool
    reissued_by: str | None
    approval: Mapping[str, Any] | None
    extra: Mapping[str, Any]

    def __init__(
        self,
        *,
        caller: str,
        callee: str,
        action: str,
        direction: Direction,
        payload: Any = None,
        task_id: str = "",
        kind: str = "call",
        transport: str = "bus",
        via: Sequence[Mapping[str, Any]] = (),
        principal: Mapping[str, Any] | None = None,
        scope: Sequence[str] | None = None,
        evidence: str = "envelope",
        stored_at: int | None = None,
        sender_expired: bool = False,
        reissued_by: str | None = None,
        approval: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        # One is made for each call on both its sides. What dataclasses would write here, object.__setattr__
        # for each of the seventeen, costs twice as much; hence no slots, either.
        self.__dict__.update(
            caller=caller,
            callee=callee,
            action=action,
            direction=direction,
            payload=payload,
            task_id=task_id,
            kind=kind,
            transport=transport,
            via=via,
            principal=principal,
            scope=scope,
            evidence=evidence,
            stored_at=stored_at,
            sender_expired=sender_expired,
            reissued_by=reissued_by,
            approval=approval,
            extra={} if extra is None else extra,
        )

    @property
    def caller_trust_domain(self) -> str:
        """The trust domain of ``caller``; empty if that is no SPIFFE ID."""
        if isinstance(self.caller, SpiffeID):
            return self.caller.trust_domain
        scheme, _, rest = self.caller.partition("spiffe://")
        return "" if scheme else rest.partition("/")[0]

    @property
    def origin(self) -> str | None:
        """The SPIFFE ID with which the delegation began, or None for a call of the caller's own."""
        return self.via[0].get("iss") if self.via else None

    def to_input(self) -> dict[str, Any]:
        """Return the document that a policy sees as ``input``.

        What is not known is left out rather than null: in Rego a null is a value, and
        ``not input.context.principal`` would be false for it.
        """
        context = self._shared_facts()
        context["payload"] = self.payload
        context["task_id"] = self.task_id
        context["via"] = [dict(link) for link in self.via] if self.via else []
        context["evidence"] = self.evidence
        context["sender_expired"] = self.sender_expired
        if self.stored_at is not None:
            context["stored_at"] = self.stored_at
        if self.reissued_by is not None:
            context["reissued_by"] = self.reissued_by
        if self.approval is not None:
            context["approval"] = dict(self.approval)
        if self.extra:
            context |= {key: value for key, value in self.extra.items() if key not in _OWN_KEYS}
        return self._document(context)

    def standing_input(self) -> dict[str, Any]:
        """Return the reduced ``input`` of a policy's ``standing`` rule.

        It holds ``STANDING_KEYS``, and of the context ``STANDING_CONTEXT_KEYS``, with the links of ``via``
        reduced to ``STANDING_LINK_KEYS``; nothing else, so that an answer to it holds for every action
        that agrees in these.
        """
        context = self._shared_facts()
        context["via"] = [{key: link.get(key) for key in STANDING_LINK_KEYS} for link in self.via]
        return self._document(context)

    def _shared_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": self.kind,
            "transport": self.transport,
            "caller_trust_domain": self.caller_trust_domain,
        }
        if self.principal is not None:
            facts["principal"] = dict(self.principal)
        if self.scope is not None:
            facts["scope"] = list(self.scope)
        return facts

    def _document(self, context: dict[str, Any]) -> dict[str, Any]:
        return {
            "caller_spiffe_id": str(self.caller),
            "callee_spiffe_id": str(self.callee),
            "action": self.action,
            "direction": self.direction,
            "context": context,
        }
