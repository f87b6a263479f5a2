"""Admission: the one gate through which a request reaches a handler.

Whatever brings requests in goes through it. The steps, in this order; the code carries the numbers:

 1. size: the frame is within bounds
 2. frame: it decodes, in canonical form
 3. chain: the sender's certificates verify against the bundle of its own trust domain; not revoked
 4. proof: the signature covers the head; issuer, certificate and payload are those that the head names
    (these three are compared when the head is parsed, and reported as this step)
 5. head: it parses strictly
 6. binding: kind, recipient, subject, reply subject, capability and content type are those
    of this arrival and of this agent
 7. delegation: the ``via`` chain verifies by its six rules
 8. time: issued lately, not expired
 9. replay: this head was not admitted before and, unless the capability is ``safe``, its (issuer, id)
    is claimed across replicas; between the two, room: the caller gets a place in which to be handled
10. payload: it decodes and is what the capability takes; defaults are filled in
11. authorization: peer restriction and policy, asked with that same validated payload
12. audit: the decision is written before anything runs
13. dispatch: the caller's, with the :class:`Admitted` that this gate returns

The first failure ends it with :class:`AdmissionRefusedError`, which says what may be told to whom. Up to
and including step 5 nobody is told: there is no verified requester. A replay is never answered.

What is not decided here: who may do what (the authorizer), and what a capability takes (its owner,
through the :class:`Capability` protocol). State is bounded: a replay filter, a table of claim rates,
what peers said last of their logs, and a count for each caller that has calls in flight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext, AuthzDecision
from agentweave_bus.bus.claim_rates import ClaimRates
from agentweave_bus.bus.claims import NEW_STREAM_S, ClaimOutcome, Claims, PendingClaim
from agentweave_bus.bus.occupancy import Occupancy
from agentweave_bus.bus.records import WitnessNotes, decision_facts, envelope_facts
from agentweave_bus.bus.refusal_rate import RefusalRate
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
    Link,
    OpenedEnvelope,
    ReplayFilter,
    VerifiedLink,
    check_time_now,
    claim_key,
    decode_payload,
    extend_via,
    requester,
    verify_delegation,
)
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuditError,
    DelegationRefusedError,
    EnvelopeError,
    FederationError,
    IdentityError,
    PayloadError,
    SignatureRefusedError,
)
from agentweave_bus.observability.metrics import Direction, Metrics
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "Admission",
    "AdmissionRefusedError",
    "Admitted",
    "Arrival",
    "Capability",
    "Step",
    "ValidatedPayload",
]

_log = logging.getLogger(__name__)

_NEW_STREAM_MS: Final = int(NEW_STREAM_S * 1000)
_BUSY_SECONDS: Final = 0.2
_CALL_KINDS: Final = frozenset({Kind.CALL})
_DENIED: Final = "not allowed"
_NO_ANSWER: Final = "the policy could not be asked"
_UNPROVED: Final = "the delegation does not verify"
_FAILED: Final = "not able to admit the call"
_BUSY: Final = "busy with your other calls; try again"
_NOT_READY: Final = "not ready to take this call; try again"


class Step(Enum):
    """The step at which a request was refused: its number above and its name in records and answers."""

    SIZE = (1, "size")
    FRAME = (2, "frame")
    CHAIN = (3, "chain")
    PROOF = (4, "proof")
    HEAD = (5, "head")
    BINDING = (6, "binding")
    DELEGATION = (7, "delegation")
    TIME = (8, "time")
    REPLAY = (9, "replay")
    ROOM = (9, "room")
    PAYLOAD = (10, "payload")
    AUTHORIZATION = (11, "authorization")
    AUDIT = (12, "audit")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label


class AdmissionRefusedError(AgentWeaveError):
    """A request was refused.

    ``step`` is where, ``reason`` the whole truth, for log and audit. ``told`` is what the requester may
    learn; ``None`` means that it gets no answer. ``request`` is the verified envelope, once there is
    one; ``facts`` and ``decision`` are there when a policy decided; ``retry_after`` is in seconds.
    ``audit_id`` names the record of the refusal.
    """

    def __init__(
        self,
        step: Step,
        reason: str,
        *,
        request: OpenedEnvelope | None = None,
        told: str | None = None,
        facts: AuthzContext | None = None,
        decision: AuthzDecision | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"refused at step {step.number} ({step.label}): {reason}")
        self.step = step
        self.reason = reason
        self.request = request
        self.told = told
        self.facts = facts
        self.decision = decision
        self.retry_after = retry_after
        self.audit_id = ""


class Arrival(NamedTuple):
    """How a frame came: the subject it was delivered on and the reply subject that the broker names."""

    subject: str
    reply: str


class ValidatedPayload(Protocol):
    """A payload that fits its capability. ``policy_payload`` is what the policy is asked about."""

    @property
    def policy_payload(self) -> Any:
        """The validated arguments in JSON form, defaults filled in, decimals as ``Decimal``."""


class Capability(Protocol):
    """What admission must know of a capability. ``agent.dispatch.BoundCapability`` is one."""

    @property
    def name(self) -> str:
        """The capability's name."""

    @property
    def safe(self) -> bool:
        """Whether running it twice does no harm, so that no claim is needed."""

    @property
    def content_type(self) -> str:
        """The content type of the payloads that it takes."""

    def validate(self, value: Any) -> ValidatedPayload:
        """Check a decoded payload. Raises :class:`PayloadError`."""

    def admits_peer(self, caller: SpiffeID) -> str | None:
        """Return why ``caller`` may not use it whatever the policy says, or ``None``."""


class Admitted(NamedTuple):
    """A request that has passed every step and may run now."""

    request: OpenedEnvelope
    capability: Capability
    payload: ValidatedPayload
    via: tuple[VerifiedLink, ...]
    links: tuple[Link, ...]
    """What a nested call must carry to prove that it serves this request."""
    decision: AuthzDecision
    audit_id: str
    """Names the record of the admission."""


class Admission:
    """The gate of one agent. See the module's docstring for the steps."""

    def __init__(
        self,
        *,
        me: SpiffeID,
        verifier: EnvelopeVerifier,
        capabilities: Mapping[str, Capability],
        authorizer: Authorizer,
        audit: AuditLog,
        claims: Claims,
        occupancy: Occupancy,
        metrics: Metrics,
        clock_ms: Callable[[], int],
    ) -> None:
        self._me = me
        self._verifier = verifier
        self._capabilities = capabilities
        self._authorizer = authorizer
        self._audit = audit
        self._claims = claims
        self._occupancy = occupancy
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._replays = ReplayFilter()
        self._rates = ClaimRates()
        self._unknown = RefusalRate()
        self._notes = WitnessNotes()

    async def admit(self, frame: bytes, arrival: Arrival) -> Admitted:
        """Take a frame through steps 1 to 12.

        What is admitted holds a place in ``occupancy`` until :meth:`leave`.

        Raises:
            AdmissionRefusedError: a step failed. It has been counted and audited already.

        """
        try:
            return await self._admit(frame, arrival, self._clock_ms())
        except AdmissionRefusedError as refusal:
            self._record_refusal(refusal)
            raise
        except Exception as fault:  # what nobody foresaw, before a place was taken: nobody is told
            unforeseen = _unforeseen(fault, None)
            self._record_refusal(unforeseen)
            raise unforeseen from fault

    def leave(self, admitted: Admitted) -> None:
        """Give back the place of an admitted request, when it has ended."""
        self._occupancy.leave(admitted.request.head.iss, len(admitted.request.frame))

    async def _admit(self, frame: bytes, arrival: Arrival, now_ms: int) -> Admitted:
        request = self._open(frame, now_ms)  # 1 to 5
        capability = await self._bind(request, arrival)  # 6
        via = self._delegation(request, now_ms)  # 7
        self._time(request, now_ms)  # 8
        self._filter(request, now_ms)  # 9, this process
        if not await self._occupancy.enter(request.head.iss, len(frame)):
            raise AdmissionRefusedError(
                Step.ROOM,
                "this caller has its share of the places, and of those who wait, or there are too many bytes",
                request=request,
                told=_BUSY,
                retry_after=_BUSY_SECONDS,
            )
        try:
            return await self._admit_caller(request, capability, via, now_ms)
        except BaseException as fault:
            self._occupancy.leave(request.head.iss, len(frame))
            if isinstance(fault, AdmissionRefusedError) or not isinstance(fault, Exception):
                raise
            raise _unforeseen(fault, request) from fault

    async def _admit_caller(
        self, request: OpenedEnvelope, capability: Capability, via: tuple[VerifiedLink, ...], now_ms: int
    ) -> Admitted:
        """Take steps 9 (across replicas) to 12 for a caller that has a place."""
        payload = await self._validate(request, capability, via)  # 10
        facts = self._facts(request, via, payload.policy_payload)
        decision = await self._claim_and_authorize(request, capability, facts, now_ms)  # 9 and 11
        audit_id = await self._record_admission(request, facts, decision, keep=not capability.safe)  # 12
        return Admitted(request, capability, payload, via, extend_via(request), decision, audit_id)

    def _open(self, frame: bytes, now_ms: int) -> OpenedEnvelope:
        """Take steps 1 to 5. Nobody is answered: who sent this is not known yet."""
        verifier = self._verifier
        step = Step.SIZE
        try:
            verifier.check_size(frame)
            step = Step.FRAME
            parts = verifier.decode_frame(frame)
            step = Step.CHAIN
            sender = verifier.check_chain(parts, at_ms=now_ms)
            step = Step.PROOF
            verifier.check_proof(parts, sender)
            step = Step.HEAD
            return verifier.parse_head(parts, sender)
        except (EnvelopeError, IdentityError, FederationError) as error:
            if isinstance(error, FederationError):
                self._metrics.federation_errors.inc()
            if isinstance(error, SignatureRefusedError):
                step = Step.PROOF
            raise AdmissionRefusedError(step, str(error)) from error

    async def _bind(self, request: OpenedEnvelope, arrival: Arrival) -> Capability:
        """Step 6: what the head says is what arrived here, and it is addressed to me."""
        head = request.head
        wrong = self._binding_fault(request, arrival)
        if wrong is not None:
            # Not answered: the reply subject is part of what is in doubt.
            raise AdmissionRefusedError(Step.BINDING, wrong, request=request)
        capability = self._capabilities.get(head.cap)
        if capability is None:
            told = f"unknown capability {head.cap!r}" if await self._is_granted(head) else _DENIED
            raise AdmissionRefusedError(
                Step.BINDING, f"no capability {head.cap!r}", told=told, request=request
            )
        if head.ct != capability.content_type:
            raise AdmissionRefusedError(
                Step.BINDING,
                f"content type {head.ct!r}",
                told=f"the content type must be {capability.content_type}",
                request=request,
            )
        return capability

    def _binding_fault(self, request: OpenedEnvelope, arrival: Arrival) -> str | None:
        head = request.head
        if head.kind not in _CALL_KINDS:
            return f"a {head.kind.value} does not travel on a call subject"
        if head.aud != self._me:
            return f"addressed to {head.aud}"
        if head.sub != arrival.subject or head.sub != call_subject(self._me, head.cap):
            return f"sealed for subject {head.sub}, arrived on {arrival.subject}"
        if head.reply is None or arrival.reply != reply_subject(head.iss, head.reply, head.id):
            return "the reply subject is not the one that was signed"
        return None

    def _delegation(self, request: OpenedEnvelope, now_ms: int) -> tuple[VerifiedLink, ...]:
        """Step 7."""
        try:
            return verify_delegation(request, self._verifier, now_ms=now_ms)
        except DelegationRefusedError as error:
            raise AdmissionRefusedError(
                Step.DELEGATION, f"rule {error.rule}: {error}", told=_UNPROVED, request=request
            ) from error

    def _time(self, request: OpenedEnvelope, now_ms: int) -> None:
        """Step 8."""
        try:
            check_time_now(request.head, now_ms)
        except EnvelopeError as error:
            raise AdmissionRefusedError(Step.TIME, str(error), told=str(error), request=request) from error

    def _filter(self, request: OpenedEnvelope, now_ms: int) -> None:
        """Step 9 within this process. A replay gets no answer: it would mislead its victim."""
        if self._replays.admit(request.digest, now_ms, request.head.iss):
            return
        known = request.digest in self._replays
        reason = "this envelope was admitted before" if known else "too many calls of this sender to remember"
        raise AdmissionRefusedError(Step.REPLAY, reason, request=request)

    async def _validate(
        self, request: OpenedEnvelope, capability: Capability, via: tuple[VerifiedLink, ...]
    ) -> ValidatedPayload:
        """Step 10. What is wrong with a payload is told only to who may use the capability at all."""
        try:
            return capability.validate(decode_payload(request.payload))
        except PayloadError as error:
            may = await self._authorizer.allows_action_in_general(self._facts(request, via))
            told = str(error) if may else _DENIED
            raise AdmissionRefusedError(Step.PAYLOAD, str(error), told=told, request=request) from error

    async def _claim_and_authorize(
        self, request: OpenedEnvelope, capability: Capability, facts: AuthzContext, now_ms: int
    ) -> AuthzDecision:
        """Take steps 9 and 11. They overlap only where the answer stands: who is denied claims nothing."""
        if (reason := capability.admits_peer(request.head.iss)) is not None:
            return self._allowed(request, facts, AuthzDecision(allowed=False, reason=reason))
        if capability.safe:
            return self._allowed(request, facts, await self._authorizer.authorize(facts))
        if not self._authorizer.stands_without_limits(facts):
            decision = self._allowed(request, facts, await self._authorizer.authorize(facts))
            await self._claim(request, now_ms)
            return decision
        pending = await self._begin_claim(request, now_ms)
        try:
            decision = await self._authorizer.authorize(facts)
            self._check_claim(request, await pending.outcome())
        finally:
            pending.abandon()
        return self._allowed(request, facts, decision)

    async def _claim(self, request: OpenedEnvelope, now_ms: int) -> None:
        self._check_claim(request, await (await self._begin_claim(request, now_ms)).outcome())

    async def _begin_claim(self, request: OpenedEnvelope, now_ms: int) -> PendingClaim:
        """Send the claim, unless the sender claims too fast or the stream is too young to be sure."""
        head = request.head
        if not self._rates.take(head.iss, now_ms):
            raise self._not_ready(request, "claims of this sender come too fast", 1.0)
        created_ms = await self._claims.created_ms(now_ms)
        if created_ms is None:
            raise self._not_ready(request, "the claim stream does not answer", 1.0)
        if head.iat <= created_ms + _NEW_STREAM_MS:
            wait_ms = created_ms + _NEW_STREAM_MS - now_ms
            raise self._not_ready(
                request, "the claim stream is newer than the call", max(0, wait_ms) / 1000 + 0.1
            )
        return await self._claims.begin(claim_key(head.iss, head.aud, head.cap, head.id), request.digest)

    def _check_claim(self, request: OpenedEnvelope, outcome: ClaimOutcome) -> None:
        if outcome is ClaimOutcome.CLAIMED:
            raise AdmissionRefusedError(Step.REPLAY, "this id is claimed already", request=request)
        if outcome is not ClaimOutcome.HELD:
            raise self._not_ready(request, "the call could not be claimed", 1.0)

    def _not_ready(self, request: OpenedEnvelope, reason: str, retry_after: float) -> AdmissionRefusedError:
        return AdmissionRefusedError(
            Step.REPLAY, reason, told=_NOT_READY, request=request, retry_after=retry_after
        )

    def _allowed(
        self, request: OpenedEnvelope, facts: AuthzContext, decision: AuthzDecision
    ) -> AuthzDecision:
        self._metrics.decided(Direction.INBOUND, allowed=decision.allowed, standing=decision.standing)
        if not decision.allowed:
            raise AdmissionRefusedError(
                Step.AUTHORIZATION,
                decision.reason,
                told=decision.reason if decision.answered else _NO_ANSWER,
                request=request,
                facts=facts,
                decision=decision,
            )
        return decision

    async def _is_granted(self, head: Head) -> bool:
        facts = AuthzContext(caller=head.iss, callee=head.aud, action=head.cap, direction="inbound")
        return await self._authorizer.allows_action_in_general(facts)

    def _facts(
        self, request: OpenedEnvelope, via: tuple[VerifiedLink, ...], payload: Any = None
    ) -> AuthzContext:
        head = request.head
        asks = requester(request, via)
        return AuthzContext(
            caller=head.iss,
            callee=head.aud,
            action=head.cap,
            direction="inbound",
            payload=payload,
            task_id=head.id,
            kind=head.kind.value,
            transport="bus",
            via=[link.to_context() for link in via],
            principal=asks.principal,
            scope=head.scope,
        )

    async def _record_admission(
        self, request: OpenedEnvelope, facts: AuthzContext, decision: AuthzDecision, *, keep: bool
    ) -> str:
        """Step 12: written before anything runs; when that fails, nothing runs. Returns the record's id."""
        record = {
            "event": "admission",
            **envelope_facts(request, self._notes),
            **decision_facts(facts, decision),
        }
        try:
            if keep:
                self._audit.keep_frame(request.digest, request.frame)
            entry = await self._audit.record(record)
        except AuditError as error:
            self._notes.forget(request.head)
            self._metrics.audit_write_failures.inc()
            raise AdmissionRefusedError(
                Step.AUDIT, str(error), told="not able to record the call", request=request
            ) from error
        return entry.audit_id

    def _record_refusal(self, refusal: AdmissionRefusedError) -> None:
        """Count, log once and audit. A refusal stands also when its record can't be written."""
        step = refusal.step
        self._metrics.admission_refused(step.label, "denied" if refusal.decision is not None else "refused")
        unwritten = 0 if refusal.request is not None else self._unknown.take(self._clock_ms())
        if unwritten is None:
            return
        record: dict[str, Any] = {
            "event": "refusal",
            "step": step.number,
            "step_name": step.label,
            "reason": refusal.reason,
        }
        if unwritten:
            record["unwritten"] = unwritten
        if refusal.request is not None:
            record |= envelope_facts(refusal.request, self._notes)
        if refusal.facts is not None and refusal.decision is not None:
            record |= decision_facts(refusal.facts, refusal.decision)
        try:
            refusal.audit_id = self._audit.append(record).audit_id
        except AuditError as error:
            self._metrics.audit_write_failures.inc()
            _log.error("a refusal could not be recorded: %s", error)
        _log.warning("%s", refusal, extra={"audit_id": refusal.audit_id})


def _unforeseen(fault: Exception, request: OpenedEnvelope | None) -> AdmissionRefusedError:
    """Make a refusal of what failed in a way that no step knows of: told to the log, not to the caller."""
    _log.error("a call could not be admitted for a fault of our own", exc_info=fault)
    reason = f"admission failed ({type(fault).__name__})"
    return AdmissionRefusedError(Step.AUTHORIZATION, reason, request=request, told=_FAILED)
