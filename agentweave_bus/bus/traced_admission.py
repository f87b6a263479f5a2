"""Admission with spans around it: what was passed, when, and at which step a request was refused.

The classes here decide nothing. Where tracing is off, the plain ones are used and none of this runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Final

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.bus.admission import Admission
from agentweave_bus.bus.admitted import Admitted, Arrival, Capability, OpenedTask, StoredArrival
from agentweave_bus.bus.claims import ClaimOutcome
from agentweave_bus.bus.event_admission import EventAdmission
from agentweave_bus.bus.reception import current_reception
from agentweave_bus.bus.refusal import AdmissionRefusedError, Step
from agentweave_bus.envelope import EnvelopeVerifier, OpenedEnvelope, VerifiedLink
from agentweave_bus.envelope.frame import Frame, Link
from agentweave_bus.identity.chain import VerifiedChain
from agentweave_bus.observability.conventions import AUDIT_ID
from agentweave_bus.observability.spans import Span
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["StepwiseVerifier", "TracedAdmission", "TracedEventAdmission"]

_NUMBER: Final = "agentweave.admission.step"
_OPENING: Final = frozenset(step.label for step in Step if step.number <= Step.TIME.number)


class _Passage:
    """One way through some of the steps: its span, below that of the arrival, and what was passed so far."""

    def __init__(self, tracing: Tracing, name: str, known: frozenset[str]) -> None:
        self._tracing = tracing
        self._name = name
        self._block = ExitStack()
        self._began_ns = time.time_ns()
        self._known = known
        self._passed: dict[str, tuple[int, int]] = {}
        self._span: Span | None = None

    def passed(self, step: Step, label: str | None = None) -> None:
        """Note a step, once: the links of a delegation are verified by the same functions."""
        label = label or step.label
        if label in self._known or label in self._passed:
            return
        self._passed[label] = step.number, time.time_ns()
        if self._span is not None:
            self._note(label)

    def proved(self, request: OpenedEnvelope) -> None:
        """Begin the span, below that of the arrival, and note on it what was passed before."""
        if (reception := current_reception()) is not None and self._span is None:
            reception.proved(request)
            self._begin(parent=None if reception.span is None else reception.span.traceparent)

    def refused(self, refusal: AdmissionRefusedError) -> None:
        """Say where it ended, and of what kind the reason is; the reason itself is in the audit log.

        What nobody is proved to have sent begins a trace of its own, as often as it gets a record.
        """
        if self._span is None and refusal.audit_id:
            self._begin(parent=None)
        if self._span is None:
            return
        kind = "refused" if refusal.decision is None else "denied"
        self._span.set_attribute("agentweave.admission.refused_at", refusal.step.label)
        self._span.set_attribute(_NUMBER, refusal.step.number)
        self._span.set_attribute(AUDIT_ID, refusal.audit_id)
        self._span.set_error(kind)
        if (reception := current_reception()) is not None:
            reception.failed(kind)

    def admitted(self, audit_id: str) -> None:
        """Name the record of the admission."""
        if self._span is not None:
            self._span.set_attribute(AUDIT_ID, audit_id)

    def _begin(self, *, parent: str | None) -> None:
        self._span = self._block.enter_context(
            self._tracing.received(
                self._name, kind="internal", parent=parent, attributes={}, began_ns=self._began_ns
            )
        )
        for label in self._passed:
            self._note(label)

    def _note(self, label: str) -> None:
        assert self._span is not None
        number, at_ns = self._passed[label]
        self._span.add_event(label, {_NUMBER: number}, at_ns)

    @contextmanager
    def under_way(self) -> Iterator[_Passage]:
        """Be the one whose steps are noted in the block."""
        token = _passage.set(self)
        try:
            with self._block:
                try:
                    yield self
                except AdmissionRefusedError as refusal:
                    self.refused(refusal)
                    error: Exception = refusal
                else:
                    return
            raise error  # past the span's end, which would name the class of the exception
        finally:
            _passage.reset(token)


_passage: ContextVar[_Passage | None] = ContextVar("agentweave_passage", default=None)


def _passed(step: Step, label: str | None = None) -> None:
    if (passage := _passage.get()) is not None:
        passage.passed(step, label)


class StepwiseVerifier(EnvelopeVerifier):
    """A verifier whose steps are noted one by one."""

    def check_size(self, frame: bytes) -> None:
        """Step 1."""
        super().check_size(frame)
        _passed(Step.SIZE)

    def decode_frame(self, frame: bytes) -> Frame:
        """Step 2."""
        parts = super().decode_frame(frame)
        _passed(Step.FRAME)
        return parts

    def check_chain(self, parts: Frame | Link, *, at_ms: int) -> VerifiedChain:
        """Step 3."""
        sender = super().check_chain(parts, at_ms=at_ms)
        _passed(Step.CHAIN)
        return sender

    def check_proof(self, parts: Frame | Link, sender: VerifiedChain) -> None:
        """Step 4."""
        super().check_proof(parts, sender)
        _passed(Step.PROOF)


class TracedAdmission(Admission):
    """The gate of one agent, with spans; see :class:`Admission`."""

    def __init__(self, *, tracing: Tracing, **gate: Any) -> None:
        super().__init__(**gate)
        self._tracing = tracing

    def _way(self, name: str, known: frozenset[str] = frozenset()) -> _Passage:
        return _Passage(self._tracing, name, known)

    async def admit(self, frame: bytes, arrival: Arrival) -> Admitted:
        """Take a frame through steps 1 to 12."""
        with self._way("admit").under_way() as way:
            admitted = await super().admit(frame, arrival)
            way.admitted(admitted.audit_id)
            return admitted

    async def open_task(self, frame: bytes, arrival: StoredArrival, *, late: bool = False) -> OpenedTask:
        """Take a frame from the queue of tasks through steps 1 to 8."""
        with self._way("open").under_way():
            return await super().open_task(frame, arrival, late=late)

    async def admit_task(self, task: OpenedTask, *, approval: Mapping[str, Any] | None = None) -> Admitted:
        """Take a task through steps 10 to 12."""
        with self._way("admit", _OPENING).under_way() as way:
            way.proved(task.request)
            admitted = await super().admit_task(task, approval=approval)
            way.admitted(admitted.audit_id)
            return admitted

    # --- the steps ---------------------------------------------------------------------------------------

    def _open(self, frame: bytes, now_ms: int, stored_at_ms: int | None = None) -> OpenedEnvelope:
        request = super()._open(frame, now_ms, stored_at_ms)
        if (passage := _passage.get()) is not None:
            passage.passed(Step.HEAD)
            passage.proved(request)
        return request

    async def _bind(
        self, request: OpenedEnvelope, wrong: str | None, *, also: str | None = None
    ) -> Capability:
        return _bound(request, await super()._bind(request, wrong, also=also))

    def _delegation(
        self, request: OpenedEnvelope, now_ms: int, stored_at_ms: int | None = None
    ) -> tuple[VerifiedLink, ...]:
        via = super()._delegation(request, now_ms, stored_at_ms)
        _passed(Step.DELEGATION)
        return via

    def _time(self, request: OpenedEnvelope, now_ms: int) -> None:
        super()._time(request, now_ms)
        _passed(Step.TIME)

    def _time_stored(
        self, request: OpenedEnvelope, now_ms: int, stored_at_ms: int, *, late: bool = False
    ) -> bool:
        expired = super()._time_stored(request, now_ms, stored_at_ms, late=late)
        _passed(Step.TIME)
        return expired

    def _filter(self, request: OpenedEnvelope, now_ms: int) -> None:
        super()._filter(request, now_ms)
        _passed(Step.REPLAY)

    def _check_claim(self, request: OpenedEnvelope, outcome: ClaimOutcome) -> None:
        super()._check_claim(request, outcome)
        _passed(Step.REPLAY, "claim")

    async def _validate(self, *request: Any) -> Any:
        payload = await super()._validate(*request)
        _passed(Step.PAYLOAD)
        return payload

    def _allowed(
        self, request: OpenedEnvelope, facts: AuthzContext, decision: AuthzDecision
    ) -> AuthzDecision:
        decision = super()._allowed(request, facts, decision)
        _passed(Step.AUTHORIZATION)
        return decision

    async def _record_admission(self, *facts: Any, **more: Any) -> str:
        audit_id = await super()._record_admission(*facts, **more)
        _passed(Step.AUDIT)
        return audit_id


class TracedEventAdmission(TracedAdmission, EventAdmission):
    """The gate in front of one agent's handlers of events, with spans; see :class:`EventAdmission`."""

    def open_event(
        self,
        frame: bytes,
        arrival: StoredArrival,
        *,
        publisher: SpiffeID,
        handler: Callable[[str], Capability | None],
        live: bool = False,
    ) -> OpenedTask:
        """Take a frame from the stream of a publisher's events through steps 1 to 8."""
        with self._way("open").under_way():
            return super().open_event(frame, arrival, publisher=publisher, handler=handler, live=live)

    def _bound_to(
        self,
        request: OpenedEnvelope,
        arrival: StoredArrival,
        publisher: SpiffeID,
        handler: Callable[[str], Capability | None],
    ) -> Capability:
        return _bound(request, super()._bound_to(request, arrival, publisher, handler))


def _bound(request: OpenedEnvelope, capability: Capability) -> Capability:
    _passed(Step.BINDING)
    if (reception := current_reception()) is not None:
        reception.bound(request, capability.name)
    return capability
