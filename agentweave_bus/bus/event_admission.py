"""Admission of events: the gate of :mod:`.admission`, for what is for nobody by name.

The steps and their numbers are the same. What differs:

 6. binding: an event is bound to its publisher, not to this agent: ``aud`` is the publisher's trust domain,
    and the subject is that publisher's for that name, where it was stored or heard
 8. time: of what was stored as of a task; what was heard live counts *now*, like a call
 9. replay: the caller's, who knows whether the broker gives the same event again
11. authorization: this agent is the callee, with the event's name as the action
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Final

from agentweave_bus.bus.admission import Admission, AdmissionRefusedError
from agentweave_bus.bus.admitted import Capability, OpenedTask, StoredArrival
from agentweave_bus.bus.refusal import Step
from agentweave_bus.bus.subjects import event_subject
from agentweave_bus.envelope import Kind, OpenedEnvelope, claim_key, requester
from agentweave_bus.spiffe_id import SpiffeID, domain_id

__all__ = ["NO_HANDLER", "EventAdmission"]

NO_HANDLER: Final = "no handler here is for this event"
"""What is told of a genuine event which this process does not handle."""

_HANDLED: Final = "this event was handled before"
_TOO_MANY: Final = "too many live events of this publisher to remember"


class EventAdmission(Admission):
    """The gate in front of one agent's handlers of events.

    Takes what :class:`Admission` takes. A frame goes through :meth:`open_event`, then :meth:`admit_task`.
    """

    def open_event(
        self,
        frame: bytes,
        arrival: StoredArrival,
        *,
        publisher: SpiffeID,
        handler: Callable[[str], Capability | None],
        live: bool = False,
    ) -> OpenedTask:
        """Take a frame from the stream of ``publisher``'s events through steps 1 to 8.

        ``handler`` finds what handles an event of a name. A ``live`` one was heard when it was published.

        Raises:
            AdmissionRefusedError: a step failed. It has been counted and audited already.

        """
        try:
            return self._open_event(frame, arrival, publisher, handler, live=live)
        except AdmissionRefusedError as refusal:
            raise self._recorded(refusal) from refusal.__cause__

    def check_live(self, opened: OpenedTask, source: str) -> None:
        """Check that ``source``, a live handler, has not heard this event: step 9.

        Stored ones come again by right. A publisher that had no clear answer seals the same event anew, for
        as long as it likes, so it is known by its id and data, and not by its envelope.

        Raises:
            AdmissionRefusedError: it has. It has been counted and audited already.

        """
        head = opened.request.head
        key = f"{claim_key(head.iss, head.aud, head.cap, head.id)}{head.pd.hex()}{source}"
        digest = sha256(key.encode()).digest()
        if self._replays.admit(digest, self._clock_ms(), head.iss, renew=True):
            return
        known = digest in self._replays
        reason = f"{_HANDLED}, and is heard live a second time" if known else _TOO_MANY
        raise self._recorded(AdmissionRefusedError(Step.REPLAY, reason, request=opened.request))

    def replayed(self, opened: OpenedTask) -> AdmissionRefusedError:
        """Return the refusal, recorded, of an event that was handled here before: step 9."""
        reason = f"{_HANDLED}, and is stored a second time"
        return self._recorded(AdmissionRefusedError(Step.REPLAY, reason, request=opened.request))

    def _open_event(
        self,
        frame: bytes,
        arrival: StoredArrival,
        publisher: SpiffeID,
        handler: Callable[[str], Capability | None],
        *,
        live: bool,
    ) -> OpenedTask:
        now_ms = self._clock_ms()
        stored_at_ms = None if live else arrival.stored_at_ms
        request = self._open(frame, now_ms, stored_at_ms)  # 1 to 5
        capability = self._bound_to(request, arrival, publisher, handler)  # 6
        via = self._delegation(request, now_ms, stored_at_ms)  # 7
        expired = False
        if live:
            self._time(request, now_ms)  # 8
        else:
            expired = self._time_stored(request, now_ms, arrival.stored_at_ms)
        asks = requester(request, via, sender_expired=expired)
        return OpenedTask(request, capability, via, asks, arrival.stored_at_ms)

    def _bound_to(
        self,
        request: OpenedEnvelope,
        arrival: StoredArrival,
        publisher: SpiffeID,
        handler: Callable[[str], Capability | None],
    ) -> Capability:
        """Step 6."""
        head = request.head
        wrong = None
        if head.kind is not Kind.EVENT:
            wrong = f"a {head.kind.value} is no event"
        elif head.iss != publisher:
            wrong = f"an event of {head.iss} among those of {publisher}"
        elif head.aud != domain_id(publisher.trust_domain):
            wrong = f"addressed to {head.aud}"
        elif head.sub != arrival.subject or head.sub != event_subject(publisher, head.cap):
            wrong = f"sealed for subject {head.sub}, arrived on {arrival.subject}"
        if wrong is not None:
            raise AdmissionRefusedError(Step.BINDING, wrong, request=request)
        capability = handler(head.cap)
        if capability is None:
            raise AdmissionRefusedError(Step.BINDING, NO_HANDLER, told=NO_HANDLER, request=request)
        if head.ct != capability.content_type:
            raise AdmissionRefusedError(Step.BINDING, f"content type {head.ct!r}", request=request)
        return capability
