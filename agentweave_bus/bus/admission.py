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
10. payload: it decodes and is what the capability takes; defaults are filled in. That of a task may be a
    reference: then the grants, or a standing answer, and the room for large payloads come before it is
    fetched, and nothing of it is decoded before all of it is what was signed
11. authorization: peer restriction and policy, asked with that same validated payload
12. audit: the decision is written before anything runs
13. dispatch: the caller's, with the :class:`Admitted` that this gate returns

A task that was begun, and that step 11 denies since, may be let through to be undone and not run
(:meth:`Admission.undo_task`): without links, so that nothing is asked for on its behalf.

The first failure ends it with :class:`AdmissionRefusedError`, which says what may be told to whom. Up to
and including step 5 nobody is told: there is no verified requester. A replay is never answered.

What is not decided here: who may do what (the authorizer), and what a capability takes (its owner,
through the :class:`Capability` protocol). State is bounded: a replay filter, a table of claim rates,
what peers said last of their logs, and a count for each caller that has calls in flight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext, AuthzDecision
from agentweave_bus.bus.admitted import (
    Admitted,
    Arrival,
    Capability,
    OpenedTask,
    StoredArrival,
    ValidatedPayload,
)
from agentweave_bus.bus.blobs import Blobs
from agentweave_bus.bus.claim_rates import ClaimRates
from agentweave_bus.bus.claims import NEW_STREAM_S, ClaimOutcome, Claims, PendingClaim
from agentweave_bus.bus.occupancy import Occupancy
from agentweave_bus.bus.records import WitnessNotes, decision_facts, envelope_facts
from agentweave_bus.bus.refusal import AdmissionRefusedError, Step
from agentweave_bus.bus.refusal_rate import RefusalRate
from agentweave_bus.bus.subjects import Priority, call_subject, reply_subject, task_subject
from agentweave_bus.bus.task_payloads import TaskPayloads
from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
    OpenedEnvelope,
    ReplayFilter,
    VerifiedLink,
    check_time_now,
    check_time_stored,
    claim_key,
    control_role,
    decode_payload,
    extend_via,
    requester,
    verify_delegation,
)
from agentweave_bus.envelope.blob import BLOB_CONTENT_TYPE
from agentweave_bus.exceptions import (
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
    "OpenedTask",
    "Step",
    "StoredArrival",
    "ValidatedPayload",
]

_log = logging.getLogger(__name__)

_NEW_STREAM_MS: Final = int(NEW_STREAM_S * 1000)
_BUSY_SECONDS: Final = 0.2
_CALL_KINDS: Final = frozenset({Kind.CALL})
_TASK_KINDS: Final = frozenset({Kind.TASK, Kind.REISSUE})
_DENIED: Final = "not allowed"
_NOT_IN_GENERAL: Final = "neither a grant nor a standing answer of the policy allows it whatever the payload"
_NO_ANSWER: Final = "the policy could not be asked"
_UNPROVED: Final = "the delegation does not verify"
_FAILED: Final = "not able to admit the call"
_BUSY: Final = "busy with your other calls; try again"
_NOT_READY: Final = "not ready to take this call; try again"


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
        blobs: Blobs | None = None,
    ) -> None:
        self._me = me
        self._verifier = verifier
        self._capabilities = capabilities
        self._authorizer = authorizer
        self._audit = audit
        self._claims = claims
        self._occupancy = occupancy
        self._metrics = metrics
        metrics.declare_refusals(step.label for step in Step)
        self._clock_ms = clock_ms
        self._payloads = TaskPayloads(blobs)
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
            raise self._recorded(_unforeseen(fault, None)) from fault

    async def open_task(self, frame: bytes, arrival: StoredArrival, *, late: bool = False) -> OpenedTask:
        """Take a frame from the queue of tasks through steps 1 to 8.

        Step 9 is the caller's: what is recorded of the task says whether it may run. Then comes
        :meth:`admit_task`. ``late`` lets a task through whose time is over, to be undone and not run.

        Raises:
            AdmissionRefusedError: a step failed. It has been counted and audited already.

        """
        try:
            return await self._open_task(frame, arrival, self._clock_ms(), late=late)
        except AdmissionRefusedError as refusal:
            raise self._recorded(refusal) from refusal.__cause__
        except Exception as fault:
            raise self._recorded(_unforeseen(fault, None)) from fault

    async def admit_task(self, task: OpenedTask, *, approval: Mapping[str, Any] | None = None) -> Admitted:
        """Take a task that may run as far as its records go through steps 10 to 12. Raises as the above.

        ``approval`` is what a policy is told of the approval that the task's verified log holds.
        """
        try:
            return await self._admit_task(task, approval)
        except AdmissionRefusedError as refusal:
            raise self._recorded(refusal) from refusal.__cause__
        except Exception as fault:
            raise self._recorded(_unforeseen(fault, task.request)) from fault

    async def undo_task(self, task: OpenedTask, decision: AuthzDecision) -> Admitted:
        """Take a task that was begun, and that ``decision`` denies since, through steps 10 and 12.

        It may not run: what it did is undone. It comes out without links, so that nothing is asked for on
        its behalf any more. Raises as :meth:`admit_task`.
        """
        try:
            return await self._admit_task(task, None, denied=decision)
        except AdmissionRefusedError as refusal:
            raise self._recorded(refusal) from refusal.__cause__
        except Exception as fault:
            raise self._recorded(_unforeseen(fault, task.request)) from fault

    def leave_task(self, admitted: Admitted) -> None:
        """Give back the room of a task's large payload, when it has ended here."""
        if admitted.blob_bytes:
            sender = requester(admitted.request, admitted.via).iss
            self._payloads.leave(sender, admitted.blob_bytes)

    def leave(self, admitted: Admitted) -> None:
        """Give back the place of an admitted request, when it has ended."""
        self._occupancy.leave(admitted.request.head.iss, len(admitted.request.frame))

    async def _admit(self, frame: bytes, arrival: Arrival, now_ms: int) -> Admitted:
        request = self._open(frame, now_ms)  # 1 to 5
        capability = await self._bind(request, self._binding_fault(request, arrival))  # 6
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

    async def _open_task(
        self, frame: bytes, arrival: StoredArrival, now_ms: int, *, late: bool
    ) -> OpenedTask:
        request = self._open(frame, now_ms, arrival.stored_at_ms)  # 1 to 5
        fault = self._task_binding_fault(request, arrival)
        capability = await self._bind(request, fault, also=BLOB_CONTENT_TYPE)  # 6
        via = self._delegation(request, now_ms, arrival.stored_at_ms)  # 7
        expired = self._time_stored(request, now_ms, arrival.stored_at_ms, late=late)  # 8
        asks = requester(request, via, sender_expired=expired)
        return OpenedTask(request, capability, via, asks, arrival.stored_at_ms)

    async def _admit_task(
        self, task: OpenedTask, approval: Mapping[str, Any] | None, *, denied: AuthzDecision | None = None
    ) -> Admitted:
        if task.request.head.ct != BLOB_CONTENT_TYPE:
            return await self._admit_payload(task, approval, denied=denied)
        if denied is None:  # else it was fetched before, when it was begun
            await self._check_before_fetch(task)
        reference, data = await self._payloads.fetched(task)
        try:
            admitted = await self._admit_payload(
                task, approval, fetched=data, noted=reference.summary(), denied=denied
            )
        except BaseException:
            self._payloads.leave(task.asks.iss, reference.size)
            raise
        return admitted._replace(blob_bytes=reference.size)

    async def _check_before_fetch(self, task: OpenedTask) -> None:
        """Let only those have something fetched whom the grants, or a standing answer, let do it at all."""
        facts = self._facts(task.request, task.via, task=task)
        reason = task.capability.admits_peer(task.asks.iss)
        if reason is None and await self._authorizer.allows_action_in_general(facts):
            return
        self._allowed(task.request, facts, AuthzDecision(allowed=False, reason=reason or _NOT_IN_GENERAL))

    async def _admit_payload(
        self,
        task: OpenedTask,
        approval: Mapping[str, Any] | None,
        *,
        fetched: bytes | None = None,
        noted: Any = None,
        denied: AuthzDecision | None = None,
    ) -> Admitted:
        """Take steps 10 to 12. ``noted`` is what is written down in place of a payload that was fetched.

        What is ``denied`` is let through to be undone, and that is written down.
        """
        request, capability, via = task.request, task.capability, task.via
        payload = await self._validate(request, capability, via, fetched)  # 10
        facts = self._facts(request, via, payload.policy_payload, task=task, approval=approval)
        if denied is not None:
            facts = facts if noted is None else replace(facts, payload=noted)
            undoing = {"event": "undoing"}
            audit_id = await self._record_admission(request, facts, denied, keep=True, more=undoing)  # 12
            return Admitted(request, capability, payload, via, (), denied, audit_id)
        if (reason := capability.admits_peer(task.asks.iss)) is not None:  # 11
            decision = AuthzDecision(allowed=False, reason=reason)
        else:
            decision = await self._authorizer.authorize(facts)
        if noted is not None:
            facts = replace(facts, payload=noted)
        self._allowed(request, facts, decision)
        audit_id = await self._record_admission(request, facts, decision, keep=True)  # 12
        return Admitted(request, capability, payload, via, extend_via(request), decision, audit_id)

    def _open(self, frame: bytes, now_ms: int, stored_at_ms: int | None = None) -> OpenedEnvelope:
        """Take steps 1 to 5. Nobody is answered: who sent this is not known yet."""
        verifier = self._verifier
        step = Step.SIZE
        try:
            verifier.check_size(frame)
            step = Step.FRAME
            parts = verifier.decode_frame(frame)
            step = Step.CHAIN
            if stored_at_ms is None:
                sender = verifier.check_chain(parts, at_ms=now_ms)
            else:
                sender = verifier.check_chain_stored(parts, now_ms=now_ms, stored_at_ms=stored_at_ms)
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

    async def _bind(
        self, request: OpenedEnvelope, wrong: str | None, *, also: str | None = None
    ) -> Capability:
        """Step 6: what the head says is what arrived here (``wrong`` says why not), and it is for me.

        ``also`` is a content type that it may have beside that of the capability.
        """
        head = request.head
        if wrong is not None:
            # Not answered: the reply subject is part of what is in doubt.
            raise AdmissionRefusedError(Step.BINDING, wrong, request=request)
        capability = self._capabilities.get(head.cap)
        if capability is None:
            told = f"unknown capability {head.cap!r}" if await self._is_granted(head) else _DENIED
            raise AdmissionRefusedError(
                Step.BINDING, f"no capability {head.cap!r}", told=told, request=request
            )
        if head.ct not in (capability.content_type, also):
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

    def _task_binding_fault(self, request: OpenedEnvelope, arrival: StoredArrival) -> str | None:
        head = request.head
        if head.kind not in _TASK_KINDS:
            return f"a {head.kind.value} is no task"
        if head.aud != self._me:
            return f"addressed to {head.aud}"
        place = task_subject(self._me, head.cap, Priority.of(head.prio))
        if head.sub != arrival.subject or head.sub != place:
            return f"sealed for subject {head.sub}, stored on {arrival.subject}"
        if head.kind is Kind.REISSUE and head.iss != control_role(self._me.trust_domain):
            return f"{head.iss} may not reissue tasks of {self._me}"
        return None

    def _delegation(
        self, request: OpenedEnvelope, now_ms: int, stored_at_ms: int | None = None
    ) -> tuple[VerifiedLink, ...]:
        """Step 7; ``stored_at_ms`` is the stream's time of what lay in one."""
        try:
            return verify_delegation(request, self._verifier, now_ms=now_ms, stored_at_ms=stored_at_ms)
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

    def _time_stored(
        self, request: OpenedEnvelope, now_ms: int, stored_at_ms: int, *, late: bool = False
    ) -> bool:
        """Step 8 for what lay in a stream; returns whether its sender has expired since."""
        try:
            return check_time_stored(request, now_ms=now_ms, stored_at_ms=stored_at_ms, late=late)
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
        self,
        request: OpenedEnvelope,
        capability: Capability,
        via: tuple[VerifiedLink, ...],
        fetched: bytes | None = None,
    ) -> ValidatedPayload:
        """Step 10. What is wrong with a payload is told only to who may use the capability at all."""
        try:
            if fetched is None:
                return capability.validate(decode_payload(request.payload))
            return capability.validate(await self._payloads.decode(fetched))
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
        self,
        request: OpenedEnvelope,
        via: tuple[VerifiedLink, ...],
        payload: Any = None,
        *,
        task: OpenedTask | None = None,
        approval: Mapping[str, Any] | None = None,
    ) -> AuthzContext:
        """Return what a policy is asked about a request; of a ``task``, also what is known of its waiting."""
        head = request.head
        asks = requester(request, via) if task is None else task.asks
        return AuthzContext(
            caller=asks.iss,
            callee=self._me,  # also of an event, which is addressed to a trust domain
            action=head.cap,
            direction="inbound",
            payload=payload,
            task_id=head.id,
            kind=_kind_asked(head.kind).value,
            transport="bus",
            via=[link.to_context() for link in asks.via],
            principal=asks.principal,
            scope=head.scope,
            reissued_by=asks.reissued_by,
            stored_at=None if task is None else task.stored_at_ms,
            sender_expired=asks.sender_expired,
            approval=approval,
        )

    async def _record_admission(
        self,
        request: OpenedEnvelope,
        facts: AuthzContext,
        decision: AuthzDecision,
        *,
        keep: bool,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """Step 12: written before anything runs; when that fails, nothing runs. Returns the record's id.

        ``more`` is what the record says beside.
        """
        record = {
            "event": "admission",
            **envelope_facts(request, self._notes),
            **decision_facts(facts, decision),
            **(more or {}),
        }
        try:
            frame = (request.digest, request.frame) if keep else None
            entry = await self._audit.record(record, frame=frame)
        except AuditError as error:
            self._notes.forget(request.head)
            self._metrics.audit_write_failures.inc()
            raise AdmissionRefusedError(
                Step.AUDIT, str(error), told="not able to record the call", request=request
            ) from error
        return entry.audit_id

    def _recorded(self, refusal: AdmissionRefusedError) -> AdmissionRefusedError:
        self._record_refusal(refusal)
        return refusal

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
        if refusal.waits:
            _log.info("a task waits: %s", refusal.reason, extra={"audit_id": refusal.audit_id})
        else:
            _log.warning("%s", refusal, extra={"audit_id": refusal.audit_id})


def _kind_asked(kind: Kind) -> Kind:
    """Return as what a policy sees it: a reissue stands for its task (``reissued_by`` says the rest)."""
    return Kind.TASK if kind is Kind.REISSUE else kind


def _unforeseen(fault: Exception, request: OpenedEnvelope | None) -> AdmissionRefusedError:
    """Make a refusal of what failed in a way that no step knows of: told to the log, not to the caller."""
    _log.error("a call could not be admitted for a fault of our own", exc_info=fault)
    reason = f"admission failed ({type(fault).__name__})"
    return AdmissionRefusedError(Step.AUTHORIZATION, reason, request=request, told=_FAILED)
